"""CachedFile: streams that read, and what they fetch."""

from __future__ import annotations

import array
import io
import itertools
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from pymemcache.client.base import Client

import memchunk
from memchunk import FileCache
from tests.faults import Once, Wrapped
from tests.support import CHUNK, MIB, Memcached

DATA = os.urandom(10 * CHUNK)  # ten full chunks
OTHER = os.urandom(9 * CHUNK + 1)


class Opened(NamedTuple):
    cache: FileCache
    server: Memcached
    file: memchunk.CachedFile

    def chunk(self, index: int) -> str:
        """The key of a chunk."""
        keys, end = self.server.keys(), f"|#|{self.file.info.version}:{index}"
        [key] = [key for key in keys if key.endswith(end)]
        return key


@pytest.fixture
def opened(cache: FileCache, memcached: Memcached) -> Iterator[Opened]:
    cache.set("file", DATA)
    with cache.open("file") as file:
        yield Opened(cache, memcached, file)


@pytest.fixture
def file(opened: Opened) -> memchunk.CachedFile:
    return opened.file


def fetches(server: Memcached) -> int:
    """The number of items that were asked for."""
    return int(server.stats()["cmd_get"])


# --- What the io module promises ------------------------------------------------------


def test_a_stream_is_what_the_io_module_calls_one(file: memchunk.CachedFile) -> None:
    assert isinstance(file, io.RawIOBase)
    assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
    for refused in (file.truncate, file.fileno):
        with pytest.raises(io.UnsupportedOperation):
            refused()
    assert file.read() == DATA


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 9001, 9999, 10_000])
def test_every_slice_at_a_chunk_edge_can_be_read(cache: FileCache, size: int) -> None:
    cache.set("file", data := DATA[:size])
    ends = {0, 1, 999, 1000, 1001, 1999, 2000, 2001, size - 1, size}
    ends = {end for end in ends if end <= size}
    with cache.open("file") as file:
        for start, count in itertools.product(ends, {*ends, size + 5}):
            expected, buffer = data[slice(start, start + count)], bytearray(count)
            assert b"".join(file.chunks(start, start + count)) == expected
            assert file.tell() == 0
            assert file.seek(start) == start
            assert file.read(count) == expected
            assert file.tell() == start + len(expected)
            file.seek(start)
            assert buffer[: file.readinto(buffer)] == expected
            file.seek(0)


@pytest.mark.parametrize(
    ("start", "stop"), [(-1, None), (-1500, -999), (5, 4), (0, -1)]
)
def test_chunks_takes_start_and_stop_as_a_slice_does(
    file: memchunk.CachedFile, start: int, stop: int | None
) -> None:
    assert b"".join(file.chunks(start, stop)) == DATA[start:stop]


def test_seek_counts_from_start_position_and_end(file: memchunk.CachedFile) -> None:
    assert file.seek(10) == 10
    assert file.seek(5, io.SEEK_CUR) == 15
    assert file.seek(-15, io.SEEK_CUR) == 0
    assert file.seek(-1, io.SEEK_END) == 9999
    assert file.read() == DATA[-1:]
    assert file.seek(0, io.SEEK_END) == file.tell() == 10_000


@pytest.mark.parametrize("count", [0, 5, -1])
def test_a_read_behind_the_end_leaves_the_position(
    file: memchunk.CachedFile, count: int
) -> None:
    assert file.seek(20_000) == 20_000
    assert file.read(count) == b""
    assert file.tell() == 20_000


NO_PLACES = [(-1, 0), (-1, 1), (-10_001, 2), (0, 3), (0, -1), (1.5, 0), ("1", 0)]


@pytest.mark.parametrize(("offset", "whence"), NO_PLACES)
def test_a_seek_to_no_place_is_refused_and_changes_nothing(
    file: memchunk.CachedFile, offset: Any, whence: int
) -> None:
    with pytest.raises(ValueError if isinstance(offset, int) else TypeError):
        file.seek(offset, whence)
    assert file.tell() == 0


def test_read_takes_every_count(file: memchunk.CachedFile) -> None:
    assert (file.read(0), file.read(1)) == (b"", DATA[:1])
    assert file.read(2 * len(DATA)) == DATA[1:]
    file.seek(0)
    assert file.read(-1) == DATA
    assert file.read() == file.read(1) == b""


def test_readinto_fills_any_buffer(file: memchunk.CachedFile) -> None:
    numbers, rest = array.array("I", bytes(1600)), bytearray(20_000)
    assert file.readinto(numbers) == 1600
    assert numbers.tobytes() == DATA[:1600]
    assert file.readinto(memoryview(rest)[5:]) == 8400
    assert rest == bytes(5) + DATA[1600:] + bytes(11_595)
    file.seek(0)
    with pytest.raises((TypeError, BufferError)):
        file.readinto(bytes(5))
    rest.clear()  # nobody holds the buffer any more


def test_a_stream_copies_and_is_the_source_of_a_file(opened: Opened) -> None:
    target = io.BytesIO()
    shutil.copyfileobj(opened.file, target, length=777)
    assert target.getvalue() == DATA
    opened.file.seek(5)
    opened.cache.set("rest", opened.file)
    opened.cache.set("copy", opened.file.chunks())
    assert (opened.cache.get("rest"), opened.cache.get("copy")) == (DATA[5:], DATA)


@pytest.mark.parametrize(
    "text", [b"one\ntwo\r\n\n" + b"x" * 1500 + b"\nend", b"", b"\n"]
)
def test_lines_are_read_through_a_buffered_reader(
    cache: FileCache, text: bytes
) -> None:
    cache.set("file", text)
    assert list(io.BufferedReader(cache.open("file"))) == list(io.BytesIO(text))
    with io.TextIOWrapper(io.BufferedReader(cache.open("file")), newline="") as lines:
        assert list(lines) == [line.decode() for line in io.BytesIO(text)]


def test_a_buffered_reader_peeks_reads_and_seeks(file: memchunk.CachedFile) -> None:
    reader = io.BufferedReader(file, buffer_size=1500)
    assert reader.peek(1)[:1] == DATA[:1]
    assert reader.read(2500) == DATA[:2500]
    assert reader.seek(-1000, io.SEEK_CUR) == 1500
    assert reader.read1(10) == DATA[1500:1510]
    assert reader.read() == DATA[1510:]


def test_a_closed_stream_refuses_everything(file: memchunk.CachedFile) -> None:
    file.close()
    file.close()
    names = "read readall readline tell readable seekable __enter__ __iter__"
    calls = [getattr(file, name) for name in names.split()]
    calls += [lambda: file.read(1), lambda: file.readinto(bytearray(1))]
    for call in [*calls, lambda: file.seek(0)]:
        with pytest.raises(ValueError, match="closed"):
            call()
    assert (file.closed, file.info.size) == (True, 10_000)


# --- Buffers --------------------------------------------------------------------------


def test_buffers_stay_valid_and_can_not_be_written(memcached: Memcached) -> None:
    data = os.urandom(11 * MIB + 1)  # several batches
    with FileCache(memcached.server) as cache:
        cache.set("file", data)
        buffers = list(cache.open("file").chunks())
        assert all(buffer.readonly for buffer in buffers)
        assert b"".join(buffers) == data
        with cache.open("file") as file:
            kept = list(file.chunks())
            assert file.read() == data
        assert kept == buffers


@pytest.mark.parametrize("size", [1, CHUNK // 16, CHUNK])
def test_the_buffer_of_a_small_file_can_not_be_written(
    cache: FileCache, size: int
) -> None:
    cache.set("file", DATA[:size])
    [buffer] = cache.open("file").chunks()
    assert buffer.readonly
    assert buffer == DATA[:size]


# --- What is fetched ------------------------------------------------------------------

FETCHED = [
    *[(0, None, 10), (0, 0, 0), (0, 1, 1), (0, 1000, 1), (0, 1001, 2), (999, 1001, 2)],
    *[(1000, 2000, 1), (4500, 6500, 3), (9999, None, 1), (9999, 20_000, 1)],
    *[(10_000, None, 0), (20_000, None, 0), (5000, 4000, 0), (-1, None, 1)],
]


@pytest.mark.parametrize(("start", "stop", "count"), FETCHED)
def test_only_the_chunks_of_a_slice_are_fetched(
    opened: Opened, start: int, stop: int | None, count: int
) -> None:
    before = fetches(opened.server)
    assert len(list(opened.file.chunks(start, stop))) == count
    opened.file.seek(*((start, io.SEEK_END) if start < 0 else (start,)))
    opened.file.read(len(DATA[start:stop]))
    # A slice that ends in the chunk that was fetched last finds it there.
    assert count <= fetches(opened.server) - before <= 2 * count


def test_reads_within_one_chunk_fetch_it_once(opened: Opened) -> None:
    before = fetches(opened.server)
    assert b"".join(opened.file.read(10) for _ in range(150)) == DATA[:1500]
    assert fetches(opened.server) - before == 2


def test_open_stat_and_seek_fetch_no_chunk(opened: Opened) -> None:
    for index in range(10):
        opened.server.delete(opened.chunk(index))
    with opened.cache.open("file") as file:
        assert opened.cache.stat("file") == file.info
        assert file.seek(0, io.SEEK_END) == 10_000
        assert list(file.chunks(5, 5)) == []


def test_an_archive_is_read_from_the_chunks_that_it_needs(
    cache: FileCache, memcached: Memcached
) -> None:
    members = {f"{number}.bin": os.urandom(10_000) for number in range(50)}
    with zipfile.ZipFile(target := io.BytesIO(), "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert cache.set("archive.zip", target.getvalue()).chunks > 500
    before = fetches(memcached)
    with zipfile.ZipFile(cache.open("archive.zip")) as archive:
        assert archive.read("25.bin") == members["25.bin"]
        assert fetches(memcached) - before < 30
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == members


# --- Eviction, damage and replacement -------------------------------------------------


def test_a_file_with_a_hole_is_read_beside_it(opened: Opened) -> None:
    opened.server.delete(opened.chunk(5))
    file = opened.file
    assert b"".join(file.chunks(0, 5000)) == DATA[:5000]
    assert b"".join(file.chunks(6000)) == DATA[6000:]
    file.seek(4999)
    buffer = bytearray(2)
    for read in (lambda: file.read(2), file.readall, lambda: file.readinto(buffer)):
        with pytest.raises(memchunk.FileEvicted) as caught:
            read()
        assert (caught.value.missing, caught.value.info) == ([5], file.info)
        assert file.tell() == 4999
    assert pickle.loads(pickle.dumps(caught.value)).missing == [5]
    buffer.clear()  # the error keeps no hold of it
    assert file.read(1) == DATA[4999:5000]


def test_a_damaged_chunk_is_corrupt_and_the_others_are_read(opened: Opened) -> None:
    key = opened.chunk(5)
    opened.server.write(key, opened.server.read(key)[:-1] + b"?")
    assert b"".join(opened.file.chunks(0, 5000)) == DATA[:5000]
    with pytest.raises(memchunk.FileCorrupt) as caught:
        opened.file.read()
    assert caught.value.index == 5


def test_a_stream_without_its_chunk_and_with_a_damaged_manifest_is_corrupt(
    opened: Opened,
) -> None:
    opened.server.delete(opened.chunk(5))
    opened.server.write(opened.chunk(0).partition("|#|")[0], b"damage")
    with pytest.raises(memchunk.FileCorrupt) as caught:
        opened.file.read()
    assert caught.value.index is None


@pytest.mark.parametrize("change", ["set", "delete"])
def test_a_stream_of_a_replaced_file_says_so(opened: Opened, change: str) -> None:
    assert opened.file.read(10) == DATA[:10]
    opened.cache.delete("file")
    current = opened.cache.set("file", OTHER).version if change == "set" else None
    with pytest.raises(memchunk.FileChanged) as caught:
        opened.file.read()
    old = opened.file.info.version
    assert (caught.value.version, caught.value.current) == (old, current)


def test_chunks_of_a_file_replaced_meanwhile_end_with_file_changed(
    memcached: Memcached,
) -> None:
    data = os.urandom(5 * MIB)
    with FileCache(memcached.server) as cache:
        cache.set("file", data)
        chunks = cache.open("file").chunks()
        first = next(chunks)
        cache.set("file", b"other")
        seen = [first]
        with pytest.raises(memchunk.FileChanged):
            seen.extend(chunks)
        assert data.startswith(b"".join(seen))


def test_get_of_a_file_replaced_meanwhile_gets_the_new_one(
    memcached: Memcached,
) -> None:
    with FileCache(memcached.server, chunk_size=CHUNK) as other:
        other.set("file", DATA)
        overtake = Once("get_many", lambda: other.set("file", OTHER))
        client = Wrapped(Client(memcached.address, timeout=5), before=overtake)
        with FileCache(client, chunk_size=CHUNK) as cache:
            assert cache.get("file") == OTHER
    assert overtake.acted


def test_threads_read_one_stream(opened: Opened) -> None:
    """Each slice is right, though all of them share the chunk that was read last."""

    def read(turn: int) -> bool:
        start, stop = turn * 37 % 9000, turn * 37 % 9000 + turn * 11 % 1500
        return b"".join(opened.file.chunks(start, stop)) == DATA[start:stop]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(2000)))
