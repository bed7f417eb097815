"""How to measure: in turn, in shuffled order, on servers that start and end with the figure."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable
from urllib.parse import urljoin, urlsplit

KIB, MIB, MB = 1024, 1024 * 1024, 1_000_000
TIMEOUT = 30.0  # seconds that a client waits for a server before its figure counts as failed
ROOT = pathlib.Path(__file__).resolve().parent.parent
BESIDE = pathlib.Path(sys.executable).parent  # where a virtual environment has its programs

Task = Callable[[], object]


class Missing(Exception):
    """The machine lacks what a figure needs; the message says what."""


@dataclasses.dataclass(frozen=True)
class Options:
    """size: bytes of "the file". rounds: how often a time is taken. seeds: of random sizes.
    against: another memchunk.py, or this one."""

    quick: bool
    size: int
    rounds: int
    seeds: range
    against: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Figure:
    """A line of a table: `value` in its `unit`, and the `aim`, "≤ 1.3" or "≥ 0.95".

    ours, theirs: seconds, medians. spread: quartiles of the ratios whose median is `value`.
    size: of the file, where a section has several. note: why there is no figure.
    """

    what: str
    beside: str = ""
    value: float | None = None
    unit: str = "x"
    aim: str = ""
    ours: float | None = None
    theirs: float | None = None
    spread: Sequence[float] = ()
    size: int = 0
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or not self.aim:
            return None
        bound = float(self.aim[1:])
        return self.value <= bound if self.aim[0] == "≤" else self.value >= bound


def in_turn(
    tasks: Mapping[str, Task], rounds: int, before: Task = lambda: None
) -> dict[str, list[float]]:
    """Seconds that each task took in each round, the order shuffled anew in each.

    Off the clock: `before`, which runs once in each round; the end of what a task returned; and a
    first round, which warms up.
    """
    times: dict[str, list[float]] = {label: [] for label in tasks}
    for _ in range(rounds + 1):
        before()
        for label in random.sample(list(tasks), len(tasks)):
            start = time.perf_counter()
            result = tasks[label]()
            times[label].append(time.perf_counter() - start)
            del result
    return {label: taken[1:] for label, taken in times.items()}


def compare(
    what: str, times: Mapping[str, Sequence[float]], aims: Mapping[str, str]
) -> Iterator[Figure]:
    """The first series beside each of the others. The value is the median of the ratios, not the
    ratio of medians: what slows the machine for a while slows both sides of a round."""
    (_, ours), *others = times.items()
    for beside, theirs in others:
        ratios = [a / b for a, b in zip(ours, theirs)]
        low, value, high = statistics.quantiles(ratios, n=4, method="inclusive")
        medians = statistics.median(ours), statistics.median(theirs)
        yield Figure(what, beside, value, "x", aims.get(beside, ""), *medians, (low, high))


def growth(pids: Sequence[int], task: Task) -> float:
    """MiB that the process that grew most held at its peak beyond what it held before."""
    idle = {pid: _memory(pid, "VmRSS") for pid in pids}
    for pid in pids:
        pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts anew
    task()
    return max(_memory(pid, "VmHWM") - held for pid, held in idle.items()) / KIB


def _memory(pid: int, field: str) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0])


@contextlib.contextmanager
def running(
    command: Sequence[str], address: str, folder: pathlib.Path = ROOT, **environ: str
) -> Iterator[int]:
    """A process and those that it starts, from when `address` takes connections; yields its id."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [program(command[0]), *command[1:]],
            cwd=folder,
            env={**os.environ, **environ},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    words = log.read()[-200:].decode(errors="replace").split()
                    raise Missing(f"{command[0]} did not start: {' '.join(words)}")
                time.sleep(0.01)
            yield process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):  # none of them is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError):
        dial(address).close()
        return True
    return False


def program(name: str) -> str:
    """The path of a program beside this Python, or on PATH."""
    found = shutil.which(name, path=str(BESIDE)) or shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed")
    return found


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def dial(address: str) -> socket.socket:
    """A connection to "unix:/path" or "host:port", with a time-out, as any real client's has."""
    host, _, target = address.partition(":")
    if host != "unix":
        connection = socket.create_connection((host, int(target)), TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT)
    try:
        connection.connect(target)
    except OSError:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def memcached(*options: str, unix: bool = False) -> Iterator[str]:
    """The address of a memcached of our own, of 1 GB unless told otherwise."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        address = f"unix:{folder}/memcached" if unix else free_address()
        listen = ["-s", address[5:]] if unix else ["-l", address]
        user = ["-u", "root"] if os.geteuid() == 0 else []
        with running(["memcached", "-U0", "-m1024", *user, *options, *listen], address):
            yield address


@contextlib.contextmanager
def redis_server(unix: bool) -> Iterator[str]:
    """The address of a Redis of our own that keeps nothing on disk, as a cache would not."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        address = f"unix:{folder}/redis" if unix else free_address()
        listen = ["--port", "0", "--unixsocket", address[5:]]
        listen = listen if unix else ["--bind", "127.0.0.1", "--port", address[10:]]
        command = ["redis-server", "--save", "", "--appendonly", "no", "--dir", folder]
        with running([*command, *listen], address):
            yield address


HOSTS = {
    "gunicorn": "gunicorn -w 1 -b {address} {app}",
    "gunicorn, threads": "gunicorn -w 1 --threads 4 -b {address} {app}",
    "waitress": "waitress-serve --listen={address} {app}",
    "cheroot": "cheroot --bind {address} {app}",
    "uWSGI": "uwsgi --need-app --die-on-term --http-socket {address} --module {app}",
}
TUS_TYPE = "application/offset+octet-stream"


@contextlib.contextmanager
def served(host: str, app: str, folder: pathlib.Path = ROOT, **environ: str) -> Iterator[Site]:
    """A WSGI application of `folder` on a host with one process."""
    address = free_address()
    command = HOSTS[host].format(address=address, app=app).split()
    with running(command, address, folder, PYTHONPATH=str(folder), **environ) as pid:
        yield Site(address, pid)


class Site:
    """A client of an API that is served, by the least of HTTP: a connection for each request."""

    def __init__(self, address: str, pid: int) -> None:
        self._address, self._session = address, pid
        self._buffer = bytearray(MIB)

    def pids(self) -> list[int]:
        """Of all processes of the host."""
        listed = subprocess.check_output(["ps", "-o", "pid=", "-s", str(self._session)])
        return [int(pid) for pid in listed.split()]

    def put(self, data: bytes) -> None:
        self._ask("PUT", "/files/bench", data)

    def get(self) -> None:
        self._ask("GET", "/files/bench")

    def form(self, data: bytes) -> None:
        """Upload as an HTML form does."""
        head = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        parts = head, data, b"\r\n--cut--\r\n"
        length, kind = str(sum(map(len, parts))), "multipart/form-data; boundary=cut"
        self._ask("POST", "/files", parts, Content_Type=kind, Content_Length=length)

    def tus(self, data: bytes, piece: int) -> None:
        """Upload as the page does: a request that starts it, and one for each piece."""
        path, kind = self._ask("POST", "/uploads", Upload_Length=str(len(data))), TUS_TYPE
        for at in range(0, len(data), piece):
            body = data[at : at + piece]
            self._ask("PATCH", path, body, Upload_Offset=str(at), Content_Type=kind)

    def _ask(self, method: str, path: str, body: Any = b"", **fields: str) -> str:
        """Send a request and drain the answer; return the path of its Location."""
        headers = {key.replace("_", "-"): value for key, value in fields.items()}
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Tus-Resumable": "1.0.0", **headers})
            answer = connection.getresponse()
            while answer.readinto(self._buffer):
                pass
        if answer.status >= 300:
            raise OSError(f"{method} {path}: {answer.status} {answer.reason}")
        return urlsplit(urljoin(path, answer.headers.get("Location", ""))).path
