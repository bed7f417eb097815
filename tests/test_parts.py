"""Parts: `stage` stores chunks of a file to come, `parts=` publishes them."""

from __future__ import annotations

import array
import contextlib
import functools
import itertools
import json
import os
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest
from pymemcache.client.base import Client, PooledClient
from pymemcache.exceptions import MemcacheServerError

import memchunk
from memchunk import FileCache
from tests.faults import Once, Wrapped, raising
from tests.support import CHUNK, CLOCK, MIB, Memcached, Start, wait_for

DATA = bytes(range(256)) * 50  # 12,800 bytes
BIG = os.urandom(50 * MIB)


def staged(cache: FileCache, data: bytes, piece: int) -> tuple[list[str], bytes]:
    """Stage whole chunks of a file as it comes in pieces; return parts and rest."""
    parts: list[str] = []
    rest = b""
    for start in range(0, len(data), piece):
        rest += data[slice(start, start + piece)]
        part, taken = cache.stage("file", rest, parts=parts)
        parts, rest = json.loads(json.dumps([*parts, part])), rest[taken:]
    return parts, rest


def chunks(memcached: Memcached, parts: list[str]) -> dict[str, int]:
    """The chunks that are there of parts: keys, and when they expire (-1: never)."""
    keys, ends = [part.partition(":")[0] for part in parts], memcached.expiries()
    return {key: end for key, end in ends.items() if key.split("|#|")[-1][:16] in keys}


# --- Staging and publication ----------------------------------------------------------


@pytest.mark.parametrize("piece", [333, 1000, 1001, 4999, 12_800, 20_000])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_file_is_staged_in_pieces_of_any_size(
    cache: FileCache, memcached: Memcached, piece: int, is_known: bool
) -> None:
    parts, rest = staged(cache, DATA, piece)
    assert "file" not in cache
    size = len(DATA) if is_known else None
    info = cache.add("file", iter([rest]), parts=parts, size=size, metadata=b"mine")
    assert (info.size, info.metadata, cache.stat("file")) == (12_800, b"mine", info)
    assert cache.get("file") == DATA
    assert len(memcached.keys()) == 1 + info.chunks == 14


@pytest.mark.parametrize("size", [0, 1, 62, 63, 999, 1000, 1001, 2000, 5000, 5001])
def test_a_file_of_parts_comes_back_however_long_its_rest_is(
    cache: FileCache, memcached: Memcached, size: int
) -> None:
    first, taken = cache.stage("file", DATA[:2500])
    assert taken == 2000
    cache.set("file", DATA[slice(2000, 2000 + size)], parts=[first])
    assert cache.get("file") == DATA[: 2000 + size]
    with cache.open("file") as file:
        assert b"".join(file.chunks(1500, 3500)) == DATA[: 2000 + size][1500:3500]
    cache.delete("file")
    assert memcached.keys() == []


def test_stage_of_less_than_a_chunk_takes_nothing(
    cache: FileCache, memcached: Memcached
) -> None:
    part, taken = cache.stage("file", DATA[:999])
    assert (taken, memcached.keys()) == (0, [])
    cache.add("file", DATA[:999], parts=[part])
    assert cache.get("file") == DATA[:999]


def test_a_staged_chunk_tells_the_number_of_chunks_in_its_part(
    cache: FileCache, memcached: Memcached
) -> None:
    for count in (1, 3):
        part, _ = cache.stage("file", DATA[: count * CHUNK])
        heads = [memcached.read(key)[:8] for key in chunks(memcached, [part])]
        indices = range(count)
        assert sorted(heads) == [struct.pack(">II", each, count) for each in indices]


def test_stage_takes_any_bytes_and_no_text(cache: FileCache) -> None:
    part, taken = cache.stage("file", memoryview(array.array("I", DATA)))
    cache.add("file", DATA[taken:], parts=(part,))
    assert (taken, cache.get("file")) == (12_000, DATA)
    for text in ("text" * 1000, None):
        with pytest.raises(TypeError):
            cache.stage("file", text)  # type: ignore[arg-type]


def test_the_lease_ends_parts_that_nobody_publishes(
    cache: FileCache, memcached: Memcached
) -> None:
    cache.stage("file", DATA)
    ends = memcached.expiries().values()
    assert all(3600 - CLOCK < end - time.time() < 3601 + CLOCK for end in ends)
    part, _ = cache.stage("other", DATA, lease=1)
    wait_for(lambda: not chunks(memcached, [part]), "the lease to end")
    with pytest.raises(memchunk.FileEvicted):
        cache.stage("other", b"", parts=[part])
    with pytest.raises(memchunk.CacheFull):
        cache.set("other", b"", parts=[part])


# --- What is refused ------------------------------------------------------------------

WRONG: list[Any] = [
    *["0123456789abcdef:1:1000", ["x"], [""], [b"0123456789abcdef:1:1000"], [None]],
    *[
        ["0123456789abcdef:1:0"],
        ["0123456789ABCDEF:1:1000"],
        ["0123456789abcdef:1:1\n"],
    ],
    ["0123456789abcdef:1:1000", "1123456789abcdef:1:1001"],
    ["0123456789abcdef:1:1000", "0123456789abcdef:1:1000"],
    ["0123456789abcdef:\N{ARABIC-INDIC DIGIT ONE}:1000"],
]


@pytest.mark.parametrize("parts", WRONG)
def test_wrong_parts_are_refused_before_anything_is_read(
    cache: FileCache, memcached: Memcached, parts: Any
) -> None:
    source = iter([b"x"])
    stage = functools.partial(cache.stage, "file", DATA)
    write = functools.partial(cache.set, "file", source)
    for call in (stage, write, functools.partial(cache.unstage, "file")):
        with pytest.raises((ValueError, TypeError)) as caught:
            call(parts=parts)
        assert not isinstance(caught.value, memchunk.MemchunkError)
    assert next(source) == b"x"
    assert memcached.keys() == []


def test_parts_of_two_chunk_sizes_are_refused(
    cache: FileCache, memcached: Memcached
) -> None:
    one, _ = cache.stage("file", DATA)
    with FileCache(memcached.server, chunk_size=999) as other:
        two, _ = other.stage("file", DATA)
        for call in (other.add, other.set):
            with pytest.raises(ValueError, match="for one upload"):
                call("file", b"", parts=[one, two])
        # What was cut first decides for those who go on.
        assert other.stage("file", DATA, parts=[one])[1] == 12_000


def test_parts_of_another_file_are_not_there(cache: FileCache) -> None:
    part, _ = cache.stage("file", DATA)
    with pytest.raises(memchunk.FileEvicted):
        cache.stage("other", b"", parts=[part])
    with pytest.raises(memchunk.CacheFull):
        cache.add("other", b"", parts=[part])


@pytest.mark.parametrize("size", [12_799, 12_801, 800])
@pytest.mark.parametrize("is_known", [True, False])
def test_size_is_that_of_the_whole_file(
    cache: FileCache, memcached: Memcached, size: int, is_known: bool
) -> None:
    part, taken = cache.stage("file", DATA)
    rest, before = DATA[taken:], memcached.keys()
    with pytest.raises(memchunk.SizeMismatch) as caught:
        cache.add("file", rest if is_known else iter([rest]), parts=[part], size=size)
    # The parts alone are too many.
    least = 12_000 if size == 800 and not is_known else 12_800
    assert (caught.value.size, caught.value.received) == (size, least)
    assert memcached.keys() == before  # the parts stay, for another try
    cache.add("file", rest, parts=[part], size=12_800)
    assert cache.get("file") == DATA


def test_a_full_batch_does_not_count_as_a_small_file(memcached: Memcached) -> None:
    """The parts were cut smaller than this cache would cut them."""
    data = BIG[: 5 * MIB]
    with FileCache(memcached.server, chunk_size=100_000) as cache:
        part, _ = cache.stage("file", b"")
    with FileCache(memcached.server, chunk_size=80 * MIB) as cache:
        cache.add("file", data, parts=[part])
        assert cache.get("file") == data


def test_parts_stay_on_their_lease_if_the_rest_of_the_file_is_short(
    cache: FileCache, memcached: Memcached
) -> None:
    part, taken = cache.stage("file", DATA, lease=100)
    before = chunks(memcached, [part])
    with pytest.raises(memchunk.SizeMismatch):
        cache.add("file", iter([DATA[taken:]]), parts=[part], size=12_900)
    assert chunks(memcached, [part]) == before


def test_parts_that_make_the_file_too_large_are_refused(memcached: Memcached) -> None:
    with FileCache(memcached.server, chunk_size=CHUNK, max_size=4500) as cache:
        part, _ = cache.stage("file", DATA[:4000])
        before = memcached.keys()
        for call in (cache.stage, cache.add, cache.set):
            with pytest.raises(memchunk.FileTooLarge) as caught:
                call("file", DATA[:501], parts=[part])
            assert (caught.value.size, caught.value.limit) == (4501, 4500)
        with pytest.raises(memchunk.FileTooLarge):
            cache.stage("other", DATA)
        assert memcached.keys() == before
        assert cache.add("file", DATA[:500], parts=[part]).size == 4500


def test_evicted_chunks_of_parts_are_named_in_the_order_of_the_file(
    cache: FileCache, memcached: Memcached
) -> None:
    parts, rest = staged(cache, DATA, 5000)
    one, two, _ = [part[:16] for part in parts]
    for key in chunks(memcached, parts):
        if key.endswith((f"{one}:1", f"{two}:0", f"{two}:4")):
            memcached.delete(key)
    before = memcached.keys()
    with pytest.raises(memchunk.FileEvicted) as evicted:
        cache.stage("file", b"", parts=parts)
    assert (evicted.value.missing, evicted.value.info.chunks) == ([1, 5, 9], 12)
    with pytest.raises(memchunk.CacheFull, match="3 chunks are gone"):
        cache.set("file", rest, parts=parts)
    assert memcached.keys() == before


# --- Two at once, and parts that are published ----------------------------------------


def test_two_who_go_on_at_one_place_never_mix(
    cache: FileCache, memcached: Memcached
) -> None:
    first, taken = cache.stage("file", DATA)
    ours, _ = cache.stage("file", b"o" * CHUNK, parts=[first])
    theirs, _ = cache.stage("file", b"t" * CHUNK, parts=[first])
    cache.add("file", b"", parts=[first, ours])
    assert cache.get("file") == DATA[:taken] + b"o" * CHUNK
    with pytest.raises(memchunk.FileExists):
        cache.add("file", b"", parts=[first, theirs])
    cache.set("file", b"", parts=[first, theirs])
    assert cache.get("file") == DATA[:taken] + b"t" * CHUNK
    wait_for(lambda: len(memcached.keys()) == 14, "the chunks of the old file to go")


@pytest.mark.parametrize("rest", [b"", b"rest"])
def test_parts_that_are_published_twice_stay_until_the_file_is_deleted(
    cache: FileCache, memcached: Memcached, rest: bytes
) -> None:
    parts, _ = staged(cache, DATA, 5000)
    first = cache.add("file", rest, parts=parts)
    second = cache.set("file", rest, parts=parts)
    assert first.version != second.version
    cache.unstage("file", parts)
    assert cache.get("file") == DATA[:12_000] + rest
    cache.delete("file", second.version)
    cache.unstage("file", parts)
    assert memcached.keys() == []


def test_threads_that_publish_the_same_parts_leave_a_whole_file(
    cache: FileCache,
) -> None:
    parts, rest = staged(cache, DATA, 5000)

    def publish(turn: int) -> bytes:
        cache.set("file", rest, parts=parts)
        cache.unstage("file", parts)
        return cache.get("file")

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(publish, range(40))) == {DATA}


class Tiny(Wrapped):
    """A server that tells that it has room for nine chunks."""

    def stats(self, *_: str) -> dict[bytes, int]:
        return {b"maxbytes": 9 * CHUNK}


def test_a_cas_that_comes_too_late_deletes_no_parts_of_the_new_file(
    memcached: Memcached,
) -> None:
    client = PooledClient(memcached.address, default_noreply=False)
    with FileCache(Tiny(client), chunk_size=CHUNK) as cache:
        part, taken = cache.stage("file", DATA[: 5 * CHUNK])
        old = cache.add("file", b"old", parts=[part])

        def source() -> Iterator[bytes]:
            new = cache.set("file", b"new", parts=[part])
            assert new.version != old.version
            yield DATA[:taken]

        with pytest.raises(memchunk.FileChanged):
            cache.cas("file", source(), old.version)
        assert cache.get("file") == DATA[:taken] + b"new"


def test_stage_refuses_more_than_memory_holds_before_it_sends_any(
    memcached: Memcached,
) -> None:
    client = PooledClient(memcached.address, default_noreply=False)
    with FileCache(Tiny(client), chunk_size=CHUNK) as cache:
        part, _ = cache.stage("file", DATA[: 5 * CHUNK])
        with pytest.raises(memchunk.CacheFull) as caught:
            cache.stage("file", DATA[: 5 * CHUNK], parts=[part])
    assert caught.value.cause == "memory"
    assert len(memcached.keys()) == 5


def test_a_publication_that_is_done_raises_no_error(
    memcached: Memcached, cache: FileCache
) -> None:
    part, taken = cache.stage("file", DATA)
    client = Wrapped(Client(memcached.address))

    def refuse(command: str) -> None:
        if command == "touch" and "file" in cache:
            raise MemcacheServerError(b"out of memory during read")

    client.before = refuse
    with FileCache(client, chunk_size=CHUNK) as other:
        other.add("file", b"", parts=[part])
    assert cache.get("file") == DATA[:taken]


def test_stage_behind_published_parts_leaves_their_end_alone(
    start_memcached: Start,
) -> None:
    memcached = start_memcached("-m", "64")  # so little that `stage` touches parts
    with FileCache(memcached.server, chunk_size=CHUNK) as cache:
        part, taken = cache.stage("file", DATA)
        cache.add("file", DATA[taken:], parts=[part], expire=900)
        before = memcached.expiries()
        behind, _ = cache.stage("file", DATA, parts=[part])
        cache.stage("file", b"", parts=[part, behind])
    assert before.items() <= memcached.expiries().items()


def test_a_file_grows_by_parts(cache: FileCache, memcached: Memcached) -> None:
    parts = [cache.stage("file", DATA)[0]]
    for count in range(1, 4):
        cache.set("file", b"end", parts=parts)
        assert cache.get("file") == DATA[:12_000] * count + b"end"
        parts.append(cache.stage("file", DATA, parts=parts)[0])
    cache.unstage("file", parts)
    assert len(memcached.keys()) == 1 + 36 + 1


def test_unstage_leaves_no_key(cache: FileCache, memcached: Memcached) -> None:
    parts, _ = staged(cache, DATA, 4999)
    for _ in range(2):
        cache.unstage("file", parts)
        assert memcached.keys() == []


def hooked(memcached: Memcached, hook: Once, **options: Any) -> FileCache:
    client = Wrapped(Client(memcached.address, timeout=5), before=hook)
    return FileCache(client, chunk_size=CHUNK, **options)


def test_a_stage_that_fails_deletes_its_own_chunks_only(
    cache: FileCache, memcached: Memcached
) -> None:
    parts, rest = staged(cache, DATA, 5000)
    before = memcached.keys()
    for moment in itertools.count():
        fail = Once(moment, raising(TimeoutError()))
        outage = contextlib.suppress(memchunk.CacheUnavailable)
        with hooked(memcached, fail) as failing, outage:
            part, _ = failing.stage("file", rest + DATA, parts=parts)
        if not fail.acted:
            break
        assert memcached.keys() == before, f"at command {moment}"
    assert moment > 24
    assert len(chunks(memcached, [part])) == 13


# --- Publication and `stage` at once, and servers that hardly hold the file -----------


def together(
    memcached: Memcached, moment: int, overtaken: str, max_size: int, expire: int
) -> bool:
    """Have one of the two done just before a command of the other. Returns whether
    there was such a command."""
    other = FileCache(memcached.server, chunk_size=CHUNK, max_size=max_size)
    parts, rest = staged(other, DATA, 5000)
    calls: dict[str, Callable[[FileCache], object]] = {
        "stage": lambda by: by.stage("file", b"", parts=parts, lease=60),
        "set": lambda by: by.set("file", rest, parts=parts, expire=expire),
    }
    [late] = calls.keys() - {overtaken}
    hook = Once(moment, lambda: calls[late](other))
    with hooked(memcached, hook, max_size=max_size) as cache, other:
        calls[overtaken](cache)
    ends = [end % 2**32 for end in chunks(memcached, parts).values()]  # -1: never
    assert len(ends) == 12
    # If the other was not called, a `stage` alone leaves parts on its lease.
    assert not hook.acted or min(ends) > time.time() + expire - CLOCK, moment
    return hook.acted


@pytest.mark.parametrize("expire", [0, 5000])
@pytest.mark.parametrize("max_size", [MIB // 2, 40 * MIB])
@pytest.mark.parametrize("overtaken", ["stage", "set"])
def test_a_stage_at_any_moment_of_a_publication_puts_no_chunk_on_its_lease(
    memcached: Memcached, overtaken: str, max_size: int, expire: int
) -> None:
    """With 40 MiB the server is tight, so that `stage` touches the parts."""
    moments = itertools.count()
    while together(memcached, next(moments), overtaken, max_size, expire):
        memcached.flush()
    assert next(moments) > 12


@pytest.mark.parametrize("piece", [4 * MIB, 10**6])
def test_a_stock_server_holds_50_mib_that_are_staged(
    start_memcached: Start, piece: int
) -> None:
    memcached = start_memcached()
    with FileCache(memcached.server) as cache:
        for turn in range(5 if piece > MIB else 3):
            data = bytes([turn]) + BIG[1:]
            parts, rest = staged(cache, data, piece)
            cache.set("file", rest, parts=parts, size=len(data))
            assert cache.get("file") == data
            cache.stage("file", b"", parts=parts)
            assert set(memcached.expiries().values()) == {-1}
        cache.unstage("file", parts)
        cache.delete("file")
    assert memcached.keys() == []
