"""Keep files of 0 to 50 MiB in memcached, whose items end at 1 MB; get them back byte for byte.

    cache = memchunk.connect("127.0.0.1:11211")
    cache.add("report.pdf", open("report.pdf", "rb"), expire=86400)
    data = cache.get("report.pdf")

A file is stored as chunks, each under a key of its own, and one manifest that names them:

    <namespace>:<sha256 of the name>   manifest: size, chunks, version, times, name, metadata, CRC
    <namespace>:<version>:<index>      chunk: index, total, CRC, payload

The promise: a file that `add`, `set` or `cas` returned from is wholly in the cache at that moment;
bytes that a read hands out are the bytes that were stored; everything else is a `MemchunkError`.
What keeps it:

* Every upload has a random version, and its chunks have keys that no other upload uses. A reader
  that holds a manifest can meet the chunks of that upload or none, never those of another.
* A file appears by one atomic step: its manifest is written with memcached's `add` or `cas`, after
  every chunk was stored and, by a `touch` that also sets its final expiry, seen to be still there.
* Until that touch a chunk lives on a lease: a writer that dies before leaves nothing for longer.
* Every chunk has a CRC over payload, index, total and version; the manifest, over all of itself.

memcached is a cache: it evicts. What was evicted is `FileNotFound` or `FileEvicted`, never wrong.
Copy this one file; it needs Python 3.9 and pymemcache 4, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import operator
import os
import re
import secrets
import socket
import struct
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, Callable, NoReturn, TypeVar, Union, cast

from pymemcache.client.base import Client, PooledClient
from pymemcache.client.hash import HashClient
from pymemcache.client.rendezvous import RendezvousHash
from pymemcache.exceptions import (
    MemcacheError,
    MemcacheServerError,
    MemcacheUnexpectedCloseError,
    MemcacheUnknownError,
)
from pymemcache.pool import ObjectPool

__all__ = [
    "CacheFull", "CacheUnavailable", "CachedFile", "FileCache", "FileChanged", "FileCorrupt",
    "FileEvicted", "FileExists", "FileInfo", "FileNotFound", "FileTooLarge", "InvalidName",
    "MAX_SIZE", "MemchunkError", "SizeMismatch", "connect",
]

MAX_SIZE = 50 * 1024 * 1024  # bytes, inclusive: the largest file unless `max_size` says otherwise
MAX_NAME = 1024  # bytes of UTF-8
MAX_METADATA = 0xFFFF  # bytes: the length is a 16-bit field of the manifest
TIMEOUT = 5.0  # seconds that `connect`'s clients wait to connect, and for each send and receive
LEASE = 3600  # seconds that chunks live while their upload is not complete

# Chunks outlive their manifest by this many seconds, so that an expiring file is first not found,
# never half there, and a read that began just before can finish.
_SLACK = 60

# memcached keeps an item in one piece up to the size of its largest slab class, `slab_chunk_max`:
# 512 KiB unless set otherwise, two to a page of 1 MB. Larger items it stitches together from
# several pieces, which wastes memory and fails under pressure. Each item takes 59 bytes beside key
# and value, or 63 where a client sets flags.
_LARGEST_ITEM = 512 * 1024
_ITEM_OVERHEAD = 64

# memcached evicts per slab class, and the class with the fewest pages first, so that one chunk of
# another size ends a file long before its time. Therefore files of several chunks have equal ones,
# all in the largest class: what fills less than this part of a chunk is padded. The next smaller
# class ends below 0.896 of the largest, whatever growth factor (-f) the server has.
_LEAST_FILL = 0.9

# Payload bytes that travel together, which bounds what a transfer holds in memory. Writes: batches
# of 8 to 16 chunks survive best in a cache that hardly holds the file. Reads: less stays in CPU
# caches.
_WRITE_BATCH = 4 * 1024 * 1024
_READ_BATCH = 2 * 1024 * 1024
_PIPELINE = 256  # commands sent before a reply is read: the replies fit in any socket buffer
_MAX_CHUNKS = 2**20  # more than any file needs; what a manifest says is not worked off blindly

# Where chunks that were read, or touched, twice fill the cache, memcached refuses others until its
# LRU thread has made room. That thread sleeps for up to a second.
_PATIENCE = 2.0  # seconds to wait for it
_PAUSE = 0.02  # seconds between two tries

_ATTEMPTS = 100  # at a manifest that others keep changing; each failure means that one got through

_RELATIVE_LIMIT = 30 * 24 * 3600  # memcached reads more seconds than this as an absolute time
_OVER = _RELATIVE_LIMIT + 1  # thus a day in 1970; -1 ends at once too, but twemproxy refuses it
_ABSOLUTE_LIMIT = 2**31 - 1  # and keeps times in 32 bits; what ends later never ends

_CHUNK = struct.Struct(">III")  # index, total, CRC
# magic, format, chunk_size, floor, total, size, created, expires (0: never), version, length of
# the name; name, metadata and the CRC follow.
_MANIFEST = struct.Struct(">3sBIIIQQQ8sH")
_CRC = struct.Struct(">I")
_MAGIC, _FORMAT = b"mch", 1

# What pymemcache lets out: its own errors and the socket's; ValueError, KeyError and IndexError
# for replies that it can't parse; RuntimeError for an exhausted pool.
_CLIENT_ERRORS = (OSError, MemcacheError, ValueError, KeyError, IndexError, RuntimeError)
_DROPPED = (ConnectionResetError, BrokenPipeError, MemcacheUnexpectedCloseError)
_NO = (b"NOT_STORED", b"EXISTS", b"NOT_FOUND")  # replies that are no errors
_REFUSED = re.compile(r"out of memory (storing|during read)|object too large")

Source = Union[bytes, bytearray, memoryview, IO[bytes], Iterable[bytes]]


class MemchunkError(Exception):
    """Root of all errors of this module. `name` is the file's; more attributes stand with each."""

    name: str
    text = ""

    def __init__(self, **details: object) -> None:
        super().__init__(self.text.format(**details))
        self.__dict__.update(details)

    def __str__(self) -> str:  # KeyError would show the message's repr
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self.__dict__), ()


class InvalidName(MemchunkError, ValueError):
    """The name is empty, longer than 1024 bytes of UTF-8, or has no UTF-8 form."""

    text = f"a name is a text of 1 to {MAX_NAME} bytes of UTF-8, which {{name!r:.50}} is not"


class FileNotFound(MemchunkError, KeyError):
    """No file of that name is stored. It may have been, and expired or been evicted whole."""

    text = "no file named {name!r} is stored"


class FileExists(MemchunkError):
    """`add` found a file of that name, whole: `info`."""

    info: FileInfo
    text = "a file named {name!r} is already stored"


class FileChanged(MemchunkError):
    """The file is no longer the `version` asked for or opened; `current` is (None: it is gone)."""

    version: str
    current: str | None
    text = "{name!r} is not version {version} any more, but {current}"


class FileTooLarge(MemchunkError, ValueError):
    """More than `limit` bytes. `size` is the file's where known, else what had been read."""

    size: int
    limit: int
    text = "{name!r} has {size} bytes or more, and the limit is {limit}"


class SizeMismatch(MemchunkError, ValueError):
    """The source has not the `size` in bytes that was announced; `received` had been seen."""

    size: int
    received: int
    text = "{name!r} was announced with {size} bytes, and its source has {received} or more"


class FileEvicted(MemchunkError, LookupError):
    """memcached dropped chunks of the file: of those looked for, the ones at `missing`."""

    info: FileInfo
    missing: list[int]
    text = "{name!r} was evicted in part: chunks {missing} of {info.chunks} are gone"


class FileCorrupt(MemchunkError):
    """What memcached returned is not what was stored: chunk `index`, or the manifest (None)."""

    index: int | None
    text = "{name!r} is damaged (chunk {index}; None is the manifest)"


class CacheFull(MemchunkError):
    """The server would not keep the file: refused an item, or evicted the chunks at `missing`."""

    missing: list[int]
    text = "memcached would not keep {name!r}: {reason}"


class CacheUnavailable(MemchunkError, ConnectionError):
    """`server` did not answer, or not as memcached would. A write may have been done or not."""

    server: str
    text = "memcached at {server} is not available: {reason}"


class _UnknownFormat(FileCorrupt):
    """A sound manifest of a format version that this module does not know."""

    text = "{name!r} is stored in format {format}, which this version of memchunk does not know"


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """What is known of a stored file without reading it.

    name, metadata: as given to `add`. size: bytes. chunks: how many, beside the manifest.
    version: 16 hex digits, unique to this upload; part of its chunks' keys. created: Unix time in
    seconds. expires: likewise, None for never.
    """

    name: str
    size: int
    chunks: int
    version: str
    created: int
    expires: int | None
    metadata: bytes


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a file is cut: chunks of `chunk_size` bytes, the last one shorter; those shorter than
    `floor` padded to it with zeros. `total`, in every chunk's header, is their number, or 0 where
    the first was sent before the source's end was known."""

    chunk_size: int
    floor: int
    total: int

    @classmethod
    def plan(cls, size: int | None, capacity: int) -> _Layout:
        """For `size` bytes (None: unknown) in chunks of at most `capacity`."""
        total = -(-(size or 0) // capacity)
        chunk_size = -(-size // total) if size and total else capacity
        return cls(chunk_size, 0 if total == 1 else int(capacity * _LEAST_FILL), total)

    def per_batch(self, size: int) -> int:
        """How many chunks travel together in `size` bytes."""
        return max(1, min(_PIPELINE, size // self.chunk_size))

    def header(self, version: str, index: int, *body: Any) -> bytes:
        """A chunk's header. Its CRC begins with what is not in the body, at no cost in bytes: a
        sound chunk in the wrong place fails like a damaged one."""
        crc = zlib.crc32(_CHUNK.pack(index, self.total, 0) + version.encode())
        for part in body:
            crc = zlib.crc32(part, crc)
        return _CHUNK.pack(index, self.total, crc)


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """The one item that makes chunks a file."""

    info: FileInfo
    layout: _Layout

    def pack(self) -> bytes:
        info, name = self.info, self.info.name.encode()
        head = _MANIFEST.pack(
            *(_MAGIC, _FORMAT, *dataclasses.astuple(self.layout), info.size, info.created),
            *(info.expires or 0, bytes.fromhex(info.version), len(name)),
        )
        body = head + name + info.metadata
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, name: str, value: object) -> _Manifest:
        """Raises FileCorrupt unless `value` is, byte for byte, a manifest of the file `name`."""
        body = bytes(value[: -_CRC.size]) if isinstance(value, (bytes, bytearray)) else b""
        if value != body + _CRC.pack(zlib.crc32(body)) or not body.startswith(_MAGIC):
            raise FileCorrupt(name=name, index=None)
        found = int.from_bytes(body[len(_MAGIC) : len(_MAGIC) + 1], "big")
        if found != _FORMAT:
            raise _UnknownFormat(name=name, index=None, format=found)
        if len(body) < _MANIFEST.size:
            raise FileCorrupt(name=name, index=None)
        fields = _MANIFEST.unpack_from(body)
        chunk_size, floor, total, size, created, expires, version, length = fields[2:]
        tail = body[_MANIFEST.size :]
        sound = chunk_size and size <= chunk_size * _MAX_CHUNKS
        if tail[:length] != name.encode() or not sound:
            raise FileCorrupt(name=name, index=None)
        info = FileInfo(
            *(name, size, -(-size // chunk_size), version.hex(), created, expires or None),
            tail[length:],
        )
        return cls(info, _Layout(chunk_size, floor, total))

    def verify(self, index: int, value: object) -> memoryview:
        """The payload of a chunk's value. Raises FileCorrupt unless that is what was stored."""
        layout = self.layout
        if isinstance(value, (bytes, bytearray)):
            size = min(layout.chunk_size, self.info.size - index * layout.chunk_size)
            header, body = memoryview(value)[: _CHUNK.size], memoryview(value)[_CHUNK.size :]
            length = max(size, layout.floor)
            if len(body) == length and header == layout.header(self.info.version, index, body):
                return body[:size].toreadonly()
        raise FileCorrupt(name=self.info.name, index=index)


_T = TypeVar("_T")
_New = TypeVar("_New", bound=Union[_Manifest, None])
_Current = Union[_Manifest, FileCorrupt, None]  # what is at a manifest's key, or wrong with it


class FileCache:
    """Files in memcached, through any pymemcache client.

    client: a pymemcache `Client` or `PooledClient`, or several: a `HashClient`, or a mapping of
        server names to clients. Then each file lives whole on one server, chosen by rendezvous
        hashing of its name. Thread-safe when the clients are.
    namespace: prefix of every key, 1 to 100 printable ASCII characters without spaces.
    max_size: bytes, the largest file. 50 MiB by default.
    chunk_size: bytes of payload per chunk, by default the most that the server keeps well, as told
        by its `stats settings`. Give it where a proxy hides servers with a small `-I`.
    lease: seconds that the chunks of an unfinished upload live; no upload may take longer.

    Every method that takes a name may raise InvalidName and CacheUnavailable.
    """

    def __init__(
        self, client: Any, *, namespace: str = "memchunk", max_size: int = MAX_SIZE,
        chunk_size: int | None = None, lease: int = LEASE,
    ) -> None:
        if not re.fullmatch(r"[!-~]{1,100}", namespace):
            raise ValueError("namespace: 1 to 100 printable ASCII characters without spaces")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError("chunk_size must be at least 1 byte")
        if isinstance(client, HashClient):
            # Its own routing calls a server that is down a miss, and what it put on another
            # instead is stale when the first returns. Its clients are sound, one by one.
            client = client.clients
        self._clients = dict(client) if isinstance(client, Mapping) else {"memcached": client}
        if any(getattr(each, "ignore_exc", False) for each in self._clients.values()):
            raise ValueError("ignore_exc=True makes a client call a server that is down a miss")
        self._ring = RendezvousHash(list(self._clients), hash_function=_score)
        self._known_limits: dict[str, tuple[int, float]] = {}
        self._chunk_size = chunk_size
        self._lease = lease
        self.namespace = namespace
        self.max_size = max_size

    def add(
        self, name: str, source: Source, size: int | None = None, expire: int = 0,
        metadata: bytes = b"",
    ) -> FileInfo:
        """Store a new file; return its FileInfo.

        source: a bytes-like object, a binary file (read from where it stands) or an iterable of
            bytes. What it raises passes through, and nothing is stored.
        size: bytes that the source will yield, where known. Binding.
        expire: seconds from now, 0 for never.
        metadata: up to 65,535 bytes to keep with the file.

        Raises FileExists, before payload is sent, where a file of that name is there and whole
        (one that lost chunks is replaced); FileTooLarge; SizeMismatch; CacheFull; TypeError for
        text.
        """

        def check(store: _Store, current: _Current) -> None:
            if isinstance(current, _UnknownFormat):
                raise current
            if isinstance(current, _Manifest) and not store.settle(current):
                raise FileExists(name=name, info=current.info)

        return self._write(name, source, size, expire, metadata, check)

    def set(
        self, name: str, source: Source, size: int | None = None, expire: int = 0,
        metadata: bytes = b"",
    ) -> FileInfo:
        """Store a file, replacing what is there: until it returns, and where it raises, readers
        get the old file. Arguments and errors are those of `add`, but FileExists."""
        return self._write(name, source, size, expire, metadata, lambda store, current: None)

    def cas(
        self, name: str, source: Source, version: str, size: int | None = None, expire: int = 0,
        metadata: bytes = b"",
    ) -> FileInfo:
        """Check and set: replace the file only while it is `version`. Arguments and errors are
        those of `set`, and FileChanged where another is there, FileNotFound where none is."""

        def check(store: _Store, current: _Current) -> None:
            _require(name, current, version)

        return self._write(name, source, size, expire, metadata, check)

    def get(self, name: str) -> bytes:
        """The whole file, verified. Raises FileNotFound, FileEvicted, FileCorrupt.

        Starts over where a writer replaced the file meanwhile; FileChanged: 100 times in a row.
        """
        return _persist(lambda: self.open(name).readall())

    def open(self, name: str) -> CachedFile:
        """The version that is there now, as a binary stream that fetches chunks when they are
        read. Raises FileNotFound, FileCorrupt."""
        store = self._store(name)
        return CachedFile(store, _require(name, store.lookup()[0]))

    def stat(self, name: str) -> FileInfo:
        """What the manifest says; chunks may be gone. Raises FileNotFound, FileCorrupt."""
        return _require(name, self._store(name).lookup()[0]).info

    def touch(self, name: str, expire: int) -> FileInfo:
        """Give every piece of the file a new time to live, in seconds from now, 0 for never.
        Raises FileNotFound, FileEvicted, FileCorrupt."""
        store, expire = self._store(name), _seconds(expire)

        def step(current: _Current) -> _Manifest:
            old = _require(name, current)
            info = dataclasses.replace(old.info, expires=_end(expire))
            # The chunks must outlive the manifest throughout, so they take the later end before it
            # changes, and the earlier one after.
            ends = (old.info.expires or math.inf, info.expires or math.inf)
            missing = store.touch(info, None if math.inf in ends else int(max(ends)))
            if missing:
                store.explain(info, missing)
            return _Manifest(info, old.layout)

        manifest = _persist(lambda: store.swap(step))
        store.settle(manifest)
        return manifest.info

    def delete(self, name: str, version: str | None = None) -> None:
        """Delete the file, whole or not; with `version`, only while it is that version.
        Raises FileNotFound where it isn't there, FileChanged where another version is."""
        store = self._store(name)

        def step(current: _Current) -> None:
            if current is None or version is not None:
                _require(name, current, version)

        store.swap(step)

    def memory(self, name: str) -> float:
        """Bytes of memory of the server that has, or would have, the file; infinite if unknown."""
        return self._limits(self._store(name))[1]

    def ping(self) -> None:
        """Return when every server answers, else raise CacheUnavailable."""
        for server, client in self._clients.items():
            _Store(client, server, self.namespace, "ping", "ping").lookup()

    def close(self) -> None:
        """Close the clients' connections. The next call opens new ones."""
        for client in self._clients.values():
            client.close()

    def _store(self, name: str) -> _Store:
        encoded = name.encode(errors="ignore") if isinstance(name, str) else b""
        if not 1 <= len(encoded) <= MAX_NAME or encoded.decode() != name:
            raise InvalidName(name=name)
        digest = hashlib.sha256(encoded).hexdigest()
        server = self._ring.get_node(digest)
        return _Store(self._clients[server], server, self.namespace, name, digest)

    def _write(
        self, name: str, source: Source, size: int | None, expire: int, metadata: bytes,
        check: Callable[[_Store, _Current], None],
    ) -> FileInfo:
        """The five steps of every write. `check` raises where the current file forbids it."""
        store, expire, metadata = self._store(name), _seconds(expire), bytes(memoryview(metadata))
        if len(metadata) > MAX_METADATA:
            raise ValueError(f"metadata is limited to {MAX_METADATA} bytes")
        reader = _Reader(source)
        size = reader.size if size is None else operator.index(size)
        if size is not None and size > self.max_size:
            raise FileTooLarge(name=name, size=size, limit=self.max_size)
        if reader.size not in (None, size):
            raise SizeMismatch(name=name, size=size, received=reader.size)

        # 1. Refuse early, before a byte of payload is sent.
        found = store.lookup()
        check(store, found[0])

        capacity, memory = self._limits(store)
        # A file of more than half the cache needs what its old version holds; see `put`.
        hold = 2 * (self.max_size if size is None else size) > memory
        upload = _Upload(store, found[0], capacity, memory, self._lease, hold)

        def publish(current: _Current) -> _Manifest:
            check(store, current)
            # 3. Give the chunks their final expiry, which proves that each is still there: a
            # server that is short of memory says STORED and evicts the first while the last
            # arrive.
            return upload.seal(_end(expire), metadata)

        try:
            upload.send(reader, size, self.max_size)  # 2. Store the chunks, on a lease.
            # 4. Publish, the one atomic step. 5. Free the memory of the chunks that it replaced.
            return store.swap(publish, found).info
        except BaseException:
            upload.abandon()
            raise

    def _limits(self, store: _Store) -> tuple[int, float]:
        """Bytes of payload that a chunk may hold on the server, and of the server's memory."""
        if store.server not in self._known_limits:
            largest, memory = store.limits()
            longest_key = store.chunk_key("0" * 16, 10**6)
            capacity = largest - _ITEM_OVERHEAD - len(longest_key) - _CHUNK.size
            self._known_limits[store.server] = self._chunk_size or max(capacity, 1), memory
        return self._known_limits[store.server]


class CachedFile(io.RawIOBase):
    """One version of a file as a readable, seekable binary stream; made by `FileCache.open`.

    Fetches the chunks that are read, and no others. Reading raises FileEvicted, FileCorrupt, and
    FileChanged where the file was replaced or deleted since it was opened and its chunks are gone.
    """

    def __init__(self, store: _Store, manifest: _Manifest) -> None:
        super().__init__()
        self.info = manifest.info
        self._store, self._manifest = store, manifest
        self._position = 0
        self._held: tuple[int, memoryview] = (-1, memoryview(b""))  # the chunk read last

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes from `start` to `stop`, as in a slice, in verified read-only buffers. Holds
        2 MiB of them at a time. Leaves the stream's position alone."""
        self._checkClosed()
        start, stop, _ = slice(start, stop).indices(self.info.size)
        return (piece for piece, _ in self._pieces(start, stop))

    def _pieces(
        self, start: int, stop: int
    ) -> Iterator[tuple[memoryview, tuple[int, memoryview]]]:
        """What is between `start` and `stop`, each piece with the chunk that it is part of."""
        layout = self._manifest.layout
        size, batch = layout.chunk_size, layout.per_batch(_READ_BATCH)
        indices = range(start // size, -(-stop // size) if start < stop else 0)
        while indices:
            if indices[0] == self._held[0]:
                payloads = [self._held[1]]
            else:
                payloads = self._store.fetch(self._manifest, indices[:batch])
            for index, payload in zip(indices, payloads):
                offset = index * size
                yield payload[max(start - offset, 0) : stop - offset], (index, payload)
            indices = indices[len(payloads) :]
            # Now, so that the next batch is received into the same memory: to get fresh pages from
            # the system takes as long as the CRC.
            del payload, payloads

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; fewer bytes than it holds only at the end of the file."""
        self._checkClosed()
        target = memoryview(buffer).cast("B")
        filled, stop = 0, min(self._position + len(target), self.info.size)
        for piece, chunk in self._pieces(self._position, stop):
            target[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._held = chunk
        self._position += filled
        return filled

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, fewer only at the end; all that is left by default."""
        if size is None or size < 0:
            return self.readall()
        return super().read(min(size, max(self.info.size - self._position, 0))) or b""

    def readall(self) -> bytes:
        """All that is left, as one bytes object."""
        # Zero bytes that the system makes when they are written to, and a buffer that is handed
        # over without a copy: the file is in memory once.
        output = io.BytesIO(bytes(max(self.info.size - self._position, 0)))
        with output.getbuffer() as view:
            filled = 0
            for piece in self.chunks(self._position):
                view[filled : filled + len(piece)] = piece
                filled += len(piece)
        self._position += filled
        return output.getvalue()

    def readable(self) -> bool:
        self._checkClosed()
        return True

    def seekable(self) -> bool:
        self._checkClosed()
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._checkClosed()
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.info.size}
        if whence not in origins or origins[whence] + operator.index(offset) < 0:
            raise ValueError(f"can't seek to {offset} from {whence}")
        self._position = origins[whence] + offset
        return self._position


def connect(servers: str, *, timeout: float = TIMEOUT, **options: Any) -> FileCache:
    """A thread-safe FileCache with a pool of connections to each server.

    servers: one or more of "host", "host:port", "[ipv6]:port" and "unix:/path", with commas
        between. All processes must spell them alike: that decides which server has which file.
    timeout: seconds to wait for a connection, and for each send and receive.
    options: the keyword arguments of FileCache.
    """
    clients = {
        server: _FastPool(
            server, connect_timeout=timeout, timeout=timeout, no_delay=True,
            pool_idle_timeout=60,  # seconds; firewalls forget connections that idle longer
        )
        for server in map(str.strip, servers.split(","))
        if server
    }
    if not clients:
        raise ValueError("no memcached server is given")
    return FileCache(clients, **options)


class _FastClient(Client):
    """pymemcache's client for one connection, with its two costly steps replaced: values go out as
    they lie in memory, in parts (it joins and copies them three times), and come in with one copy,
    out of the socket (it reads 4 KiB at a time, and joins). It halves the time for a file."""

    sock: Any

    def _each(self, key: Any, value: bytearray) -> Any:
        return value

    def _store_cmd(
        self, name: bytes, values: dict[Any, Any], expire: int, noreply: bool,
        flags: int | None = None, cas: bytes | None = None,
    ) -> dict[Any, bool | None]:
        buffers: list[Any] = []
        for key, value in values.items():
            parts = value if isinstance(value, tuple) else (value,)
            fields = (name, self.check_key(key, self.key_prefix), expire, sum(map(len, parts)))
            line = b"%b %b 0 %d %d" % fields + (b"" if cas is None else b" " + cas)
            buffers += (line + b"\r\n", *parts, b"\r\n")
        return dict(zip(values, self._ask(name, buffers, len(values), b"STORED")))

    def _ask(self, name: bytes, buffers: list[Any], replies: int, yes: bytes) -> list[bool]:
        """Send commands; read all their replies, errors too: the server goes on to execute what
        was sent, whatever becomes of the connection. A line that is no reply is never a "no"."""
        if self.sock is None:
            self._connect()
        try:
            _send(self.sock, buffers)
            received = b""
            while received.count(b"\r\n") < replies:
                piece = self.sock.recv(4096)
                if not piece:
                    raise MemcacheUnexpectedCloseError
                received += piece
            *lines, rest = received.split(b"\r\n")
            for line in lines:
                self._raise_errors(line, name)
            if rest or len(lines) > replies or not {yes, *_NO} >= {*lines}:
                raise MemcacheUnknownError(received[:64])
        except BaseException as error:
            if not isinstance(error, Exception):
                _await_end(self)
            self.close()
            raise
        return [line == yes for line in lines]

    def _extract_value(
        self, expect_cas: bool, line: bytes, buf: bytes, remapped_keys: dict[bytes, Any],
        prefixed_keys: list[bytes],
    ) -> tuple[Any, Any, bytes]:
        _, key, _, size, *cas = line.split()
        length = int(size) + 2  # with the line's end
        value = bytearray(length)
        filled = min(len(buf), length)
        value[:filled], buf = buf[:filled], buf[filled:]
        with memoryview(value) as view:
            while filled < length:
                received = self.sock.recv_into(view[filled:])
                if not received:
                    raise MemcacheUnexpectedCloseError
                filled += received
        del value[-2:]
        key = remapped_keys[key]
        return key, (value, cas[0]) if expect_cas else self._each(key, value), buf

    def get_each(self, keys: list[str], each: Callable[[str, bytearray], Any]) -> dict[Any, Any]:
        """`get_many`, of what `each` makes of a key and its value while the next arrives."""
        self.__dict__["_each"] = each
        try:
            return self.get_many(keys)
        finally:
            del self._each

    def touch_many(self, keys: list[str], expire: int) -> list[bool]:
        """`touch` for many keys in one round trip."""
        lines = [b"touch %b %d\r\n" % (self.check_key(k, self.key_prefix), expire) for k in keys]
        return self._ask(b"touch", lines, len(keys), b"TOUCHED")

    def delete_many(self, keys: Iterable[Any], noreply: bool | None = None) -> bool:
        lines = [b"delete %b\r\n" % self.check_key(key, self.key_prefix) for key in keys]
        self._ask(b"delete", lines, len(lines), b"DELETED")
        return True


class _Pool(ObjectPool[Any]):
    """Discards a connection after Ctrl-C or a gevent time-out too, as it may be in mid-reply."""

    @contextlib.contextmanager
    def get_and_release(self, destroy_on_fail: bool = True) -> Iterator[Any]:
        client = super().get()  # type: ignore[no-untyped-call]
        try:
            yield client
        except BaseException:
            self.destroy(client)
            raise
        self.release(client)


class _FastPool(PooledClient):
    """A pool of fast clients, which makes them safe for threads and for processes that fork."""

    client_class = _FastClient
    client_pool: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(_forked, weakref.ref(self)))

    def _renew(self) -> None:
        """Begin with no connections: a child must not talk on those of its parent. Not by `clear`,
        since the pool's lock may have been held by a thread that the child doesn't have."""
        for client in (*self.client_pool.free, *self.client_pool.used):
            client.close()
        idle = self.client_pool.idle_timeout
        self.client_pool = _Pool(self._create_client, _FastClient.close, idle_timeout=idle)

    def get_each(self, *args: Any) -> Any:
        with self.client_pool.get_and_release() as client:
            return client.get_each(*args)

    def touch_many(self, *args: Any) -> Any:
        with self.client_pool.get_and_release() as client:
            return client.touch_many(*args)


def _forked(reference: weakref.ref[_FastPool]) -> None:
    pool = reference()
    if pool is not None:
        pool._renew()


def _await_end(client: Any) -> None:
    """After Ctrl-C or a gevent time-out in mid-command: end our side of the connection, and return
    when the server has ended its own, and thus has done, or dropped, all that it was sent. Else it
    might do a command after those by which its sender cleans up."""
    with contextlib.suppress(OSError, AttributeError):  # there may be no socket
        client.sock.shutdown(socket.SHUT_WR)
        while client.sock.recv(65536):
            pass


def _send(sock: socket.socket, buffers: list[Any]) -> None:
    """Send all of `buffers`, without joining them."""
    while buffers:
        sent = sock.sendmsg(buffers[:64])  # the system takes 1024 at once, by POSIX at least 16
        while buffers and sent >= len(buffers[0]):
            sent -= len(buffers.pop(0))
        if sent:
            buffers[0] = memoryview(buffers[0])[sent:]


class _Upload:
    """The chunks of one write: sent, then sealed, or abandoned."""

    def __init__(
        self, store: _Store, old: _Current, capacity: int, memory: float, lease: int, hold: bool
    ) -> None:
        self._store, self._old, self._capacity = store, old, capacity
        self._memory, self._lease, self._hold = memory, lease, hold
        self._layout = _Layout.plan(None, capacity)
        self._sealed = False
        # `chunks` counts those that may be stored, from before they are sent.
        self._info = FileInfo(store.name, 0, 0, secrets.token_hex(8), 0, None, b"")

    def send(self, reader: _Reader, size: int | None, max_size: int) -> None:
        """Store all that `reader` has. Raises SizeMismatch, FileTooLarge, CacheFull."""
        name, received = self._store.name, 0
        self._layout = _Layout.plan(size, self._capacity)
        max_size = min(max_size, self._capacity * _MAX_CHUNKS)
        while True:
            step = self._layout.chunk_size * self._layout.per_batch(_WRITE_BATCH)
            batch = reader.take(step if size is None else min(step, max(size - received, 1)))
            if size is None and not received and len(batch) < step:
                size = len(batch)  # the end came with the first batch: known after all
                self._layout = _Layout.plan(size, self._capacity)
            received += len(batch)
            if received > max_size:
                raise FileTooLarge(name=name, size=received, limit=max_size)
            if size is not None and (received > size or (received < size and not batch)):
                raise SizeMismatch(name=name, size=size, received=received)
            if not batch:
                return
            self._put(batch)

    def _put(self, batch: memoryview) -> None:
        layout, version, index = self._layout, self._info.version, self._info.chunks
        values = {}
        for start in range(0, len(batch), layout.chunk_size):
            payload = batch[start : start + layout.chunk_size]
            body = (payload, bytes(max(layout.floor - len(payload), 0)))
            key = self._store.chunk_key(version, index)
            values[key] = (layout.header(version, index, *body), *body)
            index += 1
        size = self._info.size + len(batch)
        self._info = dataclasses.replace(self._info, size=size, chunks=index)
        self._store.put(values, self._lease, self._hold)
        self._bury()

    def _bury(self) -> None:
        """Delete what is left of the old file where the new one has cost it chunks. No one can
        read it, but memcached's LRU may take it for active, and evict the new one's chunks."""
        old = self._old
        if (
            isinstance(old, _Manifest)
            and old.info.size + self._info.size > self._memory
            and self._store.settle(old)
        ):
            self._store.delete(old)
            self._old = None

    def seal(self, expires: int | None, metadata: bytes) -> _Manifest:
        """Set the chunks' final expiry; return the manifest to publish. Raises CacheFull."""
        self._sealed = True
        info = dataclasses.replace(
            self._info, created=int(time.time()), expires=expires, metadata=metadata
        )
        missing = self._store.touch(info, expires)
        if missing:
            reason = f"{len(missing)} of its {info.chunks} chunks were evicted at once"
            raise CacheFull(name=info.name, missing=missing, reason=reason)
        return _Manifest(info, self._layout)

    def abandon(self) -> None:
        """Delete the chunks, unless they were published all the same: the reply to that can be
        lost, and Ctrl-C can strike behind it. Where nobody tells, put them on a lease again."""
        mine = _Manifest(self._info, self._layout)
        try:
            current = self._store.lookup()[0] if self._sealed else None
        except BaseException as error:
            with contextlib.suppress(CacheUnavailable):
                self._store.touch(self._info, _end(self._lease))
            if not isinstance(error, CacheUnavailable):
                raise
        else:
            self._store.replaced(mine, current)


class _Store:
    """memcached as an operation on one file sees it: the only code that calls a client, and so the
    seam at which the errors of pymemcache and of sockets become this module's."""

    def __init__(self, client: Any, server: str, namespace: str, name: str, digest: str) -> None:
        self.server, self.name = server, name
        self._client, self._namespace = client, namespace
        self._fast = isinstance(client, _FastPool)
        self._key = f"{namespace}:{digest}"

    def chunk_key(self, version: str, index: int) -> str:
        return f"{self._namespace}:{version}:{index}"

    def lookup(self) -> tuple[_Current, Any, Any]:
        """What is at the manifest's key: its meaning, its value (None: nothing), its cas token."""
        value, token = self._retry("gets", self._key)
        if value is None:
            return None, None, None
        try:
            return _Manifest.unpack(self.name, value), value, token
        except FileCorrupt as error:
            return error, value, token

    def swap(
        self, step: Callable[[_Current], _New], found: tuple[_Current, Any, Any] | None = None
    ) -> _New:
        """Replace what is at the manifest's key by what `step` makes of it, None to delete it;
        delete the chunks that nothing leads to any more; return the new manifest.

        Atomic: where another writer was faster, `step` is asked again, with what that one left,
        and raises to give up. `found` is what `lookup` said, if it was asked.
        """
        late: tuple[Any, _Current, Any, BaseException] | None = None  # a try without a reply
        for _ in range(_ATTEMPTS):
            current, there, token = found or self.lookup()
            if late:
                tried, old, old_token, error = late
                done, again = there == tried, isinstance(error, CacheUnavailable)
                # Only the old token proves that it was not done yet, and may be tried once more.
                # Otherwise it may have been done, and undone by a writer who deleted our chunks.
                if done or not again or old_token is None or token != old_token:
                    self.replaced(old, current)
                    if done and again:
                        return cast(_New, current)
                    raise error
            manifest = step(current)
            # The text protocol has no conditional delete; storing what has expired is one.
            value = b"" if manifest is None else manifest.pack()
            exptime = _OVER if manifest is None else _exptime(manifest.info.expires)
            found = None
            try:
                if self._replace(value, token, exptime):
                    return self.replaced(current, manifest)
            except BaseException as lost:  # the reply, to the network or to Ctrl-C
                with contextlib.suppress(CacheUnavailable):
                    found = self.lookup()
                if late or found is None:
                    raise
                late = value or None, current, token, lost
        raise CacheFull(name=self.name, missing=[], reason="it refuses the manifest")

    def replaced(self, old: _Current, new: _T) -> _T:
        """Delete the chunks of what was at the manifest's key, unless `new` is of that version."""
        if _version(old) != _version(new):
            self.delete(old)
        return new

    def _replace(self, value: bytes, token: Any, exptime: int) -> bool:
        if token is None:
            return bool(self._call("add", self._key, value, expire=exptime, noreply=False))
        return bool(self._call("cas", self._key, value, token, expire=exptime, noreply=False))

    def put(self, values: dict[str, tuple[Any, ...]], lease: int, hold: bool) -> None:
        """Store chunks, each value given in parts, for `lease` seconds. Raises CacheFull."""
        left, deadline = values, time.monotonic() + _PATIENCE
        while True:
            refusal = self._send(left, lease)
            if not (refusal or hold):
                return
            # What was asked for twice is active in the eyes of memcached's LRU, like the chunks of
            # files that were read; otherwise a full cache evicts the new chunks to keep those.
            # Done always, it would cost a large cache an eighth of the files that it keeps.
            self._touch(list(left), lease)
            found = self._touch(list(left), lease)
            left = {key: value for (key, value), there in zip(left.items(), found) if not there}
            if not left:
                return
            if time.monotonic() > deadline:
                reason = "it evicts what it has just stored"
                raise refusal or CacheFull(name=self.name, missing=[], reason=reason)
            time.sleep(_PAUSE)

    def _send(self, values: dict[str, tuple[Any, ...]], lease: int) -> CacheFull | None:
        """Store what the server takes; return its refusal of the rest."""
        refusal = None
        # A client of the user's gets them one by one: its `set_many` stops at the first refusal,
        # and the server goes on to store what was sent behind it, perhaps after the command by
        # which this upload cleans up.
        joined = ({key: b"".join(parts)} for key, parts in values.items())
        batches: Iterable[dict[str, Any]] = [values] if self._fast else joined
        for batch in batches:
            try:
                if self._retry("set_many", batch, expire=lease, noreply=False):
                    refusal = CacheFull(name=self.name, missing=[], reason="it refuses chunks")
            except CacheFull as error:
                refusal = error
        return refusal

    def fetch(self, manifest: _Manifest, indices: range) -> list[memoryview]:
        """Verified payloads. Raises FileEvicted, FileChanged, FileCorrupt."""
        version = manifest.info.version
        keys = {self.chunk_key(version, index): index for index in indices}

        def verify(key: str, value: object) -> memoryview:
            return manifest.verify(keys[key], value)

        if self._fast:
            payloads = self._retry("get_each", list(keys), verify)
        else:
            values = self._retry("get_many", list(keys))
            payloads = {key: verify(key, value) for key, value in values.items()}
        missing = [index for key, index in keys.items() if key not in payloads]
        if missing:
            self.explain(manifest.info, missing)
        return [payloads[key] for key in keys]

    def explain(self, info: FileInfo, missing: list[int]) -> NoReturn:
        """Raise what it means that chunks are missing: FileChanged or FileEvicted."""
        version = _version(self.lookup()[0])
        if version != info.version:
            raise FileChanged(name=self.name, version=info.version, current=version)
        raise FileEvicted(name=self.name, info=info, missing=missing)

    def touch(self, info: FileInfo, expires: int | None) -> list[int]:
        """Set the expiry of all chunks; return the indices of those that are gone."""
        keys = [self.chunk_key(info.version, index) for index in range(info.chunks)]
        exptime, touched = _exptime(expires, _SLACK), []
        for start in range(0, len(keys), _PIPELINE):
            touched += self._touch(keys[start : start + _PIPELINE], exptime)
        return [index for index, found in enumerate(touched) if not found]

    def _touch(self, keys: list[str], exptime: int) -> list[bool]:
        if self._fast:
            return list(self._retry("touch_many", keys, exptime))
        return [self._retry("touch", key, expire=exptime, noreply=False) for key in keys]

    def settle(self, manifest: _Manifest) -> list[int]:
        """Touch the chunks as the manifest has it; return the indices of those that are gone.

        Once more where another `touch` got in between: whoever comes last to the chunks must have
        seen the manifest as it stays.
        """
        current: _Current = manifest
        seen, missing = None, []
        while isinstance(current, _Manifest) and current != seen:
            missing = self.touch(current.info, current.info.expires)
            current, seen = self.lookup()[0], current
        return missing

    def delete(self, current: _Current) -> None:
        """Delete the chunks of a manifest that is gone. Failure is no error, as nothing depends on
        it; but nobody else will ever do it, so it is tried again, after Ctrl-C too."""
        if not isinstance(current, _Manifest):
            return
        info = current.info
        keys = [self.chunk_key(info.version, index) for index in range(info.chunks)]
        for start in range(0, len(keys), _PIPELINE):
            batch = keys[start : start + _PIPELINE]
            try:
                self._retry("delete_many", batch, noreply=False)
            except BaseException as error:
                with contextlib.suppress(CacheUnavailable):
                    self._retry("delete_many", batch, noreply=False)
                if not isinstance(error, CacheUnavailable):
                    raise

    def limits(self) -> tuple[int, float]:
        """Bytes of the largest item that the server keeps in one piece, and of its memory, as its
        `stats settings` say; stock values and no limit where a client or proxy hides them."""
        try:
            settings = self._client.stats("settings")
            sizes = (settings[b"item_size_max"], settings[b"slab_chunk_max"], _LARGEST_ITEM)
            return min(sizes), settings[b"maxbytes"]
        except (*_CLIENT_ERRORS, AttributeError, TypeError):
            return _LARGEST_ITEM, math.inf

    def _retry(self, command: str, *args: Any, **options: Any) -> Any:
        """Call what may be done twice; again where the connection turns out to be broken. After a
        restart of the server, all that idle in a pool are."""
        pool = getattr(self._client, "client_pool", None)
        for _ in range(1 + len(pool.free if pool else ())):
            try:
                return self._call(command, *args, **options)
            except CacheUnavailable as error:
                if not isinstance(error.__cause__, _DROPPED):
                    raise
        return self._call(command, *args, **options)

    def _call(self, command: str, *args: Any, **options: Any) -> Any:
        try:
            return getattr(self._client, command)(*args, **options)
        except _CLIENT_ERRORS as error:
            reason = error.args[0] if error.args else b""
            if isinstance(error, MemcacheServerError) and _REFUSED.search(str(reason)):
                raise CacheFull(name=self.name, missing=[], reason=reason) from error
            raise CacheUnavailable(
                name=self.name, server=self.server, reason=repr(error)
            ) from error
        except BaseException:
            # Ctrl-C or a gevent time-out, perhaps in mid-reply. pymemcache closes a connection
            # after an Exception only; the next command would take the rest of the reply for its
            # own.
            if not hasattr(self._client, "client_pool"):  # a pool does not use it again
                if not command.startswith("get"):
                    _await_end(self._client)
                self._client.close()
            raise


class _Reader:
    """A source, taken in pieces of the wanted size. `size`: bytes that it has, None if unknown."""

    def __init__(self, source: Any) -> None:
        if isinstance(source, (str, io.TextIOBase)):
            raise TypeError("files are bytes: encode the text, or open the file in binary mode")
        self._buffer = bytearray()
        try:
            view = memoryview(source)
        except TypeError:
            self.size = _remaining(source)
            self._readinto = getattr(source, "readinto", None) or _Pieces(source).readinto
        else:
            self._readinto = None
            self._view = view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
            self.size = len(self._view)

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, fewer only at the end; valid until the next call."""
        if self._readinto is None:
            piece, self._view = self._view[:count], self._view[count:]
            return piece
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        view, filled = memoryview(self._buffer)[:count], 0
        while filled < count:
            received = self._readinto(view[filled:])
            if received is None:
                raise BlockingIOError("the source does not block, and has nothing to read yet")
            if received == 0:
                break
            filled += received
        return view[:filled]


class _Pieces(io.RawIOBase):
    """An iterable of bytes, or a file object that has only `read`, as a stream."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        read = getattr(source, "read", None)
        self._pieces = iter(functools.partial(read, 65536), b"") if read else iter(source)
        self._piece = memoryview(b"")
        if self._pieces is not source:
            self._advance()  # so that text is refused first of all; what a generator does can wait

    def _advance(self) -> None:
        for piece in self._pieces:
            self._piece = memoryview(piece).cast("B")
            if self._piece:
                break

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            self._advance()
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count


def _remaining(source: Any) -> int | None:
    """Bytes from where a file stands to its end; None where only reading will tell."""
    try:
        here = source.tell()
        source.seek(0, io.SEEK_END)
        end = source.tell()
        source.seek(here)
    except (AttributeError, OSError, ValueError):  # an iterable, a pipe, a socket
        return None
    return max(end - here, 0) or None  # files in /proc say 0, and have content


def _persist(operation: Callable[[], _T]) -> _T:
    """The operation's result; where a writer replaced the file meanwhile, on the new version."""
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(FileChanged):
            return operation()
    return operation()


def _version(current: object) -> str | None:
    return current.info.version if isinstance(current, _Manifest) else None


def _require(name: str, current: _Current, version: str | None = None) -> _Manifest:
    if current is None:
        raise FileNotFound(name=name)
    if isinstance(current, FileCorrupt):
        raise current
    if version not in (None, current.info.version):
        raise FileChanged(name=name, version=version, current=current.info.version)
    return current


def _score(text: str, seed: int) -> int:
    """For RendezvousHash; its own, in Python, takes a fifth of the time of a small `get`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _seconds(expire: int) -> int:
    if operator.index(expire) < 0:
        raise ValueError("expire is a number of seconds from now, 0 for never")
    return expire


def _end(expire: int) -> int | None:
    return int(time.time()) + expire if expire else None


def _exptime(expires: int | None, slack: int = 0) -> int:
    """What to tell memcached so that an item ends `slack` seconds after `expires`, Unix time."""
    if expires is None or expires + slack > _ABSOLUTE_LIMIT:
        return 0
    seconds = expires + slack - int(time.time())
    return max(seconds, 1) if seconds <= _RELATIVE_LIMIT else expires + slack
