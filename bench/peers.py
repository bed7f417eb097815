"""Ways to keep a file in a cache: memchunk, what people use instead, and the least there is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Callable

from pymemcache.client.base import Client

import memchunk
from bench.measure import MIB, TIMEOUT, Missing, dial, memcached, redis_server

HAND_CHUNK = 1_000_000  # bytes: what people cut files into by hand, as it fits memcached's 1 MB
READ_BATCH = 2 * MIB  # bytes that memchunk asks for at a time; so does who else reads in pieces


class Memchunk:
    """memchunk as it comes; `module` may be another version of it."""

    def __init__(self, address: str, module: Any = memchunk, **options: Any) -> None:
        self._cache = module.connect(address, timeout=TIMEOUT, **options)

    def set(self, name: str, data: Any) -> object:
        return self._cache.set(name, data)

    def chunks(self, name: str) -> int:
        return sum(map(len, self._cache.open(name).chunks()))

    def get(self, name: str) -> Any:
        return self._cache.get(name)


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


def pymemcache(address: str) -> Any:
    return Client(address, timeout=TIMEOUT, no_delay=True, default_noreply=False)


def pylibmc(address: str) -> Any:
    limits = dict.fromkeys(("receive_timeout", "send_timeout"), int(TIMEOUT * 1e6))
    behaviors = {"tcp_nodelay": True, **limits}
    return optional("pylibmc").Client([address.replace("unix:", "")], behaviors=behaviors)


class ByHand:
    """What one writes on pymemcache: chunks that are stored one by one and fetched by `get_many`;
    beside them their number and a digest, which the reader checks."""

    def __init__(self, address: str, digest: Callable[[], Any] = hashlib.md5) -> None:
        self._digest, self._client = digest, self.connect(address)

    connect = staticmethod(pymemcache)

    def store(self, chunks: dict[str, bytes]) -> None:
        for key, chunk in chunks.items():
            self._client.set(key, chunk)

    def fetch(self, keys: list[str]) -> Any:
        return self._client.get_many(keys)

    def set(self, name: str, data: Any) -> None:
        digest, name = self._digest(), f"{self._digest.__name__}:{name}"
        chunks = [bytes(chunk) for chunk in batches(data, HAND_CHUNK)]
        for chunk in chunks:
            digest.update(chunk)
        self.store({f"{name}:{index}": chunk for index, chunk in enumerate(chunks)})
        self.store({name: f"{len(chunks)} {digest.hexdigest()}".encode()})

    def chunks(self, name: str) -> int:
        return sum(map(len, self._read(name, READ_BATCH // HAND_CHUNK)))

    def get(self, name: str) -> bytes:
        return b"".join(self._read(name, sys.maxsize))

    def _read(self, name: str, at_once: int) -> Iterator[bytes]:
        digest, name = self._digest(), f"{self._digest.__name__}:{name}"
        count, stored = self.fetch([name])[name].decode().split(" ")
        for batch in batches([f"{name}:{index}" for index in range(int(count))], at_once):
            found = self.fetch(batch)
            for key in batch:
                digest.update(found[key])
                yield found[key]
        if digest.hexdigest() != stored:
            raise ValueError(f"{name} is damaged")


class Multi(ByHand):
    """The same by libmemcached, which is C: `set_multi` and `get_multi`."""

    connect = staticmethod(pylibmc)

    def store(self, chunks: dict[str, bytes]) -> None:
        if self._client.set_multi(chunks):
            raise OSError("memcached refused a chunk")

    def fetch(self, keys: list[str]) -> Any:
        return self._client.get_multi(keys)


class OneValue:
    """The file as one value, on a memcached that was started with -I 64m."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def set(self, name: str, data: Any) -> None:
        self._client.set(name, data)

    def chunks(self, name: str) -> int:
        return len(self.get(name))

    def get(self, name: str) -> Any:
        return self._client.get(name)


class Redis(OneValue):
    """redis-py with hiredis: one value; in pieces, GETRANGE."""

    def __init__(self, address: str) -> None:
        optional("hiredis")
        host, _, port = address.partition(":")
        place = {"unix_socket_path": port} if host == "unix" else {"host": host, "port": int(port)}
        super().__init__(optional("redis").Redis(**place, socket_timeout=TIMEOUT))

    def chunks(self, name: str) -> int:
        size = 0
        while piece := self._client.getrange(name, size, size + READ_BATCH - 1):
            size += len(piece)
        return size


class BareSocket:
    """The least that any client can do: it sends and receives items of the sizes that memchunk
    stores for such a file, in batches of the same sizes, each item with a zlib.crc32, without
    looking at what comes in. The bytes that it sends are its own."""

    def __init__(self, address: str) -> None:
        self._address, self._socket, self._size = address, dial(address), -1

    def _plan(self, size: int) -> None:
        """Find out what memchunk stores for `size` bytes."""
        with memchunk.connect(self._address) as cache:
            writer = cache.create("probe", size)
            writer.write(bytes(size))
            writer.close()
            with contextlib.closing(Client(self._address)) as client:
                keys = [f"memchunk:{writer.info.version}:{i}" for i in range(writer.info.chunks)]
                sizes = [len(client.get(key)) for key in keys]
            cache.delete("probe")
        self._size, self._at_once = size, writer.batch_size // max(sizes) or 1
        self._items = [(b"bare:%d" % index, each) for index, each in enumerate(sizes)]
        self._data = memoryview(os.urandom(sum(sizes)))
        self._buffer = memoryview(bytearray(max(sizes) + 300))

    def set(self, name: str, data: Any) -> None:
        if len(data) != self._size:
            self._plan(len(data))
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

    def chunks(self, name: str) -> int:
        """Receive all into one reused buffer."""
        return self._read(lambda _, size: self._buffer[:size])

    def get(self, name: str) -> bytearray:
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


# Each makes a client for an address. What they all have: `set` from bytes; `chunks`, which reads
# all in pieces and drops them; `get` whole. Names of different peers don't meet in one server.
PEERS: dict[str, Callable[[str], Any]] = {
    "memchunk": Memchunk,
    "bare socket": BareSocket,
    "pymemcache by hand, MD5": ByHand,
    "pymemcache by hand, CRC-32": lambda address: ByHand(address, Crc32),
    "pylibmc multi": lambda address: Multi(address, Unchecked),
    "pylibmc multi, CRC-32": lambda address: Multi(address, Crc32),
    "pymemcache, -I 64m": lambda address: OneValue(pymemcache(address)),
    "pylibmc, -I 64m": lambda address: OneValue(pylibmc(address)),
    "redis-py + hiredis": Redis,
}


@contextlib.contextmanager
def peers(unix: bool) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Those that work on this machine, each with its server; and why the others don't."""
    ready, reasons = {}, {}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def server(*options: str) -> str:
            redis = options == ("redis",)
            return stack.enter_context(
                redis_server(unix) if redis else memcached(*options, unix=unix)
            )

        for label, connect in PEERS.items():
            kind = "redis" if "redis" in label else "-I 64m" if "-I 64m" in label else ""
            try:
                ready[label] = connect(server(*kind.split()))
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
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batches(items: Sequence[Any], at_once: int) -> Iterator[Any]:
    for start in range(0, len(items), max(at_once, 1)):
        yield items[start : start + max(at_once, 1)]


def empty(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
    """The yardstick of HTTP, a WSGI application that only reads the body, or sends constant bytes
    (BENCH_SIZE of them)."""
    left = int(environ.get("CONTENT_LENGTH") or 0)
    while left:
        left -= len(environ["wsgi.input"].read(min(left, MIB))) or left
    body = constant() if environ["REQUEST_METHOD"] == "GET" else b""
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


@functools.cache
def constant() -> bytes:
    return os.urandom(int(os.environ["BENCH_SIZE"]))
