"""How to measure: in turn, in shuffled order, on servers that start and end with the figure."""

from __future__ import annotations

import contextlib
import dataclasses
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
from typing import IO, Any, Callable

MIB = 1024 * 1024
MB = 1_000_000
TIMEOUT = 30.0  # seconds that a client waits for a server before its figure counts as failed
ROOT = pathlib.Path(__file__).resolve().parent.parent

Task = Callable[[], object]


class Missing(Exception):
    """The machine lacks what a figure needs; the message says what to install."""


@dataclasses.dataclass(frozen=True)
class Options:
    """size: bytes of "the file". rounds: how often a time is taken. seeds: of random sizes.
    against: another memchunk.py."""

    quick: bool
    size: int
    rounds: int
    seeds: Sequence[int]
    against: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A line of a table: `value` with its `unit`, and the aim, a bound that it must not cross.

    ours, theirs: seconds, medians. spread: quartiles of the ratios whose median is `value`.
    note: why there is no figure.
    """

    section: str
    what: str
    beside: str
    value: float | None = None
    unit: str = "x"
    at_most: float | None = None
    at_least: float | None = None
    ours: float | None = None
    theirs: float | None = None
    spread: Sequence[float] = ()
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or self.at_most is self.at_least is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high


# Time


def in_turn(tasks: Mapping[str, Callable[[], Task]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each task took in each round, the order shuffled anew in each.

    `tasks` has what prepares a task and returns it: that, and the end of what the task returned,
    are off the clock. So is a first round, which warms up.
    """
    times: dict[str, list[float]] = {label: [] for label in tasks}
    for _ in range(rounds + 1):
        for label in random.sample(list(tasks), len(tasks)):
            task = tasks[label]()
            start = time.perf_counter()
            result = task()
            times[label].append(time.perf_counter() - start)
            del result
    return {label: taken[1:] for label, taken in times.items()}


def compare(
    section: str, what: str, beside: str, ours: Sequence[float], theirs: Sequence[float],
    at_most: float | None = None,
) -> Figure:
    """Of two series of the same rounds: the median of the ratios, not the ratio of medians, so
    that what slows the machine for a while slows both."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios
    return Figure(
        section, what, beside, statistics.median(ratios), at_most=at_most,
        ours=statistics.median(ours), theirs=statistics.median(theirs),
        spread=(quartiles[0], quartiles[-1]),
    )


# Memory


def growth(pids: Sequence[int], task: Task) -> float:
    """MiB that the process that grew most held at its peak beyond what it held before."""
    idle = {pid: _memory(pid, "VmRSS") for pid in pids}
    for pid in pids:
        pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts anew
    task()
    return max(_memory(pid, "VmHWM") - held for pid, held in idle.items()) / MIB


def _memory(pid: int, field: str) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


# Servers


@contextlib.contextmanager
def running(
    command: Sequence[str], address: str, folder: pathlib.Path = ROOT, **environ: str
) -> Iterator[int]:
    """A process and those that it starts, from when `address` takes connections; yields its id."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environ}, stdout=log, stderr=log,
            start_new_session=True,
        )
        try:
            _await(process, address, log)
            yield process.pid
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)


def _await(process: subprocess.Popen[bytes], address: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        with contextlib.suppress(OSError):
            return dial(address).close()
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise Missing(f"{process.args!r} did not start: {log.read()[-300:]!r}")
        time.sleep(0.01)


def dial(address: str) -> socket.socket:
    """A connection to "unix:/path" or "host:port", with a time-out, as any real client's has."""
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        target: Any = address[len("unix:") :]
    else:
        connection = socket.socket(socket.AF_INET)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target = "127.0.0.1", int(address.partition(":")[2])
    connection.settimeout(TIMEOUT)
    try:
        connection.connect(target)
    except OSError:
        connection.close()
        raise
    return connection


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def program(name: str) -> str:
    """The path of a program beside this Python, or on PATH."""
    beside = shutil.which(name, path=str(pathlib.Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed")
    return found


@contextlib.contextmanager
def memcached(*options: str, unix: bool = False) -> Iterator[str]:
    """The address of a memcached of our own, of 1 GB unless told otherwise."""
    user = ["-u", "root"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        port = str(free_port())
        address = f"unix:{folder}/memcached" if unix else f"127.0.0.1:{port}"
        listen = ["-s", f"{folder}/memcached"] if unix else ["-l", "127.0.0.1", "-p", port]
        command = [program("memcached"), "-U", "0", "-m", "1024", *user, *options, *listen]
        with running(command, address):
            yield address


@contextlib.contextmanager
def redis_server(unix: bool = False) -> Iterator[str]:
    """The address of a Redis of our own that keeps nothing on disk, as a cache would not."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        port = str(free_port())
        address = f"unix:{folder}/redis" if unix else f"127.0.0.1:{port}"
        listen = ["--port", "0", "--unixsocket", f"{folder}/redis"] if unix else ["--port", port]
        command = [program("redis-server"), "--save", "", "--appendonly", "no"]
        with running([*command, "--bind", "127.0.0.1", *listen], address):
            yield address
