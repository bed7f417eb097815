"""Processes that fork, threads that share a cache, and interrupts in mid-reply.

The next operation is right: no process, thread or call gets the reply of another. No
connection is left open.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import itertools
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, Callable

import pytest
from pymemcache.client.base import Client, PooledClient

import mcpool
import memchunk
from memchunk import FileCache
from tests.faults import Late
from tests.support import Memcached, wait_for
from torture.tools import CHUNK, LEASE, LONG, audit, connected, counts, result

TURNS = 100 if LONG else 10
INTERRUPTS = 20_000 if LONG else 400

KINDS: dict[str, Callable[[Memcached], FileCache]] = {
    "mcpool": lambda server: connected(server, chunk_size=CHUNK),
    "address": lambda server: FileCache(server.server, chunk_size=CHUNK),
    "Client": lambda server: FileCache(
        Client(server.address, timeout=5), chunk_size=CHUNK
    ),
    "PooledClient": lambda server: FileCache(
        PooledClient(server.address, timeout=5), chunk_size=CHUNK
    ),
}
SAFE = ["mcpool", "address"]  # for threads, and for processes that fork


def connections(server: Memcached) -> int:
    return int(server.stats()["curr_connections"])


@contextmanager
def no_connection_left(server: Memcached) -> Iterator[None]:
    before, files = connections(server), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()  # what was being made at an interrupt is in a cycle with its traceback
    wait_for(lambda: connections(server) <= before, "connections to be closed")
    assert len(os.listdir("/proc/self/fd")) == files


def work(cache: FileCache, worker: str, turns: int) -> None:
    """Files of a worker's own, and one that all share. Its bytes show a mixture."""
    for turn in range(turns):
        own = f"{worker} {turn} ".encode() * 60
        shared = worker.encode()[-1:] * random.randrange(1, 900)
        cache.set(f"of {worker}", own)
        cache.set("shared", shared)
        assert len(set(cache.get("shared"))) == 1
        assert cache.get(f"of {worker}") == own
        assert cache.stat(f"of {worker}").size == len(own)


def fork(task: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        task()
        status = 0
    finally:
        os._exit(status)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", SAFE)
def test_processes_that_fork_with_live_connections(
    server: Memcached, kind: str
) -> None:
    with no_connection_left(server), closing(KINDS[kind](server)) as cache:
        with ThreadPoolExecutor(4) as threads:  # several connections in the pool
            list(threads.map(lambda number: work(cache, str(number), 3), range(4)))
        for _ in range(TURNS):
            children = [
                fork(lambda: work(cache, f"child {letter}", 5))  # noqa: B023
                for letter in "abc"
            ]
            work(cache, "parent", 5)
            assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
            counts["processes that forked with live connections"] += 3


@pytest.mark.parametrize("kind", SAFE)
def test_threads_that_share_a_cache(server: Memcached, kind: str) -> None:
    with no_connection_left(server), closing(KINDS[kind](server)) as cache:
        with ThreadPoolExecutor(8) as threads:
            list(
                threads.map(
                    lambda number: work(cache, str(number), 5 * TURNS), range(8)
                )
            )
        assert connections(server) <= 8 + 10
        counts["operations of threads that share a cache"] += 8 * 5 * TURNS * 5


PRELOADED = """
from werkzeug.test import Client
from wsgi import application
assert Client(application).put("/files/early", data=b"early").status_code == 201
"""


def test_gunicorn_that_preloads_an_application_with_live_connections(
    server: Memcached, tmp_path: pathlib.Path
) -> None:
    server.flush()
    (tmp_path / "preloaded.py").write_text(PRELOADED)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        paths = os.pathsep.join([str(tmp_path), os.path.dirname(memchunk.__file__)])
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "--preload", "--workers", "3"),
                *("--threads", "2", "--bind", f"fd://{number}", "--log-level", "error"),
                "preloaded:application",
            ],
            env={**os.environ, "PYTHONPATH": paths, "MEMCHUNK_SERVERS": server.server},
            pass_fds=[number],
        )
        try:
            with ThreadPoolExecutor(6) as threads:
                list(threads.map(lambda worker: visit(port, worker), range(6)))
        finally:
            process.terminate()
            process.wait()
    counts["requests to gunicorn --preload"] += 6 * 2 * 3 * TURNS


def visit(port: int, worker: int) -> None:
    for turn in range(3 * TURNS):
        data = f"{worker} {turn} ".encode() * 5000
        status, _ = request(port, "PUT", worker, data)
        assert status in (200, 201)
        assert request(port, "GET", worker, b"") == (200, data)


def request(port: int, method: str, worker: int, data: bytes) -> tuple[int, bytes]:
    with closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    ) as connection:
        connection.request(method, f"/files/{worker}", data)
        response = connection.getresponse()
        return response.status, response.read()


class GeventTimeout(BaseException):
    """As gevent's: not an Exception, and raised anywhere."""


@contextmanager
def interrupting(error: type[BaseException]) -> Iterator[None]:
    def strike(*_: object) -> None:
        raise error

    old = signal.signal(signal.SIGALRM, strike)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# An interrupt between the making of a socket and its keeping leaves it to the garbage
# collector.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, GeventTimeout])
def test_an_interrupt_at_any_moment(
    server: Memcached, kind: str, error: type[BaseException]
) -> None:
    server.flush()
    dice = random.Random(7)
    # pymemcache's own pool keeps the connection of an interrupted command open, which
    # limits how many there may be.
    interrupts = (
        min(INTERRUPTS, 400) if kind in ("PooledClient", "address") else INTERRUPTS
    )
    with no_connection_left(server), closing(KINDS[kind](server)) as cache:
        stored, maybe = b"0" * 500, list[bytes]()
        cache.set("file", stored)
        struck = 0
        with interrupting(error):
            for number in range(interrupts):
                data = str(number).encode() * dice.randrange(1, 300)
                writes = dice.random() < 0.5
                try:
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 3e-3))
                    cache.set("file", data) if writes else cache.get("file")
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    time.sleep(0)  # a signal that is pending strikes now
                    stored, maybe = data if writes else stored, [] if writes else maybe
                except error:
                    struck += 1
                    maybe += [data] * writes
                found = result(lambda: cache.get("file"))
                assert found in (stored, *maybe)
                # Once another file is published, what was interrupted before can't be
                # any more: its cas is of an older version. Else the server may do it.
                if found != stored:
                    stored, maybe = found, []
        counts[f"interrupts of {kind}"] += struck
        assert struck > interrupts // 20


@pytest.mark.parametrize("kind", ["mcpool", "Client"])
def test_an_interrupt_of_a_command_that_is_done_late(
    server: Memcached, kind: str
) -> None:
    """The server does the command when its sender is already cleaning up."""
    proxy, old, new = Late(server), b"o" * 350, b"n" * 450
    with closing(proxy), closing(KINDS["mcpool"](server)) as direct:
        # In the short form the two kinds take turns.
        turns = itertools.count() if LONG else itertools.count(kind == "Client", 2)
        for moment in turns:
            server.flush()
            direct.set("file", old, expire=5000)
            cache = FileCache(
                Client(proxy.server, timeout=5), chunk_size=CHUNK, lease=LEASE
            )
            if kind == "mcpool":
                pool = mcpool.connect(proxy.server)
                cache = FileCache(pool, chunk_size=CHUNK, lease=LEASE)
            with closing(cache):
                proxy.arm(
                    (moment, "late"), action=lambda: os.kill(os.getpid(), signal.SIGINT)
                )
                with contextlib.suppress(KeyboardInterrupt):
                    cache.set("file", new, expire=5000)
                fired, sealed = proxy.fired, "touch" in proxy.verbs
                proxy.disarm()
            proxy.drain()
            assert direct.get("file") in (old, new)
            # Who is told to stop cleans nothing up. The lease ends what it stored,
            # unless all of that was touched with its own end.
            audit(server, direct.stat("file"), spare="" if sealed else "-")
            if not fired:
                break
            counts[f"interrupts of a command that is done late, {kind}"] += 1
        assert moment > 5


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_while_the_server_is_stopped(
    start_memcached: Any, kind: str
) -> None:
    """The signal comes while a call waits for a reply, and the reply after it."""
    server = start_memcached()
    with closing(KINDS[kind](server)) as cache:
        cache.set("file", b"file" * 200)
        cache.set("other", b"other" * 200)
        for turn in range(TURNS):
            for call in (cache.get, cache.stat, cache.delete):
                server.pause()
                timer = threading.Timer(
                    0.02, lambda: os.kill(os.getpid(), signal.SIGUSR1)
                )
                old = signal.signal(signal.SIGUSR1, strike)
                timer.start()
                with pytest.raises(KeyboardInterrupt):
                    call("file")
                timer.join()
                signal.signal(signal.SIGUSR1, old)
                server.resume()
                assert cache.get("other") == b"other" * 200
                cache.set("file", f"file {turn}".encode() * 100)
                counts["interrupts while the server is stopped"] += 1


def strike(*_: object) -> None:
    raise KeyboardInterrupt
