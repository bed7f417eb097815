"""The specification of the HTTP API: a section for each promise of docs/http.md and
README.md, in their order.

Edges stand in tests/, by topic: names, forms, bodies, ranges, conditions, cors,
addresses, tokens, configuration, page, tus; any_request sends anything. Real hosts are
in tests/test_hosts.py, browsers in tests/test_browser.py."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import time
import zlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import pytest
from pymemcache.client.base import PooledClient
from werkzeug.http import http_date

import mcpool
import wsgi
from tests.faults import Hook, Once, Wrapped, raising
from tests.support import (
    BROWSER,
    CHUNK,
    CLOCK,
    FORM,
    MIB,
    Memcached,
    Start,
    Stream,
    address,
    ask,
    bearer,
    cases,
    chunk_key,
    content,
    is_problem,
    make,
    multipart,
    post_form,
    send,
    version,
    wait_for,
)

DATA = content(5 * CHUNK)


def digest(data: bytes) -> str:
    """What Repr-Digest and Content-Digest say of bytes."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def hooked(memcached: Memcached, before: Hook) -> Any:
    """A client of an API whose every memcached command a hook sees first."""
    return make(memcached, client=Wrapped(PooledClient(memcached.address), before))


# Requests


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK])
def test_get_returns_the_bytes_that_put_stored(client: Any, size: int) -> None:
    data = content(size)
    created = client.put("/files/a", data=data)
    assert created.status_code == 201
    read = client.get("/files/a")
    assert (read.status_code, read.data) == (200, data)
    assert read.headers["Content-Length"] == str(size)
    assert read.headers["ETag"] == created.headers["ETag"] == created.json["etag"]


def test_post_makes_up_a_name(client: Any) -> None:
    first = client.post("/files", data=b"one", content_type="image/png")
    second = client.post("/files/", data=b"two")
    assert first.status_code == second.status_code == 201
    assert len(first.json["name"]) >= 22  # 128 bits of base64
    assert first.json["name"] != second.json["name"]
    assert first.headers["Location"] == f"files/{first.json['name']}"
    assert first.json["url"] == f"/files/{first.json['name']}"
    assert client.get(address(first)).data == b"one"
    assert client.get(address(second)).data == b"two"
    assert client.get(address(first)).mimetype == "image/png"


def test_post_with_a_name_only_creates(client: Any) -> None:
    assert client.post("/files/a", data=b"one").status_code == 201
    is_problem(client.post("/files/a", data=b"two"), 409)
    assert client.get("/files/a").data == b"one"


def test_post_of_two_at_once_creates_one_file(client: Any) -> None:
    stream = Stream(b"mine", lambda: client.post("/files/a", data=b"theirs"))
    is_problem(send(client, "POST", "/files/a", stream, 4), 409)
    assert client.get("/files/a").data == b"theirs"


def test_put_creates_then_replaces(client: Any, memcached: Memcached) -> None:
    first = client.put("/files/a", data=DATA)
    second = client.put("/files/a", data=b"two")
    assert (first.status_code, second.status_code) == (201, 200)
    assert "Location" in first.headers
    assert "Location" not in second.headers
    assert first.headers["ETag"] != second.headers["ETag"]
    assert client.get("/files/a").data == b"two"
    assert version(first) not in " ".join(memcached.keys())


def test_put_of_50_mib_and_of_one_byte_more(memcached: Memcached) -> None:
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


def test_head_answers_as_get_without_the_bytes(client: Any) -> None:
    client.put("/files/a", data=DATA)
    read, head = client.get("/files/a"), client.head("/files/a")
    assert (head.status_code, head.data) == (200, b"")
    for key in ("Content-Length", "Content-Type", "ETag", "Last-Modified"):
        assert head.headers[key] == read.headers[key]


@pytest.mark.parametrize("query", ["?info", "?info=", "?info=1"])
def test_info_is_the_answer_to_the_upload(client: Any, query: str) -> None:
    stored = client.put("/files/a/b.txt?expire=60", data=b"x")
    info = client.get("/files/a/b.txt" + query)
    assert (info.status_code, info.mimetype) == (200, "application/json")
    assert info.json == stored.json
    assert info.headers["Cache-Control"] == "no-store"
    assert client.head("/files/a/b.txt" + query).status_code == 200


def test_patch_gives_a_new_time_to_live(client: Any, memcached: Memcached) -> None:
    stored = client.put("/files/a?expire=60", data=DATA)
    etag = stored.headers["ETag"]
    kept = client.patch("/files/a?expire=5000", headers={"If-Match": etag})
    assert (kept.status_code, kept.headers["ETag"]) == (200, etag)
    assert kept.json["expires"] == pytest.approx(time.time() + 5000, abs=CLOCK)
    assert {**kept.json, "expires": stored.json["expires"]} == stored.json
    assert min(memcached.expiries().values()) > time.time() + 4000
    assert client.get("/files/a?info").json == kept.json
    assert client.patch("/files/a?expire=0").json["expires"] is None


def test_delete(client: Any, memcached: Memcached) -> None:
    client.put("/files/a", data=DATA)
    deleted = client.delete("/files/a")
    assert (deleted.status_code, deleted.data) == (204, b"")
    is_problem(client.get("/files/a"), 404)
    is_problem(client.delete("/files/a"), 404)
    assert memcached.keys() == []


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/files/a", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"),
        ("/files", "OPTIONS, POST"),
        ("/uploads", "OPTIONS, POST"),
        ("/", "GET, HEAD, OPTIONS"),
        ("*", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"),
    ],
)
def test_options_tells_the_methods_of_an_address(
    client: Any, path: str, allowed: str
) -> None:
    answer = client.options(path, environ_overrides={"PATH_INFO": path})
    assert (answer.status_code, answer.data) == (204, b"")
    assert answer.headers["Allow"] == allowed


def test_uploads_resume(client: Any) -> None:
    headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
    created = client.post("/uploads?name=a", headers=headers)
    assert created.status_code == 201
    for offset in (0, 5):
        headers["Upload-Offset"] = str(offset)
        headers["Content-Type"] = "application/offset+octet-stream"
        answer = client.patch(address(created), data=b"01234", headers=headers)
        assert answer.status_code == 204
    assert client.get("/files/a").data == b"0123401234"


def test_page_is_sent_once(client: Any) -> None:
    page = client.get("/")
    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert b"<form" in page.data
    again = client.get("/", headers={"If-None-Match": page.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_needs_no_token(memcached: Memcached, path: str) -> None:
    client = make(memcached, token="t")
    assert client.get(path).json["status"] == "ok"
    assert client.get(path).headers["Cache-Control"] == "no-store"
    assert client.head(path).status_code == 200


def test_readyz_tells_the_state_of_each_server(
    start_memcached: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ready while some server answers, also if the other is frozen."""
    monkeypatch.setattr(wsgi, "READY_SECONDS", 0.2)  # the frozen one takes all of it
    first, second = start_memcached(), start_memcached()
    client = make(first, client=mcpool.connect([first.server, second.server]))
    states = {first.server: "ok", second.server: "ok"}

    def tells(path: str, status: int) -> bool:
        """A busy machine may need more than the time that it gives to a server."""
        answer = client.get(path)
        return (answer.status_code, answer.json["servers"]) == (status, states)

    wait_for(lambda: tells("/readyz?all", 200), "both to be ready")
    second.pause()
    states[second.server] = "no answer"
    wait_for(lambda: tells("/readyz", 200), "one to be ready")
    wait_for(lambda: tells("/readyz?all", 503), "not all to be ready")
    second.resume()
    first.kill()
    second.kill()
    refused = client.get("/readyz")
    assert set(is_problem(refused, 503)["servers"].values()) == {"no answer"}
    assert int(refused.headers["Retry-After"]) > 0
    assert client.get("/healthz").status_code == 200


def test_name_is_all_that_follows(client: Any) -> None:
    name = "\u4f60/b c//d?e#f%25.txt"
    created = client.put("/files/" + quote(name), data=b"x")
    assert created.json["name"] == name
    assert client.get("/files/" + quote(name, safe="")).data == b"x"


# Uploads: the body is the file, or a form


@pytest.mark.parametrize("line", ["POST /files", "POST /files/a", "PUT /files/a"])
def test_form_has_the_file(client: Any, line: str) -> None:
    fields: Any = [("other", None, b"1"), ("expire", None, b"60")]
    form = multipart(*fields, ("any", "b.png", DATA))
    created = ask(client, f"{line} | Content-Type: {FORM}", form)
    assert created.status_code == 201
    assert created.json["expires"] - created.json["created"] == 60
    read = client.get(created.json["url"])
    assert (read.data, read.mimetype) == (DATA, "image/png")
    assert 'filename="b.png"' in read.headers["Content-Disposition"]


KEPT: dict[str, tuple[dict[str, int], str, int | None]] = {
    "for ever": ({}, "", None),
    "as asked": ({}, "?expire=60", 60),
    "for a year": ({}, "?expire=31536000", 31_536_000),
    "as MEMCHUNK_EXPIRE says": ({"expire": 1000}, "", 1000),
    "as asked, not as MEMCHUNK_EXPIRE says": ({"expire": 1000}, "?expire=60", 60),
    "for ever, as asked": ({"expire": 1000}, "?expire=0", None),
    "as MEMCHUNK_MAX_EXPIRE says": ({"max_expire": 1000}, "", 1000),
    "the same for no number": ({"max_expire": 1000}, "?expire=", 1000),
    "the longest allowed": ({"max_expire": 1000}, "?expire=1000", 1000),
    "less than the longest": ({"max_expire": 1000}, "?expire=7", 7),
    "the shorter of two": ({"max_expire": 1000, "expire": 10}, "", 10),
    "the other shorter of two": ({"max_expire": 1000, "expire": 5000}, "", 1000),
}


@cases(("settings", "query", "seconds"), KEPT)
def test_expire_says_how_long_a_file_is_kept(
    memcached: Memcached, settings: Any, query: str, seconds: int | None
) -> None:
    info = make(memcached, **settings).put(f"/files/a{query}", data=DATA).json
    assert seconds == (info["expires"] and info["expires"] - info["created"])
    last = min(memcached.expiries().values())  # of the manifest
    if seconds is None:
        assert last == -1
    else:
        assert last == pytest.approx(time.time() + seconds, abs=CLOCK)


def test_expire_ends_a_file(client: Any) -> None:
    assert client.put("/files/a?expire=1", data=b"x").status_code == 201
    wait_for(lambda: client.get("/files/a").status_code == 404, "the file to expire")


@pytest.mark.parametrize("more", ["0", "1001", str(2**31 - 1), "9" * 99])
def test_expire_beyond_the_longest_is_refused(memcached: Memcached, more: str) -> None:
    client = make(memcached, max_expire=1000)
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    form = multipart(("expire", None, more.encode()), ("file", "a", b""))
    for answer in (
        client.put(f"/files/a?expire={more}", data=b"y"),
        client.patch(f"/files/a?expire={more}"),
        post_form(client, form),
    ):
        assert is_problem(answer, 400)["limit"] == 1000
    info = client.get("/files/a?info").json
    assert (info["etag"], info["expires"] - info["created"]) == (etag, 1000)


@pytest.mark.parametrize(
    ("sent", "expected"), [("text/a; b=c", "text/a; b=c"), ("", "image/png")]
)
def test_content_type_is_kept_or_guessed(client: Any, sent: str, expected: str) -> None:
    stored = ask(client, f"PUT /files/a.png | Content-Type: {sent}")
    read = client.get("/files/a.png")
    assert read.headers["Content-Type"] == stored.json["content_type"] == expected


@pytest.mark.parametrize("field", ["Repr-Digest", "Content-Digest"])
def test_digest_is_verified_before_the_file_appears(client: Any, field: str) -> None:
    client.put("/files/a", data=b"old")
    wrong = {field: digest(b"other")}
    is_problem(client.put("/files/a", data=DATA, headers=wrong), 400)
    assert client.get("/files/a").data == b"old"
    right = {field: digest(DATA)}
    assert client.put("/files/a", data=DATA, headers=right).status_code == 200
    assert client.get("/files/a").data == DATA


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[("gunicorn/23.0.0", 201), ("Werkzeug/3.1", 201), ("waitress", 201)],
        *[("gevent/26.9 Python/3", 201), ("gunicornx", 411), ("my gunicorn", 411)],
        *[("Granian", 411), ("uvicorn", 411), ("", 411)],
    ],
)
def test_chunked_body_is_taken_on_hosts_that_raise_if_it_breaks(
    client: Any, host: str, status: int
) -> None:
    environ = {"wsgi.input_terminated": True, "SERVER_SOFTWARE": host}
    options: Any = {"headers": {"Transfer-Encoding": "chunked"}, "environ": environ}
    answer = send(client, "PUT", "/files/a", Stream(DATA), None, **options)
    assert answer.status_code == status
    assert (client.get("/files/a").data == DATA) == (status == 201)


def test_body_cut_off_is_not_stored(client: Any, memcached: Memcached) -> None:
    client.put("/files/a", data=b"old")
    items = memcached.keys()
    for path in ("/files/a", "/files/b"):
        is_problem(send(client, "PUT", path, Stream(content(9999)), 10_000), 400)
    assert memcached.keys() == items
    assert client.get("/files/a").data == b"old"


def test_answer_to_an_upload_describes_the_file(client: Any) -> None:
    path = "/files/a/b c.txt"
    stored = client.put(f"{path}?expire=60", data=b"x", content_type="text/plain")
    created = stored.json["created"]
    assert abs(created - time.time()) < CLOCK
    assert stored.json == {
        "name": "a/b c.txt",
        "size": 1,
        "content_type": "text/plain",
        "etag": stored.headers["ETag"],
        "created": created,
        "expires": created + 60,
        "url": "/files/a/b%20c.txt",
    }


@pytest.mark.parametrize("mount", ["", "/prod"])
@pytest.mark.parametrize("path", ["/files", "/files/", "/files/a/b", "/files/a//b/"])
def test_location_holds_below_any_mount(client: Any, path: str, mount: str) -> None:
    created = client.post(path, data=b"x", environ_overrides={"SCRIPT_NAME": mount})
    assert created.json["url"].startswith(f"{mount}/files/")
    assert address(created) == f"http://localhost{created.json['url']}"
    assert "http:" not in created.headers["Location"]
    assert client.get("/files/" + quote(created.json["name"])).data == b"x"


# Downloads: every byte is verified before the first is sent


READS: dict[str, tuple[str, dict[str, str]]] = {
    "whole": ("/files/a", {}),
    "range": ("/files/a", {"Range": "bytes=3500-3501"}),
    "digest": ("/files/a", {"Want-Repr-Digest": "sha-256=1"}),
}


@cases(("path", "headers"), {**READS, "info": ("/files/a?info", {})})
def test_evicted_file_is_410(
    client: Any, memcached: Memcached, path: str, headers: dict[str, str]
) -> None:
    created = client.put("/files/a", data=DATA)
    memcached.delete(chunk_key(memcached, created, 3))
    is_problem(client.get(path, headers=headers), 410)
    assert client.head("/files/a").status_code == 410
    is_problem(client.patch("/files/a?expire=9"), 410)
    intact = client.get("/files/a", headers={"Range": "bytes=0-9"})
    assert (intact.status_code, intact.data) == (206, DATA[:10])


def test_evicted_file_blocks_no_name(client: Any, memcached: Memcached) -> None:
    created = client.put("/files/a", data=DATA)
    memcached.delete(chunk_key(memcached, created, 3))
    assert client.post("/files/a", data=b"new").status_code == 201
    assert client.get("/files/a").data == b"new"


def damage(memcached: Memcached, key: str) -> None:
    value = bytearray(memcached.read(key))
    value[-1] ^= 1
    memcached.write(key, bytes(value))


@cases(("path", "headers"), READS)
def test_damaged_file_is_502(
    client: Any, memcached: Memcached, path: str, headers: dict[str, str]
) -> None:
    created = client.put("/files/a", data=DATA)
    damage(memcached, chunk_key(memcached, created, 3))
    is_problem(client.get(path, headers=headers), 502)
    intact = client.get("/files/a", headers={"Range": "bytes=0-9"})
    assert (intact.status_code, intact.data) == (206, DATA[:10])


def test_damaged_manifest_is_502_until_it_is_replaced(
    client: Any, memcached: Memcached
) -> None:
    client.put("/files/a", data=b"x")
    [manifest] = memcached.keys()
    damage(memcached, manifest)
    is_problem(client.get("/files/a"), 502)
    is_problem(client.put("/files/a", data=b"y", headers={"If-Match": "*"}), 412)
    assert client.put("/files/a", data=b"y").status_code == 201
    assert client.get("/files/a").data == b"y"


def test_unknown_format_is_refused_and_stays(
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


READS_OF_CHUNKS = {"at its start": [1], "in its midst": [2], "always": range(1, 99)}


@cases("reads", READS_OF_CHUNKS)
def test_file_replaced_while_it_is_read_is_read_again(
    memcached: Memcached, reads: Sequence[int]
) -> None:
    size, numbers, seeds = 4 * MIB, itertools.count(1), itertools.count(1)
    other = make(memcached, 400_000)  # with which it takes several reads
    other.put("/files/a", data=bytes(size))

    def overtake(command: str) -> None:
        if command == "get_many" and next(numbers) in reads:
            other.put("/files/a", data=bytes([next(seeds)]) * size)
            other.head("/files/a")  # after that the old chunks are gone, too

    answer = hooked(memcached, overtake).get("/files/a")
    if len(reads) == 1:
        assert answer.data == b"\1" * size
    else:
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=999-1000", (999, 1001)),
        ("bytes=4000-", (4000, 5000)),
        ("bytes=-10", (4990, 5000)),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
    ],
)
def test_range_is_honoured_if_it_is_one_of_bytes(
    client: Any, header: str, span: tuple[int, int] | None
) -> None:
    client.put("/files/a", data=DATA)
    read = client.get("/files/a", headers={"Range": header})
    start, stop = span or (0, 5000)
    assert (read.status_code, read.data) == (206 if span else 200, DATA[start:stop])
    told = f"bytes {start}-{stop - 1}/5000" if span else None
    assert read.headers.get("Content-Range") == told
    assert read.headers["Content-Length"] == str(stop - start)
    assert read.headers["Accept-Ranges"] == "bytes"


def test_range_past_the_end_is_told_the_size(client: Any) -> None:
    client.put("/files/a", data=b"0123456789")
    read = client.get("/files/a", headers={"Range": "bytes=10-"})
    assert is_problem(read, 416)["size"] == 10
    assert read.headers["Content-Range"] == "bytes */10"


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("ETAG", 206),
        ('"other"', 200),
        ("W/ETAG", 200),
        ("MODIFIED", 200),  # a second has room for two versions
        (http_date(4e9), 200),
        (http_date(1), 200),
        ("nonsense", 200),
    ],
)
def test_if_range_goes_by_etag_only(client: Any, value: str, status: int) -> None:
    etag = client.put("/files/a", data=b"0123456789").headers["ETag"]
    modified = client.get("/files/a").headers["Last-Modified"]
    value = value.replace("ETAG", etag).replace("MODIFIED", modified)
    read = client.get("/files/a", headers={"Range": "bytes=2-3", "If-Range": value})
    assert read.status_code == status
    assert read.data == (b"23" if status == 206 else b"0123456789")
    past = {"Range": "bytes=99-", "If-Range": value}
    past_end = client.get("/files/a", headers=past).status_code
    assert past_end == (416 if status == 206 else 200)


def test_head_and_refusals_read_no_chunk(client: Any, memcached: Memcached) -> None:
    def hits() -> int:
        return int(memcached.stats()["get_hits"])

    client.put("/files/a", data=content(100 * CHUNK))
    before = hits()
    assert client.head("/files/a").headers["Content-Length"] == str(100 * CHUNK)
    is_problem(client.post("/files/a", data=b"x"), 409)
    is_problem(client.put("/files/a", data=b"x", headers={"If-None-Match": "*"}), 412)
    assert client.get("/files/a?info").json["size"] == 100 * CHUNK
    wanted = {"Range": "bytes=0-0", "Want-Repr-Digest": "sha-256=1"}
    assert client.get("/files/a", headers=wanted).data == b"\0"  # one chunk
    assert hits() - before < 20  # all else are manifests


def test_digest_of_a_download_is_sent_if_wanted(client: Any) -> None:
    client.put("/files/a", data=DATA)
    assert "Repr-Digest" not in client.get("/files/a").headers
    read = client.get("/files/a", headers={"Want-Repr-Digest": "sha-256=1"})
    assert (read.data, read.headers["Repr-Digest"]) == (DATA, digest(DATA))


def test_download_is_an_attachment_in_which_nothing_runs(client: Any) -> None:
    client.put("/files/f/x.html", data=b"<script>", content_type="text/html")
    headers = client.get("/files/f/x.html").headers
    name = "filename=\"x.html\"; filename*=UTF-8''x.html"
    assert headers["Content-Disposition"] == f"attachment; {name}"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
    assert headers["Cache-Control"] == "no-cache"


# Conditions: RFC 9110, section 13.2.2


EARLY = http_date(1)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("GET | If-None-Match: ETAG", 304),
        ('GET | If-None-Match: "other"', 200),
        ("GET | If-Modified-Since: MODIFIED", 304),
        (f"GET | If-Modified-Since: {EARLY}", 200),
        ("GET | If-Match: ETAG", 200),
        ('GET | If-Match: "other"', 412),
        ("GET | If-Unmodified-Since: MODIFIED", 200),
        (f"GET | If-Unmodified-Since: {EARLY}", 412),
        ("HEAD | If-None-Match: ETAG", 304),
        ("PUT | If-Match: ETAG", 200),
        ('PUT | If-Match: "other"', 412),
        ("PUT | If-None-Match: *", 412),
        ("POST | If-None-Match: *", 412),
        ("PATCH | If-Match: ETAG", 200),
        ('PATCH | If-Match: "other"', 412),
        ("DELETE | If-Match: ETAG", 204),
        ('DELETE | If-Match: "other"', 412),
    ],
)
def test_condition(client: Any, text: str, status: int) -> None:
    etag = client.put("/files/a", data=b"old").headers["ETag"]
    modified = client.get("/files/a").headers["Last-Modified"]
    text = text.replace(" |", " /files/a?expire=60 |", 1)
    answer = ask(client, text, ETAG=etag, MODIFIED=modified)
    assert answer.status_code == status
    if status == 304:
        assert (answer.data, answer.headers["ETag"]) == (b"", etag)
    if status == 412:
        is_problem(answer, 412)
        assert client.get("/files/a?info").json["etag"] == etag


@pytest.mark.parametrize(
    ("there", "words"), [(True, "has changed"), (False, "another upload stored")]
)
def test_condition_of_put_holds_to_the_end_of_the_upload(
    client: Any, there: bool, words: str
) -> None:
    headers = {"If-None-Match": "*"}
    if there:
        headers = {"If-Match": client.put("/files/a", data=b"old").headers["ETag"]}
    stream = Stream(b"mine", lambda: client.put("/files/a", data=b"theirs"))
    upload = send(client, "PUT", "/files/a", stream, 4, headers=headers)
    assert words in is_problem(upload, 412)["detail"]
    assert client.get("/files/a").data == b"theirs"


def test_condition_of_delete_holds_to_its_end(memcached: Memcached) -> None:
    other = make(memcached)
    etag = other.put("/files/a", data=b"old").headers["ETag"]
    hook = Once("cas", lambda: other.put("/files/a", data=b"theirs"))
    refused = ask(hooked(memcached, hook), f"DELETE /files/a | If-Match: {etag}")
    is_problem(refused, 412)
    assert other.get("/files/a").data == b"theirs"


def test_condition_of_new_files_takes_a_dead_one_for_none(
    client: Any, memcached: Memcached
) -> None:
    created, new = client.put("/files/a", data=DATA), {"If-None-Match": "*"}
    memcached.delete(chunk_key(memcached, created, 3))
    assert client.put("/files/a", data=b"new", headers=new).status_code == 201
    assert client.get("/files/a").data == b"new"
    is_problem(client.put("/files/a", data=b"x", headers=new), 412)


# Other sites


@pytest.mark.parametrize(
    "fields",
    [
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
        "Origin: https://evil.example",
        "Origin: null",
        "Sec-Fetch-Site: cross-site | Origin: http://localhost",
    ],
)
def test_other_site_changes_nothing(
    client: Any, memcached: Memcached, fields: str
) -> None:
    etag, before = client.put("/files/a", data=b"x").headers["ETag"], memcached.keys()
    for method in ("PUT", "POST", "PATCH", "DELETE"):
        is_problem(ask(client, f"{method} /files/a?expire=9 | {fields}"), 403)
    is_problem(ask(client, f"POST /files | Content-Type: {FORM} | {fields}"), 403)
    assert memcached.keys() == before
    assert ask(client, f"GET /files/a | {fields}").headers["ETag"] == etag


def test_other_site_that_is_listed_may_use_the_api(memcached: Memcached) -> None:
    client = make(memcached, origins="https://a.example", token="t")
    page = {"Sec-Fetch-Site": "cross-site", "Origin": "https://a.example"}
    asks = {"Access-Control-Request-Method": "PUT"}
    preflight = client.options("/files/a", headers={**page, **asks})
    stored = client.put("/files/a", data=b"x", headers={**page, **bearer("t")})
    assert (preflight.status_code, stored.status_code) == (204, 201)
    for answer in (preflight, stored):
        assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"


# Statuses: errors are problem+json, and a refused upload stores nothing


PART, TUS = "Content-Range: bytes 0-0/2", "Tus-Resumable: 1.0.0 | Upload-Length: 1"
LONG, DIGITS, TYPE = "x" * 1025, "9" * 30, "application/offset+octet-stream"
REFUSED = {
    "a name that is not UTF-8": (400, "GET /files/%FF"),
    "a name that breaks off": (400, "PUT /files/a%C3"),
    "a name with a surrogate": (400, "POST /files/%ED%A0%80"),
    "a name that Werkzeug mended": (400, "DELETE /files/%EF%BF%BD"),
    "a name of 1025 bytes": (400, f"PUT /files/{LONG}"),
    "a name of 1025 bytes to read": (400, f"GET /files/{LONG}"),
    "expire below 0": (400, "PUT /files/b?expire=-1"),
    "expire with a fraction": (400, "PUT /files/b?expire=1.5"),
    "expire that is a word": (400, "PUT /files/b?expire=soon"),
    "expire with an exponent": (400, "PUT /files/b?expire=1e3"),
    "expire in other digits": (400, "PUT /files/b?expire=%D9%A3"),
    "expire of 30 digits": (400, f"PUT /files/b?expire={DIGITS}"),
    "expire of a new file": (400, "POST /files?expire=soon"),
    "PATCH without expire": (400, "PATCH /files/a"),
    "PATCH with an empty one": (400, "PATCH /files/a?expire="),
    "PATCH with a word": (400, "PATCH /files/a?expire=soon"),
    "a length that is none": (400, "PUT /files/b | Content-Length: x"),
    "a form without an end": (400, f"POST /files | Content-Type: {FORM}"),
    "a digest of other bytes": (400, f"PUT /files/a | Repr-Digest: {digest(b'')}"),
    "a digest that is none": (400, "PUT /files/a | Repr-Digest: sha-256"),
    "a part by PUT": (400, f"PUT /files/b | {PART}"),
    "a part by POST": (400, f"POST /files | {PART}"),
    "a part in a form": (400, f"POST /files/b | {PART} | Content-Type: {FORM}"),
    "a part for tus": (400, f"POST /uploads | {PART} | {TUS}"),
    "a part for an upload": (400, f"PATCH /uploads/x | {PART}"),
    "another site": (403, "PUT /files/a | Sec-Fetch-Site: same-site"),
    "no file to get": (404, "GET /files/b"),
    "no file to tell about": (404, "GET /files/b?info"),
    "no file to keep": (404, "PATCH /files/b?expire=9"),
    "no file to delete": (404, "DELETE /files/b"),
    "no upload": (404, f"DELETE /uploads/b | {TUS}"),
    "no address": (404, "GET /nowhere"),
    "no address for options": (404, "OPTIONS /nowhere"),
    "no list of files": (405, "GET /files"),
    "no method of all files": (405, "PATCH /files"),
    "no method of the page": (405, "PUT /"),
    "no method at all": (405, "BREW /files/a"),
    "a file that exists": (409, "POST /files/a"),
    "a body without an end": (411, "PUT /files/b | Transfer-Encoding: chunked"),
    "another ETag": (412, 'PUT /files/a | If-Match: "x"'),
    "an ETag of no file": (412, 'PUT /files/b | If-Match: "x"'),
    "no version of tus": (412, "POST /uploads | Upload-Length: 1"),
    "too large": (413, "PUT /files/a | Content-Length: 60000000"),
    "too large for tus": (413, f"POST /uploads | {TUS}00000000"),
    "a compressed file": (415, "PUT /files/b | Content-Encoding: gzip"),
    "a range past the end": (416, "GET /files/a | Range: bytes=10-"),
    "long headers": (431, f"POST /uploads | {TUS} | Upload-Metadata: {LONG * 9}"),
    "a checksum of other bytes": (
        460,
        f"POST /uploads | {TUS} | Upload-Checksum: sha1 AAAA | Content-Type: {TYPE}",
    ),
}


@cases(("status", "text"), REFUSED)
def test_refused_request_changes_nothing(
    client: Any, memcached: Memcached, status: int, text: str
) -> None:
    etag = client.put("/files/a", data=b"0123456789").headers["ETag"]
    before, answer = memcached.keys(), ask(client, text)
    is_problem(answer, status)
    assert answer.headers["Cache-Control"] == "no-store"
    if status == 405:
        assert "OPTIONS" in answer.headers["Allow"]
    assert memcached.keys() == before
    assert client.get("/files/a?info").json["etag"] == etag


@pytest.mark.parametrize(
    ("method", "headers"), [("POST", {}), ("PUT", {"If-None-Match": "*"})]
)
def test_refused_name_is_refused_before_the_body_is_read(
    client: Any, method: str, headers: dict[str, str]
) -> None:
    client.put("/files/a", data=b"x")
    stream = Stream(bytes(MIB))
    refused = send(client, method, "/files/a", stream, MIB, headers=headers)
    assert stream.sizes == []
    refused.close()
    assert stream.tell() == MIB  # the rest is dropped, so that the answer can be read


def test_words_for_browsers(client: Any) -> None:
    missing = client.get("/files/none", headers=BROWSER)
    assert (missing.status_code, missing.mimetype) == (404, "text/html")
    assert "Not Found" in missing.text
    form = multipart(("file", "a.png", b"1"))
    stored = post_form(client, form, headers=BROWSER)
    assert (stored.status_code, stored.mimetype) == (201, "text/html")
    assert f'href="{stored.headers["Location"]}"' in stored.text


def test_internal_error_is_told_in_the_log_only(
    memcached: Memcached, caplog: Any
) -> None:
    client = hooked(memcached, Once("gets", raising(RuntimeError("the secret"))))
    answer = client.get("/files/a")
    is_problem(answer, 500)
    assert "secret" not in answer.text
    assert "the secret" in caplog.text
    assert "GET '/files/a'" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        "GET /files/a",
        "PUT /files/a",
        "POST /files",
        "PATCH /files/a",
        "DELETE /files/a",
    ],
)
def test_memcached_that_is_gone_is_503(memcached: Memcached, line: str) -> None:
    client, (method, path) = make(memcached), line.split(" ")
    client.put("/files/a", data=b"x")
    memcached.kill()
    answer = client.open(f"{path}?expire=9", method=method, data=b"x")
    assert memcached.server not in json.dumps(is_problem(answer, 503))


def test_memcached_that_does_not_answer_is_503(memcached: Memcached) -> None:
    client = make(memcached, timeout=0.2)
    assert make(memcached).put("/files/a", data=b"x").status_code == 201
    memcached.pause()
    try:
        is_problem(client.get("/files/a"), 503)
    finally:
        memcached.resume()


def test_memcached_without_room_is_507(start_memcached: Start) -> None:
    client = make(start_memcached("-m", "2"), chunk_size=None)
    client.put("/files/a", data=content(MIB))
    is_problem(client.put("/files/a", data=bytes(20 * MIB)), 507)
    assert client.get("/files/a").data == content(MIB)


# Settings of the README: who may do what


def test_token_is_needed_for_files_and_uploads(memcached: Memcached) -> None:
    client = make(memcached, token="s3cret")
    for path in ("/files/a", "/files", "/files/", "/uploads", "/uploads/"):
        refused = client.post(path, data=b"x", headers=bearer("another"))
        is_problem(refused, 401)
        assert refused.headers["WWW-Authenticate"] == 'Bearer realm="memchunk"'
    is_problem(client.get("/files/a"), 401)
    stored = client.put("/files/a", data=b"x", headers=bearer("s3cret"))
    assert stored.status_code == 201
    assert client.get("/files/a", headers=bearer("s3cret")).data == b"x"
    assert client.get("/").status_code == 200


def test_public_read_asks_for_the_token_on_changes_only(memcached: Memcached) -> None:
    client = make(memcached, token="t", public_read=1)
    client.put("/files/a", data=b"x", headers=bearer("t"))
    for line in ("GET /files/a", "HEAD /files/a", "GET /files/a?info"):
        assert ask(client, line).status_code == 200
    for line in ("POST /files", "POST /uploads"):
        is_problem(ask(client, line), 401)
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        is_problem(ask(client, f"{method} /files/a?expire=9"), 401)
    for method in ("HEAD", "PATCH", "DELETE"):
        assert ask(client, f"{method} /uploads/a | {TUS}").status_code == 401
    is_problem(ask(client, "DELETE /files/a | X-HTTP-Method-Override: GET"), 401)


def test_hosts_that_are_not_listed_are_421(memcached: Memcached) -> None:
    client = make(memcached, hosts="files.example")
    assert client.get("/", headers={"Host": "files.example:8000"}).status_code == 200
    is_problem(client.get("/", headers={"Host": "evil.example"}), 421)


def test_proxies_are_believed_as_far_as_they_are_told(memcached: Memcached) -> None:
    sent = {"Host": "127.0.0.1:8000", "X-Forwarded-Host": "files.example"}
    sent.update({"X-Forwarded-Prefix": "/store", "Origin": "https://files.example"})
    is_problem(make(memcached).post("/files", data=b"x", headers=sent), 403)
    client = make(memcached, proxies=1)
    created = client.post("/files", data=b"x", headers=sent)
    assert created.json["url"].startswith("/store/files/")
    assert created.headers["Location"].startswith("files/")
    sent["X-Forwarded-Host"] = "files.example, evil.example"
    is_problem(client.post("/files", data=b"x", headers=sent), 403)


def test_max_size_is_the_largest_file(memcached: Memcached) -> None:
    client = make(memcached, max_size=1000)
    assert client.put("/files/a", data=bytes(1000)).status_code == 201
    assert is_problem(client.put("/files/a", data=bytes(1001)), 413)["limit"] == 1000


def test_max_response_is_403_unless_a_range_is_asked_for(memcached: Memcached) -> None:
    client = make(memcached, max_response=2500)
    client.put("/files/a", data=DATA)
    refused = client.get("/files/a")
    problem = is_problem(refused, 403)
    assert (problem["size"], problem["limit"]) == (5000, 2500)
    assert "Range: bytes=0-" in problem["detail"]
    assert refused.headers["Accept-Ranges"] == "bytes"
    assert client.head("/files/a").headers["Content-Length"] == "5000"
    for start in (0, 2500):
        part = ask(client, f"GET /files/a | Range: bytes={start}-")
        assert (part.status_code, part.data) == (206, DATA[start:][:2500])
    client.put("/files/b", data=DATA[:2500])
    assert client.get("/files/b").data == DATA[:2500]
