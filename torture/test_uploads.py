"""Resumable uploads under pressure: workers that die at any command, a cache that can hardly hold
the file, floods of tiny pieces, many that continue at one offset.

A client learns of every byte that counts, and gets the file whole or a 410, never a wrong one.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from pymemcache.client.base import PooledClient
from werkzeug.test import Client

import memchunk
import wsgi
from test_wsgi import CHUNK, MIB, content, is_problem, make
from tests.support import Memcached, opened
from tests.test_tus import checksum, complete, head, leftovers, offset, pair, patch, start
from torture.tools import LONG, counts

TURNS = 20 if LONG else 1


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


def upload(client: Any, path: list[str], data: bytes, piece: int, checksums: bool) -> None:
    path.append(start(client, len(data), "/uploads?expire=10000"))
    for begin in range(0, len(data), piece):
        part = data[begin : begin + piece]
        headers = {"Upload_Checksum": checksum(part)} if checksums else {}
        assert patch(client, path[0], begin, part, **headers).status_code == 204


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("checksums", [False, True])
def test_a_worker_dies_between_any_two_commands(
    memcached: Memcached, monkeypatch: Any, tight: bool, checksums: bool
) -> None:
    monkeypatch.setattr(wsgi.Uploads, "is_tight", lambda self, upload: tight)
    monkeypatch.setattr(wsgi, "PIECE", 500)
    monkeypatch.setattr(wsgi, "BLOCK", 1500)
    data = content(7500)
    healthy = make(memcached)
    survivor, mortal = worker(memcached, 10_000)
    upload(survivor, [], data, 4000, checksums)
    commands = 10_000 - int(mortal.life)
    assert commands > 30
    resumed, lost = 0, 0
    for life in range(commands):
        client, _ = worker(memcached, life)
        path: list[str] = []
        with pytest.raises(Died):
            upload(client, path, data, 4000, checksums)
        if not path:
            continue  # it died at the start: there is nothing that the client could know of
        answer = head(healthy, path[0])
        if answer.status_code == 410:
            lost += 1
            is_problem(healthy.get(path[0].replace("/uploads/", "/files/")), 404)
            continue
        resumed += 1
        last = complete(healthy, path[0], data, 4000)
        assert healthy.get(last.headers["Content-Location"]).data == data
    counts["uploads whose worker died, resumed"] += resumed
    counts["uploads whose worker died, 410"] += lost
    assert resumed > 40
    assert lost == 0 or tight
    assert leftovers(memcached) == []  # all that the dead have left has an end


@pytest.mark.parametrize("piece", [MIB, 4 * MIB, 50 * MIB])
def test_50_mib_on_a_stock_memcached(memcached: Memcached, piece: int) -> None:
    """Of 64 MB: it can't hold the file twice, nor the file and the one before. While it has to
    evict those it may drop a piece; then it says 410, and the client starts again."""
    client = make(memcached, chunk_size=None)
    data = os.urandom(50 * MIB)
    for _ in range(3 * TURNS):
        for _ in range(4):
            path = start(client, len(data))
            for begin in range(0, len(data), piece):
                last = patch(client, path, begin, data[begin : begin + piece])
            counts[f"uploads on -m 64: {last.status_code}"] += 1
            if last.status_code != 410:
                break
        assert last.status_code == 204
        assert client.get(last.headers["Content-Location"]).data == data


def test_a_flood_of_tiny_pieces(memcached: Memcached) -> None:
    client = make(memcached)
    path = start(client, 2000, headers={"Upload-Metadata": pair("a", bytes(8000))})
    for index in range(wsgi.MAX_PIECES):
        assert patch(client, path, index, b"x").status_code == 204
    problem = is_problem(patch(client, path, wsgi.MAX_PIECES, b"x"), 400)
    assert f"{wsgi.MAX_PIECES} pieces" in problem["detail"]
    assert offset(client, path) == wsgi.MAX_PIECES
    # As many as that make a file.
    path = start(client, wsgi.MAX_PIECES)
    data = content(wsgi.MAX_PIECES)
    last = complete(client, path, data, 1)
    assert client.get(last.headers["Content-Location"]).data == data
    counts["tiny pieces"] += 2 * wsgi.MAX_PIECES


def test_many_patches_at_one_offset(memcached: Memcached) -> None:
    """In threads, each a worker of its own: one 204, and its bytes, whatever the order."""
    workers = [make(memcached) for _ in range(8)]
    for turn in range(40 * TURNS):
        length = (5000, 20_000)[turn % 2]
        path = start(workers[0], length)
        bodies = [content(5000, seed) for seed in range(len(workers))]
        statuses = race(workers, path, bodies)
        assert sorted(statuses) == [204] + [409] * (len(workers) - 1)
        data = bodies[statuses.index(204)] + content(length - 5000, 99)
        complete(workers[1], path, data, length)
        url = head(workers[2], path).headers["Content-Location"]
        assert workers[3].get(url).data == data
        counts["races at one offset"] += 1


def race(workers: list[Any], path: str, bodies: list[bytes]) -> list[int]:
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
