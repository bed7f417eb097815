"""Bodies of requests: their end, their digests, what is read of refused ones, and
memory."""

from __future__ import annotations

import base64
import hashlib
import tracemalloc
from typing import Any

import pytest

from tests.support import (
    FORM,
    MIB,
    Memcached,
    Stream,
    bearer,
    cases,
    content,
    is_problem,
    make,
    multipart,
    post_form,
    send,
)

CHUNKED = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return base64.b64encode(hashlib.new(algorithm, data).digest()).decode()


DATA = content(5000)
RIGHT = f"sha-256=:{digest(DATA)}:"

# Where a body ends

REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "a length below 0": ({"CONTENT_LENGTH": "-1"}, 400),
    "a length that is a word": ({"CONTENT_LENGTH": "x"}, 400),
    "a length with a line": ({"CONTENT_LENGTH": "1_0"}, 400),
    "a length with a sign": ({"CONTENT_LENGTH": "+1"}, 400),
    "two lengths": ({"CONTENT_LENGTH": "1,1"}, 400),
    "a length in other digits": ({"CONTENT_LENGTH": "\u0661"}, 400),
    "gzip": ({**CHUNKED, "HTTP_TRANSFER_ENCODING": "gzip"}, 400),
    "gzip, chunked": ({**CHUNKED, "HTTP_TRANSFER_ENCODING": "gzip, chunked"}, 400),
    "chunked, gzip": ({**CHUNKED, "HTTP_TRANSFER_ENCODING": "chunked, gzip"}, 400),
    "an empty coding": ({**CHUNKED, "HTTP_TRANSFER_ENCODING": ""}, 400),
    # waitress shows the body of such a request as empty, or its framing as the body.
    "chunked in HTTP/1.0": ({**CHUNKED, "SERVER_PROTOCOL": "HTTP/1.0"}, 400),
    "a host that shows no end": ({"HTTP_TRANSFER_ENCODING": "chunked"}, 411),
    "a host that is unknown": ({**CHUNKED, "SERVER_SOFTWARE": "x"}, 411),
    "only an unknown digest": ({**CHUNKED, "HTTP_REPR_DIGEST": "md5=:AAAA:"}, 411),
    "a digest that is none": ({"HTTP_REPR_DIGEST": "sha-256"}, 400),
    "a digest of the body that is none": ({"HTTP_CONTENT_DIGEST": "sha-256"}, 400),
}


@cases(("environ", "status"), REFUSED)
@pytest.mark.parametrize("body", [b"", b"xx"], ids=["empty", "not empty"])
def test_body_that_is_refused_is_not_read_before(
    client: Any, memcached: Memcached, environ: Any, status: int, body: bytes
) -> None:
    stream, length = Stream(body), None if "CONTENT_LENGTH" in environ else len(body)
    if "HTTP_TRANSFER_ENCODING" in environ:
        length = None
    is_problem(send(client, "PUT", "/files/a", stream, length, environ=environ), status)
    assert stream.sizes == []
    assert memcached.keys() == []


@pytest.mark.parametrize("field", ["Repr-Digest", "Content-Digest"])
def test_body_that_is_chunked_is_proved_whole_by_a_digest(
    client: Any, memcached: Memcached, field: str
) -> None:
    options: Any = {"headers": {field: RIGHT}, "environ": CHUNKED}
    for size, status in ((4999, 400), (5000, 201)):
        assert memcached.keys() == []
        stream = Stream(DATA[:size])
        answer = send(client, "PUT", "/files/a", stream, None, **options)
        assert answer.status_code == status


def test_body_that_is_chunked_may_have_a_length_too(client: Any) -> None:
    environ = {**CHUNKED, "SERVER_SOFTWARE": "Werkzeug/3"}
    stored = send(client, "PUT", "/files/a", Stream(b"abc"), 1, environ=environ)
    assert stored.json["size"] == 3


def test_body_without_a_word_about_it(client: Any) -> None:
    """As in HTTP/2. If the host's stream tells its end, there may be one."""
    known = {"wsgi.input_terminated": True, "SERVER_SOFTWARE": "Werkzeug/3"}
    granian = {"wsgi.input_terminated": True, "SERVER_SOFTWARE": "Granian"}
    for environ, size in (({}, 0), (known, 3)):
        stored = send(client, "PUT", "/files/a", Stream(b"abc"), None, environ=environ)
        assert stored.json["size"] == size
    refused = send(client, "PUT", "/files/a", Stream(b"abc"), None, environ=granian)
    is_problem(refused, 411)


def test_body_is_not_read_beyond_its_length(client: Any) -> None:
    stream = Stream(b"0123456789")
    assert send(client, "PUT", "/files/a", stream, 4).status_code == 201
    assert client.get("/files/a").data == b"0123"
    assert stream.tell() == 4


def test_body_in_the_identity_coding(client: Any) -> None:
    headers = {"Content-Encoding": "Identity"}
    assert client.put("/files/a", data=b"x", headers=headers).status_code == 201


def broken() -> None:
    raise OSError("Invalid chunk header")


@pytest.mark.parametrize("environ", [{}, {**CHUNKED, "SERVER_SOFTWARE": "Werkzeug/3"}])
def test_body_that_cannot_be_read(
    client: Any, memcached: Memcached, environ: dict[str, Any]
) -> None:
    stream, length = Stream(b"xxxx", broken), None if environ else 4
    refused = send(client, "PUT", "/files/a", stream, length, environ=environ)
    is_problem(refused, 400)
    assert memcached.keys() == []
    refused.close()
    assert len(stream.sizes) == 1  # nobody asks the host for more of it


# Refused bodies


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/files/a", {}, 401),
        ("/nowhere", bearer("t"), 404),
        ("/", {}, 405),
        ("/files/a", {**bearer("t"), "Origin": "https://b.example"}, 403),
        ("/files/a", bearer("t"), 413),
    ],
)
def test_body_that_is_refused_is_read_after_the_answer(
    memcached: Memcached, clock: Any, path: str, headers: dict[str, str], status: int
) -> None:
    """Else a host would reset the connection, and a proxy would answer 502."""
    client, stream = make(memcached, token="t", max_size=1000), Stream(bytes(MIB))
    refused = send(client, "PUT", path, stream, MIB, headers=headers)
    assert (refused.status_code, stream.sizes) == (status, [])
    refused.close()
    assert stream.tell() == MIB
    # Small ones first: hosts wait for all bytes of a read.
    assert stream.sizes[0] == 1
    assert 50_000 < max(stream.sizes) < 200_000


def test_body_that_is_refused_is_read_up_to_64_mib(client: Any, clock: Any) -> None:
    stream = Stream(bytes(80 * MIB))
    send(client, "PUT", "/files/a", stream, 80 * MIB).close()
    assert 64 * MIB <= stream.tell() < 65 * MIB


def test_body_that_is_refused_and_drips_is_read_for_some_seconds(
    client: Any, clock: Any
) -> None:
    """By the byte, so that its sender does not hold a thread for longer."""

    def tick() -> None:
        clock.now += 0.1

    stream = Stream(bytes(1000), tick)
    send(client, "PUT", "/nowhere", stream, 1000).close()
    assert set(stream.sizes) == {1}
    assert 10 < len(stream.sizes) < 100


def test_body_that_is_refused_may_break_off(client: Any) -> None:
    send(client, "PUT", "/nowhere", Stream(b"", broken), 1000).close()


# Digests

WRONG = f"sha-256=:{digest(b'other')}:"
REFUSED_DIGESTS = {
    "of another file": WRONG,
    "the second is of another": f"{RIGHT}, sha-512=:{digest(b'other', 'sha512')}:",
    "too short": "sha-256=:x:",
    "no colons": "sha-256=x",
    "no value": "sha-256",
    "a comma at the end": f"{RIGHT},",
    "no comma": f"{RIGHT} sha-512=1",
    "no colon at the end": RIGHT[:-1],
    "a string without an end before": f'a="unended, {RIGHT}',
    "a string without an end after": f'{RIGHT}, a="unended',
    "the last counts": f"{RIGHT}, {WRONG}",
    "a parameter": f"{WRONG};q=1",
}
TAKEN_DIGESTS = {
    "one": RIGHT,
    "two": f"sha-512=:{digest(DATA, 'sha512')}:, {RIGHT}",
    "unknown": "md5=:whatever:",
    "parameters": f"{RIGHT};a=1;b",
    "a string": f'x="a, sha-256=:AAAA:, \\"b", {RIGHT}',
    "a list": f"x=(1 2.5;q=?0), y;z=tok/en,{RIGHT}",
    "no padding": f"sha-256=:{digest(DATA).rstrip('=')}:",
    "nothing": "",
}


@cases("header", REFUSED_DIGESTS)
@pytest.mark.parametrize("field", ["Repr-Digest", "Content-Digest"])
def test_digest_that_is_wrong_or_none(
    client: Any, memcached: Memcached, field: str, header: str
) -> None:
    is_problem(client.put("/files/a", data=DATA, headers={field: header}), 400)
    assert memcached.keys() == []


@cases("header", TAKEN_DIGESTS)
@pytest.mark.parametrize("field", ["Repr-Digest", "Content-Digest"])
def test_digest_in_any_form(client: Any, field: str, header: str) -> None:
    stored = client.put("/files/a", data=DATA, headers={field: header})
    assert stored.status_code == 201


def test_digest_of_a_form_is_of_its_file_or_of_its_bytes(
    client: Any, memcached: Memcached
) -> None:
    body = multipart(("file", "a", DATA))
    right = {"Repr-Digest": RIGHT, "Content-Digest": f"sha-256=:{digest(body)}:"}
    for field in right:
        [other] = right.keys() - {field}
        wrong = post_form(client, body, headers={field: right[other]})
        is_problem(wrong, 400)
    assert memcached.keys() == []
    assert post_form(client, body, headers=right).status_code == 201


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("sha-512=9, sha-256=1", f"sha-512=:{digest(DATA, 'sha512')}:"),
        ("sha-256=9, sha-512=1", RIGHT),
        *[("sha-256=0", None), ("sha-256=-1", None), ("md5=10", None), ("x", None)],
    ],
)
def test_digest_of_a_download_is_the_one_that_is_liked_best(
    client: Any, wanted: str, expected: str | None
) -> None:
    client.put("/files/a", data=DATA)
    read = client.get("/files/a", headers={"Want-Repr-Digest": wanted})
    assert (read.data, read.headers.get("Repr-Digest")) == (DATA, expected)


# Memory


@pytest.mark.parametrize("is_form", [False, True], ids=["file", "form"])
def test_body_is_not_held_in_memory(memcached: Memcached, is_form: bool) -> None:
    client, peaks = make(memcached, chunk_size=None), []
    environ = {"CONTENT_TYPE": FORM} if is_form else {}
    for size in (8 * MIB, 48 * MIB):
        body = multipart(("file", "a", bytes(size))) if is_form else bytes(size)
        stream = Stream(body)
        tracemalloc.start()
        stored = send(client, "PUT", "/files/a", stream, len(body), environ=environ)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert stored.json["size"] == size
    assert peaks[1] - peaks[0] < MIB
    assert peaks[1] < 8 * MIB


@pytest.mark.parametrize("header", ["Accept", "Range", "Want-Repr-Digest"])
def test_download_holds_the_file_once(memcached: Memcached, header: str) -> None:
    client = make(memcached, chunk_size=None)
    client.put("/files/a", data=bytes(40 * MIB))
    values = {"Range": "bytes=1-", "Want-Repr-Digest": "sha-256=1"}
    tracemalloc.start()
    # The first piece is taken, and all is held.
    read = client.get("/files/a", headers={header: values.get(header, "*/*")})
    assert read.content_length >= 40 * MIB - 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    read.close()
    assert peak < 48 * MIB
