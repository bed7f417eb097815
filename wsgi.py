"""An HTTP API for files of up to 50 MiB in memcached, for any WSGI host.

    python wsgi.py                a first try: brings a memcached of its own
    gunicorn wsgi:application     for work: Settings come from the environment

    POST    /files              store under a new name
    POST    /files/<name>       create only
    PUT     /files/<name>       create or replace
    GET     /files/<name>       the bytes
    PATCH   /files/<name>       a new time to live
    DELETE  /files/<name>       delete
    GET     /                   the page to upload from
    GET     /healthz            this process is alive
    GET     /readyz             a memcached answers
    POST, HEAD, PATCH, DELETE   /uploads, in pieces that resume, with tus.py beside it

The promise: no byte of a file is sent before all that were asked for are verified. So a
file that memcached evicted or damaged is an error status, never a short or wrong 200;
and a refused upload stores nothing. Errors are application/problem+json (RFC 9457), or
words for a browser.
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
import importlib.util
import ipaddress
import itertools
import json
import logging
import mimetypes
import os
import pathlib
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from pymemcache.exceptions import MemcacheError
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.http import (
    HTTP_STATUS_CODES,
    http_date,
    parse_dict_header,
    parse_options_header,
)
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import BaseConverter, Map, MapAdapter, Rule
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

import mcpool
import memchunk

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    import tus

__all__ = ["Application", "SettingError", "Settings"]

PIECE = 128 * 1024
"""Bytes of an upload that are held at a time, besides the library's own batch."""

DRAIN = 64 * 1024 * 1024
"""Bytes of a refused upload that are read, and dropped, so that its sender sees the
answer."""

DRAIN_SECONDS = 3
"""Seconds that a thread may read what is dropped."""

FAST = 0.01
"""Seconds of a read after which the next one is for a single byte again."""

TOKEN_FILE_SECONDS = 1
"""Seconds after which MEMCHUNK_TOKEN_FILE is read again, if a request wants a token."""

READY_SECONDS = 1.5  # that /readyz waits for servers
READ_ATTEMPTS = 5  # of a download that a writer overtakes
RETRY_AFTER = "5"  # seconds: about what memcached takes to come back
# Bytes of a form that are not the file, all of them together.
MAX_FORM_OVERHEAD = 64 * 1024
NO_FILE = (
    "The form has no part with a file name. Choose a file; with curl, send "
    "-F file=@PATH, or --data-binary @PATH without a form."
)
# Transfer codings of a form's part that change no byte (RFC 7578, 4.7).
PLAIN_CODINGS = ("binary", "7bit", "8bit")
MAX_EXPIRE = 2**31 - 1  # seconds, 68 years

CONTENT_TYPE = "application/octet-stream"  # of a file whose sender and name tell none
TYPES = mimetypes.MimeTypes()  # Python's own table, not that of the machine
# curl says this of any body; a file is hardly ever a urlencoded form.
NO_CONTENT_TYPES = ("", "application/x-www-form-urlencoded")
CONTENT_TYPE_PATTERN = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+(;[ -~]*)?", re.ASCII)

# Characters that make a file name look like another:
# https://www.unicode.org/reports/tr36
BIDI_CONTROLS = (
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)

# What MEMCHUNK_HOSTS may have: a name, perhaps after a dot, or an IPv6 address.
HOST_PATTERN = re.compile(r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]")
PROBED = ("/healthz", "/readyz")  # what balancers ask for, by IP address

TAKES_BODY = ("new", "create", "put")  # endpoints
UPLOADS = ("PATCH", "POST", "PUT")  # methods that may store what they carry
READS = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
# The conditions of methods that change something.
PRECONDITIONS = (
    "If-Match",
    "If-Unmodified-Since",
    "If-None-Match",
)
# The active algorithms of RFC 9530.
DIGESTS = {
    "sha-256": hashlib.sha256,
    "sha-512": hashlib.sha512,
}

# A byte sequence of a structured field (RFC 9651), and the parameters that may follow
# it.
BYTE_SEQUENCE = re.compile(r":([A-Za-z0-9+/]*)=*: *(;.*)?")

# What a page elsewhere may read of an answer, besides what every page may.
SHARED_HEADERS = (
    "Accept-Ranges, Allow, Content-Disposition, Content-Length, Content-Location, "
    "Content-Range, ETag, Location, Repr-Digest, Retry-After, "
    "Tus-Checksum-Algorithm, Tus-Extension, "
    "Tus-Max-Size, Tus-Resumable, Tus-Version, Upload-Expires, Upload-Length, "
    "Upload-Metadata, "
    "Upload-Offset"
)
# Of bodies that a page may POST to any site without asking that site first, in a form
# or a script.
SIMPLE_TYPES = (
    "",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "text/plain",
)
PREFLIGHT_AGE = "3600"  # seconds that a browser may rely on our answer

# Hosts that raise if a chunked body is cut off: tests/test_hosts.py has a test of each.
# Others, such as granian, uvicorn and hypercorn, end such a body like a whole one.
RAISING_HOSTS = re.compile("(gunicorn|Werkzeug|waitress|Cheroot|gevent)(?![a-z])")

# These Lambda adapters send a text/* body as text, so that bytes that are not UTF-8
# break them, unless it has a Content-Encoding.
TEXT_DECODERS = ("apig_wsgi.full_event", "serverless.event")

# What a browser may do with a stored file: keep it. Whatever runs in it, runs without
# this origin.
STORED_FILE_POLICY = "sandbox; default-src 'none'"
NO_STORE = {"Cache-Control": "no-store"}

# Seconds that the page offers to keep a file.
EXPIRES = (
    3600,
    86400,
    7 * 86400,
    30 * 86400,
)

# Status and advice for each error of the library. What it says of servers stays in the
# log.
ERRORS: dict[type[memchunk.MemchunkError], tuple[int, str]] = {
    memchunk.InvalidName: (400, "A name is 1 to 1024 bytes of UTF-8."),
    memchunk.SizeMismatch: (
        400,
        "The body has not the length that was announced. Send it again.",
    ),
    memchunk.FileNotFound: (
        404,
        "No such file is stored. It may have expired or been evicted.",
    ),
    memchunk.FileExists: (
        409,
        "A file of this name exists. PUT replaces it; DELETE removes it.",
    ),
    memchunk.FileEvicted: (
        410,
        "The cache dropped parts of this file. Upload it again.",
    ),
    memchunk.FileChanged: (
        412,
        "The file has changed. Get its new ETag and decide again.",
    ),
    memchunk.FileTooLarge: (413, "The file is larger than this server takes."),
    memchunk.FileCorrupt: (502, "The cache damaged this file. Upload it again."),
    memchunk.CacheUnavailable: (
        503,
        "The cache did not answer. Try again in a few seconds.",
    ),
    memchunk.CacheFull: (
        507,
        "The cache has no room for this file. Try later, or a smaller one.",
    ),
}

TITLES = {**HTTP_STATUS_CODES, 460: "Checksum Mismatch"}  # 460 is tus's own

HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<style>
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; background: Canvas; color: CanvasText }
</style>
<main>
<h1>{{title}}</h1>
<p>{{text}}</p>
<p><a href="{{home}}">Upload a file</a></p>
</main>
"""

log = logging.getLogger("memchunk.wsgi")


class SettingError(RuntimeError):
    """A setting in the environment is bad; the message says which and why, in one
    sentence."""


class Problem(Exception):
    """An answer that is an error: status, what to do about it, headers, members of the
    JSON."""

    def __init__(
        self,
        status: int,
        detail: str,
        headers: Mapping[str, str] | None = None,
        **members: object,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers, self.members = headers or {}, members


class CutOff(Problem):
    """The request's body ended before its end."""


# Settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the API behaves; each is `MEMCHUNK_` and its name in capitals in the
    environment.

    servers: memcached servers, "host:port" or "unix:/path", separated by commas.
        "tls://" and "user:password@" may stand before a host. By default memcached's
        own default port on this machine.
    namespace: prefix of the keys, for several applications on one memcached.
    max_size: largest file in bytes, 50 MiB by default.
    expire: seconds that a file is kept unless its upload says otherwise, 0 (default)
        for no end.
    timeout: seconds to wait for memcached, 5 by default.
    token: what clients must send as bearer token, or as password of HTTP Basic; none by
        default. Several have commas between them.
    max_response: most bytes of a file in one answer, for hosts with a limit, 0
        (default) for none.
    max_expire: most seconds that an upload may ask for, and most of `expire`, 0
        (default) for any.
    origins: other sites whose pages may use the API ("https://example.com"), separated
        by commas, or "*" for all; none by default.
    public_read: 1 asks for the token on uploads and changes only, 0 (default) on reads,
        too.
    proxies: how many proxies in front set X-Forwarded-For, -Proto, -Host, -Port and
        -Prefix, 0 by default. A client can set these itself where fewer do.
    hosts: host names that the API answers for, separated by commas; ".example.com" has
        all below it, too. By default any.
    token_file: a file with tokens, one a line or with commas between them, which may
        change while the server runs.
    """

    servers: str = dataclasses.field(default="127.0.0.1:11211", repr=False)
    namespace: str = "memchunk2"
    max_size: int = memchunk.MAX_SIZE
    expire: int = 0
    timeout: float = memchunk.TIMEOUT
    token: str = dataclasses.field(default="", repr=False)
    max_response: int = 0
    max_expire: int = 0
    origins: str = ""
    public_read: bool = False
    proxies: int = 0
    hosts: str = ""
    token_file: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read every setting that is there. Raises SettingError."""
        values: dict[str, Any] = {}
        settings = dataclasses.fields(cls)
        fields = {f"MEMCHUNK_{each.name.upper()}": each for each in settings}
        _refuse_unknown(environ, fields)
        for variable, field in fields.items():
            if variable in environ:
                values[field.name] = _setting(
                    variable, environ[variable], field.default
                )
        made = cls(**values)
        made.check()
        return made

    def check(self) -> None:
        """Raise SettingError if a list has something else in it than it should."""
        self.tokens()
        for origin in self.allowed_origins - {"*", "null"}:
            if not re.fullmatch(r"https?://[^/@\s]+", origin):
                raise SettingError(
                    f"MEMCHUNK_ORIGINS: {origin!r} is not like https://example.com"
                )
        if self.hosts and not self.allowed_hosts:
            raise SettingError("MEMCHUNK_HOSTS has no host; unset it to answer for any")
        for host in self.allowed_hosts:
            if not HOST_PATTERN.fullmatch(host):
                raise SettingError(f"MEMCHUNK_HOSTS: {host!r} is not like example.com")

    @property
    def default_expire(self) -> int:
        """Seconds that a file is kept whose upload doesn't say."""
        most = self.max_expire
        return min(self.expire or most, most) if most else self.expire

    @property
    def allowed_origins(self) -> frozenset[str]:
        return frozenset(filter(None, re.split(r"[\s,]+", self.origins.lower())))

    @property
    def allowed_hosts(self) -> frozenset[str]:
        return frozenset(filter(None, re.split(r"[\s,]+", self.hosts.lower())))

    def tokens(self) -> Tokens:
        """The tokens that clients may send. Raises SettingError."""
        return Tokens(self.token, self.token_file)

    def connect(self) -> memchunk.FileCache:
        """The cache that the settings describe. Raises SettingError."""
        try:
            return memchunk.FileCache(
                mcpool.connect(self.servers, timeout=self.timeout),
                namespace=self.namespace,
                max_size=self.max_size,
            )
        except ValueError as error:
            raise SettingError(
                f"MEMCHUNK_SERVERS or MEMCHUNK_NAMESPACE: {error}"
            ) from None


def _refuse_unknown(environ: Mapping[str, str], known: Iterable[str]) -> None:
    """Raise SettingError if a name may be misspelt, as in MEMCHUNK_TOKENS."""
    for variable in sorted(set(environ).difference(known)):
        if variable.startswith("MEMCHUNK_"):
            [nearest] = difflib.get_close_matches(variable, known, n=1, cutoff=0)
            raise SettingError(f"{variable} is not a setting; the nearest is {nearest}")


def _setting(variable: str, text: str, default: Any) -> str | int | float:
    if not text.strip():
        raise SettingError(f"{variable} is empty; give it a value or unset it")
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text not in ("0", "1"):
            raise SettingError(f"{variable} must be 0 or 1, not {text!r}")
        return text == "1"
    try:
        number: int | float = type(default)(text)
    except ValueError:
        raise SettingError(f"{variable} must be a number, not {text!r}") from None
    # 0 is a number only where it is the default, and means something.
    least = 0 if not default else 1 if isinstance(default, int) else 0.001
    if not least <= number <= MAX_EXPIRE:
        raise SettingError(f"{variable} is {text}, but must be {least} to {MAX_EXPIRE}")
    return number


class Tokens:
    """The tokens that clients may send: those of MEMCHUNK_TOKEN, and those in a file.

    The file is read again while requests come, so that tokens change without an outage.
    If it can't be read then, the last ones stay. At the start that is a SettingError.
    """

    def __init__(self, text: str, path: str) -> None:
        self._fixed = _tokens("MEMCHUNK_TOKEN", text) if text else []
        self._path = path
        self._in_file = self._read() if path else []
        self._due = time.monotonic() + TOKEN_FILE_SECONDS
        self._is_broken = False

    def __bool__(self) -> bool:
        return bool(self._fixed or self._in_file)

    def accept(self, sent: str) -> bool:
        """Whether it is one of them. All are compared, so that time tells nothing."""
        given, found = sent.encode(), False
        for token in self._current():
            found |= hmac.compare_digest(given, token)
        return found

    def _current(self) -> list[bytes]:
        if self._path and time.monotonic() >= self._due:
            self._due = time.monotonic() + TOKEN_FILE_SECONDS
            try:
                self._in_file, self._is_broken = self._read(), False
            except SettingError as error:
                if not self._is_broken:
                    log.error("%s; the last tokens stay", error)
                self._is_broken = True
        return self._fixed + self._in_file

    def _read(self) -> list[bytes]:
        try:
            text = pathlib.Path(self._path).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise SettingError(f"MEMCHUNK_TOKEN_FILE: {error}") from None
        return _tokens("MEMCHUNK_TOKEN_FILE", text)


def _tokens(variable: str, text: str) -> list[bytes]:
    tokens = [token.strip() for token in re.split(r"[,\n]", text) if token.strip()]
    if not tokens:
        raise SettingError(f"{variable} has no token")
    if not all(re.fullmatch("[!-~]+", token) for token in tokens):
        raise SettingError(f"{variable} must be of printable ASCII, without spaces")
    return [token.encode() for token in tokens]


# Readers of what comes in: bodies and forms


class Body:
    """The request's body in pieces, up to the end that its framing announces and no
    further.

    size: bytes, None where only the end of the host's stream will tell. Iterating
    raises Problem on a body that is cut off: hosts differ in how they end one, some
    like a complete one."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._environ, self._stream = environ, environ["wsgi.input"]
        length = environ.get("CONTENT_LENGTH") or ""
        coding = environ.get("HTTP_TRANSFER_ENCODING")
        # a2wsgi's stream ends with the body too, but does not say so.
        ends = environ.get("wsgi.input_terminated") or "asgi.scope" in environ
        self.problem: Problem | None = None
        # 0: without a word about a body there is none.
        self.size: int | None = None if ends else 0
        if coding is not None:
            if not ends:
                self.problem = Problem(
                    411, "Send a Content-Length: this host needs one."
                )
            elif (
                coding.strip().lower() != "chunked"
                or environ["SERVER_PROTOCOL"] == "HTTP/1.0"
            ):
                # Some hosts show the body of any other as empty.
                self.problem = Problem(
                    400, "The only Transfer-Encoding is chunked, of HTTP/1.1."
                )
        elif re.fullmatch("[0-9]{1,18}", length):
            self.size = int(length)
        elif length:
            self.problem = Problem(400, "The Content-Length is not a number.")
        elif _announces_bodies(environ):
            self.size = 0
        self._left = self.size

    def __iter__(self) -> Iterator[bytes]:
        return iter(functools.partial(self._next, PIECE), b"")

    def _next(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end. Raises Problem."""
        if self.problem:
            raise self.problem
        if self._left == 0:
            return b""
        piece = self._read(size if self._left is None else min(size, self._left))
        if piece and self._left is not None:
            self._left -= len(piece)
        if not piece:
            is_cut_off, self._left = self._left is not None, 0
            if is_cut_off:
                detail = "The body ended before its Content-Length. Send it again."
                raise CutOff(400, detail)
        return piece

    def _read(self, size: int) -> bytes:
        try:
            piece: bytes = self._stream.read(size)
            if not piece and self._left is None:
                _check_end(self._environ)
        except Exception as error:  # each host has its own for a broken body
            self._left = 0
            log.info("reading a request's body: %r", error)
            raise CutOff(400, "The body broke off. Send it again.") from error
        return piece

    def arrived(self) -> Iterator[bytes]:
        """What comes of the body, to where it ends or breaks off."""
        with contextlib.suppress(CutOff):
            yield from self

    def drain(self) -> None:
        """Read what a refused upload still sends, and drop it. A host that closes on it
        would reset the connection, and the sender, or a proxy, would see that instead
        of the answer. The rest is the host's business: its connection is never
        touched."""
        # Without these there is no body, even if the host's stream tells no length.
        announced = {"CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING"} & self._environ.keys()
        if announced:
            with contextlib.suppress(Problem):  # there is no one left to tell
                self._drop()

    def _drop(self) -> None:
        dropped, size, now = 0, 1, time.monotonic()
        deadline = now + DRAIN_SECONDS
        while dropped < DRAIN and now < deadline:
            piece = self._next(size)
            if not piece:
                return
            dropped += len(piece)
            # A host waits for all bytes of a read, so reads are large only while bytes
            # come fast. The wait for a sender that stops has no bound here: nothing but
            # the host's own time-out, or a proxy that buffers, ends it.
            start, now = now, time.monotonic()
            size = min(size * 2, PIECE) if now - start < FAST else 1


def _announces_bodies(environ: WSGIEnvironment) -> bool:
    """Whether a request with a body has one of two fields, as HTTP/1 demands, and the
    host is known to pass both on. In HTTP/2 a body may come without a word."""
    is_a2wsgi = "asgi.scope" in environ and not _is_event(environ)
    passes_on = is_a2wsgi or environ.get("SERVER_SOFTWARE") == "Granian"
    return passes_on and environ["SERVER_PROTOCOL"].startswith("HTTP/1")


def _is_event(environ: WSGIEnvironment) -> bool:
    """Whether mangum made the request of an event of AWS Lambda, which has the body
    whole."""
    return "aws.event" in environ.get("asgi.scope", {})


def _check_end(environ: WSGIEnvironment) -> None:
    """Raise EOFError if the sender went away before the end of a chunked body. cheroot
    takes a size of which only leading zeros came for the last one, which is 0. There
    must be a line after that, which is the host's to read."""
    is_cheroot = environ.get("SERVER_SOFTWARE", "").startswith("Cheroot")
    if is_cheroot and not environ["wsgi.input"].rfile.peek(1):
        raise EOFError("there is no line after the last chunk")


@dataclasses.dataclass
class SentFile:
    """What an upload says of its file, and its bytes, which can be read once."""

    content: Iterable[bytes]
    size: int | None
    content_type: str
    filename: str
    expire: str | None


class Form:
    """A multipart/form-data body (RFC 7578), read as a stream.

    Werkzeug's decoder (3.1.9) adds a byte to a file when a piece ends within the last
    "--"."""

    def __init__(self, pieces: Iterable[bytes], boundary: str) -> None:
        # Some leave out the line break at the very end.
        self._pieces = itertools.chain(pieces, [b"\r\n"])
        self._delimiter = b"\r\n--" + boundary.encode()
        self._buffer = b"\r\n"  # the first delimiter has no line before it
        self._at = 0  # where in that the next byte is
        self._room = MAX_FORM_OVERHEAD

    def upload(self, expire: str | None) -> SentFile:
        """The first part that has a file name. A field "expire" must stand before it.

        If no file is chosen, a browser sends an empty file name: that part is no file.
        """
        self._text(self._delimiter)
        while (part := self._part()) is not None:
            name, filename, content_type = part
            if filename:
                return SentFile(self._file(), None, content_type, filename, expire)
            text = self._text(self._delimiter)
            expire = text if name == "expire" else expire
        raise Problem(400, NO_FILE)

    def _file(self) -> Iterator[bytes]:
        """The file's bytes. Then read the form to its end: only then it is known to be
        whole."""
        yield from self._until(self._delimiter)
        while (part := self._part()) is not None:
            if part[1]:
                raise Problem(
                    400, "The form has more than one file. Send one per request."
                )
            if part[0] == "expire":
                raise Problem(
                    400, "The form's field 'expire' must stand before the file."
                )
            self._text(self._delimiter)

    def _part(self) -> tuple[str, str, str] | None:
        """Name, file name and content type of the part that starts here, None at the
        end."""
        start = self._text(b"\r\n").strip()
        if start == "--":
            # What follows means nothing, but must arrive: else the body was cut off.
            at = self._at
            for piece in itertools.chain([self._buffer[at:]], self._pieces):
                self._count(piece)
            return None
        if start:
            raise Problem(400, "The form is broken: text follows a boundary.")
        headers = self._headers()
        coding = headers.get("content-transfer-encoding", "binary")
        if coding.lower() not in PLAIN_CODINGS:
            detail = "Send the parts as they are, without a Content-Transfer-Encoding."
            raise Problem(400, detail)
        _, options = parse_options_header(headers.get("content-disposition"))
        name, filename = options.get("name", ""), options.get("filename", "")
        return name, filename, headers.get("content-type", "")

    def _headers(self) -> dict[str, str]:
        # where there are no headers, their end begins with that of the line before
        self._at -= 2
        lines = self._text(b"\r\n\r\n").split("\r\n")
        fields = (line.partition(":") for line in lines)
        return {key.strip().lower(): value.strip() for key, _, value in fields}

    def _text(self, end: bytes) -> str:
        pieces = []
        for piece in self._until(end):
            self._count(piece)
            pieces.append(piece)
        self._count(end)
        return b"".join(pieces).decode("utf-8", "replace")

    def _count(self, piece: bytes) -> None:
        self._room -= len(piece)
        if self._room < 0:
            detail = (
                f"The form has more than {MAX_FORM_OVERHEAD} bytes beside its file."
            )
            raise Problem(400, detail, limit=MAX_FORM_OVERHEAD)

    def _until(self, end: bytes) -> Iterator[bytes]:
        """Yield what comes before `end`, and step over it. Raises Problem where none
        comes."""
        while (found := self._buffer.find(end, self._at)) < 0:
            # What is at the end of the buffer may be the start of `end`.
            start, self._at = self._at, max(self._at, len(self._buffer) - len(end) + 1)
            if self._at > start:
                stop = self._at
                yield self._buffer[start:stop]
            piece = next(self._pieces, None)
            if piece is None:
                raise Problem(
                    400, "The form ended before its last boundary. Send it again."
                )
            at = self._at
            self._buffer, self._at = self._buffer[at:] + piece, 0
        start, self._at = self._at, found + len(end)
        if found > start:
            yield self._buffer[start:found]


# The application


class NameConverter(BaseConverter):
    """Whatever follows /files/, slashes and line breaks included."""

    regex = r"[\s\S]+"
    part_isolating = False


class Application:
    """The WSGI application.

    cache: where the files are. settings: those of them that the cache doesn't take care
    of."""

    def __init__(
        self, cache: memchunk.FileCache, settings: Settings | None = None
    ) -> None:
        self.cache = cache
        self.settings = given = settings or Settings()
        self.uploads = _uploads(self)
        self.origins, self.hosts = given.allowed_origins, given.allowed_hosts
        self.tokens = given.tokens()
        self.entry = self.behind_proxies(self.settings.proxies)
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
                Rule("/files/<name:name>", endpoint="touch", methods=["PATCH"]),
                Rule("/files/<name:name>", endpoint="delete", methods=["DELETE"]),
            ],
            converters={"name": NameConverter},
            strict_slashes=False,
            merge_slashes=False,
        )
        self.page = self.upload_page()

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        return self.entry(environ, start_response)

    def behind_proxies(self, count: int) -> WSGIApplication:
        told = ("x_for", "x_proto", "x_host", "x_port", "x_prefix")
        trusted = dict.fromkeys(told, count)
        return ProxyFix(self.wsgi_app, **trusted) if count else self.wsgi_app

    def wsgi_app(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        request, body = Request({}), Body(environ)
        try:
            request = _request(environ)
            response = self.dispatch(request, body)
        except Exception as error:
            response = self.failed(request, _as_problem(error, request))
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        if "uwsgi.version" in environ:  # all other hosts send a Date by themselves
            response.headers["Date"] = http_date()
        if self.uploads and _is_upload(request):
            response.headers.update(self.uploads.headers)
        self.share(request, response)
        # After the answer, not before it: a client may wait for it and send nothing
        # more.
        response.call_on_close(body.drain)
        return response(environ, start_response)

    def dispatch(self, request: Request, body: Body) -> Response:
        self.refuse_foreign_host(request)
        if not request.environ.get("PATH_INFO") and request.root_path.strip("/"):
            return _with_slash(request)
        adapter = self.url_map.bind_to_environ(request.environ)
        adapter.websocket = False  # an Upgrade that we don't speak is to be ignored
        if self.is_preflight(request):
            return self.on_options(request, adapter)
        if re.match(r"/(files|uploads)(/|\Z)", request.path):
            self.authorize(request)
        # Broken UTF-8, as Werkzeug shows it: many names would be one.
        if "\ufffd" in request.path:
            raise Problem(400, "The address is not percent-encoded UTF-8.")
        if request.method in UPLOADS and "Content-Range" in request.headers:
            raise Problem(400, "A part can't be stored as a file. Send the file whole.")
        if self.uploads and _is_upload(request):
            return self.uploads.dispatch(request, adapter, body)
        if request.method == "OPTIONS":
            return self.on_options(request, adapter)
        endpoint, arguments = adapter.match(method=request.method)
        if request.method not in READS:
            self.refuse_foreign_site(request)
        handler: Callable[..., Response] = getattr(self, f"on_{endpoint}")
        if endpoint in TAKES_BODY:
            arguments = {**arguments, "body": body}
        return handler(request, **arguments)

    def has_token(self, request: Request) -> bool:
        """Whether the request carries a token, or none is set."""
        return not self.tokens or self.tokens.accept(_sent_token(request))

    def refuse_foreign_host(self, request: Request) -> None:
        """Raise Problem unless MEMCHUNK_HOSTS has the request's host.

        A probe has an IP address there, or nothing. A page that got here by DNS
        rebinding has a name.
        """
        host = _hostname(f"//{request.host}")
        is_name = "Host" in request.headers and not _is_address(host)
        is_probe = request.path in PROBED and not is_name
        if self.hosts and not is_probe and not _is_among(host, self.hosts):
            raise Problem(421, "This server has another name, by MEMCHUNK_HOSTS.")

    def authorize(self, request: Request) -> None:
        """Raise Problem unless the request may go on. An upload's address is no link to
        a file."""
        is_read = request.method in READS and not _is_upload(request)
        if self.has_token(request) or (is_read and self.settings.public_read):
            return
        # A browser that follows a link asks its user; in a script's request it must
        # not.
        scheme = "Basic" if _wants_html(request) else "Bearer"
        raise Problem(
            401,
            "Send the token: 'Authorization: Bearer TOKEN', or as any user's password.",
            {"WWW-Authenticate": f'{scheme} realm="memchunk"'},
        )

    def shared_origin(self, request: Request) -> str | None:
        """What to call the origin of a page that may use the API from elsewhere; else
        None."""
        origin = request.headers.get("Origin", "")
        if origin and "*" in self.origins:
            return "*"
        return origin if origin.lower() in self.origins else None

    def share(self, request: Request, response: Response) -> None:
        """Let a page of MEMCHUNK_ORIGINS see the answer:
        https://fetch.spec.whatwg.org/#cors."""
        origin = self.shared_origin(request)
        if origin:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = SHARED_HEADERS
        if self.origins and "*" not in self.origins:
            response.vary.add("Origin")

    def is_preflight(self, request: Request) -> bool:
        """Whether a browser asks, without the token, if a page of MEMCHUNK_ORIGINS may
        go on."""
        asks = (
            request.method == "OPTIONS"
            and "Access-Control-Request-Method" in request.headers
        )
        return asks and self.shared_origin(request) is not None

    def refuse_foreign_site(self, request: Request) -> None:
        """Raise Problem where a page of another site made the browser send this: a form
        there may post to any address, with the user's credentials."""
        site = request.headers.get("Sec-Fetch-Site") or _site(request)
        if site not in ("same-origin", "none") and not self.shared_origin(request):
            raise Problem(403, "A page of another site may not change files here.")

    def on_options(self, request: Request, adapter: MapAdapter) -> Response:
        allowed = set(adapter.allowed_methods())
        if request.environ["PATH_INFO"] == "*":  # the server as a whole
            allowed = {"DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"}
        if not allowed:
            raise NotFound()
        headers = {"Allow": ", ".join(sorted({*allowed, "OPTIONS"}))}
        if self.is_preflight(request):
            wanted = request.headers.get("Access-Control-Request-Headers", "")
            headers["Access-Control-Allow-Methods"] = headers["Allow"]
            headers["Access-Control-Allow-Headers"] = wanted if wanted.isascii() else ""
            headers["Access-Control-Max-Age"] = PREFLIGHT_AGE
        return empty(headers)

    def on_page(self, request: Request) -> Response:
        response = Response(
            self.page, headers=_page_headers(self.page), mimetype="text/html"
        )
        response.add_etag()
        response.make_conditional(request)
        del response.headers["Date"]  # hosts add theirs
        return response

    def upload_page(self) -> str:
        """The same for every request: its addresses are relative to its own."""
        return _fill(
            pathlib.Path(__file__).with_name("upload.html").read_text("utf-8"),
            uploads="uploads" if self.uploads else "",
            max_size=str(self.cache.max_size),
            limit=_words(self.cache.max_size),
            expiries=_expiry_options(self.settings),
            token="" if self.tokens else "hidden",
        )

    def on_health(self, request: Request) -> Response:
        return _json({"status": "ok"}, headers=NO_STORE)

    def on_ready(self, request: Request) -> Response:
        servers = server_states(self.cache.client)
        wanted = all if query_value(request, "all") is not None else any
        if wanted(state == "ok" for state in servers.values()):
            return _json({"status": "ok", "servers": servers}, headers=NO_STORE)
        detail = "Not enough memcached servers answer."
        raise Problem(503, detail, {"Retry-After": RETRY_AFTER}, servers=servers)

    def on_new(self, request: Request, body: Body) -> Response:
        # 128 random bits: who doesn't know the name can't find the file.
        return self.on_create(request, secrets.token_hex(16), body)

    def on_create(self, request: Request, name: str, body: Body) -> Response:
        if _is_conditional(request):
            _check_preconditions(request, self.current(request, name))
        return self.store(request, name, body, self.cache.add, 201)

    def on_put(self, request: Request, name: str, body: Body) -> Response:
        current = self.current(request, name)
        _check_preconditions(request, current)
        # The write must keep the preconditions true to its end.
        write: Callable[..., memchunk.FileInfo] = self.cache.set
        if current and (
            "If-Match" in request.headers or "If-Unmodified-Since" in request.headers
        ):
            write = functools.partial(self.cache.cas, version=current.version)
        elif request.headers.get("If-None-Match") == "*":
            write = self.cache.add
        try:
            return self.store(request, name, body, write, 200 if current else 201)
        except memchunk.FileExists as error:
            raise Problem(
                412, "Meanwhile another upload stored a file of this name."
            ) from error
        except memchunk.FileNotFound as error:
            raise Problem(412, "Meanwhile another request deleted the file.") from error

    def current(self, request: Request, name: str) -> memchunk.FileInfo | None:
        """The file that an upload may replace. For If-None-Match: *, which `add`
        decides, one that lost chunks is none."""
        try:
            info = self.cache.stat(name)
        except (memchunk.FileNotFound, memchunk.FileCorrupt):
            return None
        only_new = request.headers.get("If-None-Match") == "*"
        return None if only_new and name not in self.cache else info

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
            verified(upload.content, request.headers.get("Repr-Digest", "")),
            size=upload.size,
            expire=self.expire(upload.expire),
            metadata=pack_metadata(upload.content_type, upload.filename),
        )
        return self.stored(request, info, status)

    def receive(self, request: Request, body: Body) -> SentFile:
        """The upload in the body, raw or in a form. Raises Problem."""
        refuse_coding(request)
        is_form = request.mimetype == "multipart/form-data"
        # Before the body is read, since a client may wait for what we say.
        if (body.size or 0) > self.cache.max_size + (
            MAX_FORM_OVERHEAD if is_form else 0
        ):
            raise too_large(self.cache.max_size)
        expire = query_value(request, "expire")
        content = verified(
            body, request.headers.get("Content-Digest", ""), "Content-Digest"
        )
        refuse_unproved(request, body)
        if not is_form:
            content_type = request.headers.get("Content-Type", "")
            return SentFile(content, body.size, content_type, "", expire)
        boundary = request.mimetype_params.get("boundary", "")
        if not re.fullmatch("[ -~]{1,70}", boundary):
            raise Problem(
                400, "The form's Content-Type names no boundary of 1 to 70 characters."
            )
        return Form(content, boundary).upload(expire)

    def expire(self, text: str | None) -> int:
        """Seconds to keep a file whose sender asks for `text`. Raises Problem."""
        most = self.settings.max_expire
        if not text:
            return self.settings.default_expire
        least, limit = (1, most) if most else (0, MAX_EXPIRE)
        seconds = int(text) if re.fullmatch(r"[0-9]{1,10}", text) else -1
        if not least <= seconds <= limit:
            lowest = least or "0 (no end)"
            detail = f"'expire' must be a number of seconds, {lowest} to {limit}."
            raise Problem(400, detail, limit=limit)
        return seconds

    def stored(
        self, request: Request, info: memchunk.FileInfo, status: int
    ) -> Response:
        url = self.url(request, "read", name=info.name)
        headers = {
            "ETag": f'"{info.version}"',
            **({"Location": url} if status == 201 else {}),
        }
        if not _wants_html(request):
            return self.described(request, info, status, headers)
        # A form that a browser sent without the page's script.
        kept = "until the cache needs the room"
        if info.expires:
            kept = time.strftime("until %Y-%m-%d %H:%M UTC", time.gmtime(info.expires))
        link = f'<a href="{html.escape(url)}">{html.escape(info.name)}</a>'
        text = f"{link}<br>{info.size:,} bytes, kept {kept}."
        return self.words(request, "Stored", text, status, headers)

    def described(
        self,
        request: Request,
        info: memchunk.FileInfo,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        content = {**_describe(info), "url": self.path(request, "read", name=info.name)}
        return _json(content, status, {**NO_STORE, **(headers or {})})

    def failed(self, request: Request, problem: Problem) -> Response:
        title = TITLES.get(problem.status, "Error")
        headers = {**problem.headers, **NO_STORE}
        if _wants_html(request):
            return self.words(
                request, title, html.escape(problem.detail), problem.status, headers
            )
        content = {"title": title, "status": problem.status, "detail": problem.detail}
        headers["Content-Type"] = "application/problem+json"
        return _json(
            {**problem.members, **content}, f"{problem.status} {title}", headers
        )

    def words(
        self,
        request: Request,
        title: str,
        text: str,
        status: int,
        headers: Mapping[str, str],
    ) -> Response:
        page = _fill(
            HTML, title=title, text=text, home=html.escape(self.url(request, "page"))
        )
        more = {"Vary": "Accept", "Content-Type": "text/html; charset=utf-8"}
        return Response(page, status, {**_page_headers(HTML), **headers, **more})

    def on_read(self, request: Request, name: str) -> Response:
        if query_value(request, "info") is not None:
            info = self.cache.stat(name)
            self.check(info)
            return self.described(request, info)
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(memchunk.FileChanged):
                return self.send(request, self.cache.open(name))
        detail = "The file is being replaced faster than it can be read. Try again."
        raise Problem(503, detail, {"Retry-After": RETRY_AFTER})

    def check(self, info: memchunk.FileInfo) -> None:
        """Raise where a part of the file is gone; what is there is neither read nor
        verified."""
        if info.name not in self.cache:
            self.cache.stat(info.name)  # it may be gone altogether
            raise Problem(410, ERRORS[memchunk.FileEvicted][1])

    def on_touch(self, request: Request, name: str) -> Response:
        expire = query_value(request, "expire")
        if not expire:
            raise Problem(400, "PATCH sets '?expire=SECONDS' anew, and nothing else.")
        seconds = self.expire(expire)
        if _is_conditional(request):
            _check_preconditions(request, self.cache.stat(name))
        info = self.cache.touch(name, seconds)
        return self.described(request, info, 200, {"ETag": f'"{info.version}"'})

    def send(self, request: Request, file: memchunk.CachedFile) -> Response:
        info = file.info
        headers = _file_headers(info)
        if _check_preconditions(request, info) == 304:
            del headers["Content-Type"], headers["Content-Disposition"]
            return empty(headers, 304)
        if any(key in request.environ for key in TEXT_DECODERS):
            headers["Content-Encoding"] = "identity"
        if request.method == "HEAD":
            self.check(info)
            return Response((), 200, {**headers, "Content-Length": str(info.size)})
        span = self.span(request, info)
        start, stop = span or (0, info.size)
        headers["Content-Length"] = str(stop - start)
        # All, and verified, before the first byte is sent; in pieces, since some hosts
        # copy each.
        content = [bytes(piece) for piece in file.chunks(start, stop)]
        if span:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{info.size}"
            return Response(content, 206, headers)
        algorithm = _wanted_digest(request.headers.get("Want-Repr-Digest", ""))
        if algorithm:
            digest = DIGESTS[algorithm]()
            for piece in content:
                digest.update(piece)
            headers["Repr-Digest"] = (
                f"{algorithm}=:{base64.b64encode(digest.digest()).decode()}:"
            )
        return Response(content, 200, headers)

    def span(self, request: Request, info: memchunk.FileInfo) -> tuple[int, int] | None:
        """Start and stop of the range to send, None for the whole file. Raises
        Problem."""
        span = _range(request, info)
        limit = self.settings.max_response or info.size
        if span is None and info.size > limit:
            detail = (
                f"This server sends up to {limit} bytes in one answer. The file has "
                f"{info.size}. Ask for ranges, 'Range: bytes=0-' first: each answer's "
                "Content-Range says how far it got."
            )
            raise Problem(
                403, detail, {"Accept-Ranges": "bytes"}, size=info.size, limit=limit
            )
        return span and (span[0], min(span[1], span[0] + limit))

    def on_delete(self, request: Request, name: str) -> Response:
        version = None
        if _is_conditional(request):
            info = self.cache.stat(name)
            _check_preconditions(request, info)
            version = info.version
        self.cache.delete(name, version)
        return empty({})

    def url(self, request: Request, endpoint: str, **arguments: str) -> str:
        """Relative to the request's own address: only the client knows what proxies put
        before it, another scheme, host, port or prefix."""
        path = self.url_map.bind("").build(endpoint, arguments)
        # Many clients make one slash of two, unless they follow the host.
        if "//" in path:
            return self.path(request, endpoint, **arguments)
        relative = "../" * (request.path.count("/") - 1) + path[1:]
        return relative or "./"

    def path(self, request: Request, endpoint: str, **arguments: str) -> str:
        """Below the host, with the prefix where the host or a proxy tells it."""
        path = self.url_map.bind("").build(endpoint, arguments)
        return quote(request.root_path.rstrip("/")) + path


# What its methods use: errors, pages, requests, conditions, metadata, digests


def _request(environ: WSGIEnvironment) -> Request:
    try:
        return Request(environ)
    except ValueError as error:  # such as a path that is not Latin-1, as WSGI wants it
        raise Problem(400, "The request is not valid.") from error


def _as_problem(error: Exception, request: Request) -> Problem:
    """What to answer where `error` came up."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, memchunk.FileTooLarge):
        return too_large(error.limit)
    for kind, (status, detail) in ERRORS.items():
        if isinstance(error, kind):
            if status >= 500:
                log.error("%s %r: %s", request.method, request.path, error)
            return Problem(
                status, detail, {"Retry-After": RETRY_AFTER} if status == 503 else {}
            )
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted({*(error.valid_methods or ()), "OPTIONS"}))
        return Problem(405, f"Allowed here: {allowed}.", {"Allow": allowed})
    if isinstance(error, HTTPException) and error.code and 400 <= error.code < 500:
        details = {404: "There is nothing at this address. Files are under /files/."}
        return Problem(error.code, details.get(error.code, "The request is not valid."))
    log.exception("%s %r: unexpected error", request.method, request.path)
    return Problem(500, "Something is wrong with this server. Its log says what.")


def too_large(limit: int) -> Problem:
    return Problem(
        413, f"Files may have up to {_words(limit)}; this one has more.", limit=limit
    )


def _words(size: int) -> str:
    return f"{size / 2**20:.4g} MiB" if size >= 2**20 else f"{size:,} bytes"


def _duration(seconds: int) -> str:
    """In words: 5400 is "90 minutes"."""
    units = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    unit = next(unit for unit, length in units.items() if seconds % length == 0)
    count = seconds // units[unit]
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _expiry_options(settings: Settings) -> str:
    """What the page offers as time to keep a file, as HTML: no longer than the settings
    allow."""
    most, default = settings.max_expire or MAX_EXPIRE, settings.default_expire
    offers = sorted({default, *(seconds for seconds in EXPIRES if seconds <= most)})
    return "\n".join(
        f'<option value="{seconds}"{" selected" if seconds == default else ""}>'
        f"{'for ' + _duration(seconds) if seconds else 'as long as there is room'}"
        "</option>"
        for seconds in offers
    )


def _fill(template: str, **values: str) -> str:
    """The template with each {{key}} replaced by its value, which is HTML."""
    return re.sub(r"\{\{(\w+)\}\}", lambda key: values[key[1]], template)


@functools.lru_cache(maxsize=2)
def _page_headers(page: str) -> dict[str, str]:
    """What a browser may do with a page of ours: run the style and the script that
    stand in it, which it knows by their hashes, and send what the script or a form does
    to this server."""

    def hashes(tag: str) -> str:
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(block.encode()).digest() for block in blocks]
        sources = [
            f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests
        ]
        return " ".join(sources) or "'none'"

    policy = (
        f"default-src 'none'; style-src {hashes('style')}; "
        f"script-src {hashes('script')}; "
        "img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def _uploads(application: Application) -> tus.Uploads | None:
    """Resumable uploads, if tus.py lies beside this file. PyPI has another tus."""
    beside = pathlib.Path(__file__).with_name("tus.py")
    if not beside.exists():
        return None
    found = importlib.util.find_spec("tus")
    if not (found and found.origin and beside.samefile(found.origin)):
        log.warning("no resumable uploads: 'import tus' finds another than %s", beside)
        return None
    # It imports this module, which `python wsgi.py` calls by another name.
    sys.modules.setdefault("wsgi", sys.modules[__name__])
    import tus  # noqa: PLC0415

    return tus.Uploads(application)


def _is_upload(request: Request) -> bool:
    return re.match(r"/uploads(/|\Z)", request.path) is not None


def server_states(client: Any) -> dict[str, str]:
    """The state of each memcached, "ok" or "no answer", within READY_SECONDS."""
    clients = getattr(client, "servers", {"memcached": client})
    states: dict[str, str] = dict.fromkeys(clients, "no answer")

    def ask(name: str) -> None:
        with contextlib.suppress(OSError, MemcacheError):
            clients[name].gets("ready")
            states[name] = "ok"

    deadline = time.monotonic() + READY_SECONDS
    # All at once, and as daemons: a frozen server holds one for longer than we wait.
    threads = [
        threading.Thread(target=ask, args=(each,), daemon=True) for each in states
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return dict(states)


def query_value(request: Request, key: str) -> str | None:
    """Not by request.args, which fails on bytes that aren't UTF-8."""
    query = request.environ.get("QUERY_STRING", "")
    values = parse_qs(query, keep_blank_values=True).get(key)
    return values[0] if values else None


def refuse_unproved(request: Request, body: Body) -> None:
    """Raise Problem for a body that may be cut off without a sign of it."""
    if body.problem:
        raise body.problem
    is_known_host = RAISING_HOSTS.match(request.environ.get("SERVER_SOFTWARE", ""))
    if body.size is not None or is_known_host or _is_event(request.environ):
        return
    fields = ("Repr-Digest", "Content-Digest")
    if not any(
        expected_digests(request.headers.get(field, ""), field) for field in fields
    ):
        detail = (
            "Send a Content-Length, or a Repr-Digest of sha-256 or sha-512: this host "
        )
        raise Problem(411, detail + "does not tell a broken upload from a whole one.")


def refuse_coding(request: Request) -> None:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(
            415, "Send it without a Content-Encoding.", {"Accept-Encoding": ""}
        )


def _site(request: Request) -> str:
    """What a browser that doesn't send Sec-Fetch-Site, as over plain HTTP, would say
    there.

    Proxies may change our port, so that none counts, and our host as well. Then what a
    page may not send to other sites without asking, to which we say no, comes from ours
    all the same."""
    origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
    if origin is None:
        return "none"
    simple = request.method == "POST" and request.mimetype in SIMPLE_TYPES
    asks_first = not simple or "Tus-Resumable" in request.headers
    if asks_first and origin.lower().startswith("http://"):
        return "none"
    own = _hostname(f"//{host}")
    return "same-origin" if own and _hostname(origin) == own else "cross-site"


def _with_slash(request: Request) -> Response:
    """Lead from /store, where the application is mounted, to /store/.

    The Location is relative, so that it holds behind a proxy that puts more before it.
    """
    folder = quote(request.root_path.rstrip("/").rpartition("/")[2])
    query = quote(request.query_string, safe="%/:?=&;,+!$'()*@~")
    return empty({"Location": f"{folder}/" + (f"?{query}" if query else "")}, 308)


def _hostname(url: str) -> str:
    with contextlib.suppress(ValueError):  # an address in brackets that is none
        return urlsplit(url).hostname or ""
    return ""


def _is_among(host: str, hosts: Iterable[str]) -> bool:
    """Whether a list has it, by its name or by ".example.com", which has all below."""
    return any(
        f".{host}".endswith(each) if each.startswith(".") else host == each.strip("[]")
        for each in hosts
    )


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) is not None
    return False


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


def _is_conditional(request: Request) -> bool:
    return any(key in request.headers for key in PRECONDITIONS)


def _check_preconditions(request: Request, info: memchunk.FileInfo | None) -> int:
    """304 where the client has this file, 0 to go on; raises Problem 412. RFC 9110,
    13.2.2."""
    headers, reads = request.headers, request.method in ("GET", "HEAD")
    if "If-Match" in headers:
        if info is None:
            raise Problem(
                412, "There is no file of this name that If-Match could name."
            )
        if not request.if_match.contains(info.version):
            raise Problem(
                412, "The file's ETag is none that If-Match names. Get it again."
            )
    elif info and _before(request.if_unmodified_since, info.created):
        raise Problem(412, "The file was stored after the date in If-Unmodified-Since.")
    if "If-None-Match" in headers:
        if info and request.if_none_match.contains_weak(info.version):
            if reads:
                return 304
            raise Problem(
                412, "There is a file of this name, which If-None-Match rules out."
            )
    elif info and reads and request.if_modified_since:
        return 0 if _before(request.if_modified_since, info.created) else 304
    return 0


def _before(date: Any, created: int) -> bool:
    return date is not None and int(date.timestamp()) < created


def _range(request: Request, info: memchunk.FileInfo) -> tuple[int, int] | None:
    """Start and stop of the one range that is asked for, None for the whole file: other
    kinds of ranges are to be ignored. Raises Problem. Werkzeug's parser takes
    "bytes=-0" for all bytes."""
    header = request.headers.get("Range", "")
    match = re.fullmatch(
        r"bytes *= *([0-9]{0,99})-([0-9]{0,99})", header, re.IGNORECASE
    )
    if not match or not any(match.groups()) or not _if_range(request, info):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, info.size - int(last)), info.size
        if info.size == 0 and int(last):
            # satisfiable, but there are no bytes that Content-Range could name
            return None
    else:
        start, stop = int(first), min(int(last or info.size) + 1, info.size)
        if last and int(last) < int(first):
            return None
    if start >= info.size:
        headers = {"Content-Range": f"bytes */{info.size}"}
        raise Problem(416, f"The file has {info.size} bytes.", headers, size=info.size)
    return start, stop


def _if_range(request: Request, info: memchunk.FileInfo) -> bool:
    """Whether the client's part is one of this version. Only a strong ETag says so: a
    file can change twice in the second of a date. Werkzeug's parser drops the mark of a
    weak one."""
    return request.headers.get("If-Range") in (None, f'"{info.version}"')


def _file_headers(info: memchunk.FileInfo) -> dict[str, str]:
    content_type, filename = _metadata(info)
    plain, extended = _ascii_filename(filename), quote(filename, safe="")
    return {
        "Content-Type": content_type,
        "Content-Disposition": (
            f"attachment; filename=\"{plain}\"; filename*=UTF-8''{extended}"
        ),
        "Content-Security-Policy": STORED_FILE_POLICY,
        "ETag": f'"{info.version}"',
        "Last-Modified": http_date(info.created),
        "Accept-Ranges": "bytes",
        # keep it, but ask before using it: names can be replaced
        "Cache-Control": "no-cache",
    }


def _ascii_filename(filename: str) -> str:
    """For those who can't read `filename*`, which has all characters (RFC 6266)."""
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    if plain.lstrip().startswith("."):  # only the extension is left
        plain = f"file.{plain.lstrip(' .')}"
    return re.sub(r'["%]', "_", _clean_filename(plain))


def pack_metadata(content_type: str, filename: str, **more: str) -> bytes:
    """A file's metadata, as they came: _metadata cleans them, as it must those by
    others."""
    return json.dumps(
        {"type": content_type[:256], "filename": filename[-255:], **more}
    ).encode()


def _metadata(info: memchunk.FileInfo) -> tuple[str, str]:
    """Content type and file name. Others may have written the metadata: take nothing on
    trust."""
    try:
        stored = json.loads(info.metadata)
        content_type, filename = str(stored["type"]), str(stored["filename"])
    except (ValueError, TypeError, KeyError, RecursionError):
        content_type = filename = ""
    filename = _clean_filename(filename or info.name)
    return _clean_content_type(content_type) or _guessed_type(filename), filename


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
    """The type, "" for one that is none."""
    text = text.strip()
    usable = text.lower() not in NO_CONTENT_TYPES and len(text) <= 255
    return text if usable and CONTENT_TYPE_PATTERN.fullmatch(text) else ""


def _guessed_type(filename: str) -> str:
    guessed, coding = TYPES.guess_type("x" + pathlib.PurePosixPath(filename).suffix)
    return guessed if guessed and not coding else CONTENT_TYPE


def _clean_filename(text: str) -> str:
    """The last part of a path, without what could deceive a person or a file system.
    Characters that only look different are made the same first: some systems do, and
    find a path then."""
    text = re.split(r"[/\\]", unicodedata.normalize("NFKC", text))[-1]
    kept = (
        character
        for character in text
        if unicodedata.category(character) not in ("Cc", "Cs")
        and character not in BIDI_CONTROLS
    )
    return "".join(kept).strip(" .")[-100:].strip(" .") or "file"


def expected_digests(header: str, field: str = "Repr-Digest") -> dict[str, bytes]:
    """What a field of RFC 9530 says, by algorithm. Raises Problem. Algorithms that
    aren't known are no reason to refuse a file."""
    text = header.strip()
    try:
        members = parse_dict_header(text)
        # It finds nothing in a field that breaks off in mid-string, and lets commas end
        # one.
        if text and (not members or text != text.strip(",")):
            raise ValueError(text)
        return {key: _bytes(members[key]) for key in DIGESTS.keys() & members}
    except ValueError as error:
        raise Problem(400, f"The {field} has not the form sha-256=:BASE64:.") from error


def verified(
    pieces: Iterable[Any], header: str, field: str = "Repr-Digest"
) -> Iterator[Any]:
    """The pieces; raises Problem after the last where they haven't the digests in
    `header`, and at once, unlike a generator, where that is none."""
    return _compared(pieces, expected_digests(header, field), field)


def _compared(
    pieces: Iterable[Any], expected: Mapping[str, bytes], field: str
) -> Iterator[Any]:
    digests = {algorithm: DIGESTS[algorithm]() for algorithm in expected}
    for piece in pieces:
        for digest in digests.values():
            digest.update(piece)
        yield piece
    for algorithm, digest in digests.items():
        if digest.digest() != expected[algorithm]:
            raise Problem(
                400, f"The {algorithm} is not that of the {field}. Send it again."
            )


def _bytes(item: str | None) -> bytes:
    """What a byte sequence stands for. Raises ValueError."""
    match = BYTE_SEQUENCE.fullmatch(item or "")
    if not match:
        raise ValueError(item)
    return base64.b64decode(match[1] + "=" * (-len(match[1]) % 4))


def _wanted_digest(header: str) -> str | None:
    """The algorithm that the client likes best of those we have (Want-Repr-Digest, RFC
    9530)."""
    with contextlib.suppress(ValueError):  # a wish that isn't understood is none
        wanted = parse_dict_header(header)
        weights = {key: int(wanted[key] or "") for key in DIGESTS.keys() & wanted}
        best = max(weights, key=lambda key: weights[key], default="")
        return best if weights.get(best, 0) > 0 else None
    return None


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


def empty(headers: Mapping[str, str], status: int = 204) -> Response:
    response = Response(status=status, headers=headers)
    del response.headers["Content-Type"]
    return response


# The development server: python wsgi.py


@contextlib.contextmanager
def own_memcached() -> Iterator[str]:
    """A memcached on a Unix socket that only this user sees, for as long as the `with`
    block runs; yields its name for `mcpool.connect`. Raises SettingError."""
    program = shutil.which("memcached")
    if program is None:
        raise SettingError(
            "MEMCHUNK_SERVERS is not set, and there is no memcached to start; install "
            "it: 'apt-get install memcached', 'dnf install memcached' or 'brew install "
            "memcached'"
        )
    with tempfile.TemporaryDirectory(prefix="memchunk") as folder:
        path = pathlib.Path(folder, "memcached")
        # As root, memcached wants to be told so.
        user = ["-u", "root"] if os.geteuid() == 0 else []
        # The MiB are the most that it takes, not what it starts with.
        command = [program, "-s", str(path), "-m", "1024", *user]
        process = subprocess.Popen(command)
        try:
            while not path.exists():
                if process.poll() is not None:
                    raise SettingError(
                        f"memcached ended with status {process.returncode}"
                    )
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
    if not application.tokens and not _is_loopback(server.server_address[0]):
        log.warning(
            "other machines may read, store and delete files here; set MEMCHUNK_TOKEN, "
            "or listen on 127.0.0.1"
        )
    print(
        f"memchunk: http://{f'[{host}]' if ':' in host else host}:{server.port}/",
        flush=True,
    )
    server.serve_forever()


def _is_loopback(address: Any) -> bool:
    """Whether only this machine reaches it. The path of a Unix socket counts, too."""
    return not _is_address(address) or ipaddress.ip_address(address).is_loopback


if __name__ == "__main__":
    main()
else:
    _settings = Settings.from_environment(os.environ)
    application = Application(_settings.connect(), _settings)
    """WSGI hosts look for it: `gunicorn wsgi:application`. A bad setting stops the
    import."""
