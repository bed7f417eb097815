"""Resumable uploads by the tus clients that people use, through WSGI hosts and Lambda
adapters."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any, Callable
from urllib.parse import quote, urljoin

import pytest
import requests
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError, TusUploadFailed

import tus
import wsgi
from tests.support import (
    HOSTS,
    MIB,
    SECONDS,
    Memcached,
    Proxy,
    Server,
    running,
    snippet,
    wait_for,
)
from tests.test_lambda import LIMIT, Client, documented, http_event, rest_event

PIECE = 4 * MIB
LAMBDA = 6 * MIB  # bytes of a call's event, and of its answer

NODE = """
const fs = require("fs"), tus = require("tus-js-client");
const [endpoint, path, options] = process.argv.slice(2);
const { stopAfter, ...more } = JSON.parse(options);
let stored, offset, pieces = 0;
const upload = new tus.Upload(fs.readFileSync(path), {
  endpoint,
  metadata: { filename: "big old file.dat", filetype: "application/x-old" },
  retryDelays: [0, ...Array(20).fill(50)],
  onShouldRetry: () => true,
  onAfterResponse: (request, answer) => {
    const path = answer.getHeader("Content-Location");
    if (path) stored = new URL(path, upload.url || endpoint).href;
    offset = request.getHeader("Upload-Offset");
  },
  onChunkComplete: () => { if (++pieces === stopAfter) finish(); },
  onError: error => { console.error(String(error)); process.exit(1); },
  onSuccess: () => finish(),
  ...more,
});
function finish() {
  console.log(JSON.stringify({ url: upload.url, stored, offset }));
  process.exit(0);
}
upload.start();
"""


@pytest.fixture(scope="module")
def big() -> bytes:
    return os.urandom(50 * MIB)


@pytest.fixture(scope="module")
def file(big: bytes, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("big") / "big old file.dat"
    path.write_bytes(big)
    return path


@pytest.fixture
def stream(file: pathlib.Path) -> Iterator[Any]:
    with file.open("rb") as stream:  # tuspy doesn't close what it opens
        yield stream


@pytest.fixture(
    scope="module", params=["gunicorn", "gunicorn-threads", "waitress", "cheroot"]
)
def server(
    request: Any, large_memcached: Memcached, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with running(
        HOSTS[request.param], large_memcached, tmp_path_factory.mktemp("host")
    ) as server:
        yield server


def node(
    endpoint: str, file: pathlib.Path, folder: pathlib.Path, **options: Any
) -> Any:
    """Run tus-js-client; return the URLs of upload and file, and the last offset."""
    if shutil.which("node") is None:
        pytest.fail(
            "these tests need Node.js; install it: 'apt-get install nodejs npm'"
        )
    script = folder / "upload.js"
    script.write_text(NODE)
    command = ["node", str(script), endpoint, str(file), json.dumps(options)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if "Cannot find module 'tus-js-client'" in done.stderr:
        pytest.fail(
            "install it: 'npm install tus-js-client', and set NODE_PATH to node_modules"
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def same(url: str, data: bytes) -> bool:
    read = requests.get(url, timeout=SECONDS)
    assert read.status_code == 200
    return hashlib.sha256(read.content).digest() == hashlib.sha256(data).digest()


def stored(uploader: Any) -> str:
    """Where the file is, as a HEAD tells whoever lost the last answer."""
    answer = requests.head(
        uploader.url, headers=uploader.get_headers(), timeout=SECONDS
    )
    assert answer.headers["Upload-Offset"] == answer.headers["Upload-Length"]
    return urljoin(str(uploader.url), answer.headers["Content-Location"])


# On hosts


def test_tuspy(server: Server, stream: Any, big: bytes) -> None:
    for options in ({}, {"upload_checksum": True}):
        name = quote(f"tuspy {len(options)} {server.port}")
        client, metadata = (
            TusClient(server.url(f"/uploads?name={name}")),
            {"filename": "a.dat"},
        )
        first = client.uploader(
            file_stream=stream, chunk_size=PIECE, metadata=metadata, **options
        )
        first.upload(stop_at=3 * PIECE)
        # The process ends here; another one goes on.
        second = client.uploader(
            file_stream=stream, chunk_size=PIECE, url=first.url, **options
        )
        assert second.offset == 3 * PIECE
        second.upload()
        assert same(server.url(f"/files/{name}"), big)
        assert same(stored(second), big)


def test_tuspy_over_a_broken_line(server: Server, stream: Any, big: bytes) -> None:
    proxy = Proxy(server.port, 1_000_000, 13_000_000, 30_000_000, 30_100_000)
    with contextlib.closing(proxy):
        client = TusClient(proxy.url("/uploads"))
        uploader = client.uploader(
            file_stream=stream, chunk_size=PIECE, retries=20, retry_delay=0
        )
        uploader.upload()
        assert not proxy.cuts
        assert same(stored(uploader).replace(str(proxy.port), str(server.port)), big)


def test_tus_js_client(
    server: Server, file: pathlib.Path, tmp_path: Any, big: bytes
) -> None:
    endpoint = server.url("/uploads")
    first = node(endpoint, file, tmp_path, chunkSize=PIECE, stopAfter=3)
    assert "stored" not in first
    second = node(endpoint, file, tmp_path, chunkSize=PIECE, uploadUrl=first["url"])
    assert second["url"] == first["url"]
    assert same(second["stored"], big)
    read = requests.head(second["stored"], timeout=SECONDS)
    assert read.headers["Content-Type"] == "application/x-old"
    assert 'filename="big old file.dat"' in read.headers["Content-Disposition"]
    (tmp_path / "part.dat").write_bytes(big[: 2 * PIECE])
    for options in ({"uploadDataDuringCreation": True}, {"overridePatchMethod": True}):
        url = node(endpoint, tmp_path / "part.dat", tmp_path, **options)["stored"]
        assert same(url, big[: 2 * PIECE])


@pytest.mark.parametrize("piece", [PIECE, None])
def test_tus_js_client_over_a_broken_line(
    server: Server, file: pathlib.Path, tmp_path: Any, big: bytes, piece: int | None
) -> None:
    """Without pieces, as is its default, it keeps what came before the break, too."""
    options = {"chunkSize": piece} if piece else {}
    resumes = piece or server.host.streams
    headers = {"Tus-Resumable": "1.0.0"}
    start = {**headers, "Upload-Length": str(len(big))}
    answer = requests.post(server.url("/uploads"), headers=start, timeout=SECONDS)
    path = urljoin("/uploads", answer.headers["Location"])

    def is_kept() -> bool:
        head = requests.head(server.url(path), headers=headers, timeout=SECONDS)
        return int(head.headers["Upload-Offset"]) >= tus.BLOCK

    proxy = Proxy(server.port, 13_000_000, 30_000_000, 30_100_000)
    if resumes:
        proxy.before_cut = lambda: wait_for(is_kept, "the server to keep what came")
    with contextlib.closing(proxy):
        done = node("", file, tmp_path, uploadUrl=proxy.url(path), **options)
        assert not proxy.cuts
        assert not resumes or int(done["offset"]) >= tus.BLOCK
        assert same(done["stored"].replace(str(proxy.port), str(server.port)), big)


def test_tus_js_client_terminates(
    server: Server, file: pathlib.Path, tmp_path: Any
) -> None:
    path = node(server.url("/uploads"), file, tmp_path, chunkSize=PIECE, stopAfter=1)[
        "url"
    ]
    headers = {"Tus-Resumable": "1.0.0"}
    assert requests.delete(path, headers=headers, timeout=SECONDS).status_code == 204
    assert requests.head(path, headers=headers, timeout=SECONDS).status_code == 404


def test_a_host_is_killed(
    large_memcached: Memcached, stream: Any, tmp_path: Any, big: bytes
) -> None:
    """In the middle of a piece, with all of its workers; another one goes on."""
    servers = [
        Server(
            HOSTS["gunicorn"],
            tmp_path / f"log{number}",
            MEMCHUNK_SERVERS=large_memcached.server,
        )
        for number in range(2)
    ]
    try:
        first, second = (server.wait() for server in servers)
        headers = {"Tus-Resumable": "1.0.0", "Upload-Length": str(len(big))}
        location = first.request("POST", "/uploads", headers=headers).headers[
            "Location"
        ]
        path = urljoin("/uploads", location)
        del headers["Upload-Length"]

        def offset() -> int:
            answer = second.request("HEAD", path, headers=headers)
            assert answer.status == 200
            return int(answer.headers["Upload-Offset"])

        with first.connect() as connection:
            sent = {**headers, "Upload-Offset": "0"}
            head = "".join(f"{key}: {value}\r\n" for key, value in sent.items())
            connection.sendall(
                f"PATCH {path} HTTP/1.1\r\nHost: x\r\n{head}"
                f"Content-Length: {len(big)}\r\n"
                "Content-Type: application/offset+octet-stream\r\n\r\n".encode()
            )
            connection.sendall(big[:12_000_000])
            wait_for(lambda: offset() > 8_000_000, "all but 4 MB to be kept")
            os.killpg(first.process.pid, 9)
        assert 8_000_000 < offset() <= 12_000_000
        client = TusClient(second.url("/uploads"))
        uploader = client.uploader(
            file_stream=stream, chunk_size=PIECE, url=second.url(path)
        )
        uploader.upload()
        assert same(stored(uploader), big)
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("language", ["curl", "tuspy"])
def test_what_the_docs_show(
    server: Server, tmp_path: pathlib.Path, monkeypatch: Any, language: str, big: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.pdf").write_bytes(big[: 6 * MIB])
    requests.delete(server.url("/files/report.pdf"), timeout=SECONDS)
    code = snippet("docs/uploads.md", language).replace(
        "http://localhost:8000", server.url("")
    )
    if language == "curl":
        subprocess.run(["sh", "-e", "-c", code], check=True)
    else:
        exec(code)
    assert same(server.url("/files/report.pdf"), big[: 6 * MIB])


# Behind Lambda


class Gateway(http.server.HTTPServer):
    """What stands in front of Lambda functions: turns requests into events, within
    their limits.

    `handlers` take the calls in turn, as instances of a function do. Of every seventh
    PATCH the answer gets lost.
    """

    def __init__(self, handlers: list[Any], event: Callable[..., Any]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.instances = [Client(handler, event) for handler in handlers]
        self.event, self.calls, self.patches, self.lost = event, 0, 0, 0
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            # Mangum wants the one that Lambda's main thread has.
            asyncio.set_event_loop(loop)
            self.serve_forever(0.01)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Request(http.server.BaseHTTPRequestHandler):
    """One request to the gateway."""

    server: Gateway

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        gateway = self.server
        event = gateway.event(self.command, path, query, dict(self.headers), body)
        if len(json.dumps(event)) > LAMBDA:
            self.send_error(413)
            return
        instance = gateway.instances[gateway.calls % len(gateway.instances)]
        gateway.calls += 1
        headers = {
            key: value for key, value in self.headers.items() if key != "Content-Length"
        }
        headers["X-Forwarded-Proto"] = "http"
        status, received, data = instance(self.command, path, body, query, **headers)
        assert len(data) * 4 / 3 + len(json.dumps(received)) + 1000 < LAMBDA
        gateway.patches += self.command == "PATCH"
        if self.command == "PATCH" and gateway.patches % 7 == 0:
            gateway.lost += 1
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in received.items():
            if key != "content-length":
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(params=["apig-wsgi", "serverless-wsgi", "mangum"])
def handlers(request: Any, large_memcached: Memcached) -> Iterator[list[Any]]:
    """Two instances of one function, with nothing in common but memcached."""
    settings = wsgi.Settings(servers=large_memcached.server, max_response=LIMIT)
    caches = [settings.connect() for _ in range(2)]
    yield [
        documented(request.param, wsgi.Application(each, settings)) for each in caches
    ]
    for each in caches:
        each.close()


@pytest.fixture
def gateway(request: Any, handlers: list[Any]) -> Iterator[Gateway]:
    gateway = Gateway(handlers, request.param)
    yield gateway
    gateway.stop()


def download(url: str) -> bytes:
    """In parts, as no answer carries more."""
    data, size = b"", 1
    while len(data) < size:
        headers = {"Range": f"bytes={len(data)}-"}
        answer = requests.get(url, headers=headers, timeout=SECONDS)
        assert answer.status_code == 206
        size = int(answer.headers["Content-Range"].split("/")[1])
        data += answer.content
    return data


@pytest.mark.parametrize("gateway", [rest_event, http_event], indirect=True)
def test_tuspy_through_lambda(gateway: Gateway, stream: Any, big: bytes) -> None:
    client = TusClient(gateway.url("/uploads"))
    too_large = client.uploader(file_stream=stream, chunk_size=5 * MIB)
    with pytest.raises((TusUploadFailed, TusCommunicationError)):
        too_large.upload()
    uploader = client.uploader(
        file_stream=stream, chunk_size=PIECE, retries=20, retry_delay=0
    )
    uploader.upload()
    assert gateway.lost
    url = stored(uploader)
    assert download(gateway.url("/files/" + url.partition("/files/")[2])) == big


@pytest.mark.parametrize("gateway", [rest_event, http_event], indirect=True)
def test_tus_js_client_through_lambda(
    gateway: Gateway, tmp_path: Any, big: bytes
) -> None:
    file, data = tmp_path / "file.dat", big[: 5 * PIECE]
    file.write_bytes(data)
    for options in ({}, {"uploadDataDuringCreation": True}):
        done = node(gateway.url("/uploads"), file, tmp_path, chunkSize=PIECE, **options)
        url = done["stored"]
        assert download(gateway.url("/files/" + url.partition("/files/")[2])) == data
    assert gateway.lost


@pytest.mark.parametrize("gateway", [http_event], indirect=True)
def test_what_the_docs_show_through_lambda(
    gateway: Gateway, tmp_path: pathlib.Path, monkeypatch: Any, big: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bigoldfile.dat").write_bytes(big)
    requests.delete(gateway.url("/files/bigoldfile.dat"), timeout=SECONDS)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # tuspy's, between attempts
    exec(snippet("docs/lambda.md", "lambda"), {"site": gateway.url("")})
    assert (tmp_path / "back.dat").read_bytes() == big
