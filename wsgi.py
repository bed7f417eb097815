"""An HTTP API for files of up to 50 MiB in memcached, for any WSGI host.

    python wsgi.py                  a first try: brings a memcached of its own
    gunicorn wsgi:application       for work: settings come from the environment, see Settings

    POST    /files           store under a new name     PUT     /files/<name>   create or replace
    POST    /files/<name>    create only                DELETE  /files/<name>   delete
    GET     /files/<name>    the bytes                  GET     /               page to upload from
    GET     /healthz         this process is alive      GET     /readyz         memcached answers
    POST, HEAD, PATCH, DELETE  /uploads    in pieces that resume, with tus.py beside this file

The promise: no byte of a file is sent before all that were asked for are verified, so that a file
that memcached evicted or damaged is an error status, never a short or wrong 200; and a refused
upload stores nothing. Errors are application/problem+json (RFC 9457), or words for a browser.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import html
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.http import HTTP_STATUS_CODES, http_date, parse_options_header
from werkzeug.routing import BaseConverter, Map, MapAdapter, Rule
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

import memchunk

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    import tus

__all__ = ["Application", "SettingError", "Settings"]

PIECE = 256 * 1024
"""Bytes of an upload that are held at a time, besides the library's own batch."""

DRAIN = 256 * 1024 * 1024
"""Bytes of a refused upload that are read, and dropped, so that its sender sees the answer."""

READ_ATTEMPTS = 5  # how often a download that a writer overtakes starts over on the new version
RETRY_AFTER = "5"  # seconds: about what memcached takes to come back
MAX_PART_HEADER = 16 * 1024  # bytes of headers of one part of a form
MAX_FORM_OVERHEAD = 64 * 1024  # bytes of a form that are not the file: those that fit are plenty
MAX_FIELD = 1024  # bytes of a form field that is not the file
MAX_EXPIRE = 2**31 - 1  # seconds, 68 years

CONTENT_TYPE = "application/octet-stream"  # of a file whose sender names none
# curl says this of any body; a file is hardly ever a urlencoded form.
NO_CONTENT_TYPES = ("", "application/x-www-form-urlencoded")
CONTENT_TYPE_PATTERN = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+(;[ -~]*)?", re.ASCII)

# Characters that make a file name look like another: https://www.unicode.org/reports/tr36
BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

TAKES_BODY = ("new", "create", "put")  # endpoints
READS = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
PRECONDITIONS = ("If-Match", "If-Unmodified-Since", "If-None-Match")  # of methods that do
DIGESTS = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}  # RFC 9530's active ones

# These Lambda adapters send a text/* body as text, so that bytes that are not UTF-8 break them,
# unless it has a Content-Encoding.
TEXT_DECODERS = ("apig_wsgi.full_event", "serverless.event")

# What a browser may do with a stored file: keep it. Whatever runs in it, runs without this origin.
STORED_FILE_POLICY = "sandbox; default-src 'none'"

EXPIRES = (3600, 86400, 7 * 86400, 30 * 86400)  # seconds that the page offers to keep a file

# Status and advice for each error of the library. What it says of servers stays in the log.
ERRORS: dict[type[memchunk.MemchunkError], tuple[int, str]] = {
    memchunk.InvalidName: (400, "A name is 1 to 1024 bytes of UTF-8."),
    memchunk.SizeMismatch: (400, "The body has not the length that was announced. Send it again."),
    memchunk.FileNotFound: (404, "No such file is stored. It may have expired or been evicted."),
    memchunk.FileExists: (409, "A file of this name exists. PUT replaces it; DELETE removes it."),
    memchunk.FileEvicted: (410, "The cache dropped parts of this file. Upload it again."),
    memchunk.UploadConflict: (409, "Another request sent other bytes. Start the upload again."),
    memchunk.FileChanged: (412, "The file has changed. Get its new ETag and decide again."),
    memchunk.FileTooLarge: (413, "The file is larger than this server takes."),
    memchunk.FileCorrupt: (502, "The cache damaged this file. Upload it again."),
    memchunk.CacheUnavailable: (503, "The cache did not answer. Try again in a few seconds."),
    memchunk.CacheFull: (507, "The cache has no room for this file. Try later, or a smaller one."),
}

TITLES = {**HTTP_STATUS_CODES, 460: "Checksum Mismatch"}  # 460 is tus's own

HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<style>
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem;
  overflow-wrap: anywhere }
</style>
<main>
<h1>{{title}}</h1>
<p>{{text}}</p>
<p><a href="{{home}}">Upload a file</a></p>
</main>
"""

log = logging.getLogger("memchunk.wsgi")


class SettingError(RuntimeError):
    """A setting in the environment is bad; the message says which and why, in one sentence."""


class Problem(Exception):
    """An answer that is an error: status, what to do about it, headers, members of the JSON."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, **members: object
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers, self.members = headers or {}, members


class CutOff(Problem):
    """The request's body ended before its end."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the API behaves; each is `MEMCHUNK_` and its name in capitals in the environment.

    servers: memcached servers, "host:port" or "unix:/path", separated by commas. By default
        memcached's own default port on this machine.
    namespace: prefix of the keys, for several applications on one memcached.
    max_size: largest file in bytes, 50 MiB by default.
    expire: seconds that a file is kept unless its upload says otherwise, 0 (default) for no end.
    timeout: seconds to wait for memcached, 5 by default.
    token: what clients must send as bearer token, or as password of HTTP Basic; none by default.
    max_response: most bytes of a file in one answer, for hosts with a limit, 0 (default) for none.
    """

    servers: str = "127.0.0.1:11211"
    namespace: str = "memchunk"
    max_size: int = memchunk.MAX_SIZE
    expire: int = 0
    timeout: float = memchunk.TIMEOUT
    token: str = ""
    max_response: int = 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read every setting that is there. Raises SettingError."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = f"MEMCHUNK_{field.name.upper()}"
            if variable in environ:
                values[field.name] = _setting(variable, environ[variable], type(field.default))
        if not re.fullmatch(r"[!-~]*", values.get("token", "")):
            raise SettingError("MEMCHUNK_TOKEN must be of printable ASCII characters, no spaces")
        return cls(**values)

    def connect(self) -> memchunk.FileCache:
        """The cache that the settings describe. Raises SettingError."""
        try:
            return memchunk.connect(
                self.servers,
                timeout=self.timeout,
                namespace=self.namespace,
                max_size=self.max_size,
            )
        except ValueError as error:
            raise SettingError(f"MEMCHUNK_SERVERS or MEMCHUNK_NAMESPACE: {error}") from None


def _setting(variable: str, text: str, kind: type) -> str | int | float:
    if not text.strip():
        raise SettingError(f"{variable} is empty; give it a value or unset it")
    if kind is str:
        return text
    try:
        number: int | float = kind(text)
    except ValueError:
        raise SettingError(f"{variable} must be a number, not {text!r}") from None
    least = 0 if variable == "MEMCHUNK_EXPIRE" else 0.001
    if not least <= number <= MAX_EXPIRE:
        raise SettingError(f"{variable} is {text}, but must be {least} to {MAX_EXPIRE}")
    return number


class NameConverter(BaseConverter):
    """Whatever follows /files/, slashes and line breaks included."""

    regex = r"[\s\S]+"
    part_isolating = False


class Body:
    """The request's body in pieces, up to the end that its framing announces and no further.

    size: bytes, None where only the end of the host's stream will tell. Iterating raises Problem
    on a body that is cut off: hosts differ in how they end one, some like a complete one.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._stream = environ["wsgi.input"]
        # a2wsgi's stream ends with the body too, but does not say so.
        ends = environ.get("wsgi.input_terminated") or "asgi.scope" in environ
        length = environ.get("CONTENT_LENGTH") or ""
        self._problem: Problem | None = None
        self.size: int | None = None if ends else 0  # 0: without a word about it there is none
        if "HTTP_TRANSFER_ENCODING" in environ:
            if not ends:
                self._problem = Problem(411, "Send a Content-Length: this host needs one.")
        elif re.fullmatch("[0-9]{1,18}", length):
            self.size = int(length)
        elif length:
            self._problem = Problem(400, "The Content-Length is not a number.")
        self._left = self.size

    def __iter__(self) -> Iterator[bytes]:
        if self._problem:
            raise self._problem
        while self._left is None or self._left > 0:
            piece = self._read(PIECE if self._left is None else min(PIECE, self._left))
            if self._left is not None:
                self._left -= len(piece)
            elif not piece:
                self._left = 0
            if piece:
                yield piece
            elif self._left:
                raise CutOff(400, "The body ended before its Content-Length. Send it again.")

    def _read(self, size: int) -> bytes:
        try:
            piece: bytes = self._stream.read(size)
        except Exception as error:  # each host has its own for a broken connection or coding
            self._left = 0
            log.info("reading a request's body: %r", error)
            raise CutOff(400, "The body broke off. Send it again.") from error
        return piece

    def drain(self) -> None:
        """Read what a refused upload still sends. To close on it would reset the connection, and
        its sender would see that instead of the answer."""
        dropped = 0
        with contextlib.suppress(Problem):  # there is no one left to tell
            for piece in self:
                dropped += len(piece)
                if dropped > DRAIN:
                    return


@dataclasses.dataclass
class Upload:
    """What an upload says of its file, and its bytes, which can be read once."""

    content: Iterable[bytes]
    size: int | None
    content_type: str
    filename: str
    expire: str | None


class Form:
    """A multipart/form-data body, read as a stream.

    Werkzeug's decoder (3.1.9) adds a byte to a file when a piece ends within the last "--".
    """

    def __init__(self, pieces: Iterable[bytes], boundary: str) -> None:
        self._pieces = itertools.chain(pieces, [b"\r\n"])  # which some leave out at the very end
        self._delimiter = b"\r\n--" + boundary.encode()
        self._buffer = b"\r\n"  # the first delimiter has no line before it

    def upload(self, expire: str | None) -> Upload:
        """What the field "file" has. A field "expire" counts where it stands before that."""
        for _ in self._until(self._delimiter):
            pass
        while (part := self._part()) is not None:
            name, filename, content_type = part
            if name == "file" and filename != "":  # "" is what a browser sends for no file
                return Upload(self._file(), None, content_type, filename or "", expire)
            text = self._text(self._delimiter, MAX_FIELD)
            expire = text if name == "expire" else expire
        raise Problem(400, "The form has no file in a field named 'file'. Choose one.")

    def _file(self) -> Iterator[bytes]:
        """The file's bytes. Then read the form to its end: only then it is known to be whole."""
        yield from self._until(self._delimiter)
        while (part := self._part()) is not None:
            if part[0] == "file":
                raise Problem(400, "The form has more than one file. Send one per request.")
            self._text(self._delimiter, MAX_FIELD)

    def _part(self) -> tuple[str, str | None, str] | None:
        """Name, file name and content type of the part that starts here, None at the end."""
        start = self._text(b"\r\n", MAX_FIELD).strip()
        if start == "--":
            for _ in self._pieces:  # means nothing, but must arrive: else the body was cut off
                pass
            return None
        if start:
            raise Problem(400, "The form is broken: text follows a boundary.")
        lines = self._text(b"\r\n\r\n", MAX_PART_HEADER).split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {key.strip().lower(): value.strip() for key, _, value in fields}
        _, options = parse_options_header(headers.get("content-disposition"))
        return options.get("name", ""), options.get("filename"), headers.get("content-type", "")

    def _text(self, end: bytes, limit: int) -> str:
        data = b""
        for piece in self._until(end):
            data += piece
            if len(data) > limit:
                raise Problem(400, f"A header or field of the form has more than {limit} bytes.")
        return data.decode("utf-8", "replace")

    def _until(self, end: bytes) -> Iterator[bytes]:
        """Yield what comes before `end`, and step over it. Raises Problem where none comes."""
        while (found := self._buffer.find(end)) < 0:
            sure = max(0, len(self._buffer) - len(end) + 1)  # the rest may be the start of `end`
            if sure:
                yield self._buffer[:sure]
            piece = next(self._pieces, None)
            if piece is None:
                raise Problem(400, "The form ended before its last boundary. Send it again.")
            self._buffer = self._buffer[sure:] + piece
        rest, self._buffer = self._buffer[:found], self._buffer[found + len(end) :]
        if rest:
            yield rest


class Application:
    """The WSGI application.

    cache: where the files are. settings: those of them that the cache doesn't take care of.
    """

    def __init__(self, cache: memchunk.FileCache, settings: Settings | None = None) -> None:
        self.cache = cache
        self.settings = settings or Settings()
        self.uploads = _uploads(self)
        self.url_map = Map(
            [
                *(self.uploads.rules() if self.uploads else ()),
                Rule("/", endpoint="page", methods=["GET"]),
                Rule("/healthz", endpoint="health", methods=["GET"]),
                Rule("/readyz", endpoint="ready", methods=["GET"]),
                Rule("/files", endpoint="new", methods=["POST"]),
                Rule("/files/<name:name>", endpoint="read", methods=["GET"]),
                Rule("/files/<name:name>", endpoint="create", methods=["POST"]),
                Rule("/files/<name:name>", endpoint="put", methods=["PUT"]),
                Rule("/files/<name:name>", endpoint="delete", methods=["DELETE"]),
            ],
            converters={"name": NameConverter},
            strict_slashes=False,
            merge_slashes=False,
        )
        self.page = self.upload_page()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self.wsgi_app(environ, start_response)

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request, body = Request(environ), Body(environ)
        try:
            response = self.dispatch(request, body)
        except Exception as error:
            response = self.failed(request, _as_problem(error))
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        if self.uploads and _is_upload(request):
            response.headers.update(self.uploads.headers)
        if environ["REQUEST_METHOD"] not in READS:
            # After the answer, not before it: a client may wait for it and send nothing more.
            response.call_on_close(body.drain)
        return response(environ, start_response)

    def dispatch(self, request: Request, body: Body) -> Response:
        if re.match(r"/(files|uploads)(/|\Z)", request.path):
            self.authorize(request)
        if "\ufffd" in request.path:  # broken UTF-8, as Werkzeug shows it: many names would be one
            raise Problem(400, "The address is not percent-encoded UTF-8.")
        adapter = self.url_map.bind_to_environ(request.environ)
        if self.uploads and _is_upload(request):
            return self.uploads.dispatch(request, adapter, body)
        if request.method == "OPTIONS":
            return self.on_options(request, adapter)
        endpoint, arguments = adapter.match(method=request.method)
        if request.method not in READS:
            _refuse_foreign_site(request)
        handler: Callable[..., Response] = getattr(self, f"on_{endpoint}")
        uploads = {"body": body} if endpoint in TAKES_BODY else {}
        return handler(request, **arguments, **uploads)

    def authorize(self, request: Request) -> None:
        """Raise Problem unless the request carries the token, where one is set."""
        sent = request.authorization
        token = (sent.password if sent.type == "basic" else sent.token) if sent else None
        expected = self.settings.token
        if expected and not hmac.compare_digest((token or "").encode(), expected.encode()):
            # A browser that follows a link asks its user; in a script's request it must not.
            scheme = "Basic" if _wants_html(request) else "Bearer"
            raise Problem(
                401,
                "Send the token: 'Authorization: Bearer TOKEN', or as password of any user.",
                {"WWW-Authenticate": f'{scheme} realm="memchunk"'},
            )

    def on_options(self, request: Request, adapter: MapAdapter) -> Response:
        allowed = set(adapter.allowed_methods())
        if request.environ["PATH_INFO"] == "*":  # the server as a whole
            allowed = {"DELETE", "GET", "HEAD", "POST", "PUT"}
        if not allowed:
            raise NotFound()
        return _empty({"Allow": ", ".join(sorted({*allowed, "OPTIONS"}))})

    def on_page(self, request: Request) -> Response:
        response = Response(self.page, headers=_page_headers(self.page), mimetype="text/html")
        response.add_etag()
        return response.make_conditional(request)

    def upload_page(self) -> str:
        """The same for every request: its addresses are relative to its own."""
        resumes = self.url_map.bind("").test("/uploads", "POST")
        return _fill(
            pathlib.Path(__file__).with_name("upload.html").read_text("utf-8"),
            uploads="uploads" if resumes else "",
            max_size=str(self.cache.max_size),
            limit=_words(self.cache.max_size),
            expiries=_expiry_options(self.settings),
            token="" if self.settings.token else "hidden",
        )

    def on_health(self, request: Request) -> Response:
        return _json({"status": "ok"}, headers={"Cache-Control": "no-store"})

    def on_ready(self, request: Request) -> Response:
        self.cache.ping()
        return self.on_health(request)

    def on_new(self, request: Request, body: Body) -> Response:
        # 128 random bits: who doesn't know the name can't find the file.
        return self.on_create(request, secrets.token_hex(16), body)

    def on_create(self, request: Request, name: str, body: Body) -> Response:
        _check_preconditions(request, None)
        return self.store(request, name, body, self.cache.add, 201)

    def on_put(self, request: Request, name: str, body: Body) -> Response:
        if "Content-Range" in request.headers:
            raise Problem(400, "This server can't replace a part of a file. Send it whole.")
        current = None
        with contextlib.suppress(memchunk.FileNotFound, memchunk.FileCorrupt):
            current = self.cache.stat(name)
        _check_preconditions(request, current)
        # The write must keep the preconditions true to its end.
        write: Callable[..., memchunk.FileInfo] = self.cache.set
        if current and any(key in request.headers for key in PRECONDITIONS[:2]):
            write = functools.partial(self.cache.cas, version=current.version)
        elif request.headers.get("If-None-Match") == "*":
            write = self.cache.add
        try:
            return self.store(request, name, body, write, 200 if current else 201)
        except (memchunk.FileExists, memchunk.FileNotFound) as error:  # since we looked
            raise Problem(412, ERRORS[memchunk.FileChanged][1]) from error

    def store(
        self,
        request: Request,
        name: str,
        body: Body,
        write: Callable[..., memchunk.FileInfo],
        status: int,
    ) -> Response:
        upload = self.receive(request, body)
        info = write(
            name,
            _verified(upload.content, request.headers.get("Repr-Digest", "")),
            size=upload.size,
            expire=_expire(upload.expire, self.settings.expire),
            metadata=_pack(upload.content_type, upload.filename),
        )
        return self.stored(request, info, status)

    def receive(self, request: Request, body: Body) -> Upload:
        """The upload in the body, raw or in a form. Raises Problem."""
        _refuse_coding(request)
        is_form = request.mimetype == "multipart/form-data"
        # Before the body is read, since a client may wait for what we say.
        if (body.size or 0) > self.cache.max_size + (MAX_FORM_OVERHEAD if is_form else 0):
            raise _too_large(self.cache.max_size)
        expire = _query(request, "expire")
        if not is_form:
            return Upload(body, body.size, request.headers.get("Content-Type", ""), "", expire)
        boundary = request.mimetype_params.get("boundary", "")
        if not re.fullmatch("[ -~]{1,70}", boundary):
            raise Problem(400, "The form's Content-Type names no boundary of 1 to 70 characters.")
        return Form(body, boundary).upload(expire)

    def stored(self, request: Request, info: memchunk.FileInfo, status: int) -> Response:
        url = self.url(request, "read", name=info.name)
        headers = {"ETag": f'"{info.version}"', **({"Location": url} if status == 201 else {})}
        if not _wants_html(request):
            return _json({**_describe(info), "url": url}, status, headers)
        # A form that a browser sent without the page's script.
        kept = "until the cache needs the room"
        if info.expires:
            kept = time.strftime("until %Y-%m-%d %H:%M UTC", time.gmtime(info.expires))
        link = html.escape(url)
        text = f'<a href="{link}">{link}</a><br>{info.size:,} bytes, kept {kept}.'
        return self.words(request, "Stored", text, status, headers)

    def failed(self, request: Request, problem: Problem) -> Response:
        title = TITLES.get(problem.status, "Error")
        if _wants_html(request):
            text = html.escape(problem.detail)
            return self.words(request, title, text, problem.status, problem.headers)
        content = {"title": title, "status": problem.status, "detail": problem.detail}
        headers = {**problem.headers, "Content-Type": "application/problem+json"}
        return _json({**problem.members, **content}, f"{problem.status} {title}", headers)

    def words(
        self, request: Request, title: str, text: str, status: int, headers: Mapping[str, str]
    ) -> Response:
        page = _fill(HTML, title=title, text=text, home=html.escape(f"{request.root_path}/"))
        more = {"Vary": "Accept", "Content-Type": "text/html; charset=utf-8"}
        return Response(page, status, {**headers, **_page_headers(HTML), **more})

    def on_read(self, request: Request, name: str) -> Response:
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(memchunk.FileChanged):
                return self.send(request, self.cache.open(name))
        detail = "The file is being replaced faster than it can be read. Try again."
        raise Problem(503, detail, {"Retry-After": RETRY_AFTER})

    def send(self, request: Request, file: memchunk.CachedFile) -> Response:
        info = file.info
        headers = _file_headers(info)
        if _check_preconditions(request, info) == 304:
            del headers["Content-Type"], headers["Content-Disposition"]
            return _empty(headers, 304)
        span = self.span(request, info)
        algorithm = _wanted_digest(request.headers.get("Want-Repr-Digest", ""))
        digest = DIGESTS[algorithm]() if algorithm else None
        content = _read(file, span, digest, request.method == "HEAD")
        if digest:
            headers["Repr-Digest"] = f"{algorithm}=:{base64.b64encode(digest.digest()).decode()}:"
        if any(key in request.environ for key in TEXT_DECODERS):
            headers["Content-Encoding"] = "identity"
        start, stop = span or (0, info.size)
        headers["Content-Length"] = str(stop - start)
        if span:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{info.size}"
        return Response(content, 206 if span else 200, headers)

    def span(self, request: Request, info: memchunk.FileInfo) -> tuple[int, int] | None:
        """Start and stop of the range to send, None for the whole file. Raises Problem."""
        if request.method == "HEAD":
            return None
        span = _range(request, info)
        limit = self.settings.max_response or info.size
        if span is None and info.size > limit:
            detail = (
                f"This server sends up to {limit} bytes in one answer, and the file has "
                f"{info.size}. Ask for ranges, 'Range: bytes=0-' first: each answer's "
                "Content-Range says how far it got."
            )
            raise Problem(403, detail, {"Accept-Ranges": "bytes"}, size=info.size, limit=limit)
        return span and (span[0], min(span[1], span[0] + limit))

    def on_delete(self, request: Request, name: str) -> Response:
        version = None
        if any(key in request.headers for key in PRECONDITIONS):
            info = self.cache.stat(name)
            _check_preconditions(request, info)
            version = info.version
        self.cache.delete(name, version)
        return _empty({})

    def url(self, request: Request, endpoint: str, **arguments: str) -> str:
        """Absolute where the request says by which host it came; else a path."""
        adapter = self.url_map.bind_to_environ(request.environ)
        return adapter.build(endpoint, arguments, force_external=bool(request.host))


def _as_problem(error: Exception) -> Problem:
    """What to answer where `error` came up."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, memchunk.FileTooLarge):
        return _too_large(error.limit)
    for kind, (status, detail) in ERRORS.items():
        if isinstance(error, kind):
            if status >= 500:
                log.error("%s", error)
            return Problem(status, detail, {"Retry-After": RETRY_AFTER} if status == 503 else {})
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted({*(error.valid_methods or ()), "OPTIONS"}))
        return Problem(405, f"Allowed here: {allowed}.", {"Allow": allowed})
    if isinstance(error, HTTPException) and error.code and 400 <= error.code < 500:
        details = {404: "There is nothing at this address. Files are under /files/."}
        return Problem(error.code, details.get(error.code, "The request is not valid."))
    log.exception("unexpected error")
    return Problem(500, "Something is wrong with this server. Its log says what.")


def _too_large(limit: int) -> Problem:
    return Problem(413, f"Files may have up to {_words(limit)}; this one has more.", limit=limit)


def _words(size: int) -> str:
    return f"{size / 2**20:.4g} MiB" if size >= 2**20 else f"{size:,} bytes"


def _duration(seconds: int) -> str:
    """In words: 5400 is "90 minutes"."""
    units = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    unit = next(unit for unit, length in units.items() if seconds % length == 0)
    count = seconds // units[unit]
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _expiry_options(settings: Settings) -> str:
    """What the page offers as time to keep a file, as HTML: no longer than the settings allow."""
    most = getattr(settings, "max_expire", 0) or MAX_EXPIRE
    default = settings.expire or (0 if most == MAX_EXPIRE else most)
    offers = sorted({default, *(seconds for seconds in EXPIRES if seconds <= most)})
    return "\n".join(
        f'<option value="{seconds}"{" selected" if seconds == default else ""}>'
        f"{'for ' + _duration(seconds) if seconds else 'as long as there is room'}</option>"
        for seconds in offers
    )


def _fill(template: str, **values: str) -> str:
    """The template with each {{key}} replaced by its value, which is HTML."""
    return re.sub(r"\{\{(\w+)\}\}", lambda key: values[key[1]], template)


@functools.lru_cache(maxsize=2)
def _page_headers(page: str) -> dict[str, str]:
    """What a browser may do with a page of ours: run the style and the script that stand in it,
    which it knows by their hashes, and send what the script or a form does to this server."""

    def hashes(tag: str) -> str:
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(block.encode()).digest() for block in blocks]
        sources = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        return " ".join(sources) or "'none'"

    policy = (
        f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; "
        "img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def _uploads(application: Application) -> tus.Uploads | None:
    """Resumable uploads, where tus.py lies beside this file."""
    if importlib.util.find_spec("tus") is None:
        return None
    # It imports this module, which `python wsgi.py` calls by another name.
    sys.modules.setdefault("wsgi", sys.modules[__name__])
    import tus  # noqa: PLC0415

    return tus.Uploads(application)


def _is_upload(request: Request) -> bool:
    return re.match(r"/uploads(/|\Z)", request.path) is not None


def _query(request: Request, key: str) -> str | None:
    """Not by request.args, which fails on bytes that aren't UTF-8."""
    values = parse_qs(request.environ.get("QUERY_STRING", "")).get(key)
    return values[0] if values else None


def _refuse_coding(request: Request) -> None:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, "Send it without a Content-Encoding.", {"Accept-Encoding": ""})


def _refuse_foreign_site(request: Request) -> None:
    """Raise Problem where a page of another site made the browser send this: a form there may post
    to any address, with the user's credentials."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is None and origin is not None:
        own = {f"{scheme}://{request.headers.get('Host')}".lower() for scheme in ("http", "https")}
        site = "same-origin" if origin.lower() in own else "cross-site"
    if site not in (None, "same-origin", "none"):
        raise Problem(403, "A page of another site may not change files here.")


def _check_preconditions(request: Request, info: memchunk.FileInfo | None) -> int:
    """304 where the client has this file, 0 to go on; raises Problem 412. RFC 9110, 13.2.2."""
    headers, reads = request.headers, request.method in ("GET", "HEAD")
    failed = Problem(412, ERRORS[memchunk.FileChanged][1])
    if "If-Match" in headers:
        if info is None or not request.if_match.contains(info.version):
            raise failed
    elif info and _before(request.if_unmodified_since, info.created):
        raise failed
    if "If-None-Match" in headers:
        if info and request.if_none_match.contains_weak(info.version):
            if reads:
                return 304
            raise failed
    elif info and reads and request.if_modified_since:
        return 0 if _before(request.if_modified_since, info.created) else 304
    return 0


def _before(date: Any, created: int) -> bool:
    return date is not None and int(date.timestamp()) < created


def _range(request: Request, info: memchunk.FileInfo) -> tuple[int, int] | None:
    """Start and stop of the one range that is asked for, None for the whole file: other kinds of
    ranges are to be ignored. Raises Problem. Werkzeug's parser takes "bytes=-0" for all bytes."""
    header = request.headers.get("Range", "")
    match = re.fullmatch(r"bytes *= *([0-9]{0,99})-([0-9]{0,99})", header, re.IGNORECASE)
    if not match or match[0].endswith("=-") or not _if_range(request, info):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, info.size - int(last)), info.size
        if info.size == 0 and int(last):
            return None  # satisfiable, but there are no bytes that Content-Range could name
    else:
        start, stop = int(first), min(int(last or info.size) + 1, info.size)
        if last and int(last) < int(first):
            return None
    if start >= info.size:
        headers = {"Content-Range": f"bytes */{info.size}"}
        raise Problem(416, f"The file has {info.size} bytes.", headers, size=info.size)
    return start, stop


def _if_range(request: Request, info: memchunk.FileInfo) -> bool:
    """Whether the client's part is one of this version. Only a strong ETag or the exact date says
    so; Werkzeug's parser drops the mark of a weak one."""
    value = request.headers.get("If-Range")
    return value is None or value in (f'"{info.version}"', http_date(info.created))


def _read(
    file: memchunk.CachedFile, span: tuple[int, int] | None, digest: Any, head: bool
) -> list[bytes]:
    """The bytes to send, all verified, and in pieces: some hosts copy each more than once. HEAD
    verifies all, and so says what GET would; a digest is of the whole file, too."""
    pieces = [] if head else [bytes(piece) for piece in file.chunks(*(span or (0, None)))]
    if head or digest:
        for piece in file.chunks() if head or span else pieces:
            if digest:
                digest.update(piece)
    return pieces


def _file_headers(info: memchunk.FileInfo) -> dict[str, str]:
    content_type, filename = _metadata(info)
    # Those who can't read the form for all characters (RFC 6266) get one without them.
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    plain = re.sub(r'["\\%]', "_", plain).strip(" .") or "file"
    extended = quote(filename, safe="")
    return {
        "Content-Type": content_type,
        "Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{extended}",
        "Content-Security-Policy": STORED_FILE_POLICY,
        "ETag": f'"{info.version}"',
        "Last-Modified": http_date(info.created),
        "Accept-Ranges": "bytes",
        "Cache-Control": "no-cache",  # keep it, but ask before using it: names can be replaced
    }


def _pack(content_type: str, filename: str, **more: str) -> bytes:
    """A file's metadata, as they came: _metadata cleans them, as it must those by others."""
    return json.dumps({"type": content_type[:256], "filename": filename[-255:], **more}).encode()


def _metadata(info: memchunk.FileInfo) -> tuple[str, str]:
    """Content type and file name. Others may have written the metadata: take nothing on trust."""
    try:
        stored = json.loads(info.metadata)
        content_type, filename = str(stored["type"]), str(stored["filename"])
    except (ValueError, TypeError, KeyError, RecursionError):
        content_type = filename = ""
    return _clean_content_type(content_type), _clean_filename(filename or info.name)


def _describe(info: memchunk.FileInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "size": info.size,
        "content_type": _metadata(info)[0],
        "etag": f'"{info.version}"',
        "created": info.created,
        "expires": info.expires,
    }


def _clean_content_type(text: str) -> str:
    text = text.strip()
    if text.lower() in NO_CONTENT_TYPES or len(text) > 255:
        return CONTENT_TYPE
    return text if CONTENT_TYPE_PATTERN.fullmatch(text) else CONTENT_TYPE


def _clean_filename(text: str) -> str:
    """The last part of a path, without what could deceive a person or a file system."""
    text = re.split(r"[/\\]", text)[-1]
    kept = (
        character
        for character in text
        if unicodedata.category(character) not in ("Cc", "Cs") and character not in BIDI_CONTROLS
    )
    return "".join(kept).strip(" .")[-100:] or "file"


def _expire(text: str | None, default: int) -> int:
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > MAX_EXPIRE:
        raise Problem(400, f"'expire' must be a number of seconds, 0 (no end) to {MAX_EXPIRE}.")
    return int(text)


def _expected_digests(header: str) -> dict[str, bytes]:
    """What a Repr-Digest (RFC 9530) says, by algorithm. Raises Problem. Those that aren't known
    are no reason to refuse a file."""
    expected = {}
    for member in filter(None, map(str.strip, header.split(","))):
        algorithm, _, value = member.partition("=")
        if algorithm.lower() in DIGESTS:
            try:
                expected[algorithm.lower()] = base64.b64decode(value.strip(":"), validate=True)
            except ValueError:
                raise Problem(400, "The Repr-Digest has not the form sha-256=:BASE64:.") from None
    return expected


def _verified(pieces: Iterable[Any], header: str) -> Iterator[Any]:
    """Yield the pieces; raise Problem after the last where they haven't the digests in `header`,
    a Repr-Digest."""
    expected = _expected_digests(header)
    digests = {algorithm: DIGESTS[algorithm]() for algorithm in expected}
    for piece in pieces:
        for digest in digests.values():
            digest.update(piece)
        yield piece
    for algorithm, digest in digests.items():
        if digest.digest() != expected[algorithm]:
            raise Problem(400, f"The file's {algorithm} is not its Repr-Digest's. Send it again.")


def _wanted_digest(header: str) -> str | None:
    """The algorithm that the client likes best of those we have (Want-Repr-Digest, RFC 9530)."""
    wanted = re.findall(r"(sha-256|sha-512)\s*=\s*([0-9]{1,2})\b", header.lower())
    likes = {algorithm: int(weight) for algorithm, weight in wanted if int(weight)}
    return max(likes, key=lambda algorithm: likes[algorithm]) if likes else None


def _wants_html(request: Request) -> bool:
    """Whether a person in a browser will look at the answer."""
    offers = ["application/json", "application/problem+json", "text/html"]
    return request.accept_mimetypes.best_match(offers) == "text/html"


def _json(
    content: Mapping[str, object],
    status: int | str = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    defaults = {"Content-Type": "application/json", "Vary": "Accept"}
    return Response(json.dumps(content) + "\n", status, {**defaults, **(headers or {})})


def _empty(headers: Mapping[str, str], status: int = 204) -> Response:
    response = Response(status=status, headers=headers)
    del response.headers["Content-Type"]
    return response


@contextlib.contextmanager
def own_memcached() -> Iterator[str]:
    """A memcached on a Unix socket that only this user sees, for as long as the `with` block runs;
    yields its name for `memchunk.connect`. Raises SettingError."""
    program = shutil.which("memcached")
    if program is None:
        raise SettingError(
            "MEMCHUNK_SERVERS is not set, and there is no memcached to start; install it: "
            "'apt-get install memcached', 'dnf install memcached' or 'brew install memcached'"
        )
    with tempfile.TemporaryDirectory(prefix="memchunk") as folder:
        path = pathlib.Path(folder, "memcached")
        user = ["-u", "root"] if os.geteuid() == 0 else []  # as root it wants to be told so
        # The MiB are the most that it takes, not what it starts with.
        command = [program, "-s", str(path), "-m", "1024", *user]
        process = subprocess.Popen(command)
        try:
            while not path.exists():
                if process.poll() is not None:
                    raise SettingError(f"memcached ended with status {process.returncode}")
                time.sleep(0.01)
            yield f"unix:{path}"
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """`python wsgi.py`: Werkzeug's development server, and a memcached where none is set."""
    parser = argparse.ArgumentParser(description="Serve the API for a first try.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8000, type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the `with` blocks end
    try:
        settings = Settings.from_environment(os.environ)
        with contextlib.ExitStack() as stack:
            if "MEMCHUNK_SERVERS" not in os.environ:
                server = stack.enter_context(own_memcached())
                settings = dataclasses.replace(settings, servers=server)
            serve(Application(settings.connect(), settings), options.host, options.port)
    except SettingError as error:
        sys.exit(f"wsgi.py: {error}")
    except KeyboardInterrupt:
        pass


def serve(application: Application, host: str, port: int) -> None:
    server = make_server(host, port, application, threaded=True)
    print(f"memchunk: http://{f'[{host}]' if ':' in host else host}:{server.port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
else:
    _settings = Settings.from_environment(os.environ)
    application = Application(_settings.connect(), _settings)
    """What WSGI hosts look for: `gunicorn wsgi:application`. A bad setting stops the import."""
