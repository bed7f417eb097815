"""What the tests share: memcached, WSGI hosts and proxies, for real, each on a port of
its own; and the API in the process of the tests."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Callable
from urllib.parse import unquote, unquote_to_bytes, urljoin

import pytest
from werkzeug.test import Client, TestResponse

import mcpool
import memchunk

MIB = 1024 * 1024
FOLDER = pathlib.Path(memchunk.__file__).parent
# What people copy for the HTTP API; `tus.py` is optional.
COPIED = ("memchunk.py", "mcpool.py", "httpfiles.py", "wsgi.py", "upload.html")
SECONDS = 240  # that any answer may take; only a hang takes as long
BOUNDARY = "no-file-of-the-tests-has-this-in-it"
WAIT = 120  # seconds for what takes a moment on any machine that is not stuck
# seconds that may go by between a write, the look at it, and the look at the clock
CLOCK = 60
INSTALL = (
    "'apt-get install memcached', 'dnf install memcached' or 'brew install memcached'"
)

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that
# they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


# `keys` walks memcached's hash table: 14 ms in one of the usual size, and 2 ms in this.
SMALL_TABLE = ["-o", "hashpower=13"]


class Memcached:
    """A memcached process that a test owns, may damage, stop and kill.

    `server` is its address in the form that `mcpool.connect` takes. `unix=True` listens
    on a Unix socket instead of a free TCP port of the loopback interface."""

    def __init__(
        self,
        folder: pathlib.Path,
        *options: str,
        unix: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        program = shutil.which("memcached")
        if program is None:
            pytest.fail(f"these tests need memcached: {INSTALL}")
        self.options = options
        self._tls = tls  # for a server whose options make it speak nothing else
        self._program = program
        self._unix = str(folder / "memcached.sock") if unix else None
        self._port_file = folder / "port"
        # Memcached takes -1 for "any free port" and writes it to the port file.
        self._port = -1
        self.start()

    def start(self) -> None:
        """Start the process, after `kill` on the same address, and wait until it
        answers."""
        listen = (
            ["-s", self._unix]
            if self._unix
            else ["-l", "127.0.0.1", "-p", str(self._port)]
        )
        self._port_file.unlink(missing_ok=True)
        user = ["-u", "root"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [self._program, *listen, "-U", "0", *SMALL_TABLE, *user, *self.options],
            env={**os.environ, "MEMCACHED_PORT_FILENAME": str(self._port_file)},
        )
        wait_for(self._answers, "memcached to listen")

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"memcached ended with status {self.process.returncode}")
        if not self._unix:
            if not self._port_file.exists():
                return False
            self._port = int(self._port_file.read_text().split(":")[1].split()[0])
        try:
            return bool(self.command("version"))
        except OSError:
            return False

    @property
    def server(self) -> str:
        return f"unix:{self._unix}" if self._unix else f"127.0.0.1:{self._port}"

    @property
    def address(self) -> str | tuple[str, int]:
        return self._unix or ("127.0.0.1", self._port)

    def connection(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX if self._unix else socket.AF_INET)
        connection.settimeout(WAIT)
        try:
            connection.connect(self.address)
            if self._tls:
                connection = self._tls.wrap_socket(
                    connection, server_hostname="localhost"
                )
        except OSError:
            connection.close()
            raise
        return connection

    def command(
        self,
        line: str,
        value: bytes | None = None,
        until: bytes | tuple[bytes, ...] = b"\r\n",
    ) -> bytes:
        """Send one raw command; return the reply up to and including `until`, or one of
        them."""
        with self.connection() as connection:
            payload = b"" if value is None else value + b"\r\n"
            connection.sendall(line.encode() + b"\r\n" + payload)
            reply = b""
            while not reply.endswith(until):
                piece = connection.recv(1 << 20)
                if not piece:
                    break
                reply += piece
            return reply

    def _items(self) -> list[list[str]]:
        """The fields `key=...`, `exp=...` and so on of all items, neither expired nor
        deleted."""
        dump = b"BUSY"
        # Memcached has one crawler, and may be at work with it.
        while dump.startswith(b"BUSY"):
            # "all" would walk the LRU lists, and miss items that memcached moves
            # between them.
            dump = self.command(
                "lru_crawler metadump hash", until=(b"END\r\n", b"request\r\n")
            )
        lines = dump.decode().splitlines()
        return [line.split() for line in lines if line.startswith("key=")]

    def keys(self) -> list[str]:
        """The keys of all items that are neither expired nor deleted, sorted."""
        return sorted(unquote(key[4:]) for key, *_ in self._items())

    def expiries(self) -> dict[str, int]:
        """Key -> the Unix time at which the item expires, -1 for never."""
        return {unquote(key[4:]): int(exp[4:]) for key, exp, *_ in self._items()}

    def sizes(self) -> list[int]:
        """Bytes of each item, with its overhead."""
        fields = itertools.chain.from_iterable(self._items())
        return [int(field[5:]) for field in fields if field.startswith("size=")]

    def read(self, key: str) -> bytes:
        """The raw value of an item that must be there."""
        reply = self.command(f"get {key}", until=b"END\r\n")
        head, _, rest = reply.partition(b"\r\n")
        assert head.startswith(b"VALUE"), f"no item at {key}"
        return rest[: int(head.split()[3])]

    def write(self, key: str, value: bytes) -> None:
        """Overwrite an item with a raw value, behind the library's back."""
        assert self.command(f"set {key} 0 0 {len(value)}", value) == b"STORED\r\n"

    def delete(self, key: str) -> None:
        assert self.command(f"delete {key}") == b"DELETED\r\n"

    def flush(self) -> None:
        """Drop all items at once."""
        assert self.command("flush_all") == b"OK\r\n"

    def fill(self, count: int, size: int) -> None:
        """Store `count` items of `size` bytes, as other users of the cache would."""
        with self.connection() as connection:
            for index in range(count):
                head = f"set other:{index} 0 0 {size} noreply\r\n".encode()
                connection.sendall(head + bytes(size) + b"\r\n")
            connection.sendall(b"version\r\n")
            connection.recv(100)

    def stats(self, what: str = "") -> dict[str, str]:
        reply = self.command(f"stats {what}".strip(), until=b"END\r\n").decode()
        lines = [line.split(" ", 2) for line in reply.splitlines()]
        return {
            name: value
            for _, name, value in (line for line in lines if line[0] == "STAT")
        }

    def pause(self) -> None:
        """SIGSTOP: connections are accepted by the kernel and never answered."""
        self.process.send_signal(signal.SIGSTOP)
        # Until all of its threads have stopped.
        os.waitpid(self.process.pid, os.WUNTRACED)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would."""
        self.process.kill()
        self.process.wait()
        if self._unix:
            pathlib.Path(self._unix).unlink(missing_ok=True)


def snippet(document: str, name: str) -> str:
    """The code block that follows the mark `<!-- name -->` in a document."""
    text = (FOLDER / document).read_text("utf-8")
    block = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert block, f"{document} has no {name}"
    return block[1]


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Return as soon as `condition()` is true; fail with `what` where it won't be."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {WAIT} seconds in vain for {what}")
        time.sleep(0.002)


opened: list[memchunk.FileCache] = []  # those that the end of a test closes

Start = Callable[..., Memcached]


# The API on WSGI hosts, each in processes of its own.


@dataclasses.dataclass(frozen=True)
class Host:
    """A WSGI host: the command that serves on {port}, and where it differs from the
    others.

    chunked: whether it is known to raise if a chunked body is cut off. early: whether
    it answers before the body has come. ends: whether its stream ends with a chunked
    body."""

    command: str
    chunked: bool = True
    early: bool = True
    streams: bool = True
    ends: bool = True


HOSTS = {
    "werkzeug": Host("{python} wsgi.py --port {port}"),
    "gunicorn": Host("{python} -m gunicorn -w 2 -b 127.0.0.1:{port} wsgi:application"),
    "gunicorn-threads": Host(
        "{python} -m gunicorn -w 2 --threads 4 -b 127.0.0.1:{port} wsgi:application"
    ),
    "waitress": Host(
        "{python} -m waitress --listen=127.0.0.1:{port} wsgi:application",
        early=False,  # it keeps the whole body, in a temporary file, before it calls
        streams=False,
    ),
    "cheroot": Host(
        "{python} -m cheroot --bind 127.0.0.1:{port} wsgi:application",
        early=False,  # it reads what the application left of a body before it answers
    ),
    "gunicorn-gevent": Host(
        "{python} -m gunicorn -w 2 -k gevent -b 127.0.0.1:{port} wsgi:application"
    ),
    "gevent": Host(
        "{python} -m gunicorn -w 2 -k gevent_pywsgi "
        "-b 127.0.0.1:{port} wsgi:application"
    ),
    "granian": Host(
        "{python} -m granian --interface wsgi --host 127.0.0.1 --port {port} "
        "wsgi:application",
        chunked=False,
    ),
    "uvicorn": Host(
        "{python} -m uvicorn --interface wsgi --host 127.0.0.1 --port {port} "
        "wsgi:application",
        chunked=False,
    ),
    "uvicorn-a2wsgi": Host(
        "{python} -m uvicorn --host 127.0.0.1 --port {port} tests.asgi:application",
        chunked=False,
    ),
    "hypercorn-a2wsgi": Host(
        "{python} -m hypercorn --keep-alive 1 --bind 127.0.0.1:{port} "
        "tests.asgi:application",
        chunked=False,
    ),
    "uwsgi": Host(
        "{uwsgi} --master --need-app --processes 2 --buffer-size 16384 --die-on-term "
        "--http 127.0.0.1:{port} --http-manage-expect --http-keepalive "
        "--module wsgi:application",
        chunked=False,
        ends=False,
    ),
}


class Server:
    """A host that runs the API on a free port of the loopback interface."""

    def __init__(self, host: Host, log: pathlib.Path, **environ: str) -> None:
        self.host, self.log = host, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        uwsgi = pathlib.Path(sys.executable).with_name("uwsgi")
        command = host.command.format(
            python=sys.executable, uwsgi=uwsgi, port=self.port
        )
        if "{uwsgi}" in host.command and not uwsgi.exists():
            pytest.fail("these tests need uWSGI; install it: 'pip install uwsgi'")
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command.split(),
                cwd=FOLDER,
                env={**os.environ, **environ},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its workers can be stopped with it
            )

    def wait(self) -> Server:
        wait_for(self.answers, f"{self.host.command} to answer")
        return self

    def answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"{self.host.command} ended: {self.output()}")
        try:
            return self.request("GET", "/healthz").status == 200
        except OSError:
            return False

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.kill()

    def kill(self) -> None:
        """At once, for tests that don't look at its log. gunicorn needs a second to
        stop."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Any = None,
        **options: Any,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                # The answer may be there before all of the body is sent; curl reads it,
                # too.
                connection.request(method, path, body, headers or {}, **options)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def raw(self, *parts: bytes, end: bool = True) -> bytes:
        """Send bytes, end the sending side, return all that comes back until the host
        closes."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):  # it may have closed already
                for part in parts:
                    connection.sendall(part)
                if end:
                    connection.shutdown(socket.SHUT_WR)
            return receive(connection)

    def pids(self) -> list[int]:
        """Of all its processes."""
        group = subprocess.run(
            ["ps", "-o", "pid=", "-s", str(self.process.pid)],
            capture_output=True,
            check=True,
        )
        return [int(pid) for pid in group.stdout.split()]

    def peak(self) -> int:
        """The most memory in bytes that any one of its processes had so far."""
        peaks = []
        for pid in self.pids():
            with contextlib.suppress(FileNotFoundError):
                status = pathlib.Path(f"/proc/{pid}/status").read_text()
                peaks += [
                    int(kib) * 1024 for kib in re.findall(r"VmHWM:\s+(\d+)", status)
                ]
        return max(peaks)


@dataclasses.dataclass
class Answer:
    status: int
    headers: Any
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


def refusal(
    port: int,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str] | None = None,
) -> object:
    """The status that a client sees that sends all of a body before it reads."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            response.read()
        except OSError as error:
            return repr(error)
        return response.status


def receive(connection: socket.socket) -> bytes:
    """All that comes until the other side closes. A time-out, which is a hang, fails
    the test."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


@contextlib.contextmanager
def running(
    host: Host, memcached: Memcached, folder: pathlib.Path, **environ: str
) -> Iterator[Server]:
    """A server with its log in a folder, for as long as the `with` block runs."""
    server = Server(host, folder / "log", MEMCHUNK_SERVERS=memcached.server, **environ)
    try:
        yield server.wait()
    finally:
        server.stop()
    assert "unexpected error" not in server.output(), server.output()


def form(data: bytes, name: str = "a b.bin") -> tuple[bytes, dict[str, str]]:
    """A multipart/form-data body with a file, and the header that goes with it."""
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return multipart(("file", name, data)), headers


def multipart(*parts: tuple[str, str | None, bytes], end: str = "--\r\n") -> bytes:
    """A multipart/form-data body of (field, file name or None, content)."""
    body = b""
    for field, filename, data in parts:
        disposition = f'Content-Disposition: form-data; name="{field}"'
        if filename is not None:
            disposition += f'; filename="{filename}"\r\nContent-Type: image/png'
        body += f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode() + data + b"\r\n"
    return body + f"--{BOUNDARY}{end}".encode()


class Proxy:
    """Passes TCP connections on to a port; where `cuts` says that so many bytes have
    come from clients in all, it breaks the connection that they came by."""

    def __init__(self, port: int, *cuts: int) -> None:
        self.cuts, self.passed, self._target = list(cuts), 0, port
        self.before_cut: Callable[[], object] = lambda: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._ends: list[socket.socket] = []
        self._start(self._accept)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._ends += client, server
            self._start(self._up, client, server)
            self._start(self._pass, server, client)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        self._pass(client, server, count=True)

    def _pass(
        self, source: socket.socket, target: socket.socket, count: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.passed += count and len(data)
                if count and self.cuts and self.passed >= self.cuts[0]:
                    del self.cuts[0]
                    self.before_cut()
                    break
                target.sendall(data)
        shut(source, target)
        if not count:
            source.close()
            target.close()

    def close(self) -> None:
        shut(self._listener)
        self._listener.close()
        self._threads.pop(0).join(SECONDS)
        shut(*self._ends)  # a browser keeps an idle one for a minute
        for thread in self._threads:
            thread.join(SECONDS)


def shut(*sockets: socket.socket) -> None:
    """End what threads wait for on these."""
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


# The API in this process, through Werkzeug's test client.

CHUNK = 1000  # bytes in a chunk, so that small files have many
FORM = f"multipart/form-data; boundary={BOUNDARY}"
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def make(
    memcached: Memcached,
    chunk_size: int | None = CHUNK,
    client: Any = None,
    **settings: object,
) -> Any:
    """A client of an API with the given settings, over a memcached client or the
    pool."""
    import wsgi  # noqa: PLC0415  # the library's own tests do without

    environ = {f"MEMCHUNK_{key.upper()}": str(settings[key]) for key in settings}
    given = wsgi.Settings.from_environment(environ)
    pool = client or mcpool.connect(memcached.server, timeout=given.timeout)
    options: Any = {"chunk_size": chunk_size, "max_size": given.max_size}
    opened.append(memchunk.FileCache(pool, **options))
    return Client(wsgi.Application(opened[-1], given))


class Stream(io.RawIOBase):
    """A request's body that gives at most `piece` bytes at a time, calls `before` each
    time, and notes in `sizes` how many it was asked for."""

    def __init__(
        self, data: bytes, before: Callable[[], object] = bool, piece: int = 1 << 30
    ) -> None:
        super().__init__()
        self._data, self._before, self._piece = io.BytesIO(data), before, piece
        self.sizes: list[int] = []

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.sizes.append(size)
        self._before()
        return self._data.read(min(size, self._piece))

    def tell(self) -> int:
        return self._data.tell()


def send(
    client: Any, method: str, path: str, stream: Any, length: int | None, **options: Any
) -> Any:
    """A request whose body is a stream, which the test client would rewind and
    measure."""
    environ = {"wsgi.input": stream, **options.pop("environ", {})}
    if length is not None:
        environ["CONTENT_LENGTH"] = str(length)
    return client.open(path, method=method, environ_overrides=environ, **options)


def ask(client: Any, text: str, data: bytes = b"x", **words: str) -> Any:
    """The answer to a request like "PUT /files/a?expire=9 | If-Match: ETAG", in which
    words stand for others. Its address arrives as a host would decode it."""
    for word, value in words.items():
        text = text.replace(word, value)
    line, *fields = text.split(" | ")
    (method, url), headers = line.split(), dict(each.split(": ", 1) for each in fields)
    path, _, query = url.partition("?")
    environ = {"PATH_INFO": unquote_to_bytes(path).decode("latin-1")}
    if "Content-Length" in headers:
        environ["CONTENT_LENGTH"] = headers["Content-Length"]
    options: Any = {"method": method, "headers": headers, "data": data}
    return client.open("/", query_string=query, environ_overrides=environ, **options)


def post_form(client: Any, body: bytes, path: str = "/files", **options: Any) -> Any:
    return client.post(path, data=body, content_type=FORM, **options)


def is_problem(response: TestResponse, status: int) -> dict[str, Any]:
    """Assert that the answer is that error, in the form of RFC 9457; return its
    JSON."""
    assert response.status_code == status, response.text
    assert response.mimetype == "application/problem+json"
    problem: dict[str, Any] = json.loads(response.data)
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"].endswith(".")
    return problem


def address(response: TestResponse) -> str:
    """The URL that a client makes of an answer's Location."""
    return urljoin(response.request.url, response.headers["Location"])


def version(response: TestResponse) -> str:
    return response.headers["ETag"].strip('"')


def chunk_key(memcached: Memcached, response: TestResponse, index: int) -> str:
    """The key of one chunk of the file whose ETag is in `response`."""
    keys, end = memcached.keys(), f"#|{version(response)}:{index}"
    [key] = [key for key in keys if key.endswith(end)]
    return key


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@functools.lru_cache(maxsize=8)
def content(size: int, seed: int = 0) -> bytes:
    """Bytes that differ at every offset that a chunk or a piece could be mistaken
    for."""
    block = b"".join(
        (seed * 7919 + index).to_bytes(5, "big") for index in range(-(-size // 5))
    )
    return block[:size]


def cases(
    names: str | tuple[str, ...], table: Mapping[str, Any]
) -> pytest.MarkDecorator:
    """Parameters whose ids are the keys of the table."""
    return pytest.mark.parametrize(names, list(table.values()), ids=list(table))
