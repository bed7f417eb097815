# mcpool 1.0.0, MIT licence, one file to copy; README.md and docs/ belong to it.
"""A pool of fast memcached connections, with the interface of pymemcache 4.

    pool = mcpool.connect("10.0.0.1,10.0.0.2:11212,unix:/run/memcached.sock")
    pool = mcpool.connect("tls://user:password@cache.example.com")

* Threads may share a pool. It survives a fork. Without a TLS context, it pickles.
* A call's waits share one time limit, except for DNS and the caller's generator. For
  `set_many` and `delete_many`, 256 keys are a call; over TLS, each key is one.
* After a time-out, calls to that server fail at once for two seconds. Then one call
  tries, and the others fail until it has its answer.
* A key belongs to one server. No other takes over, or old values would come back.
* Errors are OSErrors or pymemcache's. None of them shows a password.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import socket
import ssl
import threading
import time
import weakref
from collections import ChainMap, deque
from collections.abc import Iterable
from hashlib import sha256
from typing import Any, Callable
from urllib.parse import unquote_to_bytes

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError, MemcacheUnknownError
from pymemcache.exceptions import MemcacheUnexpectedCloseError as MemcacheClosed

__all__ = ["Cluster", "NoAnswer", "ServerPool", "connect"]
__version__ = "1.0.0"

_IDLE = 60  # seconds; firewalls forget connections that are unused for longer
_DOWN = 2  # seconds without calls to a slow server, or new connections to a full one
_SMALL = 8192  # bytes; shorter commands travel together; no line of a reply is longer
_OUTSTANDING = 256  # replies that may stay unread; they fit in a socket's buffer

_ADDRESS = re.compile(
    r"(?P<tls>(tls://)?)((?P<login>[^:@]+:[^@]+)@)?"
    r"(?P<place>(\[(?P<ipv6>[\w:.%]+)\]|(?P<host>(?!\d+(:|$))[^][\s:/@,]+))"
    r"(:(?P<port>\d{1,5}))?)"
)
_VALUE = re.compile(rb"VALUE (\S+) \d+ (1?\d{1,9})(?: (\d+))?")  # -I is 1 GiB at most


class NoAnswer(TimeoutError):
    """The server did not answer in time, now or within the last two seconds."""


def connect(
    servers: str | Iterable[str],
    *,
    timeout: float = 5.0,
    tls: ssl.SSLContext | None = None,
    max_connections: int = 64,
) -> ServerPool | Cluster:
    """Make a pool for one server or several. It connects when it is first used.
    servers: addresses, as an iterable or with commas between: "host", "host:port",
    "[ipv6]:port" or "unix:/path". "tls://" and "user:password@", percent-encoded, may
    stand before a host. timeout: seconds that a call may wait in all. max_connections:
    for each server. tls: for every host. Without it, "tls://" uses Python's default."""
    if not 0 < timeout <= threading.TIMEOUT_MAX or max_connections < 1:
        raise ValueError("timeout must be above 0, and max_connections 1 or more")
    given = servers.split(",") if isinstance(servers, str) else servers
    parsed = [_parse(each, number) for number, each in enumerate(given, 1)]
    if not parsed or len({server.place for server in parsed}) < len(parsed):
        raise ValueError("no memcached server is given, or one is given twice")
    pools = [ServerPool(each, timeout, tls, max_connections) for each in parsed]
    return Cluster(pools) if len(pools) > 1 else pools[0]


@dataclasses.dataclass(frozen=True)
class _Server:
    name: str  # the address as it was given, without credentials
    place: Any  # the path of a Unix socket, or host and port
    tls: bool = False
    login: bytes = dataclasses.field(default=b"", repr=False)  # the login command


def _parse(address: object, number: int) -> _Server:
    """Parse an address. Errors don't show it, because a password may be in it."""
    text = str(address).strip()
    if text.startswith("unix:/"):
        return _Server(text, text.replace("unix:", "", 1))
    match = _ADDRESS.fullmatch(text)
    port = int(match["port"] or 11211) if match else 0
    if not match or not 1 <= port <= 65535:
        forms = "host, host:port, [ipv6]:port or unix:/path"
        raise ValueError(f"memcached address {number} is not valid; write {forms}")
    login = b" ".join(map(unquote_to_bytes, (match["login"] or "").split(":", 1)))
    login = login and b"set auth x 0 %d\r\n%b\r\n" % (len(login), login)
    host, tls = (match["ipv6"] or match["host"]).lower(), match["tls"]
    host.encode("idna")  # or a ValueError
    return _Server(tls + match["place"], (host, port), bool(tls), login)


def _command(name: str, join: Any = lambda found: dict(ChainMap(*found))) -> Any:
    """pymemcache's method of that name, done at the server of its key. For many keys,
    `join` merges the results of their servers."""

    def method(self: Any, *args: Any, **options: Any) -> Any:
        if not name.endswith("_many"):
            key = args[0] if args else options.get("key", b"")
            return self.for_key(key)._call(name, *args, **options)
        first = "values" if name == "set_many" else "keys"
        given, *rest = args or (options.pop(first),)
        shares: dict[tuple[ServerPool, int], dict[Any, Any]] = {}
        for number, key in enumerate(given):
            pool, value = self.for_key(key), given[key] if name == "set_many" else None
            # pymemcache sends all that it gets, and then reads. So it gets a few.
            share = 0 if name.startswith("get") else number // pool._together
            shares.setdefault((pool, share), {})[key] = value
        calls = [(pool._call, own) for (pool, _), own in shares.items()]
        return join([call(name, own, *rest, **options) for call, own in calls])

    return method


class _Commands:
    """pymemcache's methods. Unlike in pymemcache, `noreply` is False by default."""

    key_prefix, no_delay = b"", True
    get, gets, touch, delete = map(_command, ("get", "gets", "touch", "delete"))
    set, add, replace, cas = map(_command, ("set", "add", "replace", "cas"))
    append, prepend, incr, decr = map(_command, ("append", "prepend", "incr", "decr"))
    get_many, gets_many = map(_command, ("get_many", "gets_many"))
    set_many = _command("set_many", lambda found: [key for own in found for key in own])
    delete_many = _command("delete_many", all)


class Cluster(_Commands):
    """Several servers. Rendezvous hashing of a key, up to "|#|", chooses one of them.
    `servers` has their pools by name, for commands without a key."""

    def __init__(self, pools: Iterable[ServerPool]) -> None:
        self.servers = {pool.server: pool for pool in pools}

    def for_key(self, key: str | bytes) -> ServerPool:
        key = key.encode() if isinstance(key, str) else key
        tail = b"-" + key.partition(b"|#|")[0]
        ranks = {sha256(name.encode() + tail).digest(): name for name in self.servers}
        return self.servers[ranks[max(ranks)]]

    def close(self) -> None:
        for pool in self.servers.values():
            pool.close()


class ServerPool(_Commands):
    """Connections to one server, whose name is `server`. `connect` makes it."""

    stats, version, flush_all = map(_command, ("stats", "version", "flush_all"))
    pipeline = _command("pipeline")  # see _Connection

    def __init__(self, server: _Server, timeout: float, tls: Any, maximum: int) -> None:
        self.server, self.servers = server.name, {server.name: self}
        self._given = server, timeout, tls, maximum
        self._server, self._timeout, self._maximum = server, timeout, maximum
        self._tls = tls or (ssl.create_default_context() if server.tls else None)
        self._together = 1 if self._tls else _OUTSTANDING  # see pipeline
        self._fork_locks: dict[int, Any] = {}  # by process, as forks copy held locks
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._idle: deque[_Connection] = deque()
        # Calls wait for locks. In Python 3.12, a signal can make SimpleQueue.get hang.
        self._waiters: dict[Any, list[_Connection]] = {}
        # If a signal handler makes us lose one, the garbage collector removes it.
        self._all: set[weakref.ref[_Connection]] = set()
        self._full_until, self._refusal = 0.0, ""
        self._down_until = 0.0  # 0: it answers. In the past: the next call tries.
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return ServerPool, self._given

    def for_key(self, key: str | bytes) -> ServerPool:
        return self

    def close(self, idle: float = 0) -> None:
        """Close what is unused for `idle` seconds. The pool can still be used."""
        if self._pid != os.getpid():  # a child must not use its parent's
            with self._fork_locks.setdefault(os.getpid(), threading.RLock()):
                if self._pid != os.getpid():
                    for connection in filter(None, [ref() for ref in [*self._all]]):
                        connection.close()
                    self._start()
        limit = time.monotonic() - idle
        with self._lock:
            while self._idle and self._idle[0].used <= limit:
                connection = self._idle.popleft()  # the newest are used first
                connection.close()
                self._all.discard(weakref.ref(connection))

    def _call(self, command: str, *args: Any, **options: Any) -> Any:
        """Have a connection do a command, within the time limit."""
        connection, is_done, now = None, False, time.monotonic()
        if now < self._down_until:
            raise NoAnswer(f"{self.server} did not answer in time a moment ago")
        if self._down_until:
            self._down_until = now + self._timeout  # this call tries, others fail
        try:
            connection = self._take(now + self._timeout)
            result = getattr(connection, command)(*args, **options)
            if connection.ahead:
                raise MemcacheUnknownError(connection.ahead[:32])
            self._down_until, is_done = 0.0, True
            return result
        except BaseException as error:
            if isinstance(error, NoAnswer):
                self._down_until = time.monotonic() + _DOWN
            elif not isinstance(error, TimeoutError):  # the next call tries
                self._down_until = min(self._down_until, time.monotonic())
            raise
        finally:
            if connection:
                if not is_done:
                    connection.close()  # perhaps in mid-reply
                self._give(connection)

    def _take(self, deadline: float) -> _Connection:
        """An open connection, for this call alone. If none can be opened, wait for one
        of those that are open; half of the time is left for that."""
        while True:
            connection = self._find(deadline)
            try:
                if not connection._socket or connection.has_news():
                    connection.open((deadline - time.monotonic()) / 2)
                connection.left = deadline - time.monotonic()
                return connection
            except BaseException as error:
                connection.close()
                is_only = len(self._all) == 1
                if is_only or not isinstance(error, (OSError, MemcacheError)):
                    self._give(connection)  # a waiting call, if any, opens it again
                    raise
                # The server may be full. So wait for a connection that is open.
                self._full_until, self._refusal = time.monotonic() + _DOWN, str(error)
            self._all.discard(weakref.ref(connection))

    def _find(self, deadline: float) -> _Connection:
        """The newest idle connection, else a new one, else the next to come free."""
        self.close(0 if self._down_until else _IDLE)  # one that tries again starts anew
        with self._lock:
            now = time.monotonic()
            if self._idle:
                return self._idle.pop()
            is_full = now < self._full_until
            if len(self._all) < (1 if is_full else self._maximum):
                connection = _Connection(self._server, self._tls)
                self._all.add(weakref.ref(connection, self._all.discard))
                return connection
            (turn := threading.Lock()).acquire()
            self._waiters[turn] = handed = list[_Connection]()
        try:
            if turn.acquire(timeout=max(deadline - now, 0)):
                return handed.pop()
            why = self._refusal if is_full else f"max_connections is {self._maximum}"
            raise TimeoutError(f"{self.server}: no free connection; {why}")
        finally:
            with self._lock:
                self._waiters.pop(turn, None)
                if handed:  # It came too late for this call.
                    self._give(handed.pop())

    def _give(self, connection: _Connection) -> None:
        """Hand a connection to the call that waits longest, else keep it if open."""
        with self._lock:
            connection.used = time.monotonic()
            if self._waiters:
                turn, handed = next(iter(self._waiters.items()))
                # Signal handlers run after calls. The next two lines have no call.
                handed += [connection]
                del self._waiters[turn]
                turn.release()
            elif connection._socket:
                self._idle.append(connection)
            else:
                self._all.discard(weakref.ref(connection))


class _Connection(Client):
    """pymemcache's client for one connection, with the slow steps replaced. It calls
    `sendall` and `recv` of its `sock`. That is the object itself."""

    # A reference to itself would keep a lost connection alive.
    sock: Any = property(lambda self: self, lambda self, _: None)
    _socket: Any = None  # None: closed
    left = 0.0  # seconds that this call may still wait
    used = 0.0  # when the last call ended

    def __init__(self, server: _Server, tls: ssl.SSLContext | None) -> None:
        super().__init__(server.place, default_noreply=False)
        self._server = server
        self._tls = tls if isinstance(server.place, tuple) else None

    def has_news(self) -> bool:
        """Data came that nobody asked for, or the server closed it."""
        try:
            self._socket.settimeout(0)
            self._socket.recv(1)
        except OSError as error:
            return not isinstance(error, (BlockingIOError, ssl.SSLWantReadError))
        return True

    def open(self, seconds: float) -> None:
        """Connect to the first of the host's addresses that takes the connection."""
        self.close()
        place, self.left, self.ahead = self._server.place, seconds, b""
        if isinstance(place, str):
            self._socket = socket.socket(socket.AF_UNIX)
            self._wait(self._socket.connect, place)
        else:
            # If an address does not answer in half of the time, the next has the rest.
            half = max(seconds / 2, 1e-6)
            self._socket = self._wait(socket.create_connection, place, half)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls:
            wrap = self._tls.wrap_socket
            self._socket = self._wait(wrap, self._socket, server_hostname=place[0])
        # Log in, or have a harmless command answered, before others rely on it.
        with contextlib.suppress(ConnectionError):  # it may have sent a refusal first
            self.sendall(self._server.login or b"get mcpool-%d\r\n" % time.time_ns())
        # A proxy says SERVER_ERROR if only one of its servers is down.
        if not (reply := self.recv()).startswith((b"STORED", b"END", b"SERVER_ERROR")):
            error = ConnectionError if b"Too many" in reply else MemcacheUnknownError
            raise error(f"{self._server.name} says {reply[:64]!r}")

    def close(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def _wait(self, operation: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Do an operation of the socket, for at most the time that is left."""
        started = time.monotonic()
        try:
            if self._socket:
                self._socket.settimeout(max(self.left, 1e-6))
            result = operation(*args, **options)
        except (TimeoutError, socket.timeout) as error:
            raise NoAnswer(f"{self._server.name} did not answer in time") from error
        finally:
            self.left -= time.monotonic() - started
        if result is not None and not result:
            raise MemcacheClosed(f"{self._server.name} closed the connection")
        return result

    def sendall(self, *parts: Any) -> None:
        """Send parts as they lie in memory."""
        # TLS has no sendmsg. That of eventlet's sockets does not wait.
        gathers = hasattr(type(self._socket), "sendmsg") and not self._tls
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        while views:
            if gathers:
                sent = self._wait(self._socket.sendmsg, views[:64])  # limit: 1024
            else:
                sent = self._wait(self._socket.send, views[0])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def recv(self, _: int = 0) -> bytes:
        """The next line with its end, and nothing behind it."""
        while b"\r\n" not in self.ahead[: _SMALL + 2]:
            if len(self.ahead) > _SMALL:
                raise MemcacheUnknownError(f"{self._server.name} sends no line end")
            self.ahead += self._wait(self._socket.recv, _SMALL)
        line, end, self.ahead = self.ahead.partition(b"\r\n")
        return line + end

    def pipeline(self, commands: Iterable[Iterable[Any]]) -> list[bytes]:
        """Send several commands in one go, and return their replies in order.
        A command is an iterable of bytes-like parts, without "noreply". A reply is one
        line, without its end, and may be an error. On TCP, a generator makes a command
        while the one before it travels. On Unix sockets, that is 13 % slower."""
        if isinstance(self._server.place, str):
            commands = [list(command) for command in commands]
        replies: list[bytes] = []
        expected, unsent = 0, b""
        for command in commands:
            parts, expected = [unsent, *command], expected + 1
            # memcached's TLS may overlook a command that begins within a record.
            if self._tls or sum(map(len, parts)) >= _SMALL:
                self.sendall(*parts)
                parts = []
                while expected - len(replies) > _OUTSTANDING:
                    replies.append(self.recv()[:-2])
            unsent = b"".join(parts)
        self.sendall(unsent)
        return replies + [self.recv()[:-2] for _ in range(expected - len(replies))]

    def _extract_value(
        self, expect_cas: bool, line: bytes, buf: bytes, remapped_keys: Any, _: Any
    ) -> tuple[Any, Any, bytes]:
        """Receive one value; pymemcache's docstring offers this for overriding."""
        match = _VALUE.fullmatch(line)
        if not match or match[1] not in remapped_keys or bool(match[3]) != expect_cas:
            raise MemcacheUnknownError(line[:64])
        # `getvalue` does not copy it, so the value is in memory once.
        output = io.BytesIO(bytes(int(match[2])))
        with output.getbuffer() as view:
            filled = min(len(view), len(self.ahead))
            view[:filled], self.ahead = self.ahead[:filled], self.ahead[filled:]
            while filled < len(view):
                filled += self._wait(self._socket.recv_into, view[filled:])
        if self.recv() != b"\r\n":
            raise MemcacheUnknownError("a value is longer than announced")
        key, value = remapped_keys[match[1]], output.getvalue()
        return key, (value, match[3]) if expect_cas else value, buf
