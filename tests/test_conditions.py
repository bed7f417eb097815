"""Conditions of requests: odd ones, those that change meanwhile, and the words of
412."""

from __future__ import annotations

from typing import Any

import pytest
from werkzeug.http import http_date

from tests.support import (
    Stream,
    cases,
    is_problem,
    send,
)

EARLY = http_date(1)
READS = {
    "If-None-Match of a weak ETag": ({"If-None-Match": '"other", W/ETAG'}, 304),
    "If-None-Match of any": ({"If-None-Match": "*"}, 304),
    "If-None-Match before the date": (
        {"If-None-Match": '"other"', "If-Modified-Since": http_date(4e9)},
        200,
    ),
    "If-Modified-Since the future": ({"If-Modified-Since": http_date(4e9)}, 304),
    "If-Modified-Since no date": ({"If-Modified-Since": "yesterday"}, 200),
    "If-Match of any": ({"If-Match": "*"}, 200),
    "If-Match before the date": (
        {"If-Match": '"other", ETAG', "If-Unmodified-Since": EARLY},
        200,
    ),
    "If-Match of a weak ETag": ({"If-Match": "W/ETAG"}, 412),
    "If-Match of none": ({"If-Match": ""}, 412),
    "If-Match first": ({"If-Match": '"other"', "If-None-Match": "ETAG"}, 412),
    "If-Match before the range": ({"If-Match": '"other"', "Range": "bytes=9-"}, 412),
    "If-Unmodified-Since no date": ({"If-Unmodified-Since": "yesterday"}, 200),
}


@cases(("headers", "status"), READS)
def test_condition_of_a_read(client: Any, headers: dict[str, str], status: int) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    sent = {key: value.replace("ETAG", etag) for key, value in headers.items()}
    for method in (client.get, client.head):
        assert method("/files/a", headers=sent).status_code == status


CHANGES = {
    "PUT of a weak If-Match": ("PUT", {"If-Match": "W/ETAG"}, 412),
    "PUT of any If-Match": ("PUT", {"If-Match": "*"}, 200),
    "PUT of an ETag in If-None-Match": ("PUT", {"If-None-Match": "ETAG"}, 412),
    "PUT of another If-None-Match": ("PUT", {"If-None-Match": '"other"'}, 200),
    "PUT of an early date": ("PUT", {"If-Unmodified-Since": EARLY}, 412),
    "PUT of a late date": ("PUT", {"If-Unmodified-Since": http_date(4e9)}, 200),
    "POST of its ETag": ("POST", {"If-Match": "ETAG"}, 409),
    "POST of another ETag": ("POST", {"If-Match": '"other"'}, 412),
    "PATCH of another ETag": ("PATCH", {"If-Match": '"other"'}, 412),
    "DELETE of an early date": ("DELETE", {"If-Unmodified-Since": EARLY}, 412),
    "DELETE of any If-None-Match": ("DELETE", {"If-None-Match": "*"}, 412),
}


@cases(("method", "headers", "status"), CHANGES)
def test_condition_of_a_change(
    client: Any, method: str, headers: dict[str, str], status: int
) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    sent = {key: value.replace("ETAG", etag) for key, value in headers.items()}
    answer = client.open("/files/a?expire=9", method=method, data=b"y", headers=sent)
    assert answer.status_code == status
    info = client.get("/files/a?info").json
    if status != 200:
        assert (info["etag"], info["expires"]) == (etag, None)


NONE = {
    "GET": ("GET", {"If-Match": "*"}, 404),
    "PUT of an ETag": ("PUT", {"If-Match": '"x"'}, 412),
    "PUT of any": ("PUT", {"If-Match": "*"}, 412),
    "POST of any": ("POST", {"If-Match": "*"}, 412),
    "POST of none": ("POST", {"If-None-Match": "*"}, 201),
    "DELETE of any": ("DELETE", {"If-Match": "*"}, 404),
}


@cases(("method", "headers", "status"), NONE)
def test_condition_on_no_file(
    client: Any, method: str, headers: dict[str, str], status: int
) -> None:
    answer = client.open("/files/a", method=method, data=b"y", headers=headers)
    assert answer.status_code == status


WORDS = {
    "If-None-Match: *": ("/files/a", {"If-None-Match": "*"}, "There is a file"),
    "If-None-Match": ("/files/a", {"If-None-Match": "ETAG"}, "There is a file"),
    "If-Match": ("/files/a", {"If-Match": '"other"'}, "none that If-Match names"),
    "If-Match of no file": ("/files/b", {"If-Match": "*"}, "There is no file"),
    "a date": ("/files/a", {"If-Unmodified-Since": EARLY}, "after the date"),
}


@cases(("path", "headers", "words"), WORDS)
def test_condition_that_fails_says_why(
    client: Any, path: str, headers: dict[str, str], words: str
) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    sent = {key: value.replace("ETAG", etag) for key, value in headers.items()}
    refused = client.put(path, data=b"y", headers=sent)
    assert words in is_problem(refused, 412)["detail"]


@pytest.mark.parametrize("header", ["If-Match", "If-Unmodified-Since"])
def test_condition_on_a_file_that_is_deleted_during_the_upload(
    client: Any, header: str
) -> None:
    etag = client.put("/files/a", data=b"old").headers["ETag"]
    stream = Stream(b"mine", lambda: client.delete("/files/a"))
    headers = {header: etag if header == "If-Match" else http_date(4e9)}
    is_problem(send(client, "PUT", "/files/a", stream, 4, headers=headers), 412)
    is_problem(client.get("/files/a"), 404)
