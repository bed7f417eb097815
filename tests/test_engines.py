"""Every verb of the library on every engine of tests/engines.py; what happens when a
server of several freezes, dies, or restarts."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import http.client
import io
import itertools
import os
import pathlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import mcpool
import memchunk
from memchunk import FileCache
from tests.engines import ENGINES, Engine, Lab, behind_twemproxy, options_of
from tests.support import MIB, Host, Memcached, running, wait_for

SIZES = {"small": 1000, "chunks": 3 * MIB + 1, "20 MB": 20_000_000}
BYTES = os.urandom(20_000_000)
GUNICORN = "{python} -m gunicorn --threads 8 -b 127.0.0.1:{port} wsgi:application"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("e"))
    yield lab
    lab.close()


@pytest.fixture
def own_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Of one test, whose processes end with it."""
    lab = Lab(tmp_path_factory.mktemp("e"))
    yield lab
    lab.close()


# --- The contract, on each engine -----------------------------------------------------


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    lab = Lab(tmp_path_factory.mktemp("e"))
    yield ENGINES[request.param](lab)
    lab.close()


@pytest.fixture(scope="module")
def cache(engine: Engine) -> Iterator[FileCache]:
    with FileCache(engine.client()) as cache:
        yield cache


@pytest.fixture
def name(cache: FileCache, engine: Engine) -> Iterator[str]:
    """A new name, on a server that answers. The file is deleted in the end."""
    name = next(each for each in names() if server_of(cache, each) != engine.frozen)
    yield name
    with contextlib.suppress(memchunk.FileNotFound):
        cache.delete(name)


@pytest.fixture(params=SIZES)
def data(request: pytest.FixtureRequest) -> bytes:
    return BYTES[: SIZES[request.param]]


def names() -> Iterator[str]:
    return (f"file {random.random()}" for _ in itertools.count())


def server_of(cache: FileCache, name: str) -> str:
    server: str = cache._entry(name).client.server
    return server


def test_add_stores_a_file_once(cache: FileCache, name: str, data: bytes) -> None:
    info = cache.add(name, data, metadata=b"m")
    assert cache.get(name) == data
    with pytest.raises(memchunk.FileExists) as caught:
        cache.add(name, b"other")
    assert caught.value.info == info == cache.stat(name)
    assert (info.size, info.metadata) == (len(data), b"m")


def test_set_replaces_a_file(cache: FileCache, name: str, data: bytes) -> None:
    cache.set(name, bytes(MIB))
    cache.set(name, iter([data[:7], data[7:]]))
    assert cache.get(name) == data
    cache.set(name, b"small")
    assert cache.get(name) == b"small"


def test_cas_replaces_one_version(cache: FileCache, name: str, data: bytes) -> None:
    with pytest.raises(memchunk.FileNotFound):
        cache.cas(name, data, "0" * 16)
    old = cache.set(name, b"old").version
    new = cache.cas(name, data, old).version
    with pytest.raises(memchunk.FileChanged) as caught:
        cache.cas(name, b"late", old)
    assert (caught.value.current, cache.get(name)) == (new, data)


def test_get_or_set_makes_a_file_once(cache: FileCache, name: str, data: bytes) -> None:
    calls = []

    def make() -> bytes:
        calls.append(1)
        return data

    assert [cache.get_or_set(name, make) for _ in range(3)] == 3 * [data]
    assert (len(calls), cache.get(name)) == (1, data)


def test_open_reads_any_part(cache: FileCache, name: str, data: bytes) -> None:
    cache.set(name, data)
    with cache.open(name) as file:
        assert b"".join(file.chunks()) == data
        start, stop = len(data) // 2, len(data) // 2 + 9
        assert b"".join(file.chunks(start, stop)) == data[start:stop]
        file.seek(-100, os.SEEK_END)
        assert (file.read(40), file.read()) == (data[-100:-60], data[-60:])


def test_touch_gives_a_file_a_new_end(cache: FileCache, name: str, data: bytes) -> None:
    cache.set(name, data, expire=1000)
    assert cache.touch(name, 0).expires is None
    assert cache.touch(name, 1) == cache.stat(name)
    wait_for(lambda: name not in cache, "the file to expire")


def test_delete_and_in(cache: FileCache, name: str, data: bytes) -> None:
    assert name not in cache
    version = cache.set(name, data).version
    assert name in cache
    with pytest.raises(memchunk.FileChanged):
        cache.delete(name, "0" * 16)
    cache.delete(name, version)
    assert name not in cache
    for ask in (cache.get, cache.stat, cache.delete):
        with pytest.raises(memchunk.FileNotFound):
            ask(name)


def test_parts_are_staged_and_published(
    cache: FileCache, name: str, data: bytes
) -> None:
    parts: list[str] = []
    rest = b""
    stream = io.BytesIO(data)
    while piece := stream.read(7_000_000):
        rest += piece
        part, taken = cache.stage(name, rest, parts=parts)
        parts, rest = [*parts, part], rest[taken:]
    cache.add(name, rest, parts=parts)
    cache.unstage(name, parts)  # deletes nothing of the published file
    assert cache.get(name) == data


def test_unstaged_parts_are_gone(cache: FileCache, name: str) -> None:
    part, taken = cache.stage(name, BYTES[:MIB])
    cache.unstage(name, [part])
    with pytest.raises(memchunk.FileEvicted):
        cache.stage(name, b"", parts=[part])
    assert taken > 0


def test_ping_asks_every_server(cache: FileCache, engine: Engine) -> None:
    if not engine.frozen:
        cache.ping()
        return
    with pytest.raises(memchunk.CacheUnavailable, match=engine.frozen):
        cache.ping()


def test_a_file_on_the_frozen_server_is_no_miss(own_lab: Lab) -> None:
    """Its first call waits for the time-out, and the next fail at once."""
    engine = ENGINES["ten servers"](own_lab)
    with FileCache(mcpool.connect(engine.server, timeout=1)) as cache:
        name = next(each for each in names() if server_of(cache, each) == engine.frozen)
        for ask in (cache.get, cache.stat, cache.delete, cache.__contains__):
            with pytest.raises(memchunk.CacheUnavailable, match=engine.frozen):
                ask(name)


# --- Bounds ---------------------------------------------------------------------------


def test_forty_threads_share_the_connections_of_a_server_with_few(lab: Lab) -> None:
    # The descriptors of more than one thread would leave newer servers none to start.
    memcached = lab.memcached("-m", "256", "-c", "24", "-t", "1")

    def work(number: int) -> bool:
        data, name = BYTES[number:1_500_000], f"{number}"
        for _ in range(5):
            shared.set(name, data)
            if shared.get(name) != data:
                return False
        return True

    with (
        FileCache(mcpool.connect(memcached.server)) as shared,
        concurrent.futures.ThreadPoolExecutor(40) as threads,
    ):
        assert all(threads.map(work, range(40)))


def test_small_items_behind_a_proxy_need_a_chunk_size(lab: Lab) -> None:
    """The proxy hides what its servers would tell."""
    options = options_of("-I 128k -o slab_chunk_max=128")
    address = lab.twemproxy([lab.memcached(*options) for _ in range(3)], "{}")
    with FileCache(mcpool.connect(address)) as guessing:
        with pytest.raises(memchunk.CacheFull) as caught:
            guessing.set("file", BYTES)
        assert caught.value.cause == "item size"
    with FileCache(mcpool.connect(address), chunk_size=65_536) as told:
        told.set("file", BYTES)
        assert told.get("file") == BYTES


def test_healthz_answers_while_memcached_is_stopped(
    lab: Lab, tmp_path: pathlib.Path
) -> None:
    memcached, done = lab.memcached(), threading.Event()
    with running(Host(GUNICORN), memcached, tmp_path) as server:
        assert server.request("PUT", "/files/a", b"a").status == 201
        statuses: collections.Counter[int] = collections.Counter()

        def ask() -> None:
            while not done.is_set():
                statuses[server.request("GET", "/files/a").status] += 1

        with concurrent.futures.ThreadPoolExecutor(64) as threads:
            memcached.pause()
            clients = [threads.submit(ask) for _ in range(64)]
            try:
                wait_for(lambda: statuses[503], "an answer without memcached")
                for _ in range(5):
                    assert healthz(server.port) == 200
            finally:
                memcached.resume()
                done.set()
        assert [client.result() for client in clients] == 64 * [None]


def healthz(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", "/healthz")
        return connection.getresponse().status


# --- Lost and restarted servers -------------------------------------------------------


def test_a_dead_server_behind_twemproxy_with_tags_costs_its_own_files(
    own_lab: Lab,
) -> None:
    memcacheds = own_lab.memcacheds(3, "512")
    with FileCache(mcpool.connect(own_lab.twemproxy(memcacheds, "{}"))) as cache:
        stored = [f"file {number}" for number in range(20)]
        for name in stored:
            cache.set(name, BYTES)
        lost = set(memcacheds[0].keys())
        memcacheds[0].kill()
        kept = [each for each in stored if cache._entry(each).key not in lost]
        assert len(kept) >= 12  # 60 %
        for name in stored:
            if name in kept:
                assert cache.get(name) == BYTES
            else:
                with pytest.raises(memchunk.CacheUnavailable):
                    cache.get(name)


class Verified:
    """Threads that write files and read those of others. `floor` has the least number
    that a read of a file may give: it was stored, or read, before."""

    def __init__(self, cache: FileCache, count: int = 8) -> None:
        self.cache, self.floor = cache, count * [0]
        self.seen: collections.Counter[str] = collections.Counter()
        self.done, self.lock = threading.Event(), threading.Lock()

    def work(self, own: int) -> None:
        for number in itertools.count(1):
            if self.done.is_set():
                return
            with self.counted("not written"):
                self.cache.set(f"file {own}", body(own, number))
                self.reached(own, number, "written")
            other = random.randrange(len(self.floor))
            least = self.floor[other]
            with self.counted("not read"):
                data = self.cache.get(f"file {other}")
                found = int(data[:20])
                self.seen["wrong"] += data != body(other, found)
                self.seen["stale"] += found < least
                self.reached(other, found, "read")

    def wait_for_reads(self, count: int) -> None:
        enough = self.seen["read"] + count
        wait_for(lambda: self.seen["read"] >= enough, "verified reads")

    @contextlib.contextmanager
    def counted(self, what: str) -> Iterator[None]:
        errors = memchunk.CacheMiss, memchunk.CacheFull, memchunk.FileChanged
        try:
            yield
        except (*errors, memchunk.CacheUnavailable):
            self.seen[what] += 1

    def reached(self, file: int, number: int, what: str) -> None:
        with self.lock:
            self.floor[file] = max(self.floor[file], number)
            self.seen[what] += 1


def body(file: int, number: int) -> bytes:
    """Up to 2 MB, each of whose chunks tells file and number."""
    line = b"%020d %020d\n" % (number, file)
    return line * random.Random(number).randrange(1, 50_000)


RESTARTED: dict[str, Any] = {
    "twemproxy with tags": lambda lab: behind_twemproxy(lab, "{}"),
    "twemproxy": behind_twemproxy,
    "three servers": lambda lab: several(lab.memcacheds(3)),
}
if "proxy" in ENGINES:
    RESTARTED["proxy with tags"] = ENGINES["proxy with tags"]


def several(memcacheds: list[Memcached]) -> Engine:
    return Engine([each.server for each in memcacheds], memcacheds)


@pytest.mark.parametrize("kind", RESTARTED)
def test_rolling_restarts_bring_nothing_wrong_or_old(own_lab: Lab, kind: str) -> None:
    engine = RESTARTED[kind](own_lab)
    with FileCache(engine.client()) as cache:
        run = Verified(cache)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            works = [threads.submit(run.work, number) for number in range(8)]
            try:
                for memcached in 3 * engine.memcacheds:
                    run.wait_for_reads(30)
                    memcached.kill()
                    memcached.start()
            finally:
                run.done.set()
        assert [work.result() for work in works] == 8 * [None]
    print(kind, dict(run.seen))
    assert (run.seen["wrong"], run.seen["stale"]) == (0, 0)
