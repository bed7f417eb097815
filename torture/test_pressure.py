"""Small, full, busy, dying and stopped servers: real ones.

Whatever `add` or `set` returned for is at once readable, whole, or it raised. mcpool
and pymemcache's PooledClient take turns.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Callable

import pytest

import mcpool
from memchunk import CacheFull, FileCache, FileExists
from tests.engines import options_of
from tests.faults import Proxy
from tests.support import Memcached, Start, wait_for
from torture.model import manifest
from torture.tools import CHUNK, LEASE, LONG, audit, connected, counts, result

MIB = 1024 * 1024
WRITES = 1000 if LONG else 20
TIMEOUT = 0.2

# memcached's options, the largest file in MiB, and how many bytes others store between
# two pieces of it.
SERVERS: dict[str, tuple[list[str], float, int]] = {
    "-m 1": (["-m", "1", "-I", "512k"], 1, 0),
    "-m 2": (["-m", "2"], 2, 0),
    "-m 4": (["-m", "4"], 4, 0),
    "-m 8": (["-m", "8"], 8, 0),
    "-m 16, busy": (["-m", "16"], 12, 64 * 1024),
    "-m 64": (["-m", "64"], 50, 0),
    "-m 64, busy": (["-m", "64"], 50, 256 * 1024),
    "-m 64, held by small items": (["-m", "64"], 20, 0),
    "-I 16k": (options_of("-m 16 -I 16k -o slab_chunk_max=8"), 4, 0),
    "-I 128k, busy": (
        options_of("-m 32 -I 128k -o slab_chunk_max=128"),
        20,
        64 * 1024,
    ),
    "slab_automove=2": (["-m", "32", "-o", "slab_automove=2"], 24, 64 * 1024),
}


@pytest.fixture(scope="module")
def big() -> bytes:
    return os.urandom(50 * MIB)


@contextmanager
def clients(server: Memcached) -> Iterator[Iterator[FileCache]]:
    """Caches over both kinds of clients, in turn."""
    with connected(server) as fast, FileCache(server.server) as stock:
        yield itertools.cycle([fast, stock])


def busy(
    server: Memcached, data: bytes, churn: int, dice: random.Random
) -> Iterator[bytes]:
    """A source, while whose pieces are taken other users store theirs."""
    for start in range(0, len(data), MIB):
        yield data[slice(start, start + MIB)]
        size = dice.choice([100, 1000, 10_000, 200_000])
        server.fill(churn // size, size)


@pytest.mark.parametrize("kind", SERVERS)
def test_what_a_write_returned_for_is_there(
    start_memcached: Start, big: bytes, kind: str
) -> None:
    options, largest, churn = SERVERS[kind]
    server, dice, returned = start_memcached(*options), random.Random(kind), 0
    if "held" in kind:
        server.fill(60_000, 1000)
    with clients(server) as caches:
        for cache in itertools.islice(caches, WRITES):
            size = int(largest * MIB * dice.random() ** 2)
            data = big[-size:] if size else b""
            source = busy(server, data, churn, dice) if churn else data
            write = dice.choice([cache.add, cache.set, cache.set])
            name = dice.choice("abc")
            try:
                write(name, source, size=len(data))
            except (CacheFull, FileExists) as error:
                counts[f"{kind}: raised {type(error).__name__}"] += 1
            else:
                returned += 1
                assert cache.get(name) == data
        counts[f"{kind}: writes that returned, and were whole"] += returned


def test_a_stock_server_that_has_come_to_rest_takes_50_mib(
    start_memcached: Start, big: bytes
) -> None:
    """The thread of memcached that makes room sleeps longer the less there was to do.
    Until it wakes, chunks that were read or written twice are not evicted, and new ones
    refused.

    A write that does not wait for it fails every second to sixth time. Of those that
    do, on a busy machine, memcached evicts the first chunks of one in 200."""
    server = start_memcached()

    def is_at_rest() -> bool:
        before = server.stats()["lru_maintainer_juggles"]
        time.sleep(0.1)
        return server.stats()["lru_maintainer_juggles"] == before

    failed, turns = 0, 10 if LONG else 1
    names = ("one", "one", "two", "two") * turns
    with clients(server) as caches:
        for name, cache in zip(names, caches):
            try:
                cache.set(name, big)
                assert cache.get(name) == big
                counts["50 MiB on a stock server at rest"] += 1
            except CacheFull:
                failed += 1
            wait_for(is_at_rest, "memcached's LRU thread to sleep for a moment")
    assert failed <= turns


OLD, NEW = b"o" * 350, b"n" * 450
CALLS: dict[str, Callable[[FileCache], object]] = {
    "set": lambda cache: cache.set("file", NEW, expire=5000),
    "delete": lambda cache: cache.delete("file"),
    "get": lambda cache: cache.get("file"),
}
RESTART = ("CacheUnavailable", "CacheFull", "FileNotFound", "FileEvicted", "done", OLD)
OUTCOMES = {
    **{("restart", call): RESTART for call in CALLS},
    # Once the file is published or deleted, what is left to do may fail.
    ("stop", "set"): ("CacheUnavailable", "done"),
    ("stop", "delete"): ("CacheUnavailable", "done"),
    ("stop", "get"): ("CacheUnavailable",),
}
LEFT = {
    ("stop", "set"): (OLD, NEW),
    ("restart", "set"): (NEW, "FileNotFound"),
    ("stop", "delete"): (OLD, "FileNotFound"),
    ("restart", "delete"): ("FileNotFound",),
    ("stop", "get"): (OLD,),
    ("restart", "get"): ("FileNotFound",),
}
STEP = 1 if LONG else 4


def through(proxy: Proxy, client: str) -> FileCache:
    options: Any = {"chunk_size": CHUNK, "lease": LEASE}
    if client == "PooledClient":
        return proxy.cache(TIMEOUT, **options)
    return FileCache(mcpool.connect(proxy.server, timeout=TIMEOUT), **options)


@pytest.mark.parametrize("client", ["mcpool", "PooledClient"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("act", ["stop", "restart"])
def test_a_server_that_stops_or_restarts_before_any_command(
    start_memcached: Start, call: str, act: str, client: str
) -> None:
    server = start_memcached("-o", "hashpower=13")
    proxy = Proxy(server)

    def restart() -> None:
        server.kill()
        server.start()

    with (
        closing(proxy),
        connected(server, chunk_size=CHUNK) as direct,
    ):
        for moment in itertools.count(0, STEP):
            direct.set("file", OLD)
            with through(proxy, client) as cache:
                action = server.pause if act == "stop" else restart
                proxy.arm((moment, "act"), action=action)
                outcome = result(lambda: CALLS[call](cache))
                fired = proxy.fired
                proxy.disarm()
                server.resume()
            proxy.drain()  # what was sent to a stopped server is done when it goes on
            if not fired:
                break
            left = result(lambda: direct.get("file"))
            assert outcome in OUTCOMES[act, call]
            assert left in LEFT[act, call]
            assert (outcome, left) != ("done", OLD)
            infos = [] if left == "FileNotFound" else [direct.stat("file")]
            # Nobody knew whether what was sent to the stopped server would be done.
            stopped = act == "stop"
            audit(server, *infos, spare="" if stopped else "-", leased=stopped)
            counts[f"{act} before a command"] += 1
        assert moment > 0


def outcome(call: Callable[..., object], *arguments: object) -> object:
    return result(lambda: call(*arguments))


def test_servers_that_go_and_come_back(
    start_memcached: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By a private name: mcpool asks a server that did not answer again at once, where
    # it would wait for two seconds.
    monkeypatch.setattr(mcpool, "_DOWN", 0)
    servers = [start_memcached() for _ in range(3)]
    names = [f"file {number}" for number in range(60 if LONG else 9)]
    turns = 50 if LONG else 1
    pool = mcpool.connect([each.server for each in servers], timeout=TIMEOUT)
    with FileCache(pool, chunk_size=CHUNK) as cache:
        for turn, server in itertools.product(range(turns), servers):
            before = {name: f"{turn} before {name}".encode() * 20 for name in names}
            after = {name: f"{turn} after {name}".encode() * 30 for name in names}
            for name in names:
                cache.set(name, before[name])
            keys = server.keys()
            mine = {name for name in names if manifest(name) in keys}
            server.pause()  # away, and back with what it had
            for name in names:
                wanted = "CacheUnavailable" if name in mine else "done"
                assert outcome(cache.set, name, after[name]) == wanted
            server.resume()
            for name in names:
                old = [before[name]] if name in mine else []
                assert cache.get(name) in (*old, after[name])
            server.kill()
            for name in names:
                found = "CacheUnavailable" if name in mine else after[name]
                assert outcome(cache.get, name) == found
            server.start()  # with nothing
            for name in names:
                found = "FileNotFound" if name in mine else after[name]
                assert outcome(cache.get, name) == found
            counts["files on servers that go and come back"] += len(names)
