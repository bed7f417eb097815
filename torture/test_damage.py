"""Damage to what is stored: no wrong byte, no error without a type, no hang, and no
flood of memory.

Damage that a CRC can see: every bit of the manifest and of a chunk, every length,
exchanged items, and random mutations. Damage that no CRC can see: manifests that lie,
with a sound CRC.
"""

from __future__ import annotations

import json
import random
import signal
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import pytest

import memchunk
from memchunk import FileCache, FileInfo
from tests.support import Memcached
from torture.model import Store, cache_on, manifest
from torture.tools import CHUNK, LONG, connected, counts, result

DATA = bytes(range(250))  # three chunks
STRIDE = 1 if LONG else 17  # of pairs of lies
MUTATIONS = 1_000_000 if LONG else 40_000
DAMAGED = ("FileCorrupt", "FileEvicted", "FileNotFound")

READS: dict[str, tuple[Callable[[FileCache], object], bytes]] = {
    "get": (lambda cache: cache.get("file"), DATA),
    "part": (lambda cache: b"".join(cache.open("file").chunks(90, 110)), DATA[90:110]),
    "read": (lambda cache: cache.open("file").read(5), DATA[:5]),
}


@pytest.fixture(params=["mcpool", "PooledClient", "model"])
def place(request: pytest.FixtureRequest, server: Memcached) -> Iterator[Any]:
    """Where the file is, with `read` and `write` for its items, and a cache on that."""
    if request.param == "model":
        store = ModelItems()
        yield store, cache_on(store.run)
    else:
        server.flush()
        is_fast = request.param == "mcpool"
        with (
            connected(server, chunk_size=CHUNK)
            if is_fast
            else FileCache(server.server, chunk_size=CHUNK) as cache
        ):
            yield server, cache


class ModelItems(Store):
    def read(self, key: str) -> bytes:
        return self.items[key][0]

    def write(self, key: str, value: bytes) -> None:
        self.set(key, value, 0)


def keys(info: FileInfo) -> list[str]:
    key = manifest(info.name)
    return [key, *(f"{key}|#|{info.version}:{index}" for index in range(info.chunks))]


def check(cache: FileCache, kind: str, sound: bool = False) -> None:
    """Reads give the bytes that were stored, or say that the file is damaged."""
    for read, expected in READS.values():
        outcome = result(lambda: read(cache))  # noqa: B023
        assert outcome == expected or (not sound and outcome in DAMAGED)
    assert sound or result(lambda: cache.get("file")) == "FileCorrupt"
    counts[f"damaged items, {kind}"] += 1


def test_every_bit_and_every_length(place: Any) -> None:
    items, cache = place
    # In the short form a real server has a sample, of all bits in a byte.
    stride = 1 if LONG or isinstance(items, ModelItems) else 7
    for key in keys(cache.set("file", DATA, metadata=b"metadata")):
        value = items.read(key)
        for bit in range(0, 8 * len(value), stride):
            damaged = bytearray(value)
            damaged[bit // 8] ^= 1 << bit % 8
            items.write(key, bytes(damaged))
            check(cache, "one bit")
        for length in range(0, 2 * len(value), stride):
            if length != len(value):
                items.write(key, (value + bytes(len(value)))[:length])
                check(cache, "other length")
        items.write(key, value)
        check(cache, "mended", sound=True)


def test_every_bit_and_every_length_of_a_small_file(place: Any) -> None:
    items, cache = place
    (key,) = keys(cache.set("file", b"small", metadata=b"metadata"))
    value = items.read(key)
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        items.write(key, bytes(damaged))
        assert result(lambda: cache.get("file")) == "FileCorrupt"
    for length in range(2 * len(value)):
        items.write(key, (value + bytes(len(value)))[:length])
        outcome = result(lambda: cache.get("file"))
        assert outcome == (b"small" if length == len(value) else "FileCorrupt")
    counts["damaged items, small files"] += 10 * len(value)


def test_items_in_the_place_of_others(place: Any) -> None:
    items, cache = place
    files = [("file", b"x" * 250), ("other", DATA), ("other small", b"small")]
    known: dict[str, bytes] = {}
    for name, data in [*files, ("file", DATA)]:
        info = cache.set(name, data)
        known.update((key, items.read(key)) for key in keys(info))
    mine = keys(info)
    for key in mine:
        for other, value in known.items():
            if other != key and value != known[key]:
                items.write(key, value)
                check(cache, "exchanged")
        items.write(key, known[key])
    check(cache, "mended", sound=True)


def mutated(value: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """One to three changes of the kinds that memory, networks and bugs make."""
    data = bytearray(value)
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(data) + 1)
        stop = min(start + dice.choice([1, 2, 4, 30]), len(data))
        change = dice.randrange(6)
        if change == 0 and start < len(data):
            data[start] ^= 1 << dice.randrange(8)
        elif change == 1:
            data[start:stop] = dice.randbytes(stop - start)
        elif change == 2:
            del data[start:stop]
        elif change == 3:
            data[start:start] = data[start:stop]
        elif change == 4:
            data[start:stop] = bytes(stop - start)
        else:
            other = dice.choice(others)
            data[start:] = other[start:]
    return bytes(data)


def test_random_mutations() -> None:
    dice, store = random.Random(5), ModelItems()
    cache = cache_on(store.run)
    mine = keys(cache.set("file", DATA, metadata=b"metadata"))
    sound = {key: store.read(key) for key in mine}
    for number in range(MUTATIONS):
        key = dice.choice(mine)
        value = mutated(sound[key], list(sound.values()), dice)
        store.write(key, value)
        outcome = result(lambda: cache.get("file"))
        assert outcome == (DATA if value == sound[key] else "FileCorrupt"), (
            number,
            key,
            value,
        )
        store.write(key, sound[key])
    counts["random mutations"] += MUTATIONS


NUMBERS = [-1, 0, 1, 1.5, 2**31, 2**64, 1e300]
ODD: list[Any] = [*NUMBERS, None, True, "", "1", "x", [], [1], {}]
VERSION = "0123456789abcdef"
EXTREMES: dict[str, list[Any]] = {
    "format": [*ODD, 3, "2"],
    "name": [*ODD, "other", "\ud800"],
    "size": [*ODD, 6, 249, 251, 299, 300, 10**9, 2**63, 250.0, "250"],
    "chunk_size": [*ODD, 83, 84, 99, 101, 250, 2**30, 2**30 + 1, 100.0, "100"],
    "created": ODD,
    "expires": ODD,
    "metadata": [*ODD, 3, 7, 9, 10**9, 8.0],
    "segments": [
        *ODD,
        *([[VERSION, count]] for count in [*ODD, 2, 3, 4, 3.0, 10**9]),
        [[VERSION, 2], [VERSION, 1]],
        [[VERSION, 3], ["f" * 16, 0]],
        [["../" * 5 + "\r", 3]],
        [[VERSION, 3, 4]],
        [VERSION],
        {VERSION: 3},
    ],
    "another": ODD,
}


def forged(value: bytes) -> Iterator[bytes]:
    """Manifests with a sound CRC: each field at its extremes, each two, or left out;
    and every length."""
    line, _, rest = value[4:].partition(b"\n")
    fields = json.loads(line)
    singles = [{field: odd} for field, values in EXTREMES.items() for odd in values]
    for number, first in enumerate(singles):
        for second in [{}, *singles[slice(number % STRIDE, None, STRIDE)]]:
            yield sealed({**fields, **first, **second}, rest)
    for field in fields:
        yield sealed({key: fields[key] for key in fields if key != field}, rest)
    for body in (b"", b"\n", b"[" * 10**5, b"9" * 10**4, b"NaN\n", b"\xff\n"):
        yield struct.pack(">I", zlib.crc32(body)) + body
    for length in range(len(value) - 4):
        body = value[slice(4, 4 + length)]
        yield struct.pack(">I", zlib.crc32(body)) + body


def sealed(fields: dict[str, Any], rest: bytes) -> bytes:
    body = json.dumps(fields).encode() + b"\n" + rest
    return struct.pack(">I", zlib.crc32(body)) + body


@contextmanager
def bounded(seconds: int, size: int) -> Iterator[None]:
    """Fails what takes longer, or more memory."""

    def late(*_: object) -> None:
        raise RuntimeError(f"it takes more than {seconds} seconds")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert tracemalloc.get_traced_memory()[1] - before < size


CALLS: dict[str, Callable[[FileCache], object]] = {
    **{name: read for name, (read, _) in READS.items()},
    "stat": lambda cache: cache.stat("file"),
    "far": lambda cache: b"".join(cache.open("file").chunks(2**40, 2**40 + 9)),
    "touch": lambda cache: cache.touch("file", 99),
    "add": lambda cache: cache.add("file", b"new"),
    "set": lambda cache: cache.set("file", b"new"),
    "delete": lambda cache: cache.delete("file"),
}


@pytest.mark.parametrize("data", [DATA, b"small"], ids=["chunks", "small"])
@pytest.mark.parametrize("call", CALLS)
def test_a_manifest_that_lies_with_a_sound_crc(call: str, data: bytes) -> None:
    store = ModelItems()
    cache = cache_on(store.run)
    key = keys(cache.set("file", data, metadata=b"metadata"))[0]
    items = store.items
    tracemalloc.start()
    try:
        for value in forged(store.read(key)):
            store.items = items
            store.write(key, value)
            with bounded(5, 10**7):
                outcome = result(lambda: CALLS[call](cache))
            assert outcome != "CacheFull"  # as after 100 vain attempts
            if call in READS and outcome not in (*DAMAGED, "FileTooLarge"):
                # Some bytes more are the padding of the last chunk, and some less or
                # more of a small file its metadata's: who signs lies may say so.
                wanted = READS[call][1] if data is DATA else b""
                assert isinstance(outcome, bytes)
                assert (wanted + bytes(CHUNK)).startswith(outcome) or data != DATA
            counts["forged manifests"] += 1
    finally:
        tracemalloc.stop()


def test_more_chunks_than_a_file_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelItems()
    cache = cache_on(store.run)
    info = cache.set("file", DATA)
    value = store.read(keys(info)[0])
    line, _, rest = value[4:].partition(b"\n")
    size = 2**20 + 1
    lies = {"chunk_size": 1, "size": size, "segments": [[info.version, size]]}
    store.write(keys(info)[0], sealed({**json.loads(line), **lies}, rest))
    for call in ("stat", "get", "touch"):
        assert result(lambda: CALLS[call](cache)) == "FileCorrupt"  # noqa: B023

    # A private name, since a file of 2**20 chunks takes a minute to write.
    monkeypatch.setattr(memchunk, "_MAX_CHUNKS", 5)
    for data in (bytes(5 * CHUNK + 1), [bytes(CHUNK)] * 6):
        assert result(lambda: cache.set("new", data)) == "FileTooLarge"  # noqa: B023
    assert cache.set("new", bytes(5 * CHUNK)).chunks == 5
