"""The ways to keep a file in a cache: memchunk, what people use instead, and the least there is."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Callable

from pymemcache.client.base import Client

import memchunk
from bench.measure import MIB, TIMEOUT, Missing, dial, memcached, redis_server

HAND_CHUNK = 1_000_000  # bytes: what people cut files into by hand, as it fits memcached's 1 MB
READ_BATCH = 2 * MIB  # bytes that are asked for at a time, by memchunk and those who read in pieces


class Peer:
    """`set` from bytes; `chunks`: read all in pieces and drop them; `get` whole. Names of
    different peers don't meet in one server."""

    server = "memcached"  # which kind it needs: one of SERVERS

    def __init__(self, address: str) -> None:
        raise NotImplementedError

    def set(self, name: str, data: Any) -> object:
        raise NotImplementedError

    def chunks(self, name: str) -> int:
        return len(self.get(name))

    def get(self, name: str) -> Any:
        raise NotImplementedError


class Memchunk(Peer):
    """memchunk as it comes; `module` may be another version of it."""

    def __init__(self, address: str, module: Any = memchunk, **options: Any) -> None:
        self.cache = module.connect(address, timeout=TIMEOUT, **options)

    def set(self, name: str, data: Any) -> object:
        return self.cache.set(name, data)

    def chunks(self, name: str) -> int:
        return sum(map(len, self.cache.open(name).chunks()))

    def get(self, name: str) -> Any:
        return self.cache.get(name)


class Cut(Peer):
    """Files in chunks, beside them their number and a digest, which the reader checks."""

    start: Callable[[], Any]  # makes the digest
    _client: Any

    def store(self, chunks: dict[str, bytes]) -> None:
        raise NotImplementedError

    def fetch(self, keys: list[str]) -> dict[str, bytes]:
        raise NotImplementedError

    def set(self, name: str, data: Any) -> None:
        digest, chunks = self.start(), {}
        for index, offset in enumerate(range(0, len(data), HAND_CHUNK)):
            chunks[f"{self._key(name)}:{index}"] = bytes(data[offset : offset + HAND_CHUNK])
        for chunk in chunks.values():
            digest.update(chunk)
        self.store(chunks)
        self.store({self._key(name): f"{len(chunks)} {digest.hexdigest()}".encode()})

    def chunks(self, name: str) -> int:
        return sum(map(len, self._read(name, READ_BATCH // HAND_CHUNK)))

    def get(self, name: str) -> bytes:
        return b"".join(self._read(name, None))

    def _key(self, name: str) -> str:
        return f"{type(self).__name__}:{name}"

    def _read(self, name: str, at_once: int | None) -> Iterator[bytes]:
        name = self._key(name)
        count, stored = self.fetch([name])[name].decode().split(" ")
        keys, digest = [f"{name}:{index}" for index in range(int(count))], self.start()
        for batch in batches(keys, at_once or len(keys)):
            found = self.fetch(batch)
            for key in batch:
                digest.update(found[key])
                yield found[key]
        if digest.hexdigest() != stored:
            raise ValueError(f"{name} is damaged")


class Crc32:
    """zlib.crc32 as hashlib would have it."""

    def __init__(self) -> None:
        self._crc = 0

    def update(self, data: bytes) -> None:
        self._crc = zlib.crc32(data, self._crc)

    def hexdigest(self) -> str:
        return f"{self._crc:08x}"


class Unchecked(Crc32):
    """No digest at all."""

    def update(self, data: bytes) -> None:
        pass


class ByHand(Cut):
    """What one writes on pymemcache: chunks stored one by one, and fetched by `get_many`."""

    start = hashlib.md5

    def __init__(self, address: str) -> None:
        self._client = Client(address, timeout=TIMEOUT, no_delay=True, default_noreply=False)

    def store(self, chunks: dict[str, bytes]) -> None:
        for key, chunk in chunks.items():
            self._client.set(key, chunk)

    def fetch(self, keys: list[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = self._client.get_many(keys)
        return found


class ByHandCrc(ByHand):
    start = Crc32


class Pylibmc(Cut):
    """The same on libmemcached, which is C: `set_multi` and `get_multi`."""

    start = Crc32

    def __init__(self, address: str) -> None:
        limits = dict.fromkeys(("receive_timeout", "send_timeout"), int(TIMEOUT * 1e6))
        self._client = optional("pylibmc").Client(
            [address.replace("unix:", "")], behaviors={"tcp_nodelay": True, **limits}
        )

    def store(self, chunks: dict[str, bytes]) -> None:
        if self._client.set_multi(chunks):
            raise OSError("memcached refused a chunk")

    def fetch(self, keys: list[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = self._client.get_multi(keys)
        return found


class PylibmcUnchecked(Pylibmc):
    start = Unchecked


class OneValue(ByHand):
    """The file as one value, on a memcached that was started with -I 64m."""

    server = "memcached -I 64m"

    def set(self, name: str, data: Any) -> None:
        self._client.set(self._key(name), data)

    def chunks(self, name: str) -> int:
        return len(self.get(name))

    def get(self, name: str) -> bytes:
        value: bytes = self._client.get(self._key(name))
        return value


class PylibmcOneValue(OneValue):
    server = "memcached -I 64m"
    __init__ = Pylibmc.__init__  # type: ignore[assignment]


class Redis(Peer):
    """redis-py with hiredis: one value; in pieces, GETRANGE."""

    server = "redis"

    def __init__(self, address: str) -> None:
        optional("hiredis")
        host, _, port = address.partition(":")
        place = {"unix_socket_path": port} if host == "unix" else {"host": host, "port": int(port)}
        self._client: Any = optional("redis").Redis(**place, socket_timeout=TIMEOUT)

    def set(self, name: str, data: Any) -> None:
        self._client.set(name, data)

    def chunks(self, name: str) -> int:
        size = 0
        while piece := self._client.getrange(name, size, size + READ_BATCH - 1):
            size += len(piece)
        return size

    def get(self, name: str) -> Any:
        return self._client.get(name)


class BareSocket(Peer):
    """The least that any client can do: it sends and receives items of the sizes that memchunk
    stores for a file of `size` bytes, in batches of the same sizes, each with a zlib.crc32,
    without looking at what comes in. What it sends is its own."""

    def __init__(self, address: str, size: int) -> None:
        self._socket = dial(address)
        with memchunk.connect(address) as cache, contextlib.closing(Client(address)) as client:
            info = cache.set("probe", bytes(size))
            values = [client.get(f"memchunk:{info.version}:{i}") for i in range(info.chunks)]
            with cache.create("probe", size, replace=True) as writer:
                self._at_once = max(1, writer.batch_size // max(map(len, values)))
                writer.abandon()
        self._items = [(b"bare:%d" % index, len(value)) for index, value in enumerate(values)]
        self._data = memoryview(os.urandom(sum(map(len, values))))
        self._buffer = memoryview(bytearray(max(map(len, values)) + 300))

    def set(self, *_: object) -> None:
        offset = 0
        for batch in batches(self._items, self._at_once):
            parts: list[Any] = []
            for key, size in batch:
                payload = self._data[offset : offset + size]
                zlib.crc32(payload)
                parts += (b"set %b 0 0 %d\r\n" % (key, size), payload, b"\r\n")
                offset += size
            self._send(parts)
            replies = self._buffer[: len(batch) * len(b"STORED\r\n")]
            self._receive(replies)
            if replies != b"STORED\r\n" * len(batch):
                raise OSError("memcached refused an item of the bare socket")

    def chunks(self, *_: object) -> int:
        """Receive all into one reused buffer."""
        return self._read(lambda _, size: self._buffer[:size])

    def get(self, *_: object) -> bytearray:
        """Receive all into one fresh buffer."""
        output = bytearray(len(self._data))
        view = memoryview(output)
        self._read(lambda offset, size: view[offset : offset + size])
        return output

    def _read(self, place: Callable[[int, int], memoryview]) -> int:
        offset = 0
        for batch in batches(self._items, READ_BATCH // self._items[0][1] or 1):
            self._socket.sendall(b"get %b\r\n" % b" ".join(key for key, _ in batch))
            for key, size in batch:
                self._receive(self._buffer[: len(b"VALUE %b 0 %d\r\n" % (key, size))])
                payload = place(offset, size)
                self._receive(payload)
                self._receive(self._buffer[: len(b"\r\n")])
                zlib.crc32(payload)
                offset += size
            self._receive(self._buffer[: len(b"END\r\n")])
        return offset

    def _send(self, parts: list[Any]) -> None:
        while parts:
            sent = self._socket.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = memoryview(parts[0])[sent:]

    def _receive(self, view: memoryview) -> None:
        while len(view):
            received = self._socket.recv_into(view)
            if not received:
                raise OSError("memcached closed the connection")
            view = view[received:]


PEERS: dict[str, type[Peer]] = {
    "memchunk": Memchunk,
    "pymemcache by hand, MD5": ByHand,
    "pymemcache by hand, CRC-32": ByHandCrc,
    "pylibmc multi": PylibmcUnchecked,
    "pylibmc multi, CRC-32": Pylibmc,
    "pymemcache, -I 64m": OneValue,
    "pylibmc, -I 64m": PylibmcOneValue,
    "redis-py + hiredis": Redis,
}

SERVERS: dict[str, Callable[[bool], contextlib.AbstractContextManager[str]]] = {
    "memcached": lambda unix: memcached(unix=unix),
    "memcached -I 64m": lambda unix: memcached("-I", "64m", unix=unix),
    "redis": redis_server,
}


@contextlib.contextmanager
def peers(unix: bool = False) -> Iterator[tuple[dict[str, Peer], dict[str, str]]]:
    """Those that work on this machine, each with its server; and why the others don't."""
    ready: dict[str, Peer] = {}
    reasons: dict[str, str] = {}
    addresses: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for label, kind in PEERS.items():
            try:
                if kind.server not in addresses:
                    addresses[kind.server] = stack.enter_context(SERVERS[kind.server](unix))
                ready[label] = kind(addresses[kind.server])
            except Missing as error:
                reasons[label] = str(error)
        yield ready, reasons


def optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Missing(f"{module} is not installed") from None


def other_version(path: pathlib.Path) -> Any:
    """Another memchunk.py as a module of its own."""
    spec = importlib.util.spec_from_file_location("memchunk_before", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batches(items: Sequence[Any], at_once: int) -> Iterator[Any]:
    for start in range(0, len(items), max(at_once, 1)):
        yield items[start : start + at_once]
