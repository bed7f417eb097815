"""The specification of memchunk.py: a section for each promise of the README.

Edges stand in tests/, by topic: sources, streams, parts, full and unavailable servers.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
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
from typing import Any

import pytest
from pymemcache.client.base import Client, PooledClient
from pymemcache.client.hash import HashClient
from pymemcache.client.retrying import RetryingClient

import mcpool
import memchunk
from memchunk import FileCache
from tests.support import CLOCK, FOLDER, MIB, WAIT, Memcached, opened

CHUNK = 1000  # bytes in a chunk of most tests
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


@pytest.fixture(params=CLIENTS)
def files(request: Any, memcached: Memcached) -> FileCache:
    """A cache with small chunks on an empty memcached, over each kind of client."""
    return cache_on(request.param(memcached), chunk_size=CHUNK)


@pytest.fixture
def pooled(memcached: Memcached) -> FileCache:
    return cache_on(mcpool.connect(memcached.server), chunk_size=CHUNK)


def data_of(size: int) -> bytes:
    return os.urandom(size)


def chunk_keys(memcached: Memcached) -> list[str]:
    every = memcached.keys()
    return [key for key in every if "|#|" in key]


class Counting:
    """A client that lists the commands that it is asked for."""

    def __init__(self, client: Any) -> None:
        self.client, self.commands = client, []  # type: ignore[var-annotated]
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


@pytest.mark.parametrize("name", ["x", "\u00e9" * 512, "a/b c\r\n\0", "\U0001f600"])
def test_a_name_is_any_text(files: FileCache, name: str) -> None:
    files.add(name, b"1")
    assert files.get(name) == b"1"
    assert files.stat(name).name == name


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


def test_expiry_beyond_30_days(files: FileCache, memcached: Memcached) -> None:
    files.set(NAME, data_of(2500), expire=40 * 86400)
    ends = memcached.expiries().values()
    assert all(abs(end - time.time() - 40 * 86400) <= 2 * CLOCK for end in ends)


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


def test_delete_leaves_no_key(files: FileCache, memcached: Memcached) -> None:
    info = files.set(NAME, data_of(2500))
    with pytest.raises(memchunk.FileChanged):
        files.delete(NAME, "0" * 16)
    files.delete(NAME, info.version)
    assert memcached.keys() == []
    with pytest.raises(memchunk.FileNotFound):
        files.delete(NAME)


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


def test_ping_needs_every_server(memcached: Memcached, files: FileCache) -> None:
    files.ping()
    memcached.kill()
    with pytest.raises(memchunk.CacheUnavailable):
        files.ping()


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


def test_get_or_set_gives_the_lock_back_if_make_raises(
    files: FileCache, memcached: Memcached
) -> None:
    with pytest.raises(ZeroDivisionError):
        files.get_or_set(NAME, lambda: bytes(1 // 0))
    assert memcached.keys() == []
    assert files.get_or_set(NAME, lambda: b"made") == b"made" == files.get(NAME)


# Verified: the stored bytes, read and damaged without the module


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


def test_a_single_chunk_is_not_padded(files: FileCache, memcached: Memcached) -> None:
    version = files.set(NAME, data_of(500)).version
    assert len(memcached.read(f"{KEY}|#|{version}:0")) == 512


@pytest.mark.parametrize("where", ["manifest", 0, 1])
def test_a_flipped_byte_is_corrupt(
    files: FileCache, memcached: Memcached, where: Any
) -> None:
    version = files.set(NAME, data_of(1500)).version
    key = KEY if where == "manifest" else f"{KEY}|#|{version}:{where}"
    sound = memcached.read(key)
    for at in range(0, len(sound), 1 if where == "manifest" else 37):
        damaged = bytearray(sound)
        damaged[at] ^= 1
        memcached.write(key, bytes(damaged))
        with pytest.raises(memchunk.FileCorrupt) as caught:
            files.get(NAME)
        assert caught.value.index == (None if where == "manifest" else where)


def test_a_chunk_in_another_place_is_corrupt(
    files: FileCache, memcached: Memcached
) -> None:
    version = files.set(NAME, bytes(3000)).version
    memcached.write(f"{KEY}|#|{version}:1", memcached.read(f"{KEY}|#|{version}:2"))
    with pytest.raises(memchunk.FileCorrupt):
        files.get(NAME)


def test_a_missing_chunk_is_evicted(files: FileCache, memcached: Memcached) -> None:
    info = files.set(NAME, data_of(2500))
    memcached.delete(f"{KEY}|#|{info.version}:1")
    with pytest.raises(memchunk.FileEvicted) as caught:
        files.get(NAME)
    assert (caught.value.info, caught.value.missing) == (info, [1])
    assert NAME not in files
    assert files.stat(NAME) == info


def test_a_manifest_of_an_unknown_format_is_a_clear_error(
    files: FileCache, memcached: Memcached
) -> None:
    body = b'{"format":3}\n'
    memcached.write(KEY, struct.pack(">I", zlib.crc32(body)) + body)
    for call in (lambda: files.get(NAME), lambda: files.add(NAME, b"x")):
        with pytest.raises(memchunk.FileCorrupt, match="format 3 is unknown"):
            call()


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


def test_of_many_adds_exactly_one_wins(pooled: FileCache) -> None:
    results: list[Any] = []
    together = threading.Barrier(8)

    def add(number: int) -> None:
        together.wait(WAIT)
        with contextlib.suppress(memchunk.FileExists):
            results.append((number, pooled.add(NAME, bytes([number]) * 3000)))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    ((number, info),) = results
    assert pooled.get(NAME) == bytes([number]) * 3000
    assert pooled.stat(NAME) == info


def test_a_reader_never_sees_two_versions(files: FileCache) -> None:
    files.set(NAME, b"1" * 3_000_000)
    pieces = files.open(NAME).chunks()
    assert bytes(next(pieces)) == b"1" * CHUNK
    files.set(NAME, b"2" * 3_000_000)
    with pytest.raises(memchunk.FileChanged):
        list(pieces)
    assert files.get(NAME) == b"2" * 3_000_000


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


@pytest.mark.parametrize("error", [ValueError("x"), Unlike(1, "x")])
def test_a_source_that_raises_stores_nothing(
    memcached: Memcached, error: Exception
) -> None:
    with FileCache(memcached.server) as cache:
        cache.set(NAME, b"old")
        with pytest.raises(type(error)):
            cache.set(NAME, half(error))
        assert (cache.get(NAME), memcached.keys()) == (b"old", [KEY])


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


def test_a_child_that_fails_deletes_nothing_of_its_parent(memcached: Memcached) -> None:
    """It was forked in mid-write."""

    def source() -> Iterator[bytes]:
        yield bytes(8 * MIB)
        pid = os.fork()
        if pid == 0:
            raise ZeroDivisionError
        os.waitpid(pid, 0)
        yield b"end"

    with FileCache(memcached.server) as cache:
        parent = os.getpid()
        try:
            cache.set(NAME, source())
        finally:
            if os.getpid() != parent:
                os._exit(0)
        assert cache.get(NAME) == bytes(8 * MIB) + b"end"


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
    with pytest.raises(memchunk.CacheFull) as caught:
        cache.set(NAME, data_of(2500))
    assert caught.value.missing == [1]
    assert (cache.get(NAME), memcached.keys()) == (b"old", [KEY])


def test_a_source_that_ends_late_has_its_chunks_touched_again(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have been evicted, or have expired, since the last of them was sent."""
    monkeypatch.setattr(memchunk, "_FRESH", 0.0)
    cache = cache_on(counting, chunk_size=CHUNK, max_size=10_000)
    cache.set(NAME, [bytes(2500)], size=2500)
    assert counting.commands.count("touch") == 6


# Errors and invalid input


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.get(""), memchunk.InvalidName),
        (lambda c: c.get("x" * 1025), memchunk.InvalidName),
        (lambda c: c.get("\ud800"), memchunk.InvalidName),
        (lambda c: c.get(b"bytes"), memchunk.InvalidName),
        (lambda c: c.set("a", "text"), TypeError),
        (lambda c: c.set("a", 5), TypeError),
        (lambda c: c.set("a", b"x", 60), TypeError),
        (lambda c: c.cas("a", b"x", None), TypeError),
        (lambda c: c.set("a", b"x", size=2), memchunk.SizeMismatch),
        (lambda c: c.set("a", [b"x"], size=2), memchunk.SizeMismatch),
        (lambda c: c.set("a", [b"xyz"], size=2), memchunk.SizeMismatch),
        (lambda c: c.set("a", b"x", expire=-1), ValueError),
        (lambda c: c.set("a", b"x", expire=1.5), TypeError),
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
    "client",
    [
        "127.0.0.1:1,127.0.0.1:2",
        "tls://host:1",
        "user:password@host:1",
        "",
        "host:port",
        ["127.0.0.1:1"],
        None,
        HashClient(["127.0.0.1:1"]),
        RetryingClient(Client("127.0.0.1:1")),
        Client("127.0.0.1:1", ignore_exc=True),
    ],
)
def test_a_client_that_breaks_the_promise_is_refused(client: Any) -> None:
    with pytest.raises(ValueError, match=r"mcpool|ignore_exc"):
        FileCache(client)


@pytest.mark.parametrize(
    "options",
    [
        {"namespace": ""},
        {"namespace": "a b"},
        {"max_size": -1},
        {"chunk_size": 0},
        {"lease": 0},
        {"lease": 2_592_001},
    ],
)
def test_an_option_that_cannot_work_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=r"is|:"):
        FileCache("127.0.0.1:1", **options)


ERRORS = [
    memchunk.InvalidName(""),
    memchunk.FileNotFound("n"),
    memchunk.FileEvicted("n", INFO, list(range(5000))),
    memchunk.FileExists("n", INFO),
    memchunk.FileChanged("n", "0" * 16, None),
    memchunk.FileTooLarge("n", 2, 1),
    memchunk.SizeMismatch("n", 2, 1),
    memchunk.FileCorrupt("n", 3),
    memchunk.CacheFull("n", "memory", "too small", []),
    memchunk.CacheUnavailable("n", "host:1", "refused"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: memchunk.MemchunkError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
    assert len(str(error)) < 120


def test_every_error_is_in_the_table() -> None:
    kinds = {getattr(memchunk, name) for name in memchunk.__all__}
    errors = {
        kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert errors - {type(error) for error in ERRORS} == {
        memchunk.MemchunkError,
        memchunk.CacheMiss,
    }


def test_a_used_cache_can_be_pickled(files: FileCache, memcached: Memcached) -> None:
    if isinstance(files.client, Client):
        return  # a stock client has a socket
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


def test_a_file_of_one_batch_takes_three_round_trips(memcached: Memcached) -> None:
    client = Counting(mcpool.connect(memcached.server))
    client.for_key = lambda key: client  # type: ignore[attr-defined]
    cache = cache_on(client)
    cache.set(NAME, data_of(MIB))
    client.commands.clear()
    cache.set(NAME, data_of(MIB))
    # The last one deletes, and does not wait for replies.
    assert client.commands == ["gets", "pipeline", "pipeline", "pipeline"]
