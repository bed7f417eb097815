"""Conditions of requests: odd ones, those that change meanwhile, and the words of
412."""

from __future__ import annotations

from typing import Any

import pytest
from werkzeug.http import http_date

from tests.support import Stream, ask, is_problem, send

EARLY, LATE = http_date(1), http_date(4e9)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('GET | If-None-Match: "other", W/ETAG', 304),
        ("GET | If-None-Match: *", 304),
        # The date is ignored.
        (f'GET | If-None-Match: "other" | If-Modified-Since: {LATE}', 200),
        (f"GET | If-Modified-Since: {LATE}", 304),
        ("GET | If-Modified-Since: yesterday", 200),
        (f"GET | If-Modified-Since: {LATE[:-3]}+{'9' * 20}", 400),
        ("GET | If-Match: *", 200),
        (f'GET | If-Match: "other", ETAG | If-Unmodified-Since: {EARLY}', 200),
        ("GET | If-Match: W/ETAG", 412),
        ("GET | If-Match: ", 412),
        ('GET | If-Match: "other" | If-None-Match: ETAG', 412),
        ('GET | If-Match: "other" | Range: bytes=9-', 412),
        ("GET | If-Unmodified-Since: yesterday", 200),
        ("PUT | If-Match: W/ETAG", 412),
        ("PUT | If-Match: *", 200),
        ("PUT | If-None-Match: ETAG", 412),
        ('PUT | If-None-Match: "other"', 200),
        (f"PUT | If-Unmodified-Since: {EARLY}", 412),
        (f"PUT | If-Unmodified-Since: {LATE}", 200),
        ("POST | If-Match: ETAG", 409),
        ('POST | If-Match: "other"', 412),
        (f"PATCH | If-Unmodified-Since: {EARLY}", 412),
        (f"DELETE | If-Unmodified-Since: {EARLY}", 412),
        ("DELETE | If-None-Match: *", 412),
    ],
)
def test_condition_on_a_file(client: Any, text: str, status: int) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    text = text.replace(" |", " /files/a?expire=9 |", 1)
    if "GET" in text:
        head = ask(client, text.replace("GET", "HEAD"), ETAG=etag)
        assert head.status_code == status
    assert ask(client, text, ETAG=etag).status_code == status
    if status != 200:
        info = client.get("/files/a?info").json
        assert (info["etag"], info["expires"]) == (etag, None)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("GET /files/a | If-Match: *", 404),
        ('PUT /files/a | If-Match: "x"', 412),
        ("PUT /files/a | If-Match: *", 412),
        ("POST /files/a | If-Match: *", 412),
        ("POST /files | If-Match: *", 412),
        ("POST /files/a | If-None-Match: *", 201),
        ("DELETE /files/a | If-Match: *", 404),
    ],
)
def test_condition_on_no_file(client: Any, text: str, status: int) -> None:
    assert ask(client, text).status_code == status


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("PUT /files/a | If-None-Match: *", "rules out the file"),
        ("PUT /files/a | If-None-Match: ETAG", "rules out the file"),
        ('PUT /files/a | If-Match: "other"', "If-Match does not name its ETag"),
        ("PUT /files/b | If-Match: *", "There is no file"),
        (f"PUT /files/a | If-Unmodified-Since: {EARLY}", "after the date"),
    ],
)
def test_condition_that_fails_says_why(client: Any, text: str, words: str) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    assert words in is_problem(ask(client, text, ETAG=etag), 412)["detail"]


@pytest.mark.parametrize("header", ["If-Match", "If-Unmodified-Since"])
def test_condition_on_a_file_that_is_deleted_during_the_upload(
    client: Any, header: str
) -> None:
    etag = client.put("/files/a", data=b"old").headers["ETag"]
    stream = Stream(b"mine", lambda: client.delete("/files/a"))
    headers = {header: etag if header == "If-Match" else http_date(4e9)}
    is_problem(send(client, "PUT", "/files/a", stream, 4, headers=headers), 412)
    is_problem(client.get("/files/a"), 404)
