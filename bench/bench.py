"""Measure memchunk beside its yardsticks, in one run, and print the whole table.

    python bench.py                 everything, about 20 minutes on two cores
    python bench.py speed http      some of: speed memory cache eviction scale http
    python bench.py --quick         a smoke run of a minute: its figures mean little

How: every figure is taken in turn with its yardstick (A B A B ...) against the same servers. A
time is the median of all rounds; a ratio is the median, and in brackets the quartiles, of the
ratios of single rounds, so that what slows the machine down for a while slows both. Below 1
memchunk is faster.

The yardstick "bare socket" is the least that any client can do: it sends and receives items of
the very sizes that memchunk stores, in the batches in which memchunk asks for them, over the same
kind of socket with a time-out set, with one zlib.crc32 over each, and without looking at what
comes in.

All memcached, Redis and HTTP servers are its own, on Unix sockets and free ports of the loopback
interface, and are stopped at the end. What is not installed is named in the table, with what to
install: pip install pylibmc "redis[hiredis]" gunicorn waitress cheroot uwsgi matplotlib; and the
system's packages memcached and redis-server.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import itertools
import multiprocessing
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, ClassVar, NamedTuple

import trustme
from pymemcache.client.base import Client
from pymemcache.client.hash import HashClient
from pymemcache.exceptions import MemcacheError

import memchunk

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

KIB, MIB = 1024, 1024 * 1024
MB = 1_000_000
TIMEOUT = 30.0  # seconds that a client waits for a server before a figure counts as failed
START = 20.0  # seconds that a server may take to start
HAND_CHUNK = 1_000_000  # bytes: what people cut files into by hand, as it fits memcached's 1 MB
STREAM = MIB  # bytes that a yardstick reads at a time where it streams
FOLDER = pathlib.Path(__file__).resolve().parent.parent
PLOTS = FOLDER / "docs"
PACKAGES = (
    *("pymemcache", "werkzeug", "pylibmc", "redis", "hiredis"),
    *("gunicorn", "waitress", "cheroot", "uwsgi", "matplotlib"),
)

Task = Callable[[], object]


class Missing(Exception):
    """What a figure needs is not installed; the message says what to install."""


class Failed(Exception):
    """A server did not start, or did not answer as it should."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure. size: bytes of "the file" in speed, memory and http. rounds: of A B A B."""

    quick: bool
    seed: int
    size: int
    rounds: int
    plots: pathlib.Path

    def data(self, size: int) -> bytes:
        return seeded(self.seed).randbytes(size)


def seeded(seed: int) -> random.Random:
    return random.Random(seed)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table at the end: a figure, and the aim that it is held against."""

    what: str
    yardstick: str
    figure: str
    aim: str = ""
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        verdict = "" if self.met is None else "yes" if self.met else "NO"
        return self.what, self.yardstick, self.figure, self.aim, verdict


# Printing


def heading(text: str) -> None:
    print(f"\n## {text}\n", flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table that also reads well as it is."""
    lines = [[cell.replace("\n", " ")[:110] for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")
    print(flush=True)


def size_text(size: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size} B"


def milliseconds(times: Iterable[float]) -> str:
    return f"{statistics.median(times) * 1000:.1f} ms"


def mebibytes(size: float) -> str:
    return f"{size / MIB:.1f} MiB"


# Measuring


def in_turn(tasks: Mapping[str, Task], rounds: int) -> dict[str, list[float]]:
    """Seconds that each task took in each round. What a task returns is freed off the clock."""
    times: dict[str, list[float]] = {label: [] for label in tasks}
    for _ in range(rounds):
        for label, task in tasks.items():
            start = time.perf_counter()
            result = task()
            times[label].append(time.perf_counter() - start)
            del result
    return times


class Ratio:
    """Of two series of the same rounds."""

    def __init__(self, ours: Iterable[float], theirs: Iterable[float]) -> None:
        ratios = [a / b for a, b in zip(ours, theirs)]
        self.median = statistics.median(ratios)
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios
        self.text = f"{self.median:.2f} ({quartiles[0]:.2f}-{quartiles[-1]:.2f})"


class Tap(socket.socket):
    """A socket that records round trips: what its user sends before it waits for an answer."""

    trips: ClassVar[list[list[bytes]]] = []  # of all taps: the lines sent, without what is long
    _lines: list[bytes] | None = None  # sent since the last answer

    @classmethod
    @contextlib.contextmanager
    def installed(cls) -> Iterator[list[list[bytes]]]:
        """While this lasts, new sockets of this process are recorded."""
        cls.trips.clear()
        with unittest.mock.patch("socket.socket", cls):
            yield cls.trips

    def sendall(self, data: Any, *flags: int) -> None:
        self._record([data])
        super().sendall(data, *flags)

    def sendmsg(self, buffers: Any, *arguments: Any) -> int:
        self._record(buffers)
        return super().sendmsg(buffers, *arguments)

    def recv(self, *arguments: int) -> bytes:
        self._lines = None
        return super().recv(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        self._lines = None
        return super().recv_into(*arguments)

    def _record(self, buffers: Iterable[Any]) -> None:
        if self._lines is None:
            self._lines = []
            self.trips.append(self._lines)
        for buffer in buffers:
            if len(buffer) < 8 * KIB:
                self._lines += bytes(buffer).split(b"\r\n")


def most_at_once(trips: Iterable[Iterable[bytes]], command: bytes) -> int:
    """The most keys that one round trip stores or asks for by `command`."""
    keys = {b"set": 1, b"get": None}[command]
    return max(
        sum(len(line.split()[1:][:keys]) for line in set(lines) if line.startswith(command + b" "))
        for lines in trips
    )


class Memory:
    """How far processes grow beyond what they held when this was made, idle."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._idle = {pid: self._read(pid, "VmRSS") for pid in pids}

    def growth(self, task: Task) -> int:
        """Bytes, of the process that grew most, at the peak of `task`."""
        for pid in self._idle:
            # Sets the peak, VmHWM, back to what is held now.
            pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")
        task()
        return max(self._read(pid, "VmHWM") - idle for pid, idle in self._idle.items())

    @staticmethod
    def _read(pid: int, field: str) -> int:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        return int(found[1]) * KIB if found else 0


# Servers


@contextlib.contextmanager
def running(
    command: Sequence[str],
    ready: Callable[[], bool],
    end: signal.Signals = signal.SIGKILL,
    **environ: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, from when it is `ready` until the block ends. Raises Failed with what it said."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=FOLDER,
            env={**os.environ, **environ},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers can be stopped with it
        )
        try:
            deadline = time.monotonic() + START
            while not ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    words = log.read().decode(errors="replace").strip().splitlines()
                    raise Failed(f"{' '.join(command)} did not start: {words[-1:]}")
                time.sleep(0.01)
            yield process
        finally:
            stop(process, end)


def stop(process: subprocess.Popen[bytes], end: signal.Signals) -> None:
    """Send `end` to the process and its workers, and SIGKILL to those that are left."""
    for number in (end, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def dial(address: str) -> socket.socket:
    """A connection to "unix:/path" or "host:port", with a time-out, as any real client's has."""
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        target: Any = address[len("unix:") :]
    else:
        connection = socket.socket(socket.AF_INET)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, _, port = address.partition(":")
        target = host, int(port)
    connection.settimeout(TIMEOUT)
    try:
        connection.connect(target)
    except BaseException:
        connection.close()
        raise
    return connection


def answers(address: str) -> bool:
    with contextlib.suppress(OSError):
        dial(address).close()
        return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def program(name: str, package: str) -> str:
    """The path of a program, beside this Python or on PATH. Raises Missing."""
    beside = shutil.which(name, path=str(pathlib.Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        raise Missing(f"not installed: {package}")
    return found


@contextlib.contextmanager
def memcached(*options: str, unix: bool = False) -> Iterator[str]:
    """The address of a memcached of our own. It has 4 threads, as it does by default."""
    command = [program("memcached", "apt-get install memcached"), "-U", "0", *options]
    command += ["-u", "root"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        port = free_port()
        address = f"unix:{folder}/memcached" if unix else f"127.0.0.1:{port}"
        listen = ["-s", f"{folder}/memcached"] if unix else ["-l", "127.0.0.1", "-p", str(port)]
        with running([*command, *listen], functools.partial(answers, address)):
            yield address


@contextlib.contextmanager
def redis_server(unix: bool = False) -> Iterator[str]:
    """The address of a Redis of our own that keeps nothing on disk, as a cache would not."""
    command = [program("redis-server", "apt-get install redis-server")]
    command += ["--save", "", "--appendonly", "no"]
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        port = free_port()
        address = f"unix:{folder}/redis" if unix else f"127.0.0.1:{port}"
        listen = ["--port", "0", "--unixsocket", f"{folder}/redis"]
        listen = listen if unix else ["--bind", "127.0.0.1", "--port", str(port)]
        with running([*command, *listen], functools.partial(answers, address)):
            yield address


# The ways to keep a file in a cache: memchunk, and what people use instead of it


class Peer:
    """A client that keeps files: `set` from bytes, `drain` in pieces that are dropped, `get`
    whole. Keys differ from class to class: several share a server.

    server: which kind it needs, one of SERVERS. shared: whether threads may share one.
    """

    server: ClassVar[str] = "memcached"
    shared: ClassVar[bool] = False
    refusals: ClassVar[tuple[type[Exception], ...]] = (MemcacheError,)  # of `set` by a full cache
    losses: ClassVar[tuple[type[Exception], ...]] = (KeyError,)  # of reading what is not there

    def __init__(self, *addresses: str) -> None:
        raise NotImplementedError

    def set(self, name: str, data: Any) -> None:
        raise NotImplementedError

    def drain(self, name: str) -> int:
        """Read the whole file without keeping it; return its size."""
        return len(self.get(name))

    def get(self, name: str) -> bytes:
        raise NotImplementedError

    def intact(self, name: str, size: int) -> bool:
        try:
            return self.drain(name) == size
        except self.losses:
            return False


class Memchunk(Peer):
    """memchunk as it comes, through `connect`."""

    shared = True
    refusals = (memchunk.CacheFull,)
    losses = (memchunk.MemchunkError,)

    def __init__(self, *addresses: str) -> None:
        self.cache = memchunk.connect(",".join(addresses), timeout=TIMEOUT)

    def set(self, name: str, data: Any) -> None:
        self.cache.set(name, data)

    def drain(self, name: str) -> int:
        return sum(map(len, self.cache.open(name).chunks()))

    def get(self, name: str) -> bytes:
        return self.cache.get(name)


class ByHand(Peer):
    """What is written by hand on pymemcache: chunks of 1,000,000 bytes, stored one by one, fetched
    by `get_many`, and beside them their number and an MD5, which the reader checks."""

    def __init__(self, *addresses: str) -> None:
        kind = HashClient if addresses[1:] else Client
        servers: Any = list(addresses) if addresses[1:] else addresses[0]
        self._client: Any = kind(
            servers, timeout=TIMEOUT, connect_timeout=TIMEOUT, no_delay=True, default_noreply=False
        )

    def set(self, name: str, data: Any) -> None:
        name, count = f"hand:{name}", 0
        for start in range(0, len(data), HAND_CHUNK):
            if not self._client.set(f"{name}:{count}", bytes(data[start : start + HAND_CHUNK])):
                raise MemcacheError(f"{name}:{count} was not stored")
            count += 1
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        self._client.set(name, f"{count} {digest}")

    def _parts(self, name: str, at_once: int | None) -> Iterator[bytes]:
        name = f"hand:{name}"
        manifest = self._client.get(name)
        if manifest is None:
            raise KeyError(name)
        count, digest = manifest.split()
        md5 = hashlib.md5(usedforsecurity=False)
        keys = [f"{name}:{index}" for index in range(int(count))]
        step = at_once or max(len(keys), 1)
        for start in range(0, len(keys), step):
            found = self._client.get_many(keys[start : start + step])
            for key in keys[start : start + step]:
                md5.update(found[key])
                yield found[key]
        if md5.hexdigest().encode() != digest:
            raise KeyError(name)

    def drain(self, name: str) -> int:
        return sum(map(len, self._parts(name, 2)))

    def get(self, name: str) -> bytes:
        return b"".join(self._parts(name, None))


def optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Missing(f"not installed: pip install {package}") from None


class Pylibmc(Peer):
    """libmemcached, in C: `set_multi` and `get_multi` of 1,000,000-byte chunks, unchecked."""

    def __init__(self, *addresses: str) -> None:
        self._module = optional("pylibmc", "pylibmc")
        self._client: Any = self._module.Client(
            [address.replace("unix:", "") for address in addresses],
            behaviors={
                "tcp_nodelay": True,
                "receive_timeout": int(TIMEOUT * 1e6),
                "send_timeout": int(TIMEOUT * 1e6),
            },
        )

    def set(self, name: str, data: Any) -> None:
        name, starts = f"multi:{name}", range(0, len(data), HAND_CHUNK)
        chunks = {f"{name}:{i}": data[at : at + HAND_CHUNK] for i, at in enumerate(starts)}
        if self._client.set_multi({**chunks, name: len(chunks)}):
            raise MemcacheError(f"{name} was not stored")

    def _parts(self, name: str, at_once: int | None) -> Iterator[bytes]:
        name = f"multi:{name}"
        keys = [f"{name}:{index}" for index in range(self._client[name])]
        step = at_once or max(len(keys), 1)
        for start in range(0, len(keys), step):
            found = self._client.get_multi(keys[start : start + step])
            yield from (found[key] for key in keys[start : start + step])

    def drain(self, name: str) -> int:
        return sum(map(len, self._parts(name, 2)))

    def get(self, name: str) -> bytes:
        return b"".join(self._parts(name, None))


class PylibmcChecked(Pylibmc):
    """The same with a CRC-32 of the file beside it, which the reader checks: like with like."""

    def set(self, name: str, data: Any) -> None:
        super().set(name, data)
        self._client.set(f"crc:{name}", zlib.crc32(data))

    def _parts(self, name: str, at_once: int | None) -> Iterator[bytes]:
        crc = 0
        for part in super()._parts(name, at_once):
            crc = zlib.crc32(part, crc)
            yield part
        if crc != self._client[f"crc:{name}"]:
            raise KeyError(name)


class OneValue(Peer):
    """The file as one value, on a memcached that was started with -I 64m; through pymemcache."""

    server = "memcached -I 64m"

    def __init__(self, *addresses: str) -> None:
        self._client: Any = Client(
            addresses[0], timeout=TIMEOUT, no_delay=True, default_noreply=False
        )

    def set(self, name: str, data: Any) -> None:
        if not self._client.set(name, data):
            raise MemcacheError(f"{name} was not stored")

    def get(self, name: str) -> bytes:
        value = self._client.get(name)
        if value is None:
            raise KeyError(name)
        return bytes(value)


class PylibmcOneValue(Pylibmc):
    """The same through libmemcached."""

    server = "memcached -I 64m"

    def set(self, name: str, data: Any) -> None:
        if not self._client.set(f"one:{name}", data):
            raise MemcacheError(f"{name} was not stored")

    def drain(self, name: str) -> int:
        return len(self.get(name))

    def get(self, name: str) -> bytes:
        value: bytes = self._client[f"one:{name}"]
        return value


class Redis(Peer):
    """redis-py with hiredis: one value; in pieces, GETRANGE of 1 MiB each."""

    server = "redis"
    shared = True

    def __init__(self, *addresses: str) -> None:
        module = optional("redis", "'redis[hiredis]'")
        optional("hiredis", "'redis[hiredis]'")
        path = addresses[0].partition("unix:")[2]
        host, _, port = addresses[0].partition(":")
        place = {"unix_socket_path": path} if path else {"host": host, "port": int(port)}
        self._client: Any = module.Redis(**place, socket_timeout=TIMEOUT)

    def set(self, name: str, data: Any) -> None:
        self._client.set(name, data)

    def drain(self, name: str) -> int:
        size = 0
        while piece := self._client.getrange(name, size, size + STREAM - 1):
            size += len(piece)
        return size

    def get(self, name: str) -> bytes:
        value: bytes = self._client.get(name)
        return value


PEERS: dict[str, type[Peer]] = {
    "memchunk": Memchunk,
    "pymemcache by hand": ByHand,
    "pylibmc multi": Pylibmc,
    "pymemcache -I 64m": OneValue,
    "pylibmc -I 64m": PylibmcOneValue,
    "redis-py + hiredis": Redis,
}

CHECKED: dict[str, type[Peer]] = {"pylibmc multi + CRC": PylibmcChecked}  # in `speed` only

SERVERS: dict[str, Callable[[bool], contextlib.AbstractContextManager[str]]] = {
    "memcached": lambda unix: memcached("-m", "1024", unix=unix),
    "memcached -I 64m": lambda unix: memcached("-m", "1024", "-I", "64m", unix=unix),
    "redis": redis_server,
}


class BareSocket:
    """The yardstick: the items of one file, sent and received by the shortest loop there is.

    sizes: of the items' values. sets, gets: how many are sent, and how many are asked for, before
    the answer is read.
    """

    def __init__(self, address: str, sizes: Sequence[int], sets: int, gets: int) -> None:
        self._socket = dial(address)
        self._data = os.urandom(sum(sizes))
        items = [(b"bare:%d" % index, size) for index, size in enumerate(sizes)]
        self._sets, self._gets = (
            [items[at : at + step] for at in range(0, len(items), step)] for step in (sets, gets)
        )
        self._buffer = bytearray(max(sizes) + 300)

    def set(self) -> None:
        offset, view = 0, memoryview(self._data)
        for batch in self._sets:
            parts: list[Any] = []
            for key, size in batch:
                payload = view[offset : offset + size]
                zlib.crc32(payload)
                parts += (b"set %b 0 0 %d\r\n" % (key, size), payload, b"\r\n")
                offset += size
            self._send(parts)
            replies = memoryview(self._buffer)[: len(batch) * len(b"STORED\r\n")]
            self._receive(replies)
            if replies != b"STORED\r\n" * len(batch):
                raise Failed("memcached refused an item of the bare socket")

    def drain(self) -> None:
        """Receive all into one reused buffer."""
        buffer = memoryview(self._buffer)
        for batch in self._gets:
            self._ask(batch)
            for key, size in batch:
                head = len(b"VALUE %b 0 %d\r\n" % (key, size))
                self._receive(buffer[: head + size + 2])
                zlib.crc32(buffer[head : head + size])
            self._receive(buffer[: len(b"END\r\n")])

    def get(self) -> bytearray:
        """Receive all into one fresh buffer."""
        output, line = bytearray(len(self._data)), memoryview(self._buffer)
        offset, view = 0, memoryview(output)
        for batch in self._gets:
            self._ask(batch)
            for key, size in batch:
                payload = view[offset : offset + size]
                self._receive(line[: len(b"VALUE %b 0 %d\r\n" % (key, size))])
                self._receive(payload)
                self._receive(line[: len(b"\r\n")])
                zlib.crc32(payload)
                offset += size
            self._receive(line[: len(b"END\r\n")])
        return output

    def check(self) -> None:
        """Store the items, and see that what comes back is what was sent."""
        self.set()
        self.drain()
        if self.get() != self._data:
            raise Failed("the bare socket got other bytes than it sent")

    def close(self) -> None:
        self._socket.close()

    def _ask(self, batch: Iterable[tuple[bytes, int]]) -> None:
        self._socket.sendall(b"get " + b" ".join(key for key, _ in batch) + b"\r\n")

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
                raise Failed("memcached closed the connection")
            view = view[received:]


def bare_socket(address: str, size: int) -> contextlib.closing[BareSocket]:
    """The yardstick for a file of `size` bytes: finds out what memchunk stores and asks for."""
    with Tap.installed() as trips:
        cache = memchunk.connect(address)
        info = cache.set("probe", bytes(size))
        cache.get("probe")
        cache.close()
    client = Client(address, timeout=TIMEOUT)
    with contextlib.closing(client):
        prefix = f"{cache.namespace}:{info.version}"
        sizes = [len(client.get(f"{prefix}:{index}")) for index in range(info.chunks)]
    cache.delete("probe")
    cache.close()
    bare = BareSocket(address, sizes, most_at_once(trips, b"set"), most_at_once(trips, b"get"))
    bare.check()
    return contextlib.closing(bare)


# Section: speed

OPERATIONS = {
    "set": "`set` from bytes",
    "drain": "`open().chunks()` drained",
    "get": "`get` to bytes",
}
BARE_AIMS = {"set": 1.3, "drain": 1.2, "get": 1.3}


def speed(options: Options) -> Iterator[Row]:
    """Time of one file's `set`, `chunks()` and `get` beside the bare socket's and each peer's."""
    for unix in (False, True):
        transport = "Unix socket" if unix else "TCP loopback"
        heading(f"speed: {size_text(options.size)} over {transport}")
        yield from speed_over(options, unix, transport)


def speed_over(options: Options, unix: bool, transport: str) -> Iterator[Row]:
    data = options.data(options.size)
    kinds = {**PEERS, **CHECKED}
    with peers(unix, kinds) as (ready, missing), contextlib.ExitStack() as stack:
        bare = stack.enter_context(bare_socket(ready["memchunk"][1], options.size))
        check_peers(ready, missing, data)
        lines = []
        for operation, what in OPERATIONS.items():
            arguments = {"set": ("file", data)}.get(operation, ("file",))
            tasks: dict[str, Task] = {
                label: functools.partial(getattr(peer, operation), *arguments)
                for label, (peer, _) in ready.items()
            }
            yardstick = {"bare socket": getattr(bare, operation)}
            times = in_turn({"memchunk": tasks["memchunk"], **yardstick, **tasks}, options.rounds)
            ours = times.pop("memchunk")
            for label, theirs in times.items():
                ratio = Ratio(ours, theirs)
                aim = BARE_AIMS[operation] if label == "bare socket" else 1.0
                lines.append((what, label, milliseconds(ours), milliseconds(theirs), ratio.text))
                text = f"<= {aim}" if label == "bare socket" else "< 1"
                met = ratio.median <= aim
                yield Row(f"{what}, {transport}", label, f"x {ratio.text}", text, met)
        table(("operation", "beside", "memchunk", "theirs", "ratio"), lines)
        for label, reason in missing.items():
            print(f"{label}: {reason}")
            yield Row(f"speed, {transport}", label, reason)


def tls(options: Options) -> Iterator[Row]:
    """The same three over TLS, to a memcached with -Z, beside plain TCP."""
    heading(f"TLS: {size_text(options.size)} over TCP loopback")
    authority, data = trustme.CA(), options.data(options.size)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    certificate = authority.issue_cert("127.0.0.1")
    with contextlib.ExitStack() as stack:
        chain = stack.enter_context(certificate.private_key_and_cert_chain_pem.tempfile())
        secured = ("-Z", "-o", f"ssl_chain_cert={chain},ssl_key={chain}")
        servers = [stack.enter_context(memcached("-m", "512", *extra)) for extra in ((), secured)]
        plain = stack.enter_context(memchunk.connect(servers[0]))
        over_tls = stack.enter_context(memchunk.connect(servers[1], tls=context))
        lines = []
        for operation, what in OPERATIONS.items():
            tasks = {
                label: functools.partial(TLS_TASKS[operation], cache, data)
                for label, cache in (("plain", plain), ("tls", over_tls))
            }
            over_tls.set("file", data)
            plain.set("file", data)
            times = in_turn(tasks, options.rounds)
            ratio = Ratio(times["tls"], times["plain"])
            ours = milliseconds(times["tls"]), milliseconds(times["plain"])
            lines.append((what, *ours, ratio.text))
            yield Row(f"{what}, TLS", "plain TCP", f"x {ratio.text}")
        table(("operation", "TLS", "plain TCP", "ratio"), lines)


TLS_TASKS: dict[str, Callable[[memchunk.FileCache, bytes], object]] = {
    "set": lambda cache, data: cache.set("file", data),
    "drain": lambda cache, data: sum(map(len, cache.open("file").chunks())),
    "get": lambda cache, data: cache.get("file"),
}


def check_peers(
    ready: dict[str, tuple[Peer, str]], missing: dict[str, str], data: bytes
) -> None:
    """Store the file with each; who doesn't give it back is moved to `missing`, and why."""
    for label, (peer, _) in list(ready.items()):
        try:
            peer.set("file", data)
            if peer.get("file") != data or not peer.intact("file", len(data)):
                raise Failed("it gave other bytes back")
        except Exception as error:
            missing[label] = f"failed: {error!r}"
            del ready[label]


@contextlib.contextmanager
def peers(
    unix: bool, kinds: Mapping[str, type[Peer]] = PEERS
) -> Iterator[tuple[dict[str, tuple[Peer, str]], dict[str, str]]]:
    """The peers that are installed, each with its server's address; why the others are not."""
    ready: dict[str, tuple[Peer, str]] = {}
    missing: dict[str, str] = {}
    addresses: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for label, kind in kinds.items():
            try:
                if kind.server not in addresses:
                    addresses[kind.server] = stack.enter_context(SERVERS[kind.server](unix))
                ready[label] = kind(addresses[kind.server]), addresses[kind.server]
            except (Missing, Failed) as error:
                missing[label] = str(error)
        if "memchunk" not in ready:
            raise Missing(missing["memchunk"])
        yield ready, missing


# Section: memory


def memory(options: Options) -> Iterator[Row]:
    """Peak memory beyond that of the same process idle: of a child process for the library, of the
    server for HTTP. Idle is after the imports and a file of 1 KiB, so with connections open."""
    heading(f"memory: peak above idle, {size_text(options.size)}")
    rows = []
    with memcached("-m", "1024") as address, tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "file")
        path.write_bytes(options.data(options.size))
        Memchunk(address).set("file", path.read_bytes())
        for name in CHILDREN:
            command = [sys.executable, __file__, "--child", name, address, str(path)]
            output = subprocess.check_output(command)
            rows.append((name, int(output), name == "get to bytes"))
        rows += http_memory(options, address)
    allowed = {False: 8 * MIB, True: 8 * MIB + options.size}
    for name, growth, whole in rows:
        aim = "+ 8 MiB" + (" + file" if whole else "")
        yield Row(
            f"peak memory: {name}", "idle", f"+ {mebibytes(growth)}", aim, growth <= allowed[whole]
        )
    table(("peak memory of", "above idle"), [(name, mebibytes(size)) for name, size, _ in rows])


def http_memory(options: Options, address: str) -> list[tuple[str, int, bool]]:
    """The same of a server process, for uploads and a download through gunicorn, or wsgi.py."""
    host = "gunicorn sync"
    try:
        HOSTS[host].command(0, "wsgi:application")
    except Missing:
        host = "werkzeug"
    data = options.data(options.size)
    with served(host, "wsgi:application", MEMCHUNK_SERVERS=address) as server:
        server.upload(bytes(KIB))
        used = Memory(server.pids())
        return [
            (f"HTTP upload, {host}", used.growth(lambda: server.upload(data)), False),
            (f"HTTP form upload, {host}", used.growth(lambda: server.upload_form(data)), False),
            (f"HTTP download, {host}", used.growth(lambda: server.download(len(data))), True),
        ]


def child_set(cache: memchunk.FileCache, path: str) -> None:
    with open(path, "rb") as file:
        cache.set("child", file)


def child_pipe(cache: memchunk.FileCache, path: str) -> None:
    with open(path, "rb") as file:
        cache.set("child", iter(functools.partial(file.read, 64 * KIB), b""))


def child_chunks(cache: memchunk.FileCache, path: str) -> None:
    for _ in cache.open("file").chunks():
        pass


def child_get(cache: memchunk.FileCache, path: str) -> None:
    cache.get("file")


CHILDREN: dict[str, Callable[[memchunk.FileCache, str], None]] = {
    "set from a file": child_set,
    "set from an iterator": child_pipe,
    "chunks() drained": child_chunks,
    "get to bytes": child_get,
}


def child(name: str, address: str, path: str) -> None:
    """What a child process of `memory` does: one operation, and print the bytes that it took."""
    cache = memchunk.connect(address)
    cache.set("small", bytes(KIB))
    cache.get("small")
    print(Memory([os.getpid()]).growth(lambda: CHILDREN[name](cache, path)))


# Section: cache


def cache_memory(options: Options) -> Iterator[Row]:
    """Bytes of memcached's memory per byte of a file: all slab chunks that it takes, whole, as
    `stats slabs` counts them: with keys, headers, the manifest, and what is left of each chunk."""
    heading("cache: bytes of -m taken per byte of a file")
    source = seeded(options.seed)
    drawn = [source.randint(5 * MB, 50 * MB) for _ in range(5 if options.quick else 40)]
    rows = []
    for size in (5 * MB, 10 * MB, 20 * MB, 50 * MB):
        known, unknown = taken(Memchunk, [size]), taken(MemchunkUnknown, [size])
        others = taken(ByHand, [size]), taken(OneValue, [size])
        rows.append([f"{size // MB} MB", *(f"{ratio:.3f}" for ratio in (known, unknown, *others))])
        yield cache_row(f"{size // MB} MB", known)
        yield cache_row(f"{size // MB} MB, size unknown", unknown)
    known, unknown = taken(Memchunk, drawn), taken(MemchunkUnknown, drawn)
    what = f"worst of {len(drawn)} sizes of 5-50 MB"
    yield cache_row(what, known)
    yield cache_row(f"{what}, unknown", unknown)
    rows.append([what, f"{known:.3f}", f"{unknown:.3f}", "", ""])
    table(("file", "memchunk", "size unknown", "1,000,000-byte chunks", "one value, -I 64m"), rows)


def cache_row(what: str, ratio: float) -> Row:
    return Row(f"cache memory: {what}", "file bytes", f"x {ratio:.3f}", "<= 1.02", ratio <= 1.02)


class MemchunkUnknown(Memchunk):
    """memchunk that isn't told sizes, as with an upload of unknown length."""

    def set(self, name: str, data: Any) -> None:
        self.cache.set(name, iter([data]))


def taken(kind: type[Peer], sizes: Iterable[int]) -> float:
    """What a file takes in an empty memcached, per byte; the most, for several sizes."""
    ratios = []
    for size in sizes:
        with SERVERS[kind.server](True) as address:
            peer = kind(address)
            before = slab_bytes(address)
            peer.set("file", bytes(size))
            ratios.append((slab_bytes(address) - before) / size)
    return max(ratios)


def slab_bytes(address: str) -> int:
    """All slab chunks in use."""
    client = Client(address, timeout=TIMEOUT)
    with contextlib.closing(client):
        fields = {key.decode(): value for key, value in client.stats("slabs").items()}
    classes = {key.partition(":")[0] for key in fields if ":" in key}
    return sum(
        int(fields[f"{each}:chunk_size"]) * int(fields[f"{each}:used_chunks"]) for each in classes
    )


# Section: eviction

MIXES = {"0-50 MB": (0, 50), "5-50 MB": (5, 50), "5-10 MB": (5, 10), "0-2 MB": (0, 2)}
AIMED = ("0-50 MB", "5-50 MB")  # on a cache of 1 GB


@dataclasses.dataclass(frozen=True)
class Pressed:
    """What was left of a series, as shares of -m. kept: held by intact files. run: held by the
    newest files up to the first that is not intact. possible: of the newest files, those that
    would fit if memcached needed no byte for itself. refused: sets that raised CacheFull; these
    files count for nothing."""

    kept: float
    run: float
    possible: float
    refused: int


def eviction(options: Options) -> Iterator[Row]:
    """What a cache holds of files of random sizes, five times its own size of them written."""
    heading("eviction: 5 x the cache written; shares of -m, of the worst seed")
    rows = []
    for megabytes, mix in itertools.product([64] if options.quick else [1024, 64], MIXES):
        seeds = range(options.seed, options.seed + (1 if options.quick else 3))
        ours = {seed: pressed(Memchunk, megabytes, mix, seed) for seed in seeds}
        seed, low = min(ours.items(), key=lambda each: min(each[1].kept, each[1].run))
        hand = pressed(ByHand, megabytes, mix, seed)
        refused = sum(each.refused for each in ours.values())
        figures = (low.kept, low.run, low.possible, refused, hand.kept, hand.run, hand.refused)
        rows.append((f"-m {megabytes}", mix, *(f"{figure:.3g}" for figure in figures)))
        aimed = megabytes == 1024 and mix in AIMED
        yield Row(
            f"eviction: -m {megabytes}, files of {mix}",
            "-m",
            f"kept {low.kept:.3f}, run {low.run:.3f} of {low.possible:.3f}, {refused} refused",
            ">= 0.95 both" if aimed else "",
            min(low.kept, low.run) >= 0.95 if aimed else None,
        )
    ours_header = ("memchunk: kept", "run", "possible", "refused")
    table(("cache", "files of", *ours_header, "by hand: kept", "run", "refused"), rows)


def pressed(kind: type[Peer], megabytes: int, mix: str, seed: int) -> Pressed:
    """Write the series of files to a fresh memcached, newest last, and look what is left."""
    source, pool = seeded(seed), memoryview(os.urandom(2 * 50 * MB))
    low, high = MIXES[mix]
    stored: list[tuple[str, int]] = []
    total, written, refused = megabytes * MIB, 0, 0
    with memcached("-m", str(megabytes), unix=True) as address:
        peer = kind(address)
        while written < 5 * total:
            size, start = source.randint(low * MB, high * MB), source.randint(0, 50 * MB)
            written += size
            name = f"file{len(stored) + refused}"
            try:
                peer.set(name, pool[start : start + size])
                stored.append((name, size))
            except peer.refusals:
                refused += 1
        found = [(size, peer.intact(name, size)) for name, size in reversed(stored)]
    kept = sum(size for size, intact in found if intact)
    run = sum(size for size, _ in itertools.takewhile(lambda each: each[1], found))
    sums = itertools.accumulate(size for size, _ in found)
    possible = max((held for held in sums if held <= total), default=0)
    return Pressed(kept / total, run / total, possible / total, refused)


# Section: scale

SIZES = [KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 50 * MIB]
CLIENTS = [1, 2, 4, 8, 16]
CLIENT_SIZE = MIB  # bytes of the files that concurrent clients set and get
NAMES = 16  # different files that each of them goes through

Series = dict[str, dict[int, float]]  # peer -> size, clients or servers -> bytes per second


def scale(options: Options) -> Iterator[Row]:
    """Throughput against the size of the files, the number of clients, and that of servers; and
    the round trips of every operation."""
    round_trips()
    by_size = {what: sizes_series(options, what) for what in ("set", "get")}
    by_clients = {}
    with contextlib.closing(Processes(2 if options.quick else max(CLIENTS))) as processes:
        for how, run in (("threads", run_threads), ("processes", processes.run)):
            for what in ("set", "get"):
                by_clients[what, how] = clients_series(options, what, how, run)
        for what in ("set", "get"):
            servers_series(options, what, processes)
    yield from plots(options, by_size, by_clients)


def round_trips() -> None:
    """Print how often memchunk sends and then waits for an answer, a connection open."""
    heading("scale: round trips of an operation")
    rows = []
    with memcached("-m", "1024", unix=True) as address, Tap.installed() as trips:
        cache = memchunk.connect(address)
        cache.set("warm", b"")  # opens the connection, and asks for the server's settings
        for size in (0, KIB, 100 * KIB, MIB, 50 * MIB):
            data = bytes(size)
            tasks: dict[str, Task] = {
                "add": functools.partial(cache.add, "file", data),
                "set (replace)": functools.partial(cache.set, "file", data),
                "get": functools.partial(cache.get, "file"),
                "stat": functools.partial(cache.stat, "file"),
                "touch": functools.partial(cache.touch, "file", 60),
                "delete": functools.partial(cache.delete, "file"),
            }
            counts = []
            for task in tasks.values():
                trips.clear()
                task()
                counts.append(str(len(trips)))
            rows.append((size_text(size), *counts))
        cache.close()
    table(("file", *tasks), rows)


def sizes_series(options: Options, what: str) -> Series:
    """Bytes per second of one client, for files of each size, all peers in turn."""
    heading(f"scale: {what}, MiB/s against the size, one client, Unix socket")
    series: Series = {}
    with peers(unix=True) as (ready, missing):
        for size in SIZES[::4] if options.quick else SIZES:
            data = options.data(size)
            repeats = max(1, min(50, 2 * MIB // size))
            tasks: dict[str, Task] = {}
            for label, (peer, _) in ready.items():
                peer.set("file", data)
                tasks[label] = functools.partial(repeat, peer, what, data, repeats)
            for label, times in in_turn(tasks, options.rounds).items():
                rate = size * repeats / statistics.median(times)
                series.setdefault(label, {})[size] = rate
    print_series(series, missing, size_text)
    return series


def repeat(peer: Peer, what: str, data: bytes, repeats: int) -> None:
    for _ in range(repeats):
        if what == "set":
            peer.set("file", data)
        else:
            peer.get("file")


def print_series(series: Series, missing: Mapping[str, str], name: Callable[[int], str]) -> None:
    columns = list(next(iter(series.values())))
    rows = [
        (label, *(f"{points[column] / MIB:,.1f}" for column in columns))
        for label, points in series.items()
    ]
    table(("MiB/s", *map(name, columns)), rows)
    for label, reason in missing.items():
        print(f"{label}: {reason}")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one of several clients does: `what`, over and over, for some seconds."""

    label: str
    addresses: tuple[str, ...]
    client: int
    what: str
    seconds: float

    def run(self, peer: Peer, wait: Callable[[], object]) -> float:
        """Bytes per second. `wait` returns when all clients are ready."""
        data = os.urandom(CLIENT_SIZE)
        names = [f"client{self.client}:{index}" for index in range(NAMES)]
        for name in names:
            peer.set(name, data)
        wait()
        start, count = time.monotonic(), 0
        while time.monotonic() < start + self.seconds:
            name = names[count % NAMES]
            if self.what == "set":
                peer.set(name, data)
            else:
                peer.get(name)
            count += 1
        return count * len(data) / (time.monotonic() - start)


def run_threads(work: Sequence[Work]) -> float:
    """Bytes per second of threads that share a client where it is made for that."""
    kind, barrier = PEERS[work[0].label], threading.Barrier(len(work))
    shared = kind(*work[0].addresses)
    rates: list[float] = []

    def run(each: Work) -> None:
        try:
            peer = shared if kind.shared else kind(*each.addresses)
            rates.append(each.run(peer, barrier.wait))
        finally:
            if len(rates) == 0:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(rates) < len(work):
        raise Failed("a client failed")
    return sum(rates)


class Processes:
    """Client processes, started once, that wait for work."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            context.Process(target=work_loop, args=(theirs,), daemon=True).start()
            theirs.close()
            self._pipes.append(ours)

    def run(self, work: Sequence[Work]) -> float:
        """Bytes per second of all together, one process for each."""
        pipes = self._pipes[: len(work)]
        for pipe, each in zip(pipes, work):
            pipe.send(each)
        ready = [pipe for pipe in pipes if pipe.recv() is not None]
        for pipe in ready:
            pipe.send("go")
        rates = [rate for rate in [pipe.recv() for pipe in ready] if rate is not None]
        if len(rates) < len(work):
            raise Failed("a client failed")
        return float(sum(rates))

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()


def work_loop(pipe: Any) -> None:
    """What a client process does until its pipe is closed."""

    def wait() -> None:
        pipe.send("ready")
        pipe.recv()

    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            work: Work = pipe.recv()
            try:
                pipe.send(work.run(PEERS[work.label](*work.addresses), wait))
            except Exception as error:
                print(f"client {work.client} of {work.label}: {error!r}", file=sys.stderr)
                pipe.send(None)


def plan(
    label: str, addresses: tuple[str, ...], clients: int, what: str, seconds: float
) -> list[Work]:
    return [Work(label, addresses, client, what, seconds) for client in range(clients)]


def clients_series(
    options: Options, what: str, how: str, run: Callable[[Sequence[Work]], float]
) -> Series:
    """Bytes per second of several clients, each with a connection, all peers in turn."""
    size = size_text(CLIENT_SIZE)
    heading(f"scale: {what} of {size} files, MiB/s against clients ({how}), Unix socket")
    series: Series = {}
    repeats, seconds = (1, 0.2) if options.quick else (3, 0.5)
    with peers(unix=True) as (ready, missing):
        for clients in CLIENTS[:2] if options.quick else CLIENTS:
            rates: dict[str, list[float]] = {}
            for _, (label, (_, address)) in itertools.product(range(repeats), ready.items()):
                rate = run(plan(label, (address,), clients, what, seconds))
                rates.setdefault(label, []).append(rate)
            for label, found in rates.items():
                series.setdefault(label, {})[clients] = statistics.median(found)
    print_series(series, missing, str)
    return series


def servers_series(options: Options, what: str, processes: Processes) -> None:
    """The same of up to 4 processes with 1 to 4 memcached servers, for those that can spread."""
    clients = 2 if options.quick else 4
    size = size_text(CLIENT_SIZE)
    heading(f"scale: {what} of {size} files, MiB/s against servers, {clients} processes, TCP")
    series: Series = {}
    repeats, seconds = (1, 0.2) if options.quick else (3, 0.5)
    for count in (1, 2) if options.quick else (1, 2, 3, 4):
        with contextlib.ExitStack() as stack:
            addresses = tuple(
                stack.enter_context(memcached("-m", "1024")) for _ in range(count)
            )
            rates: dict[str, list[float]] = {}
            for _, label in itertools.product(range(repeats), ("memchunk", "pymemcache by hand")):
                rate = processes.run(plan(label, addresses, clients, what, seconds))
                rates.setdefault(label, []).append(rate)
            for label, found in rates.items():
                series.setdefault(label, {})[count] = statistics.median(found)
    print_series(series, {}, str)


def plots(
    options: Options, by_size: Mapping[str, Series], by_clients: Mapping[tuple[str, str], Series]
) -> Iterator[Row]:
    """Draw throughput.png and clients.png."""
    try:
        pyplot = optional("matplotlib.pyplot", "matplotlib")
    except Missing as error:
        yield Row("pictures", "", str(error))
        return
    pyplot.switch_backend("Agg")
    panels = {f"{what}, one client": series for what, series in by_size.items()}
    draw(pyplot, options.plots / "throughput.png", panels, "size of the file", size_text)
    panels = {
        f"{what} of {size_text(CLIENT_SIZE)} files, {how}": series
        for (what, how), series in by_clients.items()
    }
    draw(pyplot, options.plots / "clients.png", panels, "clients at the same time", str)


STYLES = {  # colours that those who see few colours can tell apart, on white
    "memchunk": ("#d1242f", "o"),
    "pymemcache by hand": ("#0969da", "s"),
    "pylibmc multi": ("#1a7f37", "^"),
    "pymemcache -I 64m": ("#54aeff", "D"),
    "pylibmc -I 64m": ("#bf8700", "v"),
    "redis-py + hiredis": ("#6e7781", "P"),
}


def draw(
    pyplot: Any,
    path: pathlib.Path,
    panels: Mapping[str, Series],
    label: str,
    name: Callable[[int], str],
) -> None:
    """One panel for each series, with logarithmic axes, on a ground of its own colour, which reads
    on light pages and on dark ones."""
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(
        rows, 2, figsize=(11, 1 + 4 * rows), sharey="row", squeeze=False, facecolor="#f6f8fa"
    )
    for axis, (title, series) in zip(axes.flat, panels.items()):
        for peer, points in series.items():
            colour, marker = STYLES[peer]
            width = 2.6 if peer == "memchunk" else 1.4
            rates = [rate / MIB for rate in points.values()]
            axis.plot(
                list(points), rates, color=colour, marker=marker, linewidth=width, label=peer
            )
        columns = list(next(iter(series.values())))
        axis.set(title=title, xlabel=label, ylabel="MiB/s", xscale="log", yscale="log")
        axis.set_xticks(columns, list(map(name, columns)), rotation=30, fontsize=8)
        axis.minorticks_off()
        ticks = [10.0**power * step for power in range(5) for step in (1, 2, 5)]
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in ticks if low <= tick <= high])
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.grid(color="#d0d7de", linewidth=0.6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.3 / (1 + 4 * rows), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"drew {path.name}")


# Section: http


@dataclasses.dataclass(frozen=True)
class Host:
    """A WSGI host. arguments: its command, for {app} on {port}, with one process. module: it is
    run with `python -m`; else a program. package: what to install."""

    arguments: str
    package: str
    module: str = ""
    program: str = ""

    def command(self, port: int, app: str) -> list[str]:
        """Raises Missing."""
        arguments = self.arguments.format(app=app, port=port).split()
        if self.program:
            return [program(self.program, f"pip install {self.package}"), *arguments]
        optional(self.module, self.package)
        return [sys.executable, "-m", self.module, *arguments]


class Werkzeug(Host):
    """Werkzeug's own server, as `python wsgi.py` runs it."""

    def command(self, port: int, app: str) -> list[str]:
        optional("werkzeug", "werkzeug")
        file, option = ("wsgi.py", "--port") if app.startswith("wsgi:") else (__file__, "--serve")
        return [sys.executable, file, option, str(port)]


UWSGI = "--master --need-app --processes 1 --buffer-size 16384 --die-on-term --module {app}"
HOSTS = {
    "werkzeug": Werkzeug("", "werkzeug"),
    "gunicorn sync": Host("-w 1 -b 127.0.0.1:{port} {app}", "gunicorn", "gunicorn"),
    "gunicorn gthread": Host(
        "-w 1 --threads 4 -b 127.0.0.1:{port} {app}", "gunicorn", "gunicorn"
    ),
    "waitress": Host("--listen=127.0.0.1:{port} {app}", "waitress", "waitress"),
    "cheroot": Host("--bind 127.0.0.1:{port} {app}", "cheroot", "cheroot"),
    "uWSGI": Host(f"{UWSGI} --http-socket 127.0.0.1:{{port}}", "uwsgi", program="uwsgi"),
}


class Http:
    """The least that an HTTP client can do, against a server that is running."""

    def __init__(self, port: int) -> None:
        self._address = f"127.0.0.1:{port}"
        self._buffer = bytearray(MIB)
        self.process: subprocess.Popen[bytes]

    def ready(self) -> bool:
        with contextlib.suppress(OSError, Failed):
            self._exchange("GET", "/healthz")
            return True
        return False

    def pids(self) -> list[int]:
        """The server's process and all below it: it was started in a session of its own."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                session = path.read_text().rpartition(")")[2].split()[3]
                if int(session) == self.process.pid:
                    found.append(int(path.parent.name))
        return found

    def upload(self, data: bytes) -> None:
        self._exchange("PUT", "/files/bench", "application/octet-stream", data)

    def upload_form(self, data: bytes) -> None:
        head = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        parts = head, data, b"\r\n--cut--\r\n"
        self._exchange("POST", "/files", "multipart/form-data; boundary=cut", *parts)

    def download(self, size: int) -> None:
        received = self._exchange("GET", "/files/bench")
        if received != size:
            raise Failed(f"{received} bytes came instead of {size}")

    def _exchange(self, method: str, path: str, content_type: str = "", *parts: bytes) -> int:
        """Send a request; return the length of the answer's body. Raises Failed unless 2xx."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
        if parts:
            lines += [f"Content-Length: {sum(map(len, parts))}", f"Content-Type: {content_type}"]
        with dial(self._address) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            for part in parts:
                connection.sendall(part)
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(KIB)
                if not piece:
                    raise Failed(f"{method} {path}: the connection was closed")
                head += piece
            head, _, rest = head.partition(b"\r\n\r\n")
            length = len(rest)
            while received := connection.recv_into(self._buffer):
                length += received
        if not re.match(rb"HTTP/1\.[01] 2", head):
            raise Failed(f"{method} {path}: {head.splitlines()[:1]}")
        return length


@contextlib.contextmanager
def served(host: str, app: str, **environ: str) -> Iterator[Http]:
    """A client of a fresh server. Raises Missing."""
    port = free_port()
    client = Http(port)
    command = HOSTS[host].command(port, app)
    with running(command, client.ready, signal.SIGTERM, **environ) as client.process:
        yield client


def http(options: Options) -> Iterator[Row]:
    """Uploads and downloads through each host, beside the same host with an application that only
    reads the body, or sends constant bytes, plus the time of the bare socket to memcached."""
    heading(f"http: {size_text(options.size)} up and down, over TCP loopback, one client")
    rows = []
    with memcached("-m", "1024") as address, bare_socket(address, options.size) as bare:
        for host in HOSTS:
            try:
                found = http_host(options, host, address, bare)
            except (Missing, Failed, OSError) as error:
                yield Row(f"HTTP, {host}", "", str(error))
                continue
            for what, (times, growth, allowed) in found.items():
                ours, empty, rest = times["memchunk"], times["empty"], times["bare"]
                sums = [a + b for a, b in zip(empty, rest)]
                ratio, figures = Ratio(ours, sums), map(milliseconds, (ours, empty, rest))
                rate = options.size / statistics.median(ours) / MIB
                memory = f"+ {mebibytes(growth)}"
                rows.append((host, what, f"{rate:,.0f}", *figures, ratio.text, memory))
                met = ratio.median <= 1.25
                text = f"x {ratio.text}"
                yield Row(f"HTTP {what}, {host}", "same host + bare socket", text, "<= 1.25", met)
                aim, held = f"+ {mebibytes(allowed)}", f"peak memory: HTTP {what}, {host}"
                yield Row(held, "idle", memory, aim, growth <= allowed)
    header = ("host", "", "MiB/s", "memchunk", "empty app", "bare socket", "ratio", "peak memory")
    table(header, rows)


class Measured(NamedTuple):
    """The seconds of "memchunk", "empty" application and "bare" socket; the bytes of memory that
    the server took at its peak, and may."""

    times: dict[str, list[float]]
    growth: int
    allowed: int


def http_host(options: Options, host: str, address: str, bare: BareSocket) -> dict[str, Measured]:
    """The figures of one host, for "upload" and "download"."""
    data, size = options.data(options.size), options.size
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(served(host, "wsgi:application", MEMCHUNK_SERVERS=address))
        empty = stack.enter_context(served(host, "bench:empty_app", BENCH_SIZE=str(size)))
        ours.upload(data[:KIB])
        ours.download(len(data[:KIB]))
        used = Memory(ours.pids())
        growth_up = used.growth(lambda: ours.upload(data))
        growth_down = used.growth(lambda: ours.download(size))
        up = {
            "memchunk": lambda: ours.upload(data),
            "empty": lambda: empty.upload(data),
            "bare": bare.set,
        }
        down = {
            "memchunk": lambda: ours.download(size),
            "empty": lambda: empty.download(size),
            "bare": bare.get,
        }
        for task in (*up.values(), *down.values()):
            task()
        uploads, downloads = in_turn(up, options.rounds), in_turn(down, options.rounds)
    return {
        "upload": Measured(uploads, growth_up, 8 * MIB),
        "download": Measured(downloads, growth_down, 8 * MIB + size),
    }


@functools.cache
def constant() -> bytes:
    return os.urandom(int(os.environ["BENCH_SIZE"]))


def empty_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """A WSGI application that only reads the body, and sends constant bytes."""
    left = int(environ.get("CONTENT_LENGTH") or 0)
    while left:
        left -= len(environ["wsgi.input"].read(min(left, STREAM))) or left
    body = constant() if environ["REQUEST_METHOD"] == "GET" else b""
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def serve(port: int) -> None:
    """The same on Werkzeug's own server."""
    importlib.import_module("werkzeug.serving").make_server(
        "127.0.0.1", port, empty_app, threaded=True
    ).serve_forever()


# The command

SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "speed": speed,
    "tls": tls,
    "memory": memory,
    "cache": cache_memory,
    "eviction": eviction,
    "scale": scale,
    "http": http,
}


def print_machine(options: Options) -> None:
    """What the figures were measured on and with."""
    lines = {"machine": f"{processor()}, {os.cpu_count()} cores"}
    with contextlib.suppress(ValueError, OSError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines["machine"] += f", {pages / 2**30:.0f} GiB"
        lines["load before"] = f"{os.getloadavg()[0]:.2f}"
    lines["system"] = f"{platform.system()} {platform.release()}"
    lines["Python"] = f"{platform.python_implementation()} {platform.python_version()}"
    lines["memcached"] = version_of("memcached", "apt-get install memcached")
    lines["Redis"] = version_of("redis-server", "apt-get install redis-server")
    for package in PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
    lines["rounds"] = f"{options.rounds}, seed {options.seed}" + " (quick)" * options.quick
    table(("", ""), lines.items())


def processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def version_of(name: str, package: str) -> str:
    try:
        command = [program(name, package), "--version"]
    except Missing as error:
        return str(error)
    output = subprocess.check_output(command, text=True)
    found = re.search(r"\d+\.\d+[\w.]*", output)
    return found[0] if found else output.strip()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure memchunk beside its yardsticks.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute")
    parser.add_argument("--seed", type=int, default=1, help="of all random bytes and sizes")
    parser.add_argument("--mib", type=float, help="size of the file in speed, memory and http")
    parser.add_argument("--rounds", type=int, help="how often each figure is taken")
    parser.add_argument("--plots", type=pathlib.Path, help=f"folder, default {PLOTS.name}")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are stopped
    if arguments.child:
        return child(*arguments.child)
    if arguments.serve:
        return serve(arguments.serve)
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            quick=quick,
            seed=arguments.seed,
            size=int((arguments.mib or (8 if quick else 50)) * MIB),
            rounds=arguments.rounds or (3 if quick else 21),
            # A smoke run leaves the pictures of the last real one as they are.
            plots=arguments.plots or (pathlib.Path(folder) if quick else PLOTS),
        )
        report(options, arguments.sections or list(SECTIONS))
    return None


def report(options: Options, sections: Iterable[str]) -> None:
    """Run the sections, each of which prints its own tables, and print the table of all."""
    print("# memchunk, measured\n")
    print_machine(options)
    rows: list[Row] = []
    for section in sections:
        start = time.monotonic()
        try:
            rows += SECTIONS[section](options)
        except (Missing, Failed, OSError, MemcacheError, memchunk.MemchunkError) as error:
            rows.append(Row(section, "", f"failed: {error}"))
        print(f"({section}: {time.monotonic() - start:.0f} s)", flush=True)
    heading("all figures and their aims")
    table(("what", "beside", "figure", "aim", "met"), (row.cells() for row in rows))


if __name__ == "__main__":
    main()
