# mcpool 1.0.0, MIT licence, one file to copy; README.md and docs/ belong to it.
"""A pool of fast memcached connections, with the interface of pymemcache 4.

    pool = mcpool.connect("127.0.0.1:11211")
    pool = mcpool.connect("10.0.0.1,10.0.0.2:11212,unix:/run/memcached.sock")
    pool = mcpool.connect("tls://user:password@cache.example.com")

`connect` returns a `ServerPool` for one server and a `Cluster` for several. Both have
pymemcache's methods, may be shared by threads, survive a fork, and can be pickled.

* A call has one time limit for all that it waits for: a free connection, the connect,
  the reply. The time that the caller's own generator or hook takes is not counted.
* A server has at most `max_connections` connections. A thread waits for a free one.
* After a time-out, calls to that server fail at once for two seconds. Then one call
  tries again.
* A key belongs to one server. There is no fail-over, which would bring old values back.
* Errors are OSErrors or pymemcache's. None of them shows a password.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Callable, Optional, Union
from urllib.parse import unquote_to_bytes

from pymemcache.client.base import Client
from pymemcache.exceptions import (
    MemcacheClientError,
    MemcacheError,
    MemcacheServerError,
    MemcacheUnexpectedCloseError,
    MemcacheUnknownError,
)

__all__ = ["Cluster", "NoAnswer", "NoFreeConnection", "ServerPool", "connect"]
__version__ = "1.0.0"

_IDLE = 60  # seconds; firewalls forget connections that idle longer
_DOWN = 2  # seconds without calls to a server that did not answer in time
_REFUSED = 10  # seconds until a server that refused connections is asked for more
_PAUSE = 0.02  # seconds between two tries to get the first connection
_LINE = 8192  # bytes; no line of memcached is longer
_LARGEST_VALUE = 2**30  # bytes; memcached's -I ends there
_OUTSTANDING = 256  # replies that are not yet read; so many fit in any socket buffer
_RECEIVE = 4096  # bytes to ask for if a line is expected, as pymemcache does
_GATHER = 65536  # bytes of commands that are sent together if all of them are there
_PARTS = 64  # that the system takes at once; Linux takes 1024, POSIX promises 16

_ADDRESS = re.compile(
    r"(?P<tls>tls://)?((?P<user>[^:@]+):(?P<password>[^@]+)@)?"
    r"(?P<place>(\[(?P<ipv6>[\w:.%]+)\]|(?P<host>[^][\s:/@,]+))(:(?P<port>\d{1,5}))?)"
)
_FORMS = "host, host:port, [ipv6]:port or unix:/path"
_VALUE = re.compile(rb"VALUE (\S+) \d+ (\d{1,10})(?: (\d+))?")
_REPLIES = {  # to the commands that pymemcache takes any line for
    b"delete": re.compile(rb"DELETED|NOT_FOUND"),
    b"touch": re.compile(rb"TOUCHED|NOT_FOUND"),
    b"incr": re.compile(rb"\d+ *|NOT_FOUND"),
    b"decr": re.compile(rb"\d+ *|NOT_FOUND"),
    b"flush_all": re.compile(rb"OK"),
}

_NOREPLY = b" noreply\r\n"

Key = Union[str, bytes]
Command = Iterable[Any]  # bytes-like parts, which are not joined
Fill = Callable[[Any], Any]  # fills a writable buffer with the value's next bytes
Receive = Callable[[Key, int, Fill], Any]
_Ticket = concurrent.futures.Future[Optional["_Connection"]]


def connect(
    servers: str | Iterable[str],
    *,
    timeout: float = 5.0,
    tls: ssl.SSLContext | None = None,
    max_connections: int = 64,
) -> ServerPool | Cluster:
    """Make a pool for one server or several. It connects when it is first used.

    servers: text with commas between the addresses, or an iterable of addresses. An
    address is "host", "host:port", "[ipv6]:port" or "unix:/path". "tls://" and
    "user:password@" may stand before a host. Percent-encode special characters of these.
    timeout: seconds that a call may wait in all.
    tls: used for every host. By default hosts with "tls://" get
    `ssl.create_default_context()`, and others don't use TLS.
    max_connections: how many connections each server may have at a time.

    Raises ValueError if an address or a number is not valid.
    """
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError("timeout must be a number of seconds above 0")
    if max_connections < 1:
        raise ValueError("max_connections must be 1 or more")
    pools: dict[str, ServerPool] = {}
    places = set()
    for address in _addresses(servers):
        if address.place in places:
            raise ValueError(f"the server {address.name!r} is given twice")
        places.add(address.place)
        pools[address.name] = ServerPool(address, timeout, tls, max_connections)
    return Cluster(pools) if len(pools) > 1 else next(iter(pools.values()))


@dataclasses.dataclass(frozen=True)
class _Address:
    """Where a server is. `name` is the address as it was given, without credentials."""

    name: str
    place: str | tuple[str, int]  # the path of a Unix socket, or host and port
    tls: bool = False
    login: bytes = dataclasses.field(default=b"", repr=False)


def _addresses(servers: str | Iterable[str]) -> list[_Address]:
    texts = servers.split(",") if isinstance(servers, str) else list(servers)
    if texts in ([], [""]):
        raise ValueError("no memcached server is given")
    # A password may hold a comma by mistake. Then a piece of it looks like an address.
    secret = any("@" in str(text) for text in texts)
    return [_address(text, number, secret) for number, text in enumerate(texts, 1)]


def _address(text: object, number: int, secret: bool) -> _Address:
    """Parse one address. The error does not show it if there are passwords."""
    text = text.strip() if isinstance(text, str) else text
    if isinstance(text, str) and text.startswith("unix:") and text != "unix:":
        return _Address(text, text[len("unix:") :])
    match = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    port = int(match["port"] or 11211) if match else 0
    if match is None or not 1 <= port <= 65535:
        shown = "it is not shown, for it may hold a password" if secret else repr(text)
        raise ValueError(f"server {number} is not valid ({shown}); write {_FORMS}")
    login = b""
    if match["user"]:
        login = b" ".join(map(unquote_to_bytes, (match["user"], match["password"])))
    host = match["ipv6"] or match["host"]
    tls = match["tls"] or ""
    return _Address(tls + match["place"], (host.lower(), port), bool(tls), login)


def _forward(name: str) -> Callable[..., Any]:
    """A method of `ServerPool` that does what pymemcache's does, on a connection."""

    @functools.wraps(getattr(Client, name))
    def method(self: ServerPool, *args: Any, **options: Any) -> Any:
        return self._call(name, *args, **options)

    return method


class ServerPool:
    """Connections to one server, with pymemcache's methods. Use `connect` to make it.

    Unlike pymemcache, `noreply` is False unless it is given.
    """

    key_prefix = b""

    def __init__(
        self,
        address: _Address,
        timeout: float,
        tls: ssl.SSLContext | None,
        max_connections: int,
    ) -> None:
        self.server = address.name
        self._address, self._timeout, self._tls = address, timeout, tls
        self._max_connections = max_connections
        self._context: ssl.SSLContext | None = None
        if not isinstance(address.place, str) and (tls or address.tls):
            self._context = tls or ssl.create_default_context()
        self._shelves: dict[int, _Shelf] = {}  # by process, because processes fork

    get = _forward("get")
    gets = _forward("gets")
    gets_many = _forward("gets_many")
    set = _forward("set")
    set_many = _forward("set_many")
    add = _forward("add")
    replace = _forward("replace")
    append = _forward("append")
    prepend = _forward("prepend")
    cas = _forward("cas")
    touch = _forward("touch")
    delete = _forward("delete")
    delete_many = _forward("delete_many")
    incr = _forward("incr")
    decr = _forward("decr")
    stats = _forward("stats")
    version = _forward("version")
    flush_all = _forward("flush_all")

    def __repr__(self) -> str:
        return f"<mcpool.ServerPool {self.server}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._tls:
            raise TypeError("a pool can't be pickled if it was given an SSLContext")
        return ServerPool, (self._address, self._timeout, None, self._max_connections)

    @property
    def servers(self) -> dict[str, ServerPool]:
        return {self.server: self}

    def for_key(self, key: Key) -> ServerPool:
        """The pool of the server that has this key: this one."""
        return self

    def get_many(
        self, keys: Iterable[Key], receive: Receive | None = None
    ) -> dict[Key, Any]:
        """Like pymemcache's. With `receive`, each value is what it returns.

        It is called as `receive(key, size, fill)` while the value arrives. `fill(buffer)`
        fills a writable buffer with the next bytes of the value, and returns it. In all,
        `size` bytes must be filled. If it raises, the error passes through.
        """
        values: dict[Key, Any] = self._call("get_many", keys, receive)
        return values

    def pipeline(self, commands: Iterable[Command]) -> list[bytes]:
        """Send several commands in one go, and return their replies in order.

        A command is an iterable of bytes-like parts, which are not joined. A reply is one
        line without its end. Error lines are replies too. A command whose first part ends
        with b" noreply\\r\\n" gets none. Over TCP, each command of a generator is made
        while the one before it travels.
        """
        if isinstance(self._address.place, str):
            # Nothing travels on a Unix socket. Taking turns with the server costs 13 %.
            commands = [list(command) for command in commands]
        replies: list[bytes] = self._call("pipeline", commands)
        return replies

    def close(self) -> None:
        """Close the connections that are not in use. The pool can still be used."""
        self._shelf().close()

    def _call(self, command: str, *args: Any, **options: Any) -> Any:
        """Have a connection do a command, within the time limit."""
        shelf = self._shelf()
        shelf.refuse_if_down()
        try:
            connection = self._take(shelf, time.monotonic() + self._timeout)
            try:
                result = getattr(connection, command)(*args, **options)
            except BaseException:  # perhaps in mid-reply
                connection.close()
                shelf.give(None)
                raise
            shelf.give(connection)
        except BaseException as error:
            shelf.note_failure(error)
            raise
        shelf.down_until = 0
        return result

    def _shelf(self) -> _Shelf:
        """The connections of this process. A child never uses those of its parent."""
        pid = os.getpid()
        shelf = self._shelves.get(pid)
        if shelf is None:
            # Each step is atomic. A lock might have been held when the process forked.
            new = _Shelf(self.server, self._timeout, self._max_connections)
            shelf = self._shelves.setdefault(pid, new)
            for parent in set(self._shelves) - {pid}:
                for _, connection in self._shelves.pop(parent, new).idle:
                    connection.close()
        return shelf

    def _take(self, shelf: _Shelf, deadline: float) -> _Connection:
        """A connection that works: one that idled, or a new one."""
        while True:
            connection = shelf.take(deadline)
            try:
                if connection is None:
                    connection = _Connection(self._address, self._context, deadline)
                    connection._connect()
                if connection.allow(deadline):
                    return connection
                connection.close()
            except _TooManyConnections as refusal:
                if shelf.shrink(refusal):
                    continue
                time.sleep(min(_PAUSE, max(0, deadline - time.monotonic())))
            except BaseException:
                shelf.give(None)
                raise
            shelf.give(None)


class NoAnswer(TimeoutError):
    """The server did not answer in time. `since`: when this call began to ask it."""

    since: float = 0


class NoFreeConnection(TimeoutError):
    """All connections that the pool may have were in use until the time limit."""


class _TooManyConnections(MemcacheServerError):
    """The server has as many connections as its option -c allows."""


class _Shelf:
    """The connections of one process to one server, and whether that server answers."""

    def __init__(self, server: str, timeout: float, maximum: int) -> None:
        self.server, self.timeout, self.maximum = server, timeout, maximum
        self.lock = threading.Lock()
        self.idle: collections.deque[tuple[float, _Connection]] = collections.deque()
        self.waiting: collections.deque[_Ticket] = collections.deque()
        self.places = 0  # connections that are idle, in use or being opened
        self.bound, self.bound_until, self.refusal = maximum, 0.0, ""
        self.down_until = 0.0  # 0: the server answers

    def take(self, deadline: float) -> _Connection | None:
        """An idle connection, or None and with it a place for a new one."""
        with self.lock:
            now = time.monotonic()
            self._close_old(now)
            if now >= self.bound_until:
                self.bound = self.maximum
            if self.idle:
                return self.idle.pop()[1]
            if self.places < self.bound and now < deadline:
                self.places += 1
                return None
            ticket: _Ticket = concurrent.futures.Future()
            self.waiting.append(ticket)
        return self._wait(ticket, deadline - now)

    def _wait(self, ticket: _Ticket, seconds: float) -> _Connection | None:
        """Wait for what another thread gives back. Who waits longest gets it first."""
        try:
            return ticket.result(seconds)
        except BaseException as error:
            if not ticket.cancel():  # it came at the last moment
                self.give(ticket.result())
            if not isinstance(error, concurrent.futures.TimeoutError):
                raise
        text = f"{self.server}: no connection became free within {self.timeout:g} s"
        if self.bound < self.maximum:
            raise NoFreeConnection(f"{text}; the server says: {self.refusal}")
        raise NoFreeConnection(f"{text}; max_connections is {self.maximum}")

    def give(self, connection: _Connection | None) -> None:
        """Give back a connection, or the place of one that was closed (None)."""
        with self.lock:
            while self.waiting:
                ticket = self.waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    ticket.set_result(connection)
                    return
            now = time.monotonic()
            if connection is None:
                self.places -= 1
            else:
                self.idle.append((now, connection))
            self._close_old(now)

    def _close_old(self, now: float) -> None:
        while self.idle and now - self.idle[0][0] > _IDLE:
            self.places -= 1
            self.idle.popleft()[1].close()

    def shrink(self, refusal: _TooManyConnections) -> bool:
        """The server accepts no more: give up a place, unless it is the only one."""
        with self.lock:
            kept = self.places - 1
            self.bound = max(kept, 1)
            self.bound_until = time.monotonic() + max(_REFUSED, self.timeout)
            self.refusal = str(refusal)
            self.places = self.bound
            return kept > 0

    def close(self) -> None:
        with self.lock:
            while self.idle:
                self.places -= 1
                self.idle.pop()[1].close()

    def refuse_if_down(self) -> None:
        """Raise if the server did not answer lately. Let one call through to try again."""
        if not self.down_until:
            return
        with self.lock:
            now = time.monotonic()
            if now < self.down_until:
                raise NoAnswer(
                    f"{self.server} did not answer within {self.timeout:g} s lately; "
                    f"calls fail at once until it is asked again"
                )
            if self.down_until:
                self.down_until = now + self.timeout

    def note_failure(self, error: BaseException) -> None:
        now = time.monotonic()
        if isinstance(error, NoAnswer):
            # A call that waited long for a free connection says little about the server.
            if now - error.since >= self.timeout / 2:
                self.down_until = now + _DOWN
        elif isinstance(error, (ConnectionError, MemcacheServerError)):
            self.down_until = 0
        elif self.down_until and not isinstance(error, NoFreeConnection):
            self.down_until = now  # nothing is known: let the next call try


class _Socket:
    """A connected socket that waits for `left` seconds in all, until `allow` sets that anew.

    It also ends a reply that goes on and on without the end of a line.
    """

    def __init__(self, sock: socket.socket, server: str) -> None:
        self._sock, self._server = sock, server
        # eventlet's sockets pass sendmsg through to a socket that does not wait.
        self._gathers = hasattr(type(sock), "sendmsg")
        self.left = self.since = 0.0
        self.unended = 0  # bytes since the last end of a line
        self.ahead = b""  # what `line` received behind its line

    def allow(self, seconds: float, since: float) -> None:
        self.left, self.since, self.unended = seconds, since, 0

    def connect(self, place: Any) -> None:
        self._wait(self._sock.connect, place)
        if self._sock.family != getattr(socket, "AF_UNIX", None):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        self._sock = context.wrap_socket(
            self._sock, server_hostname=host, do_handshake_on_connect=False
        )
        self._gathers = False
        self._wait(self._sock.do_handshake)

    def _wait(self, operation: Callable[..., Any], *args: Any) -> Any:
        started = time.monotonic()
        try:
            if self.left <= 0:
                raise TimeoutError
            self._sock.settimeout(self.left)
            return operation(*args)
        except (TimeoutError, socket.timeout) as timeout:
            error = NoAnswer(f"{self._server} did not answer in time")
            error.since = self.since
            raise error from timeout
        finally:
            self.left -= time.monotonic() - started

    def send(self, parts: list[Any]) -> None:
        """Send parts as they lie in memory, or joined if the socket can't do that."""
        if not self._gathers:
            self.sendall(b"".join(parts))
            return
        while parts:
            sent = self._wait(self._sock.sendmsg, parts[:_PARTS])
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = memoryview(parts[0])[sent:]

    def sendall(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._wait(self._sock.send, rest) :]

    def recv(self, size: int) -> bytes:
        data: bytes = self._wait(self._sock.recv, size)
        if not data:
            raise MemcacheUnexpectedCloseError(f"{self._server} closed the connection")
        if b"\r\n" in data:
            self.unended = 0
        self.unended += len(data) - (data.rfind(b"\r\n") + 1)
        if self.unended > _LINE + _RECEIVE:
            raise MemcacheUnknownError(f"{self._server} sends a line without end")
        return data

    def recv_into(self, buffer: memoryview) -> int:
        count: int = self._wait(self._sock.recv_into, buffer)
        if not count:
            raise MemcacheUnexpectedCloseError(f"{self._server} closed the connection")
        return count

    def line(self) -> bytes:
        """The next line, without its end."""
        while b"\r\n" not in self.ahead:
            self.ahead += self.recv(_RECEIVE)
        line, _, self.ahead = self.ahead.partition(b"\r\n")
        if len(line) > _LINE:
            raise MemcacheUnknownError(
                f"{self._server} sends a line of {len(line)} bytes"
            )
        return line

    def is_quiet(self) -> bool:
        """Whether nothing came that nobody asked for: no reply, and no end."""
        try:
            self._sock.settimeout(0)
            self._sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        self._sock.close()


class _Value:
    """The bytes of one value: first those that came with its line, then the socket's."""

    def __init__(self, sock: _Socket, size: int, ahead: bytes) -> None:
        self._sock, self._size, self._left, self._ahead = sock, size, size, ahead
        sock.unended = 0

    def fill(self, buffer: Any) -> Any:
        """Fill a writable buffer with the next bytes, and return it."""
        with memoryview(buffer).cast("B") as view:
            size = len(view)
            if size > self._left:
                raise ValueError(f"a buffer of {size} bytes for {self._left}")
            self._left -= size
            filled = min(size, len(self._ahead))
            view[:filled], self._ahead = self._ahead[:filled], self._ahead[filled:]
            while filled < size:
                filled += self._sock.recv_into(view[filled:])
        return buffer

    def end(self) -> bytes:
        """Check that the value ends here, and return what came after it."""
        if self._left:
            raise ValueError(f"{self._left} of {self._size} bytes were not received")
        while len(self._ahead) < len(b"\r\n"):
            self._ahead += self._sock.recv(_RECEIVE)
        if not self._ahead.startswith(b"\r\n"):
            raise MemcacheUnknownError(self._ahead[:32])
        self._sock.unended = 0
        return self._ahead[len(b"\r\n") :]


def _receive_bytes(key: Key, size: int, fill: Fill) -> bytes:
    return bytes(fill(bytearray(size)))


class _Connection(Client):
    """pymemcache's client for one connection, with the slow steps replaced.

    Values go out in parts as they lie in memory, and come in with one copy.
    """

    sock: Any  # a _Socket

    def __init__(
        self, address: _Address, context: ssl.SSLContext | None, deadline: float
    ) -> None:
        super().__init__(address.place, default_noreply=False)
        self._address, self._context, self._deadline = address, context, deadline
        self._receive: Receive = _receive_bytes

    def allow(self, deadline: float) -> bool:
        """Begin a call. Returns whether this connection can be used for it."""
        now = time.monotonic()
        self.sock.allow(deadline - now, now)
        return bool(self.sock.is_quiet())

    def _connect(self) -> None:
        """Connect to one of the host's addresses. Each gets a fair share of the time."""
        since, errors = time.monotonic(), []
        places = self._places()
        for index, (family, place) in enumerate(places):
            seconds = (self._deadline - time.monotonic()) / (len(places) - index)
            self.sock = _Socket(socket.socket(family), self._address.name)
            self.sock.allow(seconds, since)
            try:
                self._begin(place)
                return
            except BaseException as error:
                self.close()
                if not isinstance(error, (OSError, MemcacheError)):
                    raise
                errors.append(error)
        raise max(errors, key=_telling)

    def _places(self) -> list[tuple[int, Any]]:
        if isinstance(self._address.place, str):
            return [(socket.AF_UNIX, self._address.place)]
        try:
            found = socket.getaddrinfo(*self._address.place, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"{self._address.name} is no name of a host") from error
        return [(family, place) for family, _, _, _, place in found]

    def _begin(self, place: Any) -> None:
        """Connect, and have one harmless command answered before others rely on it."""
        self.sock.connect(place)
        if self._context:
            self.sock.start_tls(self._context, self._address.place[0])
        login = self._address.login
        ask, answer = b"get mcpool\r\n", b"END"
        if login:
            ask = b"set auth x 0 %d\r\n%b\r\n" % (len(login), login)
            answer = b"STORED"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.send([ask])  # the server may have said why it closed
        self._check_answer(answer)

    def _check_answer(self, answer: bytes) -> None:
        name = self._address.name
        try:
            line = self.sock.line()
            if line.startswith(b"VALUE "):  # somebody stored an item under that key
                keys: dict[bytes, Key] = {b"mcpool": b"mcpool"}
                self.sock.ahead = self._extract_value(
                    False, line, self.sock.ahead, keys, []
                )[2]
                line = self.sock.line()
        except MemcacheUnexpectedCloseError:
            raise MemcacheUnexpectedCloseError(
                f"{name} closed the connection without an answer; does it speak TLS?"
            ) from None
        # Of a proxy whose server is down, other servers may be well.
        if line == answer or (answer == b"END" and line.startswith(b"SERVER_ERROR")):
            return
        text = f"{name} says: {line[:64].decode(errors='replace')}"
        if line.startswith(b"ERROR Too many open connections"):
            raise _TooManyConnections(text)
        if line.startswith(b"CLIENT_ERROR"):
            raise MemcacheClientError(f"{text}; does it want user:password@?")
        raise MemcacheUnknownError(f"{text}; is it a memcached?")

    def get_many(
        self, keys: Iterable[Key], receive: Receive | None = None
    ) -> dict[Key, Any]:
        self._receive = receive or _receive_bytes
        try:
            return super().get_many(list(keys))
        finally:
            self._receive = _receive_bytes

    def gets_many(self, keys: Iterable[Key]) -> dict[Key, tuple[Any, Any]]:
        return super().gets_many(list(keys))

    def stats(self, *args: Any) -> Any:
        try:
            return super().stats(*args)  # type: ignore[no-untyped-call]
        except IndexError:
            raise MemcacheUnknownError("a STAT line without a name") from None

    def pipeline(self, commands: Iterable[Command]) -> list[bytes]:
        replies: list[bytes] = []
        expected = 0
        for parts, count in _batches(commands):
            self.sock.send(parts)
            expected += count
            while expected - len(replies) > _OUTSTANDING:
                replies.append(self.sock.line())
        while len(replies) < expected:
            replies.append(self.sock.line())
        if self.sock.ahead:
            raise MemcacheUnknownError(self.sock.ahead[:32])
        return replies

    def _extract_value(
        self,
        expect_cas: bool,
        line: bytes,
        buf: bytes,
        remapped_keys: dict[bytes, Key],
        prefixed_keys: list[bytes],
    ) -> tuple[Key, Any, bytes]:
        """Receive one value; pymemcache's docstring offers this for overriding."""
        match = _VALUE.fullmatch(line)
        key = remapped_keys.get(match[1]) if match else None
        if match is None or key is None or bool(match[3]) != expect_cas:
            raise MemcacheUnknownError(line[:64])
        size = int(match[2])
        if size > _LARGEST_VALUE:
            raise MemcacheUnknownError(line[:64])
        value = _Value(self.sock, size, buf)
        result = self._receive(key, size, value.fill)
        return key, (result, match[3]) if expect_cas else result, value.end()

    def _misc_cmd(
        self, cmds: Any, cmd_name: bytes, noreply: Any, end_tokens: Any = None
    ) -> list[bytes]:
        replies = super()._misc_cmd(cmds, cmd_name, noreply, end_tokens)
        for reply in replies:
            if cmd_name in _REPLIES and not _REPLIES[cmd_name].fullmatch(reply):
                raise MemcacheUnknownError(reply[:32])
        return replies


def _telling(error: Exception) -> int:
    """How much an error tells, of those that the addresses of one host gave."""
    return 2 if isinstance(error, MemcacheError) else isinstance(error, NoAnswer)


def _batches(commands: Iterable[Command]) -> Iterator[tuple[list[Any], int]]:
    """Parts to send in one go, and how many replies there will be to them."""
    made = isinstance(commands, (list, tuple))
    parts: list[Any] = []
    size = replies = 0
    for command in commands:
        views = [memoryview(part).cast("B") for part in command]
        parts += views
        size += sum(map(len, views))
        replies += bytes(views[0][-len(_NOREPLY) :]) != _NOREPLY
        if not made or size >= _GATHER or len(parts) >= _PARTS:
            yield parts, replies
            parts, size, replies = [], 0, 0
    if parts:
        yield parts, replies


def _route(name: str) -> Callable[..., Any]:
    """A method of `Cluster` that does what pymemcache's does, at the key's server."""

    @functools.wraps(getattr(Client, name))
    def method(self: Cluster, key: Key, *args: Any, **options: Any) -> Any:
        return getattr(self.for_key(key), name)(key, *args, **options)

    return method


class Cluster:
    """Several servers, each of which has the keys that are hashed to it.

    `servers` holds their pools by name, for what has no key, such as `stats`. Of a key
    only what stands before "|#|" is hashed. A server that is down keeps its keys.
    """

    key_prefix = b""

    def __init__(self, servers: Mapping[str, ServerPool]) -> None:
        self.servers = dict(servers)

    get = _route("get")
    gets = _route("gets")
    set = _route("set")
    add = _route("add")
    replace = _route("replace")
    append = _route("append")
    prepend = _route("prepend")
    cas = _route("cas")
    touch = _route("touch")
    delete = _route("delete")
    incr = _route("incr")
    decr = _route("decr")

    def __repr__(self) -> str:
        return f"<mcpool.Cluster {', '.join(self.servers)}>"

    def for_key(self, key: Key) -> ServerPool:
        """The pool of the server that has this key."""
        whole = key.encode() if isinstance(key, str) else bytes(key)
        prefix = whole.partition(b"|#|")[0]

        def rank(pool: ServerPool) -> str:
            return hashlib.sha256(b"%b-%b" % (pool.server.encode(), prefix)).hexdigest()

        return max(self.servers.values(), key=rank)

    def _grouped(self, keys: Iterable[Key]) -> Iterator[tuple[ServerPool, list[Key]]]:
        groups: dict[ServerPool, list[Key]] = {}
        for key in keys:
            groups.setdefault(self.for_key(key), []).append(key)
        yield from groups.items()

    def get_many(
        self, keys: Iterable[Key], receive: Receive | None = None
    ) -> dict[Key, Any]:
        """Like `ServerPool.get_many`, one server after the other."""
        values: dict[Key, Any] = {}
        for pool, group in self._grouped(keys):
            values.update(pool.get_many(group, receive))
        return values

    def gets_many(self, keys: Iterable[Key]) -> dict[Key, tuple[Any, Any]]:
        values: dict[Key, tuple[Any, Any]] = {}
        for pool, group in self._grouped(keys):
            values.update(pool.gets_many(group))
        return values

    def set_many(
        self, values: Mapping[Key, Any], *args: Any, **options: Any
    ) -> list[Key]:
        failed: list[Key] = []
        for pool, group in self._grouped(values):
            part = {key: values[key] for key in group}
            failed += pool.set_many(part, *args, **options)
        return failed

    def delete_many(self, keys: Iterable[Key], noreply: bool = False) -> bool:
        for pool, group in self._grouped(keys):
            pool.delete_many(group, noreply)
        return True

    def flush_all(self, delay: int = 0, noreply: bool = False) -> bool:
        done = [each.flush_all(delay, noreply) for each in self.servers.values()]
        return all(done)

    def close(self) -> None:
        for pool in self.servers.values():
            pool.close()
