# memchunk 1.0.0, MIT licence. Copy this one file; its manual is README.md and docs/.
"""Keep files of 0 to 50 MiB in memcached, which takes items of up to 1 MB.

    cache = memchunk.FileCache("127.0.0.1:11211")
    cache.add("report.pdf", pathlib.Path("report.pdf"), expire=86400)
    data = cache.get("report.pdf")

When `add`, `set` or `cas` returns, the whole file is in the cache. A read returns
exactly the bytes that were stored, or raises a `MemchunkError`. Four rules keep this
promise:

* A file is chunks and a manifest, which names them. Every write draws a random segment,
  which is in the keys of its chunks. So the bytes of two writers can't mix.
* A file appears by one atomic step, memcached's `add` or `cas` of its manifest. Before
  this step, a `touch` has proved that every chunk is still there.
* Until that touch, chunks have a short expiry, the lease. So leftovers of a crashed
  writer expire by themselves.
* The CRC of a chunk covers its bytes, its key, its index and the number of chunks in
  its segment, 0 if that is unknown. The CRC of a manifest covers all of it.

Read `FileCache`, `_Write` (the five steps of a write), `CachedFile`, and `_Entry` (the
commands that both use).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import logging
import math
import operator
import os
import re
import secrets
import ssl
import stat
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Callable, NamedTuple, NoReturn, Union

from pymemcache.client.base import Client, PooledClient
from pymemcache.client.hash import HashClient
from pymemcache.client.retrying import RetryingClient
from pymemcache.exceptions import MemcacheError, MemcacheServerError
from pymemcache.exceptions import MemcacheUnexpectedCloseError as MemcacheClosed
from pymemcache.exceptions import MemcacheUnknownCommandError as MemcacheUnknown

__all__ = ["FileCache", "CachedFile", "FileInfo", "Source", "MAX_SIZE"]
__all__ += ["MemchunkError", "InvalidName", "CacheMiss", "FileNotFound", "FileEvicted"]
__all__ += ["FileExists", "FileChanged", "FileTooLarge", "SizeMismatch", "FileCorrupt"]
__all__ += ["CacheFull", "CacheUnavailable"]

__version__ = "1.0.0"

MAX_SIZE = 50 * 1024 * 1024  # bytes, inclusive: the largest file by default
MAX_NAME = 1024  # bytes of UTF-8
MAX_METADATA = 0xFFFF  # bytes
TIMEOUT = 5.0  # seconds to connect, and for each send and receive, of our own client
LEASE = 3600  # seconds that chunks live before their file is published

# Chunks outlive their manifest by this many seconds. So an expired file is gone at
# once, never in part, and a read that began just before can finish.
_SLACK = 60

# memcached's largest slab class, by default. Two such items fill a page. memcached
# stitches larger items together, which wastes memory and fails under pressure.
_LARGEST_ITEM = 512 * 1024
# Bytes of an item beside its value: a key of up to 194, and a head of up to 64.
_AROUND = 194 + 64
_DEFAULT_ITEM = 1024 * 1024  # bytes: memcached's -I by default
_LEAST_LIMIT = 1024  # bytes: memcached's smallest -I; no limit can be smaller
_SMALL_DIVISOR = 16  # a file of up to 1/16 of a chunk lies in its manifest

# Bytes of one round trip, and so of the memory that a transfer takes. If a file only
# just fits in memcached, writes of 8 chunks lose the fewest.
_WRITE_BATCH, _READ_BATCH = 4 * 1024 * 1024, 2 * 1024 * 1024
_PIECE = 64 * 1024  # bytes to read at a time from a source of unknown size
_MAX_CHUNK = 999_999_999  # bytes: memcached's -I ends at 1 GiB
_MAX_CHUNKS = 2**20  # a manifest that names more is damaged

# If active chunks fill the cache, memcached refuses others. Its LRU thread makes room,
# but sleeps for up to a second.
_PATIENCE, _PAUSE = 4.0, 0.1  # seconds to wait for it, and between two tries

_ATTEMPTS = 100  # to change a manifest; one fails only if another writer is quicker
_ASK_AGAIN = 60.0  # seconds until a server that refused `stats` is asked again
_IDLE = 60  # seconds; firewalls forget connections that idle longer
_POLL = 0.05  # seconds between two looks of a `get_or_set` that waits

_RELATIVE_LIMIT = 30 * 24 * 3600  # memcached reads more seconds as an absolute time
_LONG_PAST = _RELATIVE_LIMIT + 1  # a time in 1970; twemproxy refuses -1
_ABSOLUTE_LIMIT = 2**31 - 1  # memcached has 32 bits for a time; later means never
_MAX_EXPIRE = 2**62  # seconds
_NO_TOKEN = b"%d" % (2**64 - 1)  # no item has it, so a `cas` with it changes nothing

_HEADER = struct.Struct(">III")  # of a chunk: index, total, CRC
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_FORMAT = 2
_SEGMENT = re.compile("[0-9a-f]{16}")
_PART_FORM = re.compile("([0-9a-f]{16}):([0-9]{1,7}):([1-9][0-9]{0,8})")

_STORED, _NOT_STORED, _EXISTS = b"STORED", b"NOT_STORED", b"EXISTS"
_NOT_FOUND, _TOUCHED, _DELETED = b"NOT_FOUND", b"TOUCHED", b"DELETED"
_REFUSAL = re.compile(rb"(?i)NOT_STORED|out of memory|object too large")
_NO_CAS = "it runs without cas (-C), which memchunk needs"
_OLD = "it refused a command: it has too many connections, or is older than 1.4.8"
_CLOSED = ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, MemcacheClosed
# What a damaged manifest may raise. A signal's handler must raise other errors.
_BAD_MANIFEST = ValueError, TypeError, LookupError, AttributeError, RecursionError

_log = logging.getLogger("memchunk")
_Bytes = Union[bytes, bytearray, memoryview]
_Expire = Union[int, datetime.timedelta]
_Segments = Sequence[tuple[str, int]]  # keys of segments, and their numbers of chunks
Source = Union[_Bytes, IO[bytes], Iterable[_Bytes], "os.PathLike[str]"]
"""A file to store: bytes-like objects, one or an iterable; a binary file; or a path."""


# --- Errors ---------------------------------------------------------------------------


class MemchunkError(Exception):
    """Root of all errors of this module. `name` is the file's."""

    def __init__(self, message: str, name: str = "", *more: Any) -> None:
        super().__init__(message)
        # Unpickling calls the class with these arguments.
        self.message, self.name, self.args = message, name, (name, *more)

    def __str__(self) -> str:
        return self.message


class InvalidName(MemchunkError, ValueError):
    """The name is empty, longer than 1024 bytes of UTF-8, or has no UTF-8 form."""

    def __init__(self, name: str) -> None:
        text = f"{name!r:.50} is not a text of 1 to {MAX_NAME} UTF-8 bytes"
        super().__init__(text, name)


class CacheMiss(MemchunkError, LookupError):
    """The file is not whole in the cache. Get it from its origin, and store it."""


class FileNotFound(CacheMiss, KeyError, FileNotFoundError):
    """No file has that name. It may have expired, or been evicted whole."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no file named {name!r} is stored", name)


class FileEvicted(CacheMiss):
    """memcached evicted chunks. missing: indices of those that the call asked for."""

    def __init__(self, name: str, info: FileInfo, missing: list[int]) -> None:
        self.info, self.missing = info, missing
        first = ", ".join(map(str, missing[:5])) + (", ..." if missing[5:] else "")
        lost = f"{len(missing)} of its {info.chunks} chunks are gone ({first})"
        super().__init__(f"{name!r} was evicted in part: {lost}", name, info, missing)


class FileExists(MemchunkError, FileExistsError):
    """`add` found a whole file of that name: `info`, a FileInfo."""

    def __init__(self, name: str, info: FileInfo) -> None:
        self.info = info
        super().__init__(f"a file named {name!r} is already stored", name, info)


class FileChanged(MemchunkError):
    """The file is not `version` any more. current: its version, None if it is gone."""

    def __init__(self, name: str, version: str, current: str | None) -> None:
        self.version, self.current = version, current
        now = f"it is version {current}" if current else "it is gone"
        text = f"{name!r} is not version {version} any more: {now}"
        super().__init__(text, name, version, current)


class FileTooLarge(MemchunkError, ValueError):
    """The file has more than `limit` bytes. size: its bytes, or those read so far."""

    def __init__(self, name: str, size: int, limit: int) -> None:
        self.size, self.limit = size, limit
        text = f"{name!r} has {size} bytes or more; the limit is {limit}"
        super().__init__(text, name, size, limit)


class SizeMismatch(MemchunkError, ValueError):
    """The source yielded `received` bytes instead of the announced `size`."""

    def __init__(self, name: str, size: int, received: int) -> None:
        self.size, self.received = size, received
        text = f"{name!r} has {received} bytes instead of {size}"
        super().__init__(text, name, size, received)


class FileCorrupt(MemchunkError):
    """Chunk `index` is damaged, or the manifest if `index` is None. reason: "", or the
    format of a sound manifest that a later memchunk wrote."""

    def __init__(self, name: str, index: int | None, reason: str = "") -> None:
        self.index, self.reason = index, reason
        place = "its manifest" if index is None else f"chunk {index}"
        said = f"can't be read: {reason}" if reason else f"is damaged: {place} is wrong"
        super().__init__(f"{name!r} {said}", name, index, reason)


class CacheFull(MemchunkError):
    """The server would not keep the file. cause: "memory" (-m is less than the file),
    "item size" (-I is too small), "pressure" (other files, or pages for items of other
    sizes, fill the memory; or the lease ended), "contention" (others changed the
    manifest 100 times), or "unknown" (the server does not tell its -m)."""

    def __init__(self, name: str, cause: str, reason: str) -> None:
        self.cause, self.reason = cause, reason
        text = f"memcached would not keep {name!r}: {reason}"
        super().__init__(text, name, cause, reason)


class CacheUnavailable(MemchunkError, ConnectionError):
    """`server` gave no answer, or a wrong one. A write may or may not have happened."""

    def __init__(self, name: str, server: str, reason: str) -> None:
        self.server, self.reason = server, reason
        text = f"memcached at {server} is not available: {reason}"
        super().__init__(text, name, server, reason)


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """The properties of a stored file. size: bytes. chunks: their number, 0 for a small
    file. version: 16 hex digits, unique to one publication. created, expires (None for
    never): Unix time in seconds, by the writer's clock."""

    name: str
    size: int
    chunks: int
    version: str
    created: int
    expires: int | None
    metadata: bytes


class FileCache(contextlib.AbstractContextManager["FileCache"]):
    """Files in memcached.

    client: the address of a server, "host", "host:port", "[ipv6]:port" or "unix:/path",
        or any pymemcache `Client` or `PooledClient`, or a pool of `mcpool.connect`. A
        cache of an address or of mcpool is safe for threads and forks.
    namespace: prefix of every key, 1 to 100 printable ASCII characters, no spaces; a
        client's `key_prefix` counts, too.
    max_size: bytes, the largest file; 50 MiB by default.
    chunk_size: bytes of payload in a chunk; by default the most that the server keeps
        well, by its `stats settings`. Give it if a proxy hides servers with a small -I.
    lease: seconds, 1 to 2,592,000, that chunks live before their file is published; an
        hour by default. No write may take longer. `stage` has a lease of its own.

    Raises ValueError for options and clients that can't work. Every method that takes a
    name may raise InvalidName and CacheUnavailable."""

    def __init__(
        self,
        client: Any,
        *,
        namespace: str = "memchunk2",
        max_size: int = MAX_SIZE,
        chunk_size: int | None = None,
        lease: int = LEASE,
    ) -> None:
        if chunk_size is not None and not 1 <= operator.index(chunk_size) <= _MAX_CHUNK:
            raise ValueError(f"chunk_size is 1 to {_MAX_CHUNK} bytes")
        if operator.index(max_size) < 0:
            raise ValueError("max_size is 0 or more bytes")
        self.namespace, self.max_size, self.lease = namespace, max_size, _lease(lease)
        self._chunk_size = chunk_size and int(chunk_size)
        self._given = client
        self._connect()
        prefix = getattr(self.client, "key_prefix", b"")
        if not re.fullmatch(b"[!-~]{1,100}", prefix + namespace.encode()):
            raise ValueError("namespace is 1 to 100 printable ASCII characters")

    def _connect(self) -> None:
        self.client = _client(self._given)
        self._servers: dict[int, _Server] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "client": None, "_servers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(
        self,
        name: str,
        source: Source,
        *,
        size: int | None = None,
        expire: _Expire = 0,
        metadata: bytes = b"",
        parts: Sequence[str] = (),
    ) -> FileInfo:
        """Store a new file; return its FileInfo.

        source: a bytes-like object, a binary file (read from its position), an iterable
            of bytes-like objects, or the path of a file. Its errors pass through.
        size: bytes of the file, with its parts. More or fewer are a SizeMismatch.
        expire: seconds from now, or a timedelta; 0 for never.
        metadata: up to 65,535 bytes to keep with the file.
        parts: those that `stage` returned; the source is the rest of the file.

        Raises FileExists if a whole file has that name (one that lost chunks is
        replaced); FileTooLarge; SizeMismatch; CacheFull; FileCorrupt for a file of a
        later format; TypeError for text; ValueError for parts of different chunk sizes.
        After an error, nothing new is stored, unless it is CacheUnavailable."""
        return _Write(self, "add", name, parts, size, expire, metadata).run(source)

    def set(
        self,
        name: str,
        source: Source,
        *,
        size: int | None = None,
        expire: _Expire = 0,
        metadata: bytes = b"",
        parts: Sequence[str] = (),
    ) -> FileInfo:
        """Store a file, or replace it. Readers get the old file or the new one, whole,
        or FileEvicted if memory can't hold both. Arguments and errors are those of
        `add`, except FileExists and FileCorrupt."""
        return _Write(self, "set", name, parts, size, expire, metadata).run(source)

    def cas(
        self,
        name: str,
        source: Source,
        version: str,
        *,
        size: int | None = None,
        expire: _Expire = 0,
        metadata: bytes = b"",
        parts: Sequence[str] = (),
    ) -> FileInfo:
        """Check and set: replace the file only if it is `version`. Arguments and errors
        are those of `set`, and FileChanged for another version, FileNotFound for none,
        FileCorrupt for a damaged manifest."""
        if not isinstance(version, str):
            raise TypeError("version is a text, from a FileInfo")
        order = "cas", name, parts, size, expire, metadata, version
        return _Write(self, *order).run(source)

    def stage(
        self, name: str, data: _Bytes, *, parts: Sequence[str] = (), lease: int = LEASE
    ) -> tuple[str, int]:
        """Store the whole chunks in `data` ahead of their file.

        parts: those that earlier calls returned, in order; this call checks them.
        lease: seconds, 1 to 2,592,000, that the new part lives; an hour by default. If
            the server has little memory, earlier parts get it, too.

        Returns the new part, a short text for the `parts` of later calls, and the
        number of bytes that it took, a multiple of the chunk size. Pass the remaining
        bytes to the next call. Raises FileEvicted if chunks of the parts are gone,
        FileTooLarge, CacheFull, and ValueError for parts of different chunk sizes."""
        return _Write(self, "stage", name, parts, lease=_lease(lease)).stage(data)

    def unstage(self, name: str, parts: Sequence[str]) -> None:
        """Delete parts, except those of the published file. If a write may still
        publish them, don't call it, or the new file loses its chunks."""
        entry = self._entry(name)
        entry.delete_segments(_parsed(parts)[0], entry.lookup().segments)

    def get(self, name: str) -> bytes:
        """The whole file, verified. Raises FileNotFound, FileEvicted, FileCorrupt;
        FileTooLarge if a cache with another `max_size` wrote it; FileChanged if writers
        replaced it in each of 100 tries."""
        for _ in range(_ATTEMPTS):
            with self.open(name) as file, contextlib.suppress(FileChanged):
                if file.info.size > self.max_size:
                    raise FileTooLarge(name, file.info.size, self.max_size)
                return file.readall()
        raise FileChanged(name, file.info.version, self.stat(name).version)

    def get_or_set(
        self,
        name: str,
        make: Callable[[], bytes],
        *,
        expire: _Expire = 0,
        metadata: bytes = b"",
        lock: int = 60,
    ) -> bytes:
        """The file, or else the bytes that `make()` returns, which become the file. One
        caller at a time runs `make`. The others wait for the file, for up to `lock`
        seconds, and then run it, too. All get the bytes, even if the cache is down or
        full, or the file is damaged. Raises FileTooLarge, and the errors of `make`."""
        # This refuses bad options, so it comes before `make` does its work.
        write = _Write(self, "set", name, (), None, expire, metadata)
        return self._get_or_make(write, make, _lease(lock))

    def _get_or_make(self, write: _Write, make: Any, lock: int) -> bytes:
        end, is_ours = time.monotonic() + lock, False
        try:
            with contextlib.suppress(CacheUnavailable, CacheFull):
                while True:
                    with contextlib.suppress(CacheMiss, FileCorrupt, FileChanged):
                        return self.get(write.name)
                    if is_ours or (now := time.monotonic()) >= end:
                        break
                    # If we get it, look again. The last owner may have made the file.
                    if is_ours := write.entry.take_lock(lock):
                        end = now + lock
            data: bytes = make()
            with contextlib.suppress(CacheUnavailable, CacheFull):
                write.run(memoryview(data))  # a TypeError if it is not bytes-like
            return data
        finally:
            if is_ours and time.monotonic() < end:  # else it may be another's
                write.entry.delete([write.entry.lock])

    def open(self, name: str) -> CachedFile:
        """The present version, as a binary stream. Raises FileNotFound, FileCorrupt."""
        return CachedFile(self, self._entry(name).lookup().require())

    def stat(self, name: str) -> FileInfo:
        """What the manifest says; chunks may be gone. Raises like `open`."""
        return self._entry(name).lookup().require().info

    def __contains__(self, name: str) -> bool:
        """Whether the whole file is there. Fetches no chunk, and changes nothing."""
        entry, before = self._entry(name), None
        while (found := entry.lookup()).value not in (None, before):
            if entry.is_whole(found):
                return True
            # A writer may have replaced the file, and deleted the chunks asked for.
            before = found.value
        return False

    def touch(self, name: str, expire: _Expire) -> FileInfo:
        """Give the file a new time to live: seconds from now, a timedelta, or 0 for no
        end. Raises FileNotFound, FileEvicted, FileCorrupt, CacheFull. If it raises,
        chunks may have no expiry, until a later call succeeds."""
        entry, seconds = self._entry(name), _seconds(expire)
        for _ in range(_ATTEMPTS):
            found, now = entry.lookup(), int(time.time())
            old, keys = found.require(), entry.keys(found.segments)
            new = dataclasses.replace(old, expires=now + seconds if seconds else None)
            # If chunks are missing, nothing changes. Else all lose their expiry for a
            # moment, because they must outlive the old and the new manifest.
            if missing := entry.missing(keys) or entry.touch(keys, 0):
                with contextlib.suppress(FileChanged):  # then touch the present version
                    entry.explain(old.info, missing)
            elif entry.replace(found, new, entry.exptimes(seconds)[0]):
                entry.end_chunks(found.segments, seconds, new)
                return new.info
        raise entry.contention()

    def delete(self, name: str, version: str | None = None) -> None:
        """Delete the file, whole or not; with `version`, only that version. Raises
        FileNotFound; CacheFull after 100 tries; with `version`, FileChanged for
        another, FileCorrupt for a damaged manifest."""
        entry = self._entry(name)
        for _ in range(_ATTEMPTS):
            found = entry.lookup()
            if found.value is None or version is not None:
                found.require(version)
            # No command deletes conditionally, but a `cas` can store an expired item.
            if entry.replace(found, None, _LONG_PAST):
                entry.delete(entry.keys(found.segments))
                return
        raise entry.contention()

    def ping(self) -> None:
        """Return if every server answers, else raise CacheUnavailable."""
        key = self._entry("ping").key  # first, as it connects anew after a fork
        for client in getattr(self.client, "servers", {"": self.client}).values():
            server = self._servers.setdefault(id(client), _Server(client))
            _Entry(server, "", key).lookup()

    def close(self) -> None:
        """Close the client's connections. The next call opens new ones."""
        self.client.close()

    def _entry(self, name: str) -> _Entry:
        """The items of a file. Raises InvalidName."""
        encoded = name.encode(errors="ignore") if isinstance(name, str) else b""
        if not 1 <= len(encoded) <= MAX_NAME or encoded.decode() != name:
            raise InvalidName(name)
        # A child must not talk on its parent's connections: replies would get mixed.
        if self._pid != os.getpid() and isinstance(self._given, str):
            self._connect()
        # Proxies that hash only the text in braces, or before "|#|", keep a file on one
        # server. No part of a name enters a key.
        key = f"{self.namespace}:{{{hashlib.sha256(encoded).hexdigest()}}}"
        for_key = getattr(self.client, "for_key", None)
        client = for_key(key) if for_key else self.client
        return _Entry(self._servers.setdefault(id(client), _Server(client)), name, key)


# --- The stored format ----------------------------------------------------------------


def _chunk(key: str, index: int, total: int, *body: Any) -> tuple[Any, ...]:
    """A chunk's value: header, payload and padding, as pieces, which saves a copy.
    The CRC covers the key, too, so that a sound chunk in a wrong place is damage."""
    crc = zlib.crc32(key.encode(), zlib.crc32(_HEADER.pack(index, total, 0)[:8]))
    for part in body:
        crc = zlib.crc32(part, crc)
    return _HEADER.pack(index, total, crc), *body


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """A file's manifest. data: the file itself, if it is small."""

    name: str
    size: int
    chunk_size: int
    created: int
    expires: int | None
    metadata: bytes
    segments: _Segments
    data: bytes = b""

    @property
    def info(self) -> FileInfo:
        chunks, version = sum(count for _, count in self.segments), self.segments[-1][0]
        about = self.name, self.size, chunks, version, self.created, self.expires
        return FileInfo(*about, self.metadata)

    def pack(self) -> bytes:
        """The manifest's value: the CRC of the rest, a line of JSON, metadata, data."""
        fields = {"format": _FORMAT, **vars(self), "metadata": len(self.metadata)}
        del fields["data"]
        line = _JSON.encode(fields).encode()
        body = b"".join((line, b"\n", self.metadata, self.data))
        return zlib.crc32(body).to_bytes(4, "big") + body

    @classmethod
    def unpack(cls, name: str, value: Any) -> _Manifest:
        """Raises FileCorrupt unless `value` is a manifest of the file `name`."""
        try:
            seal, body = bytes(value[:4]), bytes(value[4:])
            if seal != zlib.crc32(body).to_bytes(4, "big"):
                raise ValueError("the CRC is wrong")
            line, _, rest = body.partition(b"\n")
            fields = json.loads(line.decode())
            if (number := fields.pop("format")) != _FORMAT:
                raise FileCorrupt(name, None, f"its format {number} is unknown")
            length = fields.pop("metadata")
            fields["segments"] = [tuple(each) for each in fields["segments"]]
            found = cls(**fields, metadata=rest[:length], data=rest[length:])
            found._validate(name)
            return found
        except _BAD_MANIFEST as error:
            raise FileCorrupt(name, None) from error

    def _validate(self, name: str) -> None:
        """Raises ValueError or TypeError for fields that no writer writes. They would
        go into keys, and into the loops of a read."""
        keys, counts = zip(*self.segments)
        numbers = self.size, self.chunk_size, self.created, self.expires or 0, *counts
        if not (
            self.name == name
            and all(type(number) is int and number >= 0 for number in numbers)
            and all(map(_SEGMENT.fullmatch, keys))
            and len(set(keys)) == len(keys)
            and 0 < self.chunk_size <= _MAX_CHUNK
            and sum(counts) <= _MAX_CHUNKS
            and sum(counts) == -(-(self.size - len(self.data)) // self.chunk_size)
            and len(self.data) in (0, self.size)
        ):
            raise ValueError("the manifest contradicts itself")


def _parsed(parts: Sequence[str]) -> tuple[_Segments, int]:
    """Segments and chunk size of an upload's parts, 0 if there are none. Raises
    ValueError for parts that don't belong together."""
    matches = filter(None, map(_PART_FORM.fullmatch, parts))
    found = [(each[1], int(each[2]), int(each[3])) for each in matches]
    sizes, keys = {size for _, _, size in found}, {key for key, _, _ in found}
    if len(keys) != len(parts) or len(sizes) > 1:
        raise ValueError("parts must come from `stage`, for one upload")
    return [(key, count) for key, count, _ in found if count], max(sizes, default=0)


# --- Writing --------------------------------------------------------------------------


@dataclasses.dataclass
class _Write:
    """One `add`, `set`, `cas` or `stage`. Its chunks are a segment, behind those that
    were staged. Only it writes their keys, so the bytes of two writers can't mix."""

    cache: FileCache
    verb: str
    name: str
    parts: Sequence[str]
    size: int | None = None  # bytes of the whole file, as announced
    expire: Any = 0
    metadata: Any = b""
    version: str | None = None
    lease: int = 0

    count: int = 0  # chunks, also those not sent yet, so that all can be deleted
    total: int = 0  # chunks that the segment will have, 0 if that is not known
    data: bytes = b""  # the file, if it is small
    may_appear: bool = False  # whether the file's manifest was sent

    def __post_init__(self) -> None:
        self.entry, self.key = self.cache._entry(self.name), secrets.token_hex(8)
        self.staged, self.chunk_size = _parsed(self.parts)
        first = sum(count for _, count in self.staged)  # our first chunk's number
        self.length = first * self.chunk_size  # bytes of the file so far
        self.size = None if self.size is None else operator.index(self.size)
        self.expire, self.lease = _seconds(self.expire), self.lease or self.cache.lease
        self.metadata = bytes(memoryview(self.metadata))
        if len(self.metadata) > MAX_METADATA:
            raise ValueError(f"metadata is limited to {MAX_METADATA} bytes")

    def run(self, source: Any) -> FileInfo:
        is_path = isinstance(source, os.PathLike)
        with open(source, "rb") if is_path else contextlib.nullcontext(source) as file:
            return self._store(file)

    def _store(self, source: Any) -> FileInfo:
        # 1. Look up the manifest. Refuse early, before a byte of payload is sent.
        found = self._begin(_known_size(source))
        with self._deleted_on_error():
            # 2. Store the chunks on a lease. A short last batch waits for step 3.
            last = self._send(_batches(source, self.batch_size), found)
            manifest = self._manifest()
            for attempt in range(_ATTEMPTS):
                # After a restart, an old token may fit a file that only `set` replaces.
                if attempt or (self.verb != "set" and found.value is not None):
                    found = self._look_up()
                # 3. Touch every chunk, which proves that each is still there.
                end, last = self._settle(last), []
                # 4. Publish. If the reply gets lost, the file may yet appear.
                self.may_appear = True
                if self.entry.replace(found, manifest, end):
                    break
                self.may_appear = False
            else:
                raise self.entry.contention()
        with contextlib.suppress(CacheUnavailable, CacheFull):
            self.entry.end_chunks(self.staged, self.expire, manifest)
        # 5. Delete the old file's chunks, except those that the new one has, too.
        self.entry.delete_segments(found.segments, self.staged)
        return manifest.info

    def _begin(self, known: int | None) -> _Found:
        """Step 1, for a source of `known` bytes, None if its length is unknown."""
        if known is not None:
            known += self.length
            if self.size not in (None, known):
                raise SizeMismatch(self.name, self.size or 0, known)
            self.size = known
        found = self._look_up()
        self._plan(self.cache.max_size if self.size is None else self.size)
        self._check(length := max(self.size or 0, self.length))
        self.total = -(-(length - self.length) // self.chunk_size)
        largest, around = self.entry.server.item_size_max, self.inline_limit + _AROUND
        if largest < _DEFAULT_ITEM and len(self._manifest().pack()) + around > largest:
            raise self.entry.cache_full(0, "its manifest is too large")
        return found

    def _look_up(self) -> _Found:
        """The present manifest. Raises an error if it forbids the write."""
        found, verb = self.entry.lookup(), self.verb
        if verb == "cas":
            found.require(self.version)
        elif verb == "add" and found.damage and found.damage.reason:
            raise found.damage  # a later memchunk can read this file
        elif verb == "add" and found.manifest and self.entry.is_whole(found):
            raise FileExists(self.name, found.manifest.info)
        return found

    def _plan(self, size: int) -> None:
        """Decide how to cut a file of up to `size` bytes."""
        self.entry.ask_limits()
        server = self.entry.server
        item = min(server.item_size_max, server.slab_chunk_max, _LARGEST_ITEM)
        self.memory = server.maxbytes
        self.inline_limit = (self.cache._chunk_size or item) // _SMALL_DIVISOR
        if not self.chunk_size:
            self.chunk_size = self.cache._chunk_size or item - _HEADER.size - _AROUND
        self.batch_size = self.chunk_size * max(1, _WRITE_BATCH // self.chunk_size)
        # Whether the file takes more than half of the memory.
        self.is_tight = 2 * size > self.memory

    def _check(self, length: int) -> None:
        """Raise if `length` bytes of the file are too many."""
        limit = min(self.cache.max_size, self.chunk_size * _MAX_CHUNKS)
        if length > limit:
            raise FileTooLarge(self.name, length, limit)
        if self.size is not None and length > self.size:
            raise SizeMismatch(self.name, self.size, length)
        if length > self.memory:
            raise self.entry.cache_full(length)

    def _send(self, batches: Iterable[memoryview], old: _Found) -> list[_Command]:
        """Store all chunks, except those of a short last batch, which it returns."""
        chunks: list[_Command] = []
        for batch in batches:
            self.length += len(batch)
            self._check(self.length)
            # If memory can't hold both files, and 1/8 for items of other sizes, the old
            # file goes. Else memcached evicts some chunks of either, at random.
            if old.manifest and old.manifest.size + self.length > self.memory * 7 / 8:
                old = self._look_up()  # another may have reused chunks meanwhile
                self.entry.delete_segments(old.segments, self.staged)
                old = old._replace(manifest=None)
            is_last = len(batch) < self.batch_size
            if is_last and len(batch) == self.length <= self.inline_limit:
                self.data = bytes(batch)
                continue
            if is_last and not self.count:  # it is the only batch
                self.total = -(-len(batch) // self.chunk_size)
            chunks = list(self._commands(batch))
            if self.is_tight or not is_last:
                self._keep(chunks)
                chunks = []
        if self.size not in (None, self.length):
            raise SizeMismatch(self.name, self.size or 0, self.length)
        return chunks

    def _commands(self, batch: memoryview) -> Iterator[_Command]:
        """The commands that store a batch."""
        # All chunks of a file have one length, unless there is only one.
        is_alone = self.total == 1 and not self.staged
        for payload in _slices(batch, self.chunk_size):
            padding = bytes(0 if is_alone else self.chunk_size - len(payload))
            key = self.entry.chunk_key(self.key, self.count)
            body = self.total, payload, padding
            make = functools.partial(_chunk, key, self.count, *body)
            self.count += 1
            yield _Command("set", key, self.lease, make)

    def _keep(self, chunks: list[_Command]) -> None:
        """Store chunks on the lease. Raises CacheFull.
        A full cache evicts new chunks first, unless two touches make them active in its
        LRU. If every write did so, a large cache would lose an eighth of its files."""
        if not self.is_tight and not self.entry.refusal(self.entry.run(chunks)):
            return  # memory is not tight, and they are stored
        self.is_tight = True  # for later batches, too
        width, deadline = len(chunks), time.monotonic() + _PATIENCE
        while chunks:
            batch, later = chunks[:width], chunks[width:]
            touches = [_Command("touch", chunk.key, self.lease) for chunk in batch] * 2
            replies, count = self.entry.run([*batch, *touches]), len(batch)
            refusal = self.entry.refusal(replies[:count])
            self.entry.expect(replies[count:], _TOUCHED, _NOT_FOUND)
            second = replies[-count:]  # a chunk that this touch does not find is lost
            lost = [chunk for chunk, said in zip(batch, second) if said != _TOUCHED]
            chunks = lost + later
            if lost and (time.monotonic() > deadline or "too large" in refusal):
                raise self._cache_full(len(chunks), refusal)
            if lost:  # each try may evict an earlier chunk: try one at a time
                width = 1
                time.sleep(_PAUSE)

    def _settle(self, last: list[_Command]) -> int:
        """Store the last chunks. Give all their final expiry; return the manifest's.
        Raises CacheFull if one is gone: a server with little memory says STORED, but
        evicts the first chunks while the last arrive."""
        end, chunks_end = self.entry.exptimes(self.expire)
        keys = self.entry.keys([*self.staged, (self.key, self.count)])
        touches = [_Command("touch", key, chunks_end) for key in keys]
        replies, count = self.entry.run([*last, *touches]), len(last)
        if self.entry.refusal(replies[:count]):
            self._keep(last)
            return self._settle([])  # now only the touches
        self.entry.expect(replies[count:], _TOUCHED, _NOT_FOUND)
        if missing := replies[count:].count(_NOT_FOUND):
            raise self._cache_full(missing)
        return end

    def _cache_full(self, missing: int, said: str = "") -> CacheFull:
        """The error if the server refused chunks, or `missing` of them are gone."""
        said = said or f"{missing} chunks are gone: evicted, or past their lease"
        return self.entry.cache_full(max(self.length, self.size or 0), said)

    def _manifest(self) -> _Manifest:
        now, expire = int(time.time()), self.expire
        about = self.chunk_size, now, now + expire if expire else None, self.metadata
        # The last segment is the version, also of a file without chunks of its own.
        segments = [*self.staged, (self.key, self.count)]
        return _Manifest(self.name, self.length, *about, segments, self.data)

    @contextlib.contextmanager
    def _deleted_on_error(self) -> Iterator[None]:
        """An error deletes the segment, unless the file may yet appear. After CacheFull
        it can't. After an exception that is no Exception, such as Ctrl-C, nothing is
        sent, because the server may be at work. Chunks expire."""
        try:
            yield
        except Exception as error:
            is_own = os.getpid() == self.entry.pid  # else they are the parent's chunks
            if is_own and (not self.may_appear or isinstance(error, CacheFull)):
                self.entry.delete(self.entry.keys([(self.key, self.count)]))
            raise

    def stage(self, given: _Bytes) -> tuple[str, int]:
        data = _view(given)
        self._plan(self.cache.max_size)
        self._check(self.length + len(data))
        if missing := self._missing_parts():
            raise FileEvicted(self.name, self._manifest().info, missing)
        taken = len(data) - len(data) % self.chunk_size
        self.total = taken // self.chunk_size
        with self._deleted_on_error():
            for batch in _slices(data[:taken], self.batch_size):
                self._keep(list(self._commands(batch)))
        return f"{self.key}:{self.count}:{self.chunk_size}", taken

    def _missing_parts(self) -> list[int]:
        """The indices of the parts' chunks that are gone. If memory is tight, two
        touches make the others active."""
        keys = self.entry.keys(self.staged)
        if not keys or not self.is_tight or self._are_published():
            return self.entry.missing(keys)
        self.entry.touch(keys, self.lease)
        missing = self.entry.touch(keys, self.lease)
        if self._are_published():  # then the lease replaced their final expiry
            self.entry.touch(keys, 0)
        return missing

    def _are_published(self) -> bool:
        return bool(set(self.staged).intersection(self.entry.lookup().segments))


# --- Reading --------------------------------------------------------------------------


class CachedFile(io.RawIOBase):
    """One version of a file, as a readable and seekable binary stream. It fetches only
    the chunks that are read. For lines, wrap it in an `io.BufferedReader`. Reading
    raises FileEvicted, FileCorrupt, and FileChanged if the file was replaced or deleted
    since `open` and its chunks are gone."""

    def __init__(self, cache: FileCache, manifest: _Manifest) -> None:
        super().__init__()
        self.info, self._cache, self._manifest = manifest.info, cache, manifest
        entry = cache._entry(self.info.name)
        self._chunks = [  # key, index in the segment, number of chunks in the segment
            (entry.chunk_key(key, index), index, count)
            for key, count in manifest.segments
            for index in range(count)
        ]
        self._chunk_size = manifest.chunk_size if self._chunks else self.info.size or 1
        self._position = 0
        # The chunk that was read last, and its number. A small file is always held.
        self._held = -1 if self._chunks else 0, memoryview(manifest.data)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes from `start` to `stop`, as in a slice, in verified, read-only
        buffers. A buffer stays valid as long as the caller keeps it. Holds 2 MiB of
        them at a time, and leaves the stream's position alone."""
        start, stop, _ = slice(start, stop).indices(self.info.size)
        size = self._chunk_size
        numbers = range(start // size, -(-stop // size) if start < stop else 0)
        for batch in _slices(numbers, max(1, _READ_BATCH // size)):
            for number, payload in self._payloads(batch):
                first, last = max(start - number * size, 0), stop - number * size
                yield payload[first:last]

    def _payloads(self, numbers: range) -> Iterator[tuple[int, memoryview]]:
        """The numbers and verified payloads of chunks, fetched in one round trip."""
        held = self._held  # once, because another thread may set it
        keys = {each: self._chunks[each][0] for each in numbers if each != held[0]}
        entry, wanted = self._cache._entry(self.info.name), list(keys.values())
        found = dict(entry.ask(lambda client: client.get_many(wanted)) if keys else {})
        if missing := [number for number, key in keys.items() if key not in found]:
            entry.explain(self.info, missing)
        for number in numbers:
            if number in keys:
                payload = self._verified(number, found.pop(keys[number]))
                self._held = number, payload
                yield number, payload
            else:
                yield held

    def _verified(self, number: int, value: bytes) -> memoryview:
        """The payload of a chunk. Raises FileCorrupt."""
        (key, index, count), start = self._chunks[number], _HEADER.size
        size = min(self._chunk_size, self.info.size - number * self._chunk_size)
        # Only a chunk that is alone has no padding.
        if len(value) == start + (self._chunk_size if len(self._chunks) > 1 else size):
            total, body = _HEADER.unpack_from(value)[1], memoryview(value)[start:]
            expected = _chunk(key, index, total, body)[0]
            if value[:start] == expected and total in (count, 0):
                return body[:size]
        raise FileCorrupt(self.info.name, number)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, or less of it at the end of the file. Returns the number."""
        self._checkClosed()
        filled = 0
        with memoryview(buffer).cast("B") as target:
            for piece in self.chunks(self._position, self._position + len(target)):
                end = filled + len(piece)
                target[filled:end] = piece
                filled = end
        self._position += filled
        return filled

    def readall(self) -> bytes:
        self._checkClosed()
        end = max(self._position, self.info.size)
        # These zero bytes take memory when they are written to, and `getvalue` does not
        # copy them. So the file is in memory once.
        output = io.BytesIO(bytes(end - self._position))
        output.writelines(self.chunks(self._position))
        self._position = end
        return output.getvalue()

    def readable(self) -> bool:
        self._checkClosed()
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._checkClosed()
        origin = {0: 0, 1: self._position, 2: self.info.size}.get(whence, -1)
        if origin < 0 or origin + operator.index(offset) < 0:
            raise io.UnsupportedOperation(f"can't seek to {offset} from {whence}")
        self._position = origin + offset
        return self._position


# --- The items of one file, and the commands for them ---------------------------------


class _Found(NamedTuple):
    """A look at the key of a manifest. value: None if there is none. damage: the error
    if that is no manifest. token: for memcached's `cas`."""

    name: str
    value: Any = None
    token: Any = None
    manifest: _Manifest | None = None
    segments: _Segments = ()
    damage: FileCorrupt | None = None

    def require(self, version: str | None = None) -> _Manifest:
        """Raises FileNotFound, FileCorrupt; FileChanged unless it is `version`."""
        if self.damage:
            raise self.damage
        if self.manifest is None:
            raise FileNotFound(self.name)
        current = self.manifest.info.version
        if version not in (None, current):
            raise FileChanged(self.name, version or "", current)
        return self.manifest


class _Entry:
    """The items of one file on its server: a manifest, its chunks, and a lock."""

    def __init__(self, server: _Server, name: str, key: str) -> None:
        self.server, self.client, self.name, self.key = server, server.client, name, key
        self.lock, self.pid = f"{key}|#|lock", os.getpid()  # the lock of `get_or_set`
        self.pipelines = hasattr(self.client, "pipeline")

    def chunk_key(self, segment: str, index: int) -> str:
        return f"{self.key}|#|{segment}:{index}"

    def keys(self, segments: _Segments) -> list[str]:
        """The keys of the chunks in segments, in order."""
        pairs = ((key, index) for key, count in segments for index in range(count))
        return [self.chunk_key(*pair) for pair in pairs]

    def lookup(self) -> _Found:
        """Look at the manifest."""
        value, token = self.ask(lambda client: client.gets(self.key))
        if value is None:
            return _Found(self.name)
        if token == b"0":
            raise self.unavailable(_NO_CAS)
        try:
            manifest = _Manifest.unpack(self.name, value)
            return _Found(self.name, value, token, manifest, manifest.segments)
        except FileCorrupt as error:
            return _Found(self.name, value, token, damage=error)

    def replace(self, found: _Found, new: _Manifest | None, exptime: int) -> bool:
        """Put a manifest, or nothing (an empty one), in the place of the one that was
        found: the one atomic step. False: another was quicker. Raises CacheFull, and
        CacheUnavailable if nobody knows the outcome."""
        verb, data = "add" if found.value is None else "cas", new.pack() if new else b""
        put = _Command(verb, self.key, exptime, lambda: (data,), found.token)
        # mcpool reconnects. A restarted server lets `add` succeed, so ask for a chunk.
        keys = self.keys(new.segments)[-1:] if new and verb == "add" else []
        asks = [_Command("cas", key, token=_NO_TOKEN) for key in keys if self.pipelines]
        try:
            reply, *answers = self.run([put, *asks], again=False)
        except CacheUnavailable:
            # The reply was lost. Look once for the new state.
            if self.lookup().value != (data or None):
                raise
            reply, answers = _STORED, self.run(asks)
        if _NOT_FOUND in answers and self.lookup().value == data:
            raise self.cache_full(0, "chunks are gone: evicted, or lost in a restart")
        # Of replicas behind a proxy, one may store the manifest while another refuses
        # it. So look, whatever the reply says.
        if reply == _STORED or (data and self.lookup().value == data):
            return True
        self.expect([reply], _NOT_STORED, _EXISTS, _NOT_FOUND)
        return False

    def touch(self, keys: Sequence[str], exptime: int) -> list[int]:
        """Set the expiry of chunks; return the positions of the keys that are gone."""
        return self._absent([_Command("touch", key, exptime) for key in keys], _TOUCHED)

    def end_chunks(self, segments: _Segments, seconds: int, new: _Manifest) -> None:
        """Give chunks of a manifest that was just published their final expiry. A
        `stage` of parts may have put them on its lease a moment before."""
        keys = self.keys(segments)
        self.touch(keys, self.exptimes(seconds)[1])
        # Another touch may have come in between, with a later end.
        if keys and self.lookup().manifest not in (None, new):
            self.touch(keys, 0)

    def missing(self, keys: Sequence[str]) -> list[int]:
        """The positions of the keys that are gone. A `cas` that can't succeed asks for
        them. Every proxy knows it, and it neither reads nor changes a chunk."""
        commands = [_Command("cas", key, token=_NO_TOKEN) for key in keys]
        return self._absent(commands, _EXISTS)

    def is_whole(self, found: _Found) -> bool:
        """Whether all chunks of the file are there."""
        return bool(found.manifest) and not self.missing(self.keys(found.segments))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete items that nobody needs. Nothing depends on it, so a failure is no
        error. But nobody else will delete them, so it is tried twice."""
        for _ in range(2):
            with contextlib.suppress(CacheUnavailable, CacheFull):
                replies = self.run([_Command("delete", key) for key in keys])
                self.expect(replies, _DELETED, _NOT_FOUND)
                return

    def delete_segments(self, old: _Segments, kept: _Segments) -> None:
        """Delete the chunks of old segments, except those that are kept."""
        self.delete(self.keys([each for each in old if each[0] not in dict(kept)]))

    def take_lock(self, seconds: int) -> bool:
        """Take the lock of `get_or_set`, or wait a moment if another has it."""
        # memcached's clock ticks once a second, so an item may end a second early.
        exptime = min(seconds + 1, _RELATIVE_LIMIT)
        add = _Command("add", self.lock, exptime, lambda: (b"1",))
        replies = self.run([add], again=False)
        self.expect(replies, _STORED, _NOT_STORED)
        time.sleep(0 if _STORED in replies else _POLL)
        return _STORED in replies

    def explain(self, info: FileInfo, missing: list[int]) -> NoReturn:
        """Raise FileChanged, FileEvicted or FileCorrupt for chunks that are gone."""
        found = self.lookup()
        if found.value is None:
            raise FileChanged(self.name, info.version, None)
        found.require(info.version)
        raise FileEvicted(self.name, info, missing)

    def exptimes(self, expire: int) -> tuple[int, int]:
        """The times to tell memcached so that a manifest ends in `expire` seconds and
        its chunks a little later. Both are relative, or both are absolute."""
        end = expire + (int(time.time()) if expire + _SLACK > _RELATIVE_LIMIT else 0)
        is_endless = not expire or end + _SLACK > _ABSOLUTE_LIMIT
        return (0, 0) if is_endless else (end, end + _SLACK)

    def ask_limits(self) -> None:
        """Have the server tell its limits, unless it told or refused them before."""
        if time.monotonic() < self.server.ask_at:
            return
        told: dict[bytes, Any] = {}
        try:
            told = self.ask(lambda client: client.stats("settings"))
        except CacheUnavailable:
            if self.server.is_down:
                raise
        if told.get(b"cas_enabled") == b"no":
            raise self.unavailable(_NO_CAS)
        if told.get(b"proxy_enabled") == b"yes":
            told.pop(b"maxbytes", None)  # it is the proxy's own, not its servers'
        for name in ("item_size_max", "slab_chunk_max", "maxbytes"):
            with contextlib.suppress(ValueError, TypeError):
                number = int(told.get(name.encode(), 0))
                if number >= _LEAST_LIMIT:
                    setattr(self.server, name, number)
        # Some servers close the connection at this command, so it is sent rarely.
        self.server.ask_at = math.inf if told else time.monotonic() + _ASK_AGAIN

    def cache_full(self, size: int, said: str = "") -> CacheFull:
        """The error for a file of `size` bytes, which the server would not keep. said:
        its words, or another symptom."""
        server = self.server
        if server.ask_at == math.inf:  # it told its limits, but a restart changes them
            server.ask_at = 0.0
        with contextlib.suppress(CacheUnavailable):
            self.ask_limits()
        memory, is_known = server.maxbytes, server.maxbytes < math.inf
        cause = "memory" if size > memory else "pressure" if is_known else "unknown"
        cause = "item size" if "too large" in said else cause
        has = f"{memory} bytes of memory (-m)" if is_known else "an unknown memory"
        has += f", and items of up to {server.item_size_max} bytes (-I)"
        said = said or f"it takes {size} bytes"
        return CacheFull(self.name, cause, f"{said}; the server has {has}")

    def contention(self) -> CacheFull:
        text = f"other writers changed the manifest {_ATTEMPTS} times"
        return CacheFull(self.name, "contention", text)

    def unavailable(self, reason: str) -> CacheUnavailable:
        return CacheUnavailable(self.name, self.server.address, reason)

    def run(self, commands: list[_Command], again: bool = True) -> list[bytes]:
        """Do commands; return their replies. A client with `pipeline`, as of mcpool,
        gets them in one go. Others get them one by one: pymemcache's `set_many` stops
        at the first refusal, while the server goes on to store what is behind it."""
        if not commands or not self.pipelines:
            return [self.ask(command.call, again) for command in commands]
        return list(self.ask(lambda c: c.pipeline(map(_Command.wire, commands)), again))

    def ask(self, command: Callable[[Any], Any], again: bool = True) -> Any:
        """Have the client do a command. Its errors become CacheUnavailable. again: if
        the server has closed the connection, repeat. A restart closes all of a pool."""
        if os.getpid() != self.pid:  # two processes would write the same keys
            raise RuntimeError("the process was forked during a call")
        pool = getattr(self.client, "client_pool", None)
        retries = (1 + len(getattr(pool, "free", ()))) if again else 0
        while True:
            try:
                result = command(self.client)
                self.server.note(None)
                return result
            except (OSError, MemcacheError, ValueError, LookupError) as error:
                retries -= 1
                if retries < 0 or not isinstance(error, _CLOSED):
                    self.server.note(error)
                    said = f"{type(error).__name__}: {error}".strip(": ")
                    said = _OLD if isinstance(error, MemcacheUnknown) else said
                    raise self.unavailable(said) from error
            except BaseException as error:
                # Close the connection, or the next command reads the rest of this
                # reply. After an Exception pymemcache's Client does so itself.
                if not isinstance(error, Exception) and isinstance(self.client, Client):
                    self.client.close()
                raise

    def _absent(self, commands: list[_Command], there: bytes) -> list[int]:
        """The positions of NOT_FOUND in the replies. The others must say `there`."""
        replies = self.run(commands)
        self.expect(replies, there, _NOT_FOUND)
        return [at for at, reply in enumerate(replies) if reply == _NOT_FOUND]

    def refusal(self, replies: list[bytes]) -> str:
        """The server's words if it refused a chunk, else ""."""
        refusals = list(filter(_REFUSAL.search, replies))
        self.expect({*replies} - {*refusals}, _STORED)
        return refusals[0].decode() if refusals else ""

    def expect(self, replies: Iterable[bytes], *allowed: bytes) -> None:
        """Raise for a reply that is not allowed. It is an error, not a "no"."""
        for reply in set(replies).difference(allowed):
            if _REFUSAL.search(reply):
                raise self.cache_full(0, reply.decode())
            said = f"it said {reply[:64]!r}"
            raise self.unavailable(_OLD if reply == b"ERROR" else said)


class _Command(NamedTuple):
    """A command of memcached for one key, with a one-line reply. value: a function that
    makes the value, in pieces. So a CRC is computed while the chunk before travels."""

    verb: str
    key: str
    exptime: int = 0
    value: Callable[[], tuple[Any, ...]] = tuple
    token: bytes | None = None

    def wire(self) -> tuple[Any, ...]:
        """The command as a pool with `pipeline` sends it, in parts."""
        if self.verb in ("touch", "delete"):
            end = f" {self.exptime}" if self.verb == "touch" else ""
            return (f"{self.verb} {self.key}{end}\r\n".encode(),)
        parts = self.value()
        head = f"{self.verb} {self.key} 0 {self.exptime} {sum(map(len, parts))}"
        token = b"" if self.token is None else b" " + self.token
        return head.encode() + token + b"\r\n", *parts, b"\r\n"

    def call(self, client: Any) -> bytes:
        """Have any pymemcache client do it; return the reply of memcached."""
        key, options = self.key, {"expire": self.exptime, "noreply": False}
        value = b"".join(self.value())
        try:
            if self.verb == "touch":
                return _TOUCHED if client.touch(key, **options) else _NOT_FOUND
            if self.verb == "set":  # the method `set` is always True
                refused = client.set_many({key: value}, **options)
                return _NOT_STORED if refused else _STORED
            if self.verb == "add":
                return _STORED if client.add(key, value, **options) else _NOT_STORED
            if self.verb == "cas":
                done = client.cas(key, value, self.token, **options)
                return {True: _STORED, None: _NOT_FOUND}.get(done, _EXISTS)
            client.delete_many([key], noreply=False)
            return _DELETED
        except MemcacheClosed:  # a MemcacheServerError, too, but no reply
            raise
        except MemcacheServerError as error:
            said = error.args[0] if error.args else b""
            return b"SERVER_ERROR " + (said if isinstance(said, bytes) else b"")


# --- The client -----------------------------------------------------------------------


@dataclasses.dataclass
class _Server:
    """One memcached behind a client, and what it told by `stats settings`."""

    client: Any
    item_size_max: int = _DEFAULT_ITEM  # bytes of the largest item
    slab_chunk_max: int = _LARGEST_ITEM  # bytes of the largest that is in one piece
    maxbytes: float = math.inf  # of its memory, infinite if unknown
    ask_at: float = -math.inf  # when to ask for these, by the monotonic clock
    is_down: bool = False

    @property
    def address(self) -> str:
        server = getattr(self.client, "server", None) or "an unknown address"
        return ":".join(map(str, server)) if isinstance(server, tuple) else str(server)

    def note(self, error: Exception | None) -> None:
        """Log once that the server stops answering, and once that it answers again."""
        if error and (isinstance(error, _CLOSED) or not isinstance(error, OSError)):
            return  # no outage: some servers close after a command that they refuse
        if self.is_down != bool(error):
            self.is_down = bool(error)
            news = f"does not answer: {error}" if error else "answers again"
            _log.warning("memcached at %s %s", self.address, news)


def _client(given: Any) -> Any:
    """The client that was given, or a new one for an address. Raises ValueError for a
    client that would break the promise."""
    instead = "give FileCache a Client, a PooledClient, or mcpool.connect(...)"
    if isinstance(given, str):
        form = r"unix:.+|/.+|([^][/\s:,@]+|\[[\w:.%]+\])(:\d{1,5})?"
        if not re.fullmatch(form, given):
            raise ValueError(f"give host:port, [ipv6]:port or unix:/path, or {instead}")
        waits: Any = dict.fromkeys(("connect_timeout", "timeout"), TIMEOUT)
        return PooledClient(given, no_delay=True, pool_idle_timeout=_IDLE, **waits)
    kind = type(given).__name__  # because its repr may show a password
    if isinstance(given, RetryingClient):
        raise ValueError(f"RetryingClient repeats an `add` that may be done: {instead}")
    if isinstance(given, HashClient) or getattr(given, "ignore_exc", False):
        raise ValueError(f"{kind} calls a dead server's files a miss: {instead}")
    if not hasattr(given, "get_many"):
        raise ValueError(f"{kind} is no memcached client: {instead}")
    return given


# --- Sources --------------------------------------------------------------------------


def _known_size(source: Any) -> int | None:
    """The number of bytes that a source has left, None if only reading will tell."""
    if isinstance(source, (str, io.TextIOBase)):
        raise TypeError("files are bytes: encode the text, or open it in binary mode")
    with contextlib.suppress(TypeError):
        return memoryview(source).nbytes
    if hasattr(source, "getheader"):
        # The `read(n)` of an http.client.HTTPResponse ends a broken download like a
        # whole one. Its `length` is the number of bytes that must come.
        return getattr(source, "length", None)
    buffered = type(source) in (io.BufferedReader, io.BufferedRandom)
    if type(source.raw if buffered else source) is not io.FileIO:
        return None  # a wrapper or a subclass may yield other bytes
    status = os.fstat(source.fileno())
    # Files of /proc and /sys announce a length, but have no blocks that hold it.
    is_known = stat.S_ISREG(status.st_mode) and getattr(status, "st_blocks", True)
    return max(status.st_size - source.tell(), 0) if is_known else None


def _batches(source: Any, size: int) -> Iterator[memoryview]:
    """The bytes of a source in batches of `size`; only the last may be shorter. Each is
    valid until the next is asked for. Raises TypeError if it yields no bytes."""
    with contextlib.suppress(TypeError):
        yield from _slices(_view(source), size)
        return
    reads = hasattr(source, "read")
    pieces = iter(functools.partial(source.read, _PIECE), b"") if reads else source
    buffer, filled = memoryview(bytearray(size)), 0
    for piece in pieces:
        view, start = _view(piece), 0
        while start < len(view):
            count = min(size - filled, len(view) - start)
            end, stop = filled + count, start + count
            buffer[filled:end] = view[start:stop]
            filled, start = end % size, stop
            if not filled:
                yield buffer
        view.release()  # now the source may resize its buffer
    if filled:
        yield buffer[:filled]


def _slices(sequence: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(sequence), size):
        end = start + size
        yield sequence[start:end]


def _view(data: Any) -> memoryview:
    """The bytes of a bytes-like object."""
    view = memoryview(data)
    is_flat = view.nbytes and view.c_contiguous
    return view.cast("B") if is_flat else memoryview(view.tobytes())


def _seconds(expire: _Expire) -> int:
    if isinstance(expire, datetime.timedelta):
        seconds = expire.total_seconds()
        expire = math.ceil(seconds) if seconds >= 0 else -1
    if not 0 <= operator.index(expire) <= _MAX_EXPIRE:
        raise ValueError("expire is 0 for never, or seconds from now")
    return int(expire)


def _lease(seconds: int) -> int:
    if not 1 <= operator.index(seconds) <= _RELATIVE_LIMIT:
        raise ValueError(f"a lease or a lock is 1 to {_RELATIVE_LIMIT} seconds")
    return int(seconds)  # memcached would not read True
