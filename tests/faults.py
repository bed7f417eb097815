"""Ways to make memcached commands fail. `Wrapped` calls hooks around the commands of a
client. The n-th command fails in a client that a user brings (`Faulty`), or on the wire
(`Proxy`)."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import re
import socket
import struct
import threading
import time
from typing import IO, Any, Callable, NamedTuple, Optional

from pymemcache.client.base import Client, PooledClient
from pymemcache.exceptions import MemcacheServerError, MemcacheUnknownError

from memchunk import FileCache
from tests.support import WAIT, Memcached

Hook = Callable[[str], object]  # is told the command


class Wrapped:
    """A pymemcache client that calls `before` and `after` around each command."""

    def __init__(self, client: Any, before: Hook = bool, after: Hook = bool) -> None:
        self.client, self.before, self.after = client, before, after

    def __getattr__(self, command: str) -> Any:
        method = getattr(self.client, command)
        if not callable(method) or command == "close":
            return method

        def call(*args: Any, **options: Any) -> Any:
            self.before(command)
            result = method(*args, **options)
            self.after(command)
            return result

        return call


class Once:
    """A hook that acts once: at the command of this number, or the first of a name."""

    def __init__(self, when: int | str, action: Callable[[], object]) -> None:
        self.when, self.action = when, action
        self.count, self.acted = itertools.count(), False

    def __call__(self, command: str) -> None:
        if not self.acted and self.when in (next(self.count), command):
            self.acted = True
            self.action()


def raising(error: BaseException) -> Callable[[], object]:
    """An action that raises."""

    def action() -> None:
        raise error

    return action


FAULTS = [
    "gone",  # connection refused, from this command on
    "reset before",
    "reset after",  # the command was not done, or its reply is lost
    "timeout before",
    "timeout after",
    "out of memory",
    "server error",
    "garbage",  # SERVER_ERROR, or no reply of memcached at all
    "no",  # NOT_STORED, EXISTS, NOT_FOUND, a miss: false, but a delete is done
    "evicted",  # done, and the items evicted at once
]
ON_THE_WIRE = [*FAULTS, "cut"]  # half a reply
# The command was done all the same.
DONE = {"", "act", "reset after", "timeout after", "evicted", "cut"}
HANGS_UP = {
    "gone",
    "reset before",
    "reset after",
    "timeout before",
    "timeout after",
    "cut",
}
NO = {  # how memcached says no
    "set": b"NOT_STORED",
    "add": b"NOT_STORED",
    "cas": b"EXISTS",
    "touch": b"NOT_FOUND",
    "delete": b"NOT_FOUND",
    "get": b"END",
    "gets": b"END",
    "stats": b"END",
}
OUT_OF_MEMORY = {
    **dict.fromkeys(["get", "gets"], b"out of memory writing get response"),
    **dict.fromkeys(["set", "add", "cas"], b"out of memory storing object"),
}


class Trigger:
    """Tells the command that is to fail from the others. `struck`: the verbs of those
    that did."""

    def __init__(self, upstream: Memcached) -> None:
        self.upstream, self._lock = upstream, threading.Lock()
        self.arm()

    def _evict(self, keys: list[str]) -> None:
        self.evicted += keys
        for key in keys:
            self.upstream.command(f"delete {key}")

    def arm(
        self, *faults: tuple[int, str], action: Callable[[], object] = bool
    ) -> None:
        """Each fault strikes at the command of that number, 0 the next; and then
        `action`. The fault "act" is the action alone, before the command. `verbs`: what
        was seen."""
        with self._lock:
            self._faults, self._action = dict(faults), action
            self.struck: list[str] = []
            self.evicted: list[str] = []  # keys
            self.verbs: list[str] = []

    def disarm(self) -> None:
        self.arm()

    @property
    def fired(self) -> int:
        return len(self.struck)

    def _next(self, verb: str) -> str:
        """The fault of this command, or ""."""
        with self._lock:
            fault = self._faults.get(len(self.verbs), "")
            self.verbs.append(verb)
            self.struck += [verb] * bool(fault)
            if fault == "gone":
                self._faults = dict.fromkeys(range(len(self.verbs), 10**4), fault)
        return fault


class Command(NamedTuple):
    raw: bytes
    verb: str
    keys: list[str]

    @property
    def is_quiet(self) -> bool:
        return self.raw.endswith(b" noreply\r\n")


# What proxies such as twemproxy pass on. They close the connection on all else.
CLASSIC = re.compile(
    rb"((get|gets|set|add|cas|touch|delete|stats)( [^- \r\n][^ \r\n]*)+\r\n)?"
)


def read_command(stream: IO[bytes]) -> Optional[Command]:
    line = stream.readline()
    if not CLASSIC.fullmatch(line):
        raise ValueError(line)
    verb, *fields = line.decode().split() or [""]
    if verb in ("set", "add", "cas"):
        body = stream.read(int(fields[3]) + 2)
        return Command(line + body, verb, fields[:1])
    keys = fields if verb.startswith("get") else fields[:1]
    return Command(line, verb, keys) if line else None


def read_reply(stream: IO[bytes], command: Command) -> bytes:
    verb = command.verb
    if command.is_quiet:
        return b""
    reply = line = stream.readline()
    while verb in ("get", "gets", "stats") and line.startswith((b"VALUE", b"STAT")):
        if line.startswith(b"VALUE"):
            reply += stream.read(int(line.split()[3]) + 2)
        line = stream.readline()
        reply += line
    return reply


class Proxy(Trigger):
    """Between a cache and a memcached: takes commands one by one, makes them fail."""

    def __init__(self, upstream: Memcached) -> None:
        super().__init__(upstream)
        self._gone = False
        self._sessions: list[threading.Thread] = []
        self._listen(0)
        self.server = "127.0.0.1:{1}".format(*self._listener.getsockname())

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(
            target=self._accept, args=[self._listener], daemon=True
        ).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError), listener:
            while True:
                client, _ = listener.accept()
                session = threading.Thread(
                    target=self._serve, args=[client], daemon=True
                )
                self._sessions.append(session)
                session.start()

    def cache(self, timeout: float = 10, **options: Any) -> FileCache:
        waits = {"connect_timeout": timeout, "timeout": timeout}
        client = PooledClient(
            self.server, no_delay=True, default_noreply=False, **waits
        )
        return FileCache(client, **options)

    def drain(self) -> None:
        """Wait until all commands were carried out, after their senders have gone."""
        while self._sessions:
            # An interrupt may have struck before the client knew its new socket.
            gc.collect()
            self._sessions.pop().join(WAIT)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`

    def disarm(self) -> None:
        super().disarm()
        if self._gone:
            self._gone = False
            self._listen(int(self.server.rpartition(":")[2]))

    def _serve(self, client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError, ValueError, IndexError),
            contextlib.ExitStack() as stack,
        ):
            stack.enter_context(client)
            server = stack.enter_context(self.upstream.connection())
            requests = stack.enter_context(client.makefile("rb"))
            replies = stack.enter_context(server.makefile("rb"))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.settimeout(None)
            command = read_command(requests)
            while command:
                client.sendall(self._answer(command, client, requests, server, replies))
                command = read_command(requests)

    def _answer(
        self,
        command: Command,
        client: socket.socket,
        requests: io.BufferedReader,
        server: socket.socket,
        replies: IO[bytes],
    ) -> bytes:
        fault, reply = self._next(command.verb), b""
        if fault == "act":
            self._action()
        if fault in DONE or (command.verb == "delete" and fault == "no"):
            server.sendall(command.raw)
            reply = read_reply(replies, command)
        if fault and fault != "act":
            self._action()
        if fault == "gone":
            self._gone = True
            self.close()
        if fault == "cut":
            client.sendall(reply[: len(reply) // 2])
        if fault.startswith("timeout"):
            while requests.read1(1 << 16):  # until the client gives up
                pass
        if fault in HANGS_UP:
            client.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            raise ConnectionAbortedError
        if fault == "evicted":
            self._evict(command.keys)
        return reply if fault in DONE else false_reply(fault, command)


class Late(Proxy):
    """Does a command only some time after its sender hung up."""

    def _answer(
        self,
        command: Command,
        client: socket.socket,
        requests: io.BufferedReader,
        server: socket.socket,
        replies: IO[bytes],
    ) -> bytes:
        late = self._next(command.verb)
        if late:
            self._action()
            while requests.read1(1 << 16):
                pass
            time.sleep(0.2)
        server.sendall(command.raw)
        reply = read_reply(replies, command)
        if late:
            raise ConnectionAbortedError
        return reply


def false_reply(fault: str, command: Command) -> bytes:
    if command.is_quiet:
        return b""
    if fault == "no":
        return NO[command.verb] + b"\r\n"
    if fault == "garbage":
        return b"\0what?\r\n"
    words = OUT_OF_MEMORY.get(command.verb, b"busy") * (fault == "out of memory")
    return b"SERVER_ERROR " + words + b"\r\n"


ERRORS: dict[str, Callable[[bytes], Exception]] = {
    "gone": ConnectionRefusedError,
    "reset before": ConnectionResetError,
    "reset after": ConnectionResetError,
    "timeout before": TimeoutError,
    "timeout after": TimeoutError,
    "server error": MemcacheServerError,
    "garbage": MemcacheUnknownError,
}
CLIENT_NO: dict[str, Callable[[Any], object]] = {  # what pymemcache makes of a no
    "gets": lambda key: (None, None),
    "get_many": lambda keys: {},
    "set_many": list,
    "add": lambda key: False,
    "cas": lambda key: False,
    "touch": lambda key: False,
    "delete_many": lambda keys: True,
    "stats": lambda what: {},
}


class Faulty(Trigger):
    """A user's plain client whose n-th command fails."""

    def __init__(self, upstream: Memcached) -> None:
        super().__init__(upstream)
        self._client = Client(upstream.address, timeout=5)

    def cache(self, timeout: float = 10, **options: Any) -> FileCache:
        return FileCache(self, **options)

    def drain(self) -> None:
        """All commands were carried out when they returned."""

    def close(self) -> None:
        self._client.close()

    def __getattr__(self, command: str) -> Any:
        if command not in CLIENT_NO:
            raise AttributeError(command)
        return functools.partial(self._run, command)

    def _run(self, command: str, *args: Any, **options: Any) -> Any:
        verb = command.replace("_many", "")
        fault, reply = self._next(verb), None
        if fault in DONE or (command == "delete_many" and fault == "no"):
            reply = getattr(self._client, command)(*args, **options)
        if fault:
            self._action()
        if fault == "no":
            return CLIENT_NO[command](args[0])
        if fault == "evicted":
            self._evict([args[0]] if isinstance(args[0], str) else list(args[0]))
        if fault == "out of memory":
            raise MemcacheServerError(OUT_OF_MEMORY.get(verb, b"busy"))
        if fault in ERRORS:
            raise ERRORS[fault](b"no luck")
        return reply
