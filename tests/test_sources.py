"""Sources of files: what can be one, what is stored of it, and what is refused."""

from __future__ import annotations

import array
import contextlib
import gzip
import http.client
import http.server
import io
import itertools
import os
import pathlib
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from tempfile import NamedTemporaryFile, SpooledTemporaryFile
from typing import Any, Callable

import pytest
from pymemcache.client.base import Client

import memchunk
from memchunk import FileCache
from tests.faults import Once, Wrapped
from tests.support import CHUNK, FOLDER, MIB, Memcached, Start

OLD = bytes(range(256)) * 10
NEW = bytes(reversed(range(256))) * 18  # five chunks
LONG = NEW * 70
LIMIT = 6 * MIB  # more than one batch
Folder = pathlib.Path


def sets(memcached: Memcached) -> int:
    """The number of values that were sent."""
    return int(memcached.stats()["cmd_set"])


def pieces(data: bytes, *lengths: int) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        for length in lengths:
            yield data[slice(start, start + length)]
            start += length


def saved(data: bytes, folder: Folder) -> Folder:
    (folder / "source").write_bytes(data)
    return folder / "source"


# --- What is stored -------------------------------------------------------------------


class OnlyRead:
    """A file with nothing but `read`, which returns a piece at a time."""

    def __init__(self, *data: object) -> None:
        self._data = iter(data)

    def read(self, count: int) -> Any:
        return next(self._data, b"")


class Around:
    """Wraps a file, and answers all but `read` as the file does."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        return data.swapcase()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Halved(io.FileIO):
    """A file that yields half of the bytes that it has: each second one."""

    def read(self, size: int | None = -1) -> Any:
        return (super().read(size) or b"")[::2]


def temporary(make: Callable[[], Any], data: bytes, start: int = 0) -> Any:
    file = make()
    file.write(data)
    file.seek(start)
    return file


def pipe(data: bytes, folder: Folder, buffering: int = -1) -> Any:
    reader, writer = os.pipe()
    assert os.write(writer, data) == len(data)
    os.close(writer)
    return open(reader, "rb", buffering)


def connection(data: bytes, folder: Folder) -> Any:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(data)
        return near.makefile("rb")


SOURCES: dict[str, Callable[[bytes, Folder], Any]] = {
    "bytes": lambda data, _: data,
    "bytearray": lambda data, _: bytearray(data),
    "every second byte": lambda data, _: memoryview(
        b"".join(bytes([each, 0]) for each in data)
    )[::2],
    "backwards": lambda data, _: memoryview(data[::-1])[::-1],
    "matrix": lambda data, _: memoryview(data).cast("B", (64, 72)),
    "array": lambda data, _: array.array("H", data),
    "file": lambda data, folder: saved(data, folder).open("rb"),
    "raw file": lambda data, folder: saved(data, folder).open("rb", buffering=0),
    "offset": lambda data, _: temporary(NamedTemporaryFile, b"left" + data, 4),
    "path": saved,
    "BytesIO": lambda data, _: io.BytesIO(data),
    "pipe": pipe,
    "raw pipe": lambda data, folder: pipe(data, folder, buffering=0),
    "connection": connection,
    "gzip": lambda data, _: gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data))),
    "spooled": lambda data, _: temporary(SpooledTemporaryFile, data),
    "only read": lambda data, _: OnlyRead(*pieces(data, 700)),
    "wrapper": lambda data, folder: Around(saved(data.swapcase(), folder).open("rb")),
    "subclass": lambda data, folder: Halved(
        saved(bytes(each for byte in data for each in (byte, byte)), folder)
    ),
    "odd pieces": lambda data, _: pieces(data, 1, 0, 999, 3, 0, 0, 1001),
    "bytes of one": lambda data, _: pieces(data, 1),
    "list": lambda data, _: [data[:9], b"", bytearray(data[9:99]), data[99:]],
    "arrays": lambda data, _: iter([array.array("I", data), array.array("H")]),
}


@pytest.mark.parametrize("size", [None, len(NEW)])
@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_a_source_of_any_kind_is_stored(
    cache: FileCache, make: Callable[..., Any], size: int | None, tmp_path: Folder
) -> None:
    source = make(NEW, tmp_path)
    with contextlib.ExitStack() as stack:
        if hasattr(source, "close"):
            stack.callback(source.close)
        assert cache.set("file", source, size=size).size == len(NEW)
    assert cache.get("file") == NEW


@pytest.mark.parametrize("source", [[], [b""], iter([b""]), io.BytesIO(), OnlyRead()])
def test_a_source_without_bytes_is_an_empty_file(cache: FileCache, source: Any) -> None:
    assert (cache.set("file", source).chunks, cache.get("file")) == (0, b"")


@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_file_read_from_a_position_behind_its_end_is_empty(
    cache: FileCache, tmp_path: Folder, buffering: int
) -> None:
    with saved(NEW, tmp_path).open("rb", buffering) as file:
        file.seek(len(NEW) + 1)
        assert cache.set("file", file).size == 0
    assert cache.get("file") == b""


@pytest.mark.parametrize("path", ["/proc/version", "/sys/kernel/mm/ksm/run"])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_file_of_the_kernel_is_stored_though_it_announces_another_length(
    cache: FileCache, path: str, buffering: int
) -> None:
    data = pathlib.Path(path).read_bytes()
    assert os.stat(path).st_size != len(data)
    with open(path, "rb", buffering) as file:
        cache.set("file", file)
    assert cache.get("file") == data


def test_a_source_may_resize_the_buffer_that_it_yielded(cache: FileCache) -> None:
    def pieces() -> Iterator[bytearray]:
        buffer = bytearray()
        for number in range(20):
            buffer[:] = bytes([number]) * (number * 100)
            yield buffer

    cache.set("file", pieces())
    assert cache.get("file") == b"".join(bytes([n]) * (n * 100) for n in range(20))


def test_pieces_longer_than_a_batch_are_stored(memcached: Memcached) -> None:
    data = os.urandom(11 * MIB + 1)
    with FileCache(memcached.server) as cache:
        for cut in (0, 5, 10 * MIB):
            cache.set("file", [data[:cut], data[cut:]])
            assert cache.get("file") == data


# --- What is refused ------------------------------------------------------------------


def broken(data: bytes) -> Iterator[bytes]:
    yield from pieces(data, 999)
    raise ValueError("broken")


AT_ONCE = [
    *["text", "", io.StringIO("text"), ["text"], [b"", "text"], OnlyRead("text")],
    *[OnlyRead(""), 5, [1, 2, 3], None, [None], OnlyRead(None), broken(b"")],
    pathlib.Path("/nothing"),
]
BATCH = bytes(5 * MIB)  # and a little more
LATE: list[Any] = [broken(BATCH), OnlyRead(BATCH, None), [BATCH, "text"]]


@pytest.mark.parametrize("source", [*AT_ONCE, *LATE])
def test_a_source_that_fails_leaves_the_old_file_and_nothing_else(
    cache: FileCache, memcached: Memcached, source: Any
) -> None:
    cache.set("file", OLD)
    keys, before = memcached.keys(), sets(memcached)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        cache.set("file", source)
    assert not isinstance(caught.value, memchunk.MemchunkError)
    assert (sets(memcached) > before) == (source in LATE)
    assert (memcached.keys(), cache.get("file")) == (keys, OLD)


@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_pipe_that_has_nothing_yet_is_not_at_its_end(
    cache: FileCache, memcached: Memcached, buffering: int
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"bytes")
    os.set_blocking(reader, False)
    refusal = pytest.raises((TypeError, BlockingIOError))
    with open(writer, "wb"), open(reader, "rb", buffering) as file, refusal:
        cache.set("file", file)
    assert memcached.keys() == []


# --- Sizes and the limit --------------------------------------------------------------

WRONG = [(0, 1), (1, 0), (-1, 0), (-1, 1), (1000, 999), (1000, 1001), (2000, 4608)]
WRONG += [(4_299_999, 4_300_000), (4_300_001, 4_300_000), (300_000, 9_000_000)]


@pytest.mark.parametrize(("size", "actual"), WRONG)
@pytest.mark.parametrize("is_known", [True, False])
def test_a_source_of_another_size_is_not_stored(
    cache: FileCache, memcached: Memcached, size: int, actual: int, is_known: bool
) -> None:
    cache.set("file", OLD)
    keys, before, data = memcached.keys(), sets(memcached), bytes(actual)
    with pytest.raises(memchunk.SizeMismatch) as caught:
        cache.set("file", data if is_known else pieces(data, 70_000), size=size)
    assert (caught.value.name, caught.value.size) == ("file", size)
    assert (caught.value.received > size) == (actual > size)
    assert memcached.keys() == keys
    assert not is_known or sets(memcached) == before
    assert cache.get("file") == OLD


@pytest.mark.parametrize("length", [0, len(LONG) - 1, len(LONG) + 1, 2 * len(LONG)])
def test_a_file_that_changes_its_length_meanwhile_is_not_stored(
    memcached: Memcached, tmp_path: Folder, length: int
) -> None:
    path = saved(LONG, tmp_path)
    change = Once("gets", lambda: os.truncate(path, length))
    client = Wrapped(Client(memcached.address, timeout=5), before=change)
    refusal = pytest.raises(memchunk.SizeMismatch)
    with FileCache(client, chunk_size=CHUNK) as cache, refusal as caught:
        cache.set("file", path)
    assert change.acted
    assert (caught.value.size, caught.value.received) == (len(LONG), length)
    assert memcached.keys() == []


@pytest.mark.parametrize(("mode", "buffering"), [("rb", -1), ("r+b", -1), ("rb", 0)])
def test_a_size_over_the_limit_is_refused_before_a_byte_is_read(
    memcached: Memcached, tmp_path: Folder, mode: str, buffering: int
) -> None:
    path, before, rest = saved(LONG, tmp_path), sets(memcached), OnlyRead(b"x")
    sources: list[tuple[Any, int | None]] = [(path, None), (rest, 1501)]
    opened = path.open(mode, buffering)
    with FileCache(memcached.server, max_size=1500) as cache, opened as file:
        for source, size in [*sources, (file, None)]:
            with pytest.raises(memchunk.FileTooLarge):
                cache.set("file", source, size=size)
        assert (file.tell(), rest.read(1)) == (0, b"x")
    assert sets(memcached) == before


def test_a_source_without_end_is_read_to_the_limit_and_little_more(
    memcached: Memcached,
) -> None:
    cache, count = FileCache(memcached.server, max_size=LIMIT), itertools.count()
    with open("/dev/zero", "rb") as zeros:
        for source in (zeros, (bytes(1000) for _ in count)):
            with pytest.raises(memchunk.FileTooLarge):
                cache.set("file", source)
    assert next(count) < (LIMIT + 5 * MIB) / 1000  # a batch has 4 MiB
    cache.close()
    assert memcached.keys() == []


# --- Downloads and memory -------------------------------------------------------------


class Download(http.server.BaseHTTPRequestHandler):
    """Answers with LONG, or breaks off in the middle of it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        is_whole, is_chunked = "whole" in self.path, "chunked" in self.path
        sent = LONG if is_whole else LONG[: len(LONG) // 2]
        length = ("Content-Length", str(len(LONG)))
        self.send_response(200)
        self.send_header(*(("Transfer-Encoding", "chunked") if is_chunked else length))
        self.send_header("Connection", "close")
        self.end_headers()
        framed = b"%x\r\n%b\r\n" % (len(sent), sent) + b"0\r\n\r\n" * is_whole
        self.wfile.write(framed if is_chunked else sent)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Download) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_download_is_stored_only_if_it_is_whole(
    cache: FileCache, memcached: Memcached, site: str, framing: str
) -> None:
    error = memchunk.SizeMismatch if framing == "length" else http.client.IncompleteRead
    half = urllib.request.urlopen(f"{site}/{framing}/half")
    with half, pytest.raises(error):
        cache.set("file", half)
    assert memcached.keys() == []
    with urllib.request.urlopen(f"{site}/{framing}/whole") as response:
        assert response.read(10) == LONG[:10]
        cache.set("file", response)
    assert cache.get("file") == LONG[10:]


MEASURE = """
import sys, memchunk
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
path, server, kind = sys.argv[1:]
with memchunk.FileCache(server) as cache:
    cache.set("file", bytes(600_000))
    assert len(cache.get("file")) == sum(map(len, cache.open("file").chunks()))
    idle, file = peak(), open(path, "rb")
    source = file if kind == "file" else iter(lambda: file.read(100_000), b"")
    assert cache.set("file", source).size == sum(map(len, cache.open("file").chunks()))
    print(peak() - idle)
"""


@pytest.mark.parametrize("kind", ["file", "pieces"])
def test_memory_does_not_grow_with_the_file(
    start_memcached: Start, tmp_path: Folder, kind: str
) -> None:
    path = saved(os.urandom(50 * MIB), tmp_path)
    order = [sys.executable, "-c", MEASURE, str(path), start_memcached().server, kind]
    done = subprocess.run(order, cwd=FOLDER, capture_output=True, check=True)
    assert int(done.stdout) < 12 * 1024  # KiB
