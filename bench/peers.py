"""Ways to keep a file in a cache: memchunk, what people use instead, and the least."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import pathlib
import ssl
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Callable

from pymemcache.client.base import Client, PooledClient

import mcpool
import memchunk
from bench.measure import MIB, TIMEOUT, Missing, dial, memcached, redis_server

HAND_CHUNK = 1_000_000  # bytes: what people cut by hand, as it fits memcached's 1 MB
READ_BATCH = 2 * MIB  # bytes that who reads in pieces asks for at a time, as memchunk


def peer(cache: Any) -> Any:
    """A FileCache, of any version, with the one verb more that peers have."""
    cache.chunks = lambda name: sum(map(len, cache.open(name).chunks()))
    return cache


def over_mcpool(address: str, tls: ssl.SSLContext | None = None) -> Any:
    return peer(memchunk.FileCache(mcpool.connect(address, tls=tls)))


def over_stock(address: str) -> Any:
    """memchunk.py alone, which makes a PooledClient of pymemcache for an address."""
    return peer(memchunk.FileCache(address, namespace="stock"))


def pymemcache(address: str) -> Any:
    return Client(address, timeout=TIMEOUT, no_delay=True, default_noreply=False)


def pylibmc(address: str) -> Any:
    limits = dict.fromkeys(("receive_timeout", "send_timeout"), int(TIMEOUT * 1e6))
    behaviors = {"tcp_nodelay": True, **limits}
    return importlib.import_module("pylibmc").Client([address], behaviors=behaviors)


class ByHand:
    """Chunks, and beside them a manifest: their number and a CRC-32 that readers check.
    store: takes a dictionary of values. fetch: takes keys and returns one."""

    def __init__(self, prefix: str, store: Any, fetch: Any) -> None:
        self._prefix, self._store, self._fetch = prefix, store, fetch

    def set(self, name: str, data: Any) -> None:
        crc, name = 0, f"{self._prefix}:{name}"
        chunks = [bytes(chunk) for chunk in batches(data, HAND_CHUNK)]
        for chunk in chunks:
            crc = zlib.crc32(chunk, crc)
        self._store({f"{name}:{index}": chunk for index, chunk in enumerate(chunks)})
        self._store({name: b"%d %d" % (len(chunks), crc)})

    def chunks(self, name: str) -> int:
        return sum(map(len, self._read(name, READ_BATCH // HAND_CHUNK)))

    def get(self, name: str) -> bytes:
        return b"".join(self._read(name, sys.maxsize))

    def _read(self, name: str, at_once: int) -> Iterator[bytes]:
        crc, name = 0, f"{self._prefix}:{name}"
        count, stored = map(int, self._fetch([name])[name].split(b" "))
        for keys in batches([f"{name}:{index}" for index in range(count)], at_once):
            found = self._fetch(keys)
            for key in keys:
                crc = zlib.crc32(found[key], crc)
                yield found[key]
        if crc != stored:
            raise ValueError(f"{name} is damaged")


def by_hand(address: str) -> ByHand:
    """What one writes on pymemcache: `set` for each chunk, and one `get_many`."""
    client = pymemcache(address)

    def store(chunks: dict[str, bytes]) -> None:
        for key, chunk in chunks.items():
            client.set(key, chunk)

    return ByHand("hand", store, client.get_many)


def multi(address: str) -> ByHand:
    """The same by libmemcached, which is C."""
    client = pylibmc(address)
    return ByHand("multi", client.set_multi, client.get_multi)


class OneValue:
    """The file as one value, on a memcached that was started with -I 64m."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._client, self._prefix = client, prefix

    def set(self, name: str, data: Any) -> None:
        self._client.set(self._prefix + name, data)

    def chunks(self, name: str) -> int:
        return len(self.get(name))

    def get(self, name: str) -> Any:
        return self._client.get(self._prefix + name)


class Redis(OneValue):
    """redis-py with hiredis: one value; in pieces, GETRANGE."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        redis = importlib.import_module("redis").Redis(
            host, int(port), socket_timeout=TIMEOUT
        )
        super().__init__(redis, "")

    def chunks(self, name: str) -> int:
        size = 0
        while piece := self._client.getrange(name, size, size + READ_BATCH - 1):
            size += len(piece)
        return size


Item = tuple[bytes, bytes]  # key and value
Step = Callable[[list[memoryview]], int]


class BareSocket:
    """The least that any client can do with just the items that memchunk stores: it
    looks the manifest up, sends or receives each item, and makes a CRC-32 of it."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        self._pool = mcpool.connect(address, tls=tls)
        self._socket, self._size = dial(address, tls), -1
        self._scratch = memoryview(bytearray(READ_BATCH))
        # TLS takes one part at a time; else several travel in one call.
        sock = self._socket
        self._send: Step = sock.sendmsg
        self._receive: Step = lambda parts: sock.recvmsg_into(parts)[0]
        if tls:
            self._send = lambda parts: sock.send(parts[0])
            self._receive = lambda parts: sock.recv_into(parts[0])

    def _plan(self, size: int) -> None:
        """Have memchunk store a file, and read its items off memcached."""
        cache = memchunk.FileCache(self._pool, namespace="baresock2")
        info, key = cache.set("file", os.urandom(size)), file_key("baresock2", "file")
        keys = [key, *(f"{key}|#|{info.version}:{at}" for at in range(info.chunks))]
        items = [(key.encode(), self._pool.get(key)) for key in keys]
        self._manifest, self._chunks, self._size = items[0], items[1:], size
        self._total = sum(len(value) for _, value in self._chunks)

    def set(self, name: str, data: Any) -> None:
        if len(data) != self._size:
            self._plan(len(data))
        self._fetch([self._manifest], self._scratch)
        for items in (self._chunks, [self._manifest]):
            self._store(items)

    def chunks(self, name: str) -> int:
        """Receive all into one reused buffer."""
        return self._read(lambda offset: self._scratch)

    def get(self, name: str) -> bytearray:
        """Receive all into one fresh buffer."""
        output = bytearray(self._total)
        view = memoryview(output)
        self._read(lambda offset: view[offset:])
        return output

    def _read(self, place: Callable[[int], memoryview]) -> int:
        self._fetch([self._manifest], self._scratch)
        offset = 0
        for items in batches(self._chunks, READ_BATCH // (512 * 1024 - 1)):
            offset += self._fetch(items, place(offset))
        return offset

    def _store(self, items: list[Item]) -> None:
        for key, value in items:
            zlib.crc32(value)  # while the item before it travels
            head = b"set %b 0 0 %d\r\n" % (key, len(value))
            self._transfer(self._send, [head, value, b"\r\n"])
        replies = self._scratch[: len(items) * len(b"STORED\r\n")]
        self._transfer(self._receive, [replies] if items else [])
        if replies != b"STORED\r\n" * len(items):
            raise OSError("memcached refused an item of the bare socket")

    def _fetch(self, items: list[Item], target: memoryview) -> int:
        """Receive values one behind the other into `target`; return their length."""
        keys = b" ".join(key for key, _ in items)
        self._transfer(self._send, [b"get %b\r\n" % keys])
        offset, marks = 0, memoryview(bytearray(300))
        for number, (key, value) in enumerate(items, 1):
            head = len(b"VALUE %b 0 %d\r\n" % (key, len(value)))
            tail = head + len(b"\r\n" if number < len(items) else b"\r\nEND\r\n")
            payload = target[slice(offset, offset + len(value))]
            self._transfer(self._receive, [marks[:head], payload, marks[head:tail]])
            zlib.crc32(payload)
            offset += len(value)
        if bytes(marks[:tail][-5:]) != b"END\r\n":
            raise OSError("the bare socket's items are gone")
        return offset

    def _transfer(self, step: Step, parts: Sequence[Any]) -> None:
        left = [memoryview(part) for part in parts]
        while left:
            done = step(left)
            if not done:
                raise OSError("memcached closed the connection")
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if done:
                left[0] = left[0][done:]


def file_key(namespace: str, name: str) -> str:
    """The key of a manifest, as docs/design.md has it."""
    return f"{namespace}:{{{hashlib.sha256(name.encode()).hexdigest()}}}"


# Each makes a client for an address. All have `set` from bytes; `chunks`, which reads
# all in pieces and drops them; `get` whole. Their names don't meet in one server.
OURS, STOCK = "memchunk", "memchunk, stock PooledClient"
BARE, HAND = "bare socket + CRC", "pymemcache by hand + CRC"
PEERS: dict[str, Callable[[str], Any]] = {
    OURS: over_mcpool,
    STOCK: over_stock,
    BARE: BareSocket,
    HAND: by_hand,
    "pylibmc by hand + CRC": multi,
    "pymemcache, one value, -I 64m": lambda each: OneValue(pymemcache(each), "p"),
    "pylibmc, one value, -I 64m": lambda each: OneValue(pylibmc(each), "c"),
    "redis-py + hiredis": Redis,
}


@contextlib.contextmanager
def peers() -> Iterator[dict[str, Any]]:
    """Those that work on this machine, each with its server."""
    ready: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def server(kind: str) -> str:
            started = redis_server() if kind == "redis" else memcached(kind)
            return stack.enter_context(started)

        for label, connect in PEERS.items():
            kinds = (kind for kind in ("redis", "-I 64m") if kind in label)
            try:
                ready[label] = connect(server(next(kinds, "")))
            except (Missing, ImportError) as error:
                print(f"{label} is left out: {error}", file=sys.stderr)
        yield ready


def versions(other: pathlib.Path, address: str) -> dict[str, dict[str, Any]]:
    """This memchunk.py and another, by the kind of their connections."""
    module, client = load(other), PooledClient(address, timeout=TIMEOUT, no_delay=True)
    stock = peer(module.FileCache(client, namespace="before2"))
    if hasattr(module, "connect"):  # before format 2, the library had its own pool
        fast = peer(module.connect(address, namespace="before"))
    else:
        pool = load(other.with_name("mcpool.py")).connect(address)
        fast = peer(module.FileCache(pool, namespace="before"))
    return {
        "own pool": {"now": over_mcpool(address), "before": fast},
        "stock PooledClient": {"now": over_stock(address), "before": stock},
    }


def load(path: pathlib.Path) -> Any:
    """Another version of a module, beside this one."""
    spec = importlib.util.spec_from_file_location(f"before_{path.stem}", path)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batches(items: Sequence[Any], at_once: int) -> Iterator[Any]:
    for start in range(0, len(items), at_once):
        end = start + at_once
        yield items[start:end]


CONSTANT = os.urandom(int(os.environ.get("BENCH_SIZE", "0")))


def empty(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The yardstick of HTTP, a WSGI application that only reads the body, or sends
    constant bytes."""
    left = int(environ.get("CONTENT_LENGTH") or 0)
    while left:
        left -= len(environ["wsgi.input"].read(min(left, MIB))) or left
    body = CONSTANT if environ["REQUEST_METHOD"] == "GET" else b""
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
