# memchunk 1.0.0, MIT licence; README.md and docs/http.md belong to it.
"""An HTTP API for files of up to 50 MiB in memcached, for any WSGI host.

    python wsgi.py                a first try: brings a memcached of its own
    gunicorn wsgi:application     for work: Settings come from the environment

The promise: all bytes that a reader asks for are verified before the first is sent. So
a file that memcached evicted or damaged is an error status, never a short or wrong 200.
A refused upload stores nothing. If one of several files in a form is refused, the
answer lists the ones before it, which are stored. Errors are application/problem+json
(RFC 9457), or a page for a browser.

Read `Application` first: its table of routes, then `dispatch`, which has the checks
before a handler, then the handlers. Above it are the settings, and who may do what;
below it the pages, the log, and the development server. `httpfiles.py` knows what HTTP
says about files. `tus.py` beside this file adds uploads that resume, at /uploads.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import hmac
import html
import itertools
import logging
import os
import pathlib
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any
from urllib.parse import quote, urlsplit

from werkzeug.http import http_date
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response
from werkzeug.wsgi import ClosingIterator

import httpfiles
import mcpool
import memchunk
from httpfiles import ERRORS, Environ, FileRequest, Headers, Problem, SentFile, require
from memchunk import FileCache, FileInfo

# Optional. If Python finds another module `tus` first, the start fails.
HAS_TUS = pathlib.Path(__file__).with_name("tus.py").exists()
if HAS_TUS:
    import tus

__all__ = ["Application", "SettingError", "Settings"]
__version__ = "1.0.0"

MAX_NUMBER = 2**31 - 1  # that a setting may be, or an `expire`: 68 years in seconds
READY_SECONDS = 1.5  # that /readyz waits for servers
READ_ATTEMPTS = 5  # of a download that a writer overtakes

READS = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
PROBED = ("/healthz", "/readyz")  # what balancers ask for, by IP address
FORM = "multipart/form-data"
# A page may POST bodies of these types to any site, without a preflight.
SIMPLE_TYPES = (httpfiles.URLENCODED, FORM, "text/plain", "")

Start = Callable[..., Any]  # the second argument of a WSGI application
Write = Callable[..., FileInfo]  # a method of the cache: `add`, `set` or `cas`
Handler = Callable[..., Response]  # of a request, and of the name in its address
log = logging.getLogger("memchunk.wsgi")


# --- Settings -------------------------------------------------------------------------

ORIGIN = r"\*|null|https?://[^/@\s]+"
# A name, perhaps after a dot, or an IPv6 address.
HOST = r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]"


class SettingError(RuntimeError):
    """A setting is bad; the message says which and why, in one sentence."""


def _row(default: Any, least: float = 0, most: float = MAX_NUMBER) -> Any:
    """A row of the table below: the default, which has the setting's type, and the
    bounds of a number."""
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


@dataclasses.dataclass(frozen=True, repr=False)  # no log may show the secrets in it
class Settings:
    """How the API behaves. Each is `MEMCHUNK_` and its name in capitals in the
    environment. A list has commas between its items."""

    servers: str = _row("127.0.0.1:11211")  # as mcpool.connect takes them
    namespace: str = _row("memchunk2")  # begins every key
    max_size: int = _row(memchunk.MAX_SIZE, 1)  # bytes of the largest file
    expire: int = _row(0)  # seconds to keep a file whose upload doesn't say; 0: no end
    timeout: float = _row(memchunk.TIMEOUT, 0.001)  # seconds to wait for memcached
    token: str = _row("")  # a list; clients must send one of them
    max_response: int = _row(0)  # most bytes of a file in one answer; 0: any number
    max_expire: int = _row(0)  # most seconds that an upload may ask for; 0: any number
    origins: str = _row("")  # a list of other sites whose pages may use the API, or "*"
    public_read: bool = _row(False, most=1)  # reads need no token
    proxies: int = _row(0)  # how many in front set X-Forwarded-*; more is a risk
    hosts: str = _row("")  # a list of host names; ".a.example": those below, too
    token_file: str = _row("")  # a file with such a list, read at the start
    chunk_size: int = _row(0, most=2**30)  # bytes; 0: the best for the server
    max_connections: int = _row(64, 1)  # to each server
    tls_ca: str = _row("")  # a file: whom to trust, instead of the system's authorities
    tls_cert: str = _row("")  # a file: the certificate to show to memcached
    tls_key: str = _row("")  # a file: its key, unless that is in the same file

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read every setting that is there. Raises SettingError."""
        fields = {f"MEMCHUNK_{f.name.upper()}": f for f in dataclasses.fields(cls)}
        for name in sorted(environ.keys() - fields):
            if name.startswith("MEMCHUNK_"):  # perhaps misspelt, as in MEMCHUNK_TOKENS
                [nearest] = difflib.get_close_matches(name, fields, n=1, cutoff=0)
                raise SettingError(f"{name} is not a setting; the nearest is {nearest}")
        values = {
            field.name: _parsed(variable, environ[variable], field)
            for variable, field in fields.items()
            if variable in environ
        }
        settings = cls(**values)
        Access(settings), Cors(settings)  # these check their lists
        return settings

    @property
    def default_expire(self) -> int:
        """Seconds that a file is kept whose upload doesn't say."""
        most = self.max_expire
        return min(self.expire or most, most) if most else self.expire

    def connect(self) -> FileCache:
        """The cache that the settings describe. Raises SettingError."""
        tls, bound = self.tls_context(), self.max_connections
        try:
            return FileCache(
                mcpool.connect(
                    self.servers, timeout=self.timeout, tls=tls, max_connections=bound
                ),
                namespace=self.namespace,
                max_size=self.max_size,
                chunk_size=self.chunk_size or None,
            )
        except ValueError as error:
            text = f"MEMCHUNK_SERVERS or MEMCHUNK_NAMESPACE: {error}"
            raise SettingError(text) from None

    def tls_context(self) -> ssl.SSLContext | None:
        """For every host of the list; None if no file is set. Raises SettingError."""
        if not (self.tls_ca or self.tls_cert or self.tls_key):
            return None
        culprit = "MEMCHUNK_TLS_CA"
        try:
            context = ssl.create_default_context(cafile=self.tls_ca or None)
            culprit = "MEMCHUNK_TLS_CERT, with its MEMCHUNK_TLS_KEY,"
            if self.tls_cert or self.tls_key:
                # Without a password, OpenSSL may ask for one on the terminal.
                context.load_cert_chain(self.tls_cert, self.tls_key or None, "")
        except OSError as error:
            text = f"{culprit} names no PEM file that can be used: {error}"
            raise SettingError(text) from None
        return context


def _parsed(variable: str, text: str, field: dataclasses.Field[Any]) -> Any:
    kind: Any = type(field.default)
    if not text.strip():
        raise SettingError(f"{variable} is empty; give it a value or unset it")
    if kind is str:
        return text
    try:
        number = float(text) if kind is float else int(text)
    except ValueError:
        wanted = "0 or 1" if kind is bool else "a number"
        raise SettingError(f"{variable} must be {wanted}, not {text!r}") from None
    least, most = field.metadata["least"], field.metadata["most"]
    if not least <= number <= most:
        raise SettingError(f"{variable} is {text}, but must be {least} to {most}")
    return kind(number)


def _items(variable: str, text: str, pattern: str, wanted: str) -> list[str]:
    """The items of a list. Raises SettingError, which shows no item: it may be a
    token."""
    items = [item.strip() for item in re.split(r"[,\n]", text) if item.strip()]
    if text and not items:
        raise SettingError(f"{variable} is an empty list; unset it")
    if not all(re.fullmatch(pattern, item) for item in items):
        raise SettingError(f"{variable} must be {wanted}, with commas between them")
    return items


# --- Who may do what: hosts, tokens, and pages of other sites -------------------------


def _tokens(settings: Settings) -> list[bytes]:
    """Those of MEMCHUNK_TOKEN, and those in a file. Raises SettingError."""
    form = "[!-~]+", "tokens of printable ASCII without spaces"
    tokens = _items("MEMCHUNK_TOKEN", settings.token, *form)
    if settings.token_file:
        try:
            text = pathlib.Path(settings.token_file).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise SettingError(f"MEMCHUNK_TOKEN_FILE: {error}") from None
        tokens += _items("MEMCHUNK_TOKEN_FILE", text or ",", *form)  # not empty
    return [token.encode() for token in tokens]


def _sent_token(request: Request) -> str:
    """The token in the request, "" without one. Werkzeug's parser takes "=" for a
    parameter, and raises on bytes that are not ASCII."""
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            decoded = base64.b64decode(credentials.strip(), validate=True)
            return decoded.decode("latin-1").partition(":")[2]
    return ""


class Access:
    """Hosts and tokens. Each method raises Problem for a wrong one."""

    def __init__(self, settings: Settings) -> None:
        self.tokens, self._public_read = _tokens(settings), settings.public_read
        given, wanted = settings.hosts.lower(), "host names without a port"
        hosts = _items("MEMCHUNK_HOSTS", given, HOST, wanted)
        self._hosts = [host.strip("[]") for host in hosts]
        self._domains = tuple(host for host in hosts if host.startswith("."))

    def check_host(self, request: Request) -> None:
        """MEMCHUNK_HOSTS must have the request's host. A probe has an IP address there,
        or nothing. A page that got here by DNS rebinding has a name."""
        host = _hostname(f"//{request.host}")
        is_ours = host in self._hosts or f".{host}".endswith(self._domains)
        # Browsers take a name of digits and dots for an IP address.
        is_address = ":" in host or host.replace(".", "").isdigit()
        is_nameless = is_address or "Host" not in request.headers
        is_probe = request.path in PROBED and is_nameless
        is_right = not self._hosts or is_ours or is_probe
        require(is_right, 421, "This server has another name, by MEMCHUNK_HOSTS.")

    def check_token(self, request: FileRequest) -> None:
        """Reads of files may be public, those of uploads never are."""
        is_read = request.method in READS and request.path.startswith("/files")
        is_open = not self.tokens or (is_read and self._public_read)
        sent = _sent_token(request).encode()
        # All are compared, so that time tells nothing.
        if is_open or sum(hmac.compare_digest(sent, each) for each in self.tokens):
            return
        # A browser that follows a link asks its user, but not in a script's request.
        scheme = "Basic" if request.wants_html else "Bearer"
        headers = {"WWW-Authenticate": f'{scheme} realm="memchunk"'}
        detail = "Send 'Authorization: Bearer TOKEN', or the token as a password."
        raise Problem(401, detail, headers)


class Cors:
    """Pages of other sites. If MEMCHUNK_ORIGINS names a site, its pages have the same
    rights as ours (https://fetch.spec.whatwg.org/#cors). Others may change nothing."""

    # What such a page may read of an answer, besides what every page may.
    EXPOSED = (
        "Accept-Ranges, Allow, Content-Disposition, Content-Length, Content-Location, "
        "Content-Range, ETag, Location, Repr-Digest, Retry-After, "
        "Tus-Checksum-Algorithm, Tus-Extension, Tus-Max-Size, Tus-Resumable, "
        "Tus-Version, Upload-Expires, Upload-Length, Upload-Metadata, Upload-Offset, "
        "X-Request-Id"
    )

    def __init__(self, settings: Settings) -> None:
        given, wanted = settings.origins.lower(), "origins like https://example.com"
        self._origins = _items("MEMCHUNK_ORIGINS", given, ORIGIN, wanted)

    def check_site(self, request: Request) -> None:
        """A page of another site must not change anything. A form there may post to any
        address, with the user's credentials."""
        if request.method in READS:
            return
        site = request.headers.get("Sec-Fetch-Site") or _site(request)
        is_ours = site in ("same-origin", "none") or self.shared_origin(request)
        require(is_ours, 403, "A page of another site may not change files here.")

    def shared_origin(self, request: Request) -> str | None:
        """The value of Access-Control-Allow-Origin; None if the page has no leave."""
        origin = request.headers.get("Origin", "")
        if origin and "*" in self._origins:
            return "*"
        return origin if origin.lower() in self._origins else None

    def is_preflight(self, request: Request) -> bool:
        """Whether a browser asks, without the token, if such a page may go on."""
        asks = "Access-Control-Request-Method" in request.headers
        is_options = request.method == "OPTIONS"
        return is_options and asks and self.shared_origin(request) is not None

    def share(self, request: Request, response: Response) -> None:
        """Let such a page see the answer."""
        origin, headers = self.shared_origin(request), response.headers
        if origin:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = self.EXPOSED
        if self.is_preflight(request):
            wanted = request.headers.get("Access-Control-Request-Headers", "")
            headers["Access-Control-Allow-Methods"] = headers.get("Allow", "")
            headers["Access-Control-Allow-Headers"] = wanted if wanted.isascii() else ""
            headers["Access-Control-Max-Age"] = "3600"  # seconds
        if self._origins and "*" not in self._origins:
            response.vary.add("Origin")


def _site(request: Request) -> str:
    """The value that Sec-Fetch-Site would have. Browsers don't send it over plain HTTP.

    Proxies may change our port and our host, so ports don't count. If the hosts differ,
    a request that needs a preflight is ours all the same: we refuse the preflights of
    other sites."""
    origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
    if origin is None:
        return "none"
    own = _hostname(f"//{host}")
    if own and _hostname(origin) == own:
        return "same-origin"
    is_simple = request.method == "POST" and request.mimetype in SIMPLE_TYPES
    asks_first = not is_simple or "Tus-Resumable" in request.headers
    is_plain = origin.lower().startswith("http://")
    return "none" if asks_first and is_plain else "cross-site"


def _hostname(url: str) -> str:
    with contextlib.suppress(ValueError):  # an address in brackets that is none
        return urlsplit(url).hostname or ""
    return ""


# --- The application ------------------------------------------------------------------


class Application:
    """The WSGI application. settings: all of them; the cache has its part already."""

    def __init__(self, cache: FileCache, settings: Settings | None = None) -> None:
        self.cache, self.settings = cache, settings or Settings()
        self.access, self.cors = Access(self.settings), Cors(self.settings)
        self.uploads = tus.Uploads(self) if HAS_TUS else None
        self.pages = Pages(self)
        self.handlers = self.routes()
        # How many proxies set X-Forwarded-For, -Proto, -Host, -Port and -Prefix.
        self.entry = ProxyFix(self.answer, *[self.settings.proxies] * 5)

    def routes(self) -> dict[str, dict[str, Handler]]:
        """The handlers of each address, by method. "/files/" stands for all addresses
        below it. The rest of the path is the name, with slashes and line breaks."""
        return {
            "/": {"GET": self.pages.get, "HEAD": self.pages.get},
            "/healthz": {"GET": self.get_health, "HEAD": self.get_health},
            "/readyz": {"GET": self.get_readiness, "HEAD": self.get_readiness},
            "/files": {"POST": self.post_file},
            "/files/": {
                "POST": self.post_file,
                "PUT": self.put_file,
                "GET": self.get_file,
                "HEAD": self.get_file,
                "PATCH": self.patch_file,
                "DELETE": self.delete_file,
            },
            **(self.uploads.routes() if self.uploads else {}),
        }

    def __call__(self, environ: Environ, start_response: Start) -> Iterable[bytes]:
        return self.entry(environ, start_response)

    def answer(self, environ: Environ, start_response: Start) -> Iterable[bytes]:
        call, body = Call(environ), httpfiles.Body(environ)
        request = FileRequest({}, body)  # for the log, if the environ is broken
        try:
            request = FileRequest(environ, body)
            response = self.dispatch(request)
        except Exception as error:
            problem = httpfiles.problem_of(error)
            call.log_failure(request, problem, error)
            response = self.failed(request, problem)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers["X-Request-Id"] = call.id
        if "uwsgi.version" in environ:  # all other hosts send a Date by themselves
            response.headers["Date"] = http_date()
        if self.uploads and f"{request.path}/".startswith("/uploads/"):
            response.headers.update(self.uploads.headers)
        self.cors.share(request, response)
        # After the answer, since a client may wait for it before it sends more.
        response.call_on_close(body.drain)
        answer = response(environ, start_response)
        return _drained(answer, body) if "asgi.scope" in environ else answer  # a2wsgi

    def dispatch(self, request: FileRequest) -> Response:
        """Check the request, in this order, and have a handler answer it."""
        # 1. The host, before anything is told to a page that came by DNS rebinding.
        self.access.check_host(request)
        area, _, name = request.path[1:].partition("/")
        handlers = self.handlers.get(f"/{area}/" if name else f"/{area}", {})
        # 2. A preflight: it never has a token.
        if self.cors.is_preflight(request):
            return self.options(request, handlers)
        # 3. The token, before anything is told about a file.
        if area in ("files", "uploads"):
            self.access.check_token(request)
        # 4. The address and the method, which clients of tus may override.
        _check_whole(request)
        if self.uploads and area == "uploads":
            override = request.headers.get("X-HTTP-Method-Override")
            request.method = (override or request.method).upper()
        handler = handlers.get(request.method)
        if not handler:
            return self.options(request, handlers)
        # 5. The site, if something may change.
        self.cors.check_site(request)
        return handler(request, name) if name else handler(request)

    def options(self, request: Request, handlers: dict[str, Handler]) -> Response:
        """The answer to OPTIONS, and to a method that the address does not have."""
        if request.environ.get("PATH_INFO") == "*":  # the server as a whole
            handlers = self.handlers["/files/"]
        require(handlers, 404, "There is nothing here. Files are under /files/.")
        allowed = ", ".join(sorted({*handlers, "OPTIONS"}))
        if request.method != "OPTIONS":
            raise Problem(405, f"Allowed here: {allowed}.", {"Allow": allowed})
        return httpfiles.empty_response({"Allow": allowed})

    def failed(self, request: FileRequest, problem: Problem) -> Response:
        stored, status = request.stored, problem.status
        if not request.wants_html:
            if stored:
                described = [self.describe(request, info) for info in stored]
                problem.members["stored"] = described
            return httpfiles.problem_response(problem)
        lines = [html.escape(problem.detail)]
        lines += [f"Stored: {self.stored_line(request, info)}" for info in stored]
        title = httpfiles.TITLES.get(status, "Error")
        return self.pages.message(request, title, lines, status, problem.headers)

    def get_health(self, request: Request) -> Response:
        return httpfiles.json_response({"status": "ok"})

    def get_readiness(self, request: FileRequest) -> Response:
        """Whether some server answers within READY_SECONDS; with ?all, whether each."""
        client: Any = self.cache.client
        clients = getattr(client, "servers", {"memcached": client})
        threads = futures.ThreadPoolExecutor(len(clients))  # all are asked at once
        asked = {name: threads.submit(clients[name].gets, "ready") for name in clients}
        futures.wait(asked.values(), READY_SECONDS)
        threads.shutdown(wait=False)  # a frozen one may hold its thread for longer
        servers = {
            name: "ok" if each.done() and not each.exception() else "no answer"
            for name, each in asked.items()
        }
        wanted = any if request.query_value("all") is None else all
        if wanted(state == "ok" for state in servers.values()):
            return httpfiles.json_response({"status": "ok", "servers": servers})
        raise Problem(503, "Too few servers answer.", servers=servers)

    # Handlers of uploads

    def post_file(self, request: FileRequest, name: str = "") -> Response:
        """Create the file. Without a name, each file of the body gets one of 128 random
        bits, which nobody can guess."""
        if httpfiles.is_conditional(request):
            current = self.replaceable(request, name) if name else None
            httpfiles.check_preconditions(request, current)
        return self.store(request, name, self.cache.add, 201)

    def put_file(self, request: FileRequest, name: str) -> Response:
        current = self.replaceable(request, name)
        httpfiles.check_preconditions(request, current)
        write: Write = self.cache.set
        if httpfiles.is_conditional(request):
            # The write keeps the preconditions true to its end.
            write = self.cache.add
            if current:
                write = functools.partial(self.cache.cas, version=current.version)
        try:
            return self.store(request, name, write, 200 if current else 201)
        except (memchunk.FileExists, memchunk.FileNotFound) as error:
            detail = "Meanwhile another upload stored this file, or it was deleted."
            raise Problem(412, detail) from error

    def replaceable(self, request: Request, name: str) -> FileInfo | None:
        """The file that an upload may replace. With If-None-Match: *, a file that lost
        chunks counts as absent, as it does for `add`."""
        try:
            info = self.cache.stat(name)
        except (memchunk.FileNotFound, memchunk.FileCorrupt):
            return None
        only_new = request.headers.get("If-None-Match") == "*"
        return None if only_new and name not in self.cache else info

    def sent_files(self, request: FileRequest, several: bool) -> Iterator[SentFile]:
        """The files in the body, raw or in a form, in order. Raises Problem."""
        httpfiles.refuse_content_coding(request)
        is_form = request.mimetype == FORM
        room = self.cache.max_size + (httpfiles.MAX_FORM_OVERHEAD if is_form else 0)
        too_large = httpfiles.too_large(self.cache.max_size)
        # Before the body is read, since a client may wait for what we say.
        if (request.body.size or 0) > room:
            raise too_large
        expire = request.query_value("expire")
        content_type = request.headers.get("Content-Type", "")
        expected = httpfiles.expected_digests(request, "Content-Digest")
        content = httpfiles.limited(request.body, room, too_large)
        content = httpfiles.verified(content, expected)
        httpfiles.refuse_unproved_body(request)
        if is_form:
            yield from httpfiles.Form(content, content_type).files(expire, several)
        else:
            yield SentFile(content, request.body.size, content_type, "", expire)

    def store(
        self, request: FileRequest, name: str, write: Write, status: int
    ) -> Response:
        """Store the file in the body under the name. Without a name, store each file
        there under a random one."""
        expected = httpfiles.expected_digests(request, "Repr-Digest")
        for file in self.sent_files(request, several=not name):
            about = file.content_type, file.filename
            info = write(
                name or secrets.token_hex(16) + httpfiles.extension(*about),
                httpfiles.verified(file.content, expected),
                size=file.size,
                expire=self.seconds_to_keep(file.expire),
                metadata=httpfiles.pack_metadata(*about),
            )
            request.stored.append(info)
        return self.stored_response(request, status)

    def seconds_to_keep(self, text: str | None) -> int:
        """Seconds to keep a file whose sender asks for `text`. Raises Problem."""
        most = self.settings.max_expire
        if not text:
            return self.settings.default_expire
        least, limit = (1, most) if most else (0, MAX_NUMBER)
        seconds = int(text) if re.fullmatch(r"[0-9]{1,10}", text) else -1
        if not least <= seconds <= limit:
            detail = f"'expire' must be a number of seconds, {least} to {limit}."
            raise Problem(400, detail, limit=limit)
        return seconds

    def stored_response(self, request: FileRequest, status: int) -> Response:
        """For one file its JSON, for several a list; for a browser without the page's
        script, a page."""
        infos, headers = request.stored, {}
        if len(infos) == 1:
            headers["ETag"] = f'"{infos[0].version}"'
            if status == 201:
                path = self.file_path(infos[0].name)
                headers["Location"] = httpfiles.relative_reference(request, path)
        if request.wants_html:
            lines = [self.stored_line(request, info) for info in infos]
            return self.pages.message(request, "Stored", lines, status, headers)
        described = [self.describe(request, info) for info in infos]
        content = described if len(infos) > 1 else described[0]
        return httpfiles.json_response(content, status, headers)

    def stored_line(self, request: Request, info: FileInfo) -> str:
        kept = "until the cache needs the room"
        if info.expires:
            kept = time.strftime("until %Y-%m-%d %H:%M UTC", time.gmtime(info.expires))
        address = httpfiles.relative_reference(request, self.file_path(info.name))
        link = _link(address, httpfiles.type_and_filename(info)[1])
        return f"{link}<br>{info.size:,} bytes, kept {kept}."

    def describe(self, request: Request, info: FileInfo) -> dict[str, object]:
        url = httpfiles.absolute_path(request, self.file_path(info.name))
        return {**httpfiles.describe(info), "url": url}

    def file_path(self, name: str) -> str:
        return "/files/" + quote(name, safe="!$&'()*+,/:;=@")

    # Handlers of downloads and changes

    def get_file(self, request: FileRequest, name: str) -> Response:
        if request.query_value("info") is not None:
            info = self.cache.stat(name)
            require(name in self.cache, *ERRORS[memchunk.FileEvicted])
            return httpfiles.json_response(self.describe(request, info))
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(memchunk.FileChanged):
                return self.download(request, self.cache.open(name))
        detail = "The file is being replaced faster than it can be read. Try again."
        raise Problem(503, detail)

    def download(self, request: FileRequest, file: memchunk.CachedFile) -> Response:
        info, inline = file.info, request.query_value("inline") is not None
        headers = httpfiles.file_headers(info, inline)
        httpfiles.check_preconditions(request, info)
        if httpfiles.is_not_modified(request, info):
            del headers["Content-Disposition"]  # RFC 9110, 15.4.5
            return httpfiles.empty_response(headers, 304)
        if request.method == "HEAD":
            require(info.name in self.cache, *ERRORS[memchunk.FileEvicted])
            return httpfiles.file_response(request, headers, info.size, [])
        part = self.part_to_send(request, info)
        # Verify all before the first byte is sent. Send pieces, since some hosts copy
        # them.
        content = [bytes(piece) for piece in file.chunks(*(part or (0, info.size)))]
        return httpfiles.file_response(request, headers, info.size, content, part)

    def part_to_send(self, request: Request, info: FileInfo) -> httpfiles.Span | None:
        """The range to send, None for the whole file. Raises Problem."""
        part = httpfiles.requested_range(request, info)
        limit = self.settings.max_response or info.size
        if part is None and info.size > limit:
            detail = f"Ask for ranges of up to {limit} bytes, 'Range: bytes=0-' first."
            headers = {"Accept-Ranges": "bytes"}
            raise Problem(403, detail, headers, size=info.size, limit=limit)
        return (part[0], min(part[1], part[0] + limit)) if part else None

    def patch_file(self, request: FileRequest, name: str) -> Response:
        expire = request.query_value("expire")
        require(expire, 400, "PATCH sets '?expire=SECONDS' anew, and nothing else.")
        seconds = self.seconds_to_keep(expire)
        if httpfiles.is_conditional(request):
            httpfiles.check_preconditions(request, self.cache.stat(name))
        info = self.cache.touch(name, seconds)
        headers = {"ETag": f'"{info.version}"'}
        return httpfiles.json_response(self.describe(request, info), 200, headers)

    def delete_file(self, request: Request, name: str) -> Response:
        version = None
        if httpfiles.is_conditional(request):
            info = self.cache.stat(name)
            httpfiles.check_preconditions(request, info)
            version = info.version
        self.cache.delete(name, version)
        return httpfiles.empty_response({})


def _drained(answer: Iterable[bytes], body: httpfiles.Body) -> Iterable[bytes]:
    """The answer, and the rest of the body before the answer's end. At that end uvicorn
    and hypercorn close the connection, before a2wsgi calls `close`. hypercorn closes it
    only while somebody reads, so `close` reads once more."""
    pieces = itertools.chain(answer, iter(body.drain, None))  # one call, as it is None
    return ClosingIterator(pieces, body.drain)


def _check_whole(request: Request) -> None:
    """Raise Problem for an address that is not UTF-8, and for part of a file."""
    # Werkzeug shows all broken UTF-8 as U+FFFD, so several names would be one.
    is_utf8 = "\ufffd" not in request.path
    require(is_utf8, 400, "The address is not percent-encoded UTF-8.")
    is_part = request.method not in READS and "Content-Range" in request.headers
    require(not is_part, 400, "A part can't be stored as a file. Send the file whole.")


# --- Pages for browsers ---------------------------------------------------------------

EXPIRES = (3600, 86400, 7 * 86400, 30 * 86400)  # seconds that the page offers


class Pages:
    """The page to upload from, and messages that look like it."""

    def __init__(self, application: Application) -> None:
        values = {  # each is HTML
            "uploads": "uploads" if application.uploads else "",
            "max_size": str(application.cache.max_size),
            "limit": httpfiles.size_in_words(application.cache.max_size),
            "expiries": _expiry_options(application.settings),
            "token": "" if application.access.tokens else "hidden",
        }
        text = pathlib.Path(__file__).with_name("upload.html").read_text("utf-8")
        self._upload = re.sub(r"\{\{(\w+)\}\}", lambda key: values[key[1]], text)
        self._head = self._upload.partition("<body")[0]
        policy = (
            f"default-src 'none'; style-src {_hashes('style', self._upload)}; "
            f"script-src {_hashes('script', self._upload)}; img-src data:; "
            "connect-src 'self'; form-action 'self'; base-uri 'none'; "
            "frame-ancestors 'none'"
        )
        self._headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}

    def get(self, request: Request) -> Response:
        """The same for every request: its addresses are relative to its own."""
        folder = request.root_path.rstrip("/").rpartition("/")[2]
        if folder and not request.environ.get("PATH_INFO"):
            # The application is mounted at /store. Lead on to /store/.
            return httpfiles.empty_response({"Location": f"{quote(folder)}/"}, 308)
        response = Response(self._upload, headers=self._headers, mimetype="text/html")
        response.add_etag()
        response.make_conditional(request)
        del response.headers["Date"]  # hosts add theirs
        return response

    def message(
        self, request: Request, title: str, lines: list[str], status: int, more: Headers
    ) -> Response:
        """A page of lines, which are HTML, with more headers."""
        head = re.sub("<title>.*?</title>", f"<title>{title}</title>", self._head)
        home = _link(httpfiles.relative_reference(request, "/"), "Upload a file")
        items = "\n".join(f"<li><div>{line}</div></li>" for line in [*lines, home])
        body = f"<main>\n<h1>{title}</h1>\n<ul>\n{items}\n</ul>\n</main>"
        page = f"{head}<body>\n{body}\n</body>\n</html>\n"
        headers = {**self._headers, **httpfiles.NO_STORE, "Vary": "Accept", **more}
        return Response(page, status, headers, mimetype="text/html")


def _hashes(tag: str, page: str) -> str:
    """The blocks of a page that may run in it, as its policy names them."""
    blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = [hashlib.sha256(block.encode()).digest() for block in blocks]
    return " ".join(f"'sha256-{base64.b64encode(each).decode()}'" for each in digests)


def _link(address: str, text: str) -> str:
    return f'<a href="{html.escape(address)}">{html.escape(text)}</a>'


def _expiry_options(settings: Settings) -> str:
    """What the page offers as time to keep a file: no longer than the settings
    allow."""
    most, default = settings.max_expire or MAX_NUMBER, settings.default_expire
    options = []
    for seconds in sorted({default, *(each for each in EXPIRES if each <= most)}):
        text = f"for {_duration(seconds)}" if seconds else "as long as there is room"
        selected = " selected" if seconds == default else ""
        options.append(f'<option value="{seconds}"{selected}>{text}</option>')
    return "\n".join(options)


def _duration(seconds: int) -> str:
    """In words: 5400 is "90 minutes"."""
    units = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    unit = next(unit for unit, length in units.items() if seconds % length == 0)
    count = seconds // units[unit]
    return f"{count} {unit}{'' if count == 1 else 's'}"


# --- The log --------------------------------------------------------------------------

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# Print log lines with time and level as long as the host has configured none.
_logger, _handler = logging.getLogger("memchunk"), logging.StreamHandler()
_handler.setFormatter(logging.Formatter(LINE))
_handler.addFilter(lambda _: not (logging.root.handlers or _logger.handlers[1:]))
_logger.addHandler(_handler)


class Call:
    """A request as the log names it, by the id that the answer carries."""

    def __init__(self, environ: Environ) -> None:
        sent, self._began = environ.get("HTTP_X_REQUEST_ID", ""), time.monotonic()
        is_sane = re.fullmatch("[A-Za-z0-9._-]{1,64}", sent)
        self.id = sent if is_sane else secrets.token_hex(8)

    def log_failure(self, request: Request, problem: Problem, error: Exception) -> None:
        """Write one line. After an error that nobody expected, a traceback follows."""
        is_bug = problem.status == 500
        cause = f"unexpected error: {error}" if is_bug else str(error)
        if error.__cause__:
            cause += f" ({error.__cause__})"
        level = logging.ERROR if problem.status >= 500 else logging.WARNING
        seconds, text = time.monotonic() - self._began, " ".join(cause.split())
        told = request.method, request.path, problem.status, seconds, text, self.id
        line = "%s %r: %d after %.3f s, %s [%s]"
        log.log(level, line, *told, exc_info=error if is_bug else None)


# --- The development server: python wsgi.py -------------------------------------------


@contextlib.contextmanager
def own_memcached() -> Iterator[str]:
    """A memcached on a Unix socket that only this user sees, for as long as the `with`
    block runs; yields its name for `mcpool.connect`. Raises SettingError."""
    if not (program := shutil.which("memcached")):
        there_is = "there is no memcached to start: 'apt-get install memcached'"
        raise SettingError(f"MEMCHUNK_SERVERS is not set, and {there_is}")
    with tempfile.TemporaryDirectory(prefix="memchunk") as folder:
        path = pathlib.Path(folder, "memcached")
        # The MiB are the most that it takes, not what it starts with. Only root, who
        # has to name a user, changes to that one.
        process = subprocess.Popen([program, "-s", path, "-m", "1024", "-u", "root"])
        try:
            while not path.exists():
                if (status := process.poll()) is not None:
                    raise SettingError(f"memcached ended with status {status}")
                time.sleep(0.01)
            yield f"unix:{path}"
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """`python wsgi.py`: Werkzeug's development server, and a memcached where none is
    set."""
    parser = argparse.ArgumentParser(description="Serve the API for a first try.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8000, type=int)
    options = parser.parse_args()
    # So that the `with` blocks end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    logging.basicConfig(level=logging.INFO, format=LINE)  # the access log as well
    try:
        settings = Settings.from_environment(os.environ)
        with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
            if "MEMCHUNK_SERVERS" not in os.environ:
                server = stack.enter_context(own_memcached())
                settings = dataclasses.replace(settings, servers=server)
            serve(Application(settings.connect(), settings), options.host, options.port)
    except SettingError as error:
        sys.exit(f"wsgi.py: {error}")


def serve(application: Application, host: str, port: int) -> None:
    server = make_server(host, port, application, threaded=True)
    # 127.0.0.1, ::1, or the path of a Unix socket.
    is_local = re.match(r"127\.|::1\Z|/", str(server.server_address[0]))
    if not application.access.tokens and not is_local:
        risk = "other machines may read, store and delete files here"
        log.warning("%s; set MEMCHUNK_TOKEN, or listen on 127.0.0.1", risk)
    shown = f"[{host}]" if ":" in host else host
    print(f"memchunk: http://{shown}:{server.port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
else:
    _settings = Settings.from_environment(os.environ)
    application = Application(_settings.connect(), _settings)
    """WSGI hosts look for it: `gunicorn wsgi:application`. A bad setting stops the
    import."""
