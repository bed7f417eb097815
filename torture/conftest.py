"""Fixtures of the torture tests, and the counts that they print."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support import Memcached
from torture.tools import LONG, counts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memcached]:
    """A memcached for the tests that don't hurt it. Its hash table is as small as it
    gets, because `keys()` walks all of it."""
    memcached = Memcached(tmp_path_factory.mktemp("m"), "-o", "hashpower=13")
    yield memcached
    memcached.kill()


modules: Counter[str] = Counter()


def cases() -> int:
    """All that was counted, except MiB, and schedules: many lead through one state."""
    return sum(
        n for what, n in counts.items() if not re.search("^schedules|MiB of", what)
    )


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    before = cases()
    yield
    modules[request.path.stem] += cases() - before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"torture, {'long' if LONG else 'short'} form")
    for what, number in counts.items():
        terminalreporter.line(f"{number:>20,}  {what}")
    for module, number in modules.items():
        terminalreporter.line(f"{number:>20,}  cases or states in {module}")
