"""Keep files of 0 to 50 MiB in memcached, whose items end at 1 MB; get them back byte for byte.

    cache = memchunk.connect("127.0.0.1:11211")
    cache.add("report.pdf", pathlib.Path("report.pdf"), expire=86400)
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
* Until that touch a chunk lives on a lease: what a writer leaves that dies before ends with it.
* Every chunk has a CRC over payload, index, total and version; the manifest, over all of itself.
* No clock but the server's counts: the clocks of those who read and write need not agree.

memcached is a cache: it evicts. What was evicted is `FileNotFound` or `FileEvicted`, never wrong.
Copy this one file; it needs Python 3.9 and pymemcache 4, and nothing else.

Read it in this order: `FileCache` (what can be asked), `FileWriter` (a write, in five steps),
`CachedFile` (a read), `_Slot` (the steps that both share), and the two ways to talk to memcached:
`_Server`, its verbs through any client, and `_Pool`, the same by faster connections.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import operator
import os
import re
import secrets
import socket
import ssl
import stat
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, Callable, NamedTuple, NoReturn, Protocol, Union

from pymemcache.client.base import Client
from pymemcache.client.hash import HashClient
from pymemcache.client.retrying import RetryingClient
from pymemcache.exceptions import (
    MemcacheServerError,
    MemcacheUnexpectedCloseError,
    MemcacheUnknownError,
)

__all__ = [
    "CacheFull",
    "CacheMiss",
    "CacheUnavailable",
    "CachedFile",
    "FileCache",
    "FileChanged",
    "FileCorrupt",
    "FileEvicted",
    "FileExists",
    "FileInfo",
    "FileNotFound",
    "FileTooLarge",
    "FileWriter",
    "InvalidName",
    "MAX_SIZE",
    "MemcacheClient",
    "MemchunkError",
    "SizeMismatch",
    "Source",
    "UploadConflict",
    "connect",
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
_PAGE = 1024 * 1024  # bytes: the unit in which memcached gives memory to a slab class
_MAX_KEY = 250  # bytes, memcached's own limit

# memcached evicts per slab class, and the class with the fewest pages first, so that one chunk of
# another size ends a file long before its time. Therefore files of several chunks have equal ones,
# all in the largest class: what fills less than this part of a chunk is padded. The next smaller
# class ends below 0.896 of the largest, whatever growth factor (-f) the server has.
_LEAST_FILL = 0.9

# Payload bytes that travel together, which bounds what a transfer holds in memory. Writes: batches
# of 8 to 16 chunks survive best in a cache that hardly holds the file. Reads: so much stays in the
# caches of a CPU.
_WRITE_BATCH = 4 * 1024 * 1024
_READ_BATCH = 2 * 1024 * 1024
_PIPELINE = 256  # commands sent before a reply is read: the replies fit in any socket buffer
_PIECE = 64 * 1024  # bytes asked for at a time of a file of unknown size
_LINE = 8192  # bytes, the most that `peek` returns
# A manifest that says more than this is damage, and is not worked off blindly.
_MAX_CHUNK = 2**30  # bytes: memcached's -I ends there
_MAX_CHUNKS = 2**20  # more than any file needs

# Where chunks that were read, or touched, twice fill the cache, memcached refuses others until its
# LRU thread has made room. That thread sleeps for up to a second.
_PATIENCE = 2.0  # seconds to wait for it
_PAUSE = 0.02  # seconds between two tries

_ATTEMPTS = 100  # at a manifest that others keep changing; each failure means that one got through
_IDLE = 60  # seconds; firewalls forget connections that idle longer

_RELATIVE_LIMIT = 30 * 24 * 3600  # memcached reads more seconds than this as an absolute time
_LONG_PAST = _RELATIVE_LIMIT + 1  # as an absolute time; -1 is, too, but twemproxy refuses it
_ABSOLUTE_LIMIT = 2**31 - 1  # memcached keeps times in 32 bits: what ends later never ends
_MAX_EXPIRE = 2**62  # seconds: with the time of day added, it fits the manifest's 64 bits
_NO_TOKEN = b"%d" % (2**64 - 1)  # no item has it: a `cas` with it tells whether an item is there

_CHUNK = struct.Struct(">III")  # index, total, CRC
# magic, format, chunk_size, floor, total, size, created, expires (0: never), version, length of
# the name; name, metadata and the CRC follow.
_MANIFEST = struct.Struct(">3sBIIIQQQ8sH")
_CRC = struct.Struct(">I")
_MAGIC, _FORMAT = b"mch", 1

_STORED, _NOT_STORED, _EXISTS, _NOT_FOUND = b"STORED", b"NOT_STORED", b"EXISTS", b"NOT_FOUND"
_NO = (_NOT_STORED, _EXISTS, _NOT_FOUND)  # replies that are no errors
_REFUSAL = re.compile(rb"out of memory (storing|during read)|object too large")

_DROPPED = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, MemcacheUnexpectedCloseError)

_ADDRESS = re.compile(
    r"(?P<tls>tls://)?(\[(?P<ipv6>[\w:.%]+)\]|(?P<host>[^\s\[\]:/]+))(:(?P<port>\d{1,5}))?"
)

Source = Union[bytes, bytearray, memoryview, IO[bytes], Iterable[bytes], "os.PathLike[str]"]
"""What can be stored: a bytes-like object, a binary file, an iterable of these, or a path."""

_Parts = tuple[Any, ...]  # an item's value, in parts that need not be joined


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


class CacheMiss(MemchunkError, LookupError):
    """The file is not, or not wholly, in the cache: get it from where it came, and store it."""


class FileNotFound(CacheMiss, KeyError, FileNotFoundError):
    """No file of that name is stored. It may have been, and expired or been evicted whole."""

    text = "no file named {name!r} is stored"


class FileEvicted(CacheMiss):
    """memcached dropped chunks of the file: of those looked for, the ones at `missing`."""

    info: FileInfo
    missing: list[int]
    text = "{name!r} was evicted in part: chunks {missing} of {info.chunks} are gone"


class FileExists(MemchunkError, FileExistsError):
    """`add` found a file of that name, whole: `info`."""

    info: FileInfo
    text = "a file named {name!r} is already stored"


class FileChanged(MemchunkError):
    """The file is no longer the `version` asked for or opened; `current` is (None: it is gone)."""

    version: str
    current: str | None
    text = "{name!r} is not version {version} any more, but {current}"


class UploadConflict(MemchunkError):
    """Two resumed one upload with different bytes: at chunk `index` stand those of the other."""

    version: str
    index: int
    text = "another writer stored other bytes for chunk {index} of {name!r}, version {version}"


class FileTooLarge(MemchunkError, ValueError):
    """More than `limit` bytes. `size` is the file's where known, else what had been read."""

    size: int
    limit: int
    text = "{name!r} has {size} bytes or more, and the limit is {limit}"


class SizeMismatch(MemchunkError, ValueError):
    """The source has not the `size` in bytes that was announced; `received` had been seen."""

    size: int
    received: int
    text = "{name!r} was announced with {size} bytes, and its source gave {received}"


class FileCorrupt(MemchunkError):
    """What memcached returned is not what was stored: chunk `index`, or the manifest (None)."""

    index: int | None
    text = "{name!r} is damaged (chunk {index}; None is the manifest)"


class CacheFull(MemchunkError):
    """The server would not keep the file: refused an item (then `missing` is empty), or evicted
    the chunks at `missing`.

    `cause` says why, by the server's own `stats` at that moment; the message has the numbers.

    "memory": -m is smaller than the file. "slabs": other items hold the memory in pages for their
    own size; `-o slab_automove=2`, or a memcached of its own, helps. "item size": -I or
    slab_chunk_max is smaller than a chunk. "lease": the upload took longer than the lease.
    "contention": other writers changed the manifest 100 times. "pressure": none of these;
    memcached evicts new chunks to keep those that are read, and more -m helps. "unknown": the
    server, or a proxy before it, gave no `stats`.
    """

    missing: list[int]
    cause: str
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
    seconds, by the writer's clock. expires: likewise, None for never.
    """

    name: str
    size: int
    chunks: int
    version: str
    created: int
    expires: int | None
    metadata: bytes
    # How the file is cut: chunks of `_chunk_size` bytes, the last one shorter; those shorter than
    # `_floor` padded to it with zeros. `_total`, in every chunk's header, is their number, or 0
    # where the first was sent before the source's end was known. Of an upload that is not
    # finished it tells how many there may be.
    _chunk_size: int = dataclasses.field(repr=False, compare=False)
    _floor: int = dataclasses.field(repr=False, compare=False)
    _total: int = dataclasses.field(repr=False, compare=False)

    def _per_batch(self, size: int) -> int:
        """How many chunks travel together in `size` bytes."""
        return max(1, min(_PIPELINE, size // self._chunk_size))

    def _chunk(self, index: int, payload: memoryview) -> _Parts:
        """A chunk's value: header, payload, padding."""
        padding = bytes(max(self._floor - len(payload), 0))
        return self._header(index, payload, padding), payload, padding

    def _header(self, index: int, *body: Any) -> bytes:
        """A chunk's header. The CRC covers index, total and version, too, so that a sound chunk
        under a wrong key fails like a damaged one."""
        crc = zlib.crc32(_CHUNK.pack(index, self._total, 0) + self.version.encode())
        for part in body:
            crc = zlib.crc32(part, crc)
        return _CHUNK.pack(index, self._total, crc)

    def _verify(self, index: int, value: object) -> memoryview:
        """The payload of a chunk's value. Raises FileCorrupt unless that is what was stored."""
        if isinstance(value, (bytes, bytearray)):
            size = min(self._chunk_size, self.size - index * self._chunk_size)
            header, body = memoryview(value)[: _CHUNK.size], memoryview(value)[_CHUNK.size :]
            if len(body) == max(size, self._floor) and header == self._header(index, body):
                return body[:size].toreadonly()
        raise FileCorrupt(name=self.name, index=index)

    def _pack(self) -> bytes:
        """The manifest's value."""
        name = self.name.encode()
        times, version = (self.created, self.expires or 0), bytes.fromhex(self.version)
        layout = self._chunk_size, self._floor, self._total
        head = _MANIFEST.pack(_MAGIC, _FORMAT, *layout, self.size, *times, version, len(name))
        body = head + name + self.metadata
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def _unpack(cls, name: str, value: object) -> FileInfo:
        """Raises FileCorrupt unless `value` is, byte for byte, a manifest of the file `name`."""
        body = bytes(value[: -_CRC.size]) if isinstance(value, (bytes, bytearray)) else b""
        head, tail = body[: _MANIFEST.size], body[_MANIFEST.size :]
        damage = FileCorrupt(name=name, index=None)
        if value != body + _CRC.pack(zlib.crc32(body)) or not head.startswith(_MAGIC):
            raise damage
        format_ = int.from_bytes(head[len(_MAGIC) : len(_MAGIC) + 1], "big")
        if format_ != _FORMAT:
            raise _UnknownFormat(name=name, index=None, format=format_)
        if len(head) < _MANIFEST.size:
            raise damage
        _, _, *layout, size, created, expires, version, length = _MANIFEST.unpack(head)
        chunk_size, metadata = layout[0], tail[length:]
        sound = 0 < chunk_size <= _MAX_CHUNK and size <= chunk_size * _MAX_CHUNKS
        if not sound or tail[:length] != name.encode():
            raise damage
        chunks, end = -(-size // chunk_size), expires or None
        return cls(name, size, chunks, version.hex(), created, end, metadata, *layout)


class MemcacheClient(Protocol):
    """What `FileCache` calls of a client: pymemcache's `Client` has it, and all that wrap one."""

    def gets(self, key: str) -> Any: ...
    def get_many(self, keys: list[str]) -> Any: ...
    def set_many(self, values: Any, expire: int, noreply: bool) -> Any: ...
    def add(self, key: str, value: bytes, expire: int, noreply: bool) -> Any: ...
    def cas(self, key: str, value: bytes, cas: bytes, expire: int, noreply: bool) -> Any: ...
    def touch(self, key: str, expire: int, noreply: bool) -> Any: ...
    def delete_many(self, keys: list[str], noreply: bool) -> Any: ...
    def stats(self, *args: str) -> Any: ...
    def close(self) -> Any: ...


class FileCache:
    """Files in memcached, through any pymemcache client.

    client: a pymemcache `Client`, `PooledClient` or `RetryingClient`, or several: a `HashClient`,
        or a mapping of server names to clients. Then each file lives whole on one server, chosen
        by rendezvous hashing of its name. As safe for threads, and for processes that fork, as
        the clients are; those of `connect` are.
    namespace: prefix of every key, 1 to 100 printable ASCII characters without spaces.
    max_size: bytes, the largest file. 50 MiB by default.
    chunk_size: bytes of payload per chunk, by default the most that the server keeps well, as told
        by its `stats settings`. Give it where a proxy hides servers with a small `-I`.
    lease: seconds, 1 to 2,592,000 (30 days), that the chunks of an unfinished upload live after
        they were sent; an hour by default. No upload may take longer.

    Raises ValueError for options, and clients, that can't work. Every method that takes a name may
    raise InvalidName, CacheUnavailable, and CacheFull where a server is out of memory for the
    command. As a context manager it closes itself.
    """

    def __init__(
        self,
        client: MemcacheClient | HashClient | Mapping[str, MemcacheClient],
        *,
        namespace: str = "memchunk",
        max_size: int = MAX_SIZE,
        chunk_size: int | None = None,
        lease: int = LEASE,
    ) -> None:
        if not re.fullmatch(r"[!-~]{1,100}", namespace):
            raise ValueError("namespace: 1 to 100 printable ASCII characters without spaces")
        if chunk_size is not None and not 1 <= operator.index(chunk_size) <= _MAX_CHUNK:
            raise ValueError(f"chunk_size is 1 to {_MAX_CHUNK} bytes")
        if not 1 <= operator.index(lease) <= _RELATIVE_LIMIT:
            raise ValueError(f"lease is 1 to {_RELATIVE_LIMIT} seconds")
        if operator.index(max_size) < 0:
            raise ValueError("max_size is a number of bytes")
        self._servers = _servers(client)
        for server in self._servers.values():
            if len(server.key_prefix) + len(namespace) + len(":") + 64 > _MAX_KEY:
                raise ValueError("key_prefix and namespace make keys longer than memcached's 250")
        self._chunk_size = chunk_size
        # int: memcached would not read True, and take the bytes that follow for commands.
        self.namespace, self.max_size, self.lease = namespace, max_size, int(lease)

    def __repr__(self) -> str:
        return f"<FileCache {self.namespace!r} on {', '.join(self._servers)}>"

    def __enter__(self) -> FileCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(
        self,
        name: str,
        source: Source,
        size: int | None = None,
        expire: int | datetime.timedelta = 0,
        metadata: bytes = b"",
    ) -> FileInfo:
        """Store a new file; return its FileInfo.

        source: a bytes-like object, a binary file (read from where it stands), an iterable of
            bytes, or the path of a file. What it raises passes through, and nothing is stored.
        size: bytes that the source will yield, where known. Binding.
        expire: seconds from now, or a timedelta; 0 for never.
        metadata: up to 65,535 bytes to keep with the file.

        Raises FileExists, before payload is sent, where a file of that name is there and whole
        (one that lost chunks is replaced); FileTooLarge; SizeMismatch; CacheFull; FileCorrupt for
        a manifest of a later format; TypeError for text.
        """
        return self._write(_Order("add", name, size, _seconds(expire), metadata), source)

    def set(
        self,
        name: str,
        source: Source,
        size: int | None = None,
        expire: int | datetime.timedelta = 0,
        metadata: bytes = b"",
    ) -> FileInfo:
        """Store a file, replacing what is there: until it returns, and where it raises, readers
        get the old file. Only where the server's memory can't hold both, the old one goes first.
        Arguments and errors are those of `add`, but FileExists."""
        return self._write(_Order("set", name, size, _seconds(expire), metadata), source)

    def cas(
        self,
        name: str,
        source: Source,
        version: str,
        size: int | None = None,
        expire: int | datetime.timedelta = 0,
        metadata: bytes = b"",
    ) -> FileInfo:
        """Check and set: replace the file only while it is `version`. Arguments and errors are
        those of `set`, and FileChanged where another is there, FileNotFound where none is,
        FileCorrupt where none can be told."""
        if not isinstance(version, str):
            raise TypeError("version is a text, from a FileInfo")
        order = _Order("cas", name, size, _seconds(expire), metadata, version)
        return self._write(order, source)

    def create(
        self,
        name: str,
        size: int | None = None,
        expire: int | datetime.timedelta = 0,
        metadata: bytes = b"",
        *,
        replace: bool = False,
        version: str | None = None,
    ) -> FileWriter:
        """A binary stream to write a file into; its `close` publishes the file.

        Arguments and errors are those of `add`; with `replace` those of `set`; with a `version`
        those of `cas`. Errors come here, in `write` or in `close`, as soon as they are known.
        """
        verb = "cas" if version is not None else "set" if replace else "add"
        return self._create(_Order(verb, name, size, _seconds(expire), metadata, version))

    def resume(self, state: bytes) -> FileWriter:
        """The writer of an upload that `FileWriter.suspend` ended for now, here or in another
        process, on the same servers and namespace. Its chunks get a new lease.

        A state may be resumed more than once, and by several at a time: the same bytes again are
        fine, and keep the lease that they have; others are an UploadConflict. That is found where
        they meet: never go on with other bytes where chunks may have been evicted or deleted.
        Raises FileEvicted where chunks are gone, ValueError where `state` is none. What the verb
        of the write raises comes in `close`.
        """
        order, info, tail = _Order.unpack(state)
        writer = _ResumedWriter(self, order, draft=info, tail=tail)
        writer._renew()
        return writer

    def abandon(self, state: bytes) -> None:
        """Delete the chunks of a suspended upload, unless it is published; also those of others
        who resumed it, where its size is known. Not to be called while one of them may be
        publishing it: the file would lose its chunks. Raises ValueError where `state` is none."""
        order, info, _ = _Order.unpack(state)
        slot = self._slot(order.name)
        if slot.lookup().version != info.version:
            slot.delete_chunks(info, range(max(info.chunks, info._total)))

    def get(self, name: str) -> bytes:
        """The whole file, verified. Raises FileNotFound, FileEvicted, FileCorrupt, and
        FileTooLarge for one that a cache with another `max_size` wrote: `open` takes less memory.

        Starts over where a writer replaced the file meanwhile; FileChanged: 100 times in a row.
        """
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(FileChanged):
                return self._get(name)
        return self._get(name)  # and this FileChanged is for the caller

    def _get(self, name: str) -> bytes:
        with self.open(name) as file:
            if file.info.size > self.max_size:
                raise FileTooLarge(name=name, size=file.info.size, limit=self.max_size)
            return file.readall()

    def open(self, name: str) -> CachedFile:
        """The version that is there now, as a binary stream that fetches chunks when they are
        read. Raises FileNotFound, FileCorrupt."""
        slot = self._slot(name)
        return CachedFile(slot, slot.lookup().require())

    def stat(self, name: str) -> FileInfo:
        """What the manifest says; chunks may be gone. Raises FileNotFound, FileCorrupt."""
        return self._slot(name).lookup().require()

    def __contains__(self, name: str) -> bool:
        """Whether a whole file of that name is there. Reads no payload, and changes nothing."""
        slot = self._slot(name)
        info = slot.lookup().info
        return info is not None and not slot.missing_chunks(info)

    def touch(self, name: str, expire: int | datetime.timedelta) -> FileInfo:
        """Give every piece of the file a new time to live, in seconds from now or as timedelta,
        0 for never. Raises FileNotFound, FileEvicted, FileCorrupt, and CacheFull where others keep
        changing the manifest. Where it fails midway, touch the file again: its chunks may have no
        end, or after two touches at once that of the other."""
        slot, seconds = self._slot(name), _seconds(expire)
        manifest_end, chunks_end = slot.exptimes(seconds)
        for _ in range(_ATTEMPTS):
            found = slot.lookup()
            old = found.require()
            info = dataclasses.replace(old, expires=_end(int(time.time()), seconds))
            # First ask what is missing: chunks of a dead file keep their end. Then they get none,
            # so that they outlive the manifest with its old end as well as with the new one: which
            # is the later, only clocks that agree could tell.
            missing = slot.missing_chunks(old)
            if not missing:
                missing = slot.touch_chunks(old, 0)
            if missing:
                with contextlib.suppress(FileChanged):  # then on the version that is there now
                    slot.explain(old, missing)
            elif slot.swap(found, info, manifest_end):
                slot.touch_chunks(info, chunks_end)
                # Another touch may have come in between. Then the chunks have no end, for the same
                # reason, and stay until they are evicted, or touched again.
                current = slot.lookup()
                if current.version == info.version and current.info != info:
                    slot.touch_chunks(info, 0)
                return info
        raise slot.cache_full(0, [], "contention")

    def delete(self, name: str, version: str | None = None) -> None:
        """Delete the file, whole or not; with `version`, only while it is that version.
        Raises FileNotFound where it isn't there; with `version`, FileChanged where another is,
        FileCorrupt where none can be told."""
        slot = self._slot(name)
        for _ in range(_ATTEMPTS):
            found = slot.lookup()
            # Without a version, what is damaged can be deleted, too.
            if found.value is None or version is not None:
                found.require(version)
            # The text protocol can't delete conditionally. To `cas` in what has expired does so;
            # `swap` then deletes the chunks.
            if slot.swap(found, None, _LONG_PAST):
                return
        raise slot.cache_full(0, [], "contention")

    def ping(self) -> None:
        """Return when every server answers, else raise CacheUnavailable."""
        for server in self._servers.values():
            _Slot(server, self.namespace, "ping").lookup()

    def close(self) -> None:
        """Close the clients' connections. The next call opens new ones."""
        for server in self._servers.values():
            server.close()

    def _slot(self, name: str) -> _Slot:
        encoded = name.encode(errors="ignore") if isinstance(name, str) else b""
        if not 1 <= len(encoded) <= MAX_NAME or encoded.decode() != name:
            raise InvalidName(name=name)
        digest = _digest(name)  # rendezvous hashing: the highest score wins
        server = max(self._servers.values(), key=lambda each: _digest(f"{each.name}-{digest}"))
        return _Slot(server, self.namespace, name)

    def _write(self, order: _Order, source: Any) -> FileInfo:
        """`add`, `set` and `cas`."""
        if isinstance(source, os.PathLike):
            with open(source, "rb") as file:
                return self._write(order, file)
        known = _size_of(source)
        if order.size is None:
            order.size = known
        elif known not in (None, order.size):
            raise SizeMismatch(name=order.name, size=order.size, received=known)
        with self._create(order) as writer:
            for piece in _read_source(source, writer.batch_size, known):
                writer.write(piece)
        return writer.info

    def _create(self, order: _Order) -> FileWriter:
        slot = self._slot(order.name)
        if order.size is not None and order.size > self.max_size:
            raise FileTooLarge(name=order.name, size=order.size, limit=self.max_size)
        # 1. Refuse early, before a byte of payload is sent.
        old = slot.lookup()
        order.check(slot, old)
        return FileWriter(self, order, old.info)

    def _limits(self, slot: _Slot) -> tuple[int, float]:
        """Bytes of payload that a chunk may hold on the server, and of the server's memory."""
        settings = slot.server.settings or slot.ask_settings()
        told = (settings.get(key, _LARGEST_ITEM) for key in (b"item_size_max", b"slab_chunk_max"))
        largest = min(_LARGEST_ITEM, *told)
        # The key of the last chunk is the longest, as it ends with the index.
        longest_key = len(slot.server.key_prefix) + len(slot.chunk_key("0" * 16, _MAX_CHUNKS))
        capacity = max(largest - _ITEM_OVERHEAD - longest_key - _CHUNK.size, 1)
        return self._chunk_size or capacity, settings.get(b"maxbytes", math.inf)


@dataclasses.dataclass
class _Order:
    """What a writer was asked for. verb: "add", "set" or "cas", that of `version`."""

    verb: str
    name: str
    size: int | None
    expire: int
    metadata: bytes
    version: str | None = None

    def __post_init__(self) -> None:
        self.metadata = bytes(memoryview(self.metadata))
        if len(self.metadata) > MAX_METADATA:
            raise ValueError(f"metadata is limited to {MAX_METADATA} bytes")
        if self.size is not None:
            self.size = operator.index(self.size)

    def check(self, slot: _Slot, found: _Found) -> None:
        """Raise where what is at the manifest's key forbids the write."""
        if self.verb == "cas":
            found.require(self.version)
        elif self.verb == "add" and isinstance(found.damage, _UnknownFormat):
            raise found.damage  # it is somebody's file; any other damage is nobody's
        elif self.verb == "add" and found.info and not slot.missing_chunks(found.info):
            raise FileExists(name=self.name, info=found.info)

    def pack(self, info: FileInfo, tail: bytearray) -> bytes:
        """A writer's state: a CRC; the order and the draft's manifest, as a line of JSON; and the
        bytes that don't fill a chunk yet."""
        head = {**dataclasses.asdict(self), "draft": info._pack()}
        body = json.dumps(head, default=bytes.hex).encode() + b"\n" + tail
        return _CRC.pack(zlib.crc32(body)) + body

    @staticmethod
    def unpack(state: bytes) -> tuple[_Order, FileInfo, bytes]:
        try:
            crc, body = bytes(state[: _CRC.size]), bytes(state[_CRC.size :])
            head, _, tail = body.partition(b"\n")
            if crc != _CRC.pack(zlib.crc32(body)):
                raise ValueError("a byte of it was changed")
            fields = json.loads(head)
            draft = FileInfo._unpack(fields["name"], bytes.fromhex(fields.pop("draft")))
            fields["metadata"] = bytes.fromhex(fields["metadata"])
            return _Order(**fields), draft, tail
        except (FileCorrupt, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise ValueError("this is not the state of a writer") from e


class FileWriter(io.RawIOBase):
    """A file that is being written, as a binary stream; made by `FileCache.create`.

    `close`, or the end of a `with` block, publishes the file: until then nobody sees it. An error,
    an exception that leaves the `with` block, and `abandon` end it unpublished, and delete what it
    had stored. What a dropped one had stored ends with its lease; so does, after an error, what a
    resumed one had, as others may go on with it. `info` is the published file's FileInfo. A stream
    that wraps this one (`io.TextIOWrapper`) closes it, and so publishes, even after an error, or
    when it is dropped: detach it first.

    A write has five steps: (1) refuse early, in `create`; (2) store the chunks, on a lease;
    (3) touch every chunk with its final expiry, which proves that each is still there; (4) publish
    the manifest; (5) delete the chunks of the file that it replaced.
    """

    info: FileInfo
    batch_size: int  # bytes that `write` sends as they lie in memory, where it gets them at once
    _error: Exception | None = None  # that ended the upload
    _may_be_published = False  # by a step whose reply was lost

    def __init__(
        self,
        cache: FileCache,
        order: _Order,
        old: FileInfo | None = None,
        draft: FileInfo | None = None,
        tail: bytes = b"",
    ) -> None:
        super().__init__()
        self._order, self._slot, self._old = order, cache._slot(order.name), old
        self._max_size, self._lease = cache.max_size, cache.lease
        self._capacity, self._memory = cache._limits(self._slot)
        self._started = time.monotonic()
        # Counts chunks before they are sent, so that `abandon` deletes all that may be stored.
        self._draft = draft or self._plan(order.size)
        self._rest = bytearray(tail)  # what does not make a batch yet
        self.batch_size = self._draft._chunk_size * self._draft._per_batch(_WRITE_BATCH)

    def _plan(self, size: int | None) -> FileInfo:
        """A new version, yet without chunks, for `size` bytes (None: unknown)."""
        order, capacity, version = self._order, self._capacity, secrets.token_hex(8)
        size = max(size or 0, 0)  # a negative one is a SizeMismatch when the file ends
        total = -(-size // capacity)
        cut = -(-size // total) if total else capacity
        # One chunk alone may be small. Of a stream there may come more than one; where it ends
        # before one was sent, `_finish` plans again.
        floor = 0 if total == 1 else int(capacity * _LEAST_FILL)
        return FileInfo(order.name, 0, 0, version, 0, None, order.metadata, cut, floor, total)

    def _checkClosed(self) -> None:  # noqa: N802 - as io names it
        if self._error:  # not "closed file": a zipfile, say, goes on writing, and raises that last
            raise self._error
        super()._checkClosed()

    def writable(self) -> bool:
        self._checkClosed()
        return True

    @property
    def version(self) -> str:
        """That of the file, once it is published."""
        return self._draft.version

    def tell(self) -> int:
        """Bytes written so far."""
        self._checkClosed()
        return self._draft.size + len(self._rest)

    def write(self, data: Any) -> int:
        """Write all of a bytes-like object; return its length in bytes.

        Raises FileTooLarge, SizeMismatch, CacheFull; whatever it raises ends the upload.
        """
        self._checkClosed()
        with self._ending():
            view = memoryview(data)
            view = (
                view.cast("B") if view.nbytes and view.c_contiguous else memoryview(view.tobytes())
            )
            self._check_size(self.tell() + len(view))
            self._buffer(view)
        return len(view)

    def close(self) -> None:
        """Publish the file. Raises SizeMismatch, CacheFull, and what the verb of the write raises:
        FileExists, FileChanged, FileNotFound. Then, as after any error, it is abandoned."""
        if not self.closed:
            with self._ending():
                self._finish()
                self.info = self._publish()
            super().close()

    def chunks(self) -> Iterator[memoryview]:
        """What was written so far, in verified buffers, read back from where it is stored. Raises
        FileEvicted, FileCorrupt."""
        self._checkClosed()
        self._renew()
        rest = memoryview(bytes(self._rest))
        try:
            yield from CachedFile(self._slot, self._draft).chunks()
        except FileChanged:  # said of missing chunks, as there is no manifest yet that needs them
            self._renew()  # raises FileEvicted
            raise
        yield rest

    def suspend(self) -> bytes:
        """Put the upload down: return its state, for `FileCache.resume`, and close this stream.

        The state holds the bytes that don't fill a chunk yet. What was stored lives for the
        cache's `lease`, in seconds from when it was sent or last resumed.
        """
        self._checkClosed()
        with self._ending():
            length = len(self._rest) - len(self._rest) % self._draft._chunk_size  # of full chunks
            self._send(memoryview(self._rest)[:length])
            state = self._order.pack(self._draft, self._rest[length:])
        super().close()
        return state

    def abandon(self) -> None:
        """End the upload without publishing it, and delete what is stored of it."""
        if self.closed:
            return
        super().close()
        with contextlib.suppress(CacheUnavailable):
            if not self._is_published():
                self._slot.delete_chunks(self._draft)

    def _is_published(self) -> bool:
        return self._may_be_published and self._slot.lookup().version == self.version

    _fail = abandon  # what to do after an error; another where others share the upload

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """What goes wrong ends the upload. An interrupt (Ctrl-C, a gevent time-out) does as a kill
        would: the server may still be at work on what it was sent, so nothing more is sent."""
        try:
            yield
        except Exception as error:
            self._error = copy.copy(error)  # without the traceback, which holds the caller's data
            self._fail()
            raise
        except BaseException:
            super().close()
            raise

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._fail()

    # To be dropped is not to `close`, as IOBase's own finalizer does, which would publish. This
    # one stands for a function in C that does nothing: one in Python loses the Ctrl-C that strikes
    # in it.
    __del__ = object.__init__

    def _renew(self) -> None:
        """Give what is stored a new lease. Raises FileEvicted where chunks are gone."""
        missing = self._put_on_lease(range(self._draft.chunks))
        if missing:
            with self._ending():
                raise FileEvicted(name=self._order.name, info=self._draft, missing=missing)

    def _put_on_lease(self, indices: Iterable[int]) -> list[int]:
        """Put chunks on a lease; return the indices of those that are gone."""
        return self._slot.touch_chunks(self._draft, self._lease, indices)

    def _check_size(self, length: int) -> None:
        """Raise where the file may not have `length` bytes."""
        name, size = self._order.name, self._order.size
        limit = min(self._max_size, self._draft._chunk_size * _MAX_CHUNKS)
        if length > limit:
            raise FileTooLarge(name=name, size=length, limit=limit)
        if size is not None and length > size:
            raise SizeMismatch(name=name, size=size, received=length)

    def _buffer(self, view: memoryview) -> None:
        """Send what makes a batch; keep the rest. What need not be joined is not copied."""
        while view:
            room = self.batch_size - len(self._rest)
            piece, view = view[:room], view[room:]
            is_last = self.tell() + len(piece) == self._order.size
            if not self._rest and (len(piece) == room or is_last):
                self._send(piece)
                continue
            self._rest += piece
            if len(self._rest) == self.batch_size:
                self._flush()

    def _flush(self) -> None:
        batch, self._rest = self._rest, bytearray()
        self._send(memoryview(batch))

    def _finish(self) -> None:
        """Send what is left. Raises SizeMismatch."""
        length = self.tell()
        self._check_size(length)
        if self._order.size not in (None, length):
            raise SizeMismatch(name=self._order.name, size=self._order.size, received=length)
        if not self._draft.chunks:
            self._plan_again(length)
        self._flush()

    def _plan_again(self, length: int) -> None:
        """Where the whole file is at hand its size is known now."""
        self._draft = dataclasses.replace(self._plan(length), version=self.version)

    def _send(self, batch: memoryview) -> None:
        """2. Store chunks, on a lease."""
        draft = self._draft
        values: dict[int, _Parts] = {}
        for start in range(0, len(batch), draft._chunk_size):
            index = draft.chunks + len(values)
            values[index] = draft._chunk(index, batch[start : start + draft._chunk_size])
        size, chunks = draft.size + len(batch), draft.chunks + len(values)
        self._draft = dataclasses.replace(draft, size=size, chunks=chunks)
        # Where the old file and the new don't both fit, the old one goes: memcached would evict
        # from it anyway, so that nobody could read it; and would take what is left of it for
        # active, and evict the first chunks of the new one.
        if self._old and self._old.size + size > self._memory:
            self._slot.delete_chunks(self._old)
            self._old = None
        if values:
            self._store(values)

    def _store(self, values: dict[int, _Parts]) -> None:
        """Store chunks until the server keeps all of them. Raises CacheFull, UploadConflict."""
        deadline = time.monotonic() + _PATIENCE
        # A file of more than half the server's memory needs what its old version holds.
        size = self._max_size if self._order.size is None else self._order.size
        is_tight = 2 * size > self._memory
        while True:
            refused = self._try_to_store(values)
            if not (refused or is_tight):
                return
            # What was touched twice is active in the eyes of memcached's LRU, like the chunks of
            # files that were read; otherwise a full cache evicts the new chunks to keep those.
            # Done always, it would cost a large cache an eighth of the files that it keeps.
            self._put_on_lease(values)
            gone = self._put_on_lease(values)
            left = sorted({*gone, *refused})
            if not left:
                return
            reply = next(iter(refused.values()), b"")
            # To wait helps where there is no room now, not where an item is larger than -I allows.
            if time.monotonic() > deadline or b"too large" in reply:
                raise self._cache_full([] if refused else left, reply)
            values = {index: values[index] for index in left}
            time.sleep(_PAUSE)

    def _try_to_store(self, values: Mapping[int, _Parts]) -> dict[int, bytes]:
        return self._slot.store_chunks(self._draft, values, self._lease)

    def _publish(self) -> FileInfo:
        now = int(time.time())
        info = dataclasses.replace(self._draft, created=now, expires=_end(now, self._order.expire))
        for _ in range(_ATTEMPTS):
            # Asked now, not before the upload: a server that restarts counts its tokens anew.
            found = self._slot.lookup()
            published = self._try_to_publish(info, found)
            if published:
                return published
        raise self._slot.cache_full(info.size, [], "contention")

    def _try_to_publish(self, info: FileInfo, found: _Found) -> FileInfo | None:
        """Put the file in the place of what was found; None: another was quicker."""
        self._order.check(self._slot, found)
        manifest_end = self._settle(info)  # 3.
        # Where `swap` raises, this stays: the clean-up then looks first, and where it can't look
        # it must leave what is stored.
        before, self._may_be_published = self._may_be_published, True
        if self._slot.swap(found, info, manifest_end):  # 4. and 5.
            return info
        self._may_be_published = before  # a definite no
        return None

    def _settle(self, info: FileInfo) -> int:
        """Give every chunk its final expiry; return that of the manifest. Raises CacheFull where
        one is gone: a server that is short of memory says STORED, and evicts the first chunks
        while the last arrive."""
        manifest_end, chunks_end = self._slot.exptimes(self._order.expire)
        missing = self._slot.touch_chunks(info, chunks_end)
        if missing:
            raise self._cache_full(missing)
        return manifest_end

    def _cache_full(self, missing: list[int], refusal: bytes = b"") -> CacheFull:
        size = max(self._draft.size, self._order.size or 0)
        # memcached's clock ticks once a second: an item may end up to a second early.
        is_over = time.monotonic() - self._started > self._lease - 1
        return self._slot.cache_full(size, missing, "lease" if is_over else "", refusal)


class _ResumedWriter(FileWriter):
    """A writer that was suspended, and resumed by one or more: what is stored of the upload is
    that of the others, too, who send the same bytes, and may publish them at any moment."""

    _may_be_published = True  # by one of the others

    def _fail(self) -> None:
        """What is stored stays for the lease: others may go on with it."""
        if not self.closed:
            io.RawIOBase.close(self)
            with contextlib.suppress(MemchunkError):
                self._put_on_lease(range(self._draft.chunks))

    def _put_on_lease(self, indices: Iterable[int]) -> list[int]:
        """Chunks that another has published keep their end. Where that happens while they are
        touched, they get none, which is never too early."""
        if self._is_published():
            return self._slot.missing_chunks(self._draft, indices)
        try:
            return super()._put_on_lease(indices)
        finally:  # it may be done also where its reply is lost
            if self._is_published():
                self._slot.touch_chunks(self._draft, 0, indices)

    def _plan_again(self, length: int) -> None:
        """Others may have sent chunks already, as they were planned at first."""

    def _try_to_store(self, values: Mapping[int, _Parts]) -> dict[int, bytes]:
        return self._slot.add_chunks(self._draft, values, self._lease)

    def _try_to_publish(self, info: FileInfo, found: _Found) -> FileInfo | None:
        if found.info and found.version == self.version:
            return self._agree(found.info)
        published = super()._try_to_publish(info, found)
        if published:
            self._settle(info)  # others may have put chunks on a lease, or abandoned them
        return published

    def _agree(self, published: FileInfo) -> FileInfo:
        """What another has published: the same file, as each chunk was compared when it was sent,
        and whole."""
        if published.size != self._draft.size:
            index = min(published.size, self._draft.size) // published._chunk_size
            raise UploadConflict(name=published.name, version=published.version, index=index)
        missing = self._slot.missing_chunks(published)
        if missing:
            raise self._cache_full(missing)
        return published


class CachedFile(io.RawIOBase):
    """One version of a file as a readable, seekable binary stream; made by `FileCache.open`.

    Fetches the chunks that are read, and no others. Reading raises FileEvicted, FileCorrupt, and
    FileChanged where the file was replaced or deleted since it was opened and its chunks are gone.
    """

    def __init__(self, slot: _Slot, info: FileInfo) -> None:
        super().__init__()
        self.info = info
        self._slot = slot
        self._position = 0
        self._held: tuple[int, memoryview] = (-1, memoryview(b""))  # the chunk read last

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes from `start` to `stop`, as in a slice, in verified read-only buffers. Holds
        2 MiB of them at a time. Leaves the stream's position alone."""
        self._checkClosed()
        start, stop, _ = slice(start, stop).indices(self.info.size)
        return self._pieces(start, stop)

    def _pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """What is between `start` and `stop`, a piece from each chunk, which is held until the
        next one."""
        size, batch = self.info._chunk_size, self.info._per_batch(_READ_BATCH)
        indices = range(start // size, -(-stop // size) if start < stop else 0)
        while indices:
            held, payload = self._held  # at once: other threads may read, too
            if indices[0] == held:
                payloads = [payload]
            else:
                payloads = self._slot.read_chunks(self.info, indices[:batch])
            for index, payload in zip(indices, payloads):
                self._held, offset = (index, payload), index * size
                yield payload[max(start - offset, 0) : stop - offset]
            indices = indices[len(payloads) :]
            # Now, so that the next batch is received into the same memory: to get fresh pages from
            # the system takes as long as the CRC.
            del payload, payloads

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; fewer bytes than it holds only at the end of the file."""
        filled = 0
        # Released also after an error: what is kept with its traceback could not be freed.
        with memoryview(buffer).cast("B") as target:
            for piece in self.chunks(self._position, self._position + len(target)):
                target[filled : filled + len(piece)] = piece
                filled += len(piece)
        self._position += filled
        return filled

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, fewer only at the end; all that is left by default. IOBase's own
        makes room for all of `size`, however much is left."""
        if size is None or size < 0:
            return self.readall()
        return super().read(min(size, max(self.info.size - self._position, 0))) or b""

    def readall(self) -> bytes:
        """All that is left, as one bytes object."""
        # Zero bytes that the system makes when they are written to, and a buffer that is handed
        # over without a copy: the file is in memory once.
        output = io.BytesIO(bytes(max(self.info.size - self._position, 0)))
        with output.getbuffer() as view:
            filled = self.readinto(view)
        output.truncate(filled)  # another thread may have moved the stream
        return output.getvalue()

    def peek(self, size: int = 0) -> bytes:
        """Some of the next bytes, without moving; `readline` and `for line in file` use it."""
        start, size = self._position, self.info._chunk_size
        stop = min(start + _LINE, start - start % size + size)  # of one chunk
        return bytes(next(self.chunks(start, stop), b""))

    def readline(self, size: int | None = -1) -> bytes:
        """The next line, or its first `size` bytes. IOBase's own applies `size` to each `peek`
        anew: what it read beyond is given back."""
        limit = self.info.size if size is None or size < 0 else size
        line = super().readline(limit)
        self._position -= max(len(line) - limit, 0)
        return line[:limit]

    def readable(self) -> bool:
        self._checkClosed()
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._checkClosed()
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.info.size}
        if whence not in origins or origins[whence] + operator.index(offset) < 0:
            raise io.UnsupportedOperation(f"can't seek to {offset} from {whence}")
        self._position = origins[whence] + offset
        return self._position


def connect(
    servers: str, *, timeout: float = TIMEOUT, tls: ssl.SSLContext | None = None, **options: Any
) -> FileCache:
    """A thread-safe FileCache with a pool of connections to each server.

    servers: one or more of "host", "host:port", "[ipv6]:port" and "unix:/path", with commas
        between; "tls://" before a host makes it TLS. The port is 11211 by default. All processes
        must spell them alike: that decides which server has which file.
    timeout: seconds to wait for a connection, and for each send and receive. 5 by default.
    tls: the context for TLS, with which all hosts are spoken to in TLS; by default, for those that
        ask for it, `ssl.create_default_context()`: certificates of the system's authorities.
    options: the keyword arguments of FileCache.

    Raises ValueError for an address that can't be one. Connects when it is first used.
    """
    names = list(filter(None, map(str.strip, servers.split(","))))
    pools: Any = {name: _Pool(name, timeout, tls) for name in names}
    return FileCache(pools, **options)


class _Found(NamedTuple):
    """What was at a manifest's key. value: None for nothing. damage: why `value` is no manifest.
    token: what memcached's `cas` wants to be told."""

    name: str
    value: Any = None
    token: Any = None
    info: FileInfo | None = None
    damage: FileCorrupt | None = None

    @property
    def version(self) -> str | None:
        return self.info.version if self.info else None

    def require(self, version: str | None = None) -> FileInfo:
        """The file's info. Raises FileNotFound, FileCorrupt; FileChanged unless of `version`."""
        if self.damage:
            raise self.damage
        if self.info is None:
            raise FileNotFound(name=self.name)
        if version not in (None, self.version):
            raise FileChanged(name=self.name, version=version, current=self.version)
        return self.info


class _Slot:
    """The place of one name: its server, the key of its manifest, the keys of its chunks; and the
    steps of the protocol that reads and writes share."""

    def __init__(self, server: _Server, namespace: str, name: str) -> None:
        self.server, self.name = server, name
        self._namespace = namespace
        self._key = f"{namespace}:{_digest(name)}"

    def chunk_key(self, version: str, index: int) -> str:
        return f"{self._namespace}:{version}:{index}"

    def _keys(self, info: FileInfo, indices: Iterable[int] | None) -> dict[str, int]:
        """The keys of chunks, by default of all, and the index of each."""
        chosen = range(info.chunks) if indices is None else indices
        return {self.chunk_key(info.version, index): index for index in chosen}

    def lookup(self) -> _Found:
        """What is at the manifest's key."""
        value, token = self._ask("gets", self._key)
        if value is None:
            return _Found(self.name)
        try:
            return _Found(self.name, value, token, FileInfo._unpack(self.name, value))
        except FileCorrupt as error:
            return _Found(self.name, value, token, None, error)

    def swap(self, found: _Found, info: FileInfo | None, exptime: int) -> bool:
        """Put `info`, or nothing, in the place of what was found: the one atomic step; then delete
        the chunks that nothing leads to any more. False: another was quicker, and nothing is done.
        Raises CacheFull, and CacheUnavailable where nobody can tell whether it was done."""
        done = self._replace(found, info._pack() if info else b"", exptime)
        if done:
            self._delete_replaced(found, info.version if info else None)
        return done

    def _replace(self, found: _Found, value: bytes, exptime: int) -> bool:
        """The step itself. True: done. False: another was quicker. Where the reply is lost, what
        is there tells: our value, it is done; what was there before, it is not done, or not yet:
        once more. Raises where it is something else: nobody knows."""
        try:
            return self._try_to_replace(found, value, exptime)
        except CacheUnavailable:
            now = self.lookup()
            # Tokens alone don't tell: a server that restarted gives the same ones again. Of an
            # `add`, which has none, nothing tells: it may be done, and undone by a deleter, who
            # took our chunks too.
            if found.token is not None and (now.value, now.token) == (found.value, found.token):
                # Should memcached do the first one late, it won't do both.
                with contextlib.suppress(CacheUnavailable):
                    if self._try_to_replace(found, value, exptime):
                        return True
                now = self.lookup()
            if now.value == (value or None):  # a deleted manifest is empty, and has expired
                return True
            # Perhaps done, and replaced by a writer who deleted our chunks, not those that we
            # replaced.
            self._delete_replaced(found, now.version)
            raise

    def _try_to_replace(self, found: _Found, value: bytes, exptime: int) -> bool:
        verb = "add" if found.value is None else "cas"
        item = {self._key: (value,)}
        [reply] = self._ask("store", verb, item, exptime, found.token, again=False)
        if reply != _STORED and reply not in _NO:
            raise self.cache_full(0, [], "", reply)
        return bool(reply == _STORED)

    def _delete_replaced(self, found: _Found, version: str | None) -> None:
        """Delete the chunks of what was found, unless it is what is there now, `version`."""
        if found.info and found.version != version:
            self.delete_chunks(found.info)

    def store_chunks(
        self, info: FileInfo, values: Mapping[int, _Parts], lease: int
    ) -> dict[int, bytes]:
        """Store chunks, by index, for `lease` seconds; return the replies that are no yes."""
        items = {self.chunk_key(info.version, index): parts for index, parts in values.items()}
        replies = self._ask("store", "set", items, lease)
        return {index: reply for index, reply in zip(values, replies) if reply != _STORED}

    def add_chunks(
        self, info: FileInfo, values: Mapping[int, _Parts], lease: int
    ) -> dict[int, bytes]:
        """`store_chunks`, where others may do so too. Raises UploadConflict where other bytes are.

        One by one, so that nothing is stored behind other bytes, nor behind a chunk that is not
        stored yet: it would be in the way of a writer who came first, and nobody could go on.
        """
        for index, parts in values.items():
            key = self.chunk_key(info.version, index)
            [reply] = self._ask("store", "add", {key: parts}, lease)
            if reply == _NOT_STORED:
                there = self._ask("read", [key], lambda _, value: bytes(value)).get(key)
                if there == b"".join(parts):
                    continue
                if there is not None:
                    raise UploadConflict(name=self.name, version=info.version, index=index)
            if reply != _STORED:
                return {each: reply for each in values if each >= index}
        return {}

    def read_chunks(self, info: FileInfo, indices: range) -> list[memoryview]:
        """Verified payloads. Raises FileEvicted, FileChanged, FileCorrupt."""
        keys = self._keys(info, indices)
        payloads = self._ask("read", list(keys), lambda key, value: info._verify(keys[key], value))
        missing = [index for key, index in keys.items() if key not in payloads]
        if missing:
            self.explain(info, missing)
        return [payloads[key] for key in keys]

    def explain(self, info: FileInfo, missing: list[int]) -> NoReturn:
        """Raise what it means that chunks are missing: FileChanged or FileEvicted."""
        version = self.lookup().version
        if version != info.version:
            raise FileChanged(name=self.name, version=info.version, current=version)
        raise FileEvicted(name=self.name, info=info, missing=missing)

    def touch_chunks(
        self, info: FileInfo, exptime: int, indices: Iterable[int] | None = None
    ) -> list[int]:
        """Set the expiry of chunks, by default of all; return the indices of those missing."""
        keys = self._keys(info, indices)
        there = self._ask("touch", list(keys), exptime)
        return [index for index, found in zip(keys.values(), there) if not found]

    def missing_chunks(self, info: FileInfo, indices: Iterable[int] | None = None) -> list[int]:
        """The indices of chunks, by default of all, that are gone. A `cas` that can't succeed asks
        for them: of the commands that every proxy speaks, the only one that neither reads nor
        changes them."""
        keys = self._keys(info, indices)
        replies = self._ask("store", "cas", dict.fromkeys(keys, ()), 0, _NO_TOKEN)
        for reply in set(replies) - {_EXISTS, _NOT_FOUND}:
            raise self.cache_full(0, [], "", reply)
        return [index for index, reply in zip(keys.values(), replies) if reply == _NOT_FOUND]

    def delete_chunks(self, info: FileInfo, indices: Iterable[int] | None = None) -> None:
        """Delete the chunks of a version that no manifest names. Failure is no error, as nothing
        depends on it; but nobody else will ever do it, so it is tried twice."""
        keys = list(self._keys(info, indices))
        for _ in range(2):
            with contextlib.suppress(CacheUnavailable):
                self._ask("delete", keys)
                break

    def exptimes(self, expire: int) -> tuple[int, int]:
        """What to tell memcached for a manifest to end in `expire` seconds, and for its chunks to
        do so a little later. Both are relative, or both absolute, by the time that the server
        itself tells, where it does."""
        if not expire:
            return 0, 0
        end = expire if expire + _SLACK <= _RELATIVE_LIMIT else self.now() + expire
        return (end, end + _SLACK) if end + _SLACK <= _ABSOLUTE_LIMIT else (0, 0)

    def now(self) -> int:
        """Unix time by the server's clock, where `stats` tells it; else by this machine's."""
        with contextlib.suppress(CacheUnavailable):
            return int(self._ask("stats").get(b"time", time.time()))
        return int(time.time())

    def ask_settings(self) -> Mapping[bytes, Any]:
        """The server's `stats settings`; nothing where a client or proxy hides one of those that
        are needed, which is asked again the next time."""
        try:
            told = self._ask("stats", "settings")
        except CacheUnavailable as error:
            # Some proxies close the connection on a command that they don't know.
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, _DROPPED):
                raise
            told = {}
        needed = {b"item_size_max", b"slab_chunk_max", b"maxbytes"}
        self.server.settings = told if needed <= told.keys() else {}
        return self.server.settings

    def cache_full(
        self, size: int, missing: list[int], cause: str, refusal: bytes = b""
    ) -> CacheFull:
        """The error for a file of `size` bytes. cause: "" to ask the server for it."""
        said, why = refusal.decode(errors="replace"), _REASONS.get(cause)
        if not why:
            cause, why = "unknown", "it does not tell why"
            with contextlib.suppress(CacheUnavailable):
                if settings := self.ask_settings():
                    cause, why = _diagnose(settings, self._ask("stats", "slabs"), size, said)
        said = said or (f"it evicted {len(missing)} chunks at once" if missing else "it could not")
        return CacheFull(name=self.name, missing=missing, cause=cause, reason=f"{said}: {why}")

    def _ask(self, verb: str, *args: Any, **options: Any) -> Any:
        """Call a verb of `_Server`; its errors are about this file."""
        try:
            return getattr(self.server, verb)(*args, **options)
        except CacheUnavailable as error:
            error.name = self.name
            raise


_REASONS = {
    "lease": "the upload took longer than its lease",
    "contention": f"other writers changed the manifest {_ATTEMPTS} times",
}


def _diagnose(
    settings: Mapping[bytes, Any], slabs: Mapping[bytes, Any], size: int, refusal: str
) -> tuple[str, str]:
    """Why a server with these `stats` did not keep a file of `size` bytes: cause, and sentence."""
    largest, memory = settings[b"item_size_max"], settings[b"maxbytes"]
    if "too large" in refusal:
        return "item size", f"items end at {largest} bytes (-I), and a chunk is larger"
    if size > memory:
        return "memory", f"the file has {size} bytes, and the server's memory (-m) {memory}"
    pages = {  # of each slab class, by the size of its items
        slabs.get(name.replace(b"total_pages", b"chunk_size")): count
        for name, count in slabs.items()
        if name.endswith(b":total_pages")
    }
    pages.pop(settings[b"slab_chunk_max"], None)  # where chunks of files are
    others = sum(pages.values())
    if size > memory - others * _PAGE:
        held = f"{others} pages of its {memory // _PAGE} MiB (-m) hold items of other sizes"
        advice = "start it with -o slab_automove=2, or give files a memcached of their own"
        return "slabs", f"{held}: {advice}"
    return "pressure", f"other items fill its memory (-m) of {memory} bytes"


class _Server:
    """The seam: one memcached, through any client of pymemcache's. Errors are CacheUnavailable.

    Items are stored one by one: pymemcache's `set_many` stops at the first refusal, while the
    server goes on to store what was sent behind it, perhaps after the command that cleans up.
    """

    key_prefix = b""  # what the client puts before every key
    settings: Mapping[bytes, Any] = {}  # as last told

    def __init__(self, name: str, client: Any) -> None:
        self.name = name
        if isinstance(client, RetryingClient):
            # It repeats an `add` or `cas` that may have been done. What it wraps does not.
            client = vars(client)["_client"]
        if getattr(client, "ignore_exc", False):
            raise ValueError("ignore_exc=True makes a client call a server that is down a miss")
        if isinstance(client, HashClient):
            raise ValueError("a HashClient calls a server that is down a miss: give it unwrapped")
        if not hasattr(client, "get_many"):
            raise ValueError(f"{client!r} is no memcached client; `connect` takes addresses")
        self._client = client
        self._pool = getattr(client, "client_pool", None)
        self.key_prefix = getattr(client, "key_prefix", b"")

    def gets(self, key: str) -> Any:
        """Value and cas token, None and None for a miss."""
        return self._call("gets", key)

    def store(
        self,
        verb: str,
        items: Mapping[str, _Parts],
        exptime: int,
        token: Any = None,
        again: bool = True,
    ) -> list[bytes]:
        """Store items by the verb "set", "add" or "cas"; return memcached's replies: STORED,
        NOT_STORED, EXISTS, NOT_FOUND, or a refusal. again: whether what may have been done can be
        done again."""
        joined = ((key, b"".join(parts)) for key, parts in items.items())
        return [self._store(verb, key, value, exptime, token, again) for key, value in joined]

    def _store(
        self, verb: str, key: str, value: bytes, exptime: int, token: Any, again: bool
    ) -> bytes:
        ask = functools.partial(self._call, again=again, expire=exptime, noreply=False)
        try:
            if verb == "set":  # by `set_many`, which lists what failed: `set` is always True
                return _NOT_STORED if ask("set_many", {key: value}) else _STORED
            if verb == "add":
                return _STORED if ask("add", key, value) else _NOT_STORED
            done = ask("cas", key, value, token)
            return _STORED if done else _NOT_FOUND if done is None else _EXISTS
        except CacheUnavailable as error:
            refusal = str(error.__cause__).encode()
            if isinstance(error.__cause__, MemcacheServerError) and _REFUSAL.search(refusal):
                return refusal
            raise

    def read(self, keys: list[str], verify: Callable[[str, Any], Any]) -> dict[str, Any]:
        """What `verify` makes of each key and value that is there."""
        return {key: verify(key, value) for key, value in self._call("get_many", keys).items()}

    def touch(self, keys: list[str], exptime: int) -> list[bool]:
        """Set the expiry of items; return which of them are there."""
        return [self._call("touch", key, expire=exptime, noreply=False) for key in keys]

    def delete(self, keys: list[str]) -> None:
        for start in range(0, len(keys), _PIPELINE):
            self._call("delete_many", keys[start : start + _PIPELINE], noreply=False)

    def stats(self, *what: str) -> dict[bytes, Any]:
        return dict(self._call("stats", *what))

    def close(self) -> None:
        self._client.close()

    def _call(self, command: str, *args: Any, again: bool = True, **options: Any) -> Any:
        """Have a client do a command; where it can be done twice, `again` on the next connection
        when one turns out to be broken. After a restart of the server, all that idle are."""
        retries = 1 + self._idling() if again else 0
        while True:
            try:
                return self._do(command, *args, **options)
            except MemchunkError:
                raise
            except Exception as error:  # pymemcache's, a socket's, those of a user's serializer
                reason = repr(error)
                if isinstance(error, _DROPPED):
                    retries -= 1
                    if retries >= 0:
                        continue
                    reason += (
                        ": it closed the connection, as without tls:// a server with TLS does"
                    )
                if isinstance(error, ssl.SSLError):
                    reason += ": TLS failed; does it speak TLS, is its certificate a trusted one?"
                raise CacheUnavailable(name="", server=self.name, reason=reason) from error

    def _idling(self) -> int:
        """How many connections idle in the client's pool."""
        return len(self._pool.free) if self._pool else 0

    def _do(self, command: str, *args: Any, **options: Any) -> Any:
        try:
            return getattr(self._client, command)(*args, **options)
        except BaseException as error:
            # In mid-reply, the rest of which nobody may read for another's. pymemcache's client
            # closes its connection after an Exception only; its pool does not reuse it.
            if not isinstance(error, Exception) and not self._pool:
                self._client.close()
            raise


class _Pool(_Server):
    """One server as `connect` speaks to it: fast connections, kept for the next call. Safe for
    threads, each of which takes a connection of its own, and for processes that fork."""

    def __init__(self, name: str, timeout: float, tls: ssl.SSLContext | None) -> None:
        self.name = name
        address, wants_tls = _address(name)
        if isinstance(address, str):
            tls = None  # a Unix socket
        elif wants_tls and tls is None:
            tls = ssl.create_default_context()
        self._address, self._timeout, self._tls = address, timeout, tls
        self._idle: collections.deque[tuple[float, _Connection]] = collections.deque()
        self._pid = os.getpid()

    def store(self, *args: Any, again: bool = True) -> list[bytes]:
        return list(self._call("store", *args, again=again))

    def read(self, keys: list[str], verify: Callable[[str, Any], Any]) -> dict[str, Any]:
        return dict(self._call("read", keys, verify))

    def touch(self, keys: list[str], exptime: int) -> list[bool]:
        commands = [(f"touch {key} {exptime}\r\n".encode(),) for key in keys]
        return [reply == b"TOUCHED" for reply in self._call("ask", commands, b"TOUCHED")]

    def delete(self, keys: list[str]) -> None:
        self._call("ask", [(f"delete {key}\r\n".encode(),) for key in keys], b"DELETED")

    def close(self) -> None:
        with contextlib.suppress(IndexError):  # another thread may be taking them
            while True:
                self._idle.pop()[1].close()

    def _idling(self) -> int:
        return len(self._idle)

    def _do(self, command: str, *args: Any, **options: Any) -> Any:
        connection = self._take()
        try:
            result = getattr(connection, command)(*args, **options)
        except BaseException:  # perhaps in mid-reply
            connection.close()
            raise
        self._idle.append((time.monotonic(), connection))
        return result

    def _take(self) -> _Connection:
        """An idle connection, or a new one."""
        if self._pid != os.getpid():  # a child must not talk on its parent's connections
            self.close()
            self._pid = os.getpid()
        with contextlib.suppress(IndexError):
            while True:
                since, connection = self._idle.pop()
                if time.monotonic() - since < _IDLE:
                    return connection
                connection.close()
        connection = _Connection(self._address)
        connection.sock = self._open()
        return connection

    def _open(self) -> socket.socket:
        """A connected socket: to any address of the host, where pymemcache tries the first."""
        if isinstance(self._address, str):
            sock = socket.socket(socket.AF_UNIX)
        else:
            sock = socket.create_connection(self._address, self._timeout)
        try:
            sock.settimeout(self._timeout)
            if isinstance(self._address, str):
                sock.connect(self._address)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls:
                    sock = self._tls.wrap_socket(sock, server_hostname=self._address[0])
        except BaseException:
            sock.close()
            raise
        return sock


class _Connection(Client):
    """pymemcache's client for one connection, with its two costly steps replaced: values go out as
    they lie in memory, in parts (it joins and copies them three times), and come in with one copy,
    out of the socket (it reads 4 KiB at a time, and joins). It halves the time for a file."""

    sock: Any  # that of a `_Pool`, which opens it
    _on_value: Callable[[str, Any], Any]  # that of the `read` that is at work

    def store(
        self, verb: str, items: Mapping[str, _Parts], exptime: int, token: Any = None
    ) -> list[bytes]:
        end = b"\r\n" if token is None else b" %b\r\n" % token
        commands = []
        for key, parts in items.items():
            head = f"{verb} {key} 0 {exptime} {sum(map(len, parts))}".encode()
            commands.append((head + end, *parts, b"\r\n"))
        return self.ask(commands, _STORED)

    def ask(self, commands: list[_Parts], yes: bytes) -> list[bytes]:
        """Send commands, each in parts, and return their replies, of which one is a line. All of
        them are read, errors too: the server goes on to do what was sent, whatever becomes of the
        connection. Raises for a line that is no reply: it must never be taken for a "no"."""
        replies = []
        for start in range(0, len(commands), _PIPELINE):
            batch = commands[start : start + _PIPELINE]
            self._send([part for command in batch for part in command])
            replies += self._lines(len(batch))
        for reply in replies:
            if reply != yes and reply not in _NO and not _REFUSAL.search(reply):
                raise MemcacheUnknownError(reply[:64])
        return replies

    def _send(self, parts: list[Any]) -> None:
        if isinstance(self.sock, ssl.SSLSocket) or not hasattr(self.sock, "sendmsg"):  # Windows
            self.sock.sendall(b"".join(parts))
            return
        while parts:
            sent = self.sock.sendmsg(parts[:64])  # the system takes 1024 at once, POSIX 16
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = memoryview(parts[0])[sent:]

    def _lines(self, count: int) -> list[bytes]:
        received = b""
        while received.count(b"\r\n") < count:
            piece = self.sock.recv(4096)
            if not piece:
                raise MemcacheUnexpectedCloseError
            received += piece
        *lines, rest = received.split(b"\r\n")
        if rest or len(lines) > count:
            raise MemcacheUnknownError(received[:64])
        return lines

    def read(self, keys: list[str], verify: Callable[[str, Any], Any]) -> Any:
        """`get_many`, which verifies each value while the next arrives."""
        self._on_value = verify
        return self.get_many(keys)

    def _extract_value(
        self,
        expect_cas: bool,
        line: bytes,
        buf: bytes,
        remapped_keys: dict[bytes, Any],
        prefixed_keys: list[bytes],
    ) -> tuple[Any, Any, bytes]:
        """One value of a reply; to be replaced by subclasses, as pymemcache's docstring says."""
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
        name = remapped_keys[key]
        if expect_cas:
            return name, (value, cas[0]), buf
        return name, self._on_value(name, value), buf


def _servers(client: Any) -> dict[str, _Server]:
    """The servers behind what `FileCache` was given, by name. Raises ValueError."""
    if isinstance(client, HashClient):
        # Its own routing calls a server that is down a miss, and what it put on another instead is
        # stale when the first returns. Its clients are sound, one by one.
        client = client.clients
    clients = client if isinstance(client, Mapping) else {"memcached": client}
    if not clients:
        raise ValueError("no memcached server is given")
    return {
        str(name): each if isinstance(each, _Pool) else _Server(str(name), each)
        for name, each in clients.items()
    }


def _address(server: str) -> tuple[str | tuple[str, int], bool]:
    """What pymemcache wants for an address, and whether it asks for TLS. Raises ValueError."""
    if server.startswith("unix:") and len(server) > len("unix:"):
        return server[len("unix:") :], False
    match = _ADDRESS.fullmatch(server)
    port = int(match["port"] or 11211) if match else 0
    if not match or not 1 <= port <= 65535:
        raise ValueError(f"{server!r} is no server: host, host:port, [ipv6]:port or unix:/path")
    return (match["ipv6"] or match["host"], port), bool(match["tls"])


def _size_of(source: Any) -> int | None:
    """Bytes from where a source stands to its end; None where only reading will tell. Nothing is
    moved to find out: not all that can seek to the end find the way back. Raises TypeError."""
    if isinstance(source, (str, io.TextIOBase)):
        raise TypeError("files are bytes: encode the text, or open the file in binary mode")
    with contextlib.suppress(TypeError):
        return memoryview(source).nbytes
    if type(source) is io.BytesIO:
        return max(source.getbuffer().nbytes - source.tell(), 0)
    if _is_file(source):
        status = os.fstat(source.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_size:  # 0: /proc says so, and has content
            return max(status.st_size - int(source.tell()), 0)
    return None


def _is_file(source: Any) -> bool:
    """Whether `open` made it. What wraps or extends a file may read other bytes than it has."""
    buffered = type(source) in (io.BufferedReader, io.BufferedRandom)
    return type(source.raw if buffered else source) is io.FileIO


def _read_source(source: Any, size: int, known: int | None) -> Iterator[Any]:
    """The bytes of a source, in pieces that hold until the next one is asked for; of a file whose
    length is known, `size` bytes at a time, read into one buffer."""
    if known is not None and (type(source) is io.BytesIO or _is_file(source)):
        buffer = memoryview(bytearray(size))
        while count := source.readinto(buffer):
            yield buffer[:count]
    elif known is not None:
        yield source
    elif hasattr(source, "read"):
        while piece := source.read(_PIECE):
            yield piece
        if piece is None:
            raise BlockingIOError("the source does not block, and has nothing to read yet")
    else:
        yield from source


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _seconds(expire: int | datetime.timedelta) -> int:
    if isinstance(expire, datetime.timedelta):
        seconds = expire.total_seconds()
        expire = math.ceil(seconds) if seconds >= 0 else -1
    if not 0 <= operator.index(expire) <= _MAX_EXPIRE:
        raise ValueError("expire is a number of seconds from now, 0 for never")
    return int(expire)


def _end(now: int, expire: int) -> int | None:
    return now + expire if expire else None
