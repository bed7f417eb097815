"""The specification of memchunk.py: a section for each promise of the README.

Edges stand in tests/, by topic: sources, streams, parts, full and unavailable servers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import hashlib
import inspect
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, cast

import pytest
from pymemcache.client.base import Client, PooledClient
from pymemcache.client.hash import HashClient
from pymemcache.client.retrying import RetryingClient

import mcpool
import memchunk
from memchunk import FileCache
from tests.support import CLOCK, FOLDER, MIB, WAIT, Memcached, Start, opened, wait_for

CHUNK = 1000  # bytes in a chunk of most tests
LARGE = 400_000  # bytes in a chunk of tests that need several batches
WRITE_BATCH, READ_BATCH = 10 * LARGE, 5 * LARGE  # bytes that travel together
NAME = "a file \u00e9"
KEY = "memchunk2:{" + hashlib.sha256(NAME.encode()).hexdigest() + "}"
INFO = memchunk.FileInfo("n", 5, 2, "0" * 16, 1, None, b"m")


def address_client(memcached: Memcached) -> Any:
    return memcached.server


def stock_client(memcached: Memcached) -> Any:
    return Client(memcached.address, timeout=WAIT)


def pool_client(memcached: Memcached) -> Any:
    return mcpool.connect(memcached.server)


def cache_on(client: Any, **options: Any) -> FileCache:
    """A cache that is closed when the test ends."""
    opened.append(FileCache(client, **options))
    return opened[-1]


CLIENTS = [address_client, stock_client, pool_client]
THREAD_SAFE = [address_client, pool_client]


@pytest.fixture(params=CLIENTS)
def files(request: Any, memcached: Memcached) -> FileCache:
    """A cache with small chunks on an empty memcached, over each kind of client."""
    return cache_on(request.param(memcached), chunk_size=CHUNK)


@pytest.fixture(params=CLIENTS)
def batched(request: Any, memcached: Memcached) -> FileCache:
    """A cache with chunks of which several make a batch."""
    return cache_on(request.param(memcached), chunk_size=LARGE)


@pytest.fixture(params=THREAD_SAFE)
def pooled(request: Any, memcached: Memcached) -> FileCache:
    """A cache that threads may share."""
    return cache_on(request.param(memcached), chunk_size=CHUNK)


def data_of(size: int) -> bytes:
    return os.urandom(size)


def chunk_keys(memcached: Memcached) -> list[str]:
    every = memcached.keys()
    return [key for key in every if "|#|" in key]


def assert_no_rest(cache: FileCache, memcached: Memcached) -> None:
    """There are only the items of one file."""
    assert len(memcached.keys()) == 1 + cache.stat(NAME).chunks


class Counting:
    """A client that lists the commands that it is asked for."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.commands: list[str] = []
        self.before: Any = lambda command: None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.commands.append(name)
            self.before(name)
            return method(*args, **options)

        return counted if callable(method) else method


@pytest.fixture
def counting(memcached: Memcached) -> Counting:
    return Counting(PooledClient(memcached.address, timeout=WAIT))


def once(command: str, action: Callable[[], object]) -> Callable[[str], None]:
    """A hook for `Counting.before` that acts before the first such command."""
    waiting = [action]

    def hook(asked: str) -> None:
        if asked == command and waiting:
            waiting.pop()()

    return hook


# What goes in comes out


SIZES = [0, 1, 62, 63, 999, 1000, 1001, 1999, 2000, 2001, 123_456]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_comes_back_byte_for_byte(files: FileCache, size: int) -> None:
    data = data_of(size)
    info = files.set(NAME, data, metadata=b"about")
    assert (info.size, info.metadata, info.expires) == (size, b"about", None)
    assert files.get(NAME) == b"".join(files.open(NAME).chunks()) == data
    assert files.stat(NAME) == info
    assert NAME in files


EDGES = [LARGE, READ_BATCH, 2 * READ_BATCH, WRITE_BATCH, 2 * WRITE_BATCH]


@pytest.mark.parametrize("size", [edge + more for edge in EDGES for more in (-1, 0, 1)])
def test_a_file_of_whole_batches_comes_back(
    batched: FileCache, memcached: Memcached, size: int
) -> None:
    data = data_of(size)
    for source in (data, iter([data[:7], data[7:]])):
        assert batched.set(NAME, source).chunks == -(-size // LARGE)
        assert batched.get(NAME) == data
        assert len(chunk_keys(memcached)) == -(-size // LARGE)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_chunk_of_a_stock_server_is_just_under_512_kib(
    memcached: Memcached, more: int
) -> None:
    cache = cache_on(memcached.server)
    cache.set(NAME, bytes(MIB))
    chunk = manifest_of(memcached)["chunk_size"]
    assert 512 * 1024 - 300 < chunk < 512 * 1024
    data = data_of(2 * chunk + more)
    assert cache.set(NAME, data).chunks == 2 + (more > 0)
    assert cache.get(NAME) == data
    assert max(memcached.sizes()) <= 512 * 1024


@pytest.mark.parametrize("client", CLIENTS)
def test_50_mib_come_back_and_one_byte_more_is_refused(
    client: Any, memcached: Memcached
) -> None:
    with FileCache(client(memcached)) as cache:
        data = data_of(50 * MIB)
        assert cache.add("large", data).chunks == 101
        assert cache.get("large") == data
        with pytest.raises(memchunk.FileTooLarge) as caught:
            cache.set("large", data + b"x")
        assert (caught.value.size, caught.value.limit) == (50 * MIB + 1, 50 * MIB)
        assert cache.get("large") == data


@pytest.mark.parametrize("size", [32 * 1024, 32 * 1024 + 1])
def test_a_file_of_32_kib_lies_in_its_manifest(memcached: Memcached, size: int) -> None:
    with FileCache(memcached.server) as cache:
        assert cache.set("small", bytes(size)).chunks == size - 32 * 1024


def test_a_file_of_more_chunks_than_a_manifest_may_name_is_refused(
    memcached: Memcached,
) -> None:
    cache = cache_on(memcached.server, chunk_size=1)
    with pytest.raises(memchunk.FileTooLarge) as caught:
        cache.set(NAME, iter(()), size=2**20 + 1)
    assert caught.value.limit == 2**20
    assert memcached.keys() == []


def test_max_size_is_inclusive_and_holds_for_get(memcached: Memcached) -> None:
    small = cache_on(memcached.server, chunk_size=CHUNK, max_size=2500)
    large = cache_on(memcached.server, chunk_size=CHUNK)
    assert small.set(NAME, bytes(2500)).size == 2500
    for source in (bytes(2501), [bytes(2501)]):
        with pytest.raises(memchunk.FileTooLarge):
            small.set(NAME, source)
    assert small.get(NAME) == bytes(2500)
    large.set(NAME, bytes(2501))
    with pytest.raises(memchunk.FileTooLarge) as caught:
        small.get(NAME)
    assert (caught.value.size, caught.value.limit) == (2501, 2500)
    assert b"".join(small.open(NAME).chunks()) == bytes(2501)


NAMES = [
    *("x", "X", "x ", " x", "x/", "/", ".", "../../etc/passwd", "%2F", "ping", KEY),
    *("\0", "a/b c\r\n\0", "\r\nflush_all\r\n", "tab\tbell\a\x7f", "a|#|b:{c}"),
    *("\u00e9", "e\u0301", "\u00e9" * 512, "\U0001f600" * 256, "n" * 1024, "n" * 1023),
]


def test_a_name_is_any_text(files: FileCache) -> None:
    for name in NAMES:
        assert files.add(name, name.encode(), metadata=bytes(65535)).name == name
    assert [files.get(name) for name in NAMES] == [name.encode() for name in NAMES]
    assert [files.stat(name).name for name in NAMES] == NAMES
    for name in NAMES[::2]:
        files.delete(name)
    assert [name for name in NAMES if name in files] == NAMES[1::2]


def test_namespaces_are_apart(memcached: Memcached) -> None:
    spaces = ["one", "two", "n" * 100]
    caches = [cache_on(memcached.server, namespace=space) for space in spaces]
    for cache, space in zip(caches, spaces):
        assert NAME not in cache
        cache.add(NAME, space.encode())
    assert [cache.get(NAME).decode() for cache in caches] == spaces
    every = memcached.keys()
    assert {key.partition(":")[0] for key in every} == {*spaces}


def test_a_prefix_of_the_client_stands_before_the_namespace(
    memcached: Memcached,
) -> None:
    prefixes: list[Any] = [b"", b"p" * 50, "t" * 50]
    for prefix in prefixes:
        client = Client(memcached.address, timeout=WAIT, key_prefix=prefix)
        cache = cache_on(client)
        cache.add(NAME, bytes(MIB))
        assert cache.get(NAME) == bytes(MIB)
    assert max(memcached.sizes()) <= 512 * 1024
    with pytest.raises(ValueError, match="namespace"):
        FileCache(Client(memcached.address, key_prefix=b"p" * 92))


METADATA = [b"", b"\0", b"\n", b"\r\nEND\r\n", bytes(range(256)), b"m" * 65535]


@pytest.mark.parametrize("size", [5, 2500])
@pytest.mark.parametrize("metadata", METADATA, ids=len)
def test_metadata_are_any_bytes(files: FileCache, metadata: bytes, size: int) -> None:
    data = data_of(size)
    info = files.set(NAME, data, metadata=metadata)
    infos = [info, files.stat(NAME), files.open(NAME).info, files.touch(NAME, 99)]
    assert [each.metadata for each in infos] == [metadata] * 4
    assert files.get(NAME) == data


def test_a_version_is_unique_and_an_info_can_not_be_changed(files: FileCache) -> None:
    infos = [files.set(NAME, b"the same") for _ in range(20)]
    versions = {info.version for info in infos}
    assert len(versions) == 20
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in versions)
    assert abs(infos[0].created - time.time()) <= CLOCK
    with pytest.raises(dataclasses.FrozenInstanceError):
        infos[0].size = 1  # type: ignore[misc]


@pytest.mark.parametrize("expire", [600, datetime.timedelta(minutes=10)])
def test_expiry_of_manifest_and_chunks(
    files: FileCache, memcached: Memcached, expire: Any
) -> None:
    before = int(time.time())
    info = files.set(NAME, data_of(2500), expire=expire)
    assert before + 600 <= (info.expires or 0) <= time.time() + 600
    ends = memcached.expiries()
    manifest = ends.pop(KEY)
    assert abs(manifest - before - 600) <= CLOCK
    assert all(manifest < end <= manifest + 2 * CLOCK for end in ends.values())


def test_a_part_of_a_second_counts_as_a_whole_one(files: FileCache) -> None:
    part = datetime.timedelta(milliseconds=1)
    assert files.set(NAME, b"x", expire=part).expires is not None
    assert files.touch(NAME, datetime.timedelta(0)).expires is None


def test_an_expired_file_is_not_found_and_never_half_there(files: FileCache) -> None:
    data = data_of(2500)
    for name in ("stored", "touched"):
        files.set(name, data, expire=1 if name == "stored" else 0)
    files.touch("touched", 1)

    def is_gone(name: str) -> bool:
        with contextlib.suppress(memchunk.FileNotFound):
            assert files.get(name) == data
            return False
        return True

    for name in ("stored", "touched"):
        wait_for(lambda: is_gone(name), "the file to expire")  # noqa: B023
        files.add(name, b"new")


@pytest.mark.parametrize("expire", [2**31, 2**40, 2**62])
def test_an_end_that_memcached_can_not_keep_is_no_end(
    files: FileCache, memcached: Memcached, expire: int
) -> None:
    info = files.set(NAME, data_of(2500), expire=expire)
    assert info.expires == info.created + expire
    assert set(memcached.expiries().values()) == {-1}


def test_chunks_are_on_a_lease_until_the_file_is_there(memcached: Memcached) -> None:
    seen: dict[str, int] = {}

    def source() -> Iterator[bytes]:
        yield bytes(WRITE_BATCH)
        seen.update(memcached.expiries())
        yield b"end"

    cache_on(memcached.server, chunk_size=LARGE, lease=600).set(NAME, source())
    assert len(seen) == 10
    assert all(abs(end - time.time() - 600) <= CLOCK for end in seen.values())
    assert set(memcached.expiries().values()) == {-1}


@pytest.mark.parametrize("expire", [30 * 86400 - 1, 40 * 86400])
def test_expiry_beyond_30_days(
    files: FileCache, memcached: Memcached, expire: int
) -> None:
    """Chunks live a little longer than their manifest, so they are first beyond."""
    files.set(NAME, data := data_of(2500), expire=expire)
    ends = memcached.expiries().values()
    assert all(abs(end - time.time() - expire) <= 2 * CLOCK for end in ends)
    assert files.get(NAME) == data


# The verbs


def test_add_refuses_a_file_that_is_there(files: FileCache) -> None:
    info = files.add(NAME, b"first")
    with pytest.raises(memchunk.FileExists) as caught:
        files.add(NAME, b"second")
    assert caught.value.info == info
    assert files.get(NAME) == b"first"


def test_add_replaces_a_file_that_lost_chunks(
    files: FileCache, memcached: Memcached
) -> None:
    files.add(NAME, data_of(2500))
    memcached.delete(chunk_keys(memcached)[1])
    files.add(NAME, b"again")
    assert files.get(NAME) == b"again"


def test_add_of_a_file_that_is_there_reads_nothing_of_its_source(
    files: FileCache, memcached: Memcached
) -> None:
    files.add(NAME, data_of(2500))
    source, before = iter([b"never", b"read"]), memcached.keys()
    with pytest.raises(memchunk.FileExists):
        files.add(NAME, source)
    assert (next(source), memcached.keys()) == (b"never", before)


def test_cas_replaces_only_that_version(files: FileCache) -> None:
    first = files.set(NAME, b"1")
    second = files.cas(NAME, b"2", first.version)
    with pytest.raises(memchunk.FileChanged) as caught:
        files.cas(NAME, b"3", first.version)
    assert (caught.value.version, caught.value.current) == (
        first.version,
        second.version,
    )
    files.delete(NAME)
    with pytest.raises(memchunk.FileNotFound):
        files.cas(NAME, b"4", second.version)


def test_cas_replaces_a_version_that_lost_chunks(
    files: FileCache, memcached: Memcached
) -> None:
    version = files.set(NAME, data_of(2500)).version
    memcached.delete(f"{KEY}|#|{version}:1")
    files.cas(NAME, b"again", version)
    assert (files.get(NAME), memcached.keys()) == (b"again", [KEY])


def test_delete_leaves_no_key(files: FileCache, memcached: Memcached) -> None:
    info = files.set(NAME, data_of(2500))
    with pytest.raises(memchunk.FileChanged):
        files.delete(NAME, "0" * 16)
    files.delete(NAME, info.version)
    assert memcached.keys() == []
    with pytest.raises(memchunk.FileNotFound):
        files.delete(NAME)


def test_delete_of_a_file_that_lost_chunks_frees_its_name(
    files: FileCache, memcached: Memcached
) -> None:
    version = files.set(NAME, data_of(2500)).version
    memcached.delete(f"{KEY}|#|{version}:1")
    files.delete(NAME, version)
    assert memcached.keys() == []
    assert files.add(NAME, b"again").version != version


def test_touch_gives_every_item_a_new_end(
    files: FileCache, memcached: Memcached
) -> None:
    data = data_of(2500)
    files.set(NAME, data)
    info = files.touch(NAME, 900)
    assert files.stat(NAME).expires == info.expires is not None
    assert all(
        abs(end - time.time() - 900) <= 2 * CLOCK
        for end in memcached.expiries().values()
    )
    assert files.touch(NAME, 0).expires is None
    assert set(memcached.expiries().values()) == {-1}
    assert files.get(NAME) == data


def test_touch_of_an_evicted_file_changes_nothing(
    files: FileCache, memcached: Memcached
) -> None:
    files.set(NAME, data_of(2500), expire=900)
    memcached.delete(chunk_keys(memcached)[0])
    before = memcached.expiries()
    with pytest.raises(memchunk.FileEvicted):
        files.touch(NAME, 5000)
    assert memcached.expiries() == before


def test_what_is_not_there_is_not_found(files: FileCache) -> None:
    assert NAME not in files
    for call in (files.get, files.open, files.stat):
        with pytest.raises(memchunk.FileNotFound):
            call(NAME)
    with pytest.raises(memchunk.FileNotFound):
        files.touch(NAME, 1)


def test_a_question_changes_nothing(files: FileCache, memcached: Memcached) -> None:
    files.set(NAME, data_of(2500), expire=600)
    before = memcached.expiries()
    assert NAME in files
    files.stat(NAME)
    files.open(NAME)
    files.get(NAME)
    files.ping()
    with pytest.raises(memchunk.FileExists):
        files.add(NAME, b"x", expire=10)
    assert memcached.expiries() == before


def test_ping_needs_every_server(memcached: Memcached, files: FileCache) -> None:
    files.ping()
    memcached.kill()
    with pytest.raises(memchunk.CacheUnavailable) as caught:
        files.ping()
    assert caught.value.server == memcached.server


@pytest.mark.parametrize("dead", [0, 1])
def test_ping_needs_each_of_several_servers(start_memcached: Start, dead: int) -> None:
    servers = [start_memcached(), start_memcached()]
    cache = cache_on(mcpool.connect([each.server for each in servers]))
    cache.ping()
    servers[dead].kill()
    with pytest.raises(memchunk.CacheUnavailable) as caught:
        cache.ping()
    assert caught.value.server == servers[dead].server


@pytest.mark.parametrize("client", THREAD_SAFE)
def test_ping_of_a_child_opens_a_connection(client: Any, memcached: Memcached) -> None:
    cache = cache_on(client(memcached))
    cache.ping()
    before = int(memcached.stats()["total_connections"])
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            cache.ping()
        os._exit(0)
    os.waitpid(child, 0)
    # `stats` opens another one.
    assert int(memcached.stats()["total_connections"]) - before == 2


def test_a_closed_cache_opens_new_connections(files: FileCache) -> None:
    with files as entered:
        entered.set(NAME, b"x")
    assert files.get(NAME) == b"x"


def test_get_or_set_makes_only_what_is_not_there(files: FileCache) -> None:
    data = data_of(2500)
    options: Any = {"expire": 600, "metadata": b"about"}
    assert files.get_or_set(NAME, lambda: data, **options) == data
    info = files.stat(NAME)
    assert (info.metadata, info.expires) == (b"about", info.created + 600)
    assert files.get_or_set(NAME, lambda: bytes(1 // 0), expire=9) == data
    assert files.stat(NAME) == info


def test_get_or_set_has_one_maker(pooled: FileCache) -> None:
    made, data = [], data_of(5000)
    together = threading.Barrier(8)

    def make() -> bytes:
        made.append(1)
        return data

    def ask() -> None:
        together.wait(WAIT)
        got.append(pooled.get_or_set(NAME, make))

    got: list[Any] = []
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert (len(made), got) == (1, [data] * 8)


def test_get_or_set_hands_out_the_bytes_of_a_cache_that_is_down(
    memcached: Memcached, files: FileCache
) -> None:
    memcached.kill()
    assert files.get_or_set(NAME, lambda: b"made") == b"made"


def test_get_or_set_makes_a_file_that_is_replaced_all_the_time(
    counting: Counting, memcached: Memcached
) -> None:
    cache = cache_on(counting, chunk_size=CHUNK)
    other = cache_on(memcached.server, chunk_size=CHUNK)
    other.set(NAME, data_of(1500))

    def overtake(command: str) -> None:
        if command == "get_many":
            other.delete(NAME)  # waits until the chunks are gone, unlike `set`
            other.set(NAME, data_of(1500))

    counting.before = overtake
    assert cache.get_or_set(NAME, lambda: b"made") == b"made" == other.get(NAME)


def test_get_or_set_gives_the_lock_back_if_make_raises(
    files: FileCache, memcached: Memcached
) -> None:
    with pytest.raises(ZeroDivisionError):
        files.get_or_set(NAME, lambda: bytes(1 // 0))
    assert memcached.keys() == []
    assert files.get_or_set(NAME, lambda: b"made") == b"made" == files.get(NAME)


def test_get_or_set_gives_a_lock_back_that_it_took_late(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, monotonic = [0], time.monotonic
    monkeypatch.setattr("time.monotonic", lambda: monotonic() + late[-1])
    cache = cache_on(counting)

    def wait(command: str) -> None:
        if command == "gets":
            late.append(50)

    def make() -> bytes:
        late.append(65)
        raise ZeroDivisionError

    counting.before = wait
    with pytest.raises(ZeroDivisionError):
        cache.get_or_set(NAME, make, lock=60)
    assert cache.get_or_set(NAME, lambda: b"made", lock=60) == b"made"
    assert counting.commands.count("add") == 3  # two locks, and a manifest


def test_get_or_set_leaves_the_lock_of_another_alone(
    memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, monotonic = [0], time.monotonic
    monkeypatch.setattr("time.monotonic", lambda: monotonic() + late[-1])

    def make() -> bytes:
        late.append(60)  # now the lock has ended, and another takes it
        [lock] = memcached.keys()
        memcached.write(lock, b"another's")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache_on(memcached.server).get_or_set(NAME, make, lock=60)
    assert len(memcached.keys()) == 1


def test_the_lock_of_get_or_set_lasts_its_whole_time(
    memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """memcached ends an item up to a second early."""
    client, asked = Client(memcached.address), []

    def add(key: str, value: bytes, expire: int, noreply: bool) -> bool:
        asked.append(expire)
        return bool(Client.add(client, key, value, expire, noreply))

    monkeypatch.setattr(client, "add", add)
    cache_on(client).get_or_set(NAME, lambda: b"made", lock=50)
    assert asked == [51, 0]  # the lock, and the manifest


def test_get_or_set_looks_again_when_it_has_the_lock(
    counting: Counting, memcached: Memcached
) -> None:
    other = cache_on(memcached.server)
    counting.before = once("add", lambda: other.set(NAME, b"other's"))
    cache = cache_on(counting)
    assert cache.get_or_set(NAME, lambda: bytes(1 // 0)) == b"other's"
    assert memcached.keys() == [KEY]


@pytest.mark.parametrize("option", ["expire", "metadata"])
def test_get_or_set_refuses_bad_options_before_it_makes_a_file(
    files: FileCache, option: str
) -> None:
    bad: Any = {"expire": -1, "metadata": bytes(65_536)}[option]
    with pytest.raises(ValueError, match=option):
        files.get_or_set(NAME, lambda: bytes(1 // 0), **{option: bad})


def test_get_or_set_refuses_what_is_not_bytes_like(cache: FileCache) -> None:
    with pytest.raises(TypeError):
        cache.get_or_set("file", cast(Any, lambda: iter([b"data"])))
    assert "file" not in cache


def test_get_or_set_hands_out_the_bytes_that_a_full_cache_refuses(
    start_memcached: Start,
) -> None:
    full, data = start_memcached("-m", "8"), bytes(20 * MIB)
    for client in CLIENTS:
        cache = cache_on(client(full))
        assert cache.get_or_set(NAME, lambda: data) == data
        assert full.keys() == []


@pytest.mark.parametrize("where", ["manifest", "chunk", "evicted"])
def test_get_or_set_replaces_what_is_damaged(
    files: FileCache, memcached: Memcached, where: str
) -> None:
    version = files.set(NAME, data_of(2500)).version
    chunk = f"{KEY}|#|{version}:1"
    if where == "evicted":
        memcached.delete(chunk)
    else:
        flip(memcached, KEY if where == "manifest" else chunk, 20)
    assert files.get_or_set(NAME, lambda: b"made") == b"made" == files.get(NAME)


class Makers:
    """Two callers of `get_or_set`. The first is in its `make` until `release`."""

    def __init__(self, cache: FileCache, lock: int) -> None:
        self.inside, self.release = threading.Event(), threading.Event()
        self.threads = ThreadPoolExecutor(2)
        self.cache, self.lock = cache, lock
        self.first = self.threads.submit(self.ask, self.make_first)
        assert self.inside.wait(WAIT)

    def ask(self, make: Callable[[], bytes]) -> Any:
        return self.cache.get_or_set(NAME, make, lock=self.lock)

    def make_first(self) -> bytes:
        self.inside.set()
        assert self.release.wait(WAIT)
        raise ZeroDivisionError


def test_get_or_set_waits_for_a_lock_no_longer_than_it_lasts(pooled: FileCache) -> None:
    makers = Makers(pooled, lock=1)
    assert makers.ask(lambda: b"second") == b"second"
    assert not makers.first.done()
    makers.release.set()
    with pytest.raises(ZeroDivisionError):
        makers.first.result(WAIT)
    assert pooled.get(NAME) == b"second"


def test_get_or_set_goes_on_with_the_next_if_a_maker_raises(pooled: FileCache) -> None:
    makers = Makers(pooled, lock=WAIT)
    second = makers.threads.submit(makers.ask, lambda: b"second")
    makers.release.set()
    with pytest.raises(ZeroDivisionError):
        makers.first.result(WAIT)
    assert second.result(WAIT) == b"second" == pooled.get(NAME)


def test_get_or_set_passes_on_an_error_of_make_that_is_one_of_the_cache(
    files: FileCache,
) -> None:
    """`make` may read another cache, whose errors are not this one's."""

    def make() -> bytes:
        raise memchunk.CacheUnavailable("other", "host:1", "refused")

    with pytest.raises(memchunk.CacheUnavailable, match="host:1"):
        files.get_or_set(NAME, make)


# Verified: the stored bytes, read and damaged without the module


def manifest_of(memcached: Memcached) -> Any:
    """The fields of the manifest's line of JSON."""
    return json.loads(memcached.read(KEY)[4:].partition(b"\n")[0])


def seal(memcached: Memcached, fields: Any, rest: bytes = b"") -> None:
    """Store a manifest whose CRC is right."""
    body = json.dumps(fields).encode() + b"\n" + rest
    memcached.write(KEY, struct.pack(">I", zlib.crc32(body)) + body)


def chunk_of(key: str, index: int, total: int, rest: bytes) -> bytes:
    """A chunk whose CRC is right. rest: payload and padding."""
    crc = zlib.crc32(struct.pack(">II", index, total) + key.encode() + rest)
    return struct.pack(">III", index, total, crc) + rest


def flip(memcached: Memcached, key: str, at: int) -> None:
    damaged = bytearray(memcached.read(key))
    damaged[at] ^= 1
    memcached.write(key, bytes(damaged))


def assert_corrupt(cache: FileCache, index: int | None) -> None:
    """`get` says that the chunk of this number is damaged, or the manifest (None)."""
    with pytest.raises(memchunk.FileCorrupt) as caught:
        cache.get(NAME)
    assert (caught.value.name, caught.value.index) == (NAME, index)


def test_a_manifest_is_a_crc_a_line_of_json_and_metadata(
    files: FileCache, memcached: Memcached
) -> None:
    info = files.set(NAME, b"small", expire=600, metadata=b"about")
    value = memcached.read(KEY)
    assert struct.unpack(">I", value[:4])[0] == zlib.crc32(value[4:])
    line, _, rest = value[4:].partition(b"\n")
    assert rest == b"aboutsmall"
    assert json.loads(line) == {
        "format": 2,
        "name": NAME,
        "size": 5,
        "chunk_size": CHUNK,
        "created": info.created,
        "expires": info.expires,
        "metadata": 5,
        "segments": [[info.version, 0]],
    }


def test_a_chunk_is_12_bytes_payload_and_padding(
    files: FileCache, memcached: Memcached
) -> None:
    data = data_of(2500)
    version = files.set(NAME, data).version
    for index in range(3):
        key = f"{KEY}|#|{version}:{index}"
        value = memcached.read(key)
        start, end = index * CHUNK, (index + 1) * CHUNK
        assert value[12:] == data[start:end].ljust(CHUNK, b"\0")
        crc = zlib.crc32(struct.pack(">II", index, 3) + key.encode() + value[12:])
        assert value[:12] == struct.pack(">III", index, 3, crc)


def test_a_file_that_was_written_without_the_module_is_read(
    files: FileCache, memcached: Memcached
) -> None:
    """Two segments, of which the first did not know its number of chunks."""
    data, first, second = data_of(2500), "0123456789abcdef", "f" * 16
    places = [(first, 0, 0), (first, 1, 0), (second, 0, 1)]
    for number, (segment, index, total) in enumerate(places):
        key = f"{KEY}|#|{segment}:{index}"
        start, end = number * CHUNK, (number + 1) * CHUNK
        rest = data[start:end].ljust(CHUNK, b"\0")
        memcached.write(key, chunk_of(key, index, total, rest))
    fields = {"format": 2, "name": NAME, "size": 2500, "chunk_size": CHUNK}
    fields |= {"created": 1, "expires": None, "metadata": 5}
    seal(memcached, {**fields, "segments": [[first, 2], [second, 1]]}, b"about")
    assert files.get(NAME) == data
    assert files.stat(NAME) == memchunk.FileInfo(
        NAME, 2500, 3, second, 1, None, b"about"
    )
    files.delete(NAME)
    assert memcached.keys() == []


def test_a_chunk_of_a_source_of_unknown_length_has_the_total_0(
    batched: FileCache, memcached: Memcached
) -> None:
    info = batched.set(NAME, iter([bytes(WRITE_BATCH + 1)]))
    for index in range(11):
        value = memcached.read(f"{KEY}|#|{info.version}:{index}")
        assert struct.unpack(">II", value[:8]) == (index, 0)


def test_a_single_chunk_is_not_padded(files: FileCache, memcached: Memcached) -> None:
    version = files.set(NAME, data_of(500)).version
    assert len(memcached.read(f"{KEY}|#|{version}:0")) == 512


@pytest.mark.parametrize("size", [5, 150, 0])
def test_a_flipped_byte_is_corrupt(memcached: Memcached, size: int) -> None:
    """Of a manifest with the file in it, and of every item of a file with chunks."""
    cache = cache_on(memcached.server, chunk_size=100)
    data = data_of(size)
    version = cache.set(NAME, data, metadata=b"about").version
    every = memcached.keys()
    for key in every:
        is_chunk = "|#|" in key
        assert is_chunk == (version in key)
        for at in range(len(memcached.read(key))):
            flip(memcached, key, at)
            assert_corrupt(cache, int(key[-1]) if is_chunk else None)
            assert (NAME in cache) == is_chunk
            flip(memcached, key, at)
    assert cache.get(NAME) == data


def test_a_value_of_another_length_is_corrupt(
    files: FileCache, memcached: Memcached
) -> None:
    version = files.set(NAME, data_of(2500)).version
    for key, index in ((KEY, None), (f"{KEY}|#|{version}:2", 2)):
        value = memcached.read(key)
        shorter = [value[:length] for length in (0, 1, 4, 11, 12, len(value) - 1)]
        for wrong in (*shorter, value + b"\0", value * 2):
            memcached.write(key, wrong)
            assert_corrupt(files, index)
        memcached.write(key, value)


def test_a_chunk_in_another_place_is_corrupt(
    files: FileCache, memcached: Memcached
) -> None:
    """Of the same file, of another file, and of the version before it."""
    data = bytes(3000)
    old = files.set(NAME, data).version
    others = [memcached.read(f"{KEY}|#|{old}:1")]
    files.set("other", data)
    others += [memcached.read(key) for key in chunk_keys(memcached) if KEY not in key]
    version = files.set(NAME, data).version
    others += [memcached.read(f"{KEY}|#|{version}:{index}") for index in (0, 2)]
    for other in others:
        memcached.write(f"{KEY}|#|{version}:1", other)
        assert_corrupt(files, 1)


@pytest.mark.parametrize(("index", "total"), [(0, 3), (2, 3), (1, 2), (1, 4)])
def test_a_chunk_of_another_index_or_total_is_corrupt(
    files: FileCache, memcached: Memcached, index: int, total: int
) -> None:
    version = files.set(NAME, bytes(3000)).version
    key = f"{KEY}|#|{version}:1"
    memcached.write(key, chunk_of(key, index, total, bytes(CHUNK)))
    assert_corrupt(files, 1)


V = "0123456789abcdef"
BOUNDS: dict[str, list[Any]] = {  # of a manifest of 2,500 bytes in 3 chunks
    "name": ["other", "", None, 5],
    "size": [-1, 0, 2000, 3001, 2**63, 2500.0, "2500", None, True],
    "chunk_size": [-1000, 0, 833, 1250, 2**30 + 1, 1000.0, "1000", None, True],
    "created": ["x", 1.5, None, True],
    "expires": ["x", 1.5, True],
    "metadata": ["0", 1.5],
    "segments": [
        *([], None, 5, {V: 3}, [V, 3], [[V]], [[V, 3, 1]], [[V, 2]], [[V, 4]]),
        *([[V, 3.0]], [[V, "3"]], [[V, -1], ["f" * 16, 4]], [[V, 3], [V, 0]]),
        *(
            [[V.upper(), 3]],
            [[V[1:], 3]],
            [["../" + V, 3]],
            [[V + "\n", 3]],
            [[V, 2**40]],
        ),
    ],
    "another": [1],
}
LIES = [(field, value) for field, values in BOUNDS.items() for value in values]


@pytest.mark.parametrize(("field", "value"), LIES)
def test_a_manifest_with_bad_bounds_is_corrupt(
    memcached: Memcached, field: str, value: Any
) -> None:
    cache = cache_on(memcached.server, chunk_size=CHUNK)
    cache.set(NAME, data_of(2500))
    seal(memcached, {**manifest_of(memcached), "segments": [[V, 3]], field: value})
    for call in (cache.get, cache.open, cache.stat):
        with pytest.raises(memchunk.FileCorrupt):
            call(NAME)
    assert NAME not in cache


def test_a_manifest_of_too_many_chunks_is_corrupt(memcached: Memcached) -> None:
    cache, count = cache_on(memcached.server, chunk_size=CHUNK), 2**20 + 1
    cache.set(NAME, data_of(2500))
    lie = {"size": count, "chunk_size": 1, "segments": [[V, count]]}
    seal(memcached, {**manifest_of(memcached), **lie})
    assert_corrupt(cache, None)


def test_a_manifest_with_chunks_and_bytes_of_its_own_is_corrupt(
    memcached: Memcached,
) -> None:
    cache = cache_on(memcached.server, chunk_size=CHUNK)
    cache.set(NAME, data_of(2500))
    seal(memcached, {**manifest_of(memcached), "size": 2510}, bytes(10))
    assert_corrupt(cache, None)


@pytest.mark.parametrize(
    "body", [b"", b"\n", b"5", b"null\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 10**5]
)
def test_a_manifest_without_its_fields_is_corrupt(
    files: FileCache, memcached: Memcached, body: bytes
) -> None:
    memcached.write(KEY, struct.pack(">I", zlib.crc32(body)) + body)
    assert_corrupt(files, None)


def test_a_damaged_manifest_does_not_block_its_name(
    files: FileCache, memcached: Memcached
) -> None:
    version = files.set(NAME, b"old").version
    for write in (files.add, files.set):
        flip(memcached, KEY, 20)
        for refused in (
            lambda: files.cas(NAME, b"x", version),
            lambda: files.delete(NAME, version),
            lambda: files.touch(NAME, 1),
        ):
            with pytest.raises(memchunk.FileCorrupt):
                refused()
        write(NAME, b"new")
        assert files.get(NAME) == b"new"
    flip(memcached, KEY, 20)
    files.delete(NAME)
    assert memcached.keys() == []


def test_a_missing_chunk_is_evicted(files: FileCache, memcached: Memcached) -> None:
    info = files.set(NAME, data_of(2500))
    memcached.delete(f"{KEY}|#|{info.version}:1")
    with pytest.raises(memchunk.FileEvicted) as caught:
        files.get(NAME)
    assert (caught.value.info, caught.value.missing) == (info, [1])
    assert NAME not in files
    assert files.stat(NAME) == info


@pytest.mark.parametrize("number", [1, 3, "2", None])
def test_a_manifest_of_an_unknown_format_is_a_clear_error(
    files: FileCache, memcached: Memcached, number: Any
) -> None:
    """It may be a file of a later version. So only `set` and `delete` end it."""
    calls: list[Callable[[], object]] = [
        lambda: files.get(NAME),
        lambda: files.open(NAME),
        lambda: files.stat(NAME),
        lambda: files.touch(NAME, 1),
        lambda: files.add(NAME, b"x"),
        lambda: files.cas(NAME, b"x", V),
        lambda: files.delete(NAME, V),
    ]
    seal(memcached, {"format": number, "new": "field"}, b"rest")
    before = memcached.read(KEY)
    for call in calls:
        with pytest.raises(memchunk.FileCorrupt, match="is unknown") as caught:
            call()
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.index) == (str(caught.value), None)
        assert f"format {number}" in str(again)
    assert memcached.read(KEY) == before
    files.set(NAME, b"new")
    assert files.get(NAME) == b"new"


def test_an_error_of_the_machine_is_no_damage(
    files: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `add` would take a whole file for a damaged one, and replace it."""
    files.add(NAME, b"old")

    def fail(text: object) -> None:
        raise MemoryError

    monkeypatch.setattr("json.loads", fail)
    with pytest.raises(MemoryError):
        files.add(NAME, b"new")
    monkeypatch.undo()
    assert files.get(NAME) == b"old"


# Atomic: one version, one winner


@pytest.mark.parametrize("verb", ["add", "cas"])
def test_of_many_exactly_one_wins(
    pooled: FileCache, memcached: Memcached, verb: str
) -> None:
    together = threading.Barrier(8)
    version = "" if verb == "add" else pooled.set(NAME, b"old").version

    def write(number: int) -> Any:
        together.wait(WAIT)
        data = bytes([number]) * 3000
        with contextlib.suppress(memchunk.FileExists, memchunk.FileChanged):
            if verb == "add":
                return number, pooled.add(NAME, data)
            return number, pooled.cas(NAME, data, version)

    with ThreadPoolExecutor(8) as threads:
        ((number, info),) = filter(None, threads.map(write, range(8)))
    assert pooled.get(NAME) == bytes([number]) * 3000
    assert pooled.stat(NAME) == info
    assert_no_rest(pooled, memcached)


def test_a_reader_gets_one_version_while_others_write(
    pooled: FileCache, memcached: Memcached
) -> None:
    versions = [bytes([number]) * (number * 700) for number in range(1, 9)]
    pooled.set(NAME, versions[0])

    def work(number: int) -> None:
        for turn in range(25):
            pooled.set(NAME, versions[(number + turn) % 8])
            assert pooled.get(NAME) in versions

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, number) for number in range(4)]:
            done.result(WAIT)
    assert pooled.get(NAME) in versions
    assert_no_rest(pooled, memcached)


def test_a_reader_never_sees_two_versions(batched: FileCache) -> None:
    batched.set(NAME, b"1" * (2 * READ_BATCH))
    pieces = batched.open(NAME).chunks()
    assert bytes(next(pieces)) == b"1" * LARGE
    batched.set(NAME, b"2" * (2 * READ_BATCH))
    with pytest.raises(memchunk.FileChanged):
        list(pieces)
    assert batched.get(NAME) == b"2" * (2 * READ_BATCH)


@pytest.mark.parametrize(
    ("verb", "error"),
    [("add", memchunk.FileExists), ("cas", memchunk.FileChanged), ("set", None)],
)
def test_a_writer_that_was_overtaken_wins_or_says_so(
    counting: Counting, memcached: Memcached, verb: str, error: Any
) -> None:
    """The other writes between the first one's chunks and its manifest."""
    cache = cache_on(counting, chunk_size=CHUNK)
    other = cache_on(memcached.server, chunk_size=CHUNK)
    mine, theirs = data_of(2500), data_of(3500)
    version = "" if verb == "add" else other.set(NAME, data_of(1500)).version
    put = "add" if verb == "add" else "cas"
    counting.before = once(put, lambda: other.set(NAME, theirs))
    options = [version] if verb == "cas" else []
    with pytest.raises(error) if error else contextlib.nullcontext():
        getattr(cache, verb)(NAME, mine, *options)
    assert other.get(NAME) == (theirs if error else mine)
    assert_no_rest(other, memcached)


def test_set_that_another_overtakes_proves_its_chunks_again(
    counting: Counting, memcached: Memcached
) -> None:
    cache = cache_on(counting, chunk_size=CHUNK)
    other = cache_on(memcached.server, chunk_size=CHUNK)

    def overtake() -> None:
        memcached.delete(chunk_keys(memcached)[0])
        other.set(NAME, b"theirs")

    counting.before = once("add", overtake)
    with pytest.raises(memchunk.CacheFull):
        cache.set(NAME, data_of(2500))
    assert other.get(NAME) == b"theirs"


@pytest.mark.parametrize("verb", ["touch", "delete", "delete a version"])
def test_touch_and_delete_take_the_file_that_overtook_them(
    counting: Counting, memcached: Memcached, verb: str
) -> None:
    cache = cache_on(counting, chunk_size=CHUNK)
    other = cache_on(memcached.server, chunk_size=CHUNK)
    version = cache.set(NAME, data_of(1500)).version
    counting.before = once("cas", lambda: other.set(NAME, b"2" * 2500))
    if verb == "touch":
        assert cache.touch(NAME, 600) == other.stat(NAME)
        assert other.get(NAME) == b"2" * 2500
    elif verb == "delete":
        cache.delete(NAME)
        assert memcached.keys() == []
    else:
        with pytest.raises(memchunk.FileChanged):
            cache.delete(NAME, version)
        assert other.get(NAME) == b"2" * 2500


def test_touch_that_another_overtakes_lets_no_chunk_end_before_the_file(
    counting: Counting, memcached: Memcached
) -> None:
    slow = cache_on(counting, chunk_size=CHUNK)
    other = cache_on(memcached.server, chunk_size=CHUNK)
    slow.set(NAME, data_of(1500))
    counting.commands.clear()

    def overtake(command: str) -> None:
        # The file has its new end, and its two chunks have none yet.
        if counting.commands.count("touch") == 3:
            other.touch(NAME, 5000)

    counting.before = overtake
    slow.touch(NAME, 600)
    ends = memcached.expiries()
    end = ends.pop(KEY)
    assert abs(end - time.time() - 5000) <= 2 * CLOCK
    assert all(each == -1 or each > end for each in ends.values())


def test_set_replaces_and_leaves_no_rest(
    files: FileCache, memcached: Memcached
) -> None:
    files.set(NAME, data_of(20_000))
    info = files.set(NAME, data_of(2500))
    expected = [KEY, *(f"{KEY}|#|{info.version}:{index}" for index in range(3))]
    assert memcached.keys() == sorted(expected)


# Proved: nothing half is ever stored


def half(error: BaseException) -> Iterator[bytes]:
    yield bytes(8 * MIB)
    raise error


class Unlike(Exception):
    """Its arguments are not those of its constructor."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")


def writing(cache: FileCache, verb: str, source: Any) -> None:
    """Write over a file, or, by `add`, where there is none."""
    if verb == "add":
        cache.add(NAME, source)
    elif verb == "set":
        cache.set(NAME, source)
    else:
        cache.cas(NAME, source, cache.stat(NAME).version)


def prepare(cache: FileCache, memcached: Memcached, verb: str) -> Callable[[], None]:
    """Store what `writing` writes over. Returns a check that all is as it was."""
    old = b"" if verb == "add" else b"old" * LARGE
    if old:
        cache.set(NAME, old)
    keys = memcached.keys()

    def check() -> None:
        assert memcached.keys() == keys
        assert not old or cache.get(NAME) == old

    return check


@pytest.mark.parametrize("verb", ["add", "set", "cas"])
@pytest.mark.parametrize("error", [ValueError("x"), Unlike(1, "x")])
def test_a_source_that_raises_stores_nothing(
    batched: FileCache, memcached: Memcached, verb: str, error: Exception
) -> None:
    check = prepare(batched, memcached, verb)
    with pytest.raises(type(error)) as caught:
        writing(batched, verb, half(error))
    assert caught.value is error
    check()


@pytest.mark.parametrize("verb", ["add", "set", "cas"])
def test_chunks_lost_while_the_source_is_read_are_cache_full(
    batched: FileCache, memcached: Memcached, verb: str
) -> None:
    check = prepare(batched, memcached, verb)
    old = memcached.keys()

    def source() -> Iterator[bytes]:
        yield bytes(WRITE_BATCH)
        for key in set(chunk_keys(memcached)).difference(old):
            if key.endswith((":0", ":9")):
                memcached.delete(key)
        yield b"end"

    with pytest.raises(memchunk.CacheFull) as caught:
        writing(batched, verb, source())
    assert "2 chunks are gone" in str(caught.value)
    check()


def test_an_exception_of_a_signal_handler_stores_nothing(memcached: Memcached) -> None:
    def strike(*_: object) -> None:
        raise Unlike(1, "time limit")

    def source() -> Iterator[bytes]:
        yield bytes(8 * MIB)
        os.kill(os.getpid(), signal.SIGUSR1)
        yield bytes(8 * MIB)

    before = signal.signal(signal.SIGUSR1, strike)
    try:
        with FileCache(memcached.server) as cache, pytest.raises(Unlike):
            cache.set(NAME, source())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert memcached.keys() == []


def test_an_interrupt_sends_nothing_more(counting: Counting) -> None:
    def source() -> Iterator[bytes]:
        yield bytes(8 * MIB)
        counting.commands.clear()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_on(counting).set(NAME, source())
    assert counting.commands == []


@pytest.mark.parametrize("client", THREAD_SAFE)
@pytest.mark.parametrize("child", ["raises", "goes on"])
@pytest.mark.parametrize("first", [b"small", bytes(WRITE_BATCH)])
def test_a_child_forked_in_mid_write_changes_nothing_of_its_parent(
    client: Any, memcached: Memcached, first: bytes, child: str
) -> None:
    cache = cache_on(client(memcached), chunk_size=LARGE)
    parent, statuses = os.getpid(), []

    def source() -> Iterator[bytes]:
        yield first
        pid = os.fork()
        if pid:
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        elif child == "raises":
            raise ZeroDivisionError
        yield b"end"

    expected = {"raises": ZeroDivisionError, "goes on": RuntimeError}[child]
    status = 1
    try:
        cache.set(NAME, source())
    except expected:
        status = 0
    finally:
        if os.getpid() != parent:
            os._exit(status)
    assert statuses == [0]
    assert cache.get(NAME) == first + b"end"
    assert_no_rest(cache, memcached)


def test_in_is_true_while_another_replaces_the_file(
    counting: Counting, files: FileCache
) -> None:
    cache = cache_on(counting, chunk_size=CHUNK)
    cache.set(NAME, data_of(2500))
    counting.before = once("cas", lambda: files.set(NAME, data_of(5000)))
    assert NAME in cache
    counting.before = once("cas", lambda: files.delete(NAME))
    assert NAME not in cache


@pytest.mark.parametrize("client", THREAD_SAFE)
def test_a_child_does_not_talk_on_its_parents_connections(
    client: Any, memcached: Memcached
) -> None:
    cache = cache_on(client(memcached), chunk_size=CHUNK)
    data = data_of(5000)
    cache.set(NAME, data)
    file = cache.open(NAME)

    def reads_well() -> bool:
        streams = (b"".join(file.chunks()) for _ in range(50))
        return all(cache.get(NAME) == data == stream for stream in streams)

    before = int(memcached.stats()["total_connections"])
    child = os.fork()
    if child == 0:
        is_right = False
        with contextlib.suppress(BaseException):
            is_right = reads_well()
        os._exit(0 if is_right else 1)
    assert reads_well()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    # It connects anew once, and not for each of its 51 reads.
    assert int(memcached.stats()["total_connections"]) - before < 20


def test_a_chunk_lost_during_the_write_is_cache_full(
    counting: Counting, memcached: Memcached
) -> None:
    cache = cache_on(counting, chunk_size=CHUNK)
    cache.set(NAME, b"old")

    def lose(command: str) -> None:
        if command == "touch":
            counting.before = lambda command: None
            memcached.delete(chunk_keys(memcached)[1])

    counting.before = lose
    with pytest.raises(memchunk.CacheFull, match="1 chunks are gone"):
        cache.set(NAME, data_of(2500))
    assert (cache.get(NAME), memcached.keys()) == (b"old", [KEY])


# Errors and invalid input


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.set("a", "text"), TypeError),
        (lambda c: c.set("a", 5), TypeError),
        (lambda c: c.set("a", b"x", 60), TypeError),
        (lambda c: c.add("a", b"x", 60), TypeError),
        (lambda c: c.cas("a", b"x", "0" * 16, 60), TypeError),
        (lambda c: c.get_or_set("a", lambda: b"", 60), TypeError),
        (lambda c: c.stage("a", b"x", []), TypeError),
        (lambda c: c.cas("a", b"x", None), TypeError),
        (lambda c: c.cas("a", b"x", "0" * 16), memchunk.FileNotFound),
        (lambda c: c.set("a", ["text"]), TypeError),
        (lambda c: c.set("a", None), TypeError),
        (lambda c: c.set("a", b"x", size="1"), TypeError),
        (lambda c: c.set("a", b"x", size=1.0), TypeError),
        (lambda c: c.set("a", b"", size=-1), memchunk.SizeMismatch),
        (lambda c: c.set("a", [], size=-1), memchunk.SizeMismatch),
        (lambda c: c.set("a", [], size=2**63), memchunk.FileTooLarge),
        (lambda c: c.set("a", b"x", size=2), memchunk.SizeMismatch),
        (lambda c: c.set("a", [b"x"], size=2), memchunk.SizeMismatch),
        (lambda c: c.set("a", [b"xyz"], size=2), memchunk.SizeMismatch),
        (lambda c: c.set("a", b"x", expire=-1), ValueError),
        (lambda c: c.set("a", b"x", expire=datetime.timedelta(-1)), ValueError),
        (lambda c: c.set("a", b"x", expire=2**63), ValueError),
        (lambda c: c.set("a", b"x", expire=1.5), TypeError),
        (lambda c: c.set("a", b"x", expire="1"), TypeError),
        (lambda c: c.set("a", b"x", expire=None), TypeError),
        (lambda c: c.touch("a", -1), ValueError),
        (lambda c: c.touch("a", 1.5), TypeError),
        (lambda c: c.set("a", b"x", metadata="text"), TypeError),
        (lambda c: c.set("a", b"x", metadata=None), TypeError),
        (lambda c: c.set("a", b"x", metadata=bytes(65536)), ValueError),
        (lambda c: c.stage("a", b"x", lease=0), ValueError),
        (lambda c: c.stage("a", b"x", parts=["x"]), ValueError),
        (lambda c: c.get_or_set("a", lambda: b"", lock=0), ValueError),
    ],
)
def test_invalid_input_stores_nothing(
    files: FileCache, memcached: Memcached, call: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(files)
    assert memcached.keys() == []


@pytest.mark.parametrize(
    "name",
    ["", "n" * 1025, "\U0001f600" * 257, "\ud800", "a\udfff", b"bytes", None, 5],
)
def test_a_name_that_is_none_is_invalid_for_every_verb(
    files: FileCache, memcached: Memcached, name: Any
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: files.add(name, b"x"),
        lambda: files.set(name, b"x"),
        lambda: files.cas(name, b"x", V),
        lambda: files.stage(name, b"x"),
        lambda: files.unstage(name, []),
        lambda: files.get(name),
        lambda: files.get_or_set(name, lambda: b"x"),
        lambda: files.open(name),
        lambda: files.stat(name),
        lambda: files.touch(name, 1),
        lambda: files.delete(name),
        lambda: name in files,
    ]
    for call in calls:
        with pytest.raises(memchunk.InvalidName) as caught:
            call()
        assert caught.value.name == name
    assert memcached.keys() == []


@pytest.mark.parametrize(
    "client",
    [
        "127.0.0.1:1,127.0.0.1:2",
        "tls://host:1",
        "user:password@host:1",
        "",
        "host:port",
        "host:",
        "a b",
        "http://host",
        "[::1",
        "unix:",
        ["user:password@127.0.0.1:1"],
        ("127.0.0.1", 1),
        {},
        None,
        HashClient(["127.0.0.1:1"]),
        RetryingClient(Client("127.0.0.1:1")),
        Client("127.0.0.1:1", ignore_exc=True),
    ],
)
def test_a_client_that_breaks_the_promise_is_refused(client: Any) -> None:
    with pytest.raises(ValueError, match=r"mcpool|ignore_exc") as caught:
        FileCache(client)
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"namespace": ""},
        {"namespace": "a b"},
        {"namespace": "a\n"},
        {"namespace": "n" * 101},
        {"namespace": "\u00e9"},
        {"max_size": -1},
        {"chunk_size": 0},
        {"chunk_size": 2**31},
        {"lease": 0},
        {"lease": 2_592_001},
    ],
)
def test_an_option_that_cannot_work_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=r"is|:"):
        FileCache("127.0.0.1:1", **options)


ERRORS: list[tuple[memchunk.MemchunkError, list[type], dict[str, Any], str]] = [
    # An error, what else it is, its attributes beside `name`, and its message.
    (
        memchunk.InvalidName("n"),
        [ValueError],
        {},
        "'n' is not a text of 1 to 1024 UTF-8 bytes",
    ),
    (
        memchunk.FileNotFound("n"),
        [memchunk.CacheMiss, KeyError, FileNotFoundError, OSError],
        {},
        "no file named 'n' is stored",
    ),
    (
        memchunk.FileEvicted("n", INFO, list(range(5000))),
        [memchunk.CacheMiss, LookupError],
        {"info": INFO, "missing": list(range(5000))},
        "'n' was evicted in part: 5000 of its 2 chunks are gone (0, 1, 2, 3, 4, ...)",
    ),
    (
        memchunk.FileExists("n", INFO),
        [FileExistsError],
        {"info": INFO},
        "a file named 'n' is already stored",
    ),
    (
        memchunk.FileChanged("n", V, None),
        [],
        {"version": V, "current": None},
        f"'n' is not version {V} any more: it is gone",
    ),
    (
        memchunk.FileTooLarge("n", 2, 1),
        [ValueError],
        {"size": 2, "limit": 1},
        "'n' has 2 bytes or more; the limit is 1",
    ),
    (
        memchunk.SizeMismatch("n", 2, 1),
        [ValueError],
        {"size": 2, "received": 1},
        "'n' has 1 bytes instead of 2",
    ),
    (
        memchunk.FileCorrupt("n", 3),
        [],
        {"index": 3},
        "'n' is damaged: chunk 3 is wrong",
    ),
    (
        memchunk.CacheFull("n", "memory", "too small"),
        [],
        {"cause": "memory", "reason": "too small"},
        "memcached would not keep 'n': too small",
    ),
    (
        memchunk.CacheUnavailable("n", "host:1", "refused"),
        [ConnectionError],
        {"server": "host:1", "reason": "refused"},
        "memcached at host:1 is not available: refused",
    ),
]


@pytest.mark.parametrize(("error", "kinds", "attributes", "message"), ERRORS)
def test_an_error_says_what_happened(
    error: memchunk.MemchunkError, kinds: list[type], attributes: Any, message: str
) -> None:
    assert all(isinstance(error, kind) for kind in [memchunk.MemchunkError, *kinds])
    assert {key: getattr(error, key) for key in attributes} == attributes
    assert (error.name, str(error)) == ("n", message)


@pytest.mark.parametrize("error", [error for error, *_ in ERRORS], ids=str)
def test_an_error_survives_pickling_and_copying(error: memchunk.MemchunkError) -> None:
    pickles = [pickle.dumps(error, protocol) for protocol in range(6)]
    again = [*map(pickle.loads, pickles), copy.copy(error), copy.deepcopy(error)]
    for each in again:
        assert type(each) is type(error)
        assert (str(each), vars(each)) == (str(error), vars(error))


def test_an_error_takes_named_arguments_and_no_others() -> None:
    for error, *_ in ERRORS:
        parameters = inspect.signature(type(error)).parameters
        assert {each.kind for each in parameters.values()} == {
            inspect.Parameter.POSITIONAL_OR_KEYWORD
        }
        assert next(iter(parameters)) == "name"


def test_every_error_is_in_the_table() -> None:
    kinds = {getattr(memchunk, name) for name in memchunk.__all__}
    errors = {
        kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert errors - {type(error) for error, *_ in ERRORS} == {
        memchunk.MemchunkError,
        memchunk.CacheMiss,
    }


WRITES = "*, size=None, expire=0, metadata=b'', parts=()"
SIGNATURES = {
    "add": f"name, source, {WRITES}",
    "set": f"name, source, {WRITES}",
    "cas": f"name, source, version, {WRITES}",
    "stage": "name, data, *, parts=(), lease=3600",
    "unstage": "name, parts",
    "get": "name",
    "get_or_set": "name, make, *, expire=0, metadata=b'', lock=60",
    "open": "name",
    "stat": "name",
    "touch": "name, expire",
    "delete": "name, version=None",
    "ping": "",
    "close": "",
}


@pytest.mark.parametrize("verb", SIGNATURES)
def test_help_shows_what_a_verb_takes(verb: str) -> None:
    method = getattr(FileCache, verb)
    plain = inspect.Parameter.empty
    _, *parameters = inspect.signature(method).parameters.values()
    shown = inspect.Signature([each.replace(annotation=plain) for each in parameters])
    assert str(shown) == f"({SIGNATURES[verb]})"
    assert method.__doc__


def test_the_library_tells_its_version() -> None:
    assert memchunk.__version__.split(".")[0] == "1"


@pytest.mark.parametrize("client", THREAD_SAFE)
def test_a_used_cache_can_be_pickled(client: Any, memcached: Memcached) -> None:
    """It opens its own connections in a process that has nothing of this one."""
    files = cache_on(client(memcached), chunk_size=CHUNK)
    files.set(NAME, b"x")
    state = pickle.dumps(files)
    script = (
        "import pickle, sys; cache = pickle.load(sys.stdin.buffer); "
        "print(cache.get(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, NAME],
        input=state,
        cwd=FOLDER,
        capture_output=True,
        check=True,
    )
    assert done.stdout.strip() == b"b'x'"


# Round trips


def test_a_small_file_takes_two_round_trips_to_write_and_one_to_read(
    counting: Counting,
) -> None:
    cache = cache_on(counting)
    cache.set(NAME, b"x")
    counting.commands.clear()
    cache.set(NAME, b"y")
    assert counting.commands == ["gets", "cas"]
    counting.commands.clear()
    assert cache.get(NAME) == b"y"
    assert counting.commands == ["gets"]


@pytest.mark.parametrize(
    ("call", "commands"),
    [
        (
            lambda cache: cache.cas(NAME, b"y", cache.stat(NAME).version),
            "gets gets gets cas",
        ),
        (lambda cache: cache.stat(NAME), "gets"),
        (lambda cache: NAME in cache, "gets"),
        (lambda cache: cache.touch(NAME, 9), "gets cas"),
        (lambda cache: cache.delete(NAME), "gets cas"),
        (lambda cache: cache.add("new", b"y"), "gets add"),
        (lambda cache: cache.get_or_set(NAME, lambda: b"y"), "gets"),
    ],
)
def test_every_verb_takes_few_round_trips_for_a_small_file(
    counting: Counting, call: Any, commands: str
) -> None:
    cache = cache_on(counting)
    cache.set(NAME, b"x")  # the first write asks for `stats`, too
    counting.commands.clear()
    call(cache)
    assert " ".join(counting.commands) == commands


@pytest.mark.parametrize(("size", "batches"), [(READ_BATCH, 1), (READ_BATCH + 1, 2)])
def test_a_read_takes_a_round_trip_for_each_batch(
    counting: Counting, size: int, batches: int
) -> None:
    cache = cache_on(counting, chunk_size=LARGE)
    cache.set(NAME, bytes(size))
    counting.commands.clear()
    assert cache.get(NAME) == bytes(size)
    assert counting.commands == ["gets", *["get_many"] * batches]


def test_a_file_of_one_batch_takes_four_round_trips(memcached: Memcached) -> None:
    client = Counting(mcpool.connect(memcached.server))
    client.for_key = lambda key: client  # type: ignore[attr-defined]
    cache = cache_on(client)
    cache.set(NAME, data_of(MIB))
    client.commands.clear()
    cache.set(NAME, data_of(MIB))
    assert client.commands == ["gets", "pipeline", "pipeline", "pipeline"]
