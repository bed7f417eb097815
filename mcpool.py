# mcpool 1.0.0, MIT licence, one file to copy; README.md and docs/ belong to it.
"""A pool of fast memcached connections, with the interface of pymemcache 4.

    pool = mcpool.connect("127.0.0.1:11211")
    pool = mcpool.connect("10.0.0.1,10.0.0.2:11212,unix:/run/memcached.sock")
    pool = mcpool.connect("tls://user:password@cache.example.com")

* Threads may share a pool. It survives a fork, and it can be pickled.
* A call has one time limit for all its waits: for a free connection, for the connect,
  for the reply. The time that the caller's own generator or hook takes is not counted.
* After a time-out, calls to that server fail at once for two seconds. Then one call
  tries, and the others still fail until it has its answer.
* A key belongs to one server. Another server never takes over: old values would come
  back later.
* Errors are OSErrors or pymemcache's. None of them shows a password.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import queue
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any, Callable, Union
from urllib.parse import unquote_to_bytes

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError, MemcacheUnknownError
from pymemcache.exceptions import MemcacheUnexpectedCloseError as MemcacheClosed

__all__ = ["Cluster", "NoAnswer", "ServerPool", "connect"]
__version__ = "1.0.0"

_IDLE = 60  # seconds; firewalls forget connections that idle longer
_DOWN = 2  # seconds in which a server that did not answer in time is left alone
_REFUSED = 10  # seconds after a refused connection until we try to open more
_PAUSE = 0.02  # seconds after a refused connection until the same call tries again
# A server that is out of descriptors takes a connection, but never answers. So a call
# spends this part of its time on opening one. Then it waits for an open one, or opens
# another, with all the time that is left.
_SHARE = 0.25
_LINE = 8192  # bytes; no line of memcached is longer
_TOGETHER = 8192  # bytes of small commands that are sent together
_OUTSTANDING = 256  # replies left unread after a send; they fit in a socket's buffer
_PARTS = 64  # in one sendmsg; Linux allows 1024, and POSIX promises 16

_ADDRESS = re.compile(
    r"(?P<tls>tls://)?((?P<login>[^:@]+:[^@]+)@)?"
    r"(?P<place>(\[(?P<ipv6>[\w:.%]+)\]|(?P<host>(?!\d+(:|$))[^][\s:/@,]+))"
    r"(:(?P<port>\d{1,5}))?)"
)
_VALUE = re.compile(rb"VALUE (\S+) \d+ (\d{1,9})(?: (\d+))?")  # below 1 GB, as -I is

Key = Union[str, bytes]
Receive = Callable[[Key, int, Callable[[Any], Any]], Any]


class _TooMany(ConnectionError):
    """The server says that it has too many open connections."""


class NoAnswer(TimeoutError):
    """The server did not answer in time: now, or in a call of the last two seconds."""


def connect(
    servers: str | Iterable[str],
    *,
    timeout: float = 5.0,
    tls: ssl.SSLContext | None = None,
    max_connections: int = 64,
) -> ServerPool | Cluster:
    """Make a pool for one server or several. It connects when it is first used.
    servers: text with commas between the addresses, or an iterable of them: "host",
    "host:port", "[ipv6]:port" or "unix:/path". "tls://" and "user:password@", with
    special characters percent-encoded, may stand before a host. timeout: seconds that
    a call may wait in all. max_connections: for each server. tls: for every host; by
    default, those with "tls://" get Python's default context. Raises ValueError."""
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
    login: bytes = dataclasses.field(default=b"", repr=False)  # the command for it


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
    place = (match["ipv6"] or match["host"]).lower(), port
    place[0].encode("idna")  # or a ValueError
    name = (match["tls"] or "") + match["place"]
    return _Server(name, place, bool(match["tls"]), login)


# --- pymemcache's interface -----------------------------------------------------------


def _forward(name: str) -> Callable[..., Any]:
    """pymemcache's method of that name, done at the key's server."""

    @functools.wraps(getattr(Client, name))
    def method(self: _Commands, *args: Any, **options: Any) -> Any:
        key = args[0] if args else options.get("key", b"")
        return self.for_key(key)._call(name, *args, **options)

    return method


class _Commands:
    """pymemcache's methods. Unlike in pymemcache, `noreply` is False by default."""

    key_prefix, no_delay = b"", True
    for_key: Any  # gives the pool of the server that has a key
    get, gets = _forward("get"), _forward("gets")
    set, add, replace = _forward("set"), _forward("add"), _forward("replace")
    append, prepend, cas = _forward("append"), _forward("prepend"), _forward("cas")
    touch, delete = _forward("touch"), _forward("delete")
    incr, decr = _forward("incr"), _forward("decr")

    def _each(self, name: str, items: Any, *args: Any, **options: Any) -> list[Any]:
        """Call a method at each server that has keys of `items`, with its items."""
        groups: dict[ServerPool, dict[Key, Any]] = {}
        for key, value in items.items():
            groups.setdefault(self.for_key(key), {})[key] = value
        calls = groups.items()
        return [pool._call(name, group, *args, **options) for pool, group in calls]

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        return dict(collections.ChainMap(*self._each("get_many", dict.fromkeys(keys))))

    def gets_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        return dict(collections.ChainMap(*self._each("gets_many", dict.fromkeys(keys))))

    def receive_many(self, keys: Iterable[Key], receive: Receive) -> dict[Key, Any]:
        """Like `get_many`, but each value is what `receive(key, size, fill)` returns.

        It is called while the value arrives. `fill(buffer)` fills a writable buffer
        with the next bytes of the value, and returns it. Together, the buffers must
        take exactly `size` bytes. Errors of `receive` pass through."""
        found = self._each("receive_many", dict.fromkeys(keys), receive)
        return dict(collections.ChainMap(*found))

    def set_many(self, values: Any, *args: Any, **options: Any) -> list[Key]:
        failed = self._each("set_many", values, *args, **options)
        return [key for keys in failed for key in keys]

    def delete_many(self, keys: Iterable[Key], noreply: bool = False) -> bool:
        return all(self._each("delete_many", dict.fromkeys(keys), noreply))


class Cluster(_Commands):
    """Several servers. `servers` has their pools by name, for commands without a key.

    A key's server is chosen by rendezvous hashing of what stands before "|#|" in it.
    """

    def __init__(self, pools: Iterable[ServerPool]) -> None:
        self.servers = {pool.server: pool for pool in pools}

    def for_key(self, key: Key) -> ServerPool:
        prefix = (key.encode() if isinstance(key, str) else key).partition(b"|#|")[0]

        def rank(name: str) -> str:
            return hashlib.sha256(b"%b-%b" % (name.encode(), prefix)).hexdigest()

        return self.servers[max(self.servers, key=rank)]

    def close(self) -> None:
        for pool in self.servers.values():
            pool.close()


class ServerPool(_Commands):
    """Connections to one server, whose name is `server`. `connect` makes it."""

    _fork_lock = threading.Lock()
    stats, version, flush_all = map(_forward, ("stats", "version", "flush_all"))

    def __init__(
        self, server: _Server, timeout: float, tls: ssl.SSLContext | None, maximum: int
    ) -> None:
        self.server, self._given = server.name, (server, timeout, tls, maximum)
        self._server, self._timeout, self._maximum = server, timeout, maximum
        self._tls = tls or (ssl.create_default_context() if server.tls else None)
        self._start()

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.RLock()
        self._idle: collections.deque[_Connection] = collections.deque()
        self._waiters: collections.deque[Any] = collections.deque()  # SimpleQueues
        # If a signal's handler raises, a connection may get lost. The garbage collector
        # takes it out of this set.
        self._all: weakref.WeakSet[_Connection] = weakref.WeakSet()
        # Until then it accepts no more, so we open one only if there is none.
        self._full_until, self._refusal = 0.0, ""
        self._answered = 0.0  # when it answered last
        self._down_until = 0.0  # 0: the server answers

    def __reduce__(self) -> tuple[Any, ...]:
        return ServerPool, self._given

    @property
    def servers(self) -> dict[str, ServerPool]:
        return {self.server: self}

    def for_key(self, key: Key) -> ServerPool:
        return self

    def pipeline(self, commands: Iterable[Iterable[Any]]) -> list[bytes]:
        """Send several commands in one go, and return their replies in order.

        A command is an iterable of bytes-like parts. Large ones are not joined. A reply
        is one line without its end, and may be an error. Commands whose first part ends
        with b" noreply\\r\\n" get none. On TCP, a generator makes each command while
        the one before it travels."""
        if isinstance(self._server.place, str):
            # On a Unix socket, sending while the generator runs is 13 % slower.
            commands = [list(command) for command in commands]
        return list(self._call("pipeline", commands))

    def close(self) -> None:
        """Close the connections that are not in use. The pool can still be used."""
        self._check_process()
        with self._lock:
            while self._idle:
                self._drop(self._idle.popleft())

    def _drop(self, connection: _Connection) -> None:
        connection.close()
        self._all.discard(connection)

    def _check_process(self) -> None:
        """A child process must not talk on its parent's connections."""
        if self._pid != os.getpid():
            with self._fork_lock:
                if self._pid != os.getpid():
                    for connection in self._idle:
                        connection.close()
                    self._start()

    def _call(self, command: str, *args: Any, **options: Any) -> Any:
        """Have a connection do a command, within the time limit."""
        self._check_process()
        began, connection = self._fail_if_down(), None
        try:
            connection = self._take(began + self._timeout)
            began = time.monotonic()
            result = getattr(connection, command)(*args, **options)
            if connection.ahead:
                raise MemcacheUnknownError(connection.ahead[:32])
            self._down_until, self._answered = 0.0, time.monotonic()
            return result
        except BaseException as error:
            if connection:
                connection.close()  # perhaps in mid-reply
            now = time.monotonic()
            # The wait for a free connection does not count against the server.
            if isinstance(error, NoAnswer) and now - began >= self._timeout / 2:
                self._down_until = now + _DOWN
            elif not isinstance(error, TimeoutError):
                self._down_until = min(self._down_until, now)  # one call tries
            raise
        finally:
            if connection:
                self._give(connection)

    def _fail_if_down(self) -> float:
        with self._lock:
            now = time.monotonic()
            if now < self._down_until:
                raise NoAnswer(f"{self.server} did not answer in time a moment ago")
            if self._down_until:
                self._down_until = now + self._timeout  # this call tries, others fail
            return now

    def _take(self, deadline: float) -> _Connection:
        """An open connection, for this call alone. The first error tells the cause."""
        share, first = _SHARE, None
        while True:
            connection, began = self._find(deadline), time.monotonic()
            try:
                connection.begin(deadline, share)
                return connection
            except BaseException as error:
                first = first or error
                # If the server answers no other call either, it is slow, or down.
                is_full = isinstance(error, NoAnswer) and self._answered > began
                is_full = is_full or isinstance(error, _TooMany)
                if is_full:
                    self._full_until = time.monotonic() + _REFUSED
                    self._refusal = f"the server accepts no more: {error}"
                is_over = time.monotonic() + _PAUSE >= deadline
                if is_over or not isinstance(error, (NoAnswer, _TooMany)):
                    self._give(connection)  # the next in line tries
                    if isinstance(error, NoAnswer):  # time ran out
                        raise first from None
                    raise
            share = 1
            time.sleep(_PAUSE)  # keep the place: few should try at a time
            (self._drop if is_full else self._give)(connection)

    def _find(self, deadline: float) -> _Connection:
        """The newest idle connection, else a new one, else the next to come free."""
        with self._lock:
            now = time.monotonic()
            while self._idle and self._idle[0].used <= now - _IDLE:
                self._drop(self._idle.popleft())  # the newest are used first
            if self._idle:
                return self._idle.pop()
            if len(self._all) < (1 if now < self._full_until else self._maximum):
                connection = _Connection(self._server, self._tls)
                self._all.add(connection)
                return connection
            waiter: queue.SimpleQueue[_Connection] = queue.SimpleQueue()
            self._waiters.append(waiter)
        return self._wait_for(waiter, max(deadline - now, 0))

    def _wait_for(self, waiter: Any, seconds: float) -> _Connection:
        """The connection that another call puts into `waiter`, a queue, at its end."""
        try:
            given: _Connection = waiter.get(timeout=seconds)
            return given
        except BaseException as error:
            with self._lock, contextlib.suppress(ValueError):
                self._waiters.remove(waiter)
            with contextlib.suppress(queue.Empty):  # else it came at the last moment
                self._give(waiter.get_nowait())
            if not isinstance(error, queue.Empty):
                raise
        is_full = time.monotonic() < self._full_until
        limit = self._refusal if is_full else f"max_connections is {self._maximum}"
        raise TimeoutError(f"{self.server}: no connection came free; {limit}")

    def _give(self, connection: _Connection) -> None:
        """Hand a connection to the call that waits longest, else keep it if open."""
        with self._lock:
            connection.used = time.monotonic()
            if self._waiters:
                self._waiters.popleft().put(connection)
            elif connection.is_open:
                self._idle.append(connection)
            else:
                self._drop(connection)


class _Connection(Client):
    """pymemcache's client for one connection, with the slow steps replaced.

    left: seconds that the waits of this call may still take. pymemcache calls `sendall`
    and `recv` of its `sock`; they are methods of this class.
    """

    # A reference to itself would keep a lost connection alive.
    sock: Any = property(lambda self: self, lambda self, _: None)
    is_open, used = False, 0.0
    _socket: Any = None
    _receive: Receive | None

    def __init__(self, server: _Server, tls: ssl.SSLContext | None) -> None:
        super().__init__(server.place, default_noreply=False)
        self._server = server
        self._tls = tls if isinstance(server.place, tuple) else None

    def begin(self, deadline: float, share: float) -> None:
        """Begin a call. Connects, unless it is open and nothing unasked has come."""
        now = time.monotonic()
        self.left, self._receive = deadline - now, None
        if self.is_open:
            try:
                self._socket.settimeout(0)
                self._socket.recv(1)
            except OSError as error:
                if isinstance(error, (BlockingIOError, ssl.SSLWantReadError)):
                    return
        self.close()  # it may have an odd byte
        self._open(now + self.left * share)
        self.left = deadline - time.monotonic()

    def _open(self, deadline: float) -> None:
        """Connect to one of the host's addresses. Each gets its share of the time."""
        place, errors = self._server.place, []
        found: list[Any] = [(socket.AF_UNIX, 0, 0, "", place)]
        if isinstance(place, tuple):
            found = socket.getaddrinfo(place[0], place[1], type=socket.SOCK_STREAM)
        for index, (family, *_, place) in enumerate(found):
            self.left = (deadline - time.monotonic()) / (len(found) - index)
            try:
                return self._connect_to(family, place)
            except (OSError, MemcacheError) as error:
                errors.append(error)
        # A reply or a time-out tells more than a refusal.
        telling = MemcacheError, _TooMany, NoAnswer
        raise max(errors, key=lambda error: isinstance(error, telling))

    def _connect_to(self, family: int, place: Any) -> None:
        self.close()
        self._socket, self.ahead = socket.socket(family), b""
        self._wait(self._socket.connect, place)
        if family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls:
            name = self._server.place[0]
            wrap = functools.partial(self._tls.wrap_socket, server_hostname=name)
            self._socket = self._wait(wrap, self._socket)
        # The sendmsg of eventlet's sockets does not wait, so it can't be used.
        self._gathers = hasattr(type(self._socket), "sendmsg") and not self._tls
        self._greet()
        self.is_open = True

    def _greet(self) -> None:
        """Log in, or have a harmless command answered, before others rely on it."""
        harmless = b"get mcpool-%b\r\n" % os.urandom(8).hex().encode()
        with contextlib.suppress(MemcacheClosed):  # It may have said why before.
            self.sendall(self._server.login or harmless)
        reply = self._line()
        text = f"{self._server.name} says {reply[:64].decode(errors='replace')!r}"
        if b"Too many open connections" in reply:
            raise _TooMany(text)
        # A proxy says SERVER_ERROR if only one of its servers is down.
        good = b"STORED" if self._server.login else b"END|SERVER_ERROR"
        if not re.match(good, reply):
            raise MemcacheUnknownError(f"{text}; does it want user:password@?")

    def close(self) -> None:
        self.is_open = False
        if self._socket:
            self._socket.close()

    def _wait(self, operation: Callable[..., Any], *args: Any) -> Any:
        started = time.monotonic()
        try:
            self._socket.settimeout(max(self.left, 1e-6))
            result = operation(*args)
        except (TimeoutError, socket.timeout) as error:
            raise NoAnswer(f"{self._server.name} did not answer in time") from error
        except (BrokenPipeError, ConnectionResetError):
            result = 0  # as if nothing came
        finally:
            self.left -= time.monotonic() - started
        if result is not None and not result:
            hint = "" if self.is_open else " at once; is it for TLS?"
            raise MemcacheClosed(f"{self._server.name} closed the connection{hint}")
        return result

    def sendall(self, *given: Any) -> None:
        """Send parts as they lie in memory, or joined if the socket can't do that."""
        joined = given if self._gathers else [b"".join(given)]
        parts = [memoryview(part).cast("B") for part in joined]
        while parts:
            if self._gathers:
                sent = self._wait(self._socket.sendmsg, parts[:_PARTS])
            else:
                sent = self._wait(self._socket.send, parts[0])
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]

    def recv(self, size: int) -> bytes:
        """One line, for pymemcache, which must not get bytes behind that line."""
        return self._line() + b"\r\n"

    def _line(self) -> bytes:
        """The next line, without its end."""
        while True:
            line, end, rest = self.ahead.partition(b"\r\n")
            if len(line) > _LINE:
                raise MemcacheUnknownError(f"{self._server.name} sends no line end")
            if end:
                self.ahead = rest
                return line
            self.ahead += self._wait(self._socket.recv, _LINE)

    def pipeline(self, commands: Iterable[Iterable[Any]]) -> list[bytes]:
        """Small commands travel together, except on TLS (see `set_many`)."""
        replies: list[bytes] = []
        expected, small = 0, b""
        for command in commands:
            parts = [small, *command]
            expected += bytes(parts[1][-10:]) != b" noreply\r\n"
            if sum(map(len, parts)) < _TOGETHER and not self._tls:
                small = b"".join(parts)
                continue
            self.sendall(*parts)
            small = b""
            while expected - len(replies) > _OUTSTANDING:
                replies.append(self._line())
        if small:
            self.sendall(small)
        return replies + [self._line() for _ in range(expected - len(replies))]

    def set_many(self, values: Any, *args: Any, **options: Any) -> list[Key]:
        # memcached's TLS may overlook a command that begins within a record.
        ask = super().set_many
        if not self._tls:
            return ask(values, *args, **options)
        return [key for key in values if ask({key: values[key]}, *args, **options)]

    def receive_many(self, keys: Any, receive: Receive) -> dict[Key, Any]:
        self._receive = receive
        try:
            return self.get_many(keys)
        finally:
            self._receive = None  # its buffers

    def _extract_value(
        self, expect_cas: bool, line: bytes, buf: bytes, remapped_keys: Any, _: Any
    ) -> tuple[Key, Any, bytes]:
        """Receive one value; pymemcache's docstring offers this for overriding."""
        match = _VALUE.fullmatch(line)
        if not match or match[1] not in remapped_keys or bool(match[3]) != expect_cas:
            raise MemcacheUnknownError(line[:64])
        key, self._missing = remapped_keys[match[1]], int(match[2])
        if self._receive:
            value = self._receive(key, self._missing, self._fill)
        else:
            value = bytes(self._fill(bytearray(self._missing)))
        if self._missing:
            raise ValueError(f"{self._missing} bytes of the value were not received")
        if self._line():
            raise MemcacheUnknownError("a value is longer than announced")
        return key, (value, match[3]) if expect_cas else value, buf

    def _fill(self, buffer: Any) -> Any:
        with memoryview(buffer).cast("B") as view:
            self._missing -= len(view)
            if self._missing < 0:
                raise ValueError("a buffer is longer than the rest of the value")
            filled = min(len(view), len(self.ahead))
            view[:filled], self.ahead = self.ahead[:filled], self.ahead[filled:]
            while filled < len(view):
                filled += self._wait(self._socket.recv_into, view[filled:])
        return buffer
