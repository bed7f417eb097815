# memchunk 1.0.0, MIT licence. Copy this one file; its manual is README.md and docs/.
"""Keep files of 0 to 50 MiB in memcached, which takes items of up to 1 MB.

    cache = memchunk.FileCache("127.0.0.1:11211")
    cache.add("report.pdf", pathlib.Path("report.pdf"), expire=86400)
    data = cache.get("report.pdf")

A file is stored as chunks and one manifest, which names them. A small file lies in
its manifest. The keys are:

    <namespace>:{<sha256 of the name>}                          the manifest
    <namespace>:{<sha256 of the name>}|#|<segment>:<index>      a chunk

The promise: when `add`, `set` or `cas` returns, the whole file is in the cache. A read
returns exactly the bytes that were stored, or raises a `MemchunkError`. Four rules
keep it:

* Every write draws a random segment, and only this write uses the keys in it. So the
  bytes of two writers can't mix.
* A file appears by one atomic step, memcached's `add` or `cas` of its manifest. Before
  this step, a `touch` has proved that every chunk is still there.
* Until that touch, chunks have a short expiry, the lease. So leftovers of a crashed
  writer expire by themselves.
* The CRC of a chunk covers its bytes, its key, its index and the number of chunks. The
  CRC of a manifest covers all of it.

Read `FileCache` first, then `_Write` (the five steps of a write), `CachedFile` (a
read), and `_Entry` (the commands that both use).
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

# memcached keeps an item of up to 512 KiB in one piece, because its largest slab class
# has this size by default. Two such items fill a page. It stitches larger items
# together from many pieces, which wastes memory and fails under pressure.
_LARGEST_ITEM = 512 * 1024
# Bytes of an item beside its value: a key of up to 194, and a head of up to 63.
_AROUND = 194 + 64
_DEFAULT_ITEM = 1024 * 1024  # bytes: memcached's -I by default
_LEAST_LIMIT = 1024  # bytes: memcached's smallest -I; no limit can be smaller
_SMALL_DIVISOR = 16  # a file of up to 1/16 of a chunk's item lies in its manifest

# Bytes of one round trip. They limit the memory of a transfer. If a file only just fits
# in memcached, batches of 8 chunks lose the fewest. A CPU's caches hold a batch of a
# read.
_WRITE_BATCH, _READ_BATCH = 4 * 1024 * 1024, 2 * 1024 * 1024
_PIECE = 64 * 1024  # bytes to read at a time from a source of unknown size
_MAX_CHUNK = 2**30  # bytes: memcached's -I ends there
_MAX_CHUNKS = 2**20  # a manifest that names more is damaged

# Chunks that were read or touched twice are active in memcached's LRU. If they fill the
# cache, memcached refuses others until its LRU thread has made room. That thread sleeps
# for up to a second.
_PATIENCE, _PAUSE = 4.0, 0.02  # seconds to wait for it, and between two tries

_QUICK_DELETES = 8  # chunks; their deletion does not wait for replies
_ATTEMPTS = 100  # to change a manifest; another writer won each attempt that failed
_ASK_AGAIN = 60.0  # seconds until a server that refused `stats` is asked again
_IDLE = 60  # seconds; firewalls forget connections that idle longer
_POLL = 0.05  # seconds until `get_or_set` looks again for the work of another

_RELATIVE_LIMIT = 30 * 24 * 3600  # memcached reads more seconds as an absolute time
_LONG_PAST = _RELATIVE_LIMIT + 1  # a time in 1970; twemproxy refuses -1
_ABSOLUTE_LIMIT = 2**31 - 1  # memcached has 32 bits for a time; later means never
_MAX_EXPIRE = 2**62  # seconds
_NO_TOKEN = b"%d" % (2**64 - 1)  # no item has it, so a `cas` with it changes nothing

_HEADER = struct.Struct(">III")  # of a chunk: index, total, CRC
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_FORMAT = 2

_STORED, _NOT_STORED, _EXISTS = b"STORED", b"NOT_STORED", b"EXISTS"
_NOT_FOUND, _TOUCHED, _DELETED = b"NOT_FOUND", b"TOUCHED", b"DELETED"
_REFUSAL = re.compile(rb"(?i)NOT_STORED|out of memory|object too large")

_CLOSED = ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, MemcacheClosed

# Errors that a damaged manifest may cause. Any other, as of a signal's handler, passes
# through.
_BAD_MANIFEST = ValueError, TypeError, LookupError, AttributeError, RecursionError

_log = logging.getLogger("memchunk")

_SEGMENT = re.compile("[0-9a-f]{16}")
_PART_FORM = re.compile("([0-9a-f]{16}):([0-9]{1,7}):([0-9]{1,10})")

_Bytes = Union[bytes, bytearray, memoryview]
_Expire = Union[int, datetime.timedelta]
_Segments = Sequence[tuple[str, int]]  # keys of segments, and their numbers of chunks
Source = Union[_Bytes, IO[bytes], Iterable[_Bytes], "os.PathLike[str]"]
"""A file to store: bytes-like objects, one or an iterable; a binary file; or a path."""


# --- Errors ---------------------------------------------------------------------------


class MemchunkError(Exception):
    """Root of all errors of this module. `name` is the file's."""

    def __init__(self, message: str, *args: Any) -> None:
        super().__init__(message)
        # Unpickling calls the class with these arguments.
        self.message, self.name, self.args = message, args[0], args

    def __str__(self) -> str:
        return self.message


class InvalidName(MemchunkError, ValueError):
    """The name is empty, longer than 1024 bytes of UTF-8, or has no UTF-8 form."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r:.50} is no text of 1 to {MAX_NAME} UTF-8 bytes", name
        )


class CacheMiss(MemchunkError, LookupError):
    """The file is not whole in the cache: get it from its origin, and store it."""


class FileNotFound(CacheMiss, KeyError, FileNotFoundError):
    """No file has that name. It may have expired, or been evicted whole."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no file named {name!r} is stored", name)


class FileEvicted(CacheMiss):
    """memcached evicted chunks of the file. info: FileInfo. missing: indices of chunks
    that were asked for and are gone."""

    def __init__(self, name: str, info: FileInfo, missing: list[int]) -> None:
        self.info, self.missing = info, missing
        first = ", ".join(map(str, missing[:5])) + (", ..." if missing[5:] else "")
        lost = f"{len(missing)} of its {info.chunks} chunks are gone ({first})"
        text = f"{name!r} was evicted in part: {lost}"
        super().__init__(text, name, info, missing)


class FileExists(MemchunkError, FileExistsError):
    """`add` found a whole file of that name: `info`, a FileInfo."""

    def __init__(self, name: str, info: FileInfo) -> None:
        self.info = info
        super().__init__(f"a file named {name!r} is already stored", name, info)


class FileChanged(MemchunkError):
    """The file is not `version` any more. current: its version now, None if it is
    gone."""

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
    """A chunk is damaged, or the manifest if `index` is None. reason: "" for damage,
    else the unknown format of a sound manifest, which a later memchunk wrote."""

    def __init__(self, name: str, index: int | None, reason: str = "") -> None:
        self.index, self.reason = index, reason
        place = "its manifest" if index is None else f"chunk {index}"
        text = reason and f"{name!r} can't be read: {reason}"
        text = text or f"{name!r} is damaged: {place} is wrong"
        super().__init__(text, name, index, reason)


class CacheFull(MemchunkError):
    """The server would not keep the file.

    missing: indices of chunks that are gone, if that is the symptom. cause: by the
    server's `stats`, "memory" (-m is smaller than the file), "item size" (-I is too
    small), "pressure" (other files, or pages for items of other sizes, fill the
    memory), "contention" (others changed the manifest 100 times), or "unknown"."""

    def __init__(self, name: str, cause: str, reason: str, missing: list[int]) -> None:
        self.cause, self.missing = cause, missing
        text = f"memcached would not keep {name!r}: {reason}"
        super().__init__(text, name, cause, reason, missing)


class CacheUnavailable(MemchunkError, ConnectionError):
    """`server` gave no answer, or a wrong one. A write may have been done or not."""

    def __init__(self, name: str, server: str, reason: str) -> None:
        self.server, self.reason = server, reason
        text = f"memcached at {server} is not available: {reason}"
        super().__init__(text, name, server, reason)


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """The properties of a stored file.

    name, metadata: as given to `add`. size: bytes. chunks: their number, 0 for a small
    file. version: 16 hex digits, unique to one publication. created: Unix time in
    seconds, by the writer's clock. expires: likewise, None for never."""

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
    namespace: prefix of every key, 1 to 100 printable ASCII characters, no spaces. A
        client's own `key_prefix` counts, too.
    max_size: bytes, the largest file; 50 MiB by default.
    chunk_size: bytes of payload in a chunk; by default the most that the server keeps
        well, by its `stats settings`. Give it if a proxy hides servers with a small -I.
    lease: seconds, 1 to 2,592,000, that chunks live before their file is published; an
        hour by default. No upload may take longer.

    Raises ValueError for options and clients that can't work. Every method that takes a
    name may raise InvalidName and CacheUnavailable. As a context manager it closes
    itself."""

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
        """Take the client, or make one for an address."""
        make = _own_client if isinstance(self._given, str) else _checked_client
        self.client = make(self._given)
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

        Raises FileExists if a whole file has that name: before payload is sent, or at
        the end if another writer was quicker. A file that lost chunks is replaced. Also
        raises FileTooLarge; SizeMismatch; CacheFull; FileCorrupt for a file of a later
        format; TypeError for text; ValueError for parts of different chunk sizes. After
        an error, nothing new is stored, unless it is CacheUnavailable."""
        return _Write(self, "add", name, size, expire, metadata, parts).run(source)

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
        """Store a file, or replace it. Readers get the old file or the new one, whole.
        If memory can't hold both, the old one's chunks are deleted first, and readers
        get FileEvicted.
        Arguments and errors are those of `add`, except FileExists and FileCorrupt."""
        return _Write(self, "set", name, size, expire, metadata, parts).run(source)

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
        order = size, expire, metadata, parts, version
        return _Write(self, "cas", name, *order).run(source)

    def stage(
        self, name: str, data: _Bytes, *, parts: Sequence[str] = (), lease: int = LEASE
    ) -> tuple[str, int]:
        """Store the whole chunks in `data` ahead of their file.

        parts: those that earlier calls returned, in order; this call checks them.
        lease: seconds, 1 to 2,592,000, that the new part lives; an hour by default. If
            the server has little memory, earlier parts get it, too.

        Returns the new part, a short text for the `parts` of later calls, and the
        number of bytes that it took, a multiple of the chunk size. Pass the remaining
        bytes to the next call. Each call has keys of its own, so two callers never mix.

        Raises FileEvicted if chunks of the parts are gone, FileTooLarge, CacheFull, and
        ValueError for parts of different chunk sizes."""
        return _Segment(self, name, parts, _lease(lease)).stage(_view(data))

    def unstage(self, name: str, parts: Sequence[str]) -> None:
        """Delete parts, except those of the published file. Don't call it while another
        may be publishing them: the new file would lose its chunks."""
        entry = self._entry(name)
        entry.delete_segments(_parsed(parts)[0], entry.lookup().segments)

    def get(self, name: str) -> bytes:
        """The whole file, verified. Raises FileNotFound, FileEvicted, FileCorrupt, and
        FileTooLarge if a cache with another `max_size` wrote it.

        Starts over if a writer replaces the file meanwhile, up to 100 times; then it
        raises FileChanged."""
        for _ in range(_ATTEMPTS):
            with self.open(name) as file, contextlib.suppress(FileChanged):
                if file.info.size > self.max_size:
                    raise FileTooLarge(name, file.info.size, self.max_size)
                return file.readall()
        raise FileChanged(name, file.info.version, self.stat(name).version)

    def get_or_set(
        self,
        name: str,
        make: Callable[[], _Bytes],
        *,
        expire: _Expire = 0,
        metadata: bytes = b"",
        lock: int = 60,
    ) -> _Bytes:
        """The file, or else the bytes that `make()` returns, which become the file. One
        caller at a time runs `make`. The others wait for the file, for up to `lock`
        seconds, and then run it, too. If the cache is down or full, or the file is
        damaged, callers still get bytes, and the file is stored if it can be. Raises
        FileTooLarge, and the errors of `make`."""
        # It refuses bad options, so it is made before `make` does its work.
        write = _Write(self, "set", name, None, expire, metadata, ())
        return self._get_or_make(write, make, _lease(lock))

    def _get_or_make(
        self, write: _Write, make: Callable[[], _Bytes], lock: int
    ) -> _Bytes:
        deadline, lock_end = time.monotonic() + lock, -math.inf
        try:
            with contextlib.suppress(CacheUnavailable, CacheFull):
                while (now := time.monotonic()) < deadline:
                    with contextlib.suppress(CacheMiss, FileCorrupt, FileChanged):
                        return self.get(write.entry.name)
                    if now < lock_end:  # it is ours, and we have looked again
                        break
                    end = time.monotonic() + lock
                    if write.entry.take_lock(lock):
                        # Its last owner may have stored the file, so look again.
                        lock_end = end
            data = make()
            with contextlib.suppress(CacheUnavailable, CacheFull):
                write.run(data)
            return data
        finally:
            if time.monotonic() < lock_end:  # later, it may be another's
                write.entry.delete([write.entry.lock])

    def open(self, name: str) -> CachedFile:
        """The present version of the file, as a binary stream, which fetches chunks as
        they are read. Raises FileNotFound, FileCorrupt."""
        return CachedFile(self, self._entry(name).lookup().require())

    def stat(self, name: str) -> FileInfo:
        """The file's properties, by its manifest; chunks may be gone. Raises
        FileNotFound, FileCorrupt."""
        return self._entry(name).lookup().require().info

    def __contains__(self, name: str) -> bool:
        """Whether the whole file is there. Reads no payload, and changes nothing."""
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
        call it again. Until then the chunks may have no expiry."""
        entry, seconds = self._entry(name), _seconds(expire)
        for _ in range(_ATTEMPTS):
            found, now = entry.lookup(), int(time.time())
            old, keys = found.require(), entry.keys(found.segments)
            new = dataclasses.replace(old, expires=now + seconds if seconds else None)
            end, chunks_end = entry.exptimes(seconds)
            # If chunks are missing, nothing changes. Else all lose their expiry for a
            # moment, because they must outlive the old and the new manifest.
            missing = entry.missing(keys) or entry.touch(keys, 0)
            if missing:
                with contextlib.suppress(FileChanged):  # then touch the present version
                    entry.explain(old, missing)
            elif entry.replace(found, new.pack(), end):
                entry.touch(keys, chunks_end)
                # Another touch may have come in between, with a later end.
                if keys and entry.lookup().manifest not in (None, new):
                    entry.touch(keys, 0)
                return new.info
        raise entry.contention()

    def delete(self, name: str, version: str | None = None) -> None:
        """Delete the file, also a damaged one or one that lost chunks; with `version`,
        only that version. Raises FileNotFound; with `version`, FileChanged for another,
        FileCorrupt for a damaged manifest; CacheFull after 100 tries."""
        entry = self._entry(name)
        for _ in range(_ATTEMPTS):
            found = entry.lookup()
            if found.value is None or version is not None:
                found.require(version)
            # The text protocol can't delete conditionally. But `cas` can store an item
            # that has expired already.
            if entry.replace(found, b"", _LONG_PAST):
                entry.delete(entry.keys(found.segments))
                return
        raise entry.contention()

    def ping(self) -> None:
        """Return if every server answers, else raise CacheUnavailable."""
        key = self._entry("ping").key  # first, as it connects anew after a fork
        servers = getattr(self.client, "servers", {"": self.client})
        for client in servers.values():
            entry = _Entry(self._server(client), "", key)
            entry.ask(lambda client: client.gets(key))

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
        return _Entry(self._server(client), name, key)

    def _server(self, client: Any) -> _Server:
        return self._servers.setdefault(id(client), _Server(client))


# --- The stored format ----------------------------------------------------------------


def _chunk_key(key: str, segment: str, index: int) -> str:
    return f"{key}|#|{segment}:{index}"


def _chunk(key: str, index: int, total: int, *body: Any) -> tuple[Any, ...]:
    """A chunk's value: header, payload and padding, as parts, which saves a copy.
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
    def version(self) -> str:
        return self.segments[-1][0]

    @property
    def info(self) -> FileInfo:
        times, chunks = (self.created, self.expires), sum(n for _, n in self.segments)
        about = self.name, self.size, chunks, self.version
        return FileInfo(*about, *times, self.metadata)

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
            number = fields.pop("format")
            if number != _FORMAT:
                text = f"its format {number} is unknown to this memchunk"
                raise FileCorrupt(name, None, text)
            length = fields.pop("metadata")
            fields["segments"] = [tuple(each) for each in fields["segments"]]
            found = cls(**fields, metadata=rest[:length], data=rest[length:])
            found._validate(name)
            return found
        except _BAD_MANIFEST as error:
            raise FileCorrupt(name, None) from error

    def _validate(self, name: str) -> None:
        """Raises ValueError or TypeError for fields that no writer would write: they go
        into keys, and bound the work of a read."""
        keys, counts = zip(*self.segments)
        numbers = self.size, self.chunk_size, self.created, self.expires or 0, *counts
        chunks = -(-(self.size - len(self.data)) // (self.chunk_size or 1))
        is_sound = (
            self.name == name
            and all(type(number) is int and number >= 0 for number in numbers)
            and all(map(_SEGMENT.fullmatch, keys))
            and len(set(keys)) == len(keys)
            and 0 < self.chunk_size <= _MAX_CHUNK
            and sum(counts) == chunks <= _MAX_CHUNKS
            and len(self.data) in (0, self.size)
        )
        if not is_sound:
            raise ValueError("the manifest contradicts itself")


def _parsed(parts: Sequence[str]) -> tuple[_Segments, int]:
    """Segments and chunk size of an upload's parts, 0 if there are none. Raises
    ValueError for parts that don't belong together."""
    matches = [] if isinstance(parts, str) else list(map(_PART_FORM.fullmatch, parts))
    found = [(each[1], int(each[2]), int(each[3])) for each in matches if each]
    sizes, keys = {size for _, _, size in found}, {key for key, _, _ in found}
    is_size = all(1 <= size <= _MAX_CHUNK for size in sizes)
    if len(keys) != len(parts) or len(sizes) > 1 or not is_size:
        raise ValueError("parts must come from `stage`, for one upload")
    return [(key, count) for key, count, _ in found if count], max(sizes, default=0)


# --- Writing --------------------------------------------------------------------------


class _Segment:
    """The chunks that one write, or one call of `stage`, stores behind the parts of an
    upload. Only it writes their keys, so that the bytes of two writers can't mix."""

    def __init__(
        self, cache: FileCache, name: str, parts: Sequence[str], lease: int
    ) -> None:
        self.cache, self.entry, self.lease = cache, cache._entry(name), lease
        self.parts, self.chunk_size = _parsed(parts)
        self.first = sum(count for _, count in self.parts)  # index in the file
        self.length = self.first * self.chunk_size  # bytes of the file so far
        self.key = secrets.token_hex(8)
        self.count = 0  # chunks, also those not sent yet, so that all can be deleted
        self.total = 0  # chunks that there will be, 0 if that is not known
        self.pid = os.getpid()
        self.may_appear = False  # whether the file's manifest was sent
        self.size: int | None = None  # of the whole file, as announced

    def plan(self, size: int) -> None:
        """Decide how to cut a file of up to `size` bytes."""
        item, self.largest, self.memory = self.entry.limits()
        self.inline_limit = (self.cache._chunk_size or item) // _SMALL_DIVISOR
        if not self.chunk_size:
            self.chunk_size = self.cache._chunk_size or item - _HEADER.size - _AROUND
        self.batch_size = self.chunk_size * max(1, _WRITE_BATCH // self.chunk_size)
        # Whether the file takes more than half of the memory.
        self.is_tight = 2 * size > self.memory

    def check(self, length: int) -> None:
        """Raise if `length` bytes of the file are too many."""
        name, limit = self.entry.name, self.chunk_size * _MAX_CHUNKS
        limit = min(limit, self.cache.max_size)
        if length > limit:
            raise FileTooLarge(name, length, limit)
        if self.size is not None and length > self.size:
            raise SizeMismatch(name, self.size, length)
        needed = -(-length // self.chunk_size) * self.chunk_size
        if needed > self.memory:
            raise self.entry.cache_full(needed)

    def stage(self, data: memoryview) -> tuple[str, int]:
        """`FileCache.stage`."""
        self.plan(self.cache.max_size)
        self.check(self.length + len(data))
        missing = self._missing_parts()
        if missing:
            name, version = self.entry.name, self.parts[-1][0]
            info = FileInfo(name, self.length, self.first, version, 0, None, b"")
            raise FileEvicted(name, info, missing)
        taken = len(data) - len(data) % self.chunk_size
        self.total = taken // self.chunk_size
        with self.deleted_on_error():
            for batch in _slices(data[:taken], self.batch_size):
                self.send(batch)
        return f"{self.key}:{self.count}:{self.chunk_size}", taken

    def _missing_parts(self) -> list[int]:
        """The indices of the parts' chunks that are gone. Keeps the others active if
        memory is tight."""
        keys = self.entry.keys(self.parts)
        if not keys or not self.is_tight or self._are_published():
            return self.entry.missing(keys)
        self.entry.touch(keys, self.lease)
        missing = self.entry.touch(keys, self.lease)
        # If another published them meanwhile, the lease replaced their final expiry.
        # Then they get no expiry, so they can't end too early. See `_tidy`, too.
        if self._are_published():
            self.entry.touch(keys, 0)
        return missing

    def _are_published(self) -> bool:
        return bool(set(self.parts).intersection(self.entry.lookup().segments))

    def keys(self) -> list[str]:
        """The keys of the file's chunks so far, in order."""
        return self.entry.keys([*self.parts, (self.key, self.count)])

    def send(self, batch: memoryview, end: int | None = None) -> bool:
        """Store a batch of chunks on the lease. Raises CacheFull.

        end: the final expiry if this is the last batch. If memory is not tight, all
        chunks of the file get it in the same round trip. Returns whether they did."""
        chunks = list(self._commands(batch))
        if not self.is_tight:
            keys = [] if end is None else self.keys()
            touches = [_Command("touch", key, end or 0) for key in keys]
            replies, count = self.entry.run([*chunks, *touches]), len(chunks)
            if not self.entry.refusal(replies[:count]):
                return set(replies[count:]) == {_TOUCHED}
            chunks = [chunk for chunk, said in zip(chunks, replies) if said != _STORED]
            self.is_tight = True
        self._store_until_kept(chunks)
        return False

    def _store_until_kept(self, chunks: list[_Command]) -> None:
        """A full cache evicts new chunks first, unless two touches make them active in
        its LRU. If every write did so, a large cache would lose an eighth of its
        files."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            touches = [_Command("touch", chunk.key, self.lease) for chunk in chunks] * 2
            replies, count = self.entry.run([*chunks, *touches]), len(chunks)
            refusal, last = self.entry.refusal(replies[:count]), replies[-count:]
            chunks = [chunk for chunk, said in zip(chunks, last) if said != _TOUCHED]
            if not chunks:
                return
            if time.monotonic() > deadline or "too large" in refusal:
                missing = [] if refusal else [self.keys().index(c.key) for c in chunks]
                raise self.cache_full(missing, refusal)
            time.sleep(_PAUSE)

    def _commands(self, batch: memoryview) -> Iterator[_Command]:
        """The commands that store a batch."""
        if os.getpid() != self.pid:  # two processes would write the same keys
            raise RuntimeError("the process was forked during a write")
        # All chunks of a file have one length, unless there is only one.
        is_alone = self.total == 1 and not self.parts
        for payload in _slices(batch, self.chunk_size):
            padding = bytes(0 if is_alone else self.chunk_size - len(payload))
            key = _chunk_key(self.entry.key, self.key, self.count)
            body = self.total, payload, padding
            make = functools.partial(_chunk, key, self.count, *body)
            self.count += 1
            yield _Command("set", key, self.lease, make)

    def cache_full(self, missing: list[int], said: str) -> CacheFull:
        """The error if the server refused chunks, or evicted those at `missing`."""
        size = (self.first + max(self.count, self.total)) * self.chunk_size
        said = said or f"{len(missing)} chunks are gone: evicted, or past their lease"
        return self.entry.cache_full(size, said, missing)

    @contextlib.contextmanager
    def deleted_on_error(self) -> Iterator[None]:
        """An error deletes the segment, unless the file may yet appear. After an
        exception that is no Exception, such as Ctrl-C or a time-out of gevent, nothing
        more is sent, because the server may still be at work on a command. Chunks that
        are on the lease expire."""
        try:
            yield
        except Exception as error:
            is_over = not self.may_appear or isinstance(error, CacheFull)
            if is_over and os.getpid() == self.pid:  # else they are the parent's chunks
                self.entry.delete(self.entry.keys([(self.key, self.count)]))
            raise


class _Write(_Segment):
    """One `add`, `set` or `cas`. `run` has its five steps."""

    def __init__(
        self,
        cache: FileCache,
        verb: str,
        name: str,
        size: int | None,
        expire: _Expire,
        metadata: bytes,
        parts: Sequence[str],
        version: str | None = None,
    ) -> None:
        super().__init__(cache, name, parts, cache.lease)
        self.verb, self.version, self.expire = verb, version, _seconds(expire)
        self.size = None if size is None else operator.index(size)
        self.data, self.metadata = b"", bytes(memoryview(metadata))
        if len(self.metadata) > MAX_METADATA:
            raise ValueError(f"metadata is limited to {MAX_METADATA} bytes")

    def run(self, source: Source) -> FileInfo:
        if isinstance(source, os.PathLike):
            with open(source, "rb") as file:
                return self._store(file)
        return self._store(source)

    def _store(self, source: Any) -> FileInfo:
        known, batches = _opened_source(source)
        # 1. Look up the manifest, and refuse early: no payload was sent yet.
        found = self._begin(known)
        with self.deleted_on_error():
            # 2. Store the chunks on a lease. The last batch may include step 3.
            is_settled = self._send(batches(self.batch_size), found)
            manifest = self._manifest()
            for attempt in range(_ATTEMPTS):
                # A restarted server counts its tokens anew: an old one might fit.
                if attempt or self.verb == "cas":
                    found = self._look_up()
                # 3. Touch every chunk: this proves that each is still there.
                end = self._settle(is_settled and not attempt)
                # 4. Publish. If the reply gets lost, the file may yet appear.
                self.may_appear = True
                if self.entry.replace(found, manifest.pack(), end):
                    break
                self.may_appear = False
            else:
                raise self.entry.contention()
        # 5. Delete the chunks of the replaced file.
        self._tidy(found, manifest)
        return manifest.info

    def _begin(self, known: int | None) -> _Found:
        """Step 1, for a source of `known` bytes, None if its length is unknown."""
        if known is not None:
            known += self.length
            if self.size not in (None, known):
                raise SizeMismatch(self.entry.name, self.size or 0, known)
            self.size = known
        found = self._look_up()
        self.plan(self.cache.max_size if self.size is None else self.size)
        least = max(self.size or 0, self.length)
        self.check(least)
        self.total = -(-(least - self.length) // self.chunk_size)
        if self.largest < _DEFAULT_ITEM:  # in others it fits
            manifest = len(self._manifest().pack()) + self.inline_limit
            if manifest + _AROUND > self.largest:
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
            raise FileExists(self.entry.name, found.manifest.info)
        return found

    def _send(self, batches: Iterable[memoryview], old: _Found) -> bool:
        """Store all chunks. Returns whether they have their final expiry already."""
        is_settled = False
        for batch in batches:
            self.length += len(batch)
            self.check(self.length)
            # If memory can't hold both files, the old one goes: memcached would evict
            # some of its chunks anyway, and keep the others in place of new ones.
            if old.manifest and old.manifest.size + self.length > self.memory:
                old = self._look_up()  # another may have reused chunks meanwhile
                self.entry.delete_segments(old.segments, self.parts)
                old = old._replace(manifest=None)
            end, has_ended = None, len(batch) < self.batch_size
            if has_ended and len(batch) == self.length <= self.inline_limit:
                self.data = bytes(batch)
                continue
            if has_ended and self.size in (None, self.length):
                end = self.entry.exptimes(self.expire)[1]
                if not self.count:
                    self.total = -(-len(batch) // self.chunk_size)
            is_settled = self.send(batch, end)
        if self.size not in (None, self.length):
            raise SizeMismatch(self.entry.name, self.size or 0, self.length)
        return is_settled

    def _manifest(self) -> _Manifest:
        now, expire = int(time.time()), self.expire
        about = now, now + expire if expire else None, self.metadata
        # The last segment is the version, also of a file without chunks of its own.
        segments = [*self.parts, (self.key, self.count)]
        name, cut = self.entry.name, self.chunk_size
        return _Manifest(name, self.length, cut, *about, segments, self.data)

    def _settle(self, is_done: bool) -> int:
        """Give every chunk its final expiry, unless that is done; return that of the
        manifest. Raises CacheFull if one is gone: a server with little memory says
        STORED, but evicts the first chunks while the last arrive."""
        end, chunks_end = self.entry.exptimes(self.expire)
        missing = [] if is_done else self.entry.touch(self.keys(), chunks_end)
        if missing:
            raise self.cache_full(missing, "")
        return end

    def _tidy(self, found: _Found, manifest: _Manifest) -> None:
        """Delete the old file's chunks, except those that the new one has, too."""
        if self.parts:
            # A `stage` that saw no published file may have put parts on a lease since.
            keys = self.entry.keys(self.parts)
            with contextlib.suppress(CacheUnavailable, CacheFull):
                self.entry.touch(keys, self.entry.exptimes(self.expire)[1])
                # If another gave the file a later end meanwhile: no end.
                if self.entry.lookup().manifest not in (None, manifest):
                    self.entry.touch(keys, 0)
        self.entry.delete_segments(found.segments, self.parts, quick=True)


# --- Reading --------------------------------------------------------------------------


class CachedFile(io.RawIOBase):
    """One version of a file, as a readable and seekable binary stream; made by
    `FileCache.open`. For lines, wrap it in an `io.BufferedReader`.

    Fetches only the chunks that are read. Reading raises FileEvicted, FileCorrupt, and
    FileChanged if the file was replaced or deleted since it was opened and its chunks
    are gone."""

    def __init__(self, cache: FileCache, manifest: _Manifest) -> None:
        super().__init__()
        self.info, self._cache, self._manifest = manifest.info, cache, manifest
        size = manifest.chunk_size if self.info.chunks else self.info.size
        self._chunk_size = max(size, 1)
        place = cache._entry(self.info.name).key
        self._chunks = [  # key, index in the segment, number of chunks in the segment
            (_chunk_key(place, key, index), index, count)
            for key, count in manifest.segments
            for index in range(count)
        ]
        self._position = 0
        self._held = -1, memoryview(b"")  # the chunk that was read last, and its number

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes from `start` to `stop`, as in a slice, in verified, read-only
        buffers. A buffer stays valid as long as the caller keeps it. Holds 2 MiB of
        them at a time, and leaves the stream's position alone."""
        start, stop, _ = slice(start, stop).indices(self.info.size)
        return (piece for _, piece in self._pieces(start, stop))

    def _pieces(
        self, start: int, stop: int, target: memoryview | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """The bytes from `start` to `stop`, a slice of each chunk, and its offset from
        `start`. Chunks that lie whole in `target` are received there, and left out."""
        size, batch = self._chunk_size, max(1, _READ_BATCH // self._chunk_size)
        numbers = range(start // size, -(-stop // size) if start < stop else 0)
        while numbers:
            payloads = {0: memoryview(self._manifest.data)}
            if self._chunks:
                payloads = self._fetch(numbers[:batch], start, target)
            for number, payload in payloads.items():
                self._held, offset = (number, payload), number * size
                first, last = max(start - offset, 0), stop - offset
                yield offset + first - start, payload[first:last]
            # Let go of the payloads now, so that the next batch is received into the
            # same memory. Fresh pages from the system take as long as the CRC.
            numbers, payloads, payload = numbers[batch:], {}, memoryview(b"")

    def _fetch(
        self, numbers: range, start: int, target: memoryview | None
    ) -> dict[int, memoryview]:
        """Verified payloads of chunks, without those that `target` received."""
        held, payload = self._held  # in one step, because other threads may read, too
        keys = {self._chunks[each][0]: each for each in numbers if each != held}
        payloads = {held: payload} if held in numbers else {}

        def receive(key: str, length: int, fill: Callable[[Any], Any]) -> None:
            number, first = keys[key], keys[key] * self._chunk_size - start
            last = min(first + self._chunk_size, self.info.size - start)
            if target is not None and 0 <= first <= last <= len(target):
                with target[first:last] as place:
                    self._receive(number, length, fill, place)
            else:
                payload = memoryview(bytearray(last - first))
                self._receive(number, length, fill, payload)
                payloads[number] = payload.toreadonly()

        entry = self._cache._entry(self.info.name)  # made now, after any fork
        found = entry.read(list(keys), receive)
        if missing := [each for key, each in keys.items() if key not in found]:
            entry.explain(self._manifest, missing)
        return dict(sorted(payloads.items()))

    def _receive(
        self, number: int, length: int, fill: Callable[[Any], Any], payload: memoryview
    ) -> None:
        """Receive and verify a chunk, whose value has `length` bytes. `fill` fills a
        buffer with the next bytes of it. Raises FileCorrupt."""
        (key, index, count), header = self._chunks[number], bytearray(_HEADER.size)
        padding = bytearray(len(self._chunks) > 1 and self._chunk_size - len(payload))
        if length == len(header) + len(payload) + len(padding):
            for buffer in header, payload, padding:
                fill(buffer)
            # The CRC covers the index, the total and the key.
            total = _HEADER.unpack(header)[1]
            is_sound = header == _chunk(key, index, total, payload, padding)[0]
            if is_sound and total in (count, 0):
                return
        raise FileCorrupt(self.info.name, number)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; fewer bytes than it holds only at the end of the file."""
        self._checkClosed()
        start = min(self._position, self.info.size)
        # The traceback of an error would keep the views. `with` releases them.
        with memoryview(buffer).cast("B") as whole:
            stop = min(start + len(whole), self.info.size)
            with whole[: stop - start] as target:
                for offset, piece in self._pieces(start, stop, target):
                    end = offset + len(piece)
                    target[offset:end] = piece
        self._position += stop - start
        return stop - start

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, fewer only at the end; all that is left by default."""
        left = max(self.info.size - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        # The system makes these zero bytes when they are written to, and `getvalue`
        # hands the buffer over without a copy. So the bytes are in memory once.
        output = io.BytesIO(bytes(size))
        with output.getbuffer() as view:
            filled = self.readinto(view)
        output.truncate(filled)  # another thread may have moved the stream
        return output.getvalue()

    readall = read  # io.BufferedReader calls it

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
    if it is no manifest. token: for memcached's `cas`."""

    name: str
    value: Any = None
    token: Any = None
    manifest: _Manifest | None = None
    damage: FileCorrupt | None = None

    @property
    def segments(self) -> _Segments:
        return self.manifest.segments if self.manifest else ()

    def require(self, version: str | None = None) -> _Manifest:
        """Raises FileNotFound, FileCorrupt; FileChanged unless it is `version`."""
        if self.damage:
            raise self.damage
        if self.manifest is None:
            raise FileNotFound(self.name)
        if version not in (None, self.manifest.version):
            raise FileChanged(self.name, version or "", self.manifest.version)
        return self.manifest


class _Entry:
    """The items of one file on its server: a manifest, its chunks, and a lock."""

    def __init__(self, server: _Server, name: str, key: str) -> None:
        self.server, self.client, self.name, self.key = server, server.client, name, key
        self.lock = f"{key}|#|lock"  # of `get_or_set`

    def keys(self, segments: _Segments) -> list[str]:
        """The keys of the chunks in segments, in order."""
        pairs = ((key, index) for key, count in segments for index in range(count))
        return [_chunk_key(self.key, *pair) for pair in pairs]

    def lookup(self) -> _Found:
        """Look at the manifest."""
        value, token = self.ask(lambda client: client.gets(self.key))
        if value is None:
            return _Found(self.name)
        if token == b"0":
            raise self.unavailable(_NO_CAS)
        try:
            manifest = _Manifest.unpack(self.name, value)
            return _Found(self.name, value, token, manifest)
        except FileCorrupt as error:
            return _Found(self.name, value, token, None, error)

    def replace(self, found: _Found, value: bytes, exptime: int) -> bool:
        """Put a manifest, or nothing (an empty one), in the place of the one that was
        found: the one atomic step. False: another was quicker. Raises CacheFull, and
        CacheUnavailable if nobody knows the outcome."""
        verb = "add" if found.value is None else "cas"
        put = _Command(verb, self.key, exptime, lambda: (value,), found.token)
        try:
            (reply,) = self.run([put], again=False)
        except CacheUnavailable:
            # The reply was lost. Look once for the new state.
            if self.lookup().value == (value or None):
                return True
            raise
        # Of replicas behind a proxy, one may store the manifest while another refuses
        # it. So look, whatever the reply says.
        if reply == _STORED or (value and self.lookup().value == value):
            return True
        self.expect([reply], _NOT_STORED, _EXISTS, _NOT_FOUND)
        return False

    def touch(self, keys: Sequence[str], exptime: int) -> list[int]:
        """Set the expiry of chunks; return the positions of the keys that are gone."""
        return self._absent([_Command("touch", key, exptime) for key in keys], _TOUCHED)

    def missing(self, keys: Sequence[str]) -> list[int]:
        """The positions of the keys that are gone. A `cas` that can't succeed asks for
        them. Every proxy knows it, and it neither reads a chunk nor changes its
        expiry."""
        commands = [_Command("cas", key, token=_NO_TOKEN) for key in keys]
        return self._absent(commands, _EXISTS)

    def is_whole(self, found: _Found) -> bool:
        """Whether all chunks of the file are there."""
        return bool(found.manifest) and not self.missing(self.keys(found.segments))

    def delete(self, keys: Sequence[str], quick: bool = False) -> None:
        """Delete items that nobody needs. A failure is no error, as nothing depends on
        it. But nobody else will delete them, so it is tried twice. quick: don't wait
        for the replies, if the items are few."""
        # memcached's proxy 1.6.45 garbles "noreply". A proxy hides its servers' memory.
        is_proxy = b"maxbytes" not in self.server.settings
        is_many = len(keys) > _QUICK_DELETES or not hasattr(self.client, "pipeline")
        verb = "delete quickly" if quick and not (is_many or is_proxy) else "delete"
        for _ in range(2):
            with contextlib.suppress(CacheUnavailable, CacheFull):
                replies = self.run([_Command(verb, key) for key in keys])
                self.expect(replies, _DELETED, _NOT_FOUND)
                return

    def delete_segments(
        self, segments: _Segments, kept: _Segments, quick: bool = False
    ) -> None:
        """Delete the chunks of segments, unless another file has them, too."""
        gone = [(key, count) for key, count in segments if key not in dict(kept)]
        self.delete(self.keys(gone), quick)

    def take_lock(self, seconds: int) -> bool:
        """Take the lock of `get_or_set`, or wait a moment if another has it."""
        # memcached's clock ticks once a second, so an item may end a second early.
        exptime = min(seconds + 1, _RELATIVE_LIMIT)
        add = _Command("add", self.lock, exptime, lambda: (b"1",))
        replies = self.run([add], again=False)
        self.expect(replies, _STORED, _NOT_STORED)
        time.sleep(0 if _STORED in replies else _POLL)
        return _STORED in replies

    def explain(self, manifest: _Manifest, missing: list[int]) -> NoReturn:
        """Raise the reason for missing chunks: FileChanged or FileEvicted."""
        found = self.lookup()
        if found.value is None:
            raise FileChanged(self.name, manifest.version, None)
        found.require(manifest.version)
        raise FileEvicted(self.name, manifest.info, missing)

    def exptimes(self, expire: int) -> tuple[int, int]:
        """The times to tell memcached so that a manifest ends in `expire` seconds and
        its chunks a little later. Both are relative, or both are absolute."""
        end = expire
        if expire + _SLACK > _RELATIVE_LIMIT:
            end += int(time.time())
        is_endless = not expire or end + _SLACK > _ABSOLUTE_LIMIT
        return (0, 0) if is_endless else (end, end + _SLACK)

    def limits(self) -> tuple[int, int, float]:
        """Bytes of the largest item that the server keeps in one piece, of the largest
        that it takes, and of its memory (infinite if unknown)."""
        server = self.server
        if not server.settings and time.monotonic() >= server.silent_until:
            server.settings = self._ask_settings()
            if not server.settings:  # some close the connection, so don't ask each time
                server.silent_until = time.monotonic() + _ASK_AGAIN
        told = server.settings
        value = told.get(b"item_size_max", _DEFAULT_ITEM)
        item = min(_LARGEST_ITEM, value, told.get(b"slab_chunk_max", _LARGEST_ITEM))
        return item, value, told.get(b"maxbytes", math.inf)

    def _ask_settings(self) -> dict[bytes, int]:
        """The numbers in the server's `stats settings` that `limits` uses."""
        told, numbers = {}, {}
        try:
            told = self.ask(lambda client: client.stats("settings"))
        except CacheUnavailable as error:
            if _is_outage(error.__cause__):
                raise
        if told.get(b"cas_enabled") == b"no":
            raise self.unavailable(_NO_CAS)
        if told.get(b"proxy_enabled") == b"yes":
            told[b"maxbytes"] = 0  # it is the proxy's own, not its servers'
        for key in (b"item_size_max", b"slab_chunk_max", b"maxbytes"):
            with contextlib.suppress(ValueError, TypeError):
                number = int(told.get(key, 0))
                if number >= _LEAST_LIMIT:
                    numbers[key] = number
        return numbers

    def cache_full(
        self, size: int, said: str = "", missing: Sequence[int] = ()
    ) -> CacheFull:
        """The error for a file of `size` bytes, which the server would not keep. said:
        its words, or another symptom."""
        largest, memory = _DEFAULT_ITEM, math.inf
        self.server.settings = {}  # ask again, as a restart may change them
        with contextlib.suppress(CacheUnavailable):
            _, largest, memory = self.limits()
        has = f"the server has {memory} bytes of memory (-m)"
        if "too large" in said:
            cause, reason = "item size", f"its items end at {largest} bytes (-I)"
        elif memory == math.inf:
            cause, reason = "unknown", "the server does not tell why"
        elif size > memory:
            cause, reason = "memory", f"{has}, and the file takes {size}"
        else:
            cause, reason = "pressure", f"{has}, and other items fill it"
        text = f"{said}: {reason}" if said else reason
        return CacheFull(self.name, cause, text, list(missing))

    def contention(self) -> CacheFull:
        text = f"other writers changed the manifest {_ATTEMPTS} times"
        return CacheFull(self.name, "contention", text, [])

    def unavailable(self, reason: str) -> CacheUnavailable:
        return CacheUnavailable(self.name, _address(self.client), reason)

    def read(self, keys: list[str], receive: Callable[..., None]) -> dict[str, Any]:
        """Have `receive` take the values that are there: from mcpool, each while the
        next arrives. Returns a dictionary with their keys."""
        if not keys:
            return {}
        if hasattr(self.client, "receive_many"):
            return dict(self.ask(lambda client: client.receive_many(keys, receive)))
        values = dict(self.ask(lambda client: client.get_many(keys)))
        for key, value in values.items():
            receive(key, len(value), io.BytesIO(value).readinto)
        return values

    def run(self, commands: list[_Command], again: bool = True) -> list[bytes]:
        """Do commands; return their replies. A client with `pipeline`, as of mcpool,
        gets them in one go. Others get them one by one: pymemcache's `set_many` stops
        at the first refusal, while the server goes on to store what is behind it."""
        if not commands or not hasattr(self.client, "pipeline"):
            return [self.ask(command.call, again) for command in commands]
        wire = _Command.wire
        return list(self.ask(lambda c: c.pipeline(map(wire, commands)), again))

    def ask(self, command: Callable[[Any], Any], again: bool = True) -> Any:
        """Have the client do a command. Its errors become CacheUnavailable. again: if
        the server has closed the connection, repeat. A restart closes all of a pool."""
        pool = getattr(self.client, "client_pool", None)
        retries = (1 + len(getattr(pool, "free", ()))) if again else 0
        while True:
            try:
                result = command(self.client)
                self.server.note(None)
                return result
            except MemchunkError:
                raise
            except (OSError, MemcacheError, ValueError) as error:
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
        """Raise for an unexpected reply, which must not count as a no."""
        for reply in set(replies).difference(allowed):
            if _REFUSAL.search(reply):
                raise self.cache_full(0, reply.decode())
            said = f"it said {reply[:64]!r}"
            raise self.unavailable(_OLD if reply == b"ERROR" else said)


class _Command(NamedTuple):
    """A command of memcached for one key, with a one-line reply. value: makes the
    value, in parts. So a CRC is computed while the chunk before it travels."""

    verb: str
    key: str
    exptime: int = 0
    value: Callable[[], tuple[Any, ...]] = tuple
    token: bytes | None = None

    def wire(self) -> tuple[Any, ...]:
        """The command as a pool with `pipeline` sends it, in parts."""
        if self.verb == "touch":
            return (f"touch {self.key} {self.exptime}\r\n".encode(),)
        if self.verb.startswith("delete"):
            noreply = "" if self.verb == "delete" else " noreply"
            return (f"delete {self.key}{noreply}\r\n".encode(),)
        parts = self.value()
        head = f"{self.verb} {self.key} 0 {self.exptime} {sum(map(len, parts))}"
        token = b"" if self.token is None else b" " + self.token
        return head.encode() + token + b"\r\n", *parts, b"\r\n"

    def call(self, client: Any) -> bytes:
        """Have any pymemcache client do it; return the reply of memcached."""
        options = {"expire": self.exptime, "noreply": False}
        try:
            if self.verb == "touch":
                return _TOUCHED if client.touch(self.key, **options) else _NOT_FOUND
            if self.verb == "delete":
                client.delete_many([self.key], noreply=False)
                return _DELETED
            value = b"".join(self.value())
            if self.verb == "set":  # `set` itself is always True
                failed = client.set_many({self.key: value}, **options)
                return _NOT_STORED if failed else _STORED
            if self.verb == "add":
                done = client.add(self.key, value, **options)
                return _STORED if done else _NOT_STORED
            done = client.cas(self.key, value, self.token, **options)
            return _NOT_FOUND if done is None else _STORED if done else _EXISTS
        except MemcacheClosed:  # a MemcacheServerError, too, but no reply
            raise
        except MemcacheServerError as error:
            said = error.args[0] if error.args else b""
            return b"SERVER_ERROR " + (said if isinstance(said, bytes) else b"")


# --- The client -----------------------------------------------------------------------


@dataclasses.dataclass
class _Server:
    """One memcached behind a client, and what it told by `stats`."""

    client: Any
    settings: dict[bytes, int] = dataclasses.field(default_factory=dict)
    silent_until: float = -math.inf
    is_down: bool = False

    def note(self, error: Exception | None) -> None:
        """Log once that the server stops answering, and once that it answers again."""
        is_down = _is_outage(error)
        if self.is_down != is_down and (is_down or not error):
            self.is_down = is_down
            news = f"does not answer: {error}" if error else "answers again"
            _log.warning("memcached at %s %s", _address(self.client), news)


def _is_outage(error: BaseException | None) -> bool:
    """Whether the server is down. A closed connection tells nothing, because some
    servers close it after a command that they refuse."""
    return isinstance(error, OSError) and not isinstance(error, _CLOSED)


_NO_CAS = "it runs without cas (-C), which memchunk needs"
_OLD = "it refused a command: it has too many connections, or is older than 1.4.8"


def _own_client(address: str) -> PooledClient:
    """A client for an address. Raises ValueError."""
    form = r"unix:.+|/.+|([^][/\s:,@]+|\[[\w:.%]+\])(:\d{1,5})?"
    if not re.fullmatch(form, address):
        forms = "write host, host:port, [ipv6]:port or unix:/path"
        advice = "mcpool.connect(...) takes several servers, TLS and passwords"
        raise ValueError(f"{address!r} is no server's address; {forms}; {advice}")
    waits = {"connect_timeout": TIMEOUT, "timeout": TIMEOUT, "pool_idle_timeout": _IDLE}
    return PooledClient(address, no_delay=True, default_noreply=False, **waits)


def _checked_client(client: Any) -> Any:
    """The client. Raises ValueError for one that breaks the promise."""
    instead = "give FileCache a Client, a PooledClient, or mcpool.connect(...)"
    if isinstance(client, HashClient):
        raise ValueError(f"HashClient reports a miss if a server is down: {instead}")
    if isinstance(client, RetryingClient):
        raise ValueError(f"RetryingClient repeats an `add` that may be done: {instead}")
    if getattr(client, "ignore_exc", False):
        raise ValueError("ignore_exc=True reports a miss if the server is down")
    if not hasattr(client, "get_many"):
        raise ValueError(f"{client!r:.80} is no memcached client: {instead}")
    return client


def _address(client: Any) -> str:
    """The address of a client's server, for messages."""
    server = getattr(client, "server", None) or "an unknown address"
    return ":".join(map(str, server)) if isinstance(server, tuple) else str(server)


# --- Sources --------------------------------------------------------------------------


def _opened_source(
    source: Any,
) -> tuple[int | None, Callable[[int], Iterable[memoryview]]]:
    """The number of bytes that a source has left, None if only reading will tell; and a
    function that yields them in batches of a given size. Only the last may be shorter,
    and each is valid until the next is asked for. Raises TypeError for a source that
    yields no bytes."""
    if isinstance(source, (str, io.TextIOBase)):
        raise TypeError("files are bytes: encode the text, or open it in binary mode")
    with contextlib.suppress(TypeError):
        view = _view(source)
        return len(view), functools.partial(_slices, view)
    known = _size_left(source)
    if hasattr(source, "read"):
        source = iter(functools.partial(source.read, _PIECE), b"")
    return known, functools.partial(_gathered, iter(source))


def _size_left(source: Any) -> int | None:
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


def _slices(view: memoryview, size: int) -> Iterator[memoryview]:
    for start in range(0, len(view), size):
        end = start + size
        yield view[start:end]


def _gathered(pieces: Iterator[Any], size: int) -> Iterator[memoryview]:
    """Gather pieces into batches, all in one buffer."""
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
