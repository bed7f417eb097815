"""What is measured: each section yields the figures of a table, its docstring stands above that.

A section leaves out what the machine lacks, and says so."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import pathlib
import random
import ssl
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheServerError

import memchunk
from bench.measure import (
    HOSTS,
    KIB,
    MB,
    MIB,
    ROOT,
    Figure,
    Missing,
    Options,
    Site,
    Task,
    compare,
    growth,
    in_turn,
    memcached,
    served,
)
from bench.peers import PEERS, BareSocket, ByHand, Memchunk, optional, other_version, peers

API = "wsgi:application"
TRANSPORTS = ("TCP", "Unix socket")
VERBS = {"set": "`set` from bytes", "chunks": "`chunks()` drained", "get": "`get` to bytes"}
BARE_AIMS = {"set": "≤ 1.3", "chunks": "≤ 1.2", "get": "≤ 1.3"}


def calls(peer: Any, verb: str, data: bytes, times: int = 1) -> Task:
    """A task: one verb of one peer on one file, so many times."""
    arguments = ("file", data) if verb == "set" else ("file",)

    def task() -> None:
        for _ in range(times):
            getattr(peer, verb)(*arguments)

    return task


def speed(options: Options) -> Iterator[Figure]:
    """One file, one client. `set` has all steps of a write in it. The bare socket sends and
    receives items of the same sizes, with a CRC-32 over each: the least that any client can do."""
    data = os.urandom(options.size)
    for transport in TRANSPORTS:
        with peers(unix=transport != "TCP") as (ready, reasons):
            yield from (Figure(transport, label, note=note) for label, note in reasons.items())
            for peer in ready.values():
                peer.set("file", data)
            for verb, what in VERBS.items():
                tasks = {label: calls(peer, verb, data) for label, peer in ready.items()}
                aims = {**dict.fromkeys(PEERS, "≤ 1"), "bare socket": BARE_AIMS[verb]}
                yield from compare(f"{what}, {transport}", in_turn(tasks, options.rounds), aims)


def throughput(options: Options) -> Iterator[Figure]:
    """One client over TCP, MiB/s against the size of the file."""
    with peers(unix=False) as (ready, _):
        sizes = [KIB * 4**power for power in range(8)] + [50 * MIB]
        for size in [each for each in sizes if each <= options.size]:
            data, times = os.urandom(size), max(1, min(50, 2 * MIB // size))
            for peer in ready.values():
                peer.set("file", data)
            for verb in ("set", "get"):
                tasks = {label: calls(peer, verb, data, times) for label, peer in ready.items()}
                for label, taken in in_turn(tasks, -(-options.rounds // 3)).items():
                    rate = size * times / statistics.median(taken) / MIB
                    yield Figure(verb, label, rate, "MiB/s", size=size)


def tls(options: Options) -> Iterator[Figure]:
    """The same over TLS, to a memcached with -Z."""
    authority, data = optional("trustme").CA(), os.urandom(options.size)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    certificate = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    with certificate.tempfile() as chain, contextlib.ExitStack() as stack:
        plain = stack.enter_context(memcached())
        secured = ("-Z", "-o", f"ssl_chain_cert={chain},ssl_key={chain}")
        over_tls = stack.enter_context(memcached(*secured))
        caches = {"TLS": Memchunk(over_tls, tls=context), "plain TCP": Memchunk(plain)}
        for verb, what in VERBS.items():
            tasks = {label: calls(cache, verb, data) for label, cache in caches.items()}
            yield from compare(what, in_turn(tasks, options.rounds), {})


def resume(options: Options) -> Iterator[Figure]:
    """The last step of an upload that was resumed, `resume(state)` and `close()`, beside the last
    two steps of a `set`, the `close()` of a writer that has sent its chunks already."""
    with memcached() as address, memchunk.connect(address) as cache:
        states: dict[str, Any] = {}

        def write() -> None:
            for name in ("resumed", "set"):
                with contextlib.suppress(memchunk.CacheMiss):
                    cache.delete(name)
                states[name] = writer = cache.create(name)
                whole = options.size - options.size % writer.batch_size
                writer.write(bytes(whole))  # so that nothing is left to be sent
            states["resumed"] = states["resumed"].suspend()

        tasks: dict[str, Task] = {
            "resumed": lambda: cache.resume(states.pop("resumed")).close(),
            "last two steps of `set`": lambda: states.pop("set").close(),
        }
        times = in_turn(tasks, options.rounds, write)
        yield from compare("last step of a resumed upload", times, {})


def requests(data: bytes) -> dict[str, Callable[[Site], None]]:
    """What is measured over HTTP; the first two on every host."""
    return {
        "PUT": lambda site: site.put(data),
        "GET": lambda site: site.get(),
        "form": lambda site: site.form(data),
        "tus, 4 MiB a request": lambda site: site.tus(data, 4 * MIB),
        "tus, 8 MiB a request": lambda site: site.tus(data, 8 * MIB),
    }


def http(options: Options) -> Iterator[Figure]:
    """Over TCP, with one process, beside the same host with an application that only reads the
    body, or sends constant bytes, plus the bare socket's time to memcached. The page uploads by
    tus, 4 MiB a request."""
    data = os.urandom(options.size)
    with memcached() as address:
        bare = BareSocket(address)
        for host in HOSTS:
            try:
                with sites(host, address, len(data)) as (ours, empty):
                    chosen = list(requests(data).items())[: None if host == "gunicorn" else 2]
                    for what, request in chosen:
                        tasks: dict[str, Task] = {
                            "memchunk": functools.partial(request, ours),
                            "empty": functools.partial(request, empty),
                            "bare": calls(bare, "get" if what == "GET" else "set", data),
                        }
                        yield beside_empty(f"{what}, {host}", in_turn(tasks, options.rounds))
            except Missing as error:
                yield Figure(host, "", note=str(error))


@contextlib.contextmanager
def sites(host: str, address: str, size: int) -> Iterator[tuple[Site, Site]]:
    """Our API and the application that does nothing."""
    ours = served(host, API, MEMCHUNK_SERVERS=address)
    with ours as first, served(host, "bench.peers:empty", BENCH_SIZE=str(size)) as second:
        yield first, second


def beside_empty(what: str, times: Mapping[str, Sequence[float]]) -> Figure:
    least = [sum(pair) for pair in zip(times["empty"], times["bare"])]
    beside = "empty app + bare socket"
    (figure,) = compare(what, {"": times["memchunk"], beside: least}, {beside: "≤ 1.25"})
    return figure


def memory(options: Options) -> Iterator[Figure]:
    """The peak beyond what the same process held idle, after one small file: of a process of its
    own for the library, of gunicorn's for HTTP."""
    data, limit = os.urandom(options.size), options.size // MIB + 8
    with tempfile.TemporaryDirectory() as folder, memcached() as address:
        path = pathlib.Path(folder, "file")
        path.write_bytes(data)
        Memchunk(address).set("file", data)
        for what in LIBRARY:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                value = pool.apply(child, (what, address, path))
            aim = f"≤ {limit if 'get' in what else 8}"
            yield Figure(what, "idle process", value, "MiB", aim)
        for what, request in requests(data).items():
            # A fresh host for each: what a process has freed may still be its own, and idle.
            with served("gunicorn", API, MEMCHUNK_SERVERS=address) as site:
                site.put(bytes(KIB))
                site.get()
                Memchunk(address).set("bench", data)
                value = growth(site.pids(), functools.partial(request, site))
            aim = f"≤ {limit if what == 'GET' else 8}"
            yield Figure(f"{what}, gunicorn", "idle process", value, "MiB", aim)


LIBRARY: dict[str, Callable[[memchunk.FileCache, pathlib.Path], object]] = {
    "`set` from a file": lambda cache, path: cache.set("child", path),
    "`chunks()` drained": lambda cache, _: collections.deque(cache.open("file").chunks(), 0),
    "`get` to bytes": lambda cache, _: cache.get("file"),
}


def child(what: str, address: str, path: pathlib.Path) -> float:
    with memchunk.connect(address) as cache:
        cache.set("small", bytes(KIB))
        cache.get("small")
        return growth([os.getpid()], lambda: LIBRARY[what](cache, path))


def space(options: Options) -> Iterator[Figure]:
    """Bytes of memcached's memory per byte of a file: all slab chunks that it takes, as `stats
    slabs` counts them, with keys, headers, the manifest, and what is left empty in each."""
    source, count = random.Random(options.seeds[0]), 5 if options.quick else 40
    sizes = {f"{size} MB": [size * MB] for size in (1, 2, 5, 10, 20, 50)}
    worst = f"worst of {count} of 5-50 MB"
    sizes[worst] = [source.randint(5 * MB, 50 * MB) for _ in range(count)]
    for (what, drawn), (how, store) in itertools.product(sizes.items(), STORES.items()):
        ratio = max(taken(store, size) / size for size in drawn)
        aim = "≤ 1.02" if "memchunk" in how and drawn[0] >= 5 * MB else ""
        yield Figure(f"{what}, {how}", "file bytes", ratio, "bytes", aim)


STORES: dict[str, Callable[[str, bytes], object]] = {
    "memchunk": lambda address, data: Memchunk(address).set("file", data),
    "memchunk, size unknown": lambda address, data: Memchunk(address).set("file", iter([data])),
    "1,000,000-byte chunks": lambda address, data: ByHand(address).set("file", data),
}


def taken(store: Callable[[str, bytes], object], size: int) -> int:
    with memcached(unix=True) as address:
        before = slab_bytes(address)
        store(address, bytes(size))
        return slab_bytes(address) - before


def slab_bytes(address: str) -> int:
    """Of all slab chunks in use."""
    with contextlib.closing(Client(address)) as client:
        stats = {key.decode(): value for key, value in client.stats("slabs").items()}
    return sum(
        int(stats[key]) * int(stats[key.replace("chunk_size", "used_chunks")])
        for key in stats
        if key.endswith(":chunk_size")
    )


def eviction(options: Options) -> Iterator[Figure]:
    """Files of random sizes, in all five times the cache. Then the shares of -m that hold intact
    files, and the newest files up to the first that is not intact. memchunk: the worst of all
    seeds."""
    megabytes = 128 if options.quick else 1024
    for low, high in ((0, 50), (5, 50)):
        ours = [pressed(Memchunk, megabytes, low, high, seed) for seed in options.seeds]
        hand = pressed(ByHand, megabytes, low, high, options.seeds[0])
        for how, series, aim in (("memchunk", ours, "≥ 0.95"), ("by hand", [hand], "")):
            kept, run, refused = zip(*series)
            what, beside = f"{how}, {low}-{high} MB", f"-m {megabytes}"
            yield Figure(f"{what}: all intact files", beside, min(kept), "of -m", aim)
            yield Figure(f"{what}: newest intact files", beside, min(run), "of -m", aim)
            yield Figure(f"{what}: refused writes", beside, max(refused), "writes")


def pressed(
    connect: Callable[[str], Any], megabytes: int, low: int, high: int, seed: int
) -> tuple[float, float, int]:
    """Shares of -m that intact files hold, and the newest ones of them; writes refused."""
    source, pool = random.Random(seed), memoryview(os.urandom(high * MB))
    total, written, refused = megabytes * MIB, 0, 0
    stored: list[tuple[str, int]] = []
    with memcached("-m", str(megabytes), unix=True) as address:
        peer = connect(address)
        while written < 5 * total:
            name, size = f"file{len(stored) + refused}", source.randint(low * MB, high * MB)
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
    """This memchunk.py beside another one and, where a wsgi.py lies beside that, over HTTP."""
    aims, module = {"before": "≤ 1.05"}, other_version(options.against)
    for transport in TRANSPORTS:
        with memcached(unix=transport != "TCP") as address:
            before = Memchunk(address, module, namespace="before")
            versions = {"now": Memchunk(address), "before": before}
            for size, times in ((options.size, 1), (MIB, 10), (KIB, 200)):
                for verb, what in VERBS.items():
                    data, text = os.urandom(size), f"{what}, {size // KIB:,} KiB, {transport}"
                    tasks = {who: calls(each, verb, data, times) for who, each in versions.items()}
                    yield from compare(text, in_turn(tasks, options.rounds), aims)
    if options.against.with_name("wsgi.py").exists():
        yield from against_http(options, aims)


def against_http(options: Options, aims: Mapping[str, str]) -> Iterator[Figure]:
    folders = {"now": ROOT, "before": options.against.parent.resolve()}
    with memcached() as address, contextlib.ExitStack() as stack:
        environ = {"MEMCHUNK_SERVERS": address}
        versions = {
            who: stack.enter_context(served("gunicorn", API, folder, **environ))
            for who, folder in folders.items()
        }
        for what, request in requests(os.urandom(options.size)).items():
            tasks = {who: functools.partial(request, each) for who, each in versions.items()}
            yield from compare(f"{what}, gunicorn", in_turn(tasks, options.rounds), aims)


ALL = ("speed", "throughput", "tls", "resume", "http", "memory", "space", "eviction")
