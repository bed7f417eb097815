"""The HTTP API behind a real nginx and Apache, as Debian packages them: prefixes, TLS,
buffering, Host, refusals."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import http.client
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
import trustme

from tests.support import (
    HOSTS,
    MIB,
    SECONDS,
    Answer,
    Host,
    Memcached,
    Server,
    Start,
    form,
    refusal,
    running,
    snippet,
    wait_for,
)

NGINX = """
daemon off;
{user}
pid {folder}/pid;
error_log {folder}/error.log;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 51m;
  proxy_http_version 1.1;
  gzip on;
  gzip_min_length 1;
  gzip_types text/plain;
  server {{
    listen 127.0.0.1:{plain};
    listen 127.0.0.1:{tls} ssl;
    ssl_certificate {folder}/certificate.pem;
    ssl_certificate_key {folder}/key.pem;
    location / {{
      proxy_pass http://127.0.0.1:{port};
    }}
    location /unbuffered/ {{
      proxy_pass http://127.0.0.1:{port}/;
      proxy_request_buffering off;
      proxy_buffering off;
    }}
    location /small/ {{
      proxy_pass http://127.0.0.1:{port}/;
      client_max_body_size 1m;  # nginx's default
    }}
    location /told/ {{
      proxy_pass http://127.0.0.1:{port}/;
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-Prefix /told;
    }}
  }}
{documented}
}}
"""


APACHE = """
ServerName 127.0.0.1
Listen 127.0.0.1:{port}
PidFile {folder}/pid
ErrorLog {folder}/error.log
User www-data
Group www-data
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule env_module {modules}/mod_env.so
LoadModule headers_module {modules}/mod_headers.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_http_module {modules}/mod_proxy_http.so
{documented}
"""


class Nginx:
    """An nginx in front of a server: ours at `plain` and `tls`, the docs' at
    `documented` and, below a prefix, at `prefixed`."""

    def __init__(self, folder: pathlib.Path, port: int) -> None:
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            pytest.fail(
                "these tests need nginx; install it: 'apt-get install nginx-light'"
            )
        authority = trustme.CA()
        self.context = ssl.create_default_context()
        authority.configure_trust(self.context)
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(folder / "certificate.pem"))
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(4)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in probes]
        self.plain, self.tls, self.documented, self.prefixed = ports
        documented = "".join(
            snippet("docs/deployment.md", name) for name in ("nginx", "nginx-prefix")
        )
        for old, new in (
            ("listen 80;", f"listen 127.0.0.1:{self.documented};"),
            ("listen 443 ssl;", f"listen 127.0.0.1:{self.prefixed} ssl;"),
            ("/etc/ssl/certs/files.example.com.pem", f"{folder}/certificate.pem"),
            ("/etc/ssl/private/files.example.com.key", f"{folder}/key.pem"),
            ("127.0.0.1:8000", f"127.0.0.1:{port}"),
        ):
            assert old in documented
            documented = documented.replace(old, new)
        # Else its workers could not read a folder of ours.
        user = "user root;" if os.geteuid() == 0 else ""
        configuration = folder / "nginx.conf"
        configuration.write_text(
            NGINX.format(
                user=user,
                folder=folder,
                port=port,
                plain=self.plain,
                tls=self.tls,
                documented=documented,
            )
        )
        self.process = subprocess.Popen(
            [program, "-e", f"{folder}/error.log", "-c", str(configuration)]
        )
        wait_for(self.answers, "nginx to answer")

    def answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"nginx ended with status {self.process.returncode}")
        with contextlib.suppress(OSError):
            return (
                self.request("GET", f"http://127.0.0.1:{self.plain}/healthz").status
                == 200
            )
        return False

    def sites(self) -> Iterator[str]:
        """Where a client finds the API."""
        for origin in (
            f"http://127.0.0.1:{self.plain}",
            f"https://127.0.0.1:{self.tls}",
        ):
            for prefix in ("/", "/unbuffered/", "/told/"):
                yield origin + prefix
        yield f"http://127.0.0.1:{self.documented}/"
        yield f"https://127.0.0.1:{self.prefixed}/store/"

    def request(
        self, method: str, url: str, body: Any = None, **headers: str
    ) -> Answer:
        parts = urlsplit(url)
        assert parts.port
        connection = http.client.HTTPConnection(
            "127.0.0.1", parts.port, timeout=SECONDS
        )
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                "127.0.0.1", parts.port, timeout=SECONDS, context=self.context
            )
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        with contextlib.closing(connection):
            target = parts.path + (f"?{parts.query}" if parts.query else "")
            connection.request(method, target, body, names)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def server(
    large_memcached: Memcached, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("host")
    host = HOSTS["gunicorn-threads"]
    with running(host, large_memcached, folder, MEMCHUNK_PROXIES="1") as server:
        yield server


@pytest.fixture(scope="module")
def nginx(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    nginx = Nginx(tmp_path_factory.mktemp("nginx"), server.port)
    yield nginx
    nginx.close()


def test_links_hold(nginx: Nginx) -> None:
    for site in nginx.sites():
        for method, path in (
            ("POST", "files"),
            ("POST", "files/"),
            ("PUT", "files/a"),
            ("PUT", "files/b/c%20d"),
        ):
            data = f"{site} {path}".encode()
            created = nginx.request(method, urljoin(site, path), data)
            assert created.status == 201, created.data
            url = urljoin(urljoin(site, path), created.headers["Location"])
            assert url.startswith(site)
            assert nginx.request("GET", url).data == data
            assert nginx.request("DELETE", url).status == 204


def test_uploads_that_resume(nginx: Nginx) -> None:
    tus = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}
    for site in nginx.sites():
        started = nginx.request("POST", site + "uploads", Upload_Length="6", **tus)
        url = urljoin(site + "uploads", started.headers["Location"])
        assert url.startswith(site + "uploads/")
        for offset, piece in ((0, b"abc"), (3, b"def")):
            sent = nginx.request("PATCH", url, piece, Upload_Offset=str(offset), **tus)
            assert sent.status == 204


def test_the_prefix_where_it_is_told(nginx: Nginx) -> None:
    site = f"http://127.0.0.1:{nginx.plain}/told/"
    created = nginx.request("POST", site + "files", b"x")
    assert created.json["url"].startswith("/told/files/")
    assert nginx.request("GET", urljoin(site, created.json["url"])).data == b"x"


@pytest.mark.parametrize("is_form", [False, True])
@pytest.mark.parametrize("prefix", ["/", "/unbuffered/"])
def test_50_mib(nginx: Nginx, prefix: str, is_form: bool) -> None:
    data = os.urandom(50 * MIB)
    body, headers = form(data) if is_form else (data, {})
    site = f"https://127.0.0.1:{nginx.tls}{prefix}"
    assert nginx.request("PUT", site + "files/big", body, **headers).status in (
        200,
        201,
    )
    assert nginx.request("GET", site + "files/big").data == data


def test_the_page_of_the_site_itself(nginx: Nginx) -> None:
    """nginx sends its own name of the host behind it as Host, unless told otherwise."""
    for site in nginx.sites():
        origin = site[: site.index("/", len("https://"))]
        body, headers = form(b"x")
        own = nginx.request("POST", site + "files", body, Origin=origin, **headers)
        assert own.status == 201
        evil = nginx.request(
            "POST", site + "files", body, Origin="http://evil.test", **headers
        )
        assert evil.status == 403


def test_a_page_by_a_name_that_nginx_does_not_pass_on(nginx: Nginx) -> None:
    site = f"http://127.0.0.1:{nginx.plain}/"
    page = {"Host": "files.test", "Origin": "http://files.test"}
    tus = {"Tus-Resumable": "1.0.0", "Upload-Length": "3", **page}
    assert nginx.request("POST", site + "uploads", **tus).status == 201
    assert nginx.request("PUT", site + "files/p", b"x", **page).status == 201
    for told in (site + "told/", f"http://127.0.0.1:{nginx.documented}/"):
        assert nginx.request("POST", told + "files", b"x", **page).status == 201


def test_a_client_may_not_say_what_the_proxy_says(nginx: Nginx) -> None:
    forged = {"X-Forwarded-Host": "evil.test", "X-Forwarded-Prefix": "/evil"}
    site = f"http://127.0.0.1:{nginx.documented}/"
    body, headers = form(b"x")
    stored = nginx.request("POST", site + "files", body, **headers, **forged)
    assert stored.json["url"].startswith("/files/")
    page = {**forged, **headers, "Origin": "http://evil.test"}
    assert nginx.request("POST", site + "files", body, **page).status == 403


def test_the_documented_prefix(nginx: Nginx) -> None:
    site = f"https://127.0.0.1:{nginx.prefixed}/store/"
    led = nginx.request("GET", site.rstrip("/"))
    assert (led.status, led.headers["Location"]) == (301, site)
    created = nginx.request("POST", site + "files", b"x")
    assert created.json["url"].startswith("/store/files/")


def test_slashes_that_nginx_merges_below_a_prefix(nginx: Nginx) -> None:
    for site, name in (
        (f"http://127.0.0.1:{nginx.plain}/told/", "s/t"),
        (f"http://127.0.0.1:{nginx.documented}/", "s//t"),
        (f"https://127.0.0.1:{nginx.prefixed}/store/", "s//t"),
    ):
        assert nginx.request("PUT", site + "files/s//t", b"x").json["name"] == name


def test_etags_that_nginx_weakens_with_gzip(nginx: Nginx) -> None:
    text = {"Content-Type": "text/plain"}
    for site, status in (
        (f"http://127.0.0.1:{nginx.plain}/", 412),
        (f"http://127.0.0.1:{nginx.documented}/", 200),
        (f"https://127.0.0.1:{nginx.prefixed}/store/", 200),
    ):
        nginx.request("PUT", site + "files/z", bytes(1000), **text)
        read = nginx.request("GET", site + "files/z", Accept_Encoding="gzip")
        etag = read.headers["ETag"]
        assert etag.startswith("W/") == (status == 412)
        replaced = nginx.request("PUT", site + "files/z", b"x", If_Match=etag, **text)
        assert replaced.status == status


# Refusals

TOKEN = {"Authorization": "Bearer t"}
SIZE = 4_000_000  # bytes of a file at most, and of each body


class Apache:
    """An Apache with the docs' configuration, in front of a server."""

    def __init__(self, folder: pathlib.Path, port: int) -> None:
        program = shutil.which("apache2", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            pytest.fail(
                "these tests need Apache; install it: 'apt-get install apache2'"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        documented = snippet("docs/deployment.md", "apache")
        documented = documented.replace("*:80>", f"127.0.0.1:{self.port}>")
        documented = documented.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        modules = "/usr/lib/apache2/modules"
        text = APACHE.format(
            port=self.port, folder=folder, modules=modules, documented=documented
        )
        (folder / "apache.conf").write_text(text)
        command = [program, "-D", "FOREGROUND", "-f", str(folder / "apache.conf")]
        self.process = subprocess.Popen(command)
        wait_for(self.answers, "Apache to answer")

    def answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"Apache ended with status {self.process.returncode}")
        with contextlib.suppress(OSError):
            return refusal(self.port, "GET", "/healthz", b"", {}) == 200
        return False

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def small(start_memcached: Start) -> Memcached:
    """A memcached that refuses a file of SIZE, and takes small ones."""
    return start_memcached("-m", "2")


Uploads = dict[int, tuple[str, str, int, dict[str, str]]]
REFUSALS: Uploads = {
    401: ("PUT", "/files/a", SIZE, {"Authorization": "Bearer no"}),
    403: ("POST", "/files", SIZE, {"Sec-Fetch-Site": "cross-site"}),
    409: ("POST", "/files/there", SIZE, {}),
    413: ("PUT", "/files/a", SIZE + 1, {}),
    507: ("PUT", "/files/a", SIZE, {}),
}
WITHOUT_MEMCACHED: Uploads = {503: REFUSALS[507]}


def refusals(
    port: int, at_a_time: int, uploads: Uploads
) -> dict[int, collections.Counter[object]]:
    """What 16 uploads got, by the status that is right for them."""
    seen = {}
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        for status, (method, path, size, more) in uploads.items():
            body, headers = bytes(size), {**TOKEN, **more}
            sent = [
                pool.submit(refusal, port, method, path, body, headers)
                for _ in range(16)
            ]
            seen[status] = collections.Counter(each.result() for each in sent)
    return seen


PROXIES = [
    *(("nginx", name) for name in ("gunicorn", "gunicorn-threads", "gunicorn-gevent")),
    *(("nginx", name) for name in ("waitress", "cheroot", "uwsgi")),
    *(("nginx", name) for name in ("granian", "uvicorn")),
    *(("nginx", name) for name in ("uvicorn-a2wsgi", "hypercorn-a2wsgi")),
    ("Apache", "gunicorn-threads"),
]


@pytest.mark.parametrize(("proxy", "name"), PROXIES)
def test_refusals_come_through(
    small: Memcached, tmp_path: pathlib.Path, proxy: str, name: str
) -> None:
    """A host that closes while a proxy still sends is a 502, and a failed server."""
    settings = {"TOKEN": "t", "MAX_SIZE": str(SIZE), "PROXIES": "1"}
    environ = {f"MEMCHUNK_{key}": value for key, value in settings.items()}
    with running(HOSTS[name], small, tmp_path, **environ) as server:
        front = (Nginx if proxy == "nginx" else Apache)(tmp_path, server.port)
        try:
            port = front.documented if isinstance(front, Nginx) else front.port
            assert refusal(port, "PUT", "/files/there", b"x", TOKEN) == 201
            seen = [refusals(port, at_a_time, REFUSALS) for at_a_time in (1, 8)]
            small.kill()
            for each, at_a_time in zip(seen, (1, 8)):
                each.update(refusals(port, at_a_time, WITHOUT_MEMCACHED))
        finally:
            front.close()
    cells = [
        ", ".join(str(each[status][status]) for each in seen) for status in seen[0]
    ]
    print(f"| {proxy}, {name} |", " | ".join(cells), "|")
    expected = {status: {status: 16} for status in {**REFUSALS, **WITHOUT_MEMCACHED}}
    assert seen == 2 * [expected]


def test_clients_that_drip_are_held_by_nginx(
    large_memcached: Memcached, tmp_path: pathlib.Path
) -> None:
    """Forty of them leave a worker's four threads to others."""
    host = Host("{python} -m gunicorn --threads 4 -b 127.0.0.1:{port} wsgi:application")
    environ = {"MEMCHUNK_PROXIES": "1", "MEMCHUNK_TOKEN": "t"}
    with (
        running(host, large_memcached, tmp_path, **environ) as server,
        contextlib.ExitStack() as stack,
    ):
        nginx = Nginx(tmp_path, server.port)
        stack.callback(nginx.close)
        for request in ("PUT /files/a", "PUT /nowhere", "GET /healthz", "HEAD /"):
            for framing in ("Content-Length: 100000", "Transfer-Encoding: chunked"):
                for _ in range(5):
                    address = ("127.0.0.1", nginx.documented)
                    client = stack.enter_context(
                        socket.create_connection(address, SECONDS)
                    )
                    head = f"{request} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n"
                    client.sendall(head.encode() + b"4000\r\n")
        for _ in range(8):
            assert refusal(nginx.documented, "GET", "/healthz", b"", {}) == 200
