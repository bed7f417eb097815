"""Addresses: mounts, proxies, host names, and requests that hosts pass on oddly."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote, urljoin

import pytest
from werkzeug.test import create_environ, run_wsgi_app

from tests.support import BROWSER, Memcached, ask, is_problem, make


def test_location_does_not_depend_on_the_host_header(client: Any) -> None:
    created = client.post("/files", data=b"x", headers={"Host": "<script>"})
    assert created.status_code == 201
    assert created.headers["Location"].startswith("files/")


@pytest.mark.parametrize("path", ["/files/a/b", "/nowhere", "/nowhere/"])
def test_error_page_links_to_the_upload_page(client: Any, path: str) -> None:
    page = client.get(path, headers=BROWSER).text
    [link] = re.findall('<a href="(.*)">Upload', page)
    assert urljoin(f"http://localhost/prod{path}", link) == "http://localhost/prod/"


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/store", "http://localhost/store/"),
        ("/a/b c", "http://localhost/a/b%20c/"),
        ("/x:y", "http://localhost/x%3Ay/"),
    ],
)
def test_mount_without_its_slash_leads_to_it(
    client: Any, path: str, location: str
) -> None:
    mounted = {"SCRIPT_NAME": path, "PATH_INFO": ""}
    answer = client.get(path, environ_overrides=mounted)
    assert (answer.status_code, answer.data) == (308, b"")
    there = answer.headers["Location"]
    assert urljoin(f"http://localhost{quote(path)}", there) == location
    proxied = f"https://files.example/more{quote(path)}"
    assert urljoin(proxied, there).startswith(proxied + "/")
    mounted["PATH_INFO"] = "/"
    assert client.get(path, environ_overrides=mounted).status_code == 200


# MEMCHUNK_HOSTS


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
def test_host_that_is_listed(memcached: Memcached, host: str, status: int) -> None:
    hosts = "Files.example, .b.example, [::1]"
    client, headers = make(memcached, hosts=hosts), {"Host": host}
    assert client.get("/", headers=headers).status_code == status


@pytest.mark.parametrize(
    "text",
    [
        "GET /nowhere",
        "PUT /files/a | Authorization: Bearer t",
        "OPTIONS /files/a | Origin: null | Access-Control-Request-Method: PUT",
    ],
)
def test_host_that_is_not_listed_gets_nothing(memcached: Memcached, text: str) -> None:
    client = make(memcached, hosts="files.example", token="t", origins="*")
    refused = is_problem(ask(client, f"{text} | Host: evil.example"), 421)
    assert refused["title"] == "Misdirected Request"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_host_of_a_probe_is_an_address_or_none(memcached: Memcached, path: str) -> None:
    """A page that came by DNS rebinding has only a name."""
    client = make(memcached, hosts="files.example")
    for host in ("10.0.0.7:8000", "[fd00::7]"):
        assert client.get(path, headers={"Host": host}).status_code == 200
    hostless = create_environ(path, "http://waitress.invalid")
    del hostless["HTTP_HOST"]  # as in HTTP/1.0
    assert run_wsgi_app(client.application, hostless)[1] == "200 OK"
    is_problem(client.get(path, headers={"Host": "evil.example"}), 421)


def test_host_behind_proxies(memcached: Memcached) -> None:
    sent = {"Host": "127.0.0.1:8000", "X-Forwarded-Host": "files.example"}
    is_problem(make(memcached, hosts="files.example").get("/", headers=sent), 421)
    client = make(memcached, hosts="files.example", proxies=1)
    assert client.get("/", headers=sent).status_code == 200
    sent["X-Forwarded-Host"] = "files.example, evil.example"
    is_problem(client.get("/", headers=sent), 421)


# What WSGI hosts pass on


@pytest.mark.parametrize("path", ["/files/a", "/", "/healthz"])
def test_upgrade_that_is_not_spoken_is_ignored(client: Any, path: str) -> None:
    client.put("/files/a", data=b"x")
    headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/nowhere"])
def test_date_is_sent_only_if_the_host_sends_none(client: Any, path: str) -> None:
    assert "Date" not in client.get(path).headers
    uwsgi = {"uwsgi.version": b"2.0.31"}
    answer = client.get(path, environ_overrides=uwsgi)
    assert len(answer.headers.getlist("Date")) == 1


@pytest.mark.parametrize("key", ["PATH_INFO", "SCRIPT_NAME", "QUERY_STRING"])
def test_environment_that_wsgi_forbids(client: Any, key: str) -> None:
    # Bytes as Latin-1, says PEP 3333.
    environ = {**create_environ("/healthz"), key: "/\u4f60"}
    data, status, headers = run_wsgi_app(client.application, environ)
    assert (status[:3], headers["Cache-Control"]) == ("400", "no-store")
    assert json.loads(b"".join(data))["status"] == 400
