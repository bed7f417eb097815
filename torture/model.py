"""A model of memcached, and of a process at work with it; their states can be kept and
compared.

A process is one operation of the library, the real code. Its next command depends on
nothing but the replies to the commands that it sent so far. So its state is the list of
these replies. To find its next command, the operation runs from its beginning, with
those replies, up to the first command without one. Each run has the same random segment
and the same times.
"""

from __future__ import annotations

import types
from typing import Any, Callable, Optional

import pytest

import memchunk
from memchunk import FileCache
from torture.tools import CHUNK, LEASE, result

NOW = 1_000_000_000
Item = tuple[bytes, int, int]  # value, when it ends (0: never), cas token
Step = tuple[Any, ...]  # command, key, arguments


class Store:
    """memcached, as commands for one key at a time. `items` is never changed, so it may
    be kept."""

    def __init__(
        self, items: Optional[dict[str, Item]] = None, publications: int = 0
    ) -> None:
        self.items, self.publications = items or {}, publications

    def run(self, command: str, *arguments: Any) -> Any:
        return getattr(self, command)(*arguments)

    def set(self, key: str, value: bytes, expire: int, token: int = 0) -> bool:
        self.items = {**self.items, key: (value, ends(expire), token)}
        if 0 < ends(expire) <= NOW:
            self.delete(key)
        return True

    def _publish(self, key: str, value: bytes, expire: int) -> bool:
        self.publications += 1  # only these need a token of their own
        return self.set(key, value, expire, self.publications)

    def add(self, key: str, value: bytes, expire: int) -> bool:
        return key not in self.items and self._publish(key, value, expire)

    def cas(self, key: str, value: bytes, token: Any, expire: int) -> Optional[bool]:
        if key not in self.items:
            return None
        return self.gets(key)[1] == token and self._publish(key, value, expire)

    def gets(self, key: str) -> tuple[Optional[bytes], Optional[int]]:
        value, _, token = self.items.get(key, (None, 0, None))
        return value, token

    def get(self, key: str) -> Optional[bytes]:
        return self.gets(key)[0]

    def touch(self, key: str, expire: int) -> bool:
        if key in self.items:
            value, _, token = self.items[key]
            self.items = {**self.items, key: (value, ends(expire), token)}
        return key in self.items

    def delete(self, key: str) -> bool:
        found = key in self.items
        self.items = {each: item for each, item in self.items.items() if each != key}
        return found

    def forget(self, key: str) -> bool:
        """A `delete` without a reply."""
        self.delete(key)
        return True


def ends(expire: int) -> int:
    return expire and NOW + expire if expire <= 30 * 24 * 3600 else expire


class Client:
    """What a user's pymemcache client offers. `run` does one command for one key.
    memory: bytes that the server tells as its -m, None for a server that tells nothing.
    """

    def __init__(self, run: Callable[..., Any], memory: Optional[int] = None) -> None:
        self._run, self._memory = run, memory

    def close(self) -> None:
        pass

    def stats(self, *what: str) -> dict[bytes, int]:
        return {b"maxbytes": self._memory} if self._memory else {}

    def gets(self, key: str) -> Any:
        return self._run("gets", key)

    def add(self, key: str, value: bytes, expire: int, noreply: bool) -> Any:
        return self._run("add", key, value, expire)

    def cas(self, key: str, value: bytes, cas: Any, expire: int, noreply: bool) -> Any:
        return self._run("cas", key, value, cas, expire)

    def touch(self, key: str, expire: int, noreply: bool) -> Any:
        return self._run("touch", key, expire)

    def set_many(
        self, values: dict[str, bytes], expire: int, noreply: bool
    ) -> list[str]:
        items = values.items()
        return [key for key, value in items if not self._run("set", key, value, expire)]

    def get_many(self, keys: list[str]) -> dict[str, bytes]:
        values = {key: self._run("get", key) for key in keys}
        return {key: value for key, value in values.items() if value is not None}

    def delete_many(self, keys: list[str], noreply: bool) -> bool:
        for key in keys:
            self._run("forget" if noreply else "delete", key)
        return True


def cache_on(run: Callable[..., Any], memory: Optional[int] = None) -> FileCache:
    return FileCache(Client(run, memory), chunk_size=CHUNK, lease=LEASE)


class Clock:
    """The clocks of the library. Time stands still; or, for a slow process, `step`
    seconds pass between two looks at the clock that measures durations."""

    def __init__(self) -> None:
        self.step = self._elapsed = 0

    def monotonic(self) -> float:
        self._elapsed += self.step
        return self._elapsed

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For memchunk alone: pytest has its clocks from the same module."""
        clocks = {"time": lambda: NOW, "monotonic": self.monotonic}
        module = types.SimpleNamespace(**clocks, sleep=lambda seconds: None)
        monkeypatch.setattr(memchunk, "time", module)


class Asked(BaseException):
    """Not an Exception, so that nothing handles it."""


def manifest(name: str = "file") -> str:
    """The key of a file's manifest: the first that a cache asks for."""

    def run(command: str, key: str, *arguments: object) -> object:
        raise Asked(key)

    try:
        cache_on(run).stat(name)
    except Asked as asked:
        return str(asked)
    raise AssertionError("a cache knows a file without asking for it")


class Pending(BaseException):
    """There is no reply yet. It isn't an Exception, so nothing may swallow it."""


class Process:
    """An operation after some replies: the `step` that it wants to do next, or its
    `outcome` if it has ended. A reply may be an exception, which the client raises.
    `sent` are the commands before, each with its key, and `last` is the one before.
    `found` are the manifests that it has looked at."""

    def __init__(
        self,
        operation: Any,
        replies: tuple[Any, ...] = (),
        sent: frozenset[Step] = frozenset(),
        found: frozenset[bytes] = frozenset(),
        last: Step = (),
    ) -> None:
        self.operation, self._replies, self.last = operation, replies, last
        self.sent, self.found = sent, found
        self._next: dict[Any, Process] = {}
        self.step: Optional[Step] = None
        self.outcome: object = None
        known = iter(replies)

        def run(*step: Any) -> Any:
            reply = next(known, Pending)
            if reply is Pending:
                self.step = self.step or step
                raise Pending
            if isinstance(reply, type):
                raise reply("no luck")
            return reply

        try:
            self.outcome = result(lambda: operation(cache_on(run, operation.memory)))
        except Pending:
            pass
        except KeyboardInterrupt:
            self.outcome = "KeyboardInterrupt"

    def after(self, reply: Any) -> Process:
        if reply not in self._next:
            step = self.step or ()
            sent, found = self.sent | {step[:2]}, self.found
            if step[0] == "gets" and isinstance(reply, tuple) and reply[0]:
                found |= {reply[0]}
            replies = (*self._replies, reply)
            self._next[reply] = Process(self.operation, replies, sent, found, step)
        return self._next[reply]
