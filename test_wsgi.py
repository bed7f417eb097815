"""The HTTP API through Werkzeug's test client, on real memcached processes.

Real hosts are in tests/test_hosts.py, browsers in tests/test_browser.py, Lambda
adapters in tests/test_lambda.py."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Callable
from urllib.parse import quote, unquote_to_bytes, urljoin
from wsgiref.validate import validator

import pytest
from hypothesis import HealthCheck, event, given, settings, strategies
from werkzeug.http import http_date, parse_options_header
from werkzeug.test import Client, TestResponse, create_environ, run_wsgi_app
from werkzeug.wrappers import Request

import httpfiles
import mcpool
import memchunk
import wsgi
from tests.support import CLOCK, COPIED, WAIT, Memcached, Start, opened, wait_for

MIB = 1024 * 1024
CHUNK = 1000  # bytes, so that small files have many chunks
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def make(memcached: Memcached, chunk_size: int | None = CHUNK, **values: Any) -> Any:
    """A client of an API with the given settings."""
    settings = wsgi.Settings(servers=memcached.server, **values)
    cache = memchunk.FileCache(
        mcpool.connect(memcached.server, timeout=settings.timeout),
        chunk_size=chunk_size,
        max_size=settings.max_size,
    )
    opened.append(cache)
    return Client(wsgi.Application(cache, settings))


@pytest.fixture
def client(memcached: Memcached) -> Any:
    return make(memcached)


@functools.lru_cache(maxsize=8)
def content(size: int, seed: int = 0) -> bytes:
    """Bytes that differ at every offset that a chunk or a piece could be mistaken
    for."""
    block = b"".join(
        (seed * 7919 + index).to_bytes(5, "big") for index in range(-(-size // 5))
    )
    return block[:size]


def send(
    client: Any, method: str, path: str, stream: Any, length: int | None, **options: Any
) -> Any:
    """A request whose body is a stream, which the test client would rewind and
    measure."""
    environ = {"wsgi.input": stream, **options.pop("environ", {})}
    if length is not None:
        environ["CONTENT_LENGTH"] = str(length)
    return client.open(path, method=method, environ_overrides=environ, **options)


def address(response: TestResponse) -> str:
    """The URL that a client makes of an answer's Location."""
    return urljoin(response.request.url, response.headers["Location"])


def version(response: TestResponse) -> str:
    return response.headers["ETag"].strip('"')


def chunk_key(memcached: Memcached, response: TestResponse, index: int) -> str:
    """The key of one chunk of the file whose ETag is in `response`."""
    (key,) = filter(
        lambda key: key.endswith(f"#|{version(response)}:{index}"), memcached.keys()
    )
    return key


def damage(memcached: Memcached, key: str) -> None:
    value = bytearray(memcached.read(key))
    value[-1] ^= 1
    memcached.write(key, bytes(value))


def is_problem(response: TestResponse, status: int) -> dict[str, Any]:
    """Assert that the answer is that error, in the form of RFC 9457; return its
    JSON."""
    assert response.status_code == status, response.text
    assert response.mimetype == "application/problem+json"
    problem: dict[str, Any] = json.loads(response.data)
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"].endswith(".")
    return problem


# Store, read, replace, delete


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK])
def test_a_file_comes_back_byte_for_byte(client: Any, size: int) -> None:
    data = content(size)
    created = client.put("/files/a", data=data)
    assert created.status_code == 201
    read = client.get("/files/a")
    assert (read.status_code, read.data) == (200, data)
    assert read.headers["Content-Length"] == str(size)
    assert read.headers["ETag"] == created.headers["ETag"] == created.json["etag"]


def test_50_mib_and_one_byte_more(memcached: Memcached) -> None:
    client = make(memcached, chunk_size=None)
    data = os.urandom(50 * MIB)
    for _ in range(3):  # on a stock memcached of 64 MB, each replaces the one before
        assert client.put("/files/big", data=data).status_code in (200, 201)
    assert client.get("/files/big").data == data
    sets = memcached.stats()["cmd_set"]
    problem = is_problem(client.put("/files/big", data=data + b"x"), 413)
    assert problem["limit"] == 50 * MIB
    assert memcached.stats()["cmd_set"] == sets  # refused before a byte was stored
    assert client.get("/files/big").data == data


def test_post_makes_up_a_name(client: Any) -> None:
    first = client.post("/files", data=b"one", content_type="image/png")
    second = client.post("/files/", data=b"two")
    assert first.status_code == second.status_code == 201
    assert len(first.json["name"]) >= 22  # 128 bits of base64
    assert first.json["name"] != second.json["name"]
    assert first.headers["Location"] == f"files/{first.json['name']}"
    assert first.json["url"] == f"/files/{first.json['name']}"
    for created, data in ((first, b"one"), (second, b"two")):
        assert client.get(address(created)).data == data
    assert client.get(address(first)).mimetype == "image/png"


def test_the_answer_describes_the_file(client: Any) -> None:
    answer = client.put(
        "/files/a/b c.txt?expire=60", data=b"x", content_type="text/plain"
    )
    info = answer.json
    assert set(info) == {
        "name",
        "size",
        "content_type",
        "etag",
        "url",
        "created",
        "expires",
    }
    assert (info["name"], info["size"], info["content_type"]) == (
        "a/b c.txt",
        1,
        "text/plain",
    )
    assert info["url"] == "/files/a/b%20c.txt"
    assert abs(info["created"] - time.time()) < CLOCK
    assert info["expires"] - info["created"] == 60


def test_post_with_a_name_only_creates(client: Any) -> None:
    assert client.post("/files/a", data=b"one").status_code == 201
    is_problem(client.post("/files/a", data=b"two"), 409)
    assert client.get("/files/a").data == b"one"


def test_put_creates_then_replaces(client: Any, memcached: Memcached) -> None:
    first = client.put("/files/a", data=content(5 * CHUNK))
    second = client.put("/files/a", data=b"two")
    assert (first.status_code, second.status_code) == (201, 200)
    assert "Location" in first.headers
    assert "Location" not in second.headers
    assert first.headers["ETag"] != second.headers["ETag"]
    assert client.get("/files/a").data == b"two"
    assert version(first) not in " ".join(memcached.keys())


def test_delete(client: Any, memcached: Memcached) -> None:
    client.put("/files/a", data=content(5 * CHUNK))
    deleted = client.delete("/files/a")
    assert (deleted.status_code, deleted.data) == (204, b"")
    is_problem(client.get("/files/a"), 404)
    is_problem(client.delete("/files/a"), 404)
    assert memcached.keys() == []


def test_expiry(memcached: Memcached) -> None:
    client = make(memcached, expire=1000)
    assert client.put("/files/a", data=b"").json["expires"] == pytest.approx(
        time.time() + 1000, abs=CLOCK
    )
    assert client.put("/files/a?expire=0", data=b"").json["expires"] is None
    year = 365 * 24 * 3600
    assert (
        client.put("/files/a?expire=31536000", data=b"").json["expires"]
        > time.time() + year - CLOCK
    )
    assert client.put("/files/b?expire=1", data=b"x").status_code == 201
    wait_for(lambda: client.get("/files/b").status_code == 404, "the file to expire")
    for bad in ("-1", "1.5", "x", "9" * 30, "1e3", "\u0663"):
        is_problem(client.put("/files/c", query_string={"expire": bad}, data=b"x"), 400)
    is_problem(client.get("/files/c"), 404)


def test_the_longest_expiry(memcached: Memcached) -> None:
    client = make(memcached, max_expire=1000)
    for query in ("", "?expire=", "?expire=1000"):
        info = client.put(f"/files/a{query}", data=b"x").json
        assert info["expires"] - info["created"] == 1000
    assert client.put("/files/a?expire=7", data=b"x").status_code == 200
    for more in ("0", "1001", str(2**31 - 1), "9" * 99):
        assert (
            is_problem(client.put(f"/files/a?expire={more}", data=b"x"), 400)["limit"]
            == 1000
        )
        is_problem(client.patch(f"/files/a?expire={more}"), 400)
        is_problem(
            post_form(
                client, form(("expire", None, more.encode()), ("file", "a", b""))
            ),
            400,
        )
    for default, kept in ((10, 10), (5000, 1000)):
        info = (
            make(memcached, max_expire=1000, expire=default)
            .post("/files", data=b"x")
            .json
        )
        assert info["expires"] - info["created"] == kept


def test_what_is_known_of_a_file(client: Any) -> None:
    stored = client.put("/files/a/b.txt?expire=60", data=b"x")
    for query in ("?info", "?info=", "?info=1"):
        info = client.get("/files/a/b.txt" + query)
        assert (info.status_code, info.json, info.mimetype) == (
            200,
            stored.json,
            "application/json",
        )
        assert info.headers["Cache-Control"] == "no-store"
    assert client.head("/files/a/b.txt?info").status_code == 200
    is_problem(client.get("/files/none?info"), 404)


def test_a_new_time_to_live(client: Any, memcached: Memcached) -> None:
    stored = client.put("/files/a?expire=60", data=content(5 * CHUNK))
    etag = stored.headers["ETag"]
    kept = client.patch("/files/a?expire=5000", headers={"If-Match": etag})
    assert (kept.status_code, kept.headers["ETag"]) == (200, etag)
    assert kept.json["expires"] == pytest.approx(time.time() + 5000, abs=CLOCK)
    assert {**kept.json, "expires": stored.json["expires"]} == stored.json
    assert min(memcached.expiries().values()) > time.time() + 4000
    assert client.get("/files/a?info").json == kept.json
    assert client.patch("/files/a?expire=0").json["expires"] is None
    is_problem(client.patch("/files/a?expire=9", headers={"If-Match": '"other"'}), 412)
    is_problem(client.patch("/files/a", data=b"x"), 400)
    is_problem(client.patch("/files/a?expire=soon"), 400)
    is_problem(client.patch("/files/none?expire=9"), 404)
    assert client.get("/files/a?info").json["expires"] is None
    memcached.delete(chunk_key(memcached, stored, 3))
    is_problem(client.patch("/files/a?expire=9"), 410)


@pytest.mark.parametrize(
    ("name", "sent", "expected"),
    [
        ("a.png", "", "image/png"),
        ("folder/A.PDF", "", "application/pdf"),
        # What curl says of any body.
        (
            "a.png",
            "application/x-www-form-urlencoded",
            "image/png",
        ),
        ("a.png", "text/plain", "text/plain"),
        ("a.png", "application/octet-stream", "application/octet-stream"),
        ("a.tar.gz", "", "application/octet-stream"),
        ("a.tgz", "", "application/octet-stream"),
        ("data:text/html,x", "", "application/octet-stream"),
        ("png", "", "application/octet-stream"),
        (".png", "", "application/octet-stream"),
    ],
)
def test_a_type_guessed_from_the_name(
    client: Any, name: str, sent: str, expected: str
) -> None:
    stored = client.put(
        "/files/" + quote(name), data=b"x", headers={"Content-Type": sent}
    )
    read = client.get("/files/" + quote(name))
    assert read.headers["Content-Type"] == stored.json["content_type"] == expected
    assert read.headers["Content-Disposition"].startswith("attachment;")


# Names


@pytest.mark.parametrize(
    "name",
    [
        "plain.txt",
        "with space",
        "a/b/c",
        "/leading",
        "trailing/",
        "a//b",
        "\u00e9\u00e8 \u4f60\u597d \U0001f600.txt",
        "question?mark#hash%25&=+;",
        'quote"back\\slash',
        "line\r\nSet-Cookie: a=b",
        "nul\x00tab\t\x7f",
        "bidi\u202egpj.exe",
        "x" * 1024,
        "\U0001f600" * 256,
    ],
)
def test_any_name(client: Any, name: str) -> None:
    path = "/files/" + quote(name)
    created = client.put(path, data=b"x")
    assert created.status_code == 201
    assert created.json["name"] == name
    read = client.get(created.json["url"])
    assert (read.status_code, read.data) == (200, b"x")
    assert all(
        32 <= ord(c) < 127 for value in read.headers.values() for c in str(value)
    )
    assert client.get(path).headers["ETag"] == created.headers["ETag"]


@pytest.mark.parametrize("path", ["%FF", "a%C3", "%ED%A0%80", "x" * 1025, "%EF%BF%BD"])
def test_names_that_are_none(client: Any, path: str) -> None:
    for method in ("GET", "PUT", "POST", "DELETE"):
        is_problem(raw_path(client, method, "/files/" + path), 400)


def raw_path(client: Any, method: str, path: str) -> Any:
    """A request whose path reaches the application as a host would decode it."""
    decoded = unquote_to_bytes(path).decode("latin-1")
    return client.open(method=method, environ_overrides={"PATH_INFO": decoded})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("report.pdf", "report.pdf"),
        ("folder/report.pdf", "report.pdf"),
        ("C:\\temp\\x.txt", "x.txt"),
        ("../../etc/passwd", "passwd"),
        ("na\u00efve \u4f60.txt", "na\u00efve \u4f60.txt"),
        ("exe\u202egpj.txt", "exegpj.txt"),
        ("a\r\nb\x00c.txt", "abc.txt"),
        (".bashrc", "bashrc"),
        ("..", "file"),
        ('a"b.txt', 'a"b.txt'),
        ("a\uff0f\uff0e\uff0e\uff0fevil.sh", "evil.sh"),  # fullwidth "/../"
        ("\u2100.txt", "c.txt"),  # one character that becomes "a/c"
        ("\u2024\u2024", "file"),  # two that become ".."
        ("x" * 50 + "." + "y" * 99, "y" * 99),
    ],
)
def test_file_names_are_cleaned(client: Any, name: str, expected: str) -> None:
    client.put("/files/" + quote(name), data=b"x")
    header = client.get("/files/" + quote(name)).headers["Content-Disposition"]
    kind, _options = parse_options_header(header)
    assert kind == "attachment"
    assert header.split("filename*=")[1] == "UTF-8''" + quote(expected, safe="")
    fallback = header.split('filename="')[1].split('"')[0]
    assert fallback.isascii()
    assert not set(fallback) & set('/\\"%\r\n\x00')


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("\u65e5\u672c\u8a9e.pdf", "file.pdf"),
        ("\u4e2d\u6587.tar.gz", "file.tar.gz"),
        ("\u4e2d \u6587.\u6587.pdf", "file.pdf"),
        ("\u4e2d\u6587", "file"),
        ("\u4e2d\u6587(1).pdf", "(1).pdf"),
        ("caf\u00e9.pdf", "cafe.pdf"),
        (".bashrc", "bashrc"),
        ('50% "off".pdf', "50_ _off_.pdf"),
    ],
)
def test_a_fallback_file_name_has_a_stem(client: Any, name: str, expected: str) -> None:
    client.put("/files/" + quote(name), data=b"x")
    header = client.get("/files/" + quote(name)).headers["Content-Disposition"]
    assert header.startswith(f'attachment; filename="{expected}"; ')


def test_headers_of_stored_files(client: Any) -> None:
    client.put(
        "/files/x.html", data=b"<script>", content_type="text/html; charset=utf-8"
    )
    headers = client.get("/files/x.html").headers
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Disposition"].startswith("attachment;")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "text",
        "text/html\u00e9",
        "a/b, c/d",
        "x/" + "y" * 300,
        "application/x-www-form-urlencoded",
    ],
)
def test_content_types_that_are_none(client: Any, sent: str) -> None:
    client.put("/files/a", data=b"x", headers={"Content-Type": sent})
    assert client.get("/files/a").headers["Content-Type"] == "application/octet-stream"


def test_files_that_others_stored(client: Any, memcached: Memcached) -> None:
    cache = memchunk.FileCache(memcached.server)
    opened.append(cache)
    for metadata in (
        b"",
        b"\xff\x00",
        b"[]",
        b"[" * 60_000,
        b"7",
        b'{"type": "a\\r\\nb/c", "filename": 3}',
    ):
        cache.set("theirs", b"x", metadata=metadata)
        read = client.get("/files/theirs")
        assert (read.status_code, read.data) == (200, b"x")
        assert read.headers["Content-Type"] == "application/octet-stream"


# Conditional requests: RFC 9110, section 13.2.2


def test_not_modified(client: Any) -> None:
    created = client.put("/files/a", data=b"x")
    etag, modified = (
        created.headers["ETag"],
        client.get("/files/a").headers["Last-Modified"],
    )
    for headers in (
        {"If-None-Match": etag},
        {"If-None-Match": f'"other", W/{etag}'},
        {"If-None-Match": "*"},
        {"If-Modified-Since": modified},
        {"If-Modified-Since": http_date(time.time() + 1000)},
    ):
        for method in (client.get, client.head):
            read = method("/files/a", headers=headers)
            assert (read.status_code, read.data) == (304, b"")
            assert read.headers["ETag"] == etag
    for headers in (
        {"If-None-Match": '"other"'},
        # The date is ignored.
        {
            "If-None-Match": '"other"',
            "If-Modified-Since": modified,
        },
        {"If-Modified-Since": http_date(1)},
        {"If-Modified-Since": "yesterday"},
    ):
        assert client.get("/files/a", headers=headers).status_code == 200


def test_preconditions_of_reads(client: Any) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    modified = client.get("/files/a").headers["Last-Modified"]
    for headers in (
        {"If-Match": etag},
        {"If-Match": "*"},
        # The date is ignored.
        {
            "If-Match": f'"other", {etag}',
            "If-Unmodified-Since": http_date(1),
        },
        {"If-Unmodified-Since": modified},
        {"If-Unmodified-Since": "yesterday"},
    ):
        assert client.get("/files/a", headers=headers).status_code == 200
    for headers in (
        {"If-Match": '"other"'},
        {"If-Match": f"W/{etag}"},
        {"If-Match": ""},
        {"If-Unmodified-Since": http_date(1)},
        {"If-Match": '"other"', "If-None-Match": etag},  # If-Match comes first
        {"If-Match": '"other"', "Range": "bytes=9-"},
    ):
        is_problem(client.get("/files/a", headers=headers), 412)
    assert client.get("/files/none", headers={"If-Match": "*"}).status_code == 404


def test_preconditions_of_put(client: Any) -> None:
    def put(data: bytes, **headers: str) -> Any:
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        return client.put("/files/a", data=data, headers=names)

    is_problem(put(b"0", If_Match="*"), 412)
    is_problem(put(b"0", If_Match='"x"'), 412)
    first = put(b"1", If_None_Match="*")
    assert first.status_code == 201
    is_problem(put(b"2", If_None_Match="*"), 412)
    is_problem(put(b"2", If_None_Match=first.headers["ETag"]), 412)
    is_problem(put(b"2", If_Match='"other"'), 412)
    is_problem(put(b"2", If_Match="W/" + first.headers["ETag"]), 412)
    is_problem(put(b"2", If_Unmodified_Since=http_date(1)), 412)
    assert client.get("/files/a").data == b"1"
    second = put(b"2", If_Match=first.headers["ETag"])
    assert second.status_code == 200
    is_problem(put(b"3", If_Match=first.headers["ETag"]), 412)
    assert put(b"3", If_Match="*").status_code == 200
    assert put(b"4", If_Unmodified_Since=http_date(time.time() + 10)).status_code == 200
    assert put(b"5", If_None_Match='"other"').status_code == 200
    assert client.get("/files/a").data == b"5"


class Overtaken(io.RawIOBase):
    """A body that lets another writer in when it is read."""

    def __init__(self, data: bytes, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._data, self._meanwhile = io.BytesIO(data), meanwhile

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()
        return self._data.read(size)


@pytest.mark.parametrize("there", [True, False])
def test_preconditions_hold_to_the_end_of_an_upload(client: Any, there: bool) -> None:
    headers = {"If-None-Match": "*"}
    if there:
        headers = {"If-Match": client.put("/files/a", data=b"old").headers["ETag"]}
    stream = Overtaken(b"mine", lambda: client.put("/files/a", data=b"theirs"))
    upload = send(client, "PUT", "/files/a", stream, 4, headers=headers)
    is_problem(upload, 412)
    assert client.get("/files/a").data == b"theirs"


def test_a_file_deleted_during_a_conditional_upload(client: Any) -> None:
    etag = client.put("/files/a", data=b"old").headers["ETag"]
    stream = Overtaken(b"mine", lambda: client.delete("/files/a"))
    headers = {"If-Match": etag}
    is_problem(send(client, "PUT", "/files/a", stream, 4, headers=headers), 412)
    is_problem(client.get("/files/a"), 404)


def test_two_posts_at_once(client: Any) -> None:
    stream = Overtaken(b"mine", lambda: client.post("/files/a", data=b"theirs"))
    is_problem(send(client, "POST", "/files/a", stream, 4), 409)
    assert client.get("/files/a").data == b"theirs"


def test_preconditions_of_delete(client: Any) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    is_problem(client.delete("/files/a", headers={"If-Match": '"other"'}), 412)
    is_problem(client.delete("/files/a", headers={"If-None-Match": "*"}), 412)
    is_problem(
        client.delete("/files/a", headers={"If-Unmodified-Since": http_date(1)}), 412
    )
    is_problem(client.delete("/files/none", headers={"If-Match": "*"}), 404)
    assert client.delete("/files/a", headers={"If-Match": etag}).status_code == 204


# Ranges


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, 5000),
        ("bytes=999-1000", 999, 1001),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=4999-", 4999, 5000),
        ("bytes=-1", 4999, 5000),
        ("bytes=-5000", 0, 5000),
        ("bytes=-9999", 0, 5000),
        ("bytes=10-9999999999999999999999", 10, 5000),
        ("BYTES=1-2", 1, 3),
    ],
)
def test_ranges(client: Any, header: str, start: int, stop: int) -> None:
    data = content(5 * CHUNK)
    client.put("/files/a", data=data)
    read = client.get("/files/a", headers={"Range": header})
    assert (read.status_code, read.data) == (206, data[start:stop])
    assert read.headers["Content-Range"] == f"bytes {start}-{stop - 1}/5000"
    assert read.headers["Content-Length"] == str(stop - start)
    head = client.head("/files/a", headers={"Range": header})
    assert (head.status_code, head.headers["Content-Length"]) == (200, "5000")
    assert "Content-Range" not in head.headers


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-1,3-4",
        "lines=0-1",
        "bytes=2-1",
        "bytes=-",
        "bytes= -",
        "bytes",
        "bytes=a-b",
        "0-1",
        "bytes=1-2x",
    ],
)
def test_ranges_to_ignore(client: Any, header: str) -> None:
    client.put("/files/a", data=b"0123456789")
    read = client.get("/files/a", headers={"Range": header})
    assert (read.status_code, read.data) == (200, b"0123456789")


@pytest.mark.parametrize(
    "header", ["bytes=10-", "bytes=10-20", "bytes=-0", "bytes=99999999999999999-"]
)
def test_ranges_that_cannot_be(client: Any, header: str) -> None:
    client.put("/files/a", data=b"0123456789")
    read = client.get("/files/a", headers={"Range": header})
    assert is_problem(read, 416)["size"] == 10
    assert read.headers["Content-Range"] == "bytes */10"


def test_a_412_says_what_is_true(client: Any) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    for path, headers, words in (
        ("/files/a", {"If-None-Match": "*"}, "There is a file of this name"),
        ("/files/a", {"If-None-Match": etag}, "There is a file of this name"),
        ("/files/a", {"If-Match": '"other"'}, "ETag is none that If-Match names"),
        ("/files/none", {"If-Match": "*"}, "There is no file of this name"),
        ("/files/a", {"If-Unmodified-Since": http_date(1)}, "after the date"),
    ):
        assert (
            words
            in is_problem(client.put(path, data=b"y", headers=headers), 412)["detail"]
        )
    for there, headers, words in (
        (False, {"If-None-Match": "*"}, "Meanwhile another upload"),
        (True, {"If-Match": etag}, "has changed"),
    ):
        path = "/files/a" if there else "/files/b"
        stream = Overtaken(b"mine", functools.partial(client.put, path, data=b"theirs"))
        overtaken = send(client, "PUT", path, stream, 4, headers=headers)
        assert words in is_problem(overtaken, 412)["detail"]


def test_post_honours_preconditions(client: Any) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    is_problem(client.post("/files/a", data=b"y", headers={"If-Match": etag}), 409)
    is_problem(client.post("/files/a", data=b"y", headers={"If-Match": '"other"'}), 412)
    is_problem(client.post("/files/b", data=b"y", headers={"If-Match": "*"}), 412)
    assert (
        client.post("/files/b", data=b"y", headers={"If-None-Match": "*"}).status_code
        == 201
    )


def test_ranges_of_an_empty_file(client: Any) -> None:
    client.put("/files/a", data=b"")
    is_problem(client.get("/files/a", headers={"Range": "bytes=0-0"}), 416)
    read = client.get("/files/a", headers={"Range": "bytes=-5"})
    assert (read.status_code, read.data) == (200, b"")


def test_if_range(client: Any) -> None:
    etag = client.put("/files/a", data=b"0123456789").headers["ETag"]
    modified = client.get("/files/a").headers["Last-Modified"]
    for value, status in (
        (etag, 206),
        (modified, 200),  # a second has room for two versions
        ('"other"', 200),
        (f"W/{etag}", 200),
        (http_date(time.time() + 1000), 200),
        (http_date(1), 200),
        ("nonsense", 200),
    ):
        read = client.get("/files/a", headers={"Range": "bytes=2-3", "If-Range": value})
        assert read.status_code == status, value
        assert read.data == (b"23" if status == 206 else b"0123456789")
    past = {"Range": "bytes=99-", "If-Range": '"other"'}
    assert client.get("/files/a", headers=past).status_code == 200


def test_a_range_fetches_only_the_chunks_that_it_touches(memcached: Memcached) -> None:
    client = make(memcached)
    client.put("/files/a", data=content(100 * CHUNK))
    before = int(memcached.stats()["get_hits"])
    read = client.get(
        "/files/a", headers={"Range": f"bytes={40 * CHUNK + 1}-{42 * CHUNK}"}
    )
    start, stop = 40 * CHUNK + 1, 42 * CHUNK + 1
    assert read.data == content(100 * CHUNK)[start:stop]
    # The manifest and three chunks.
    assert int(memcached.stats()["get_hits"]) - before == 1 + 3


def test_a_limit_on_answers(memcached: Memcached) -> None:
    client = make(memcached, max_response=2500)
    data = content(6000)
    client.put("/files/a", data=data)
    problem = is_problem(client.get("/files/a"), 403)
    assert "Range: bytes=0-" in problem["detail"]
    assert (problem["size"], problem["limit"]) == (6000, 2500)
    assert client.head("/files/a").headers["Content-Length"] == "6000"
    received = b""
    while len(received) < 6000:
        read = client.get("/files/a", headers={"Range": f"bytes={len(received)}-"})
        assert read.status_code == 206
        assert len(read.data) <= 2500
        received += read.data
    assert received == data
    client.put("/files/b", data=data[:2500])
    assert client.get("/files/b").data == data[:2500]


# What memcached may do to a file


def test_evicted(client: Any, memcached: Memcached) -> None:
    created = client.put("/files/a", data=content(5 * CHUNK))
    memcached.delete(chunk_key(memcached, created, 3))
    is_problem(client.get("/files/a"), 410)
    assert client.head("/files/a").status_code == 410
    is_problem(client.get("/files/a", headers={"Range": "bytes=3500-3501"}), 410)
    assert client.get("/files/a", headers={"Range": "bytes=0-9"}).data == content(10)
    is_problem(client.get("/files/a?info"), 410)
    # A dead file blocks no name.
    assert client.post("/files/a", data=b"new").status_code == 201
    assert client.get("/files/a").data == b"new"


def test_a_dead_file_is_none_for_if_none_match(
    client: Any, memcached: Memcached
) -> None:
    created = client.put("/files/a", data=content(5 * CHUNK))
    memcached.delete(chunk_key(memcached, created, 3))
    new = client.put("/files/a", data=b"new", headers={"If-None-Match": "*"})
    assert new.status_code == 201
    assert client.get("/files/a").data == b"new"
    is_problem(client.put("/files/a", data=b"x", headers={"If-None-Match": "*"}), 412)


def test_what_reads_no_payload(memcached: Memcached) -> None:
    """Neither a HEAD, nor an upload that the name refuses, nor one byte with a
    digest."""
    client = make(memcached)
    client.put("/files/a", data=content(100 * CHUNK))

    def hits() -> int:
        return int(memcached.stats()["get_hits"])

    before = hits()
    assert client.head("/files/a").headers["Content-Length"] == str(100 * CHUNK)
    is_problem(client.post("/files/a", data=b"x"), 409)
    is_problem(client.put("/files/a", data=b"x", headers={"If-None-Match": "*"}), 412)
    assert client.get("/files/a?info").json["size"] == 100 * CHUNK
    wanted = {"Range": "bytes=0-0", "Want-Repr-Digest": "sha-256=1"}
    assert client.get("/files/a", headers=wanted).data == b"\0"
    assert hits() - before < 20  # manifests, and one chunk


def test_a_refused_name_is_refused_before_the_body_is_read(client: Any) -> None:
    client.put("/files/a", data=b"x")
    for method, headers in (("POST", {}), ("PUT", {"If-None-Match": "*"})):
        stream = io.BytesIO(bytes(MIB))
        send(client, method, "/files/a", stream, MIB, headers=headers)
        assert stream.tell() == 0


def test_damaged(client: Any, memcached: Memcached) -> None:
    created = client.put("/files/a", data=content(5 * CHUNK))
    damage(memcached, chunk_key(memcached, created, 3))
    is_problem(client.get("/files/a"), 502)
    is_problem(client.get("/files/a", headers={"Range": "bytes=3500-3501"}), 502)
    is_problem(client.get("/files/a", headers={"Want-Repr-Digest": "sha-256=1"}), 502)
    assert client.get("/files/a", headers={"Range": "bytes=0-9"}).data == content(10)


def test_a_damaged_manifest(client: Any, memcached: Memcached) -> None:
    created = client.put("/files/a", data=b"x")
    (manifest,) = filter(lambda key: version(created) not in key, memcached.keys())
    damage(memcached, manifest)
    is_problem(client.get("/files/a"), 502)
    is_problem(client.put("/files/a", data=b"y", headers={"If-Match": "*"}), 412)
    assert client.put("/files/a", data=b"y").status_code == 201
    assert client.get("/files/a").data == b"y"


def test_a_file_replaced_while_it_is_read(
    memcached: Memcached, monkeypatch: Any
) -> None:
    client = make(memcached)
    client.put("/files/a", data=content(5 * CHUNK))
    opened = memchunk.FileCache.open

    def overtaken(cache: memchunk.FileCache, name: str) -> memchunk.CachedFile:
        file = opened(cache, name)
        monkeypatch.undo()
        client.put("/files/a", data=content(5 * CHUNK, seed=1))
        return file

    monkeypatch.setattr(memchunk.FileCache, "open", overtaken)
    assert client.get("/files/a").data == content(5 * CHUNK, seed=1)


def test_a_file_replaced_all_the_time(client: Any, monkeypatch: Any) -> None:
    client.put("/files/a", data=content(5 * CHUNK))
    opened_file = memchunk.FileCache.open

    def overtaken(cache: memchunk.FileCache, name: str) -> memchunk.CachedFile:
        file = opened_file(cache, name)
        client.put("/files/a", data=content(5 * CHUNK))
        return file

    monkeypatch.setattr(memchunk.FileCache, "open", overtaken)
    answer = client.get("/files/a")
    is_problem(answer, 503)
    assert int(answer.headers["Retry-After"]) > 0


def test_no_memcached(memcached: Memcached) -> None:
    client = make(memcached)
    client.put("/files/a", data=b"x")
    assert client.get("/readyz").status_code == 200
    memcached.kill()
    for answer in (
        client.get("/files/a"),
        client.put("/files/a", data=b"x"),
        client.post("/files", data=b"x"),
        client.delete("/files/a"),
    ):
        problem = is_problem(answer, 503)
        assert int(answer.headers["Retry-After"]) > 0
        assert memcached.server not in json.dumps(problem)
    assert client.get("/healthz").status_code == 200


def test_readyz_tells_the_state_of_each_server(start_memcached: Start) -> None:
    """It is ready while some server answers, also if the other is frozen."""
    first, second = start_memcached(), start_memcached()
    servers = mcpool.connect([first.server, second.server])
    cache = memchunk.FileCache(servers)
    opened.append(cache)
    client = Client(wsgi.Application(cache))
    states = {first.server: "ok", second.server: "ok"}
    assert client.get("/readyz?all").json == {"status": "ok", "servers": states}
    second.pause()
    states[second.server] = "no answer"
    assert client.get("/readyz").json == {"status": "ok", "servers": states}
    problem = is_problem(client.get("/readyz?all"), 503)
    assert problem["servers"] == states
    second.resume()
    first.kill()
    second.kill()
    problem = is_problem(client.get("/readyz"), 503)
    assert set(problem["servers"].values()) == {"no answer"}


def test_a_file_of_an_unknown_format_stays(
    client: Any, memcached: Memcached, caplog: Any
) -> None:
    client.put("/files/a", data=b"x")
    [key] = memcached.keys()
    body = memcached.read(key)[4:].replace(b'"format":2', b'"format":3')
    value = zlib.crc32(body).to_bytes(4, "big") + body
    memcached.write(key, value)
    for answer in (client.get("/files/a"), client.post("/files/a", data=b"y")):
        is_problem(answer, 502)
    assert "its format 3 is unknown" in caplog.text
    assert memcached.read(key) == value


def test_memcached_that_does_not_answer(memcached: Memcached) -> None:
    client = make(memcached, timeout=0.2)
    assert make(memcached).put("/files/a", data=b"x").status_code == 201
    memcached.pause()
    try:
        is_problem(client.get("/files/a"), 503)
    finally:
        memcached.resume()


def test_a_cache_too_small(start_memcached: Callable[..., Memcached]) -> None:
    client = make(start_memcached("-m", "2"), chunk_size=None)
    is_problem(client.put("/files/a", data=content(20 * MIB)), 507)
    is_problem(client.get("/files/a"), 404)


def test_nothing_internal_in_a_500(client: Any, monkeypatch: Any, caplog: Any) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the secret")

    monkeypatch.setattr(memchunk.FileCache, "open", fail)
    answer = client.get("/files/a")
    is_problem(answer, 500)
    assert "secret" not in answer.text
    assert "the secret" in caplog.text
    assert "GET '/files/a'" in caplog.text


# Bodies


def test_a_body_cut_off(client: Any, memcached: Memcached) -> None:
    client.put("/files/a", data=b"old")
    items = memcached.keys()
    for path in ("/files/a", "/files/b"):
        stream = io.BytesIO(content(9999))
        is_problem(send(client, "PUT", path, stream, 10000), 400)
    assert memcached.keys() == items
    assert client.get("/files/a").data == b"old"


def test_bytes_after_the_content_length_are_not_read(client: Any) -> None:
    stream = io.BytesIO(b"0123456789")
    assert send(client, "PUT", "/files/a", stream, 4).status_code == 201
    assert client.get("/files/a").data == b"0123"
    assert stream.tell() == 4


def test_chunked_transfer_coding(client: Any) -> None:
    chunked = {"Transfer-Encoding": "chunked"}
    is_problem(
        send(client, "PUT", "/files/a", io.BytesIO(b"x"), None, headers=chunked), 411
    )
    ends = {"wsgi.input_terminated": True, "SERVER_SOFTWARE": "Werkzeug/3"}
    data = content(300_000)
    for headers, length in ((chunked, None), (chunked, 5), ({}, None)):
        stream = io.BytesIO(data)
        stored = send(
            client, "PUT", "/files/a", stream, length, headers=headers, environ=ends
        )
        assert stored.status_code in (200, 201)
        assert client.get("/files/a").data == data


@pytest.mark.parametrize("coding", ["gzip", "gzip, chunked", "chunked, gzip", ""])
def test_another_transfer_coding_is_refused(
    client: Any, memcached: Memcached, coding: str
) -> None:
    environ = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": coding}
    for body in (b"", b"xx"):  # gunicorn 23 shows none of it
        answer = send(
            client, "PUT", "/files/a", io.BytesIO(body), None, environ=environ
        )
        is_problem(answer, 400)
    assert memcached.keys() == []


def test_http_1_0_has_no_transfer_coding(client: Any, memcached: Memcached) -> None:
    """waitress shows the body of such a request as empty, or its framing as the
    body."""
    environ = {"HTTP_TRANSFER_ENCODING": "chunked", "SERVER_PROTOCOL": "HTTP/1.0"}
    environ["wsgi.input_terminated"] = "yes"
    answer = send(client, "PUT", "/files/a", io.BytesIO(b"x"), None, environ=environ)
    is_problem(answer, 400)
    assert memcached.keys() == []


def test_a_body_that_cannot_be_read(client: Any, memcached: Memcached) -> None:
    def fail() -> None:
        raise OSError("Invalid chunk header")

    ends = {"wsgi.input_terminated": True, "SERVER_SOFTWARE": "Werkzeug/3"}
    for environ, length in ((ends, None), ({}, 4)):
        stream = Overtaken(b"", fail)
        is_problem(
            send(client, "PUT", "/files/a", stream, length, environ=environ), 400
        )
    assert memcached.keys() == []


@pytest.mark.parametrize("length", ["-1", "x", "1_0", "+1", "1,1", "\u0661"])
def test_a_length_that_is_none(client: Any, length: str) -> None:
    is_problem(
        client.put("/files/a", environ_overrides={"CONTENT_LENGTH": length}), 400
    )


def test_a_refused_body_is_read_after_the_answer(client: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(httpfiles, "DRAIN_SECONDS", WAIT)
    stream = io.BytesIO(bytes(60 * MIB))
    refused = send(client, "PUT", "/files/a", stream, 60 * MIB)
    assert refused.status_code == 413
    assert stream.tell() == 0
    refused.close()
    assert stream.tell() == 60 * MIB


def test_no_more_than_that_of_a_refused_body(client: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(httpfiles, "DRAIN", 1_000_000)
    monkeypatch.setattr(httpfiles, "DRAIN_SECONDS", WAIT)
    stream = io.BytesIO(bytes(60 * MIB))
    send(client, "PUT", "/files/a", stream, 60 * MIB).close()
    assert 1_000_000 < stream.tell() < 2_000_000


def test_not_longer_than_seconds(client: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(httpfiles, "DRAIN_SECONDS", 0)
    stream = io.BytesIO(bytes(60 * MIB))
    send(client, "PUT", "/files/a", stream, 60 * MIB).close()
    assert stream.tell() < MIB


class Recorder(io.BytesIO):
    """A body that notes how many bytes are asked for at a time."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.sizes: list[int] = []

    def read(self, size: int | None = -1) -> bytes:
        self.sizes.append(size or 0)
        return super().read(size)


@pytest.mark.parametrize(("fast", "largest"), [(WAIT, httpfiles.PIECE), (0, 1)])
def test_reads_of_a_refused_body_are_small_while_it_comes_slowly(
    client: Any, monkeypatch: Any, fast: float, largest: int
) -> None:
    """Hosts wait for all bytes of a read: a sender that drips must not hold a
    thread."""
    monkeypatch.setattr(httpfiles, "FAST", fast)
    monkeypatch.setattr(httpfiles, "DRAIN_SECONDS", WAIT)
    stream = Recorder(bytes(1_000_000 if fast else 1000))
    send(client, "PUT", "/nowhere", stream, len(stream.getvalue())).close()
    assert (stream.sizes[0], max(stream.sizes)) == (1, largest)
    assert stream.tell() == len(stream.getvalue())


def test_any_refused_body_is_read_after_the_answer(memcached: Memcached) -> None:
    """Else a host would reset the connection, and a proxy would answer 502."""
    client = make(memcached, token="t")
    foreign = {"Authorization": "Bearer t", "Origin": "https://evil.example"}
    for method, path, headers, status in (
        ("PUT", "/files/a", {}, 401),
        ("PUT", "/nowhere", {}, 404),
        ("PUT", "/", {}, 405),
        ("PUT", "/files/a", foreign, 403),
    ):
        stream = io.BytesIO(bytes(MIB))
        refused = send(client, method, path, stream, MIB, headers=headers)
        assert (refused.status_code, stream.tell()) == (status, 0)
        refused.close()
        assert stream.tell() == MIB


def test_a_chunked_body_on_a_host_that_hides_a_break(client: Any) -> None:
    """Without a proof that it is whole, it is refused before a byte of it is read."""
    data = content(100_000)
    ends = {"wsgi.input_terminated": True, "SERVER_SOFTWARE": "granian"}
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    for header, status in (
        ({}, 411),
        ({"Repr-Digest": "md5=:AAAA:"}, 411),
        ({"Repr-Digest": f"sha-256=:{digest}:"}, 201),
        ({"Content-Digest": f"sha-256=:{digest}:"}, 200),
        ({"Content-Digest": f"sha-256=:{digest[:-4]}AAA=:"}, 400),
    ):
        headers = {"Transfer-Encoding": "chunked", **header}
        stream = io.BytesIO(data)
        answer = send(
            client, "PUT", "/files/a", stream, None, headers=headers, environ=ends
        )
        assert answer.status_code == status, header
        assert status != 411 or stream.tell() == 0


def test_content_range_on_any_upload(client: Any, memcached: Memcached) -> None:
    piece = {"Content-Range": "bytes 0-0/2"}
    body = form(("file", "a", b"x"))
    for path in ("/files", "/files/a"):
        is_problem(client.post(path, data=b"x", headers=piece), 400)
        is_problem(post_form(client, body, path, headers=piece), 400)
    is_problem(client.put("/files/a", data=b"x", headers=piece), 400)
    tus = {"Tus-Resumable": "1.0.0", "Upload-Length": "1", **piece}
    is_problem(client.post("/uploads", headers=tus), 400)
    is_problem(client.patch("/uploads/x", headers=tus), 400)
    assert memcached.keys() == []


def test_uploads_that_http_forbids(client: Any) -> None:
    is_problem(
        client.put("/files/a", data=b"x", headers={"Content-Encoding": "gzip"}), 415
    )
    is_problem(client.get("/files/a"), 404)


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return base64.b64encode(hashlib.new(algorithm, data).digest()).decode()


def test_digests_of_uploads(client: Any, memcached: Memcached) -> None:
    data = content(5000)
    for header in (
        f"sha-256=:{digest(b'other')}:",
        f"sha-256=:{digest(data)}:, sha-512=:{digest(b'other', 'sha512')}:",
        "sha-256=:x:",
        "sha-256=x",
        "sha-256",
        f"sha-256=:{digest(data)}:,",
        f"sha-256=:{digest(data)}: sha-512=1",
        f"sha-256=:{digest(data)}",
        f'a="unended, sha-256=:{digest(data)}:',
        f'sha-256=:{digest(data)}:, a="unended',
        # the last one counts
        f"sha-256=:{digest(data)}:, sha-256=:{digest(b'other')}:",
        f"sha-256=:{digest(b'other')}:;q=1",
    ):
        is_problem(
            client.put("/files/a", data=data, headers={"Repr-Digest": header}), 400
        )
        assert memcached.keys() == []
    for header in (
        f"sha-256=:{digest(data)}:",
        f"sha-512=:{digest(data, 'sha512')}:, sha-256=:{digest(data)}:",
        "md5=:whatever:",
        f"sha-256=:{digest(data)}:;a=1;b",
        f'x="a, sha-256=:AAAA:, \\"b", sha-256=:{digest(data)}:',
        f"x=(1 2.5;q=?0), y;z=tok/en,sha-256=:{digest(data)}:",
        f"sha-256=:{digest(data).rstrip('=')}:",
        "",
    ):
        for field in ("Repr-Digest", "Content-Digest"):
            stored = client.put("/files/a", data=data, headers={field: header})
            assert stored.status_code in (200, 201), header


def test_content_digest_is_of_the_body_as_sent(
    client: Any, memcached: Memcached
) -> None:
    body = form(("file", "a", content(5000)))
    for value, status in ((digest(body), 201), (digest(content(5000)), 400)):
        client.delete("/files/a")
        headers = {"Content-Digest": f"sha-256=:{value}:"}
        assert (
            post_form(client, body, "/files/a", headers=headers).status_code == status
        )
    assert memcached.keys() == []
    wrong = {"Content-Digest": f"sha-256=:{digest(b'other')}:"}
    is_problem(client.put("/files/a", data=b"x", headers=wrong), 400)
    assert memcached.keys() == []


def test_a_digest_that_is_none_is_refused_before_the_body_is_read(client: Any) -> None:
    for field in ("Repr-Digest", "Content-Digest"):
        stream = io.BytesIO(bytes(MIB))
        is_problem(
            send(client, "PUT", "/files/a", stream, MIB, headers={field: "sha-256"}),
            400,
        )
        assert stream.tell() == 0


def test_digests_of_downloads(client: Any) -> None:
    data = content(5000)
    client.put("/files/a", data=data)
    assert "Repr-Digest" not in client.get("/files/a").headers
    for wanted, expected in (
        ("sha-256=10", f"sha-256=:{digest(data)}:"),
        ("sha-512=9, sha-256=1", f"sha-512=:{digest(data, 'sha512')}:"),
        ("sha-256=0", None),
        ("sha-256=-1", None),
        ("md5=10", None),
        ("nonsense", None),
    ):
        headers = {"Want-Repr-Digest": wanted}
        assert (
            client.get("/files/a", headers=headers).headers.get("Repr-Digest")
            == expected
        )


# Forms


def form(
    *parts: tuple[str, str | None, bytes], boundary: str = "XbX", end: str = "--\r\n"
) -> bytes:
    """A multipart/form-data body of (name, file name, content)."""
    body = b""
    for name, filename, data in parts:
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        )
        if filename is not None:
            body += f'; filename="{filename}"\r\nContent-Type: image/png'.encode()
        body += b"\r\n\r\n" + data + b"\r\n"
    return body + f"--{boundary}{end}".encode()


def post_form(client: Any, body: bytes, path: str = "/files", **options: Any) -> Any:
    content_type = "multipart/form-data; boundary=XbX"
    return client.post(path, data=body, content_type=content_type, **options)


TRICKY = [
    b"",
    b"\r\n",
    b"\r",
    b"\n--XbX--\r\n",
    b"--XbX--",
    b"\r\n--Xb",
    b"a\r\n--XBX\r\n",
    b"-" * 99,
]


@pytest.mark.parametrize("data", [*TRICKY, content(300_000)], ids=len)
def test_a_file_in_a_form(client: Any, data: bytes) -> None:
    created = post_form(client, form(("file", "caf\u00e9 1.png", data)))
    assert created.status_code == 201
    read = client.get(address(created))
    assert (read.data, read.mimetype) == (data, "image/png")
    assert "filename*=UTF-8''caf%C3%A9%201.png" in read.headers["Content-Disposition"]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
def test_a_form_in_pieces_of_any_size(
    client: Any, monkeypatch: Any, piece: int
) -> None:
    monkeypatch.setattr(httpfiles, "PIECE", piece)
    for data in TRICKY:
        created = post_form(client, form(("expire", None, b"60"), ("file", "a", data)))
        assert client.get(address(created)).data == data
        assert created.json["expires"] - created.json["created"] == 60


def test_bytes_beside_the_file_that_fit(client: Any) -> None:
    spare = [("other", None, b"x" * 10_000)]
    body = (
        b"x" * 10_000
        + b"\r\n"
        + form(*spare, ("file", "a", b"1"), *spare)
        + b"x" * 10_000
    )
    created = post_form(client, body)
    assert client.get(address(created)).data == b"1"


def test_forms_for_put_and_named_post(client: Any) -> None:
    content_type = "multipart/form-data; boundary=XbX"
    body = form(("file", "x.png", b"data"))
    assert (
        client.put("/files/a", data=body, content_type=content_type).status_code == 201
    )
    assert post_form(client, body, "/files/b?expire=9").json["expires"] is not None
    assert client.get("/files/a").data == client.get("/files/b").data == b"data"


@pytest.mark.parametrize(
    "before",
    [
        [("other", None, b"1")],
        [("field", None, b"{}")],  # FilePond sends two parts of one name
        [("file", None, b"no file")],
        [("field", "", b""), ("file", "", b"")],  # a browser sends this for no file
    ],
)
@pytest.mark.parametrize("field", ["file", "data", "files[]", "filepond", ""])
def test_the_file_of_a_form_is_the_first_part_that_has_a_file_name(
    client: Any, field: str, before: list[tuple[str, str | None, bytes]]
) -> None:
    named = {"field": field}
    parts = [(named.get(name, name), text, data) for name, text, data in before]
    body = form(*parts, (field, "a.png", b"1"), ("file", None, b"2"), ("file", "", b""))
    created = post_form(client, body)
    assert created.status_code == 201
    read = client.get(address(created))
    assert (read.data, read.mimetype) == (b"1", "image/png")
    assert 'filename="a.png"' in read.headers["Content-Disposition"]


def test_a_form_without_a_file_name_says_what_to_do(client: Any) -> None:
    problem = is_problem(post_form(client, form(("file", None, b"text"))), 400)
    assert "-F file=@PATH" in problem["detail"]


def coded(coding: str, where: str) -> bytes:
    """A form with a Content-Transfer-Encoding in the file's part, or the one before."""
    body = form(("other", None, b"eA=="), ("file", "a", b"eA=="))
    head = f'name="{where}"'.encode()
    header = f"\r\nContent-Transfer-Encoding: {coding}".encode()
    before, _, after = body.partition(head)
    rest, end, more = after.partition(b"\r\n\r\n")
    return before + head + rest + header + end + more


@pytest.mark.parametrize("where", ["other", "file"])
@pytest.mark.parametrize("coding", ["base64", "Quoted-Printable", "x-uuencode", ""])
def test_a_form_part_in_a_transfer_encoding_is_refused(
    client: Any, memcached: Memcached, coding: str, where: str
) -> None:
    is_problem(post_form(client, coded(coding, where)), 400)
    assert memcached.keys() == []


@pytest.mark.parametrize("coding", ["binary", "7bit", "8bit", "BINARY"])
def test_a_form_part_in_a_coding_that_changes_no_byte(client: Any, coding: str) -> None:
    created = post_form(client, coded(coding, "file"))
    assert client.get(address(created)).data == b"eA=="


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"--XbX--\r\n",
        form(("other", None, b"x")),
        form(("file", "", b"")),
        form(("file", None, b"1")),
        form(("file", "a", b"1"), end=""),
        form(("file", "a", b"1"), end="-"),
        form(("file", "a", b"1"), end="x"),
        form(("expire", None, b"x" * 5000), ("file", "a", b"1")),
        form(("expire", None, b"soon"), ("file", "a", b"1")),
        form(("file", "a", b"1"), ("expire", None, b"60")),
        form(*[("other", None, b"")] * 2000, ("file", "a", b"1")),
        form(("file", "a", b"1"), *[("other", None, b"")] * 2000),
        b"x" * 70_000 + b"\r\n" + form(("file", "a", b"1")),
        form(("file", "a", b"1")) + b"x" * 70_000,
        form(("other", None, b"x" * 70_000), ("file", "a", b"1")),
        form(("file", "a", b"1"), ("other", None, b"x" * 70_000)),
        b"--XbX\r\n" + b"x" * 100_000,
        b"--XbX\r\nContent-Disposition: form-data; name=file\r\n\r\nabc",
        b"--XbX\r\n\r\nContent-Disposition: form-data; name=file\r\n\r\nabc\r\n"
        b"--XbX--\r\n",
    ],
    ids=len,
)
def test_broken_forms(client: Any, memcached: Memcached, body: bytes) -> None:
    is_problem(post_form(client, body), 400)
    assert memcached.keys() == []


@pytest.mark.parametrize(
    "options", ["", "; boundary=", "; boundary=" + "x" * 71, "; boundary=\u00e9"]
)
def test_forms_without_a_boundary(client: Any, options: str) -> None:
    headers = {"Content-Type": "multipart/form-data" + options}
    is_problem(
        client.post("/files", data=form(("file", "a", b"1")), headers=headers), 400
    )


def test_a_form_over_the_limit(memcached: Memcached) -> None:
    client = make(memcached, max_size=10_000)
    assert post_form(client, form(("file", "a", content(10_000)))).status_code == 201
    items = memcached.keys()
    # One that the length gives away, one that it doesn't.
    for size in (
        10_001,
        100_001,
    ):
        assert (
            is_problem(post_form(client, form(("file", "a", content(size)))), 413)[
                "limit"
            ]
            == 10_000
        )
    assert memcached.keys() == items


@dataclasses.dataclass
class Endless(io.RawIOBase):
    """A body of zeros between two ends, made as it is read."""

    head: bytes
    size: int
    tail: bytes

    def __post_init__(self) -> None:
        self.length = len(self.head) + self.size + len(self.tail)
        self._pieces = filter(None, self._make())

    def _make(self) -> Iterator[bytes]:
        yield self.head
        for _ in range(self.size // 65536):
            yield bytes(65536)
        yield self.tail

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return next(self._pieces, b"")


@pytest.mark.parametrize("is_form", [False, True])
def test_memory_does_not_grow_with_an_upload(
    memcached: Memcached, is_form: bool
) -> None:
    client = make(memcached, chunk_size=None)
    head, _, tail = form(("file", "a", b"|")).partition(b"|")
    # Not as a header: the test client would put a boundary of its own there.
    environ = {"CONTENT_TYPE": "multipart/form-data; boundary=XbX"} if is_form else {}
    peaks = []
    for size in (8 * MIB, 48 * MIB):
        body = Endless(head, size, tail) if is_form else Endless(b"", size, b"")
        tracemalloc.start()
        stored = send(client, "PUT", "/files/a", body, body.length, environ=environ)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert stored.json["size"] == size
    assert peaks[1] - peaks[0] < MIB
    assert peaks[1] < 8 * MIB


def test_a_download_holds_the_file_once(memcached: Memcached) -> None:
    client = make(memcached, chunk_size=None)
    client.put("/files/a", data=bytes(40 * MIB))
    for headers in ({}, {"Range": "bytes=1-"}, {"Want-Repr-Digest": "sha-256=1"}):
        tracemalloc.start()
        # The first piece is taken, and all is held.
        read = client.get("/files/a", headers=headers)
        assert read.content_length >= 40 * MIB - 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        read.close()
        assert peak < 48 * MIB, headers


# Other requests


def test_an_upgrade_that_is_not_spoken_is_ignored(client: Any) -> None:
    client.put("/files/a", data=b"x")
    headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
    for path in ("/files/a", "/", "/healthz"):
        assert client.get(path, headers=headers).status_code == 200


def test_options(client: Any) -> None:
    for path, allowed in (
        ("/files/a", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"),
        ("/files", "OPTIONS, POST"),
        ("/", "GET, HEAD, OPTIONS"),
    ):
        answer = client.options(path)
        assert (answer.status_code, answer.data, answer.headers["Allow"]) == (
            204,
            b"",
            allowed,
        )
    assert client.options("*").status_code == 204
    is_problem(client.options("/nowhere"), 404)


def test_methods_and_addresses_that_are_none(client: Any) -> None:
    answer = client.patch("/files", data=b"x")
    is_problem(answer, 405)
    assert answer.headers["Allow"] == "OPTIONS, POST"
    is_problem(client.get("/files"), 405)
    is_problem(client.get("/nowhere"), 404)
    is_problem(client.open("/files/a", method="BREW"), 405)


def test_errors_are_not_kept_by_caches(memcached: Memcached) -> None:
    client = make(memcached, token="t")
    token = {"Authorization": "Bearer t"}
    client.put("/files/a", data=b"x", headers=token)
    for headers in ({}, BROWSER):
        for answer, status in (
            (client.get("/nowhere", headers=headers), 404),
            (client.get("/files/a", headers=headers), 401),
            (client.put("/", headers=headers), 405),
            (client.get("/files/b", headers={**headers, **token}), 404),
            (
                client.get(
                    "/files/a", headers={**headers, **token, "Range": "bytes=9-"}
                ),
                416,
            ),
        ):
            assert answer.status_code == status
            assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("key", ["PATH_INFO", "SCRIPT_NAME", "QUERY_STRING"])
def test_an_environment_that_wsgi_forbids(client: Any, key: str) -> None:
    # Bytes as Latin-1, says PEP 3333.
    environ = {
        **create_environ("/healthz"),
        key: "/\u4f60",
    }
    data, status, headers = run_wsgi_app(client.application, environ)
    assert (status[:3], headers["Cache-Control"]) == ("400", "no-store")
    assert json.loads(b"".join(data))["status"] == 400


def test_health(memcached: Memcached) -> None:
    client = make(memcached, token="t")
    for path in ("/healthz", "/readyz"):
        assert client.get(path).status_code == client.head(path).status_code == 200


def test_uploads_from_other_sites(client: Any) -> None:
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
    ):
        is_problem(post_form(client, form(("file", "a", b"1")), headers=headers), 403)
        is_problem(client.put("/files/a", data=b"1", headers=headers), 403)
        is_problem(client.delete("/files/a", headers=headers), 403)
    for headers in (
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost"},
        {"Origin": "https://localhost"},  # behind a proxy that speaks TLS
    ):
        assert client.put("/files/a", data=b"1", headers=headers).status_code in (
            200,
            201,
        )
    assert (
        client.get("/files/a", headers={"Sec-Fetch-Site": "cross-site"}).status_code
        == 200
    )


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("files.example", "http://files.example:8080", 201),  # nginx: Host $host
        ("files.example:81", "http://files.example", 201),
        ("[::1]:8000", "http://[::1]:8080", 201),
        ("127.0.0.1:8000", "http://files.example", 403),
        ("files.example", "http://files.example.evil.example", 403),
        ("", "null", 403),
        ("", "http://", 403),
        ("[", "http://[", 403),
    ],
)
def test_a_page_over_plain_http(
    client: Any, host: str, origin: str, status: int
) -> None:
    """Browsers send no Sec-Fetch-Site there, and proxies change the Host."""
    headers = {"Host": host, "Origin": origin}
    assert client.post("/files", data=b"x", headers=headers).status_code == status


def test_a_page_behind_a_proxy_that_changes_the_host(client: Any) -> None:
    """Its script sends what a page of another site may not send without asking."""
    headers = {"Host": "127.0.0.1:8000", "Origin": "http://files.example"}
    tus = {**headers, "Tus-Resumable": "1.0.0", "Upload-Length": "3"}
    assert client.post("/uploads", headers=tus).status_code == 201
    assert client.put("/files/a", data=b"x", headers=headers).status_code == 201
    png = {**headers, "Content-Type": "image/png"}
    assert client.post("/files", data=b"x", headers=png).status_code == 201
    for simple in (
        "text/plain",
        "multipart/form-data; boundary=XbX",
        "Text/Plain; x=y",
        "",
    ):
        simply = {**headers, "Content-Type": simple}
        is_problem(client.post("/files", data=b"x", headers=simply), 403)
    tus["Sec-Fetch-Site"] = "cross-site"
    is_problem(client.post("/uploads", headers=tus), 403)
    asked = client.options(
        "/uploads", headers={**headers, "Access-Control-Request-Method": "POST"}
    )
    assert "Access-Control" not in str(asked.headers)


def test_proxies(memcached: Memcached) -> None:
    sent = {"Host": "127.0.0.1:8000", "X-Forwarded-Host": "files.example"}
    sent.update({"X-Forwarded-Prefix": "/store", "Origin": "https://files.example"})
    is_problem(make(memcached).post("/files", data=b"x", headers=sent), 403)
    client = make(memcached, proxies=1)
    created = client.post("/files", data=b"x", headers=sent)
    assert created.json["url"].startswith("/store/files/")
    assert created.headers["Location"].startswith("files/")
    sent["X-Forwarded-Host"] = "files.example, evil.example"
    is_problem(client.post("/files", data=b"x", headers=sent), 403)


# Other origins: https://fetch.spec.whatwg.org/#http-cors-protocol


@pytest.mark.parametrize("origins", ["https://a.example,http://b.example:81", "*"])
def test_pages_of_other_origins(memcached: Memcached, origins: str) -> None:
    client = make(memcached, token="t", origins=origins)
    page = {"Origin": "http://b.example:81", "Sec-Fetch-Site": "cross-site"}
    asks = {
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization,tus-resumable",
    }
    allowed = origins if origins == "*" else page["Origin"]
    for path in ("/files/a", "/files", "/uploads", "/uploads/x"):
        preflight = client.options(path, headers={**page, **asks})  # without the token
        assert (preflight.status_code, preflight.data) == (204, b"")
        assert preflight.headers["Access-Control-Allow-Origin"] == allowed
        assert (
            preflight.headers["Access-Control-Allow-Headers"]
            == "authorization,tus-resumable"
        )
        methods = preflight.headers["Access-Control-Allow-Methods"].split(", ")
        assert (
            "PUT" if path == "/files/a" else "POST" if "/x" not in path else "PATCH"
        ) in methods
    token = {"Authorization": "Bearer t", **page}
    stored = client.put("/files/a", data=b"x", headers=token)
    read = client.get("/files/a", headers=token)
    for answer, status in (
        (stored, 201),
        (read, 200),
        (client.get("/files/none", headers=token), 404),
        (client.get("/files/a", headers=page), 401),
        (client.options("/files/a", headers=page), 401),
    ):
        assert answer.status_code == status
        assert answer.headers["Access-Control-Allow-Origin"] == allowed
        exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
        assert {
            "ETag",
            "Location",
            "Content-Range",
            "Upload-Offset",
            "Repr-Digest",
        } <= {*exposed}
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert ("Origin" in answer.headers.get("Vary", "")) == (origins != "*")


def test_pages_of_origins_that_are_not_listed(memcached: Memcached) -> None:
    client = make(memcached, token="t", origins="https://a.example")
    for origin in (
        "https://a.example.evil",
        "http://a.example",
        "null",
        "https://a.example:444",
    ):
        page = {
            "Origin": origin,
            "Authorization": "Bearer t",
            "Sec-Fetch-Site": "cross-site",
        }
        asks = {"Access-Control-Request-Method": "PUT"}
        answers = [
            client.options("/files/a", headers={**page, **asks}),
            client.get("/files/a", headers=page),
            client.put("/files/a", data=b"x", headers=page),
        ]
        assert [answer.status_code for answer in answers] == [204, 404, 403]
        for answer in answers:
            assert "Access-Control" not in str(answer.headers)
            assert "Origin" in answer.headers["Vary"]
        is_problem(client.options("/files/a", headers={"Origin": origin, **asks}), 401)


def test_token(memcached: Memcached) -> None:
    client = make(memcached, token="s3cret")
    basic = base64.b64encode(b"anyone:s3cret").decode()
    for value in (
        None,
        "Bearer wrong",
        "Bearer",
        "Bearer s3cret2",
        "s3cret",
        "Basic s3cret",
        "Basic " + base64.b64encode(b"s3cret:").decode(),
        "Digest username=a",
        "Bearer \u00e9",
    ):
        headers = {"Authorization": value} if value else {}
        for path in ("/files/a", "/files", "/files/"):
            answer = client.post(path, data=b"x", headers=headers)
            is_problem(answer, 401)
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="memchunk"'
        is_problem(client.get("/files/a", headers=headers), 401)
    for value in (
        "Bearer s3cret",
        "bearer s3cret",
        "Bearer  s3cret ",
        f"Basic {basic}",
    ):
        headers = {"Authorization": value}
        assert client.put("/files/a", data=b"x", headers=headers).status_code in (
            200,
            201,
        )
        assert client.get("/files/a", headers=headers).data == b"x"
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("token", ["abc=def", "a=b=", "==", 'a="b;c"', "a:b"])
def test_tokens_of_any_characters(memcached: Memcached, token: str) -> None:
    client = make(memcached, token=token)
    basic = base64.b64encode(f"me:{token}".encode()).decode()
    for value in (f"Bearer {token}", f"Basic {basic}"):
        assert (
            client.get("/files/a", headers={"Authorization": value}).status_code == 404
        )
    is_problem(
        client.get("/files/a", headers={"Authorization": f"Bearer {token}x"}), 401
    )


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_several_tokens(memcached: Memcached) -> None:
    client = make(memcached, token="one, two,three,")
    for token in ("one", "two", "three"):
        assert client.get("/files/a", headers=bearer(token)).status_code == 404
    for token in ("", "one,two", "one, two,three,", "four", ","):
        is_problem(client.get("/files/a", headers=bearer(token)), 401)


def test_tokens_are_all_compared(memcached: Memcached, monkeypatch: Any) -> None:
    """So that the time that it takes doesn't tell which of them is near."""
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    client = make(memcached, token="one,two")
    monkeypatch.setattr(hmac, "compare_digest", compare)
    is_problem(client.get("/files/a", headers=bearer("one")), 404)
    assert compared == [b"one", b"two"]


def test_tokens_of_a_file_change_without_an_outage(
    memcached: Memcached, monkeypatch: Any, tmp_path: pathlib.Path, caplog: Any
) -> None:
    monkeypatch.setattr(wsgi, "TOKEN_FILE_SECONDS", 0)
    file = tmp_path / "tokens"
    file.write_text("old\n\nnew, other\n")
    client = make(memcached, token="fixed", token_file=str(file))

    def accepted() -> list[str]:
        return [
            token
            for token in ("fixed", "old", "new", "other")
            if client.get("/files/a", headers=bearer(token)).status_code == 404
        ]

    assert accepted() == ["fixed", "old", "new", "other"]
    file.write_text("new")
    assert accepted() == ["fixed", "new"]
    for broken in ("", "two words"):
        file.write_text(broken)
        assert accepted() == ["fixed", "new"]
    file.unlink()
    assert accepted() == ["fixed", "new"]
    assert caplog.text.count("the last tokens stay") == 1
    file.write_text("other")
    assert accepted() == ["fixed", "other"]


def test_a_token_file_is_read_once_in_a_while(
    memcached: Memcached, monkeypatch: Any, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(wsgi, "TOKEN_FILE_SECONDS", 10 * WAIT)
    file = tmp_path / "tokens"
    file.write_text("t")
    client = make(memcached, token_file=str(file))
    file.unlink()
    assert client.get("/files/a", headers=bearer("t")).status_code == 404
    is_problem(client.get("/files/a"), 401)
    assert 'id="token-label" hidden' not in client.get("/").text


@pytest.mark.parametrize("text", [None, b"", b"\n,\n", b"a b", b"\xff", b"\xc3\xa9"])
def test_a_token_file_that_has_none_stops_the_start(
    tmp_path: pathlib.Path, text: bytes | None
) -> None:
    file = tmp_path / "tokens"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(wsgi.SettingError, match="MEMCHUNK_TOKEN_FILE"):
        wsgi.Settings.from_environment({"MEMCHUNK_TOKEN_FILE": str(file)})


@pytest.mark.parametrize(
    "value",
    [
        "Basic \xe9",
        "Basic",
        "Basic =",
        "Basic /w==",
        "Digest \xff",
        "Bearer \xff",
        "\xff",
    ],
)
def test_credentials_that_are_none(memcached: Memcached, value: str) -> None:
    headers = {"Authorization": value}
    is_problem(make(memcached, token="t").get("/files/a", headers=headers), 401)
    is_problem(make(memcached).get("/files/a", headers=headers), 404)


def test_public_read(memcached: Memcached) -> None:
    client = make(memcached, token="t", public_read=True)
    token = {"Authorization": "Bearer t"}
    client.put("/files/a", data=b"x", headers=token)
    assert client.get("/files/a").data == b"x"
    assert client.head("/files/a").status_code == 200
    assert client.get("/files/a?info").json["size"] == 1
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        is_problem(client.open("/files/a?expire=9", method=method, data=b"y"), 401)
    is_problem(client.post("/files", data=b"y"), 401)
    for method in ("POST", "HEAD", "PATCH", "DELETE"):
        headers = {"Tus-Resumable": "1.0.0"}
        answer = client.open("/uploads/a", method=method, headers=headers)
        assert answer.status_code == 401, method
    overridden = {"X-HTTP-Method-Override": "GET"}
    is_problem(client.delete("/files/a", headers=overridden), 401)


def test_a_browser_is_asked_for_the_token(memcached: Memcached) -> None:
    answer = make(memcached, token="s3cret").get("/files/a", headers=BROWSER)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="memchunk"'


def test_words_for_browsers(client: Any) -> None:
    answer = client.get("/files/<b>", headers=BROWSER)
    assert (answer.status_code, answer.mimetype) == (404, "text/html")
    assert "Not Found" in answer.text
    assert "<b>" not in answer.text
    stored = post_form(
        client, form(("file", "a.png", b"1")), "/files?expire=60", headers=BROWSER
    )
    assert "1 bytes, kept until 20" in stored.text
    assert (stored.status_code, stored.mimetype) == (201, "text/html")
    assert f'href="{stored.headers["Location"]}"' in stored.text
    assert "default-src 'none'" in stored.headers["Content-Security-Policy"]
    named = client.put("/files/%3Ci%3E&", data=b"1", headers=BROWSER)
    assert "<i>" not in named.text


def test_the_page(memcached: Memcached) -> None:
    client = make(memcached, max_size=12345, token="t", expire=7 * 86400)
    page = client.get("/")
    assert '<option value="604800" selected>for 7 days<' in page.text
    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert "12345" in page.text
    assert "{{" not in page.text
    assert 'action="files"' in page.text
    again = client.get("/", headers={"If-None-Match": page.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_the_page_offers_no_longer_than_allowed(memcached: Memcached) -> None:
    page = make(memcached, max_expire=2 * 86400).get("/").text
    offers = re.findall(r"<option value=\"(\d+)\"( selected)?>(.*?)<", page)
    assert offers == [
        ("3600", "", "for 1 hour"),
        ("86400", "", "for 1 day"),
        ("172800", " selected", "for 2 days"),
    ]


@pytest.mark.parametrize("names", [(), ("tus.py",)])
def test_without_tus_the_page_sends_files_whole(
    memcached: Memcached, tmp_path: pathlib.Path, names: tuple[str, ...]
) -> None:
    folder = pathlib.Path(wsgi.__file__).parent
    for name in COPIED + names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tus.py").write_text("")  # PyPI has a module of this name
    script = (
        "import sys\n"
        "sys.path.insert(0, 'elsewhere')\n"
        "import wsgi, werkzeug.test\n"
        "client = werkzeug.test.Client(wsgi.application)\n"
        "print(client.post('/uploads').status_code, client.get('/').text)"
    )
    environ = {**os.environ, "MEMCHUNK_SERVERS": memcached.server}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert run.stdout.startswith(b"404 ")
    assert b'data-uploads=""' in run.stdout


@pytest.mark.parametrize("path", ["/", "/nowhere"])
def test_pages_run_what_stands_in_them_and_no_more(client: Any, path: str) -> None:
    page = client.get(path, headers=BROWSER)
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for block in re.findall(r"<(?:style|script)>(.*?)</", page.text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_mounted_under_a_prefix(client: Any) -> None:
    for path in ("/files", "/files/", "/files/a/b", "/files/a//b/"):
        method = client.put if "a" in path else client.post
        created = method(path, data=b"x", environ_overrides={"SCRIPT_NAME": "/prod"})
        stored = client.get(address(created).replace("http://localhost/prod", ""))
        assert address(created) == f"http://localhost{created.json['url']}"
        assert created.json["url"].startswith("/prod/files/")
        assert stored.data == b"x", path


def test_an_error_page_links_to_the_upload_page(client: Any) -> None:
    for path in ("/files/a/b", "/nowhere", "/nowhere/"):
        (link,) = re.findall(
            '<a href="(.*)">Upload', client.get(path, headers=BROWSER).text
        )
        assert urljoin(f"http://localhost/prod{path}", link) == "http://localhost/prod/"


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/store", "http://localhost/store/"),
        ("/a/b c", "http://localhost/a/b%20c/"),
        ("/x:y", "http://localhost/x%3Ay/"),
    ],
)
@pytest.mark.parametrize("query", ["", "?a=b%20c&d"])
def test_an_address_without_the_slash_of_the_mount_leads_to_it(
    client: Any, path: str, location: str, query: str
) -> None:
    mounted = {"SCRIPT_NAME": path, "PATH_INFO": ""}
    answer = client.get(path + query, environ_overrides=mounted)
    assert (answer.status_code, answer.data) == (308, b"")
    assert urljoin(f"http://localhost{quote(path)}", answer.headers["Location"]) == (
        location + query
    )
    proxied = f"https://files.example/more{quote(path)}"
    assert urljoin(proxied, answer.headers["Location"]).startswith(proxied + "/")
    mounted["PATH_INFO"] = "/"
    assert client.get(path, environ_overrides=mounted).status_code == 200


def test_a_page_without_a_date_of_ours(client: Any) -> None:
    """Hosts send one, and some of them would send ours beside it."""
    assert "Date" not in client.get("/").headers
    uwsgi = {"uwsgi.version": b"2.0.31"}  # the only one that sends none
    for path in ("/", "/healthz", "/nowhere"):
        answer = client.get(path, environ_overrides=uwsgi)
        assert len(answer.headers.getlist("Date")) == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("files.example", 200),
        ("FILES.example:8000", 200),
        ("b.example", 200),
        ("x.y.b.example", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("xb.example", 421),
        ("x.files.example", 421),
        ("files.example.evil.example", 421),
        ("files.example@evil.example", 421),
        ("127.0.0.1:8000", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_hosts(memcached: Memcached, host: str, status: int) -> None:
    hosts = "Files.example, .b.example [::1]"
    client = make(memcached, hosts=hosts, token="t", origins="*")
    headers = {"Host": host}
    assert client.get("/", headers=headers).status_code == status
    if status == 421:
        asks = {"Origin": "null", "Access-Control-Request-Method": "PUT"}
        for answer in (
            client.get("/files/a", headers=headers),
            client.put("/files/a", data=b"x", headers={**headers, **bearer("t")}),
            client.options("/files/a", headers={**headers, **asks}),
            client.get("/nowhere", headers=headers),
        ):
            assert is_problem(answer, 421)["title"] == "Misdirected Request"


def test_hosts_and_probes(memcached: Memcached) -> None:
    """A probe asks by IP address; a page that came by DNS rebinding has only a name."""
    client = make(memcached, hosts="files.example")
    for path in ("/healthz", "/readyz"):
        for host in ("10.0.0.7:8000", "[fd00::7]"):
            assert client.get(path, headers={"Host": host}).status_code == 200
        hostless = create_environ(path, "http://waitress.invalid")
        del hostless["HTTP_HOST"]  # as in HTTP/1.0
        assert run_wsgi_app(client.application, hostless)[1] == "200 OK"
        is_problem(client.get(path, headers={"Host": "evil.example"}), 421)


def test_hosts_behind_proxies(memcached: Memcached) -> None:
    sent = {"Host": "127.0.0.1:8000", "X-Forwarded-Host": "files.example"}
    is_problem(make(memcached, hosts="files.example").get("/", headers=sent), 421)
    client = make(memcached, hosts="files.example", proxies=1)
    assert client.get("/", headers=sent).status_code == 200
    sent["X-Forwarded-Host"] = "files.example, evil.example"
    is_problem(client.get("/", headers=sent), 421)


def test_a_host_header_that_is_none(client: Any) -> None:
    created = client.post("/files", data=b"x", headers={"Host": "<script>"})
    assert created.status_code == 201
    assert created.headers["Location"].startswith("files/")


@pytest.mark.parametrize("headers", [{}, BROWSER])
def test_wsgiref_finds_nothing(memcached: Memcached, headers: dict[str, str]) -> None:
    client = make(memcached, token="t")
    checked = Client(validator(client.application))
    auth = {**headers, "Authorization": "Bearer t"}
    with checked.put("/files/a", data=b"0123", headers=auth) as stored:
        etag = stored.headers["ETag"]
    for method, path, more in (
        ("GET", "/files/a", {}),
        ("HEAD", "/files/a", {}),
        ("GET", "/files/a", {"Range": "bytes=1-2"}),
        ("GET", "/files/a", {"Range": "bytes=9-"}),
        ("GET", "/files/a", {"If-None-Match": etag}),
        ("GET", "/files/a", {"If-Match": '"x"'}),
        ("POST", "/files/a", {}),
        ("GET", "/files/b", {}),
        ("GET", "/", {}),
        ("GET", "/healthz", {}),
        ("GET", "/readyz", {}),
        ("OPTIONS", "/files/a", {}),
        ("PATCH", "/files/a", {}),
        ("GET", "/nowhere", {}),
        ("GET", "/files/a", {"Authorization": "x"}),
        ("DELETE", "/files/a", {}),
    ):
        with checked.open(path, method=method, headers={**auth, **more}) as answer:
            assert answer.status_code < 500
    with post_form(
        checked, form(("file", "a", content(99_999))), headers=auth
    ) as upload:
        assert upload.status_code == 201


# Settings, and `python wsgi.py`


def test_settings_from_the_environment(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokens").write_text("t")
    assert wsgi.Settings.from_environment({}) == wsgi.Settings()
    environ = {
        "MEMCHUNK_SERVERS": "a:1,b:2",
        "MEMCHUNK_NAMESPACE": "n",
        "MEMCHUNK_MAX_SIZE": "1000",
        "MEMCHUNK_EXPIRE": "0",
        "MEMCHUNK_TIMEOUT": "0.5",
        "MEMCHUNK_TOKEN": "t",
        "MEMCHUNK_MAX_RESPONSE": "500",
        "MEMCHUNK_MAX_EXPIRE": "60",
        "MEMCHUNK_ORIGINS": "https://a.example, http://b.example:81",
        "MEMCHUNK_PUBLIC_READ": "1",
        "MEMCHUNK_PROXIES": "2",
        "MEMCHUNK_HOSTS": "files.example, .b.example",
        "MEMCHUNK_TOKEN_FILE": str(tmp_path / "tokens"),
        "OTHER_MEMCHUNK_SETTING": "",
    }
    origins = "https://a.example, http://b.example:81"
    expected = wsgi.Settings(
        "a:1,b:2", "n", 1000, 0, 0.5, "t", 500, 60, origins, True, 2
    )
    file = environ["MEMCHUNK_TOKEN_FILE"]
    hosts = "files.example, .b.example"
    expected = dataclasses.replace(expected, hosts=hosts, token_file=file)
    assert wsgi.Settings.from_environment(environ) == expected


def test_the_defaults_are_settings_too() -> None:
    environ = {
        f"MEMCHUNK_{field.name.upper()}": str(field.default)
        for field in dataclasses.fields(wsgi.Settings)
        if field.default not in ("", False)
    }
    environ.update(MEMCHUNK_PUBLIC_READ="0", MEMCHUNK_MAX_RESPONSE="0")
    environ.update(MEMCHUNK_MAX_EXPIRE="0", MEMCHUNK_PROXIES="0")
    assert wsgi.Settings.from_environment(environ) == wsgi.Settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MEMCHUNK_MAX_SIZE", "50M"),
        ("MEMCHUNK_MAX_SIZE", "0"),
        ("MEMCHUNK_MAX_SIZE", ""),
        ("MEMCHUNK_EXPIRE", "-1"),
        ("MEMCHUNK_TIMEOUT", "nan"),
        ("MEMCHUNK_TIMEOUT", "0"),
        ("MEMCHUNK_MAX_RESPONSE", "1.5"),
        ("MEMCHUNK_MAX_EXPIRE", "-1"),
        ("MEMCHUNK_PROXIES", "-1"),
        ("MEMCHUNK_PUBLIC_READ", "yes"),
        ("MEMCHUNK_ORIGINS", "example.com"),
        ("MEMCHUNK_ORIGINS", "https://example.com/page"),
        ("MEMCHUNK_TOKEN", ""),
        ("MEMCHUNK_TOKEN", "two words"),
        ("MEMCHUNK_TOKEN", "\u00e9"),
        ("MEMCHUNK_TOKEN", ","),
        ("MEMCHUNK_TOKEN", "one,two words"),
        ("MEMCHUNK_HOSTS", ","),
        ("MEMCHUNK_HOSTS", "*"),
        ("MEMCHUNK_HOSTS", "https://files.example"),
        ("MEMCHUNK_HOSTS", "files.example:8000"),
        ("MEMCHUNK_HOSTS", "a.example,b\u00fccher.example"),
        ("MEMCHUNK_NAMESPACE", "two words"),
        ("MEMCHUNK_SERVERS", " "),
        ("MEMCHUNK_SERVERS", ","),
    ],
)
def test_bad_settings_stop_the_start(variable: str, value: str) -> None:
    with pytest.raises(wsgi.SettingError, match=variable):
        wsgi.Settings.from_environment({variable: value}).connect()


@pytest.mark.parametrize(
    "servers",
    [
        "user:s3cret@127.0.0.1:1",
        "127.0.0.1:1,user:s3cret@localhost:1",
        "tls://user:s3cret@127.0.0.1:1",
        "user:s3cret@127.0.0.1:port",
        "user:s3,cret@127.0.0.1:1",
        "user:s3cret@127.0.0.1:1,user:s3cret@127.0.0.1:1",
    ],
)
def test_passwords_of_servers_are_neither_logged_nor_answered(
    servers: str, caplog: Any
) -> None:
    settings = wsgi.Settings.from_environment({"MEMCHUNK_SERVERS": servers})
    told = repr(settings)
    try:
        client = Client(wsgi.Application(settings.connect(), settings))
        answers = [client.get(path) for path in ("/files/a", "/readyz")]
        assert [answer.status_code for answer in answers] == [503, 503]
        told += (
            "".join(f"{answer.headers} {answer.text}" for answer in answers)
            + caplog.text
        )
    except wsgi.SettingError as error:
        told += f"{error!r}"
    assert "cret" not in told


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("MEMCHUNK_TOKENS", "MEMCHUNK_TOKEN"),
        ("MEMCHUNK_SERVER", "MEMCHUNK_SERVERS"),
        ("MEMCHUNK_MAXSIZE", "MEMCHUNK_MAX_SIZE"),
        ("MEMCHUNK_", "MEMCHUNK_"),
        ("MEMCHUNK_token", "MEMCHUNK_"),
    ],
)
def test_a_setting_that_is_unknown_stops_the_start(variable: str, nearest: str) -> None:
    expected = f"^{variable} is not a setting; the nearest is {nearest}"
    with pytest.raises(wsgi.SettingError, match=expected):
        wsgi.Settings.from_environment({variable: "x", "PATH": "/bin"})


def test_the_least_of_a_setting_is_told() -> None:
    for variable, least in (("MAX_SIZE", "1"), ("TIMEOUT", "0.001")):
        with pytest.raises(wsgi.SettingError, match=f"must be {least} to "):
            wsgi.Settings.from_environment({f"MEMCHUNK_{variable}": "0"})


def call(method: str, url: str, data: bytes | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=data, method=method)
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        return answer.status, answer.read()


@pytest.fixture
def run() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python wsgi.py` with the given arguments and environment."""
    started = []

    def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, str(pathlib.Path(wsgi.__file__)), *arguments],
                env={**os.environ, **environ},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            # And the memcached that it may have left.
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_python_wsgi_py_brings_its_own_memcached(
    run: Any, tmp_path: Any, stop: int
) -> None:
    process = run("--port", "0", TMPDIR=str(tmp_path))
    url = process.stdout.readline().split()[1]
    assert call("PUT", url + "files/a", b"x")[0] == 201
    assert call("GET", url + "files/a") == (200, b"x")
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o77 == 0
    [path] = folder.iterdir()
    cache = memchunk.FileCache(f"unix:{path}")
    cache.ping()
    process.send_signal(stop)
    assert process.wait(WAIT) == 0
    assert list(tmp_path.iterdir()) == []
    # Its idle connection has ended with it.
    with pytest.raises(memchunk.CacheUnavailable):
        cache.ping()
    cache.close()


def test_python_wsgi_py_without_memcached(run: Any, tmp_path: Any) -> None:
    process = run(PATH=str(tmp_path))
    assert process.wait(WAIT) == 1
    assert "apt-get install memcached" in process.stderr.read()


def test_python_wsgi_py_with_a_bad_setting(run: Any) -> None:
    process = run(MEMCHUNK_MAX_SIZE="50M")
    assert process.wait(WAIT) == 1
    assert (
        process.stderr.read()
        == "wsgi.py: MEMCHUNK_MAX_SIZE must be a number, not '50M'\n"
    )


@pytest.mark.parametrize(
    ("host", "token", "warns"),
    [
        ("0.0.0.0", {}, True),
        ("0.0.0.0", {"MEMCHUNK_TOKEN": "t"}, False),
        ("127.0.0.1", {}, False),
        ("localhost", {}, False),
    ],
)
def test_python_wsgi_py_warns_if_it_is_open_to_other_machines(
    run: Any, memcached: Memcached, host: str, token: dict[str, str], warns: bool
) -> None:
    environ = {"MEMCHUNK_SERVERS": memcached.server, **token}
    process = run("--host", host, "--port", "0", **environ)
    assert process.stdout.readline().startswith("memchunk: http://")  # comes after it
    process.kill()
    assert ("set MEMCHUNK_TOKEN" in process.stderr.read()) == warns


def test_python_wsgi_py_with_servers(run: Any, memcached: Memcached) -> None:
    process = run("--port", "0", MEMCHUNK_SERVERS=memcached.server)
    url = process.stdout.readline().split()[1]
    assert call("PUT", url + "files/a", b"x")[0] == 201
    with memchunk.FileCache(memcached.server) as cache:
        assert cache.get("a") == b"x"


# Whatever comes in


HEADERS = {
    "Range": [
        "bytes=0-0",
        "bytes=-7",
        "bytes=999-2001",
        "bytes=4999-",
        "bytes=-",
        "bytes=99999-",
        "bytes=-0",
        "bytes=" + "9" * 5000 + "-",
    ],
    "If-Match": [
        "ETAG",
        "ETAG",
        '"x", ETAG',
        "W/ETAG",
        "*",
        '"',
        'W/"x"',
        ",,,",
        '"a", *',
    ],
    "If-None-Match": ["ETAG", "W/ETAG", '"x"', "*", '"', 'W/"', ",,,"],
    "If-Modified-Since": [
        "Thu, 01 Jan 0000 00:00:00 GMT",
        "9" * 99,
        "Mon, 99 Foo 2020",
    ],
    "If-Unmodified-Since": [
        "Sun, 06 Nov 9999 08:49:37 GMT",
        "Thu, 01 Jan 1970 00:00:00 +9999",
    ],
    "If-Range": [
        "ETAG",
        "W/ETAG",
        '"x"',
        "W/",
        "\x7f",
        "Sun, 06 Nov 1994 08:49:37 GMT",
    ],
    "Content-Type": [
        "multipart/form-data",
        "multipart/form-data; boundary=XbX",
        "a/b; c=\xff",
        ";",
        "application/offset+octet-stream",
    ],
    "Content-Encoding": ["identity", "gzip", ""],
    "Transfer-Encoding": ["chunked", "gzip, chunked", ""],
    "Repr-Digest": [
        "sha-256=:AA==:",
        "sha-256=:=:",
        ",",
        "sha-512",
        "=",
        "sha-256=:\xff:",
    ],
    "Want-Repr-Digest": ["sha-256=1", "sha-512=99, sha-256=99", "\xff"],
    "Accept": ["text/html", "*/*;q=x", ",", "text/html;q=9999999999"],
    "Authorization": [
        "Basic",
        "Basic =",
        "Basic /w==",
        "Bearer \xff",
        "=",
        "Digest a=b",
    ],
    "Origin": ["null", "http://[", "\xff"],
    "Host": ["", "a b", "[::1", "x:99999", "\xff", "a" * 300, "xn--a"],
    "Sec-Fetch-Site": ["", "cross-site"],
    "Expect": ["100-continue", "x"],
    "Content-Range": ["bytes 0-1/2"],
    "Cookie": ["=", "\xff"],
    "Tus-Resumable": ["1.0.0", "0.2.2"],
    "Upload-Length": ["0", "10", "300", "9" * 18, "-1", "\xb2"],
    "Upload-Offset": ["0", "10", "9" * 18, "\xb2"],
    "Upload-Metadata": [
        "name YQ==",
        "name /w==",
        "name 4pi6,filename",
        " ,, ,",
        "name \xff",
    ],
    "Upload-Checksum": ["sha1 AAAA", "sha1", "crc32 AAAA", "sha256 \xff"],
    "X-HTTP-Method-Override": ["PATCH", "delete", "HEAD", "OPTIONS", "\xff"],
    "Upgrade": ["websocket"],
    "Connection": ["upgrade"],
}

CONDITIONS = [key for key in HEADERS if key == "Range" or key.startswith("If-")]


def a_header(keys: Iterable[str]) -> strategies.SearchStrategy[tuple[str, str]]:
    """One of these, with one of its values above or whatever a host lets through."""
    anything = strategies.text(
        strategies.characters(max_codepoint=255, exclude_characters="\r\n")
    )
    return strategies.sampled_from(sorted(keys)).flatmap(
        lambda key: strategies.tuples(
            strategies.just(key), strategies.sampled_from(HEADERS[key]) | anything
        )
    )


uploads = strategies.sampled_from(
    ["/uploads", "/uploads/u", "/uploads/d", "/uploads/x"]
)
path = strategies.sampled_from(
    ["/files/a", "/files/", "/files", "/", "*", "", "/healthz"]
) | (strategies.binary(max_size=40).map(lambda raw: "/files/" + raw.decode("latin-1")))


@pytest.fixture(scope="module")
def anything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wsgi.Application]:
    memcached = Memcached(tmp_path_factory.mktemp("m"))
    application = make(memcached, max_size=100_000).application
    yield application
    application.cache.close()
    memcached.kill()


def stock(application: wsgi.Application, path: str) -> dict[str, str]:
    """Put the file "a" where an earlier example may have taken it. Returns what stands
    in requests for its ETag; and for the path, where it is that of a new upload, or of
    one that is done."""
    there = {"ETAG": f'"{application.cache.set("a", content(5000)).version}"'}
    if path in ("/uploads/u", "/uploads/d"):
        headers, data = {"Tus-Resumable": "1.0.0", "Upload-Length": "300"}, b""
        if path == "/uploads/d":
            headers["Content-Type"], data = (
                "application/offset+octet-stream",
                content(300),
            )
        answer = Client(application).post("/uploads", data=data, headers=headers)
        there[path] = "/" + answer.headers["Location"]
    return there


def answer_to(
    application: wsgi.Application,
    method: str,
    path: str,
    query: str,
    headers: list[tuple[str, str]],
    body: bytes,
    terminated: bool = False,
) -> TestResponse:
    """The answer to a request as a host would pass it on. What `stock` names stands for
    that."""
    there = stock(application, path)
    environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": there.get(path, path),
        "QUERY_STRING": query,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.input_terminated": terminated,
    }
    for key, value in headers:
        environ[f"HTTP_{key.upper().replace('-', '_')}"] = value.replace(
            "ETAG", there["ETAG"]
        )
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    data, status, answer_headers = run_wsgi_app(application, environ, buffered=True)
    request = Request(create_environ())
    answer = TestResponse(data, status, answer_headers, request)
    assert 200 <= answer.status_code < 500, answer.text
    for key, value in answer.headers:
        assert all(32 <= ord(character) < 127 for character in key + value)
    return answer


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=strategies.sampled_from(
        ["GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH", "X"]
    ),
    path=path | uploads,
    query=strategies.text(strategies.characters(max_codepoint=255), max_size=20)
    | strategies.sampled_from(
        ["expire=1", "expire=-1", "expire=%FF", "expire=", "name=%FF", "name=a"]
    ),
    headers=strategies.lists(a_header(HEADERS), max_size=4),
    body=strategies.binary(max_size=300)
    | strategies.lists(
        strategies.sampled_from(
            [
                b"--XbX",
                b"\r\n",
                b"--",
                b'Content-Disposition: form-data; name="file"; filename="a"',
                b"Content-Disposition: form-data; name=file; filename*=x''%FF",
                b"\xff\x00",
                b"x" * 100,
            ]
        ),
        max_size=12,
    ).map(b"".join),
    terminated=strategies.booleans(),
)
def test_no_request_is_a_500(
    anything: wsgi.Application,
    method: str,
    path: str,
    query: str,
    headers: list[tuple[str, str]],
    body: bytes,
    terminated: bool,
) -> None:
    answer_to(anything, method, path, query, headers, body, terminated)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=strategies.sampled_from(["GET", "GET", "HEAD", "PUT", "DELETE", "PATCH"]),
    conditions=strategies.lists(a_header(CONDITIONS), min_size=1, max_size=3),
)
def test_conditions_on_a_file_that_is_there(
    anything: wsgi.Application, method: str, conditions: list[tuple[str, str]]
) -> None:
    answer = answer_to(anything, method, "/files/a", "expire=60", conditions, b"new")
    data, status = content(5000), answer.status_code
    event(f"{method} {status}")
    if status == 206:
        start, stop = map(
            int, re.findall(r"(\d+)-(\d+)/5000", answer.headers["Content-Range"])[0]
        )
        end = stop + 1
        assert answer.data == data[start:end]
    elif status == 200 and method == "GET":
        assert answer.data == data
    reads = {200, 206, 304, 412, 416} if method == "GET" else {200, 304, 412}
    changes = {"PUT": {200, 412}, "DELETE": {204, 412}, "PATCH": {200, 412}}
    assert status in changes.get(method, reads)
    there = (
        anything.cache.get("a") if status == 412 or method in ("GET", "HEAD") else data
    )
    assert there == data  # what is refused has changed nothing
