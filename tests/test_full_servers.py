"""Servers that can't keep a file, or hardly: what is refused, and what survives."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheServerError
from pymemcache.exceptions import MemcacheUnexpectedCloseError as ClosedError
from pymemcache.exceptions import MemcacheUnknownCommandError as UnknownError

import mcpool
import memchunk
from memchunk import FileCache
from tests.engines import options_of
from tests.faults import Once, Wrapped
from tests.support import MIB, Memcached, Start, wait_for

CHUNK = 1000
OLD = bytes(range(256)) * 10
BIG = os.urandom(50 * MIB)


def full(
    cache: FileCache, data: Any, name: str = "file", **options: Any
) -> memchunk.CacheFull:
    with pytest.raises(memchunk.CacheFull) as caught:
        cache.set(name, data, **options)
    assert caught.value.name == name
    return caught.value


def sets(memcached: Memcached) -> int:
    return int(memcached.stats()["cmd_set"])


def in_pieces(data: bytes) -> Iterator[bytes]:
    return (data[slice(start, start + MIB)] for start in range(0, len(data), MIB))


# --- A stock server, and smaller ones -------------------------------------------------


@pytest.mark.parametrize("is_known", [True, False])
def test_a_stock_server_holds_50_mib_and_replaces_them_five_times(
    start_memcached: Start, is_known: bool
) -> None:
    memcached = start_memcached("-m", "64")
    with FileCache(memcached.server) as cache:
        for turn in range(6):
            data = bytes([turn]) + BIG[1:]
            cache.set("file", data if is_known else in_pieces(data))
            assert cache.get("file") == data
            assert len(memcached.keys()) == 1 + cache.stat("file").chunks


def test_a_stock_server_holds_one_file_after_another(start_memcached: Start) -> None:
    """A cache evicts old files. It must never refuse new ones for them."""
    with FileCache(start_memcached("-m", "64").server) as cache:
        for turn in range(15):
            data = bytes([turn]) + BIG[slice(1, 20 * MIB)]
            cache.add(str(turn), data)
            assert cache.get(str(turn)) == data
        cache.set("large", BIG)
        assert cache.get("large") == BIG


@pytest.mark.parametrize("verb", ["set", "add", "cas"])
def test_a_file_larger_than_memory_is_refused_and_the_old_one_stays(
    start_memcached: Start, verb: str
) -> None:
    memcached = start_memcached("-m", "16")
    with FileCache(memcached.server) as cache:
        version = [cache.set("file", BIG[: 10 * MIB]).version] * (verb == "cas")
        before, name = sets(memcached), "other" if verb == "add" else "file"
        with pytest.raises(memchunk.CacheFull) as caught:
            getattr(cache, verb)(name, BIG[: 17 * MIB], *version)
        assert caught.value.cause == "memory"
        assert sets(memcached) == before
        assert cache.get("file") == BIG[: 10 * MIB]


def test_a_source_of_unknown_length_ends_a_write_if_memory_ends(
    start_memcached: Start,
) -> None:
    memcached, count = start_memcached("-m", "16"), itertools.count()
    with FileCache(memcached.server) as cache:
        assert full(cache, (bytes(100_000) for _ in count)).cause == "memory"
    assert next(count) < 220
    assert memcached.keys() == []


def test_a_replacement_makes_room_only_if_it_needs_it(start_memcached: Start) -> None:
    memcached, left = start_memcached("-m", "64"), list[int]()
    with FileCache(memcached.server) as cache:
        old = cache.set("file", BIG)

        def source() -> Iterator[bytes]:
            for piece in in_pieces(BIG[::-1]):
                yield piece
                keys = memcached.keys()
                left.append(sum(old.version in key for key in keys))

        cache.set("file", source(), size=len(BIG))
        assert cache.get("file") == BIG[::-1]
    assert (left[0], left[-1]) == (old.chunks, 0)
    # Both, and 1/8 for other items, would not fit with the second batch of 4 MiB.
    assert left.count(old.chunks) == 7


def is_stored(cache: FileCache, data: bytes) -> bool:
    with contextlib.suppress(memchunk.CacheFull):
        cache.set("file", data)
        return True
    return False


def test_readers_do_not_keep_writers_out(start_memcached: Start) -> None:
    """Chunks that were read are active, and memcached evicts others first."""
    with FileCache(start_memcached("-m", "64").server) as cache:
        stop = threading.Event()

        def read() -> None:
            for name in itertools.cycle("abc"):
                if stop.is_set():
                    return
                with contextlib.suppress(memchunk.CacheMiss):
                    assert len(cache.get(name)) == 15 * MIB

        for name in "abc":
            cache.set(name, BIG[: 15 * MIB])
        reader = threading.Thread(target=read)
        reader.start()
        try:
            for turn in range(5):
                data = bytes([turn]) + BIG[slice(1, 40 * MIB)]
                stored = functools.partial(is_stored, cache, data)
                # memcached's LRU thread may be late once: then the write says so.
                wait_for(stored, "the writer to get through")
                assert cache.get("file") == data
        finally:
            stop.set()
            reader.join()


# --- Why a server did not keep a file -------------------------------------------------


def test_a_cache_of_small_items_says_no_until_it_has_room(
    start_memcached: Start,
) -> None:
    memcached = start_memcached("-m", "64", "-o", "slab_automove=0")
    memcached.fill(60_000, 1000)
    with FileCache(memcached.server) as cache:
        assert full(cache, BIG).cause == "pressure"
        assert "memchunk" not in "".join(memcached.keys())
        assert memcached.command("slabs automove 2") == b"OK\r\n"

        wait_for(functools.partial(is_stored, cache, BIG), "room for 50 MiB")
        assert cache.get("file") == BIG


OPTIONS = ["-o no_modern", "-I 4m", "-I 512k", "-I 128k -o slab_chunk_max=64"]
OPTIONS += ["-I 16k -o slab_chunk_max=8", "-I 2m -o slab_chunk_max=128"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [0, 1, 500, 40_000, 3 * MIB + 1])
def test_files_are_cut_as_the_server_keeps_items(
    start_memcached: Start, options: str, size: int
) -> None:
    memcached = start_memcached(*options_of(options))
    with FileCache(memcached.server) as cache:
        cache.set("file", BIG[:size])
        assert cache.get("file") == BIG[:size]
        assert int(memcached.stats()["bytes"]) < 1.2 * size + 2000


def test_lost_chunks_are_called_pressure_if_the_file_has_room(
    start_memcached: Start,
) -> None:
    """Without the modern options, memcached refuses chunks while others are active."""
    memcached = start_memcached("-m", "64", "-o", "no_modern")
    with FileCache(memcached.server) as cache:
        cache.set("file", BIG)
        flush = Once("touch", memcached.flush)
        client = Wrapped(Client(memcached.address, timeout=5), before=flush)
        with FileCache(client) as flushed:
            assert full(flushed, BIG[: 30 * MIB], "other").cause == "pressure"


def test_a_chunk_size_larger_than_an_item_is_refused(start_memcached: Start) -> None:
    memcached, tries = start_memcached(), list[str]()
    client = Wrapped(Client(memcached.address), before=tries.append)
    with FileCache(client, chunk_size=2 * MIB) as cache:
        error = full(cache, BIG[: 3 * MIB])
        assert (error.cause, "-I" in str(error)) == ("item size", True)
    assert tries.count("set_many") < 10  # as no patience helps
    assert memcached.keys() == []


def test_metadata_larger_than_an_item_are_refused_before_payload_is_sent(
    start_memcached: Start,
) -> None:
    memcached = start_memcached(*options_of("-I 32k -o slab_chunk_max=32"))
    with FileCache(memcached.server) as cache:
        before = sets(memcached)
        for data in (BIG[:MIB], b"small", iter([BIG[:MIB]])):
            assert full(cache, data, metadata=bytes(40_000)).cause == "item size"
        assert sets(memcached) == before
        cache.set("file", BIG[:MIB], metadata=bytes(20_000))
        assert cache.stat("file").metadata == bytes(20_000)


def test_metadata_that_leave_no_room_for_a_small_file_are_refused_before_it_is_read(
    start_memcached: Start,
) -> None:
    memcached = start_memcached(*options_of("-I 32k -o slab_chunk_max=32"))
    source = iter([BIG[:2000]])
    with FileCache(memcached.server) as cache:
        assert full(cache, source, metadata=bytes(31_500)).cause == "item size"
    assert list(source) == [BIG[:2000]]


def test_a_smaller_limit_after_a_restart_is_noticed(start_memcached: Start) -> None:
    memcached = start_memcached()
    with FileCache(memcached.server) as cache:
        cache.set("file", BIG[: 2 * MIB])
        memcached.kill()
        memcached.options = tuple(options_of("-I 128k -o slab_chunk_max=64"))
        memcached.start()
        assert full(cache, BIG[: 2 * MIB]).cause == "item size"
        assert cache.set("file", BIG[: 2 * MIB]).chunks >= 32


def test_a_lease_that_ran_out_is_named(memcached: Memcached) -> None:
    def source() -> Iterator[bytes]:
        yield BIG[: 5 * MIB]
        wait_for(lambda: not memcached.keys(), "the lease to run out")
        yield BIG[: 5 * MIB]

    with FileCache(memcached.server, lease=2) as cache:
        error = full(cache, source())
    assert re.search(r"\d+ chunks are gone: .* past their lease", str(error))
    assert len(str(error)) < 300
    assert memcached.keys() == []


# --- What `stats` tells ---------------------------------------------------------------


class Telling:
    """A client whose `stats` are changed, or raise."""

    def __init__(self, memcached: Memcached, changes: Any) -> None:
        self.client, self.changes, self.asked = Client(memcached.address), changes, 0

    def stats(self, *args: str) -> dict[bytes, Any]:
        self.asked += 1
        if isinstance(self.changes, Exception):
            raise self.changes
        told = {**self.client.stats(*args), **self.changes}
        return {key: value for key, value in told.items() if value is not None}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


TOLD: list[Any] = [
    {b"item_size_max": b"a lot", b"maxbytes": b"", b"slab_chunk_max": b"1.5"},
    {b"item_size_max": None, b"maxbytes": None, b"slab_chunk_max": None},
    {b"item_size_max": 0, b"maxbytes": 0},
    {b"maxbytes": 0},
    {b"maxbytes": -1},
    {b"slab_chunk_max": 512},  # KiB, as memcached counts from 1.6.24 on
    {b"item_size_max": -1, b"slab_chunk_max": -1},
    *[
        UnknownError("stats"),
        ClosedError(),
        {b"proxy_enabled": b"yes", b"maxbytes": 1000},
    ],
]


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_stats_that_tell_nothing_do_not_hinder(memcached: Memcached, told: Any) -> None:
    with FileCache(Telling(memcached, told)) as cache:
        for _ in range(2):
            assert cache.set("file", BIG[: 5 * MIB]).chunks in range(5, 12)
        assert cache.get("file") == BIG[: 5 * MIB]


@pytest.mark.parametrize("error", [UnknownError("stats"), ClosedError()])
def test_a_server_that_refuses_stats_is_not_asked_again(
    memcached: Memcached, error: Exception
) -> None:
    client = Telling(memcached, error)
    with FileCache(client) as cache:
        for turn in range(5):
            cache.set(str(turn), BIG[:MIB], expire=40 * 24 * 3600)
    assert client.asked <= 2  # a closed connection is tried once more


@pytest.mark.parametrize("error", [UnknownError("stats"), ClosedError()])
def test_a_server_that_refuses_stats_is_not_asked_for_the_cause(
    start_memcached: Start, error: Exception
) -> None:
    client = Telling(start_memcached("-m", "16"), error)
    with FileCache(client) as cache:
        for _ in range(2):
            assert full(cache, BIG[: 40 * MIB]).cause == "unknown"
    assert client.asked <= 2  # a closed connection is tried once more


@pytest.mark.parametrize("told", [{b"proxy_enabled": b"yes"}, UnknownError("stats")])
def test_a_server_that_does_not_tell_its_memory_leaves_the_cause_unknown(
    start_memcached: Start, told: Any
) -> None:
    client = Telling(start_memcached("-m", "16"), told)
    with FileCache(client) as cache:
        assert full(cache, BIG[: 40 * MIB]).cause == "unknown"


def test_the_cause_counts_the_parts_of_a_file(memcached: Memcached) -> None:
    client = Telling(memcached, {b"maxbytes": 4500})
    with FileCache(client, chunk_size=1000) as cache:
        part, _ = cache.stage("file", BIG[:3000])
        before = sets(memcached)
        assert full(cache, BIG[:1501], parts=[part]).cause == "memory"
        assert sets(memcached) == before


def test_the_cause_is_by_the_limits_after_a_restart(start_memcached: Start) -> None:
    memcached = start_memcached()
    with FileCache(memcached.server) as cache:
        cache.set("file", BIG[:MIB])
        memcached.kill()
        memcached.options = ("-m", "16")
        memcached.start()
        error = full(cache, BIG[: 30 * MIB])
        assert (error.cause, str(16 * MIB) in str(error)) == ("memory", True)


class Touched(Telling):
    """A client that counts the touches of each key."""

    def __init__(self, memcached: Memcached, changes: Any) -> None:
        super().__init__(memcached, changes)
        self.touches = collections.Counter[str]()

    def touch(self, key: str, **options: Any) -> bool:
        self.touches[key] += 1
        return self.client.touch(key, **options)


@pytest.mark.parametrize("verb", ["set", "set in pieces", "stage"])
@pytest.mark.parametrize(("memory", "more"), [(10_999_999, 2), (11_000_000, 0)])
def test_chunks_are_kept_active_if_the_file_takes_more_than_half_of_the_memory(
    memcached: Memcached, verb: str, memory: int, more: int
) -> None:
    """Two touches make a chunk active in memcached's LRU."""
    client, data = Touched(memcached, {b"maxbytes": memory}), BIG[:5_500_000]
    with FileCache(client, chunk_size=500_000, max_size=len(data)) as cache:
        if verb == "stage":
            part, _ = cache.stage("file", data)
            cache.stage("file", b"", parts=[part])  # keeps earlier parts active, too
        else:
            cache.set("file", in_pieces(data) if "pieces" in verb else data)
    keys = memcached.keys()
    times = [client.touches[key] for key in keys if "|#|" in key]
    assert times == [2 * more if verb == "stage" else more + 1] * 11


class Refusing(Touched):
    """A client that refuses the first chunk once."""

    refused: Any = ()

    def set_many(self, values: Any, **options: Any) -> Any:
        if self.refused:
            return self.client.set_many(values, **options)
        self.refused = list(values)
        return self.refused


def test_chunks_behind_one_that_was_refused_are_kept_active(
    memcached: Memcached,
) -> None:
    client = Refusing(memcached, {})
    with FileCache(client, chunk_size=500_000) as cache:
        cache.set("file", BIG[:5_500_000])
        assert cache.get("file") == BIG[:5_500_000]
    assert list(client.touches.values()) == [3] * 11


class Short(Wrapped):
    """A pool whose server has no memory for the first three batches."""

    def __init__(self, memcached: Memcached) -> None:
        super().__init__(mcpool.connect(memcached.server))
        self.batches: list[int] = []

    def for_key(self, _: str) -> Short:
        return self

    def pipeline(self, commands: Iterable[tuple[bytes, ...]]) -> list[bytes]:
        made = list(commands)
        sets = [each for each in made if each[0].startswith(b"set")]
        self.batches += [len(sets)] * bool(sets)
        if not sets or len(self.batches) > 3:
            return list(self.client.pipeline(made))
        refusal = b"SERVER_ERROR out of memory storing object"
        return [refusal if each in sets else b"NOT_FOUND" for each in made]


def test_chunks_that_were_refused_twice_are_sent_one_at_a_time(
    memcached: Memcached,
) -> None:
    """Each try takes memory from chunks that are stored."""
    pool = Short(memcached)
    with FileCache(pool, chunk_size=500_000) as cache:
        cache.set("file", BIG[:5_500_000])
        assert cache.get("file") == BIG[:5_500_000]
    assert pool.batches == [8, 8, *[1] * 9, 3]


def test_a_last_chunk_that_was_refused_once_leaves_its_lease(
    memcached: Memcached,
) -> None:
    with FileCache(Refusing(memcached, {}), chunk_size=CHUNK) as cache:
        cache.set("file", OLD)
        assert cache.get("file") == OLD
    assert set(memcached.expiries().values()) == {-1}


@pytest.mark.parametrize("memory", [6 * MIB, 64 * MIB])
@pytest.mark.parametrize("count", [8, 11])  # a whole batch, and more
def test_every_chunk_is_sent_once(
    memcached: Memcached, memory: int, count: int
) -> None:
    client, before = Telling(memcached, {b"maxbytes": memory}), sets(memcached)
    with FileCache(client, chunk_size=500_000) as cache:
        cache.set("file", BIG[: count * 500_000])
    assert sets(memcached) - before == count + 1


def test_a_replacement_that_needs_room_deletes_the_old_file_once(
    memcached: Memcached,
) -> None:
    client, looks = Telling(memcached, {b"maxbytes": 13 * MIB}), list[str]()
    pool = Wrapped(client, before=looks.append)
    with FileCache(pool) as cache:
        cache.set("file", BIG[: 8 * MIB])
        looks.clear()
        cache.set("file", BIG[slice(MIB, 13 * MIB)])
        assert looks.count("gets") == 2
        assert cache.get("file") == BIG[slice(MIB, 13 * MIB)]


def test_a_server_without_cas_is_a_clear_error(start_memcached: Start) -> None:
    refusal = pytest.raises(memchunk.CacheUnavailable, match="without cas")
    with FileCache(start_memcached("-C").server) as cache:
        for data in (BIG[:MIB], b"small"):
            with refusal:
                cache.set("file", data)
    client = Client(cache.client.server)
    with FileCache(client) as cache:
        client.set(cache._entry("file").key, b"1", noreply=False)
        for call in (cache.get, cache.stat, cache.delete, cache.__contains__):
            with refusal:
                call("file")


@pytest.mark.parametrize("verb", ["set", "touch", "delete"])
def test_a_manifest_that_others_keep_changing_is_contention(
    memcached: Memcached, verb: str
) -> None:
    with FileCache(memcached.server, chunk_size=CHUNK) as other:
        other.set("file", b"0")

        def overtake(command: str) -> None:
            if command == "cas":
                other.set("file", b"1")

        client = Wrapped(Client(memcached.address, timeout=5), before=overtake)
        options: dict[str, Any] = {"set": {"source": OLD}, "touch": {"expire": 60}}
        refusal = pytest.raises(memchunk.CacheFull)
        with FileCache(client, chunk_size=CHUNK) as cache, refusal as caught:
            getattr(cache, verb)("file", **options.get(verb, {}))
        assert caught.value.cause == "contention"
        assert other.get("file") == b"1"
    assert len(memcached.keys()) == 1


@pytest.mark.parametrize("said", ["out of memory storing object", "Out of memory"])
def test_a_refusal_is_told_in_the_words_of_the_server(
    memcached: Memcached, said: str
) -> None:
    def refuse(command: str) -> None:
        if command == "add":
            raise MemcacheServerError(said.encode())

    client = Wrapped(Client(memcached.address, timeout=5), before=refuse)
    with FileCache(client) as cache, pytest.raises(memchunk.CacheFull) as caught:
        cache.add("file", b"x")
    assert f": SERVER_ERROR {said}; " in str(caught.value)


def test_a_refused_manifest_leaves_no_chunk(memcached: Memcached) -> None:
    def refuse(command: str) -> None:
        if command == "add":
            raise MemcacheServerError(b"out of memory storing object")

    client = Wrapped(Client(memcached.address, timeout=5), before=refuse)
    with FileCache(client, chunk_size=1000) as cache, pytest.raises(memchunk.CacheFull):
        cache.add("file", bytes(2500))
    assert memcached.keys() == []
