"""Pages of other sites: those that may change nothing, and those that are listed
(https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import FORM, Memcached, ask, is_problem, make


@pytest.mark.parametrize(
    "fields",
    [
        "Sec-Fetch-Site: same-origin | Origin: http://localhost",
        "Sec-Fetch-Site: none",
        "Origin: http://localhost",
        "Origin: https://localhost",  # behind a proxy that speaks TLS
    ],
)
def test_own_site_may_change_files(client: Any, fields: str) -> None:
    assert ask(client, f"PUT /files/a | {fields}").status_code == 201


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
def test_own_site_over_plain_http_is_known_by_its_host(
    client: Any, host: str, origin: str, status: int
) -> None:
    """Browsers send no Sec-Fetch-Site there, and proxies change ports."""
    headers = {"Host": host, "Origin": origin}
    assert client.post("/files", data=b"x", headers=headers).status_code == status


TUS = "Tus-Resumable: 1.0.0 | Upload-Length: 3"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f"POST /uploads | {TUS}", 201),
        ("PUT /files/a", 201),
        ("POST /files | Content-Type: image/png", 201),
        ("POST /files | Content-Type: Text/Plain; x=y", 403),
        (f"POST /files | Content-Type: {FORM}", 403),
        ("POST /files", 403),
        (f"POST /uploads | {TUS} | Sec-Fetch-Site: cross-site", 403),
    ],
)
def test_own_site_behind_a_proxy_that_changes_the_host(
    client: Any, text: str, status: int
) -> None:
    """Its script sends what a page of another site may not send without asking."""
    own = f"{text} | Host: 127.0.0.1:8000 | Origin: http://files.example"
    assert ask(client, own).status_code == status
    is_problem(ask(client, own.replace("http:", "https:")), 403)


@pytest.mark.parametrize("path", ["/files/a", "/uploads"])
def test_preflight_is_answered_no_without_origins(client: Any, path: str) -> None:
    asked = ask(client, f"OPTIONS {path} | {ASKS} | {PAGE}")
    assert (asked.status_code, asked.data) == (204, b"")
    assert "Access-Control" not in str(asked.headers)


# MEMCHUNK_ORIGINS

ORIGIN, LISTED = "http://b.example:81", "https://a.example,http://b.example:81"
PAGE = f"Origin: {ORIGIN} | Sec-Fetch-Site: cross-site"
SENT = "authorization,tus-resumable"
ASKS = f"Access-Control-Request-Method: PUT | Access-Control-Request-Headers: {SENT}"
TOKEN = "Authorization: Bearer t"
READABLE = {"ETag", "Location", "Content-Range", "Upload-Offset", "Repr-Digest"}


@pytest.mark.parametrize("origins", [LISTED, "*"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/files/a"), ("POST", "/files"), ("PATCH", "/uploads/x")],
)
def test_preflight_needs_no_token(
    memcached: Memcached, origins: str, method: str, path: str
) -> None:
    client = make(memcached, token="t", origins=origins)
    preflight = ask(client, f"OPTIONS {path} | {ASKS} | {PAGE}")
    assert (preflight.status_code, preflight.data) == (204, b"")
    shared = {
        key.partition("Access-Control-")[2]: value for key, value in preflight.headers
    }
    assert shared["Allow-Origin"] == ("*" if origins == "*" else ORIGIN)
    assert shared["Allow-Headers"] == SENT
    assert method in shared["Allow-Methods"].split(", ")
    assert int(shared["Max-Age"]) > 0


def test_preflight_repeats_no_bytes_that_are_no_header(memcached: Memcached) -> None:
    asks = ASKS.replace(SENT, "\xff")
    preflight = ask(make(memcached, origins="*"), f"OPTIONS /files/a | {asks} | {PAGE}")
    assert preflight.headers["Access-Control-Allow-Headers"] == ""


@pytest.mark.parametrize("origins", [LISTED, "*"])
@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f"PUT /files/a | {TOKEN}", 201),
        (f"GET /files/a | {TOKEN}", 404),
        ("GET /files/a", 401),
        ("OPTIONS /files/a", 401),
    ],
)
def test_listed_origin_may_read_all_answers(
    memcached: Memcached, origins: str, text: str, status: int
) -> None:
    answer = ask(make(memcached, token="t", origins=origins), f"{text} | {PAGE}")
    assert answer.status_code == status
    allowed = answer.headers["Access-Control-Allow-Origin"]
    assert allowed == ("*" if origins == "*" else ORIGIN)
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert set(exposed) >= READABLE
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert ("Origin" in answer.headers.get("Vary", "")) == (origins != "*")


@pytest.mark.parametrize(
    "origin",
    ["https://a.example.evil", "http://a.example", "null", "https://a.example:444"],
)
@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f"OPTIONS /files/a | {ASKS} | {TOKEN}", 204),
        (f"OPTIONS /files/a | {ASKS}", 401),
        (f"GET /files/a | {TOKEN}", 404),
        (f"PUT /files/a | {TOKEN}", 403),
    ],
)
def test_origin_that_is_not_listed(
    memcached: Memcached, origin: str, text: str, status: int
) -> None:
    client = make(memcached, token="t", origins="https://a.example")
    answer = ask(client, f"{text} | Origin: {origin} | Sec-Fetch-Site: cross-site")
    assert answer.status_code == status
    assert "Access-Control" not in str(answer.headers)
    assert "Origin" in answer.headers["Vary"]
