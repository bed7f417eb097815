"""Sixteen clients, many of them rude, on a WSGI host whose memcached is killed twice:
ten minutes in the long form.

No wrong byte, no 500, no other error without its cause. Nothing is lost that was
promised while memcached ran and had room. At the end no process, thread or open file is
left over, and no memory.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import pathlib
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple, Optional
from urllib.parse import urljoin, urlsplit

import pytest

from tests.support import (
    MIB,
    Answer,
    Host,
    Memcached,
    Server,
    Start,
    form,
    running,
    wait_for,
)
from tests.test_hosts import RULE_BREAKERS
from torture.tools import LONG, counts

CLIENTS = 16
PHASES, SECONDS = (6, 100) if LONG else (2, 2)  # between them the host is looked at
# In the middle of these phases memcached is killed.
KILLS = (3, 5) if LONG else (0, 1)
DOWN = 0.5  # seconds that it then stays away
TIMEOUT = 2  # seconds that the host waits for memcached
# Seconds that a slow client takes, at the least, and a stalled one waits.
SLOW = 2 * TIMEOUT if LONG else 1.2 * TIMEOUT

THREADS = 16  # of a host, in all its processes
GUNICORN = Host(
    f"{{python}} -m gunicorn -w 2 --threads {THREADS // 2} "
    "-b 127.0.0.1:{port} wsgi:application"
)
WAITRESS = Host(
    f"{{python}} -m waitress --threads {THREADS} "
    "--listen 127.0.0.1:{port} wsgi:application"
)
GROWTH = 96 * MIB  # of a process, since it has begun to work
# By itself glibc keeps up to 64 MiB of freed memory for each thread. That would hide a
# leak.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_MMAP_THRESHOLD_": "4194304"}
TROUBLE = (404, 410, 503, 507)  # what may be said while memcached is away, or just back
# What may be said of files in a cache that is too small for them all.
NO_ROOM = (
    404,
    410,
    507,
)

NOISE = os.urandom(64 * MIB)
SEED = struct.Struct(">Q")  # begins every file, and tells all of it


@functools.lru_cache(maxsize=32)
def content(seed: int) -> bytes:
    """A file: most are small, some have 50 MiB."""
    dice = random.Random(seed)
    size = int(
        (50 * MIB - SEED.size) * dice.random() ** dice.choice([0.1, 4, 20, 20, 20])
    )
    start = dice.randrange(len(NOISE) - size)
    return SEED.pack(seed) + NOISE[slice(start, start + size)]


def seed_of(data: bytes) -> int:
    """Which file this is. Fails unless it is one, to the last byte."""
    (seed,) = SEED.unpack(data[: SEED.size])
    assert data == content(seed), (
        f"these {len(data)} bytes are not those of file {seed}"
    )
    return int(seed)


class Load:
    """What the clients share. epoch: odd while memcached is away. roomy: it evicts
    nothing."""

    def __init__(self, server: Server, memcached: Memcached, roomy: bool) -> None:
        self.server, self.memcached, self.roomy = server, memcached, roomy
        self.epoch, self.failed = 0, threading.Event()
        self.clients = [Client(self, number) for number in range(CLIENTS)]

    def run(self, seconds: float, kill: bool) -> None:
        """One phase. Raises what goes wrong in any client."""
        deadline = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as pool:
            done = [pool.submit(client.run, deadline) for client in self.clients]
            if kill:
                self.failed.wait(seconds / 2)
                self.restart()
        for each in done:
            each.result()

    def restart(self) -> None:
        self.check_room()
        self.epoch += 1
        self.memcached.kill()
        self.failed.wait(DOWN)
        self.memcached.start()
        self.epoch += 1

    def statuses(self) -> Counter[int]:
        return sum((client.statuses for client in self.clients), Counter())

    def check_room(self) -> None:
        assert not self.roomy or self.memcached.stats()["evictions"] == "0"


class Known(NamedTuple):
    """Which files a name may stand for, None for no file, as seen in an epoch."""

    seeds: frozenset[Optional[int]] = frozenset([None])
    epoch: int = 0


class Client:
    """One client. It alone writes to the names that begin with its number."""

    def __init__(self, load: Load, number: int) -> None:
        self.load, self.number, self.dice = load, number, random.Random(number)
        self.files: dict[str, Known] = {}
        self.epoch, self.calm = 0, True  # of the last request
        self.statuses: Counter[int] = Counter()

    def run(self, deadline: float) -> None:
        try:
            while time.monotonic() < deadline and not self.load.failed.is_set():
                self.dice.choice(ACTIONS)(self)
        except BaseException:
            self.load.failed.set()
            raise

    # One request

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Optional[Mapping[str, str]] = None,
        chunked: bool = False,
        pauses: int = 0,
        most: Optional[int] = None,
    ) -> Answer:
        """Send a request, with `pauses` in the body that take SLOW seconds together;
        hang up after `most` bytes of the body. Return the answer, or one of status 0.
        """
        lines = {"Host": "x", "Connection": "close", "Content-Length": str(len(body))}
        if chunked:
            lines["Transfer-Encoding"] = "chunked"
            del lines["Content-Length"]
        lines.update(headers or {})
        head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        step = len(body) // (pauses + 1) + 1
        body = body[:most]
        pieces = [
            body[slice(start, start + step)] for start in range(0, len(body), step)
        ]
        if chunked:
            pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]]
        self.epoch, answer = self.load.epoch, Answer(0, {}, b"")
        with self.load.server.connect() as connection:
            # It may have answered, and closed.
            with contextlib.suppress(ConnectionError):
                connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())
                for number, piece in enumerate(pieces):
                    connection.sendall(piece)
                    if number < pauses:
                        time.sleep(SLOW / pauses)
            if most is None:
                response = http.client.HTTPResponse(connection, method=method)
                response.begin()
                answer = Answer(response.status, response.headers, response.read())
            elif self.dice.random() < 0.5:  # with a reset, or politely
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
        self.calm = self.epoch == self.load.epoch and self.epoch % 2 == 0
        self.statuses[answer.status] += 1
        return answer

    def is_fine(self, answer: Answer, *expected: int) -> bool:
        """Whether the answer has an expected status. Fails on one without a cause."""
        if answer.status in expected:
            return True
        causes = {
            *(() if self.calm else TROUBLE),
            *(() if self.load.roomy else NO_ROOM),
        }
        assert answer.status in causes, (
            answer.status,
            answer.data[:500],
            expected,
            self.calm,
        )
        return False

    # Files of its own, of which it knows what they are

    def own(self) -> str:
        return f"{self.number}-{self.dice.randrange(3)}"

    def possible(self, name: str) -> frozenset[Optional[int]]:
        known = self.files.get(name, Known())
        lost = known.epoch != self.load.epoch or not self.load.roomy
        return known.seeds | {None} if lost else known.seeds

    def contents(self, name: str) -> list[Optional[bytes]]:
        return [None if seed is None else content(seed) for seed in self.possible(name)]

    def learn(self, name: str, *seeds: Optional[int]) -> None:
        self.files[name] = Known(frozenset(seeds), self.epoch)

    def store(
        self, chunked: bool = False, is_form: bool = False, pauses: int = 0
    ) -> None:
        name, seed = self.own(), self.dice.getrandbits(64)
        body, headers = form(content(seed)) if is_form else (content(seed), {})
        answer = self.ask("PUT", f"/files/{name}", body, headers, chunked, pauses)
        if self.is_fine(answer, 200, 201):
            self.learn(name, seed)
        else:
            self.learn(name, seed, *self.possible(name))

    def store_a_form(self) -> None:
        self.store(is_form=True)

    def store_chunked(self) -> None:
        self.store(chunked=True)

    def store_slowly(self) -> None:
        self.store(chunked=self.dice.random() < 0.5, pauses=20)

    def stall_and_go_on(self) -> None:
        self.store(chunked=self.dice.random() < 0.5, pauses=1)

    def hang_up_in_an_upload(self) -> None:
        """Nothing is stored: the name goes on to stand for what it did."""
        body = content(self.dice.getrandbits(64))
        pauses = self.dice.choice([0, 0, 0, 1])
        most = self.dice.randrange(len(body))
        self.ask("PUT", f"/files/{self.own()}", body, None, False, pauses, most)

    def read(self) -> None:
        name = self.own()
        answer = self.ask("GET", f"/files/{name}")
        if self.is_fine(answer, 200, 404):
            seed = seed_of(answer.data) if answer.status == 200 else None
            assert seed in self.possible(name), (
                name,
                seed,
                self.files.get(name),
                self.epoch,
            )
            self.learn(name, seed)

    def read_a_part(self) -> None:
        name = self.own()
        start = self.dice.randrange(50 * MIB)
        stop = start + self.dice.randrange(1, 5 * MIB)
        span = {"Range": f"bytes={start}-{stop - 1}"}
        answer = self.ask("GET", f"/files/{name}", b"", span)
        if self.is_fine(answer, 206, 404, 416):
            parts = [
                None if file is None else file[start:stop]
                for file in self.contents(name)
            ]
            expected = {206: answer.data, 416: b"", 404: None}[answer.status]
            assert expected in parts

    def read_the_headers(self) -> None:
        name = self.own()
        answer = self.ask("HEAD", f"/files/{name}")
        if self.is_fine(answer, 200, 404):
            sizes = [
                None if file is None else str(len(file)) for file in self.contents(name)
            ]
            found = answer.headers["Content-Length"] if answer.status == 200 else None
            assert found in sizes

    def hang_up_in_a_download(self) -> None:
        self.ask("GET", f"/files/{self.own()}", most=0)

    def delete(self) -> None:
        name = self.own()
        answer = self.ask("DELETE", f"/files/{name}")
        possible = self.possible(name)
        if self.is_fine(answer, 204, 404):
            assert answer.status == 204 or None in possible
            self.learn(name, None)
        else:
            self.learn(name, None, *possible)

    def resume(self) -> None:
        """A tus upload that breaks off again and again."""
        data, tus = content(self.dice.getrandbits(64)), {"Tus-Resumable": "1.0.0"}
        answer = self.ask(
            "POST", "/uploads", b"", {**tus, "Upload-Length": str(len(data))}
        )
        if not self.is_fine(answer, 201):
            return
        path, hung_up = urljoin("/uploads", answer.headers["Location"]), False
        while "Content-Location" not in answer.headers:
            offset = int(answer.headers["Upload-Offset"])
            piece = data[
                slice(offset, offset + self.dice.choice([MIB, 5 * MIB, 6 * MIB]))
            ]
            headers = {**tus, "Upload-Offset": str(offset)}
            headers["Content-Type"] = "application/offset+octet-stream"
            most = self.dice.randrange(len(piece)) if self.dice.random() < 0.2 else None
            answer = self.ask("PATCH", path, piece, headers, most=most)
            # What came before it hung up may be stored only now.
            hung_up |= most is not None
            if most is None and not self.is_fine(
                answer, 204, *([409] if hung_up else [])
            ):
                return
            answer = self.ask("HEAD", path, b"", tus)
            if not self.is_fine(answer, 200):
                return
        answer = self.ask("GET", urlsplit(answer.headers["Content-Location"]).path)
        if self.is_fine(answer, 200):
            assert answer.data == data
        self.is_fine(self.ask("DELETE", path, b"", tus), 204)

    # Files that all write to: what comes back is one of them, whole

    def shared(self) -> str:
        return f"/files/shared-{self.dice.randrange(4)}"

    def replace_a_shared_file(self) -> None:
        answer = self.ask("PUT", self.shared(), content(self.dice.getrandbits(64)))
        self.is_fine(answer, 200, 201)

    def add_a_shared_file(self) -> None:
        answer = self.ask("POST", self.shared(), content(self.dice.getrandbits(64)))
        self.is_fine(answer, 201, 409)

    def read_a_shared_file(self) -> None:
        answer = self.ask("GET", self.shared())
        overtaken = answer.status == 503 and b"replaced faster" in answer.data
        if not overtaken and self.is_fine(answer, 200, 404) and answer.status == 200:
            seed_of(answer.data)

    def delete_a_shared_file(self) -> None:
        self.is_fine(self.ask("DELETE", self.shared()), 204, 404)

    # Worse

    def send_garbage(self) -> None:
        what = self.dice.choice(sorted(RULE_BREAKERS))
        answer = self.load.server.raw(RULE_BREAKERS[what])
        for status in re.findall(rb"^HTTP/1\.[01] (\d+)", answer, re.MULTILINE):
            assert int(status) not in (500, 502), (what, answer)


ACTIONS: list[Callable[[Client], None]] = [
    Client.store,
    Client.store,
    Client.store_a_form,
    Client.store_chunked,
    Client.store_slowly,
    Client.stall_and_go_on,
    Client.hang_up_in_an_upload,
    Client.read,
    Client.read,
    Client.read,
    Client.read_a_part,
    Client.read_the_headers,
    Client.hang_up_in_a_download,
    Client.delete,
    Client.resume,
    Client.replace_a_shared_file,
    Client.add_a_shared_file,
    Client.read_a_shared_file,
    Client.read_a_shared_file,
    Client.delete_a_shared_file,
    Client.send_garbage,
]


class Usage(NamedTuple):
    """What a process has. memory: bytes that are resident."""

    files: int
    threads: int
    memory: int


def usage(server: Server) -> dict[int, Usage]:
    """By process id."""
    found = {}
    for pid in server.pids():
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        threads, memory = re.findall(r"(?:Threads|VmRSS):\s+(\d+)", status)[::-1]
        files = len(os.listdir(f"/proc/{pid}/fd"))
        found[pid] = Usage(files, int(threads), int(memory) * 1024)
    return found


def rest(server: Server, idle: dict[int, Usage]) -> dict[int, Usage]:
    """What the host has once it is at rest: the processes of when it was `idle`, and no
    more files than then, and a connection to memcached for each thread."""

    def is_at_rest() -> bool:
        now = usage(server)
        assert now.keys() == idle.keys(), "a process of the host has ended, or begun"
        files = sum(each.files for each in now.values())
        return files <= sum(each.files for each in idle.values()) + THREADS

    wait_for(is_at_rest, "files to be closed")
    return usage(server)


def check_memory(idle: dict[int, Usage], seen: list[dict[int, Usage]]) -> None:
    for pid, before in idle.items():
        memory = [usages[pid].memory for usages in seen]
        assert max(memory) <= before.memory + GROWTH
        if LONG:
            assert (
                max(memory[slice(PHASES // 2, None)])
                <= max(memory[: PHASES // 2]) + GROWTH // 4
            )
    threads = sum(each.threads for each in seen[-1].values())
    assert threads <= THREADS + 2 * len(idle)


SOAKS = {
    "gunicorn": (GUNICORN, 2048),
    "waitress": (WAITRESS, 2048),
    **({"gunicorn, -m 64": (GUNICORN, 64)} if LONG else {}),
}


@pytest.mark.parametrize(("host", "megabytes"), SOAKS.values(), ids=SOAKS.keys())
def test_soak(
    request: pytest.FixtureRequest,
    start_memcached: Start,
    tmp_path: pathlib.Path,
    host: Host,
    megabytes: int,
) -> None:
    memcached, what = start_memcached("-m", str(megabytes)), request.node.callspec.id
    environ = {**MALLOC, "MEMCHUNK_TIMEOUT": str(TIMEOUT)}
    with running(host, memcached, tmp_path, **environ) as server:
        load = Load(server, memcached, roomy=megabytes > 64)
        load.run(1, kill=False)  # until all processes are there
        idle, seen = usage(server), []
        for phase in range(PHASES):
            load.run(SECONDS, kill=phase in KILLS)
            seen.append(rest(server, idle))
        load.check_room()
    check_memory(idle, seen)
    for status, number in sorted(load.statuses().items()):
        counts[f"{what}: {f'answers of {status}' if status else 'hung up'}"] = number
    for which, usages in (("first", seen[0]), ("last", seen[-1])):
        most = max(each.memory for each in usages.values())
        counts[f"{what}: MiB of the largest process at its {which} rest"] = most // MIB
