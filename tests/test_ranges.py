"""Ranges: odd ones, those to ignore, and the bytes that they fetch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import CHUNK, Memcached, content, is_problem, make

DATA = content(5 * CHUNK)


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-", 0, 5000),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=4999-", 4999, 5000),
        ("bytes=-1", 4999, 5000),
        ("bytes=-5000", 0, 5000),
        ("bytes=-9999", 0, 5000),
        ("bytes=10-9999999999999999999999", 10, 5000),
        ("BYTES=1-2", 1, 3),
    ],
)
def test_range_of_any_form(client: Any, header: str, start: int, stop: int) -> None:
    client.put("/files/a", data=DATA)
    read = client.get("/files/a", headers={"Range": header})
    assert (read.status_code, read.data) == (206, DATA[start:stop])
    assert read.headers["Content-Range"] == f"bytes {start}-{stop - 1}/5000"
    assert read.headers["Content-Length"] == str(stop - start)


@pytest.mark.parametrize(
    "header",
    ["bytes=2-1", "bytes=-", "bytes= -", "bytes", "bytes=a-b", "0-1", "bytes=1-2x"],
)
def test_range_that_is_none_is_ignored(client: Any, header: str) -> None:
    client.put("/files/a", data=b"0123456789")
    read = client.get("/files/a", headers={"Range": header})
    assert (read.status_code, read.data) == (200, b"0123456789")


@pytest.mark.parametrize("header", ["bytes=10-20", "bytes=-0", "bytes=9999999999999-"])
def test_range_that_cannot_be(client: Any, header: str) -> None:
    client.put("/files/a", data=b"0123456789")
    is_problem(client.get("/files/a", headers={"Range": header}), 416)


def test_range_of_an_empty_file(client: Any) -> None:
    client.put("/files/a", data=b"")
    for header in ("bytes=0-0", "bytes=-0"):
        is_problem(client.get("/files/a", headers={"Range": header}), 416)
    read = client.get("/files/a", headers={"Range": "bytes=-5"})
    assert (read.status_code, read.data) == (200, b"")
    assert "Content-Range" not in read.headers


def test_range_means_nothing_to_head(client: Any) -> None:
    client.put("/files/a", data=DATA)
    head = client.head("/files/a", headers={"Range": "bytes=1-2"})
    assert (head.status_code, head.headers["Content-Length"]) == (200, "5000")
    assert "Content-Range" not in head.headers


def test_range_fetches_only_the_chunks_that_it_touches(memcached: Memcached) -> None:
    client, data = make(memcached), content(100 * CHUNK)
    client.put("/files/a", data=data)
    before = int(memcached.stats()["get_hits"])
    read = client.get("/files/a", headers={"Range": "bytes=40001-42000"})
    assert read.data == data[40_001:42_001]
    # The manifest and three chunks.
    assert int(memcached.stats()["get_hits"]) - before == 1 + 3
