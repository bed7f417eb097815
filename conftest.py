"""Fixtures that every test shares."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import pytest

from tests.support import Memcached, Start, opened


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memcached]:
    """A memcached with room for several large files, which the tests of a module
    share."""
    memcached = Memcached(tmp_path_factory.mktemp("m"), "-m", "512")
    yield memcached
    memcached.kill()
