"""Resumable uploads, tus 1.0.0, through Werkzeug's test client, on real memcacheds.

Real tus clients, hosts and Lambda adapters are in test_tus_clients.py.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any, Callable
from urllib.parse import urljoin

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from pymemcache.client.base import PooledClient
from werkzeug.test import Client, TestResponse

import memchunk
import tus
import wsgi
from tests.faults import Hook, Wrapped
from tests.support import (
    CHUNK,
    CLOCK,
    MIB,
    Memcached,
    Stream,
    ask,
    chunk_key,
    content,
    is_problem,
    make,
    opened,
    send,
    wait_for,
)

TUS = {"Tus-Resumable": "1.0.0"}
TYPE = "application/offset+octet-stream"
CHUNKED = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}


def pair(key: str, value: str | bytes) -> str:
    value = value.encode() if isinstance(value, str) else value
    return f"{key} {base64.b64encode(value).decode()}"


def start(client: Any, length: int, path: str = "/uploads", **options: Any) -> str:
    """Start an upload; return its path."""
    headers = {**TUS, "Upload-Length": str(length), **options.pop("headers", {})}
    created = client.post(path, headers=headers, **options)
    assert created.status_code == 201, created.text
    assert created.headers["Tus-Resumable"] == "1.0.0"
    return urljoin(path, str(created.headers["Location"]))


def patch(
    client: Any, path: str, offset: int, data: bytes, **headers: str
) -> TestResponse:
    sent = {**TUS, "Upload-Offset": str(offset), "Content-Type": TYPE}
    sent.update({key.replace("_", "-"): value for key, value in headers.items()})
    response: TestResponse = client.patch(path, data=data, headers=sent)
    assert response.headers["Tus-Resumable"] == "1.0.0"
    return response


def stream(
    client: Any, path: str, body: Any, length: int | None, offset: int = 0, **more: Any
) -> TestResponse:
    """A PATCH whose body is a stream; without a length it is chunked."""
    headers = {**TUS, "Upload-Offset": str(offset), **more}
    environ = {"environ": CHUNKED} if length is None else {}
    options: Any = {"headers": headers, "content_type": TYPE, **environ}
    response: TestResponse = send(client, "PATCH", path, body, length, **options)
    return response


def head(client: Any, path: str) -> TestResponse:
    response: TestResponse = client.head(path, headers=TUS)
    assert response.headers["Tus-Resumable"] == "1.0.0"
    assert response.data == b""
    return response


def offset(client: Any, path: str) -> int:
    response = head(client, path)
    assert response.status_code == 200
    return int(response.headers["Upload-Offset"])


def complete(client: Any, path: str, data: bytes, piece: int) -> TestResponse:
    """Go on from where the upload is, in pieces; return the last answer."""
    here, response = offset(client, path), head(client, path)
    while here < len(data):
        end = here + piece
        response = patch(client, path, here, data[here:end])
        assert response.status_code == 204, response.text
        here += len(data[here:end])
        assert response.headers["Upload-Offset"] == str(here)
    return response


def leftovers(memcached: Memcached) -> list[str]:
    """Keys of what no file needs and no time ends."""
    return sorted(key for key, end in memcached.expiries().items() if end == -1)


# From the start to the file


@pytest.mark.parametrize(
    "piece", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 10 * CHUNK]
)
def test_pieces_become_a_file(client: Any, memcached: Memcached, piece: int) -> None:
    data = content(10 * CHUNK if piece > 10 else 20 * piece)
    metadata = ",".join(
        [pair("filename", "b \u4f60.txt"), pair("filetype", "text/plain")]
    )
    address, headers = "/uploads?expire=60&name=a/b%20c", {"Upload-Metadata": metadata}
    path = start(client, len(data), address, headers=headers)
    last = complete(client, path, data, piece)
    assert last.headers["Content-Location"] == "/files/a/b%20c"
    assert "Upload-Expires" not in last.headers
    read = client.get(last.headers["Content-Location"])
    assert (read.status_code, read.data) == (200, data)
    assert read.headers["Content-Type"] == "text/plain"
    assert "filename*=UTF-8''b%20%E4%BD%A0.txt" in read.headers["Content-Disposition"]
    assert leftovers(memcached) == []
    done = head(client, path)
    assert (
        done.headers["Upload-Offset"] == done.headers["Upload-Length"] == str(len(data))
    )
    assert done.headers["Content-Location"] == last.headers["Content-Location"]
    # The file, the record, and nothing of the pieces. A small file has no chunks.
    chunks = -(-len(data) // CHUNK) if len(data) > CHUNK // 16 else 0
    assert len(memcached.keys()) == 1 + chunks + 1


def test_a_name_is_made_up(client: Any) -> None:
    path = start(client, 3)
    last = patch(client, path, 0, b"abc")
    url = last.headers["Content-Location"]
    name, upload_id = url.rsplit("/", 1)[1], path.rsplit("/", 1)[1]
    assert len(name) == len(upload_id) == 32
    assert name != upload_id
    read = client.get(url)
    assert (read.data, read.mimetype) == (b"abc", "application/octet-stream")


def test_the_whole_file_with_the_start(client: Any) -> None:
    headers = {**TUS, "Upload-Length": "5"}
    created = client.post("/uploads", headers=headers, data=b"hello", content_type=TYPE)
    assert created.status_code == 201
    assert created.headers["Upload-Offset"] == "5"
    assert client.get(created.headers["Content-Location"]).data == b"hello"
    part = client.post("/uploads", headers=headers, data=b"he", content_type=TYPE)
    assert (part.status_code, part.headers["Upload-Offset"]) == (201, "2")
    assert "Content-Location" not in part.headers
    last = patch(client, urljoin("/uploads", part.headers["Location"]), 2, b"llo")
    assert client.get(last.headers["Content-Location"]).data == b"hello"


def test_a_start_with_bytes_of_another_type_takes_none(client: Any) -> None:
    started = ask(client, "POST /uploads | Tus-Resumable: 1.0.0 | Upload-Length: 5")
    assert (started.status_code, started.headers["Upload-Offset"]) == (201, "0")


def test_an_empty_file(client: Any) -> None:
    created = client.post("/uploads", headers={**TUS, "Upload-Length": "0"})
    assert (created.status_code, created.headers["Upload-Offset"]) == (201, "0")
    assert client.get(created.headers["Content-Location"]).data == b""
    path = urljoin("/uploads", created.headers["Location"])
    assert patch(client, path, 0, b"").status_code == 204


def test_the_limit(memcached: Memcached) -> None:
    client = make(memcached, max_size=1000)
    headers = {**TUS, "Upload-Length": "1001"}
    refused = client.post("/uploads", headers=headers)
    is_problem(refused, 413)
    assert refused.headers["Tus-Max-Size"] == "1000"
    path = start(client, 1000)
    assert patch(client, path, 0, content(1000)).status_code == 204
    is_problem(patch(client, path, 1000, b"x"), 413)
    assert len(memcached.keys()) == 3


def test_more_than_announced(client: Any) -> None:
    path = start(client, 10)
    is_problem(patch(client, path, 0, bytes(11)), 413)
    is_problem(stream(client, path, io.BytesIO(bytes(11)), None), 413)
    assert offset(client, path) == 0
    answer = stream(client, path, io.BytesIO(content(10)), None)
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, "10")
    assert client.get(answer.headers["Content-Location"]).data == content(10)


def test_memory_stays_bounded(memcached: Memcached) -> None:
    """A body is stored in blocks, each counted as it comes: 4 MiB are the most that a
    worker that dies takes with it."""
    client, seen = make(memcached, chunk_size=None), []
    data = os.urandom(9 * MIB + 5)
    path = start(client, len(data) + 1)

    def watch() -> None:
        seen.append((body.tell(), offset(client, path)))

    body = Stream(data, watch)
    answer = stream(client, path, body, len(data))
    assert answer.headers["Upload-Offset"] == str(len(data))
    assert all(0 <= arrived - counted <= tus.BLOCK for arrived, counted in seen)
    assert len({counted for _, counted in seen}) == 5
    last = patch(client, path, len(data), b"x")
    assert client.get(last.headers["Content-Location"]).data == data + b"x"


def test_an_upload_without_bytes_costs_at_most_1_kib(
    client: Any, memcached: Memcached
) -> None:
    before = int(memcached.stats()["bytes"])
    for _ in range(100):
        start(client, 50 * MIB)
    assert int(memcached.stats()["bytes"]) - before <= 100 * 1024


def test_a_large_upload_has_room_after_tails_of_all_sizes(start_memcached: Any) -> None:
    """memcached keeps items of each size in pages of their own."""
    client = make(start_memcached("-m", "64"), chunk_size=None)
    for power in range(40):
        path = start(client, 5 * MIB)
        patch(client, path, 0, bytes(int(500 * 1.19**power)))
        client.delete(path, headers=TUS)
    data = bytes(50 * MIB)
    complete(client, start(client, len(data)), data, 5 * MIB)


def test_a_large_tail_fits_the_pages_of_chunks(memcached: Memcached) -> None:
    """memcached keeps items of another size in pages of their own."""
    client = make(memcached, chunk_size=None)
    path = start(client, 5 * MIB)
    patch(client, path, 0, content(4 * MIB + 300_000))
    large = [size for size in memcached.sizes() if size > 100_000]
    assert len(large) == 8 + 1
    assert min(large) > 470_000


def test_an_upload_in_too_many_pieces(
    client: Any, memcached: Memcached, monkeypatch: Any
) -> None:
    monkeypatch.setattr(memchunk, "MAX_METADATA", 400)
    path, here = start(client, 100 * CHUNK), 0
    while patch(client, path, here, content(CHUNK)).status_code == 204:
        here, keys = here + CHUNK, memcached.keys()
    is_problem(patch(client, path, here, content(CHUNK)), 507)
    assert memcached.keys() == keys
    assert offset(client, path) == here > CHUNK


def test_pieces_of_less_than_a_chunk_do_not_fill_the_record(
    client: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(memchunk, "MAX_METADATA", 400)
    complete(client, start(client, 20), content(20), 1)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cuts=strategies.lists(strategies.integers(0, 5 * CHUNK), max_size=12),
    size=strategies.integers(0, 5 * CHUNK),
    checksums=strategies.booleans(),
)
def test_pieces_of_any_sizes(
    client: Any, cuts: list[int], size: int, checksums: bool
) -> None:
    data = content(size, seed=size)
    path = start(client, size)
    edges = sorted(min(cut, size) for cut in cuts)
    for begin, end in zip([0, *edges], [*edges, size]):
        assert offset(client, path) == begin
        headers = {"Upload_Checksum": checksum(data[begin:end])} if checksums else {}
        assert patch(client, path, begin, data[begin:end], **headers).status_code == 204
    assert client.get(head(client, path).headers["Content-Location"]).data == data


# What the protocol asks


def test_options(memcached: Memcached) -> None:
    client = make(memcached, max_size=12345)
    allowed = {"/uploads": "OPTIONS, POST"}
    allowed[start(client, 1)] = "DELETE, HEAD, OPTIONS, PATCH"
    for address, allow in allowed.items():
        # Its version of tus is to be ignored.
        answer = client.options(address, headers={"Tus-Resumable": "0.2.2"})
        assert (answer.status_code, answer.data) == (204, b"")
        assert answer.headers["Allow"] == allow
        assert answer.headers["Tus-Version"] == "1.0.0"
        assert answer.headers["Tus-Max-Size"] == "12345"
        extensions = "creation,creation-with-upload,checksum,expiration,termination"
        assert answer.headers["Tus-Extension"] == extensions
        assert answer.headers["Tus-Checksum-Algorithm"] == "sha1,sha256,sha512"
    assert "Tus-Version" not in client.options("/files").headers


@pytest.mark.parametrize("spoken", ["Tus-Version: 1.0.0", "Tus-Resumable: 0.2.2"])
@pytest.mark.parametrize("line", ["POST /uploads", "PATCH PATH", "DELETE PATH"])
def test_another_version_of_tus(
    client: Any, memcached: Memcached, spoken: str, line: str
) -> None:
    path = start(client, 1)
    more = f"Upload-Length: 1 | Upload-Offset: 0 | Content-Type: {TYPE} | {spoken}"
    refused, before = ask(client, f"{line} | {more}", PATH=path), memcached.keys()
    is_problem(refused, 412)
    assert refused.headers["Tus-Version"] == refused.headers["Tus-Resumable"] == "1.0.0"
    assert ask(client, f"HEAD {path} | {spoken}").status_code == 412
    assert (memcached.keys(), offset(client, path)) == (before, 0)


def test_head(client: Any) -> None:
    metadata = pair("filename", "a.txt") + ",is_confidential," + pair("x", b"\xff\x00")
    path = start(client, 10, headers={"Upload-Metadata": metadata})
    patch(client, path, 0, b"abc")
    answer = head(client, path)
    assert answer.status_code == 200
    assert answer.headers["Upload-Offset"] == "3"
    assert answer.headers["Upload-Length"] == "10"
    assert answer.headers["Upload-Metadata"] == metadata
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Content-Location" not in answer.headers
    assert "Upload-Metadata" not in head(client, start(client, 1)).headers
    is_problem(client.get(path, headers=TUS), 405)


def test_the_end_of_an_upload_does_not_move(
    client: Any, memcached: Memcached, monkeypatch: Any
) -> None:
    headers = {**TUS, "Upload-Length": "9000"}
    created = client.post("/uploads", headers=headers)
    path, real = urljoin("/uploads", created.headers["Location"]), time.time
    expires = created.headers["Upload-Expires"]
    end = int(parsedate_to_datetime(expires).timestamp())
    assert abs(end - time.time() - 24 * 3600) < CLOCK
    monkeypatch.setattr(time, "time", lambda: real() + 20_000)
    for answer in (
        patch(client, path, 0, content(5000)),
        head(client, path),
        patch(client, path, 5000, b"x"),
    ):
        assert answer.headers["Upload-Expires"] == expires
        assert abs((record(path).expires or 0) - end) <= 1  # the clock may tick
    for key, at in memcached.expiries().items():  # not before the upload does
        assert abs(at + 20_000 - end) < 4000, key
    # The parts end later, so that the last piece can finish.
    assert max(memcached.expiries().values()) + 20_000 - end > 3000
    patch(client, path, 5001, content(3999))
    assert abs((record(path).expires or 0) - end) <= 1


def record(path: str) -> memchunk.FileInfo:
    """The record of an upload."""
    return opened[-1].stat(tus.RESERVED + path.rsplit("/", 1)[1])


def test_an_expired_upload(client: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tus, "LIFETIME", 1)
    path = start(client, 10)
    wait_for(lambda: head(client, path).status_code == 404, "the upload to expire")
    is_problem(patch(client, path, 0, b"abc"), 404)


LENGTH = "Upload-Length: 1"


@pytest.mark.parametrize(
    "text",
    [
        "POST /uploads",
        *[f"POST /uploads | Upload-Length: {n}" for n in ("-1", "x", "1.5", "", 9**30)],
        "POST /uploads | Upload-Defer-Length: 1",
        f"POST /uploads | {LENGTH} | Upload-Concat: partial",
        "POST /uploads | Upload-Concat: final;/uploads/a /uploads/b",
        f"POST /uploads | {LENGTH} | Upload-Metadata: filename not-base64!",
        f"POST /uploads | {LENGTH} | Upload-Metadata: filename YQ== YQ==",
        f"POST /uploads | {LENGTH} | Upload-Metadata: filename YQ==,filename YQ==",
        f"POST /uploads | {LENGTH} | Upload-Metadata: f\xfclename YQ==",
        f"POST /uploads | {LENGTH} | Upload-Metadata: filename !",
        f"POST /uploads?expire=x | {LENGTH}",
        f"POST /uploads?name=%FF | {LENGTH}",
        f"POST /uploads?name=%EF%BF%BD | {LENGTH}",
        f"POST /uploads?name={'x' * 1025} | {LENGTH}",
    ],
)
def test_starts_that_are_refused(client: Any, memcached: Memcached, text: str) -> None:
    is_problem(ask(client, f"{text} | Tus-Resumable: 1.0.0"), 400)
    assert memcached.keys() == []


def test_patches_that_are_refused(client: Any, memcached: Memcached) -> None:
    path = start(client, 10)
    patch(client, path, 0, b"abc")
    before = memcached.keys()
    for wrong in ("0", "2", "4", "10", "99"):
        problem = is_problem(patch(client, path, 0, b"d", Upload_Offset=wrong), 409)
        assert "3 bytes" in problem["detail"]
    for bad in ("", "-1", "x", "3.0"):
        is_problem(patch(client, path, 0, b"d", Upload_Offset=bad), 400)
    for other in ("", "application/octet-stream", "text/plain"):
        is_problem(patch(client, path, 3, b"d", Content_Type=other), 415)
    is_problem(patch(client, path, 3, b"d", Content_Encoding="gzip"), 415)
    assert memcached.keys() == before
    assert (
        patch(client, path, 3, b"", Upload_Offset="3").headers["Upload-Offset"] == "3"
    )
    assert offset(client, path) == 3


@pytest.mark.parametrize(
    "path", ["/uploads/" + "0" * 32, "/uploads/x", "/uploads/a%2Fb"]
)
def test_uploads_that_are_none(client: Any, path: str) -> None:
    for answer in (
        head(client, path),
        patch(client, path, 0, b"x"),
        client.delete(path, headers=TUS),
    ):
        assert answer.status_code == 404
        assert "Upload-Offset" not in answer.headers


def checksum(data: bytes, algorithm: str = "sha1") -> str:
    digest = hashlib.new(algorithm, data).digest()
    return f"{algorithm} {base64.b64encode(digest).decode()}"


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
def test_checksums(client: Any, memcached: Memcached, algorithm: str) -> None:
    path = start(client, 6)
    before = memcached.keys()
    wrong = patch(client, path, 0, b"abc", Upload_Checksum=checksum(b"abd", algorithm))
    is_problem(wrong, 460)
    assert wrong.status == "460 Checksum Mismatch"
    for bad in (
        "md4 AAAA",
        "sha1",
        "sha1 ",
        "sha1 !",
        "AAAA",
        algorithm.upper() + " AAAA",
    ):
        is_problem(patch(client, path, 0, b"abc", Upload_Checksum=bad), 400)
    assert memcached.keys() == before
    assert offset(client, path) == 0
    for begin, part in ((0, b"abc"), (3, b"def")):
        right = patch(
            client, path, begin, part, Upload_Checksum=checksum(part, algorithm)
        )
        assert right.status_code == 204
    assert client.get(right.headers["Content-Location"]).data == b"abcdef"


@pytest.mark.parametrize(
    ("sent", "checksum_of", "status"),
    [(b"abc", b"abd", 460), (b"abc", None, 400), (b"abcdefg", b"abcdefg", 413)],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_refused_creation_with_bytes_stores_nothing(
    client: Any,
    memcached: Memcached,
    sent: bytes,
    checksum_of: Any,
    status: int,
    is_chunked: bool,
) -> None:
    """Its sender would not be told the address at which to delete it."""
    wanted = "md4 AAAA" if checksum_of is None else checksum(checksum_of)
    headers = {**TUS, "Upload-Length": "6", "Upload-Checksum": wanted}
    length, environ = (None, CHUNKED) if is_chunked else (len(sent), {})
    options = {"headers": headers, "content_type": TYPE, "environ": environ}
    is_problem(
        send(client, "POST", "/uploads", io.BytesIO(sent), length, **options), status
    )
    assert memcached.keys() == []


def test_a_creation_with_bytes_that_find_no_room_stores_nothing(
    start_memcached: Any,
) -> None:
    memcached = start_memcached("-m", "2")
    headers = {**TUS, "Upload-Length": str(3 * MIB)}
    options: Any = {"headers": headers, "content_type": TYPE}
    refused = make(memcached).post("/uploads", data=bytes(3 * MIB), **options)
    is_problem(refused, 507)
    assert memcached.keys() == []


def test_more_than_was_announced_is_refused_before_its_checksum(client: Any) -> None:
    path, body = start(client, 6), io.BytesIO(b"abcdefg")
    wrong: Any = {"Upload-Checksum": checksum(b"")}
    is_problem(stream(client, path, body, None, **wrong), 413)


def test_a_whole_upload_takes_no_more(client: Any) -> None:
    path = start(client, 3)
    last = patch(client, path, 0, b"abc")
    is_problem(stream(client, path, io.BytesIO(b"d"), None, 3), 413)
    assert client.get(last.headers["Content-Location"]).data == b"abc"


def test_a_checksum_of_several_blocks(memcached: Memcached) -> None:
    client, data = make(memcached, chunk_size=None), os.urandom(9 * MIB)
    path = start(client, len(data))
    before = memcached.keys()
    is_problem(patch(client, path, 0, data, Upload_Checksum=checksum(b"")), 460)
    assert memcached.keys() == before
    last = patch(client, path, 0, data, Upload_Checksum=checksum(data))
    assert client.get(last.headers["Content-Location"]).data == data


def test_termination(client: Any, memcached: Memcached) -> None:
    path = start(client, 10)
    patch(client, path, 0, b"abc")
    patch(client, path, 3, b"def")
    deleted = client.delete(path, headers=TUS)
    assert (deleted.status_code, deleted.data) == (204, b"")
    assert deleted.headers["Tus-Resumable"] == "1.0.0"
    assert memcached.keys() == []
    assert head(client, path).status_code == 404
    is_problem(patch(client, path, 6, b"g"), 404)


def test_termination_of_a_whole_upload_deletes_its_file(
    client: Any, memcached: Memcached
) -> None:
    path = start(client, 3)
    url = patch(client, path, 0, b"abc").headers["Content-Location"]
    assert client.delete(path, headers=TUS).status_code == 204
    is_problem(client.get(url), 404)
    assert memcached.keys() == []
    path = start(client, 3)
    url = patch(client, path, 0, b"abc").headers["Content-Location"]
    client.put(url, data=b"another")  # which the upload has no right to delete
    assert client.delete(path, headers=TUS).status_code == 204
    assert client.get(url).data == b"another"


def test_method_override(client: Any) -> None:
    headers = {**TUS, "Upload-Length": "6", "X-HTTP-Method-Override": "POST"}
    path = urljoin(
        "/uploads", client.put("/uploads", headers=headers).headers["Location"]
    )
    headers = {**TUS, "Upload-Offset": "0", "X-HTTP-Method-Override": "PATCH"}
    answer = client.post(path, headers=headers, data=b"abc", content_type=TYPE)
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, "3")
    answer = client.get(path, headers={**TUS, "X-HTTP-Method-Override": "HEAD"})
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (200, "3")
    assert answer.data == b""
    answer = client.post(path, headers={**TUS, "X-HTTP-Method-Override": "delete"})
    assert answer.status_code == 204
    assert head(client, path).status_code == 404
    # Elsewhere it means nothing.
    client.put("/files/a", data=b"x")
    assert (
        client.get("/files/a", headers={"X-HTTP-Method-Override": "DELETE"}).data
        == b"x"
    )


def test_an_existing_name(client: Any, memcached: Memcached) -> None:
    path = start(client, 5000, "/uploads?name=a")
    patch(client, path, 0, content(4000))
    created = client.put("/files/a", data=b"first")
    again = client.post("/uploads?name=a", headers={**TUS, "Upload-Length": "1"})
    is_problem(again, 409)
    # A finish that can't succeed leaves nothing of the upload.
    is_problem(patch(client, path, 4000, content(1000)), 409)
    assert client.get("/files/a").data == b"first"
    assert len(memcached.keys()) == 1  # the file, which is small
    assert head(client, path).status_code == 404
    # What is dead keeps no name.
    created = client.put("/files/a", data=content(5 * CHUNK))
    memcached.delete(chunk_key(memcached, created, 3))
    path = start(client, 3, "/uploads?name=a")
    assert patch(client, path, 0, b"new").status_code == 204
    assert client.get("/files/a").data == b"new"


def test_names_in_the_metadata_are_file_names(client: Any) -> None:
    """As by Uppy, which calls the file's own name `name`, and its type `type`."""
    metadata = ",".join([pair("name", "a b.txt"), pair("type", "text/plain")])
    for _ in range(2):
        path = start(client, 3, headers={"Upload-Metadata": metadata})
        url = patch(client, path, 0, b"abc").headers["Content-Location"]
        read = client.get(url)
        assert read.headers["Content-Type"] == "text/plain"
        assert "a%20b.txt" in read.headers["Content-Disposition"]
        assert "a%20b" not in url


def test_records_are_out_of_reach(client: Any) -> None:
    path = start(client, 10)
    patch(client, path, 0, b"abc")
    key = path.rsplit("/", 1)[1]
    assert tus.RESERVED + key in opened[-1]
    for name in (f"\ufffd{key}", f"\xff{key}"):
        for encoded in (name.encode(), name.encode("latin-1", "replace")):
            quoted = "".join(f"%{byte:02x}" for byte in encoded)
            assert client.get(f"/files/{quoted}").status_code in (400, 404)
            assert client.delete(f"/files/{quoted}").status_code in (400, 404)
    assert client.get(f"/files/{key}").status_code == 404
    assert offset(client, path) == 3


def test_token(memcached: Memcached) -> None:
    client, token = make(memcached, token="s3cret"), {"Authorization": "Bearer s3cret"}
    path = start(client, 3, headers=token)
    for line in ("POST /uploads", "POST /uploads/", f"PATCH {path}", f"DELETE {path}"):
        refused = ask(client, f"{line} | Tus-Resumable: 1.0.0 | Upload-Length: 3")
        is_problem(refused, 401)
        assert refused.headers["Tus-Resumable"] == "1.0.0"
    assert head(client, path).status_code == 401
    assert patch(client, path, 0, b"abc", **token).status_code == 204


def test_other_sites(client: Any) -> None:
    path = start(client, 3)
    evil = {"Origin": "https://evil.example", **TUS}
    is_problem(client.post("/uploads", headers={**evil, "Upload-Length": "1"}), 403)
    is_problem(patch(client, path, 0, b"abc", Origin="https://evil.example"), 403)
    is_problem(client.delete(path, headers=evil), 403)
    override = {**evil, "X-HTTP-Method-Override": "DELETE"}
    is_problem(client.get(path, headers=override), 403)
    assert offset(client, path) == 0
    assert patch(client, path, 0, b"abc", Origin="http://localhost").status_code == 204


# Bodies that end early


class Breaks(io.BytesIO):
    """A connection that breaks when all that was sent is read."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if not data:
            raise ConnectionResetError
        return data


@pytest.mark.parametrize("kind", [io.BytesIO, Breaks])
@pytest.mark.parametrize("size", [0, 1, 700, 99_999])
def test_what_came_is_kept(client: Any, kind: Any, size: int) -> None:
    data = content(100_000)
    path = start(client, len(data))
    answer = stream(client, path, kind(data[:size]), len(data))
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, str(size))
    assert offset(client, path) == size
    last = complete(client, path, data, len(data))
    assert client.get(last.headers["Content-Location"]).data == data


@pytest.mark.parametrize("kind", [io.BytesIO, Breaks])
def test_what_came_with_the_start_is_kept(client: Any, kind: Any) -> None:
    data, headers = content(100_000), {**TUS, "Upload-Length": "100000"}
    options = {"headers": headers, "content_type": TYPE}
    answer = send(client, "POST", "/uploads", kind(data[:700]), len(data), **options)
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (201, "700")
    path = urljoin("/uploads", answer.headers["Location"])
    last = complete(client, path, data, len(data))
    assert client.get(last.headers["Content-Location"]).data == data


def test_with_a_checksum_nothing_is_kept(client: Any, memcached: Memcached) -> None:
    path = start(client, 10)
    whole: Any = {"Upload-Checksum": checksum(b"0123456789")}
    before = memcached.keys()
    is_problem(stream(client, path, Breaks(b"01234"), 10, **whole), 460)
    assert memcached.keys() == before


@pytest.mark.parametrize(
    ("environ", "status"),
    [({"HTTP_TRANSFER_ENCODING": "chunked"}, 411), ({"CONTENT_LENGTH": "x"}, 400)],
)
def test_a_body_without_a_length(client: Any, environ: Any, status: int) -> None:
    path, headers = start(client, 10), {**TUS, "Upload-Offset": "0"}
    options = {"headers": headers, "content_type": TYPE, "environ": environ}
    is_problem(send(client, "PATCH", path, io.BytesIO(b"x"), None, **options), status)
    assert offset(client, path) == 0


@pytest.mark.parametrize(
    ("length", "sent"), [(3, 3), (10, 3), (20 * CHUNK, 12 * CHUNK)]
)
def test_deleted_during_a_patch(
    client: Any, memcached: Memcached, length: int, sent: int
) -> None:
    path = start(client, length)
    body = Stream(content(sent), lambda: client.delete(path, headers=TUS))
    is_problem(stream(client, path, body, sent), 404)
    assert memcached.keys() == []


# Requests that race, at any command of one of them

DATA = content(4500)  # several chunks, and a tail
OTHER = content(4500, seed=1)


class At:
    """Acts before a client's command of this number, once."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self.left, self.action = number, action
        self.result: Any = None

    def __call__(self, command: str) -> None:
        self.left -= 1
        if self.left == -1:
            self.result = self.action()

    @property
    def acted(self) -> bool:
        return self.left < 0


def worker(memcached: Memcached, before: Hook, after: Hook = bool) -> Any:
    """A client of an API with a memcached client of its own, in which hooks lie."""
    client = Wrapped(PooledClient(memcached.address), before, after)
    opened.append(memchunk.FileCache(client, chunk_size=CHUNK))
    return Client(wsgi.Application(opened[-1]))


def test_a_part_that_the_record_may_name_stays(
    client: Any, memcached: Memcached
) -> None:
    replies = ["cas", "gets"]  # to the write of the record, and to the look at it

    def lose(command: str) -> None:
        if [command] == replies[:1]:
            replies.pop(0)
            raise TimeoutError

    path = start(client, 4500)
    is_problem(patch(worker(memcached, bool, lose), path, 0, DATA[:2500]), 503)
    assert replies == []
    assert offset(client, path) == 2500
    last = complete(client, path, DATA, 2000)
    assert client.get(last.headers["Content-Location"]).data == DATA


def races(
    memcached: Memcached, prepare: Callable[[], str], first: Act, second: Act
) -> Iterator[tuple[str, Any, Any]]:
    """For each command of `first`: what prepared for it, its answer, and that of
    `second`, which another worker does before the command."""
    other, number = make(memcached), 0
    while True:
        path = prepare()
        at = At(number, functools.partial(second, other, path))
        answer = first(worker(memcached, at), path)
        if not at.acted:
            break
        yield path, answer, at.result
        memcached.flush()
        number += 1
    assert number > 5


Act = Callable[[Any, str], Any]


def finish(client: Any, path: str) -> TestResponse:
    """Send what the upload misses."""
    return patch(client, path, 1500, DATA[1500:])


def finish_otherwise(client: Any, path: str) -> TestResponse:
    return patch(client, path, 1500, OTHER[1500:])


def delete(client: Any, path: str) -> TestResponse:
    response: TestResponse = client.delete(path, headers=TUS)
    return response


def delete_file(client: Any, path: str) -> TestResponse:
    """Finish the upload, then delete its file, as its owner may."""
    head(client, path)
    response: TestResponse = client.delete("/files/a")
    return response


@pytest.mark.parametrize("length", [4500, 9000])
def test_patches_at_one_offset_never_mix_and_one_counts(
    client: Any, memcached: Memcached, length: int
) -> None:
    """At the end of the file as in its midst."""

    def prepare() -> str:
        path = start(client, length, "/uploads?name=a")
        patch(client, path, 0, DATA[:1500])
        return path

    rest = content(length - 4500, seed=2)
    for path, one, other in races(memcached, prepare, finish, finish_otherwise):
        assert sorted([one.status_code, other.status_code]) == [204, 409]
        sent = DATA if one.status_code == 204 else OTHER
        whole = DATA[:1500] + sent[1500:] + rest
        complete(client, path, whole, length)
        assert client.get("/files/a").data == whole
        # All that is left is the file and the record.
        assert len(memcached.keys()) == 1 + length // CHUNK + 1 + 1 - (length == 9000)


@pytest.fixture
def open_upload(client: Any) -> Callable[[], str]:
    """Makes an upload that misses its end."""

    def prepare() -> str:
        path = start(client, len(DATA), "/uploads?name=a&expire=9000")
        patch(client, path, 0, DATA[:1500])
        return path

    return prepare


class Died(BaseException):
    """Ends a worker."""


@pytest.fixture
def finishing_upload(
    memcached: Memcached, open_upload: Callable[[], str], client: Any
) -> Callable[[], str]:
    """Makes an upload whose worker died when it was about to publish the file."""

    def prepare() -> str:
        path = open_upload()
        is_done = [False]

        def die(command: str) -> None:
            if command == "set_many" and is_done[0]:
                raise Died
            is_done[0] |= command == "cas"

        with pytest.raises(Died):
            finish(worker(memcached, die), path)
        assert client.get("/files/a").status_code == 404
        return path

    return prepare


def is_whole(client: Any, memcached: Memcached) -> bool:
    """Whether the file is there, and nothing but it and the record."""
    read = client.get("/files/a")
    assert read.status_code in (200, 404)
    assert read.status_code == 404 or read.data == DATA
    assert len(memcached.keys()) == (1 + 5 + 1 if read.status_code == 200 else 0)
    return bool(read.status_code == 200)


@pytest.mark.parametrize(
    ("query", "status"),
    [(b"name=\xc3\xbc", 201), (b"name=%C3%BC", 201), (b"name=\xff", 400)],
)
def test_name_of_the_file_in_raw_bytes_is_utf_8(
    client: Any, query: bytes, status: int
) -> None:
    """Some clients don't percent-encode it."""
    environ = {"QUERY_STRING": query.decode("latin-1")}
    headers = {**TUS, "Upload-Length": "0"}
    answer = client.post("/uploads", headers=headers, environ_overrides=environ)
    assert answer.status_code == status
    assert client.get("/files/%C3%BC").status_code == (200 if status == 201 else 404)


def test_finish_against_head(
    client: Any, memcached: Memcached, open_upload: Callable[[], str]
) -> None:
    """HEAD says that all is there only if the file is."""
    for path, last, seen in races(memcached, open_upload, finish, head):
        assert (last.status_code, seen.status_code) == (204, 200)
        is_there = seen.headers["Upload-Offset"] == str(len(DATA))
        assert is_there == ("Content-Location" in seen.headers)
        assert offset(client, path) == len(DATA)
        assert is_whole(client, memcached)


@pytest.mark.parametrize("is_finish_first", [True, False])
def test_finish_against_delete(
    memcached: Memcached,
    client: Any,
    open_upload: Callable[[], str],
    is_finish_first: bool,
) -> None:
    """After DELETE nothing is there. The finish is told so, or was done before it."""
    acts = (finish, delete) if is_finish_first else (delete, finish)
    finishes = []
    for path, *answers in races(memcached, open_upload, *acts):
        last, deleted = answers if is_finish_first else reversed(answers)
        assert deleted.status_code == 204
        finishes.append(last.status_code)
        assert last.status_code in (204, 404, 410)
        assert head(client, path).status_code == 404
        assert not is_whole(client, memcached)
    # A finish wins if it has written its record before the DELETE deletes that.
    wins = finishes.count(204)
    assert 0 < wins < len(finishes)
    assert set(finishes[-wins:] if is_finish_first else finishes[:wins]) == {204}


@pytest.mark.parametrize("again", [finish, finish_otherwise, head])
def test_a_published_file_survives_a_second_finisher(
    client: Any, memcached: Memcached, finishing_upload: Callable[[], str], again: Act
) -> None:
    """Both take over from a worker that died."""
    for path, one, other in races(memcached, finishing_upload, head, again):
        assert one.status_code == 200
        assert other.status_code == (200 if again is head else 409)
        assert offset(client, path) == len(DATA)
        assert is_whole(client, memcached)


@pytest.mark.parametrize(
    ("second", "statuses"), [(delete, (200, 404)), (delete_file, (200, 404, 409, 410))]
)
def test_a_second_finisher_brings_no_file_back(
    client: Any,
    memcached: Memcached,
    finishing_upload: Callable[[], str],
    second: Act,
    statuses: tuple[int, ...],
) -> None:
    """It was finished and deleted while the second finisher was at work."""
    for path, late, deleted in races(memcached, finishing_upload, head, second):
        assert deleted.status_code == 204
        assert late.status_code in statuses
        assert client.get("/files/a").status_code == 404
        assert head(client, path).status_code in (404, 410)
        assert len(memcached.keys()) <= 1  # the record


def test_a_worker_that_dies_at_its_last_piece_leaves_an_upload_to_go_on_with(
    client: Any, memcached: Memcached, open_upload: Callable[[], str]
) -> None:
    def die() -> None:
        raise Died

    for number in range(1000):
        path, at = open_upload(), At(number, die)
        with contextlib.suppress(Died):
            finish(worker(memcached, at), path)
        last = complete(client, path, DATA, len(DATA))
        assert client.get(last.headers["Content-Location"]).data == DATA
        assert delete(client, path).status_code == 204
        assert leftovers(memcached) == []
        memcached.flush()
        if not at.acted:
            break
    assert number > 10


def test_a_published_file_counts_even_if_its_record_can_t_be_written(
    client: Any, memcached: Memcached, open_upload: Callable[[], str]
) -> None:
    path, seen = open_upload(), []

    def break_off(command: str) -> None:
        seen.append(command)
        if command == "cas" and seen.count("cas") == 2:
            raise ConnectionAbortedError

    last = finish(worker(memcached, break_off), path)
    assert seen.count("cas") == 2
    assert last.status_code == 204
    assert client.get(last.headers["Content-Location"]).data == DATA
    assert head(client, path).headers["Content-Location"] == "/files/a"
    assert is_whole(client, memcached)


def test_threads_at_one_offset(memcached: Memcached) -> None:
    workers = [make(memcached) for _ in range(4)]
    bodies = [content(4500, seed) for seed in range(len(workers))]
    for _ in range(10):
        path, gate = start(workers[0], 4500), threading.Barrier(len(workers))

        def work(index: int, path: str = path, gate: Any = gate) -> int:
            gate.wait()
            return patch(workers[index], path, 0, bodies[index]).status_code

        with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
            statuses = list(pool.map(work, range(len(workers))))
        assert sorted(statuses) == [204, 409, 409, 409]
        url = head(workers[0], path).headers["Content-Location"]
        assert workers[0].get(url).data == bodies[statuses.index(204)]


# Pieces that the cache dropped


def half(client: Any, memcached: Memcached) -> tuple[str, list[str]]:
    """An upload that has come half-way, and the keys of the file's chunks."""
    before = set(memcached.keys())
    path = start(client, 5000)
    patch(client, path, 0, content(2500))
    new = sorted(set(memcached.keys()) - before)
    return path, [
        key for key in new if key.count(":") == 2 and record(path).version not in key
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_evicted(client: Any, memcached: Memcached, index: int) -> None:
    """Whatever is gone, the upload is, and no file appears."""
    path, chunks = half(client, memcached)
    assert len(chunks) == 2
    memcached.delete(chunks[index])
    gone = head(client, path)
    assert gone.status_code == 410
    assert "Upload-Offset" not in gone.headers
    is_problem(patch(client, path, 2500, content(5000)[2500:]), 410)
    assert client.delete(path, headers=TUS).status_code == 204
    assert head(client, path).status_code == 404


@pytest.mark.parametrize("value", [None, b"x"])
def test_an_evicted_tail(
    client: Any, memcached: Memcached, value: bytes | None
) -> None:
    path, _ = half(client, memcached)
    [key] = [key for key in set(memcached.keys()) if f"{record(path).version}:0" in key]
    memcached.delete(key)
    if value:
        memcached.write(key, value)
    assert head(client, path).status_code == 410
    is_problem(patch(client, path, 2500, content(2500)), 410)
    assert client.delete(path, headers=TUS).status_code == 204


def test_damage_of_a_part_is_an_error_of_the_file(
    client: Any, memcached: Memcached
) -> None:
    """As of any file, when it is read."""
    path, chunks = half(client, memcached)
    memcached.write(chunks[0], b"x")
    last = patch(client, path, 2500, content(5000)[2500:])
    is_problem(client.get(last.headers["Content-Location"]), 502)


def test_a_finished_file_that_is_gone(client: Any) -> None:
    path = start(client, 3)
    url = patch(client, path, 0, b"abc").headers["Content-Location"]
    client.put(url, data=b"another")
    assert head(client, path).status_code == 410
    client.delete(url)
    assert head(client, path).status_code == 410


def test_an_evicted_record(client: Any, memcached: Memcached) -> None:
    path = start(client, 3)
    memcached.flush()
    assert head(client, path).status_code == 404


def test_no_memcached(memcached: Memcached) -> None:
    client = make(memcached)
    path = start(client, 10)
    patch(client, path, 0, b"abc")
    memcached.kill()
    assert head(client, path).status_code == 503
    refused = patch(client, path, 3, b"def")
    is_problem(refused, 503)
    assert "Retry-After" in refused.headers


# Workers that take turns


def test_a_gateway_that_repeats_requests(client: Any) -> None:
    """What was done already is told as such, and nothing is stored twice."""
    path = start(client, 6)
    assert patch(client, path, 0, b"abc").status_code == 204
    is_problem(patch(client, path, 0, b"abc"), 409)
    assert patch(client, path, 3, b"def").status_code == 204
    is_problem(patch(client, path, 3, b"def"), 409)
    again = patch(client, path, 6, b"")
    assert again.status_code == 204
    assert client.get(again.headers["Content-Location"]).data == b"abcdef"


def test_nothing_on_disk(client: Any, monkeypatch: Any, tmp_path: pathlib.Path) -> None:
    """A worker that has never seen the upload goes on with what is in memcached."""
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        path = start(client, 6)
        patch(client, path, 0, b"abc")
        other = wsgi.Application(opened[-1])
        stack.callback(opened[-1].close)
        last = patch(Client(other), path, 3, b"def")
        assert Client(other).get(last.headers["Content-Location"]).data == b"abcdef"
    assert list(tmp_path.iterdir()) == []


# How wsgi.py mounts it

SCRIPT = """
import {first}, wsgi
from werkzeug.test import Client
client = Client(wsgi.application)
headers = {{"Tus-Resumable": "1.0.0", "Upload-Length": "0"}}
print(client.post("/uploads", headers=headers).status_code)
print(client.post("/files/a", data=b"x").status_code, client.get("/files/a").text)
print(client.get("/").status_code, 'data-uploads=""' in client.get("/").text)
"""


def run(folder: pathlib.Path, memcached: Memcached, first: str) -> list[str]:
    environ = {**os.environ, "MEMCHUNK_SERVERS": memcached.server}
    command = [sys.executable, "-W", "error", "-c", SCRIPT.format(first=first)]
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


ROOT = pathlib.Path(wsgi.__file__).parent


@pytest.mark.parametrize("first", ["tus", "wsgi"])
def test_whichever_is_imported_first(memcached: Memcached, first: str) -> None:
    assert run(ROOT, memcached, first)[:3] == ["201", "201 x", "200 False"]
