"""Resumable uploads under pressure: workers that die, and requests that race, at any command; a
cache that can hardly hold the file; tiny pieces; many that go on at one place.

A client learns of every byte that counts, and gets the file whole, or is told that it is gone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import pytest
from pymemcache.client.base import PooledClient
from werkzeug.test import Client, TestResponse

import memchunk
import tus
import wsgi
from test_wsgi import CHUNK, MIB, content, make
from tests.faults import Faulty
from tests.support import Memcached, opened
from tests.test_tus import TUS, checksum, complete, head, leftovers, patch, start
from torture.tools import LONG, counts

TURNS = 20 if LONG else 1
STRIDE = 1 if LONG else 3  # between the commands that a worker dies at


class Died(BaseException):
    """What kills a worker: nothing that it would do afterwards is done."""


class Mortal:
    """A client of memcached that dies before its command number `life`."""

    def __init__(self, client: Any, life: float) -> None:
        self._client, self.life = client, life

    def __getattr__(self, command: str) -> Any:
        if command in ("client_pool", "clients"):
            raise AttributeError(command)
        function = getattr(self._client, command)

        def call(*args: Any, **options: Any) -> Any:
            if command != "close":
                self.life -= 1
                if self.life < 0:
                    raise Died
            return function(*args, **options)

        return call if callable(function) else function


def worker(memcached: Memcached, life: float) -> tuple[Any, Mortal]:
    mortal = Mortal(PooledClient(memcached.address), life)
    cache = memchunk.FileCache(mortal, chunk_size=CHUNK)
    opened.append(cache)
    return Client(wsgi.Application(cache)), mortal


@pytest.fixture
def _small(monkeypatch: Any) -> None:
    """Small pieces and blocks, so that one request writes the record several times."""
    monkeypatch.setattr(wsgi, "PIECE", 500)
    monkeypatch.setattr(tus, "BLOCK", 1500)


def upload(client: Any, path: list[str], data: bytes, piece: int, checksums: bool) -> None:
    path.append(start(client, len(data), "/uploads?expire=10000"))
    for begin in range(0, len(data), piece):
        part = data[begin : begin + piece]
        headers = {"Upload_Checksum": checksum(part)} if checksums else {}
        assert patch(client, path[0], begin, part, **headers).status_code == 204


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("checksums", [False, True])
def test_a_worker_dies_between_any_two_commands(memcached: Memcached, checksums: bool) -> None:
    data = content(7500)
    healthy = make(memcached)
    survivor, mortal = worker(memcached, 10_000)
    upload(survivor, [], data, 4000, checksums)
    commands = 10_000 - int(mortal.life)
    assert commands > 50
    resumed = 0
    for life in range(0, commands, STRIDE):
        client, _ = worker(memcached, life)
        path: list[str] = []
        with pytest.raises(Died):
            upload(client, path, data, 4000, checksums)
        if not path:
            continue  # it died at the start: there is nothing that the client could know of
        last = complete(healthy, path[0], data, 4000)
        assert healthy.get(last.headers["Content-Location"]).data == data
        resumed += 1
    counts["uploads whose worker died, resumed"] += resumed
    assert resumed > 40
    assert leftovers(memcached) == []  # all that the dead have left has an end


@pytest.mark.usefixtures("_small")
def test_deleted_after_a_worker_died(memcached: Memcached) -> None:
    """Between any two commands of the last piece: nothing is left, the file neither."""
    data, healthy = content(7500), make(memcached)
    for life in range(0, 1000, STRIDE):
        path = start(healthy, len(data), "/uploads?name=a")
        patch(healthy, path, 0, data[:4000])
        client, mortal = worker(memcached, life)
        with contextlib.suppress(Died):
            patch(client, path, 4000, data[4000:])
        assert healthy.delete(path, headers=TUS).status_code == 204
        assert healthy.get("/files/a").status_code == head(healthy, path).status_code == 404
        # What it had stored of a record that it did not come to write ends by itself.
        assert leftovers(memcached) == []
        assert len({key.split(":")[1] for key in set(memcached.keys())}) <= 1
        memcached.flush()
        counts["uploads whose worker died, deleted"] += 1
        if mortal.life >= 0:
            break
    assert life > 30


class Race:
    """The last piece of an upload, and what another request does at one of its commands."""

    def __init__(self, memcached: Memcached, racer: Any) -> None:
        self.memcached, self.racer = memcached, racer
        self.faulty = Faulty(memcached)
        opened.append(self.faulty.cache(chunk_size=CHUNK))
        self.client = Client(wsgi.Application(opened[-1]))
        self.data, self.other = content(7500), content(4000) + content(3500, seed=1)

    def run(self, number: int, action: Any) -> tuple[str, TestResponse, TestResponse | None]:
        """Path; the answer to the last piece, and that to what raced it, where it came to it."""
        path = start(self.racer, len(self.data), "/uploads?name=a&expire=10000")
        patch(self.racer, path, 0, self.data[:4000])
        answers: list[TestResponse] = []
        self.faulty.arm((number, "act"), action=lambda: answers.append(action(path)))
        last = patch(self.client, path, 4000, self.data[4000:])
        self.faulty.disarm()
        return path, last, answers[0] if answers else None


@pytest.fixture
def race(memcached: Memcached, _small: None) -> Race:
    return Race(memcached, make(memcached))


def test_head_at_any_command(race: Race) -> None:
    for number in range(1000):
        path, last, seen = race.run(number, lambda path: head(race.racer, path))
        assert last.status_code == 204
        assert race.racer.get("/files/a").data == race.data
        assert race.racer.delete(path, headers=TUS).status_code == 204
        if seen is None:
            break
        assert seen.status_code == 200
        assert 4000 <= int(seen.headers["Upload-Offset"]) <= 7500
        counts["HEAD at a command of the last piece"] += 1
    assert number > 30


def test_delete_at_any_command(race: Race) -> None:
    for number in range(1000):
        path, last, seen = race.run(number, lambda path: race.racer.delete(path, headers=TUS))
        if seen is None:
            break
        assert seen.status_code == 204
        assert last.status_code in (204, 404, 410)
        assert head(race.racer, path).status_code == 404
        assert race.racer.get("/files/a").status_code == 404
        ends = [end for key, end in race.memcached.expiries().items()]
        assert -1 not in ends
        race.memcached.flush()
        counts["DELETE at a command of the last piece"] += 1
    assert number > 30


@pytest.mark.parametrize("same", [True, False])
def test_patch_at_any_command(race: Race, same: bool) -> None:
    bodies = [race.data, race.data if same else race.other]
    for number in range(1000):
        path, last, seen = race.run(
            number, lambda path: patch(race.racer, path, 4000, bodies[1][4000:])
        )
        if seen is None:
            break
        assert {last.status_code, seen.status_code} <= {204, 409}
        stored = race.racer.get("/files/a")
        if same:
            complete(race.racer, path, race.data, 4000)
            assert race.racer.get("/files/a").data == race.data
        elif 204 in (last.status_code, seen.status_code):
            assert stored.data == bodies[seen.status_code == 204]
        else:
            assert stored.status_code == 404  # each is in the other's way
            counts["PATCHes that ended each other"] += 1
        assert race.racer.delete(path, headers=TUS).status_code == 204
        assert race.racer.get("/files/a").status_code == 404
        race.memcached.flush()
        counts["PATCH at a command of the last piece"] += 1
    assert number > 30


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
    items = {key.split(":")[1] for key in memcached.stats("items") if key.endswith(":number")}
    return {number for number in items if sizes[number] >= 100_000}


@pytest.mark.parametrize("name", ["odd", "65537", str(4 * MIB), str(50 * MIB)])
def test_50_mib_on_a_stock_memcached(memcached: Memcached, name: str) -> None:
    """Of 64 MB, which holds another such file: it can't keep both."""
    client = make(memcached, chunk_size=None)
    for _ in range(TURNS):
        memcached.flush()
        assert client.put("/files/other", data=os.urandom(50 * MIB)).status_code == 201
        classes = slab_classes(memcached)
        data, begin = os.urandom(50 * MIB), 0
        path = start(client, len(data))
        for piece in pieces(name):
            last = patch(client, path, begin, data[begin : begin + piece])
            assert last.status_code == 204, last.text
            begin += piece
        assert client.get(last.headers["Content-Location"]).data == data
        assert slab_classes(memcached) == classes
        assert len(classes) == 1
        counts["uploads of 50 MiB on -m 64"] += 1


def test_a_flood_of_tiny_pieces(memcached: Memcached) -> None:
    """There is no limit to their number."""
    client = make(memcached)
    data = content(1000)
    last = complete(client, start(client, len(data)), data, 1)
    assert client.get(last.headers["Content-Location"]).data == data
    counts["tiny pieces"] += len(data)


def test_many_patches_at_one_offset(memcached: Memcached) -> None:
    """In threads, each a worker of its own: one 204, and its bytes, whatever the order."""
    workers = [make(memcached) for _ in range(8)]
    for turn in range(40 * TURNS):
        length = (5000, 20_000)[turn % 2]
        path = start(workers[0], length)
        bodies = [content(5000, seed) for seed in range(len(workers))]
        statuses = race_of(workers, path, bodies)
        counts["races at one offset"] += 1
        assert sorted(statuses) == [204] + [409] * (len(workers) - 1)
        data = bodies[statuses.index(204)] + content(length - 5000, 99)
        complete(workers[1], path, data, length)
        url = head(workers[2], path).headers["Content-Location"]
        assert workers[3].get(url).data == data


def race_of(workers: list[Any], path: str, bodies: list[bytes]) -> list[int]:
    """Each worker sends its body to the start of the upload at once; return the statuses."""
    statuses, gate = [0] * len(workers), threading.Barrier(len(workers))

    def work(index: int) -> None:
        gate.wait()
        statuses[index] = patch(workers[index], path, 0, bodies[index]).status_code

    threads = [threading.Thread(target=work, args=[index]) for index in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses
