# memchunk 1.0.0, MIT licence; copy it beside wsgi.py. docs/http.md belongs to it.
"""What HTTP says about files. Nothing here knows the application's addresses.

An upload, and then a download, passes most parts in this order. Their banners name the
RFCs that they follow.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import mimetypes
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, quote

from werkzeug import http
from werkzeug.wrappers import Request, Response

import memchunk

__version__ = "1.0.0"

Environ = dict[str, Any]  # of WSGI
Headers = Mapping[str, str]

PIECE = 64 * 1024  # bytes of a body that are held at a time
DRAIN = 64 * 1024 * 1024  # bytes of a refused body that are read and dropped
DRAIN_SECONDS = 3  # that a thread may read what is dropped
FAST = 0.01  # seconds; after a longer read, the next one is for a single byte
MAX_FORM_OVERHEAD = 64 * 1024  # bytes of a form beside its files, all together
RETRY_AFTER = "5"  # seconds: about what memcached takes to come back

NO_STORE = {"Cache-Control": "no-store"}
TITLES = {**http.HTTP_STATUS_CODES, 460: "Checksum Mismatch"}  # 460 is tus's own

# --- Problems: errors as answers (RFC 9457) -------------------------------------------


class Problem(Exception):
    """An answer that is an error: status, what to do about it, headers, and further
    members of its JSON."""

    def __init__(
        self, status: int, detail: str, headers: Headers | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.members = status, detail, members
        retry = {"Retry-After": RETRY_AFTER} if status == 503 else {}
        self.headers = {**retry, **(headers or {})}


class CutOff(Problem):
    """The request's body broke off, or ended before its announced end."""


def require(condition: object, status: int, detail: str) -> None:
    """Raise Problem unless the condition holds."""
    if not condition:
        raise Problem(status, detail)


# The answers to errors; `problem_of` has two more. The errors' own texts, which name
# servers, are logged.
ERRORS: dict[type[Exception], tuple[int, str]] = {
    memchunk.InvalidName: (400, "A name is 1 to 1024 bytes of UTF-8."),
    memchunk.SizeMismatch: (400, "The body isn't as long as announced. Send it again."),
    memchunk.FileNotFound: (404, "No such file. It may have expired or been evicted."),
    memchunk.FileExists: (409, "A file of this name exists. PUT replaces it."),
    memchunk.FileEvicted: (410, "The cache dropped parts of it. Upload it again."),
    memchunk.FileChanged: (412, "It has changed. Get its new ETag, and decide again."),
    memchunk.CacheUnavailable: (503, "The cache did not answer. Try again soon."),
    memchunk.CacheFull: (507, "The cache has no room. Try later, or a smaller file."),
    UnicodeEncodeError: (400, "The request is not valid."),  # in a path beyond Latin-1
    OverflowError: (400, "A date in it is out of range."),  # of Werkzeug's parser
    Exception: (500, "Something is wrong with this server. See its log."),
}


def problem_of(error: Exception) -> Problem:
    """The answer to any error."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, memchunk.FileTooLarge):
        return too_large(error.limit)
    if isinstance(error, memchunk.FileCorrupt):  # it tells damage or an unknown format
        return Problem(502, f"{error}. Upload it again.")
    return Problem(*next(ERRORS[kind] for kind in ERRORS if isinstance(error, kind)))


def too_large(limit: int) -> Problem:
    detail = f"A file or a form may have up to {size_in_words(limit)}."
    return Problem(413, detail, limit=limit)


def size_in_words(size: int) -> str:
    return f"{size / 2**20:.4g} MiB" if size >= 2**20 else f"{size:,} bytes"


# --- Requests: what a client asks for (RFC 9110, 3986) --------------------------------


class FileRequest(Request):
    """A request, its body as a stream, and the files that it has stored so far."""

    def __init__(self, environ: Environ, body: Body) -> None:
        super().__init__(environ)
        self.body = body
        self.stored: list[memchunk.FileInfo] = []

    def query_value(self, key: str) -> str | None:
        """Not by `args`, which fails on bytes that are not UTF-8."""
        query = self.query_string.decode("utf-8", "replace")
        values = parse_qs(query, keep_blank_values=True).get(key)
        return values[0] if values else None

    @property
    def wants_html(self) -> bool:
        """Whether a person in a browser will look at the answer."""
        offers = ["application/json", "application/problem+json", "text/html"]
        return self.accept_mimetypes.best_match(offers) == "text/html"


def absolute_path(request: Request, path: str) -> str:
    """With the prefix of the application, if the host or a proxy tells it."""
    return quote(request.root_path.rstrip("/")) + path


def relative_reference(request: Request, path: str) -> str:
    """The path, relative to the request's own address (RFC 3986, 4.2): only the client
    knows the scheme, host, port and prefix that proxies put before it."""
    # Many clients make one slash of two, unless they follow the host.
    if "//" in path:
        return absolute_path(request, path)
    return "../" * (request.path.count("/") - 1) + path[1:] or "./"


# --- Bodies: to their announced end (RFC 9112, 6) -------------------------------------

# Hosts that raise if a chunked body is cut off: tests/test_hosts.py has a test of each.
# Others, such as granian, uvicorn and hypercorn, end such a body like a whole one.
RAISING_HOSTS = re.compile("(gunicorn|Werkzeug|waitress|Cheroot|gevent)(?![a-z])")


class Body:
    """The request's body in pieces, up to the end that its framing announces and no
    further. Iterating raises Problem if the body is cut off. Hosts differ in how they
    end such a body, and some end it like a complete one."""

    def __init__(self, environ: Environ) -> None:
        self._environ, self._stream = environ, environ["wsgi.input"]
        self._taken, self._is_over = 0, False

    @functools.cached_property
    def size(self) -> int | None:
        """Bytes, None if only the end of the host's stream will tell. Raises Problem
        (RFC 9112, 6.3)."""
        environ, length = self._environ, self._environ.get("CONTENT_LENGTH") or ""
        coding = environ.get("HTTP_TRANSFER_ENCODING")
        # a2wsgi's stream ends with the body too, but does not say so.
        ends = environ.get("wsgi.input_terminated") or "asgi.scope" in environ
        if coding is not None:
            require(ends, 411, "This host needs a Content-Length.")
            is_chunked = coding.strip().lower() == "chunked"
            # Some hosts show the body of any other as empty.
            is_known = is_chunked and environ["SERVER_PROTOCOL"] != "HTTP/1.0"
            detail = "The only Transfer-Encoding is chunked, of HTTP/1.1."
            require(is_known, 400, detail)
            return None
        if re.fullmatch("[0-9]{1,18}", length):
            return int(length)
        require(not length, 400, "The Content-Length is not a number.")
        # HTTP/2 and an event of AWS Lambda may have a body without these two.
        return None if ends else 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self._next(PIECE), b"")

    def until_cut_off(self) -> Iterator[bytes]:
        """The pieces that arrive, to the end of the body or to where it breaks off."""
        with contextlib.suppress(CutOff):
            yield from self

    def _next(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end. Raises Problem."""
        size = size if self.size is None else min(size, self.size - self._taken)
        if self._is_over or not size:
            return b""
        try:
            piece: bytes = self._stream.read(size)
            if not piece:
                self._check_end()
        except Exception as error:  # each host has its own for a broken body
            self._is_over = True
            raise CutOff(400, "The body broke off. Send it again.") from error
        self._taken, self._is_over = self._taken + len(piece), not piece
        return piece

    def _check_end(self) -> None:
        """Raise EOFError if the body ended early. If a chunk's size breaks off after
        its leading zeros, cheroot reads it as 0, the last one. Then the line that must
        follow does not come."""
        if self.size is not None:
            raise EOFError("it ended before its Content-Length")
        is_cheroot = self._environ.get("SERVER_SOFTWARE", "").startswith("Cheroot")
        if is_cheroot and not self._stream.rfile.peek(1):
            raise EOFError("there is no line after the last chunk")

    def drain(self) -> None:
        """Read what a refused upload still sends, and drop it. Else the host would
        close on it, and the sender, or a proxy, would see a reset connection instead of
        the answer. We never touch the host's connection."""
        # Without these there is no body, even if the host's stream tells no length.
        if not {"CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING"} & self._environ.keys():
            return
        dropped, size, now = 0, 1, time.monotonic()
        deadline = now + DRAIN_SECONDS
        with contextlib.suppress(Problem):  # there is no one left to tell
            while dropped < DRAIN and now < deadline and (piece := self._next(size)):
                dropped += len(piece)
                # A host waits for all bytes of a read, so reads are large only while
                # bytes come fast. The wait for a sender that stops has no bound here:
                # nothing but the host's time-out, or a proxy that buffers, ends it.
                start, now = now, time.monotonic()
                size = min(size * 2, PIECE) if now - start < FAST else 1


def refuse_unproved_body(request: FileRequest) -> None:
    """Raise Problem for a body that may be cut off without a sign of it."""
    environ = request.environ
    is_known_host = RAISING_HOSTS.match(environ.get("SERVER_SOFTWARE", ""))
    # mangum makes the request of an event of AWS Lambda, which has the body whole.
    is_event = "aws.event" in environ.get("asgi.scope", {})
    fields = ("Repr-Digest", "Content-Digest")
    if request.body.size is None and not (is_known_host or is_event):
        is_proved = any(expected_digests(request, field) for field in fields)
        wanted = "Send a Content-Length, or a Repr-Digest of sha-256 or sha-512"
        reason = "This host does not tell if a body breaks off."
        require(is_proved, 411, f"{wanted}. {reason}")


def limited(pieces: Iterable[bytes], room: int, problem: Problem) -> Iterator[bytes]:
    """The pieces. Raises the problem if they have more than `room` bytes."""
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            raise problem
        yield piece


def refuse_content_coding(request: Request) -> None:
    """Raise Problem for a compressed body (RFC 9110, 15.5.16)."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        detail = "Send it without a Content-Encoding."
        raise Problem(415, detail, {"Accept-Encoding": ""})


# --- Forms: multipart/form-data (RFC 7578) --------------------------------------------

PLAIN_CODINGS = ("binary", "7bit", "8bit")  # they change no byte (RFC 7578, 4.7)
Part = tuple[str, str, str]  # name, file name ("" for a field), and content type


@dataclasses.dataclass
class SentFile:
    """The file of an upload: its bytes, which can be read once, and its properties."""

    content: Iterable[bytes]
    size: int | None
    content_type: str
    filename: str
    expire: str | None


class Form:
    """A multipart/form-data body, read as a stream. Werkzeug's decoder (3.1.9) adds a
    byte to a file when a piece ends within the last "--"."""

    def __init__(self, pieces: Iterable[bytes], content_type: str) -> None:
        boundary = http.parse_options_header(content_type)[1].get("boundary", "")
        is_boundary = re.fullmatch("[ -~]{1,70}", boundary)  # RFC 2046, 5.1.1
        detail = "The form's Content-Type names no boundary of 1 to 70 characters."
        require(is_boundary, 400, detail)
        # Some leave out the line break at the very end.
        self._pieces = itertools.chain(pieces, [b"\r\n"])
        self._delimiter = b"\r\n--" + boundary.encode()
        self._buffer = b"\r\n"  # as if a line stood before the first delimiter
        self._room = MAX_FORM_OVERHEAD
        detail = f"A form may have {MAX_FORM_OVERHEAD} bytes beside its files."
        self._no_room = Problem(400, detail)
        self._file: Part | None = None  # the headers of the file that comes next

    def files(self, expire: str | None, several: bool) -> Iterator[SentFile]:
        """The parts that have a file name. Read each before asking for the next. A
        field "expire" must stand before the first. If no file is chosen, a browser
        sends an empty file name: that part is a field."""
        self._text(self._delimiter)
        expire = self._fields().get("expire", expire)
        detail = "The form has no part with a file name. With curl, send -F file=@PATH."
        require(self._file, 400, detail)
        while self._file:
            _, filename, content_type = self._file
            content = self._content(several)
            yield SentFile(content, None, content_type, filename, expire)

    def _content(self, several: bool) -> Iterator[bytes]:
        """The file's bytes. They end only if the form is whole up to the next file, or
        to its own end."""
        yield from self._until(self._delimiter)
        fields = self._fields()
        detail = "The form has more than one file. Send one, or POST them to /files."
        require(several or not self._file, 400, detail)
        detail = "The form's field 'expire' must stand before the file."
        require("expire" not in fields, 400, detail)

    def _fields(self) -> dict[str, str]:
        """The fields up to the next file, or up to the end of the form."""
        fields: dict[str, str] = {}
        while (part := self._part()) and not part[1]:  # it has no file name
            fields[part[0]] = self._text(self._delimiter)
        self._file = part
        return fields

    def _part(self) -> Part | None:
        """The headers of the part that starts here, None at the end."""
        start = self._text(b"\r\n").strip()
        if start == "--":
            # What follows means nothing, but must arrive: else the body was cut off.
            rest = itertools.chain([self._buffer], self._pieces)
            for _ in limited(rest, self._room, self._no_room):
                pass
            return None
        require(not start, 400, "The form is broken: text follows a boundary.")
        # If the part has no headers, one line break ends the boundary and them.
        self._buffer = b"\r\n" + self._buffer
        lines = self._text(b"\r\n\r\n").split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {key.strip().lower(): value.strip() for key, _, value in fields}
        coding = headers.get("content-transfer-encoding", "binary")
        detail = "Send the parts as they are, without a Content-Transfer-Encoding."
        require(coding.lower() in PLAIN_CODINGS, 400, detail)
        _, options = http.parse_options_header(headers.get("content-disposition"))
        name, filename = options.get("name", ""), options.get("filename", "")
        return name, filename, headers.get("content-type", "")

    def _text(self, end: bytes) -> str:
        pieces = itertools.chain(self._until(end), [end])
        text = b"".join(limited(pieces, self._room, self._no_room))
        self._room -= len(text)
        return text[: -len(end)].decode("utf-8", "replace")

    def _until(self, end: bytes) -> Iterator[bytes]:
        """Yield what comes before `end`, and step over it. Raises Problem if none
        comes."""
        before, found, rest = self._buffer.partition(end)
        while not found:
            # The last bytes may be the start of `end`.
            stop = max(0, len(before) - len(end) + 1)
            yield before[:stop]
            piece = next(self._pieces, b"")
            detail = "The form ended before its last boundary. Send it again."
            require(piece, 400, detail)
            before, found, rest = (before[stop:] + piece).partition(end)
        self._buffer = rest
        yield before


# --- Digests: of a file and of a body (RFC 9530) --------------------------------------

DIGESTS = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}  # the active ones
# A byte sequence of a structured field (RFC 9651), and parameters that may follow it.
BYTE_SEQUENCE = re.compile(r":([A-Za-z0-9+/]*)=*: *(;.*)?")


def expected_digests(request: Request, field: str) -> dict[str, str]:
    """The digests in a field of the request, by algorithm, in base64 without padding.
    An unknown one is no reason to refuse a file (RFC 9530, 2). Raises Problem."""
    text = request.headers.get(field, "").strip()
    members = http.parse_dict_header(text)
    # The parser finds nothing in a field that breaks off in mid-string, and lets commas
    # end one.
    is_whole = (members or not text) and text == text.strip(",")
    items = {key: members[key] or "" for key in DIGESTS.keys() & members}
    found = {key: BYTE_SEQUENCE.fullmatch(item) for key, item in items.items()}
    detail = f"The {field} has not the form sha-256=:BASE64:."
    require(is_whole and all(found.values()), 400, detail)
    return {key: match[1] for key, match in found.items() if match}


def verified(pieces: Iterable[bytes], expected: Mapping[str, str]) -> Iterator[bytes]:
    """The pieces. Raises Problem after the last if they have other digests."""
    digests = {algorithm: DIGESTS[algorithm]() for algorithm in expected}
    for piece in pieces:
        for digest in digests.values():
            digest.update(piece)
        yield piece
    for algorithm, digest in digests.items():
        found = base64.b64encode(digest.digest()).decode().rstrip("=")
        detail = f"It has another {algorithm} than announced. Send it again."
        require(found == expected[algorithm], 400, detail)


def wanted_digest(request: Request, content: Iterable[bytes]) -> dict[str, str]:
    """The header with the digest that the client likes best of those we have
    (Want-Repr-Digest: RFC 9530, 4)."""
    wishes = http.parse_dict_header(request.headers.get("Want-Repr-Digest", ""))
    wanted = [key for key in DIGESTS if re.fullmatch("[1-9]|10", wishes.get(key) or "")]
    if not wanted:
        return {}
    best = max(wanted, key=lambda key: int(wishes[key] or 0))
    digest = DIGESTS[best]()
    for piece in content:
        digest.update(piece)
    value = base64.b64encode(digest.digest()).decode()
    return {"Repr-Digest": f"{best}=:{value}:"}


# --- Preconditions, in the order of RFC 9110, 13.2.2 ----------------------------------

PRECONDITIONS = ("If-Match", "If-Unmodified-Since", "If-None-Match")  # of writes, too


def is_conditional(request: Request) -> bool:
    return any(key in request.headers for key in PRECONDITIONS)


def check_preconditions(request: Request, info: memchunk.FileInfo | None) -> None:
    """Raise Problem unless the conditions hold for a file, None if there is none."""
    if "If-Match" in request.headers:
        is_named = info and request.if_match.contains(info.version)
        detail = "There is no file, or If-Match does not name its ETag."
        require(is_named, 412, detail)
    elif info:
        is_older = _is_before(request.if_unmodified_since, info.created)
        detail = "The file was stored after the date in If-Unmodified-Since."
        require(not is_older, 412, detail)
    if info and request.method not in ("GET", "HEAD"):
        is_ruled_out = request.if_none_match.contains_weak(info.version)
        detail = "If-None-Match rules out the file that is there."
        require(not is_ruled_out, 412, detail)


def is_not_modified(request: Request, info: memchunk.FileInfo) -> bool:
    """Whether a reader has this version of the file already."""
    if "If-None-Match" in request.headers:
        return request.if_none_match.contains_weak(info.version)
    since = request.if_modified_since
    return since is not None and not _is_before(since, info.created)


def _is_before(date: Any, created: int) -> bool:
    return date is not None and int(date.timestamp()) < created


# --- Ranges (RFC 9110, 14) ------------------------------------------------------------

# Werkzeug's parser takes "bytes=-0" for all bytes, and a weak ETag for a strong one.
RANGE = re.compile("bytes *= *([0-9]{0,99})-([0-9]{0,99})", re.IGNORECASE)
Span = tuple[int, int]  # start and stop of a range


def requested_range(request: Request, info: memchunk.FileInfo) -> Span | None:
    """Start and stop of the one range that is asked for, None for the whole file. Other
    kinds of ranges are ignored (14.2). Raises Problem."""
    match = RANGE.fullmatch(request.headers.get("Range", ""))
    # If-Range (13.1.5): only a strong ETag tells that the client's part is of this
    # version. A file can change twice in the second of a date.
    is_wanted = request.headers.get("If-Range") in (None, f'"{info.version}"')
    if not match or not any(match.groups()) or not is_wanted:
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    if first:
        start, stop = int(first), min(int(last or info.size) + 1, info.size)
    else:
        start, stop = max(0, info.size - int(last)), info.size
    if start >= info.size and (first or not int(last)):
        headers = {"Content-Range": f"bytes */{info.size}"}
        raise Problem(416, f"The file has {info.size} bytes.", headers, size=info.size)
    # The end of an empty file is satisfiable, but Content-Range can't name no bytes.
    return (start, stop) if stop else None


# --- Metadata: a file's content type and name (RFC 6266, 8187) ------------------------

CONTENT_TYPE = "application/octet-stream"  # if neither the sender nor the name tells
TYPES = mimetypes.MimeTypes()  # Python's own table, not that of the machine
# curl says this of any body; a file is hardly ever a urlencoded form.
URLENCODED = "application/x-www-form-urlencoded"
# No commas: browsers take the last of several types, and `inline` looks at the first.
SOUND_TYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+(;[ -+\--~]*)?", re.ASCII)
# Control characters, surrogates, and what makes a file name look like another:
# https://www.unicode.org/reports/tr36
DECEPTIVE = re.compile(
    "[\0-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def pack_metadata(content_type: str, filename: str, **more: str) -> bytes:
    """A file's metadata, as they came. `type_and_filename` cleans them when they are
    read, since others may have written them."""
    about = {"type": content_type[:256], "filename": filename[-255:], **more}
    return json.dumps(about).encode()


def type_and_filename(info: memchunk.FileInfo) -> tuple[str, str]:
    """Others may have written the metadata: nothing in it is taken on trust."""
    try:
        stored = json.loads(info.metadata)
        content_type, filename = str(stored["type"]), str(stored["filename"])
    except (ValueError, TypeError, KeyError, RecursionError):
        content_type = filename = ""
    filename = _clean_filename(filename or info.name)
    content_type = content_type.strip()
    is_sound = SOUND_TYPE.fullmatch(content_type) and len(content_type) <= 255
    if not is_sound or content_type.lower().startswith(URLENCODED):
        guessed, coding = TYPES.guess_type("./" + filename)  # "./": no URL
        content_type = guessed if guessed and not coding else CONTENT_TYPE
    return content_type, filename


def describe(info: memchunk.FileInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "size": info.size,
        "content_type": type_and_filename(info)[0],
        "etag": f'"{info.version}"',
        "created": info.created,
        "expires": info.expires,
    }


def _clean_filename(text: str) -> str:
    """The last part of a path, without what could deceive a person or a file system.
    Characters that only look different are made the same first: some systems do, and
    find a path then."""
    text = re.split(r"[/\\]", unicodedata.normalize("NFKC", text))[-1]
    return DECEPTIVE.sub("", text).strip(" .")[-100:].strip(" .") or "file"


def extension(content_type: str, filename: str) -> str:
    """What a random name may end with, such as ".pdf": of the file's name, or without a
    name of its type. Nothing else of it may get into an address."""
    essence = content_type.partition(";")[0].strip().lower()
    if not filename and essence != CONTENT_TYPE:
        filename = "x" + (TYPES.guess_extension(essence, strict=False) or "")
    match = re.search(r"[^/\\](\.[A-Za-z0-9]{1,10})\Z", filename)
    return match[1].lower() if match else ""


def _disposition(filename: str, kind: str) -> str:
    """The name in ASCII, and the name in full as `filename*` (RFC 6266, 4.3)."""
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    if plain.lstrip().startswith("."):  # only the extension is left
        plain = f"file.{plain.lstrip(' .')}"
    plain, extended = re.sub(r'["%]', "_", _clean_filename(plain)), quote(filename, "")
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{extended}"


# --- Answers: JSON, problems, and files -----------------------------------------------

# What a browser may do with a stored file: keep it. Whatever runs in it, runs without
# this origin.
STORED_FILE_POLICY = "sandbox; default-src 'none'"
# What `inline` shows: pictures, sound, video, text and PDF, but none of what a browser
# takes for a document with scripts: HTML, SVG and other XML.
SHOWN = re.compile(
    "(image|audio|video|text)/(?!.*(html|svg|xml|xsl)).+|application/pdf"
)
# The browser's own viewer has a style, and loads picture or media once more.
SHOWN_FILE_POLICY = (
    "sandbox{}; default-src 'none'; img-src 'self'; media-src 'self'; "
    "style-src 'unsafe-inline'"
)
# These Lambda adapters send a text/* body as text, so that bytes that are not UTF-8
# break them, unless it has a Content-Encoding.
TEXT_DECODERS = ("apig_wsgi.full_event", "serverless.event")


def json_response(
    content: object, status: int | str = 200, headers: Headers | None = None
) -> Response:
    defaults = {"Content-Type": "application/json", "Vary": "Accept", **NO_STORE}
    return Response(json.dumps(content) + "\n", status, {**defaults, **(headers or {})})


def problem_response(problem: Problem) -> Response:
    title = TITLES.get(problem.status, "Error")
    content = {"title": title, "status": problem.status, "detail": problem.detail}
    headers = {**problem.headers, "Content-Type": "application/problem+json"}
    status = f"{problem.status} {title}"
    return json_response({**problem.members, **content}, status, headers)


def empty_response(headers: Headers, status: int = 204) -> Response:
    response = Response(status=status, headers=headers)
    del response.headers["Content-Type"]
    return response


def file_headers(info: memchunk.FileInfo, inline: bool) -> dict[str, str]:
    """inline: whether a browser may show the file, if its type is harmless."""
    content_type, filename = type_and_filename(info)
    essence = content_type.partition(";")[0].strip().lower()
    kind, policy = "attachment", STORED_FILE_POLICY
    if inline and SHOWN.fullmatch(essence):
        # Chromium loads sound and video only from the same origin. No script has it.
        is_media = essence.startswith(("audio/", "video/"))
        policy = SHOWN_FILE_POLICY.format(" allow-same-origin" if is_media else "")
        kind = "inline"
    return {
        "Content-Type": content_type,
        "Content-Disposition": _disposition(filename, kind),
        "Content-Security-Policy": policy,
        "ETag": f'"{info.version}"',
        "Last-Modified": http.http_date(info.created),
        "Accept-Ranges": "bytes",
        "Cache-Control": "no-cache",  # keep it, but ask first: it may be replaced
    }


def file_response(
    request: Request,
    headers: dict[str, str],
    size: int,
    content: list[bytes],
    part: Span | None = None,
) -> Response:
    """The file, or the part of it from start to stop; for HEAD without content."""
    start, stop = part or (0, size)
    headers["Content-Length"] = str(stop - start)
    if any(key in request.environ for key in TEXT_DECODERS):
        headers["Content-Encoding"] = "identity"
    if part:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    elif request.method == "GET":
        headers.update(wanted_digest(request, content))
    return Response(content, 206 if part else 200, headers)
