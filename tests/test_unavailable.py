"""Servers that are down, frozen, restarted or wrong, lost replies, and interrupts."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest
from pymemcache.client.base import Client, PooledClient
from pymemcache.exceptions import (
    MemcacheServerError,
    MemcacheUnexpectedCloseError,
    MemcacheUnknownError,
)

import mcpool
import memchunk
from memchunk import FileCache
from tests.faults import Once, Wrapped, raising
from tests.support import MIB, Memcached, wait_for

CHUNK = 1000
OLD = bytes(range(256)) * 10  # three chunks
NEW = bytes(reversed(range(256))) * 18  # five chunks
LEASE = 3600

Call = Callable[[FileCache, str], object]  # is told the version of the old file
READ: dict[str, Call] = {
    "get": lambda cache, _: cache.get("file"),
    "open": lambda cache, _: cache.open("file"),
    "stat": lambda cache, _: cache.stat("file"),
    "in": lambda cache, _: "file" in cache,
}
CHANGE: dict[str, Call] = {
    "add": lambda cache, _: cache.add("file", NEW),
    "set": lambda cache, _: cache.set("file", NEW),
    "set small": lambda cache, _: cache.set("file", b"small"),
    "cas": lambda cache, version: cache.cas("file", NEW, version),
    "touch": lambda cache, _: cache.touch("file", 5000),
    "delete": lambda cache, _: cache.delete("file"),
    "delete version": lambda cache, version: cache.delete("file", version),
    "stage": lambda cache, _: cache.stage("file", NEW),
    "unstage": lambda cache, version: cache.unstage("file", [f"{version}:3:1000"]),
}
every_call = pytest.mark.parametrize(
    "call", [*READ.values(), *CHANGE.values()], ids=[*READ, *CHANGE]
)


@pytest.fixture
def cache(memcached: Memcached) -> Iterator[FileCache]:
    with FileCache(memcached.server, chunk_size=CHUNK) as cache:
        yield cache


def hasty(server: str) -> FileCache:
    """A cache that waits for a fifth of a second."""
    client = PooledClient(server, connect_timeout=0.2, timeout=0.2)
    return FileCache(client, chunk_size=CHUNK)


@contextlib.contextmanager
def frozen(memcached: Memcached) -> Iterator[None]:
    memcached.pause()
    try:
        yield
    finally:
        memcached.resume()


def assert_unavailable(memcached: Memcached, call: Callable[[], object]) -> None:
    with pytest.raises(memchunk.CacheUnavailable) as caught:
        call()
    assert caught.value.name == "file"
    assert caught.value.server == memcached.server
    assert memcached.server in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# --- No server, and servers that are killed, frozen or wrong --------------------------


@every_call
def test_a_server_that_is_not_there_is_unavailable(
    memcached: Memcached, call: Call
) -> None:
    memcached.kill()
    with FileCache(memcached.server) as cache:
        assert_unavailable(memcached, lambda: call(cache, "0" * 16))


@every_call
def test_a_server_that_was_killed_is_unavailable(
    cache: FileCache, memcached: Memcached, call: Call
) -> None:
    version = cache.set("file", OLD).version
    memcached.kill()
    assert_unavailable(memcached, lambda: call(cache, version))


@every_call
def test_a_server_that_is_frozen_is_unavailable_and_thaws(
    cache: FileCache, memcached: Memcached, call: Call
) -> None:
    version = cache.set("file", OLD).version
    with hasty(memcached.server) as cold:
        with frozen(memcached):
            assert_unavailable(memcached, lambda: call(cold, version))
        assert cold.get("file") == OLD


@pytest.mark.parametrize("verb", ["set", "add"])
def test_a_server_that_freezes_in_mid_write_keeps_the_old_file(
    cache: FileCache, memcached: Memcached, verb: str
) -> None:
    name = "file" if verb == "set" else "other"
    info = cache.set("file", OLD)

    def source() -> Iterator[bytes]:
        yield NEW * 1000
        stack.enter_context(frozen(memcached))
        yield NEW

    refusal = pytest.raises(memchunk.CacheUnavailable)
    with contextlib.ExitStack() as stack, hasty(memcached.server) as cold, refusal:
        getattr(cold, verb)(name, source())
    assert cache.get("file") == OLD
    assert name == "file" or name not in cache
    # What the server goes on to store or to delete is on a lease.
    ends = list(memcached.expiries().values())
    assert ends.count(-1) == 1 + info.chunks
    assert all(end - time.time() <= LEASE + 1 for end in ends)


class Liar(threading.Thread):
    """A server that gives one answer to all that comes."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(daemon=True)
        self.answer = answer
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.server = "127.0.0.1:{1}".format(*self.listener.getsockname())
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection, contextlib.suppress(OSError):
                    while connection.recv(65536):
                        connection.sendall(self.answer)
                        if not self.answer:
                            break


ANSWERS = [
    *[
        b"",
        b"\0what?\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SERVER_ERROR busy\r\n",
    ],
    *[b"ERROR\r\n", b"CLIENT_ERROR bad\r\n", b"ERROR Too many open connections\r\n"],
    *[b"VALUE x\r\n", b"VALUE key 0 many 1\r\nEND\r\n"],
    *[b"VALUE other 0 1 1\r\n1\r\nEND\r\n", b"STAT\r\n"],
]


@pytest.mark.parametrize("answer", ANSWERS)
@every_call
def test_a_server_that_speaks_nonsense_is_unavailable(
    call: Call, answer: bytes
) -> None:
    liar = Liar(answer)
    with (
        hasty(liar.server) as cache,
        pytest.raises(memchunk.CacheUnavailable) as caught,
    ):
        call(cache, "0" * 16)
    assert caught.value.server == liar.server
    liar.listener.close()


# --- Lost replies ---------------------------------------------------------------------


def left(memcached: Memcached) -> dict[str, bool]:
    """Items, and whether they have an end."""
    return {key: end != -1 for key, end in memcached.expiries().items()}


def wrapped(memcached: Memcached, before: Once | None, after: Once | None) -> FileCache:
    client = Client(memcached.address, timeout=5)
    return FileCache(Wrapped(client, before or bool, after or bool), chunk_size=CHUNK)


# The command that publishes. `touch` asks for each of three chunks with a `cas` before.
PUBLISH: dict[str, int | str] = {"add": "add", "touch": 7}
PUBLISH |= dict.fromkeys(["set", "set small", "cas", "delete", "delete version"], "cas")
LOST = [
    *[ConnectionResetError(), MemcacheUnexpectedCloseError(), TimeoutError()],
    MemcacheUnknownError(),
]
every_loss = pytest.mark.parametrize(
    "error", LOST, ids=lambda error: type(error).__name__
)


@every_loss
@pytest.mark.parametrize("verb", PUBLISH)
def test_a_publication_whose_reply_was_lost_is_a_success(
    cache: FileCache, memcached: Memcached, verb: str, error: Exception
) -> None:
    version = "" if verb == "add" else cache.set("file", OLD).version
    lost = Once(PUBLISH[verb], raising(error))
    with wrapped(memcached, None, lost) as losing:
        CHANGE[verb](losing, version)
    assert lost.acted
    data = {"touch": OLD, "set small": b"small"}.get(verb, NEW)
    count = 1 + len(data) // CHUNK + (data != b"small")
    if "delete" in verb:
        count, data = 0, b""
    assert not data or cache.get("file") == data
    wait_for(lambda: len(memcached.keys()) == count, "the old chunks to go")


@every_loss
@pytest.mark.parametrize("verb", PUBLISH)
def test_a_publication_that_did_not_arrive_deletes_nothing(
    cache: FileCache, memcached: Memcached, verb: str, error: Exception
) -> None:
    version = "" if verb == "add" else cache.set("file", OLD).version
    lost, before = Once(PUBLISH[verb], raising(error)), left(memcached)
    with wrapped(memcached, lost, None) as losing:
        assert_unavailable(memcached, lambda: CHANGE[verb](losing, version))
    assert lost.acted
    assert before.items() <= left(memcached).items()
    new = 5 if verb in ("add", "set", "cas") else 0  # the file may yet appear
    assert len(memcached.keys()) == len(before) + new
    if verb != "add":
        assert cache.get("file") == OLD


@pytest.mark.parametrize("is_done", [True, False], ids=["done", "not done"])
@pytest.mark.parametrize("verb", ["set", "set small", "cas", "touch", "stage"])
def test_an_error_in_any_command_leaves_a_whole_file(
    cache: FileCache, memcached: Memcached, verb: str, is_done: bool
) -> None:
    for moment in itertools.count():
        memcached.flush()
        version = cache.set("file", OLD).version
        lost = Once(moment, raising(TimeoutError()))
        hooks = (None, lost) if is_done else (lost, None)
        outage = contextlib.suppress(memchunk.CacheUnavailable)
        with wrapped(memcached, *hooks) as losing, outage:
            CHANGE[verb](losing, version)
        if not lost.acted:
            break
        assert cache.get("file") in (OLD, NEW, b"small"), f"at command {moment}"
    assert moment >= 2


def test_a_delete_of_old_chunks_that_fails_is_tried_again(
    cache: FileCache, memcached: Memcached
) -> None:
    cache.set("file", OLD)
    lost = Once("delete_many", raising(TimeoutError()))
    with wrapped(memcached, lost, None) as losing:
        info = losing.set("file", NEW)
    assert lost.acted
    assert len(memcached.keys()) == 1 + info.chunks


def test_a_lock_whose_reply_was_lost_makes_nobody_wait(memcached: Memcached) -> None:
    """To ask for the lock again would mean to wait for oneself."""
    seen: list[str] = []

    def make() -> bytes:
        seen.append("make")
        return b"made"

    lost = Once("add", raising(ConnectionResetError()))
    client = Wrapped(Client(memcached.address, timeout=5), seen.append, lost)
    with FileCache(client) as losing:
        assert losing.get_or_set("file", make, lock=1) == b"made"
    assert lost.acted
    assert seen[: seen.index("make")].count("add") == 1


# --- Restarts, bugs and interrupts ----------------------------------------------------


@pytest.mark.parametrize(
    "call", [*READ.values(), *CHANGE.values()], ids=[*READ, *CHANGE]
)
def test_every_idle_connection_may_break_in_a_restart(
    memcached: Memcached, call: Call
) -> None:
    client = PooledClient(memcached.address, timeout=5)
    with FileCache(client, chunk_size=CHUNK) as cache:
        cache.set("file", OLD)
        with frozen(memcached), ThreadPoolExecutor(5) as threads:
            waiting = [threads.submit(cache.stat, "file") for _ in range(5)]
            wait_for(lambda: len(client.client_pool.used) == 5, "five connections")
            memcached.resume()
            assert {each.result().size for each in waiting} == {len(OLD)}
        assert len(client.client_pool.free) == 5
        memcached.kill()
        memcached.start()
        with contextlib.suppress(memchunk.FileNotFound):
            call(cache, "0" * 16)
        cache.set("file", NEW)
        assert cache.get("file") == NEW


def test_a_server_restarted_in_mid_write_is_full_and_not_half_full(
    cache: FileCache, memcached: Memcached
) -> None:
    def source() -> Iterator[bytes]:
        yield NEW * 1000
        memcached.kill()
        memcached.start()
        yield NEW

    with pytest.raises(memchunk.CacheFull):
        cache.set("file", source())
    assert memcached.keys() == []


@pytest.mark.parametrize("is_lost", [False, True])  # the reply
@pytest.mark.parametrize("taken", [0, 2000, len(NEW)])  # bytes that were staged
def test_a_server_restarted_before_the_publication_keeps_no_file(
    memcached: Memcached, monkeypatch: pytest.MonkeyPatch, taken: int, is_lost: bool
) -> None:
    pool: Any = mcpool.connect(memcached.server)
    send = pool.pipeline

    def pipeline(commands: Iterable[Iterable[bytes]]) -> Any:
        parts = [list(command) for command in commands]
        is_publication = parts[0][0].startswith(b"add ")
        if is_publication:
            memcached.kill()
            memcached.start()
        replies = send(parts)
        if is_publication and is_lost:
            raise ConnectionResetError
        return replies

    with FileCache(pool, chunk_size=512) as cache:
        part, start = cache.stage("file", NEW[:taken])
        with monkeypatch.context() as patch:
            patch.setattr(pool, "pipeline", pipeline)
            with pytest.raises(memchunk.CacheFull, match="lost in a restart"):
                cache.add("file", NEW[start:], parts=[part])
        with pytest.raises(memchunk.FileEvicted):
            cache.get("file")
        cache.add("file", NEW)
        assert cache.get("file") == NEW


def test_add_replaces_no_file_that_got_an_old_token_after_a_restart(
    memcached: Memcached,
) -> None:
    with FileCache(memcached.server) as cache, FileCache(memcached.server) as other:
        cache.add("file", b"x")
        [key] = memcached.keys()
        memcached.kill()
        memcached.start()
        memcached.write(key, b"damaged")  # the first item has the first token

        def source() -> Iterator[bytes]:
            memcached.kill()
            memcached.start()
            other.add("file", OLD[:100])  # this is the first item now
            cache.ping()  # connects anew
            yield NEW[:100]

        with pytest.raises(memchunk.FileExists):
            cache.add("file", source())
        assert cache.get("file") == OLD[:100]


@pytest.mark.parametrize("command", ["gets", "set_many", "touch", "add", "stats"])
def test_a_bug_of_a_client_is_no_outage(memcached: Memcached, command: str) -> None:
    bug = Once(command, raising(TypeError("bug")))
    with wrapped(memcached, bug, None) as cache, pytest.raises(TypeError, match="bug"):
        cache.set("file", NEW)
    assert memcached.keys() == [] or command == "add"


class Alarm(BaseException):
    """As a time-out of gevent, no Exception."""


def strike(*_: object) -> None:
    raise Alarm


@pytest.mark.parametrize(
    "call", [*READ.values(), *CHANGE.values()], ids=[*READ, *CHANGE]
)
def test_a_signal_in_mid_reply_leaves_no_reply_for_another_call(
    cache: FileCache, memcached: Memcached, call: Call
) -> None:
    version = cache.set("file", OLD).version
    handler = signal.signal(signal.SIGALRM, strike)
    with FileCache(Client(memcached.address), chunk_size=CHUNK) as struck:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with frozen(memcached), pytest.raises(Alarm):
            call(struck, version)
        signal.signal(signal.SIGALRM, handler)
        struck.set("other", NEW)
        assert (struck.get("file"), struck.get("other")) == (OLD, NEW)


def test_a_write_that_is_interrupted_sends_nothing_more(
    cache: FileCache, memcached: Memcached
) -> None:
    cache.set("file", OLD)
    for command in ("set_many", "touch", "cas"):
        strikes, seen = Once(command, raising(Alarm())), list[str]()
        client = Wrapped(Client(memcached.address), seen.append, strikes)
        with FileCache(client, chunk_size=CHUNK) as struck, pytest.raises(Alarm):
            struck.set("file", NEW)
        assert seen[-1] == command
        assert cache.get("file") == (NEW if command == "cas" else OLD)


class Shifted(Wrapped):
    """A pool that does no touch, and gives a wrong reply to it."""

    reply = b""

    def for_key(self, _: str) -> Shifted:
        return self

    def pipeline(self, commands: Iterable[tuple[bytes, ...]]) -> list[bytes]:
        made = list(commands)
        done = [each for each in made if not each[0].startswith(b"touch")]
        replies = iter(self.client.pipeline(done))
        return [next(replies) if each in done else self.reply for each in made]


@pytest.mark.parametrize("reply", [b"STORED", b"EXISTS", b"DELETED", b"ERROR"])
@pytest.mark.parametrize("max_size", [10_000, 50 * MIB])
def test_a_touch_with_a_wrong_reply_is_an_outage(
    memcached: Memcached, reply: bytes, max_size: int
) -> None:
    pool = Shifted(mcpool.connect(memcached.server))
    pool.reply = reply
    with FileCache(pool, chunk_size=CHUNK, max_size=max_size) as cache:
        with pytest.raises(memchunk.CacheUnavailable):
            cache.set("file", iter([NEW]))
        assert memcached.keys() == []


class Replicated(Wrapped):
    """Two replicas behind a proxy: one stores, and the answer is that of the other."""

    error: Exception | None = None

    def cas(self, *args: object, **options: object) -> bool:
        self.client.cas(*args, **options)
        if self.error:
            raise self.error
        return False


@pytest.mark.parametrize(
    "error", [None, MemcacheServerError(b"out of memory storing object")]
)
def test_a_publication_counts_if_only_one_of_two_replicas_says_no(
    memcached: Memcached, error: Exception | None
) -> None:
    client = Replicated(PooledClient(memcached.address, default_noreply=False))
    client.error = error
    with FileCache(client, chunk_size=CHUNK) as cache:
        cache.set("file", OLD)
        info = cache.set("file", NEW)
        assert (cache.stat("file"), cache.get("file")) == (info, NEW)


# The log


def test_log_tells_once_that_a_server_stops_and_answers_again(
    memcached: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    with FileCache(memcached.server) as cache:
        memcached.kill()
        for _ in range(3):
            with pytest.raises(memchunk.CacheUnavailable):
                cache.get("file")
        memcached.start()
        for _ in range(3):
            cache.set("file", b"1")
    stops, starts = (each.getMessage() for each in caplog.records)
    assert stops.startswith(f"memcached at {memcached.server} does not answer: ")
    assert starts == f"memcached at {memcached.server} answers again"
    assert {each.name for each in caplog.records} == {"memchunk"}


def test_log_tells_once_that_pings_fail(
    memcached: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    with FileCache(memcached.server) as cache:
        memcached.kill()
        for _ in range(2):
            with pytest.raises(memchunk.CacheUnavailable):
                cache.ping()
        memcached.start()
        cache.ping()
    assert [each.levelname for each in caplog.records] == ["WARNING"] * 2


def test_log_takes_a_closed_connection_neither_for_an_end_nor_for_an_answer(
    memcached: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [ConnectionResetError(), TimeoutError(), ConnectionResetError()]
    told = []

    def fail(command: str) -> None:
        raise errors[0]

    with FileCache(Wrapped(Client(memcached.address), before=fail)) as cache:
        while errors:
            with pytest.raises(memchunk.CacheUnavailable):
                cache.stat("file")
            told.append(len(caplog.records))
            errors.pop(0)
    assert told == [0, 1, 1]
