"""Damage to what is stored: no wrong byte, no error without a type, no hang, no flood of memory.

Damage that a CRC can see: every bit of the manifest and of a chunk, every length, exchanged items,
and random mutations. Damage that no CRC can see: manifests that lie, with a sound CRC.
"""

from __future__ import annotations

import random
import signal
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Callable

import pytest

import memchunk
from memchunk import FileCache, FileInfo
from tests.support import Memcached
from torture.model import Store, cache_on, manifest
from torture.tools import CHUNK, LONG, counts, result

DATA = bytes(range(250))  # three chunks
MUTATIONS = 1_000_000 if LONG else 100_000
DAMAGED = ("FileCorrupt", "FileEvicted", "FileNotFound")

READS: dict[str, tuple[Callable[[FileCache], object], bytes]] = {
    "get": (lambda cache: cache.get("file"), DATA),
    "part": (lambda cache: b"".join(cache.open("file").chunks(90, 110)), DATA[90:110]),
    "read": (lambda cache: cache.open("file").read(5), DATA[:5]),
}


@pytest.fixture(params=["connect", "model"])
def place(request: pytest.FixtureRequest, server: Memcached) -> Iterator[Any]:
    """Where the file is, with `read` and `write` for its items, and a cache on that."""
    if request.param == "model":
        store = ModelItems()
        yield store, cache_on(store.run)
    else:
        server.flush()
        with closing(memchunk.connect(server.server, chunk_size=CHUNK)) as cache:
            yield server, cache


class ModelItems(Store):
    def read(self, key: str) -> bytes:
        return self.items[key][0]

    def write(self, key: str, value: bytes) -> None:
        self.set(key, value, 0)


def keys(cache: FileCache, info: FileInfo) -> list[str]:
    return [manifest(), *(f"memchunk:{info.version}:{i}" for i in range(info.chunks))]


def check(cache: FileCache, kind: str, sound: bool = False) -> None:
    """Reads give the bytes that were stored, or say that the file is damaged."""
    for read, expected in READS.values():
        outcome = result(lambda: read(cache))  # noqa: B023
        assert outcome == expected or (not sound and outcome in DAMAGED)
    assert sound or result(lambda: cache.get("file")) == "FileCorrupt"
    counts[f"damaged items, {kind}"] += 1


def test_every_bit_and_every_length(place: Any) -> None:
    items, cache = place
    for key in keys(cache, cache.set("file", DATA, metadata=b"metadata")):
        value = items.read(key)
        for bit in range(8 * len(value)):
            damaged = bytearray(value)
            damaged[bit // 8] ^= 1 << bit % 8
            items.write(key, bytes(damaged))
            check(cache, "one bit")
        for length in range(2 * len(value)):
            if length != len(value):
                items.write(key, (value + bytes(len(value)))[:length])
                check(cache, "other length")
        items.write(key, value)
        check(cache, "mended", sound=True)


def test_items_in_the_place_of_others(place: Any) -> None:
    items, cache = place
    files = [("file", b"x" * 250), ("other", DATA), ("file", DATA)]
    known: dict[str, bytes] = {}
    for name, data in files:
        info = cache.set(name, data)
        both = (manifest(name), *keys(cache, info)[1:])
        known.update((key, items.read(key)) for key in both)
    mine = keys(cache, info)
    for key in mine:
        for other, value in known.items():
            if other != key and value != known[key]:
                items.write(key, value)
                check(cache, "exchanged") if other != mine[0] or key != mine[0] else None
        items.write(key, known[key])
    check(cache, "mended", sound=True)


def mutated(value: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """One to three changes of the kinds that memory, disks, networks and bugs make."""
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
    mine = keys(cache, cache.set("file", DATA, metadata=b"metadata"))
    sound = {key: store.read(key) for key in mine}
    for number in range(MUTATIONS):
        key = dice.choice(mine)
        value = mutated(sound[key], list(sound.values()), dice)
        store.write(key, value)
        outcome = result(lambda: cache.get("file"))
        assert outcome == (DATA if value == sound[key] else "FileCorrupt"), (number, key, value)
        store.write(key, sound[key])
    counts["random mutations"] += MUTATIONS


FIELDS = struct.Struct(">3sBIIIQQQ8sH")  # as README and source give it
EXTREMES: dict[int, list[Any]] = {
    1: [0, 2, 255],
    2: [0, 1, 7, 2**31, 2**32 - 1],
    3: [0, 1, 10**6, 2**32 - 1],
    4: [0, 1, 2, 4, 2**32 - 1],
    5: [0, 1, 249, 251, 10**9, 2**32, 2**63, 2**64 - 1],
    6: [0, 2**63, 2**64 - 1],
    7: [0, 1, 2**31, 2**63, 2**64 - 1],
    8: [bytes(8)],
    9: [0, 3, 5, 10**4, 2**16 - 1],
}


def forged(body: bytes) -> Iterator[bytes]:
    """Manifests with a sound CRC: each field at its extremes, each two, and every length."""
    head, rest = list(FIELDS.unpack_from(body)), body[FIELDS.size :]
    singles = [{field: value} for field, values in EXTREMES.items() for value in values]
    for first in singles:
        for second in [{}, *singles]:
            fields = [{**first, **second}.get(at, value) for at, value in enumerate(head)]
            yield FIELDS.pack(*fields) + rest
    for length in range(len(body)):
        yield body[:length]


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


@pytest.mark.parametrize("call", CALLS)
def test_a_manifest_that_lies_with_a_sound_crc(call: str) -> None:
    store = ModelItems()
    cache = cache_on(store.run)
    key = keys(cache, cache.set("file", DATA, metadata=b"metadata"))[0]
    items = store.items
    tracemalloc.start()
    try:
        for body in forged(store.read(key)[:-4]):
            store.items = items
            store.write(key, body + struct.pack(">I", zlib.crc32(body)))
            # `get` asks the system for what the file is said to have, and uses what it reads.
            size = FIELDS.unpack_from(body)[5] if call == "get" and len(body) >= FIELDS.size else 0
            if 10**8 < size < 2**40:
                continue
            with bounded(5, 10**7):
                outcome = result(lambda: CALLS[call](cache))
            if call in READS and outcome not in DAMAGED:
                # Some bytes more are the padding of the last chunk: who signs lies may say so.
                wanted = READS[call][1] + bytes(CHUNK)
                assert isinstance(outcome, bytes)
                assert wanted.startswith(outcome)
            counts["forged manifests"] += 1
    finally:
        tracemalloc.stop()


def test_more_chunks_than_a_file_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelItems()
    cache = cache_on(store.run)
    key = keys(cache, cache.set("file", DATA))[0]
    body = store.read(key)[:-4]
    head = list(FIELDS.unpack_from(body))
    head[2], head[5] = 1, 2**20 + 1  # bytes per chunk, and of the file
    body = FIELDS.pack(*head) + body[FIELDS.size :]
    store.write(key, body + struct.pack(">I", zlib.crc32(body)))
    for call in ("stat", "get", "touch"):
        assert result(lambda: CALLS[call](cache)) == "FileCorrupt"  # noqa: B023

    # A private name, since a file of 2**20 chunks takes a minute to write.
    monkeypatch.setattr(memchunk, "_MAX_CHUNKS", 5)
    for data in (bytes(5 * CHUNK + 1), [bytes(CHUNK)] * 6):
        assert result(lambda: cache.set("new", data)) == "FileTooLarge"  # noqa: B023
    assert cache.set("new", bytes(5 * CHUNK)).chunks == 5
