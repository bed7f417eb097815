"""Whatever comes in: no request is a 500, and WSGI is spoken by its rules."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from wsgiref.validate import validator

import pytest
from hypothesis import HealthCheck, event, given, settings, strategies
from werkzeug.test import Client, TestResponse, create_environ, run_wsgi_app
from werkzeug.wrappers import Request

import memchunk
from tests.support import BOUNDARY, BROWSER, FORM, Memcached, ask, content, make, opened

ETAGS = '"x"|ETAG|W/ETAG|*|"|W/"x"|W/"|,,,|"x", ETAG|"a", *'
DATES = (
    "Thu, 01 Jan 0000 00:00:00 GMT|Mon, 99 Foo 2020|Sun, 06 Nov 9999 08:49:37 GMT"
    "|Thu, 01 Jan 1970 00:00:00 +9999|999999999999999999999999999999999999999"
)
NINES = "9" * 18
# Values of headers, with | between them.
VALUES = {
    "Range": f"bytes=0-0|bytes=-7|bytes=999-2001|bytes=4999-|bytes=-|bytes=99999-"
    f"|bytes=-0|bytes={NINES * 300}-",
    "If-Match": f"ETAG|ETAG|{ETAGS}",
    "If-None-Match": ETAGS,
    "If-Modified-Since": DATES,
    "If-Unmodified-Since": DATES,
    "If-Range": 'ETAG|W/ETAG|"x"|W/|\x7f|Sun, 06 Nov 1994 08:49:37 GMT',
    "Content-Type": f"multipart/form-data|{FORM}|a/b; c=\xff|;"
    "|application/offset+octet-stream",
    "Content-Encoding": "identity|gzip|",
    "Transfer-Encoding": "chunked|gzip, chunked|",
    "Repr-Digest": "sha-256=:AA==:|sha-256=:=:|,|sha-512|=|sha-256=:\xff:",
    "Want-Repr-Digest": "sha-256=1|sha-512=99, sha-256=99|\xff",
    "Accept": "text/html|*/*;q=x|,|text/html;q=9999999999",
    "Authorization": "Basic|Basic =|Basic /w==|Bearer \xff|=|Digest a=b",
    "Origin": "null|http://[|\xff",
    "Host": f"|a b|[::1|x:99999|\xff|{'a' * 300}|xn--a",
    "Sec-Fetch-Site": "|cross-site",
    "Expect": "100-continue|x",
    "Content-Range": "bytes 0-1/2",
    "Cookie": "=|\xff",
    "Tus-Resumable": "1.0.0|0.2.2",
    "Upload-Length": f"0|10|300|{NINES}|-1|\xb2",
    "Upload-Offset": f"0|10|{NINES}|\xb2",
    "Upload-Metadata": "name YQ==|name /w==|name 4pi6,filename| ,, ,|name \xff",
    "Upload-Checksum": "sha1 AAAA|sha1|crc32 AAAA|sha256 \xff",
    "X-HTTP-Method-Override": "PATCH|delete|HEAD|OPTIONS|\xff",
    "Upgrade": "websocket",
    "Connection": "upgrade",
}
CONDITIONS = [key for key in VALUES if key == "Range" or key.startswith("If-")]
PARTS = [
    *[f"--{BOUNDARY}".encode(), b"\r\n", b"--", b"\xff\x00", b"x" * 100],
    b'Content-Disposition: form-data; name="file"; filename="a"',
    b"Content-Disposition: form-data; name=file; filename*=x''%FF",
]
Headers = list[tuple[str, str]]


def headers_of(keys: Iterable[str]) -> strategies.SearchStrategy[tuple[str, str]]:
    """One of these, with one of its values above or whatever a host lets through."""
    anything = strategies.text(
        strategies.characters(max_codepoint=255, exclude_characters="\r\n")
    )
    return strategies.sampled_from(sorted(keys)).flatmap(
        lambda key: strategies.tuples(
            strategies.just(key),
            strategies.sampled_from(VALUES[key].split("|")) | anything,
        )
    )


methods = strategies.sampled_from(
    ["GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH", "X"]
)
paths = strategies.sampled_from(
    ["/files/a", "/files/", "/files", "/", "*", "", "/healthz"]
) | (strategies.binary(max_size=40).map(lambda raw: "/files/" + raw.decode("latin-1")))
uploads = strategies.sampled_from(
    ["/uploads", "/uploads/u", "/uploads/d", "/uploads/x"]
)
queries = strategies.text(
    strategies.characters(max_codepoint=255), max_size=20
) | strategies.sampled_from(
    ["expire=1", "expire=-1", "expire=%FF", "expire=", "name=%FF", "name=a"]
)
bodies = strategies.binary(max_size=300) | strategies.lists(
    strategies.sampled_from(PARTS), max_size=12
).map(b"".join)


class Api(NamedTuple):
    application: Any
    cache: memchunk.FileCache


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    memcached = Memcached(tmp_path_factory.mktemp("m"))
    application = make(memcached, max_size=100_000).application
    with opened.pop() as cache:
        yield Api(application, cache)
    memcached.kill()


def stock(api: Api, path: str) -> dict[str, str]:
    """Put the file "a" where an earlier example may have taken it. Returns what stands
    in requests for its ETag; and for the path, where it is that of a new upload, or of
    one that is done."""
    there = {"ETAG": f'"{api.cache.set("a", content(5000)).version}"'}
    if path in ("/uploads/u", "/uploads/d"):
        headers, data = {"Tus-Resumable": "1.0.0", "Upload-Length": "300"}, b""
        if path == "/uploads/d":
            headers["Content-Type"] = "application/offset+octet-stream"
            data = content(300)
        client = Client(api.application)
        answer = client.post("/uploads", data=data, headers=headers)
        there[path] = "/" + answer.headers["Location"]
    return there


def answer_to(
    api: Api,
    method: str,
    path: str,
    query: str,
    headers: Headers,
    body: bytes,
    is_terminated: bool = False,
) -> TestResponse:
    """The answer to a request as a host would pass it on. What `stock` names stands for
    that."""
    there = stock(api, path)
    environ: dict[str, Any] = {
        **create_environ(),
        "REQUEST_METHOD": method,
        "PATH_INFO": there.get(path, path),
        "QUERY_STRING": query,
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "wsgi.input_terminated": is_terminated,
    }
    for key, value in headers:
        name = f"HTTP_{key.upper().replace('-', '_')}"
        environ[name] = value.replace("ETAG", there["ETAG"])
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    answer = run_wsgi_app(api.application, environ, buffered=True)
    return TestResponse(*answer, Request(create_environ()))


def is_sound(answer: TestResponse) -> None:
    assert 200 <= answer.status_code < 500, answer.text
    for key, value in answer.headers:
        assert all(32 <= ord(character) < 127 for character in key + value)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=methods,
    path=paths | uploads,
    query=queries,
    headers=strategies.lists(headers_of(VALUES), max_size=4),
    body=bodies,
    is_terminated=strategies.booleans(),
)
def test_any_request_is_no_500(api: Api, method: str, path: str, **more: Any) -> None:
    is_sound(answer_to(api, method, path, **more))


STATUSES = {
    "GET": {200, 206, 304, 412, 416},
    "HEAD": {200, 304, 412},
    "PUT": {200, 412},
    "DELETE": {204, 412},
    "PATCH": {200, 412},
}


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=strategies.sampled_from(["GET", *STATUSES]),
    headers=strategies.lists(headers_of(CONDITIONS), min_size=1, max_size=3),
)
def test_any_condition_on_a_file_that_is_there(
    api: Api, method: str, headers: Headers
) -> None:
    answer = answer_to(api, method, "/files/a", "expire=60", headers, b"new")
    is_sound(answer)
    data, status = content(5000), answer.status_code
    event(f"{method} {status}")
    assert status in STATUSES[method]
    if status == 206:
        span = re.findall(r"(\d+)-(\d+)/5000", answer.headers["Content-Range"])[0]
        start, stop = int(span[0]), int(span[1]) + 1
        assert answer.data == data[start:stop]
    elif status == 200 and method == "GET":
        assert answer.data == data
    if status == 412 or method in ("GET", "HEAD"):
        assert api.cache.get("a") == data  # what is refused has changed nothing


REQUESTS = [
    ("GET /files/a", 200),
    ("HEAD /files/a", 200),
    ("GET /files/a | Range: bytes=1-2", 206),
    ("GET /files/a | Range: bytes=9-", 416),
    ("GET /files/a | If-None-Match: *", 304),
    ("POST /files/a", 409),
    ("POST /files/b", 201),
    ("GET /", 200),
    ("GET /readyz", 200),
    ("OPTIONS /files/a", 204),
    ("GET /nowhere", 404),
    ("PUT /", 405),
    ("GET /files/a | Authorization: x", 401),
    ("DELETE /files/a", 204),
]


@pytest.mark.parametrize("accept", ["*/*", BROWSER["Accept"]], ids=["any", "browser"])
@pytest.mark.parametrize(("text", "status"), REQUESTS)
def test_any_answer_is_wsgi(
    memcached: Memcached, accept: str, text: str, status: int
) -> None:
    """And caches keep no error."""
    client = Client(validator(make(memcached, token="t").application))
    more = f" | Accept: {accept}"
    if "Authorization" not in text:
        more += " | Authorization: Bearer t"
    ask(client, "PUT /files/a" + more, b"0123").close()
    with ask(client, text + more) as answer:
        assert answer.status_code == status
        if status >= 400:
            assert answer.headers["Cache-Control"] == "no-store"
            kind = "application/problem+json" if accept == "*/*" else "text/html"
            assert answer.mimetype == kind
