"""Forms with several files, and the extensions of random names."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urljoin

import pytest
from werkzeug.test import Client

import httpfiles
import wsgi
from tests.support import BOUNDARY, MIB, Memcached, opened

BROWSER = {"Accept": "text/html,*/*;q=0.8"}
TUS = {"Tus-Resumable": "1.0.0"}
Part = tuple[str, "str | None", bytes]  # name, file name, content


def make(memcached: Memcached, **values: Any) -> Any:
    settings = wsgi.Settings(servers=memcached.server, **values)
    cache = settings.connect()
    opened.append(cache)
    return Client(wsgi.Application(cache, settings))


@pytest.fixture
def client(memcached: Memcached) -> Any:
    return make(memcached)


def post(client: Any, *parts: Part, path: str = "/files", **options: Any) -> Any:
    """Send a form of these parts, or what `cut` bytes less have of it."""
    body = b""
    for name, filename, content in parts:
        disposition = f'form-data; name="{name}"'
        if filename is not None:
            disposition += f'; filename="{filename}"'
        head = f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n"
        body += head.encode() + content + b"\r\n"
    body += f"--{BOUNDARY}--\r\n".encode()
    return client.post(
        path,
        data=body[: len(body) - options.pop("cut", 0)],
        content_type=f"multipart/form-data; boundary={BOUNDARY}",
        **options,
    )


A, B, C = ("file", "a.txt", b"one"), ("file", "b.png", b""), ("x", "c", bytes(100_000))


def test_several_files_are_stored_one_after_another(client: Any) -> None:
    answer = post(client, ("expire", None, b"60"), A, ("y", None, b"z"), B, C)
    assert answer.status_code == 201, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    assert [each["size"] for each in answer.json] == [3, 0, 100_000]
    for each, (_, filename, content) in zip(answer.json, (A, B, C)):
        got = client.get(each["url"])
        assert got.data == content
        assert f'filename="{filename}"' in got.headers["Content-Disposition"]
        assert each["etag"] == got.headers["ETag"]
        assert 0 < each["expires"] - each["created"] <= 60
        assert each == client.get(each["url"] + "?info").json


def test_one_file_of_a_form_is_answered_as_ever(client: Any) -> None:
    answer = post(client, A, ("file", "", b""))
    assert answer.status_code == 201
    assert answer.json["size"] == 3
    assert urljoin("/files", answer.headers["Location"]) == answer.json["url"]
    assert answer.headers["ETag"] == answer.json["etag"]


def test_several_files_for_one_name_are_refused(
    client: Any, memcached: Memcached
) -> None:
    for method in ("POST", "PUT"):
        answer = post(client, A, B, path="/files/x", method=method)
        assert answer.status_code == 400
        assert "more than one file" in answer.json["detail"]
    assert memcached.keys() == []


@pytest.mark.parametrize(
    ("parts", "cut", "status", "stored"),
    [
        ((A, C), 200, 400, [3]),  # the second file breaks off
        ((A, C), 1 + len(BOUNDARY), 400, [3]),  # in mid-boundary
        ((A, B, ("expire", None, b"60")), 0, 400, [3]),
        ((A, ("expire", None, b"60"), B), 0, 400, None),
        ((A, B, ("file", "d", bytes(MIB + 1))), 0, 413, [3, 0]),
        ((("file", "d", bytes(MIB + 1)), A), 0, 413, None),
    ],
)
def test_a_file_that_fails_tells_which_are_stored(
    memcached: Memcached,
    parts: tuple[Part, ...],
    cut: int,
    status: int,
    stored: list[int] | None,
) -> None:
    client = make(memcached, max_size=MIB)
    answer = post(client, *parts, cut=cut)
    problem = json.loads(answer.data)
    assert (answer.status_code, answer.mimetype) == (
        status,
        "application/problem+json",
    )
    if stored is None:
        assert "stored" not in problem
        assert memcached.keys() == []
        return
    assert [each["size"] for each in problem["stored"]] == stored
    for each in problem["stored"]:
        assert each == client.get(each["url"] + "?info").json


def test_several_files_have_a_page_of_links_for_a_browser(client: Any) -> None:
    answer = post(client, ("f", "<b>.txt", b"one"), B, headers=BROWSER)
    assert answer.status_code == 201
    assert answer.mimetype == "text/html"
    assert "<b>" not in answer.text
    links = re.findall('<a href="(files/[^"]+)">([^<]+)</a>', answer.text)
    assert [name for _, name in links] == ["&lt;b&gt;.txt", "b.png"]
    assert [client.get("/" + link).data for link, _ in links] == [b"one", b""]


def test_a_file_that_fails_has_links_to_the_stored_ones_for_a_browser(
    client: Any,
) -> None:
    answer = post(client, A, C, cut=200, headers=BROWSER)
    assert answer.status_code == 400
    [link] = re.findall('Stored: <a href="([^"]+)">', answer.text)
    assert client.get(link).data == b"one"


def test_several_files_are_limited_together(memcached: Memcached) -> None:
    """So that one file that is too large is refused before memcached gets a byte."""
    client = make(memcached, max_size=MIB)
    answer = post(client, *[("f", "a", bytes(MIB // 2))] * 3)
    assert answer.status_code == 413
    assert answer.json["detail"] == "A file or a form may have up to 1 MiB."
    assert memcached.keys() == []


def test_several_files_are_limited_together_without_a_length(
    memcached: Memcached,
) -> None:
    client = make(memcached, max_size=MIB)
    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    environ = {**chunked, "CONTENT_LENGTH": "", "SERVER_SOFTWARE": "gunicorn"}
    half = ("f", "a", bytes(MIB // 2))
    assert post(client, half, half, environ_overrides=environ).status_code == 201
    answer = post(client, half, half, half, environ_overrides=environ)
    assert answer.status_code == 413
    stored = json.loads(answer.data)["stored"]
    assert len(stored) == 2
    assert all(client.get(each["url"]).data == bytes(MIB // 2) for each in stored)


def test_new_files_fulfil_no_if_match(client: Any, memcached: Memcached) -> None:
    for headers in ({"If-Match": "*"}, {"If-Match": '"x"'}):
        assert post(client, A, B, headers=headers).status_code == 412
    assert memcached.keys() == []
    assert post(client, A, headers={"If-None-Match": "*"}).status_code == 201


# Extensions


NAMES = [
    ("report.pdf", ".pdf"),
    ("REPORT.PDF", ".pdf"),
    ("a.tar.gz", ".gz"),
    ("x.1234567890", ".1234567890"),
    ("x.12345678901", ""),
    ("x.jp\u00e9g", ""),
    ("x.\u0661", ""),
    ("x.p-f", ""),
    ("x.p f", ""),
    ("x.", ""),
    ("x", ""),
    (".pdf", ""),
    ("a/.pdf", ""),
    ("a.b/c", ""),
    ("a.pdf ", ""),
    ("a.pdf\t", ""),
    ("a.%2e", ""),
]
TYPES = [
    ("application/pdf", ".pdf"),
    ("IMAGE/PNG", ".png"),
    ("image/jpeg", ".jpg"),
    ("text/plain; charset=utf-8", ".txt"),
    ("application/octet-stream", ""),
    ("application/x-www-form-urlencoded", ""),
    ("application/x-unknown", ""),
    ("nonsense", ""),
    ("../..", ""),
    ("", ""),
]


@pytest.mark.parametrize(("filename", "extension"), NAMES)
def test_extension_of_a_file_name_is_that_of_the_address(
    client: Any, filename: str, extension: str
) -> None:
    name = post(client, ("file", filename, b"x")).json["name"]
    assert re.fullmatch("[0-9a-f]{32}" + re.escape(extension), name)
    assert httpfiles.extension("image/png", filename) == extension


@pytest.mark.parametrize(("content_type", "extension"), TYPES)
def test_extension_of_a_body_follows_from_its_type(
    client: Any, content_type: str, extension: str
) -> None:
    answer = client.post("/files", data=b"x", content_type=content_type)
    name = answer.json["name"]
    assert re.fullmatch("[0-9a-f]{32}" + re.escape(extension), name)
    assert client.get(urljoin("/files", answer.headers["Location"])).data == b"x"


@pytest.mark.parametrize(
    ("metadata", "extension"),
    [
        ("filename cmVwb3J0LlBERg==", ".pdf"),
        ("name cmVwb3J0LlBERg==,filetype aW1hZ2UvcG5n", ".pdf"),
        ("filetype aW1hZ2UvcG5n", ".png"),
        ("", ""),
    ],
)
def test_extension_of_an_upload_that_resumes_is_that_of_its_metadata(
    client: Any, metadata: str, extension: str
) -> None:
    headers = {**TUS, "Upload-Length": "0", "Upload-Metadata": metadata}
    address = client.post("/uploads", headers=headers).headers["Content-Location"]
    assert re.fullmatch("/files/[0-9a-f]{32}" + re.escape(extension), address)
    named = client.post("/uploads?name=a", headers=headers)
    assert named.headers["Content-Location"] == "/files/a"
