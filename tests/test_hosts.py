"""The HTTP API on real WSGI hosts, in front of real clients, and behind Lambda
adapters.

Every host runs in a process of its own, started by the command that the README gives,
and gets the same requests. What a host can't do is named here, in HOSTS, and in the
README's table."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import requests

from tests.support import (
    HOSTS,
    MIB,
    SECONDS,
    Memcached,
    Server,
    Start,
    form,
    receive,
    refusal,
    running,
    snippet,
)


@pytest.fixture(scope="module", params=HOSTS)
def server(
    request: Any, large_memcached: Memcached, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with running(
        HOSTS[request.param], large_memcached, tmp_path_factory.mktemp("host")
    ) as server:
        yield server


@pytest.fixture(scope="module")
def big() -> bytes:
    return os.urandom(50 * MIB)


# Uploads and downloads


def test_50_mib_and_back(server: Server, big: bytes) -> None:
    created = server.request("POST", "/files", big)
    assert created.status == 201
    read = server.request("GET", "/files/" + created.json["name"])
    assert (read.status, read.data == big) == (200, True)
    assert server.request("DELETE", "/files/" + created.json["name"]).status == 204


def test_50_mib_in_a_form(server: Server, big: bytes) -> None:
    body, headers = form(big)
    created = server.request("POST", "/files", body, headers)
    assert created.status == 201
    read = server.request("GET", "/files/" + created.json["name"])
    assert (read.status, read.data == big) == (200, True)
    assert 'filename="a b.bin"' in read.headers["Content-Disposition"]


@pytest.mark.parametrize("is_form", [False, True])
@pytest.mark.parametrize("name", ["werkzeug", "gunicorn", "cheroot", "uwsgi"])
def test_memory(
    name: str,
    is_form: bool,
    large_memcached: Memcached,
    tmp_path: pathlib.Path,
    big: bytes,
) -> None:
    """What an upload takes in a process that had none of that size: less than three of
    the library's batches, with what malloc keeps."""
    with running(HOSTS[name], large_memcached, tmp_path) as server:
        for _ in range(8):  # so that each worker has done once what it does
            assert server.request("PUT", "/files/m", big[:MIB]).status in (200, 201)
        before = server.peak()
        body, headers = form(big) if is_form else (big, {})
        assert server.request("PUT", "/files/m", body, headers).status == 200
        assert server.peak() - before < 12 * MIB


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 1_000_000])
def test_small_files(server: Server, big: bytes, size: int) -> None:
    for body, headers in ((big[:size], {}), form(big[:size])):
        created = server.request("PUT", "/files/small", body, headers)
        assert created.status in (200, 201), created.data
        assert server.request("GET", "/files/small").data == big[:size]


def test_chunked_transfer_coding(server: Server, big: bytes) -> None:
    pieces = (big[slice(start, start + 99_999)] for start in range(0, 5 * MIB, 99_999))
    data = b"".join(
        big[slice(start, start + 99_999)] for start in range(0, 5 * MIB, 99_999)
    )
    headers = {"Transfer-Encoding": "chunked"}
    if not server.host.chunked:
        refused = server.request(
            "PUT", "/files/c", [b"x"], headers, encode_chunked=True
        )
        assert (refused.status, refused.json["status"]) == (411, 411)
        if not server.host.ends:
            return
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        headers["Repr-Digest"] = f"sha-256=:{digest}:"
    created = server.request("PUT", "/files/c", pieces, headers, encode_chunked=True)
    assert created.status == 201
    assert server.request("GET", "/files/c").data == data
    assert server.request("DELETE", "/files/c").status == 204


def test_a_chunked_body_over_the_limit(server: Server) -> None:
    if not server.host.chunked:
        return
    pieces = (bytes(MIB) for _ in range(60))
    headers = {"Transfer-Encoding": "chunked"}
    refused = server.request("PUT", "/files/none", pieces, headers, encode_chunked=True)
    assert (refused.status, refused.json["status"]) == (413, 413)
    assert server.request("GET", "/files/none").status == 404


def test_expect_100_continue(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(
            b"PUT /files/e HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
            b"Expect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"hello")
        assert b"HTTP/1.1 20" in receive(connection)
    assert server.request("GET", "/files/e").data == b"hello"


CHUNK = b"186a0\r\n" + bytes(100_000) + b"\r\n"
CUT_CHUNKS = {
    "in a chunk": CHUNK[:50_000],
    "after a chunk's bytes": CHUNK[:-2],
    "between chunks": CHUNK,
    "in a chunk's size": CHUNK + b"186",
    "in the zeros of a chunk's size": CHUNK + b"000",  # of "000186a0", which is allowed
    "after a chunk's size": CHUNK + b"186a0\r\n",
}


@pytest.mark.parametrize("where", ["in a file", "in a form", *CUT_CHUNKS])
def test_a_body_cut_off(server: Server, where: str) -> None:
    """It is not stored, whether its sender stays for the answer, leaves, or crashes."""
    whole, headers = (
        form(bytes(100_000)) if where == "in a form" else (bytes(100_000), {})
    )
    headers["Content-Length"] = str(len(whole))
    if where in CUT_CHUNKS:
        headers = {"Transfer-Encoding": "chunked"}
    sent = CUT_CHUNKS.get(where, whole[: len(whole) // 2])
    more = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    head = f"PUT /files/cut HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode()
    server.request("DELETE", "/files/cut")  # which another host may have stored
    answer = server.raw(head, sent)
    # A host may see no one to answer.
    assert not answer or b" 4" in answer.split(b"\r\n")[0]
    for how in (b"", struct.pack("ii", 1, 0)):
        with server.connect() as connection:
            if how:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)
            connection.sendall(head + sent)
    assert server.request("GET", "/files/cut").status == 404


@pytest.mark.parametrize("is_form", [False, True])
def test_a_client_that_sends_too_much_gets_to_read_why(
    server: Server, is_form: bool
) -> None:
    body, headers = form(bytes(60_000_000)) if is_form else (bytes(60_000_000), {})
    refused = server.request("POST", "/files", body, headers)  # sends all, then reads
    assert (refused.status, refused.json["status"]) == (413, 413)
    assert "50 MiB" in refused.json["detail"]


def test_a_body_beyond_what_is_dropped_does_not_hold_the_connection(
    server: Server,
) -> None:
    size = 90 * MIB
    head = b"PUT /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
    server.raw(head, bytes(size))
    assert server.request("GET", "/healthz").status == 200


def test_a_client_that_waits_is_answered_before_it_sends(server: Server) -> None:
    if not server.host.early:
        return
    with server.connect() as connection:
        connection.sendall(
            b"POST /files HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n"
        )
        assert b" 413 " in connection.recv(65536).split(b"\r\n")[0]


def test_other_refusals_can_be_read(server: Server, big: bytes) -> None:
    assert server.request("PUT", "/files/there", b"x").status in (200, 201)
    for method, path, headers, status in (
        ("POST", "/files/there", {}, 409),
        ("PUT", "/files/there", {"If-None-Match": "*"}, 412),
        ("PUT", "/nowhere", {}, 404),
        ("PATCH", "/files/there", {}, 400),
        ("POST", "/files", {"Repr-Digest": "sha-256=:AAAA:"}, 400),
    ):
        refused = server.request(method, path, big[: 20 * MIB], headers)
        assert (refused.status, refused.json["status"]) == (status, status)
    assert server.request("GET", "/files/there").data == b"x"


@pytest.mark.parametrize("name", HOSTS)
def test_an_upload_without_memcached_is_told_so(
    start_memcached: Start, tmp_path: pathlib.Path, name: str
) -> None:
    """Its sender sees the answer, and no broken connection instead."""
    memcached = start_memcached()
    with running(HOSTS[name], memcached, tmp_path) as server:
        memcached.kill()
        body = bytes(4_000_000)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            sent = [
                pool.submit(refusal, server.port, "PUT", "/files/a", body)
                for _ in range(32)
            ]
        assert {each.result() for each in sent} == {503}


def test_a_body_is_never_taken_for_a_request(server: Server) -> None:
    """Pieces of an announced body, each the text of a request, get no answer (RFC 9112,
    6.3). Else a page of another site could delete files with plain POSTs."""
    inner = b"GET /not-a-request HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    lines = (b"POST /files/a", b"GET /healthz", b"PUT /nowhere")

    def statuses(number: int) -> list[bytes]:
        with server.connect() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):  # it may have closed already
                connection.sendall(head % (lines[number % 3], 500 * len(inner)))
                for _ in range(500):
                    connection.send(inner)
                connection.shutdown(socket.SHUT_WR)
            return re.findall(rb"HTTP/1\.[01] (\d{3})", receive(connection))

    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        assert not [each for each in pool.map(statuses, range(300)) if len(each) > 1]


# Reads


def test_reads(server: Server) -> None:
    data = bytes(range(256)) * 4000
    etag = server.request("PUT", "/files/r", data).headers["ETag"]
    head = server.request("HEAD", "/files/r")
    assert (head.status, head.data, head.headers["Content-Length"]) == (
        200,
        b"",
        str(len(data)),
    )
    part = server.request("GET", "/files/r", headers={"Range": "bytes=-300000"})
    assert (part.status, part.data) == (206, data[-300_000:])
    fresh = server.request("GET", "/files/r", headers={"If-None-Match": etag})
    assert (fresh.status, fresh.data) == (304, b"")
    beyond = server.request("GET", "/files/r", headers={"Range": "bytes=9999999-"})
    assert (beyond.status, beyond.headers["Content-Range"]) == (
        416,
        f"bytes */{len(data)}",
    )
    allowed = server.request("OPTIONS", "/files/r")
    assert (allowed.status, allowed.data) == (204, b"")
    assert b"memchunk" in server.request("GET", "/").data
    assert server.request("GET", "/readyz").status == 200


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "a/b//c",
        "\u4f60\u597d \U0001f600",
        "a\r\nX: y",
        "q?#%&+",
        "x" * 1024,
        "\u00e9" * 512,
    ],
)
def test_names(server: Server, name: str) -> None:
    path = "/files/" + quote(name)
    stored = server.request("PUT", path, name.encode())
    assert stored.status in (200, 201)
    assert stored.json["name"] == name
    read = server.request("GET", path)
    assert read.data == name.encode()
    assert "X" not in read.headers


def test_a_name_that_is_none(server: Server) -> None:
    for path in ("/files/%FF", "/files/a%ED%A0%80", "/files/" + "x" * 1025):
        assert server.request("PUT", path, b"x").status == 400


def test_a_connection_that_stays(server: Server) -> None:
    """What follows a refused upload on the same connection is read as a request of its
    own."""
    inner = b"GET /files/none HTTP/1.1\r\nHost: x\r\n\r\n"
    with requests.Session() as session:  # connects again where the host has closed
        session.mount("http://", requests.adapters.HTTPAdapter(max_retries=2))
        for _ in range(5):
            refused = session.put(server.url("/nowhere"), inner)
            assert (refused.status_code, refused.json()["status"]) == (404, 404)
            alive = session.get(server.url("/healthz"))
            assert (alive.status_code, alive.json()) == (200, {"status": "ok"})


def test_many_at_once(server: Server, big: bytes) -> None:
    def there_and_back(index: int) -> bool:
        data = big[slice(index, index + 3 * MIB)]
        assert server.request("PUT", f"/files/many{index}", data).status in (200, 201)
        return server.request("GET", f"/files/many{index}").data == data

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, range(16)))


# Requests that break the rules: whatever the answer, it comes, and the host lives

HOST = b"Host: x\r\n"
RULE_BREAKERS = {
    "garbage": b"\x00\xff\xfe\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "no version": b"GET /files/a\r\n\r\n",
    "version 9": b"GET /files/a HTTP/9.9\r\n" + HOST + b"\r\n",
    "http/1.0": b"GET /files/none HTTP/1.0\r\n\r\n",
    "no host": b"GET /files/none HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /files/none HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "line feeds": b"GET /files/none HTTP/1.1\nHost: x\n\n",
    "absolute": b"GET http://x/files/none HTTP/1.1\r\n" + HOST + b"\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "nul": b"GET /files/\x00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "raw bytes": b"GET /files/\xff\xfe?\x80=\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    "folded": b"GET /files/none HTTP/1.1\r\n" + HOST + b"A: b\r\n c\r\n\r\n",
    "a header without a name": b"GET /files/none HTTP/1.1\r\n" + HOST + b": x\r\n\r\n",
    "a long header": b"GET /files/none HTTP/1.1\r\n"
    + HOST
    + b"A: "
    + b"x" * 99999
    + b"\r\n\r\n",
    "a long address": b"GET /files/" + b"x" * 99999 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "many headers": b"GET /files/none HTTP/1.1\r\n"
    + HOST
    + b"A: b\r\n" * 2000
    + b"\r\n",
    "two lengths": b"PUT /files/bad HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "negative": b"PUT /files/bad HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n",
    "not a number": b"PUT /files/bad HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 0x1\r\n\r\nx",
    "huge": b"PUT /files/bad HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: "
    + b"9" * 40
    + b"\r\n\r\n",
    "bad chunk": b"PUT /files/bad HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
    "no last chunk": b"PUT /files/bad HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "chunk too long": b"PUT /files/bad HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
    "another coding": b"PUT /files/bad HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: gzip\r\n\r\nxx",
    "expect": b"PUT /files/bad HTTP/1.1\r\n"
    + HOST
    + b"Expect: something\r\nContent-Length: 4\r\n\r\n",
}


@pytest.mark.parametrize("what", RULE_BREAKERS)
def test_rule_breakers(server: Server, what: str) -> None:
    server.request("DELETE", "/files/bad")
    answer = server.raw(RULE_BREAKERS[what])
    for status in re.findall(rb"^HTTP/1\.[01] (\d+)", answer, re.MULTILINE):
        assert int(status) < 500 or int(status) in (501, 505), answer
    assert server.request("GET", "/healthz").status == 200
    if what != "two lengths":  # Werkzeug's server and cheroot take the last one
        assert server.request("GET", "/files/bad").status == 404


# Clients


def run(*command: str, cwd: pathlib.Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.fail(
            f"these tests need {command[0]}; install it: 'apt-get install {command[0]}'"
        )
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def file(tmp_path: pathlib.Path, big: bytes) -> pathlib.Path:
    path = tmp_path / "big old file.dat"
    path.write_bytes(big)
    return path


def test_curl(
    server: Server, file: pathlib.Path, tmp_path: pathlib.Path, big: bytes
) -> None:
    fast = ("curl", "-sS", "--fail-with-body")
    posted = json.loads(
        run(*fast, "--data-binary", f"@{file}", server.url("/files"), cwd=tmp_path)
    )
    run(*fast, "-o", "1", server.url(posted["url"]), cwd=tmp_path)
    run(*fast, "-T", str(file), server.url("/files/"), cwd=tmp_path)
    run(*fast, "-o", "2", server.url("/files/big%20old%20file.dat"), cwd=tmp_path)
    sent = json.loads(
        run(*fast, "-F", f"file=@{file}", server.url("/files"), cwd=tmp_path)
    )
    (tmp_path / "saved").mkdir()
    run(*fast, "-OJ", server.url(sent["url"]), cwd=tmp_path / "saved")
    (tmp_path / "3").write_bytes(big[: 20 * MIB])
    run(*fast, "-C", "-", "-o", "3", server.url(sent["url"]), cwd=tmp_path)
    for path in ("1", "2", "3", "saved/big old file.dat"):
        assert (tmp_path / path).read_bytes() == big, path
    code = ("-o", "/dev/null", "-w", "%{http_code}")
    if server.host.chunked:
        assert (
            run("curl", "-s", *code, "-T", "-", server.url("/files/x"), cwd=tmp_path)
            == "201"
        )
        run(*fast, "-X", "DELETE", server.url("/files/x"), cwd=tmp_path)
    empty = ("-X", "PUT", "-d", "", server.url("/files/empty"))  # Content-Length: 0
    assert run("curl", "-s", *code, *empty, cwd=tmp_path) in ("200", "201")


def test_what_the_docs_show_of_curl(server: Server, tmp_path: pathlib.Path) -> None:
    (tmp_path / "report.pdf").write_bytes(b"%PDF")
    lines = snippet("docs/http.md", "curl").replace(
        "http://127.0.0.1:8000", server.url("")
    )
    for line in lines.splitlines():
        server.request("DELETE", "/files/report.pdf")
        stored = json.loads(run(*line.split(), "-sS", "--fail-with-body", cwd=tmp_path))
        assert server.request("GET", stored["url"]).data == b"%PDF"


def test_wget(
    server: Server, file: pathlib.Path, tmp_path: pathlib.Path, big: bytes
) -> None:
    run(
        "wget",
        "-q",
        "-O",
        "answer",
        f"--post-file={file}",
        server.url("/files"),
        cwd=tmp_path,
    )
    url = server.url(json.loads((tmp_path / "answer").read_text())["url"])
    (tmp_path / "part").write_bytes(big[: 20 * MIB])
    run("wget", "-q", "-c", "-O", "part", url, cwd=tmp_path)
    run("wget", "-q", "-O", "whole", url, cwd=tmp_path)
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes() == big


def test_requests(server: Server, file: pathlib.Path, big: bytes) -> None:
    with (
        requests.Session() as session,
        file.open("rb") as body,
        file.open("rb") as field,
    ):
        for options in ({"data": big}, {"data": body}, {"files": {"file": field}}):
            created = session.post(server.url("/files"), **options)
            assert created.status_code == 201
            digest = hashlib.sha256(
                session.get(server.url(created.json()["url"])).content
            ).digest()
            assert digest == hashlib.sha256(big).digest()


def test_a_slash_that_is_encoded(server: Server) -> None:
    decoded = "a%2Fb" if server.host is HOSTS["cheroot"] else "a/b"
    for sent, name in (("a%2Fb", decoded), ("a%252Fb", "a%2Fb")):
        assert server.request("PUT", f"/files/{sent}", b"x").json["name"] == name


def test_every_answer_has_one_date(server: Server) -> None:
    for path in ("/", "/healthz", "/nowhere"):
        assert len(server.request("GET", path).headers.get_all("Date", [])) == 1


def test_an_address_without_the_slash_of_the_mount(
    large_memcached: Memcached, tmp_path: pathlib.Path
) -> None:
    command = HOSTS["waitress"].command.replace("wsgi:", "--url-prefix=/store wsgi:")
    host = dataclasses.replace(HOSTS["waitress"], command=command)
    with running(host, large_memcached, tmp_path) as server:
        led = requests.get(server.url("/store"), timeout=SECONDS)
        assert [each.status_code for each in led.history] == [308]
        assert (led.status_code, led.url) == (200, server.url("/store/"))


# Starts


@pytest.mark.parametrize("name", HOSTS)
def test_a_bad_setting_stops_the_start(name: str, tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    environ = {"MEMCHUNK_SERVERS": "127.0.0.1:1", "MEMCHUNK_MAX_SIZE": "50M"}
    server = Server(HOSTS[name], log, **environ)
    try:
        server.process.wait(SECONDS)  # waitress says 0 even then
    finally:
        server.stop()
    assert "MEMCHUNK_MAX_SIZE must be a number, not '50M'" in server.output()
