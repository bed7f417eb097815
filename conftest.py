"""Fixtures that every test shares."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest

import memchunk
from tests.support import CHUNK, Memcached, Start, make, opened


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


@pytest.fixture
def start_memcached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start any number of memcached processes: `start_memcached("-m", "64",
    unix=False)`."""
    started: list[Memcached] = []

    def start(
        *options: str, unix: bool = False, tls: ssl.SSLContext | None = None
    ) -> Memcached:
        # Unix socket paths end at 108 bytes: pytest's own folders may be longer, these
        # are not.
        folder = tmp_path_factory.mktemp("m")
        started.append(Memcached(folder, *options, unix=unix, tls=tls))
        return started[-1]

    yield start
    for memcached in started:
        memcached.kill()


@pytest.fixture(scope="module")
def _stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memcached]:
    memcached = Memcached(tmp_path_factory.mktemp("m"))
    yield memcached
    memcached.kill()


@pytest.fixture
def memcached(_stock: Memcached) -> Memcached:
    """A memcached with stock settings (`-m 64`), empty. Tests may kill it."""
    if _stock.process.poll() is not None:
        _stock.start()
    _stock.flush()
    return _stock


@pytest.fixture
def cache(memcached: Memcached) -> Iterator[memchunk.FileCache]:
    """A cache of files with small chunks, on an empty memcached."""
    with memchunk.FileCache(memcached.server, chunk_size=CHUNK) as cache:
        yield cache


@pytest.fixture
def client(memcached: Memcached) -> Any:
    """A client of the API with default settings, on an empty memcached."""
    return make(memcached)


class Clock:
    """Stands still, unless a test moves it."""

    def __init__(self) -> None:
        # Behind the real one, by which connections are closed in the end, but above 0.
        self.now = time.monotonic() / 2

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of `time.monotonic`, by which the API tells how long a thing takes."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture(scope="module")
def large_memcached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memcached]:
    """A memcached with room for several large files, which the tests of a module
    share."""
    memcached = Memcached(tmp_path_factory.mktemp("m"), "-m", "512")
    yield memcached
    memcached.kill()
