"""How to measure: in turn, on servers that start and end with the figure."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import operator
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable
from urllib.parse import urljoin, urlsplit

KIB, MIB = 1024, 1024 * 1024
TIMEOUT = 30.0  # seconds that a client waits for a server: longer is a failure
ROOT = pathlib.Path(__file__).resolve().parent.parent
BESIDE = pathlib.Path(sys.executable).parent  # programs of a virtual environment

OPERATORS = {"≤": operator.le, "<": operator.lt, "≥": operator.ge}

Task = Callable[[], object]
Series = Mapping[str, Sequence[float]]  # seconds, by who took them


class Missing(Exception):
    """The machine lacks what a figure needs; the message says what."""


@dataclasses.dataclass(frozen=True)
class Options:
    """size: bytes of "the file". rounds: how often a time is taken. against: another
    memchunk.py, if asked for."""

    quick: bool
    size: int
    rounds: int
    against: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Figure:
    """A line of a table: `value` in its `unit`, and the `aim`, as "≤ 1.3".

    ours, theirs: seconds, medians. spread: quartiles of the ratios of single rounds.
    size: of the file, if a section has several. note: why there is no figure.
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
        return bool(OPERATORS[self.aim[0]](self.value, float(self.aim[1:])))


def in_turn(tasks: Mapping[str, Task], rounds: int) -> dict[str, list[float]]:
    """Seconds that each task took in each round, the order shuffled anew in each.

    Just before it is timed, each runs once off the clock. So all are timed in the same
    state of their connections: warm, after a file of the same size."""
    times: dict[str, list[float]] = {label: [] for label in tasks}
    for _ in range(rounds):
        for label in random.sample(list(tasks), len(tasks)):
            tasks[label]()
            start = time.perf_counter()
            result = tasks[label]()
            times[label].append(time.perf_counter() - start)
            del result  # its end is off the clock, too
    return times


def compare(
    what: str, times: Series, aims: Mapping[str, str], size: int = 0, calls: int = 1
) -> Iterator[Figure]:
    """The first series beside each of the others: medians of a call, and their ratio.
    spread: quartiles of the ratios in each round."""
    (_, ours), *others = times.items()
    for beside, theirs in others:
        ratios = [a / b for a, b in zip(ours, theirs)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        mine, other = (statistics.median(each) / calls for each in (ours, theirs))
        about = mine / other, "x", aims.get(beside, ""), mine, other, (low, high)
        yield Figure(what, beside, *about, size)


def growth(pids: Sequence[int], task: Task) -> float:
    """MiB beyond what it held before, at the peak of the process that grew most."""
    idle = {pid: _memory(pid, "VmRSS") for pid in pids}
    for pid in pids:
        pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts anew
    task()
    return max(_memory(pid, "VmHWM") - held for pid, held in idle.items()) / KIB


def _memory(pid: int, field: str) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0])


@contextlib.contextmanager
def running(template: str, **environ: str) -> Iterator[tuple[str, int]]:
    """A process and those that it starts, by a command with {address} or {port}.
    Yields its address, as soon as it takes connections, and its id."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    name, *arguments = shlex.split(template.format(address=address, port=port))
    with tempfile.TemporaryFile() as log:
        command, env = [program(name), *arguments], {**os.environ, **environ}
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            if not _answers(address, process):
                log.seek(0)
                words = log.read()[-200:].decode(errors="replace").split()
                raise Missing(f"{name} did not start: {' '.join(words)}")
            yield address, process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):  # none of them is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            dial(address).close()
            return True
        time.sleep(0.01)
    return False


def program(name: str) -> str:
    """The path of a program beside this Python, or on PATH."""
    found = shutil.which(name, path=str(BESIDE)) or shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed")
    return found


def dial(address: str, tls: ssl.SSLContext | None = None) -> socket.socket:
    """A connection with a time-out, as any real client's has."""
    host, _, port = address.partition(":")
    connection = socket.create_connection((host, int(port)), TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return tls.wrap_socket(connection, server_hostname=host) if tls else connection


@contextlib.contextmanager
def memcached(options: str = "") -> Iterator[str]:
    """The address of a memcached of our own, of 1 GB unless told otherwise."""
    user = "-u root" if os.geteuid() == 0 else ""
    with running(f"memcached -U0 -m1024 {user} {options} -l {{address}}") as started:
        yield started[0]


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """The address of a Redis of our own that keeps nothing on disk, as a cache does."""
    options = "--save '' --appendonly no --bind 127.0.0.1 --port {port}"
    with running(f"redis-server {options}") as started:
        yield started[0]


HOSTS = {
    "gunicorn": "gunicorn -w 1 -b {address} {app}",
    "gunicorn, threads": "gunicorn -w 1 --threads 4 -b {address} {app}",
    "waitress": "waitress-serve --listen={address} {app}",
    "cheroot": "cheroot --bind {address} {app}",
    "uWSGI": "uwsgi --need-app --die-on-term --http-socket {address} --module {app}",
}
TUS_TYPE = "application/offset+octet-stream"


@contextlib.contextmanager
def served(host: str, app: str, **environ: str) -> Iterator[Site]:
    """A WSGI application on a host with one process."""
    command = HOSTS[host].replace("{app}", app)
    with running(command, PYTHONPATH=str(ROOT), **environ) as started:
        yield Site(*started)


class Site:
    """The least of an HTTP client: a connection for each request."""

    def __init__(self, address: str, pid: int) -> None:
        self._address, self._session = address, pid
        self._buffer = bytearray(MIB)

    def pids(self) -> list[int]:
        listed = subprocess.check_output(["ps", "-o", "pid=", "-s", str(self._session)])
        return [int(pid) for pid in listed.split()]

    def form(self, data: bytes) -> None:
        """Upload as an HTML form does, with as long a boundary."""
        edge = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
        head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a"'
        parts = head.encode() + b"\r\n\r\n", data, f"\r\n--{edge}--\r\n".encode()
        kind = f"multipart/form-data; boundary={edge}"
        length = str(sum(map(len, parts)))
        self.ask("POST", "/files", parts, Content_Type=kind, Content_Length=length)

    def tus(self, data: bytes, piece: int) -> None:
        """Upload as the page does: a request that starts it, and one for each piece."""
        path = self.ask("POST", "/uploads", Upload_Length=str(len(data)))
        for at in range(0, len(data), piece):
            body = data[slice(at, at + piece)]
            self.ask("PATCH", path, body, Upload_Offset=str(at), Content_Type=TUS_TYPE)

    def ask(self, method: str, path: str, body: Any = b"", **fields: str) -> str:
        """Send a request and drain the answer; return the path of its Location."""
        headers = {key.replace("_", "-"): value for key, value in fields.items()}
        headers["Tus-Resumable"] = "1.0.0"
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            while answer.readinto(self._buffer):
                pass
        if answer.status >= 300:
            raise OSError(f"{method} {path}: {answer.status} {answer.reason}")
        return urlsplit(urljoin(path, answer.headers.get("Location", ""))).path
