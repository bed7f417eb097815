"""The sections of the report: each yields the figures of a table, and its docstring
stands above it. A section leaves out what the machine lacks, and says so."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import pathlib
import random
import signal
import ssl
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheServerError

import mcpool
import memchunk
from bench import measure, peers
from bench.measure import KIB, MIB, Figure, Options, Task, compare, in_turn, memcached

API, FILE = "wsgi:application", "/files/bench"
SIZES = [KIB << power for power in (0, 4, 5, 6, 7, 8, 10, 12, 14)] + [50 * MIB]
VERBS = {"set": "`set`", "get": "`get`", "chunks": "`chunks()`"}
BARE_AIMS = {"set": "≤ 1.1", "chunks": "≤ 1.15", "get": "≤ 1.05"}
LEAST, MB = "empty app + bare socket", 1_000_000


def task(peer: Any, verb: str, data: bytes, calls: int = 1) -> Task:
    """One verb of one peer on one file, so many times."""
    arguments = ("file", data) if verb == "set" else ("file",)
    call = getattr(peer, verb)

    def run() -> object:
        for _ in range(calls):
            result = call(*arguments)
        return result

    return run


def compared(
    ready: Mapping[str, Any], suffix: str, size: int, rounds: int, aims: Any
) -> Iterator[Figure]:
    """The first of the peers beside the others, with files of one size."""
    data, calls = os.urandom(size), max(1, min(50, 2 * MIB // size))
    for peer in ready.values():
        peer.set("file", data)
    for verb in VERBS if size == SIZES[-1] else ("set", "get"):
        tasks = {label: task(peer, verb, data, calls) for label, peer in ready.items()}
        times, what = in_turn(tasks, rounds), VERBS[verb] + suffix
        yield from compare(what, times, aims(verb, size), size, calls)


def speed_aims(verb: str, size: int) -> dict[str, str]:
    """The aims for each peer: for smaller files only beside the same work by hand."""
    if size == SIZES[-1]:
        aims = dict.fromkeys(peers.PEERS, "< 1")
        return {**aims, peers.STOCK: "", peers.BARE: BARE_AIMS[verb]}
    aim = "≤ 1.5" if size <= 128 * KIB else "< 1"
    return {peers.HAND: "≤ 1.05" if size <= 32 * KIB else aim}


def speed(options: Options) -> Iterator[Figure]:
    """One client stores and reads one file of each size. The plot shows the same
    figures. `set` replaces the file, with all steps of a write. The bare socket moves
    the same items as memchunk, looks at the manifest, and computes a CRC-32 of each
    item. No client can do less. "By hand" means chunks of 1,000,000 bytes."""
    with peers.peers() as ready:
        for size in SIZES[1::4] if options.quick else SIZES:
            yield from compared(ready, " over TCP", size, options.rounds, speed_aims)


def tls(options: Options) -> Iterator[Figure]:
    """The same over TLS, to a memcached with -Z, compared with a bare TLS socket."""
    authority, size = importlib.import_module("trustme").CA(), SIZES[-1]
    context = ssl.create_default_context()
    authority.configure_trust(context)
    certificate = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    with contextlib.ExitStack() as stack:
        chain = stack.enter_context(certificate.tempfile())
        secured = memcached(f"-Z -o ssl_chain_cert={chain},ssl_key={chain}")
        address, bare = stack.enter_context(secured), "bare TLS socket + CRC"
        ours = peers.over_mcpool(address, context)
        ready = {peers.OURS: ours, bare: peers.BareSocket(address, context)}
        aims, rounds = {bare: "≤ 1.3"}, options.rounds
        yield from compared(ready, " over TLS", size, rounds, lambda *_: aims)


def frozen(options: Options) -> Iterator[Figure]:
    """gunicorn with four threads serves files of ten memcacheds. Eight clients ask for
    files of 16 KiB at random. Then SIGSTOP freezes one server. Only requests for files
    of the other nine count. This begins at once, when no call has timed out yet."""
    seconds, timeout = (3, "0.5") if options.quick else (20, "5")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(memcached("-m64")) for _ in range(10)]
        pool = mcpool.connect(servers)
        cache, names = memchunk.FileCache(pool), [f"file{each}" for each in range(200)]
        for name in names:
            cache.set(name, os.urandom(16 * KIB))
        keys = {name: peers.file_key("memchunk2", name) for name in names}
        lost = pool.servers[servers[0]]
        others = {name for name in names if pool.for_key(keys[name]) is not lost}
        listed = {"MEMCHUNK_SERVERS": ",".join(servers), "MEMCHUNK_TIMEOUT": timeout}
        site = stack.enter_context(measure.served("gunicorn, threads", API, **listed))
        healthy = loaded(site, names, others, seconds)
        os.kill(int(lost.stats()[b"pid"]), signal.SIGSTOP)
        stopped = loaded(site, names, others, seconds)
    rate = len(stopped) / len(healthy)
    slow, fast = statistics.median(stopped), statistics.median(healthy)
    yield Figure("rate of requests", "no frozen server", rate, aim="≥ 0.5")
    yield Figure("median time", "no frozen server", slow / fast, "x", "≤ 2", slow, fast)


def loaded(
    site: measure.Site, names: Sequence[str], counted: set[str], seconds: float
) -> list[float]:
    """How long requests for the counted files took, from eight clients at once."""
    taken: list[float] = []
    end = time.monotonic() + seconds

    def client() -> None:
        while (start := time.monotonic()) < end:
            name = random.choice(names)
            with contextlib.suppress(OSError):  # 503 from the frozen server
                site.ask("GET", f"/files/{name}")
                taken.extend([time.monotonic() - start] if name in counted else [])

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(client) for _ in range(8)]:
            done.result()
    return taken


def requests(data: bytes) -> dict[str, Callable[[measure.Site], object]]:
    """What is measured over HTTP; the first two on every host."""
    return {
        "PUT": lambda site: site.ask("PUT", FILE, data),
        "GET": lambda site: site.ask("GET", FILE),
        "form": lambda site: site.form(data),
        "tus, 4 MiB a request": lambda site: site.tus(data, 4 * MIB),
    }


def http(options: Options) -> Iterator[Figure]:
    """Each host has one process, and memcached is reached over TCP. The empty app only
    reads the body, or sends constant bytes, on the same host. The bare socket's time to
    memcached is added to its time. The page uploads by tus, 4 MiB a request."""
    data = os.urandom(options.size)
    with memcached() as address:
        bare = peers.BareSocket(address)
        bare.set("file", data)
        for host in measure.HOSTS:
            try:
                yield from on_host(host, address, bare, data, options.rounds)
            except measure.Missing as error:
                yield Figure(host, "", note=str(error))


def on_host(
    host: str, address: str, bare: peers.BareSocket, data: bytes, rounds: int
) -> Iterator[Figure]:
    idle = measure.served(host, "bench.peers:empty", BENCH_SIZE=str(len(data)))
    with measure.served(host, API, MEMCHUNK_SERVERS=address) as ours, idle as empty:
        chosen = list(requests(data).items())
        for what, request in chosen[: None if host == "gunicorn" else 2]:
            tasks: dict[str, Task] = {
                "ours": functools.partial(request, ours),
                "empty": functools.partial(request, empty),
                "bare": task(bare, "get" if what == "GET" else "set", data),
            }
            times = in_turn(tasks, rounds)
            least = [sum(pair) for pair in zip(times["empty"], times["bare"])]
            series, aim = {"": times["ours"], LEAST: least}, {LEAST: "≤ 1.25"}
            yield from compare(f"{what}, {host}", series, aim)


def memory(options: Options) -> Iterator[Figure]:
    """The peak beyond the memory of the same process when it was idle, after one small
    file. The library runs in a process of its own, and the HTTP API in gunicorn."""
    data, limit = os.urandom(options.size), options.size // MIB + 8
    with tempfile.TemporaryDirectory() as folder, memcached() as address:
        path = pathlib.Path(folder, "file")
        path.write_bytes(data)
        peers.over_mcpool(address).set("file", data)
        for what in LIBRARY:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                value = pool.apply(child, (what, address, path))
            aim = f"≤ {limit if 'get' in what else 8}"
            yield Figure(what, "idle process", value, "MiB", aim)
        for what, request in requests(data).items():
            # A fresh host for each: a process keeps some of what it has freed.
            with measure.served("gunicorn", API, MEMCHUNK_SERVERS=address) as site:
                site.ask("PUT", FILE, bytes(KIB))
                site.ask("GET", FILE)
                peers.over_mcpool(address).set("bench", data)
                value = measure.growth(site.pids(), functools.partial(request, site))
            aim = f"≤ {limit if what == 'GET' else 8}"
            yield Figure(f"{what}, gunicorn", "idle process", value, "MiB", aim)


LIBRARY: dict[str, Callable[[memchunk.FileCache, pathlib.Path], object]] = {
    "`set` from a file": lambda cache, path: cache.set("child", path),
    "`chunks()`": lambda cache, _: collections.deque(cache.open("file").chunks(), 0),
    "`get`": lambda cache, _: cache.get("file"),
}


def child(what: str, address: str, path: pathlib.Path) -> float:
    with memchunk.FileCache(mcpool.connect(address)) as cache:
        cache.set("small", bytes(KIB))
        cache.get("small")
        return measure.growth([os.getpid()], lambda: LIBRARY[what](cache, path))


def space(options: Options) -> Iterator[Figure]:
    """Bytes of memcached's memory for each byte of a file, by `stats slabs`. All slab
    chunks of the file count, with keys, headers and the manifest."""
    source, count = random.Random(1), 5 if options.quick else 40
    sizes = {f"{size} MB": [size * MB] for size in (1, 2, 5, 10, 20, 50)}
    worst = f"worst of {count} files of 5-50 MB"
    sizes[worst] = [source.randint(5 * MB, 50 * MB) for _ in range(count)]
    for what, drawn in sizes.items():
        ratio = max(taken(size) / size for size in drawn)
        yield Figure(
            what, "file bytes", ratio, "", "≤ 1.05" if drawn[0] >= 5 * MB else ""
        )


def taken(size: int) -> int:
    """Bytes of the slab chunks in use, of a memcached that has one file."""
    with memcached() as address, contextlib.closing(Client(address)) as client:
        peers.over_mcpool(address).set("file", bytes(size))
        stats = {key.decode(): int(n) for key, n in client.stats("slabs").items()}
        sizes = [key for key in stats if key.endswith(":chunk_size")]
        used = [stats[key.replace("chunk_size", "used_chunks")] for key in sizes]
        return sum(stats[key] * count for key, count in zip(sizes, used))


def eviction(options: Options) -> Iterator[Figure]:
    """Files of random sizes, in all five times the cache, are stored. Then all intact
    files take one share of -m, and the newest ones, up to the first that is not intact,
    another. The shares of memchunk are the worst of all seeds."""
    megabytes, seeds = (128, (1,)) if options.quick else (1024, (1, 2, 3))
    for low, high in ((0, 50), (5, 50)):
        press = functools.partial(pressed, megabytes, range(low * MB, high * MB + 1))
        ours = [press(seed, peers.over_mcpool) for seed in seeds]
        hand = press(seeds[0], peers.by_hand)
        for how, series, aim in (("memchunk", ours, "≥ 0.95"), ("by hand", [hand], "")):
            kept, run, refused = zip(*series)
            what, beside = f"{how}, {low}-{high} MB", f"-m {megabytes}"
            yield Figure(f"{what}: all intact files", beside, min(kept), "of -m", aim)
            yield Figure(f"{what}: newest intact files", beside, min(run), "of -m", aim)
            yield Figure(f"{what}: refused writes", beside, max(refused), "")


def pressed(
    megabytes: int, sizes: range, seed: int, connect: Callable[[str], Any]
) -> tuple[float, float, int]:
    """Shares of -m that intact files, and the newest of them, hold; writes refused."""
    source, pool = random.Random(seed), memoryview(os.urandom(sizes[-1]))
    total, written, refused = megabytes * MIB, 0, 0
    stored: list[tuple[str, int]] = []
    with memcached(f"-m {megabytes}") as address:
        peer = connect(address)
        while written < 5 * total:
            name, size = f"file{len(stored) + refused}", source.choice(sizes)
            written += size
            try:
                peer.set(name, pool[:size])
                stored.append((name, size))
            except (MemcacheServerError, memchunk.CacheFull):
                refused += 1
        found = [(size, intact(peer, name, size)) for name, size in reversed(stored)]
    kept = sum(size for size, whole in found if whole)
    run = sum(size for size, _ in itertools.takewhile(lambda each: each[1], found))
    return kept / total, run / total, refused


def intact(peer: Any, name: str, size: int) -> bool:
    with contextlib.suppress(KeyError, memchunk.MemchunkError):
        return bool(peer.chunks(name) == size)
    return False


def against(options: Options) -> Iterator[Figure]:
    """This memchunk.py, compared with another one. Both run on their own connections
    and on a stock PooledClient."""
    sizes = SIZES[1::4] if options.quick else SIZES
    with memcached() as address:
        versions = peers.versions(options.against, address)
        for (kind, pair), size in itertools.product(versions.items(), sizes):
            text = f" over TCP, {kind}"
            yield from compared(pair, text, size, options.rounds, lambda *_: NO_SLOWER)


NO_SLOWER = {"before": "≤ 1.05"}
ALL = ("speed", "tls", "frozen", "http", "memory", "space", "eviction")
