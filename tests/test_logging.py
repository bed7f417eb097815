"""The log: one line for each failed request, with the id that its answer carries; one
line if a memcached stops answering, and one if it is back."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from typing import Any

import pytest
from werkzeug.test import Client, create_environ, run_wsgi_app

import memchunk
import wsgi
from tests.support import FOLDER, HOSTS, Memcached, Server, Start, opened, wait_for

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


def make(*servers: str, **values: Any) -> Any:
    settings = wsgi.Settings(servers=",".join(servers), **values)
    cache = settings.connect()
    opened.append(cache)
    return Client(wsgi.Application(cache, settings))


@pytest.fixture
def client(memcached: Memcached) -> Any:
    return make(memcached.server)


def lines(caplog: Any, *levels: int) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("memchunk") and record.levelno in levels
    ]


WARNING, ERROR = logging.WARNING, logging.ERROR


def test_a_failed_request_has_one_line(client: Any, caplog: Any) -> None:
    answer = client.get("/files/a%0Ab", headers={"X-Request-Id": "abc-1._Z"})
    assert answer.status_code == 404
    [line] = lines(caplog, WARNING, ERROR)
    cause = r"no file named 'a\\nb' is stored"
    pattern = rf"GET '/files/a\\nb': 404 after \d+\.\d{{3}} s, {cause} \[abc-1\._Z\]"
    assert re.fullmatch(pattern, line), line


def test_a_failed_request_of_the_server_is_an_error(
    client: Any, memcached: Memcached, caplog: Any
) -> None:
    memcached.kill()
    for _ in range(3):
        assert client.put("/files/a", data=b"x").status_code == 503
    found = lines(caplog, ERROR)
    assert len(found) == 3
    for line in found:
        assert line.startswith("PUT '/files/a': 503 after ")
        assert memcached.server in line


def test_a_failed_request_tells_what_caused_it(client: Any, caplog: Any) -> None:
    client.put("/files/a", data=b"x", headers={"Repr-Digest": "sha-256=x"})
    [line] = lines(caplog, WARNING)
    assert "400 after" in line
    assert "The Repr-Digest has not the form" in line


def test_a_failed_request_that_nobody_expected_has_a_traceback(
    client: Any, caplog: Any, monkeypatch: Any
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(memchunk.FileCache, "open", fail)
    answer = client.get("/files/a")
    assert answer.status_code == 500
    assert "two" not in answer.text
    [line] = lines(caplog, ERROR)
    assert "unexpected error: two lines" in line
    assert caplog.records[-1].exc_info[0] is ZeroDivisionError


def test_what_goes_well_is_not_logged(client: Any, caplog: Any) -> None:
    etag = client.put("/files/a", data=b"x").headers["ETag"]
    assert client.get("/files/a", headers={"If-None-Match": etag}).status_code == 304
    assert client.get("/").status_code == 200
    assert caplog.records == []


@pytest.mark.parametrize("sent", ["a", "A-b_c.9", "x" * 64])
def test_request_id_of_a_proxy_is_kept(client: Any, sent: str) -> None:
    answer = client.get("/healthz", headers={"X-Request-Id": sent})
    assert answer.headers["X-Request-Id"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 65, "a b", "a\tb", "a,b", "\u00e9", "a[b]"])
def test_request_id_that_is_not_sane_is_replaced(client: Any, sent: str) -> None:
    answer = client.get("/healthz", headers={"X-Request-Id": sent})
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-Id"])


def test_request_ids_are_in_every_answer(client: Any) -> None:
    asked = [
        client.get("/"),
        client.options("/files"),
        client.put("/files/a", data=b"x"),
        client.get("/files/a", headers={"Accept": "text/html"}),
        client.get("/nowhere", headers={"Accept": "text/html"}),
        client.post("/uploads"),
    ]
    ids = [answer.headers["X-Request-Id"] for answer in asked]
    environ = {**create_environ("/"), "PATH_INFO": "\u4f60"}  # no WSGI host does this
    ids.append(run_wsgi_app(client.application, environ)[2]["X-Request-Id"])
    assert len(set(ids)) == len(ids)


def test_request_id_can_be_read_by_pages_of_other_sites(memcached: Memcached) -> None:
    client = make(memcached.server, origins="https://a.example")
    headers = client.get("/healthz", headers={"Origin": "https://a.example"}).headers
    assert "X-Request-Id" in headers["Access-Control-Expose-Headers"]


# memcacheds that come and go


def test_a_memcached_that_stops_and_is_back_has_two_lines(
    client: Any, memcached: Memcached, caplog: Any
) -> None:
    assert client.get("/files/a").status_code == 404
    memcached.kill()
    for _ in range(3):
        assert client.get("/files/a").status_code == 503
    memcached.start()
    for _ in range(3):
        assert client.put("/files/a", data=b"x").status_code in (200, 201)
    _, stopped, back = lines(caplog, WARNING)
    assert stopped.startswith(f"memcached at {memcached.server} does not answer: ")
    assert back == f"memcached at {memcached.server} answers again"


def test_a_memcached_that_refuses_a_login_does_not_have_the_login_in_the_log(
    start_memcached: Start, caplog: Any
) -> None:
    first, second = start_memcached(), start_memcached()
    client = make(first.server, f"user:s3cret@{second.server}", timeout=1)
    answers = [client.put(f"/files/n{n}", data=b"x").status_code for n in range(50)]
    assert set(answers) == {201, 503}
    assert second.server in caplog.text
    assert "s3cret" not in caplog.text


# Where nothing is configured


SCRIPT = """
import logging
{configure}
import wsgi
from werkzeug.test import Client
Client(wsgi.application).get("/files/a")
"""


@pytest.mark.parametrize(
    ("configure", "pattern"),
    [
        ("", rf"{STAMP} WARNING memchunk\.wsgi: GET '/files/a': 404 after .*\n"),
        ("logging.basicConfig(format='X %(message)s')", r"X GET '/files/a': 404 .*\n"),
        (
            "logging.getLogger('memchunk').addHandler(logging.StreamHandler())",
            r"GET '/files/a': 404 .*\n",
        ),
        ("logging.getLogger('memchunk').setLevel('ERROR')", ""),
    ],
    ids=["nothing", "root", "memchunk", "level"],
)
def test_lines_have_time_and_level_unless_logging_is_configured(
    memcached: Memcached, configure: str, pattern: str
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(configure=configure)],
        cwd=FOLDER,
        env={**os.environ, "MEMCHUNK_SERVERS": memcached.server},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(pattern, run.stderr), run.stderr


def test_access_log_of_python_wsgi_py_has_time_and_level(
    memcached: Memcached, tmp_path: Any
) -> None:
    environ = {"MEMCHUNK_SERVERS": memcached.server}
    server = Server(HOSTS["werkzeug"], tmp_path / "log", **environ).wait()
    try:
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(server.url("/files/a"))
        # Werkzeug writes some lines in colours.
        access = rf"{STAMP} INFO werkzeug: .*GET /files/a HTTP/1.1.* 404"
        wait_for(lambda: re.search(access, server.output()), "a line of the access log")
        failed = rf"{STAMP} WARNING memchunk\.wsgi: GET '/files/a': 404 after "
        assert re.search(failed, server.output())
    finally:
        server.stop()


def test_a_file_of_an_unknown_format_is_called_so(
    client: Any, memcached: Memcached, caplog: Any
) -> None:
    client.put("/files/a", data=b"x")
    [key] = memcached.keys()
    body = memcached.read(key)[4:].replace(b'"format":2', b'"format":3')
    memcached.write(key, zlib.crc32(body).to_bytes(4, "big") + body)
    answer = client.get("/files/a")
    assert answer.status_code == 502
    told = "'a' can't be read: its format 3 is unknown"
    assert answer.json["detail"] == f"{told}. Upload it again."
    assert told in lines(caplog, ERROR)[0]
