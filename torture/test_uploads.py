"""Uploads under pressure: workers that die, and others that go on, publish, stage,
unstage, replace or delete, at any command; many at one place; a cache that can hardly
hold the file; tiny pieces.

Whoever is told that a file is published gets it whole. Whoever is told that parts are
stored can publish them, or is told that they are gone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import pytest
from pymemcache.client.base import PooledClient

from memchunk import FileCache, FileInfo
from tests.faults import Faulty, Wrapped
from tests.support import MIB, Memcached, opened, wait_for
from torture.tools import (
    CHUNK,
    LEASE,
    LONG,
    audit,
    connected,
    counts,
    result,
    segment_of,
)

TURNS = 20 if LONG else 1
STRIDE = 1 if LONG else 2  # between the commands that a worker dies at
EXPIRE = 5000
DATA = random.Random(1).randbytes(16 * CHUNK + 50)
OTHER = DATA[: 8 * CHUNK] + random.Random(2).randbytes(9 * CHUNK + 20)
PIECES = (430, 170, 20, 580, 450)  # bytes


class Died(BaseException):
    """What kills a worker: nothing that it would do afterwards is done."""


class Upload:
    """What a server remembers of an upload: its parts, and less than a chunk."""

    def __init__(self, name: str = "file") -> None:
        self.name = name
        self.parts: list[str] = []
        self.rest = b""
        self.length = 0  # bytes that count

    def add(self, cache: FileCache, piece: bytes) -> None:
        data = self.rest + piece
        part, taken = cache.stage(self.name, data, parts=self.parts, lease=LEASE)
        self.parts = [*self.parts, part]
        self.rest, self.length = data[taken:], self.length + len(piece)

    def go_on(self, cache: FileCache, data: bytes) -> None:
        """Store what does not count yet, piece by piece."""
        sizes = itertools.cycle(PIECES)
        while self.length < len(data):
            self.add(cache, data[slice(self.length, self.length + next(sizes))])

    def finish(self, cache: FileCache, verb: str = "add") -> FileInfo:
        write: Callable[..., FileInfo] = getattr(cache, verb)
        return write(self.name, self.rest, parts=self.parts, expire=EXPIRE)

    def copy(self) -> Upload:
        other = Upload(self.name)
        other.parts, other.rest, other.length = self.parts, self.rest, self.length
        return other


def staged(cache: FileCache, data: bytes, length: int) -> Upload:
    """An upload of which so many bytes are stored."""
    upload = Upload()
    upload.go_on(cache, data[:length])
    return upload


@pytest.fixture
def cache(server: Memcached) -> Iterator[FileCache]:
    server.flush()
    with connected(server, chunk_size=CHUNK, lease=LEASE) as cache:
        yield cache


def worker(server: Memcached, life: int) -> FileCache:
    """A cache whose client dies before its command number `life`."""
    left = itertools.count(life, -1)

    def live(command: str) -> None:
        if next(left) <= 0:
            raise Died

    client = Wrapped(PooledClient(server.server, timeout=10), before=live)
    opened.append(FileCache(client, chunk_size=CHUNK, lease=LEASE))
    return opened[-1]


def lives(run: Callable[[int], bool]) -> int:
    """Run with a longer and longer life, until one is long enough; return it."""
    for life in itertools.count(0, STRIDE):
        if run(life):
            return life
    raise AssertionError


@pytest.mark.parametrize("verb", ["add", "set"])
def test_a_worker_dies_between_any_two_commands(
    server: Memcached, cache: FileCache, verb: str
) -> None:
    """Another goes on with what counts, and publishes."""

    def run(life: int) -> bool:
        server.flush()
        upload, died = Upload(), True
        with contextlib.suppress(Died):
            mortal = worker(server, life)
            upload.go_on(mortal, DATA)
            upload.finish(mortal, verb)
            died = False
        if died and result(lambda: cache.stat("file")) == "FileNotFound":
            upload.go_on(cache, DATA)
            upload.finish(cache, verb)
        assert cache.get("file") == DATA
        # All that the dead have left has an end, and is no part of the file.
        assert all(end > 0 for end in server.expiries().values())
        info, parts = cache.stat("file"), tuple(upload.parts)
        # A worker that died after it touched its chunks leaves them with their end.
        audit(server, info, parts=parts, spare="")
        counts["uploads whose worker died, and that went on"] += died
        return not died

    assert lives(run) > 50


def test_an_upload_is_deleted_after_its_worker_died(
    server: Memcached, cache: FileCache
) -> None:
    """At any command: nothing is left but what the dead one stored last, on a lease."""

    def run(life: int) -> bool:
        server.flush()
        upload, died = Upload(), True
        with contextlib.suppress(Died):
            upload.go_on(worker(server, life), DATA)
            died = False
        cache.unstage("file", upload.parts)
        audit(server)
        assert len(set(map(segment_of, chunks_of(server)))) <= 1
        counts["uploads whose worker died, deleted"] += died
        return not died

    assert lives(run) > 30


class Rival(NamedTuple):
    """What another does meanwhile, with the same parts; and the files that may be left
    if the first publishes by `add` or by `set`: mine, the other one, or none."""

    act: Callable[[FileCache, Upload], object]
    left_by_add: tuple[str, ...]
    left_by_set: tuple[str, ...]


def stage_more(cache: FileCache, upload: Upload) -> None:
    """Go on at the same place, and give up."""
    before = upload.parts
    upload.add(cache, bytes(3 * CHUNK))
    assert upload.parts[:-1] == before
    cache.unstage("file", upload.parts[-1:])


def publish(verb: str, cache: FileCache, upload: Upload) -> FileInfo:
    upload.go_on(cache, OTHER)
    try:
        return upload.finish(cache, verb)
    except Exception:
        cache.unstage("file", upload.parts[-1:])
        raise


RIVALS = {
    "stage": Rival(stage_more, ("mine",), ("mine",)),
    "add": Rival(functools.partial(publish, "add"), ("mine", "other"), ("mine",)),
    "set": Rival(functools.partial(publish, "set"), ("other",), ("mine", "other")),
    "delete": Rival(
        lambda cache, upload: cache.delete("file"), ("mine", "none"), ("mine", "none")
    ),
    "replace": Rival(
        lambda cache, upload: cache.set("file", b"whole" * 50),
        ("mine", "whole"),
        ("mine", "whole"),
    ),
    "touch": Rival(
        lambda cache, upload: cache.touch("file", EXPIRE), ("mine",), ("mine",)
    ),
}
CONTENTS = {
    "mine": DATA,
    "other": OTHER,
    "whole": b"whole" * 50,
    "none": "FileNotFound",
}


@pytest.mark.parametrize("verb", ["add", "set"])
@pytest.mark.parametrize("name", RIVALS)
def test_another_comes_first_at_any_command_of_a_publication(
    server: Memcached, cache: FileCache, name: str, verb: str
) -> None:
    """Whole, and whose it should be; and no chunk is left that is not its own."""
    rival, site = RIVALS[name], Faulty(server)
    opened.append(site.cache(chunk_size=CHUNK, lease=LEASE))
    for moment in itertools.count():
        server.flush()
        upload = staged(cache, DATA, 8 * CHUNK)
        mine, other = upload.copy(), upload.copy()
        seen: list[object] = []
        mine.go_on(cache, DATA)
        site.arm((moment, "act"), action=strike(rival, cache, other, seen))
        outcome = result(lambda: mine.finish(opened[-1], verb))  # noqa: B023
        site.disarm()
        if not seen:
            break
        data = result(lambda: cache.get("file"))
        left = rival.left_by_add if verb == "add" else rival.left_by_set
        assert data in [CONTENTS[each] for each in left]
        assert outcome in ("done", "FileExists", "CacheFull")
        # CacheFull only if the parts went with the file of the other one.
        assert outcome != "CacheFull" or name in ("set", "replace", "delete")
        assert "done" in (outcome, *seen)
        check(server, cache, upload, mine, other)
        counts[f"{name} at a command of a publication"] += 1
    assert moment > 5


def strike(
    rival: Rival, cache: FileCache, upload: Upload, seen: list[object]
) -> Callable[[], object]:
    return lambda: seen.append(result(lambda: rival.act(cache, upload)))


def chunks_of(server: Memcached) -> list[str]:
    return [key for key in server.expiries() if segment_of(key)]


def check(server: Memcached, cache: FileCache, *uploads: Upload) -> None:
    """The parts that are published outlive the file. All others can be unstaged, and
    then nothing is left."""
    present = (
        cache.stat("file") if result(lambda: cache.stat("file")) == "done" else None
    )
    ends = server.expiries()
    parts = {part for upload in uploads for part in upload.parts}
    if present:
        data = cache.get("file")
        cache.unstage("file", sorted(parts))
        assert cache.get("file") == data
        # A delete without a reply may still be on its way.
        wait_for(lambda: len(chunks_of(server)) == present.chunks, "deletes")
        chunks = chunks_of(server)
        least = present.expires or max(ends.values())
        assert all(ends[key] >= least or ends[key] < 0 for key in chunks)
        cache.delete("file")
    else:
        cache.unstage("file", sorted(parts))
    wait_for(lambda: chunks_of(server) == [], "deletes")


@pytest.mark.parametrize("rival", ["unstage", "stage", "set", "delete"])
def test_another_comes_first_at_any_command_of_unstage(
    server: Memcached, cache: FileCache, rival: str
) -> None:
    """Of parts that are published, or not: a file stays whole, and all else goes."""
    rivals: dict[str, Callable[[FileCache, Upload], object]] = {
        "unstage": lambda cache, upload: cache.unstage("file", upload.parts),
        "stage": stage_more,
        "set": lambda cache, upload: cache.set("file", b"whole" * 50),
        "delete": lambda cache, upload: cache.delete("file"),
    }
    site = Faulty(server)
    opened.append(site.cache(chunk_size=CHUNK, lease=LEASE))
    moments = unseen = 0
    for moment, is_published in itertools.product(range(40), [True, False]):
        if unseen == 2:  # published or not, it has no such command any more
            break
        server.flush()
        upload = staged(cache, DATA, len(DATA))
        if is_published:
            upload.finish(cache)
        acts, seen = Rival(rivals[rival], (), ()), list[object]()
        action = strike(acts, cache, upload.copy(), seen)
        site.arm((moment, "act"), action=action)
        opened[-1].unstage("file", upload.parts)
        site.disarm()
        moments += len(seen)
        unseen = 0 if seen else unseen + 1
        data = result(lambda: cache.get("file"))
        replaced = {"set": b"whole" * 50, "delete": "FileNotFound"}.get(rival, DATA)
        missing = replaced if rival == "set" and seen else "FileNotFound"
        assert data == ((replaced if seen else DATA) if is_published else missing)
        check(server, cache)
    counts["others at a command of unstage"] += moments
    assert moments > 10


def test_many_go_on_at_one_place(server: Memcached, cache: FileCache) -> None:
    """Each a worker of its own: one publishes, and its bytes, whatever the order."""
    workers = [
        connected(server, chunk_size=CHUNK, lease=LEASE)
        if number % 2
        else FileCache(server.server, chunk_size=CHUNK, lease=LEASE)
        for number in range(8)
    ]
    opened.extend(workers)
    for turn in range(40 * TURNS):
        server.flush()
        upload = staged(cache, DATA, 8 * CHUNK)
        bodies = [
            DATA[: 8 * CHUNK] + random.Random(f"{turn} {number}").randbytes(5 * CHUNK)
            for number in range(len(workers))
        ]
        uploads = [upload.copy() for _ in workers]
        outcomes = race_of(workers, uploads, bodies)
        assert sorted(outcomes) == ["FileExists"] * (len(workers) - 1) + ["done"]
        assert cache.get("file") == bodies[outcomes.index("done")]
        check(server, cache, *uploads)
        counts["races at one place"] += 1


def race_of(
    workers: list[FileCache], uploads: list[Upload], bodies: list[bytes]
) -> list[Any]:
    """Each worker goes on with the upload by its body, at once; return the outcomes."""
    outcomes: list[Any] = [None] * len(workers)
    gate = threading.Barrier(len(workers))

    def work(index: int) -> None:
        gate.wait()
        uploads[index].go_on(workers[index], bodies[index])
        outcomes[index] = result(lambda: uploads[index].finish(workers[index]))

    threads = [threading.Thread(target=work, args=[n]) for n in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_a_flood_of_tiny_pieces(server: Memcached, cache: FileCache) -> None:
    """There is no limit to their number, but that of a manifest's size."""
    upload = Upload()
    for at in range(len(DATA)):
        upload.add(cache, DATA[slice(at, at + 1)])
    info = upload.finish(cache)
    assert cache.get("file") == DATA
    audit(server, info, parts=tuple(upload.parts), exact=True)
    counts["tiny pieces"] += len(DATA)


def pieces(name: str) -> list[int]:
    """Lengths of the pieces of 50 MiB."""
    if name == "odd":
        whole, rest = divmod(50 * MIB - 100, 777_777)
        return [1] * 100 + [777_777] * whole + [rest]
    whole, rest = divmod(50 * MIB, int(name))
    return [int(name)] * whole + [rest] * (rest > 0)


def slab_classes(memcached: Memcached) -> set[str]:
    """Those of memcached's slab classes that hold items of 100 KB and more."""
    sizes = {
        key.split(":")[0]: int(value)
        for key, value in memcached.stats("slabs").items()
        if key.endswith(":chunk_size")
    }
    numbers = (key for key in memcached.stats("items") if key.endswith(":number"))
    items = {key.split(":")[1] for key in numbers}
    return {number for number in items if sizes[number] >= 100_000}


@pytest.fixture
def load() -> Iterator[None]:
    """A busy machine."""
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    yield
    for process in spinning:
        process.kill()
        process.wait()


NAMES, CLIENTS = ["odd", "65537", str(4 * MIB), str(50 * MIB)], ["mcpool", "address"]
# The short form has each client for two of the lengths.
UPLOADS = [*itertools.product(NAMES, CLIENTS)] if LONG else [*zip(NAMES, CLIENTS * 2)]


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(("name", "client"), UPLOADS)
def test_50_mib_on_a_stock_memcached(
    memcached: Memcached, name: str, client: str
) -> None:
    """Of 64 MB, which holds another such file: it can't keep both."""
    is_fast = client == "mcpool"
    with connected(memcached) if is_fast else FileCache(memcached.server) as cache:
        for _ in range(TURNS):
            memcached.flush()
            cache.set("other", os.urandom(50 * MIB))
            classes = slab_classes(memcached)
            data, upload, begin = os.urandom(50 * MIB), Upload("new"), 0
            for size in pieces(name):
                piece, begin = data[slice(begin, begin + size)], begin + size
                if len(upload.rest) + size < MIB // 2:  # less than a chunk
                    upload.rest += piece
                else:
                    upload.add(cache, piece)
            upload.finish(cache)
            assert cache.get("new") == data
            assert slab_classes(memcached) == classes
            assert len(classes) == 1
            counts[f"uploads of 50 MiB on -m 64 over {client}"] += 1
