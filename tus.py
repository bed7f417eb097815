"""Resumable uploads: tus 1.0.0 (https://tus.io) at /uploads, which `wsgi.py` mounts.

An upload is the file from its first byte on: its chunks lie where the file will have them, and its
end publishes them. All else is in its record, a small file in the cache: as content the state of
the library's writer, as metadata the rest. So any worker can go on, and one that dies takes with
it what came since the record was last written: BLOCK bytes. Records are changed by `cas`: of two
requests that go on at one place, one wins.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import copy
import dataclasses
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator

from werkzeug.http import http_date
from werkzeug.routing import MapAdapter, Rule
from werkzeug.wrappers import Request, Response

import memchunk

EXPIRE = 24 * 3600  # seconds that an upload lives after its last piece
BLOCK = 3_500_000  # bytes of a request after which they count: 4 MB with what is under way
MAX_HEADERS = 8 * 1024  # bytes that a record keeps of its upload's start
# Bytes that the record of a larger file has at least, and thus about the size of the file's own
# chunks: memcached gives items of each other size a page of its own, which the file may need.
RECORD = 480_000
KEPT = ("name", "length", "version", "metadata", "digest", "offset")  # of an upload, in its record
RESERVED = "\ufffd"  # begins the names of records: no address can spell it, see `wsgi`
TYPE = "application/offset+octet-stream"
BEYOND = "The upload was announced with fewer bytes."


@dataclasses.dataclass(frozen=True)
class Upload:
    """An upload. name, length, version: of the file. metadata, digest: the Upload-Metadata and the
    Repr-Digest of its start. offset: bytes that count. state: of the writer; empty once the file
    is published, or where the cache dropped it. done: the file is there, published."""

    id: str
    name: str
    length: int
    version: str = ""
    metadata: str = ""
    digest: str = ""
    offset: int = 0
    state: bytes = b""
    record: memchunk.FileInfo | None = None
    done: bool = False


class Uploads:
    """What is at /uploads of an application. headers: of its every answer."""

    def __init__(self, application: wsgi.Application) -> None:
        self.application = application
        self.cache = copy.copy(application.cache)  # on the same connections
        # An upload's chunks live as long as its record; an hour more, as they are sent before it.
        self.cache.lease = EXPIRE + 3600
        self.headers = {
            "Tus-Resumable": "1.0.0",
            "Tus-Version": "1.0.0",
            "Tus-Extension": "creation,creation-with-upload,checksum,expiration,termination",
            "Tus-Checksum-Algorithm": "sha1,sha256,sha512",
            "Tus-Max-Size": str(self.cache.max_size),
        }

    def rules(self) -> list[Rule]:
        one = Rule("/uploads/<upload_id>", endpoint="upload", methods=["DELETE", "HEAD", "PATCH"])
        return [Rule("/uploads", endpoint="uploads", methods=["POST"]), one]

    def dispatch(self, request: Request, adapter: MapAdapter, body: wsgi.Body) -> Response:
        request.method = request.headers.get("X-HTTP-Method-Override", request.method).upper()
        if request.method == "OPTIONS":
            return self.application.on_options(request, adapter)
        _, arguments = adapter.match(method=request.method)
        version = request.headers.get("Tus-Resumable")
        _check(version == "1.0.0", 412, "Send 'Tus-Resumable: 1.0.0': that is spoken here.")
        if request.method != "HEAD":
            self.application.refuse_foreign_site(request)
            wsgi.refuse_coding(request)
        handler: Callable[..., Response] = getattr(self, f"on_{request.method.lower()}")
        try:
            return handler(request, body, **arguments)
        except memchunk.FileChanged as error:
            detail = "Another request continued this upload. Ask where it is."
            raise wsgi.Problem(409, detail) from error

    def on_post(self, request: Request, body: wsgi.Body) -> Response:
        length = request.headers.get("Upload-Length", "")
        is_length = re.fullmatch("[0-9]{1,18}", length) and "Upload-Concat" not in request.headers
        _check(is_length, 400, "Send an Upload-Length: it can't come later, nor in other uploads.")
        if int(length) > self.cache.max_size:
            raise wsgi.too_large(self.cache.max_size)
        content = self.content(request, body, int(length)) if request.mimetype == TYPE else ()
        upload = self.start(request, int(length))
        try:
            upload = self.append(upload, content)
        except (wsgi.Problem, memchunk.CacheFull):  # its sender is not told where it is
            with contextlib.suppress(memchunk.FileNotFound):
                self.remove(upload)
            raise
        location = self.application.url(request, "upload", upload_id=upload.id)
        return self.progress(request, upload, 201, Location=location)

    def on_head(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        upload = self.append(self.find(upload_id), ())  # of no bytes: 410 where chunks are gone
        return self.progress(request, upload, 200)

    def on_patch(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        _check(request.mimetype == TYPE, 415, f"Send it as 'Content-Type: {TYPE}'.")
        text = request.headers.get("Upload-Offset", "")
        _check(re.fullmatch("[0-9]{1,18}", text), 400, "The Upload-Offset is not a number.")
        upload, offset = self.find(upload_id), int(text)
        _check(offset == upload.offset, 409, f"The upload has {upload.offset} bytes: go on there.")
        content = self.content(request, body, upload.length - offset)
        return self.progress(request, self.append(upload, content), 204)

    def on_delete(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        self.remove(self.find(upload_id))
        return wsgi.empty({})

    def progress(self, request: Request, upload: Upload, status: int, **more: str) -> Response:
        about = {"Offset": upload.offset, "Length": upload.length, "Metadata": upload.metadata}
        headers = {f"Upload-{key}": str(value) for key, value in about.items() if value != ""}
        if upload.done:
            headers["Content-Location"] = self.application.path(request, "read", name=upload.name)
        elif upload.record:
            headers["Upload-Expires"] = http_date(upload.record.expires)
        return wsgi.empty({**headers, **more, "Cache-Control": "no-store"}, status)

    def content(self, request: Request, body: wsgi.Body, room: int) -> Iterator[bytes]:
        """What comes of the body, to where it ends or breaks off, of up to `room` bytes. Raises
        Problem; at once, where the headers say enough."""
        _check((body.size or 0) <= room, 413, BEYOND)
        header = request.headers.get("Upload-Checksum")
        if header is None:
            return _limited(body.arrived(), room)
        is_known = re.fullmatch("(sha1|sha256|sha512) [A-Za-z0-9+/]+=*", header)
        _check(is_known, 400, "Send an Upload-Checksum of sha1, sha256 or sha512: 'sha1 BASE64'.")
        return _checked(_limited(body.arrived(), room), *header.split())

    def find(self, upload_id: str) -> Upload:
        """The upload as it is. Raises FileNotFound."""
        record = self.cache.open(RESERVED + upload_id)
        kept = json.loads(record.info.metadata)
        try:
            state = record.read(kept.pop("state"))
        except memchunk.FileChanged:  # since it was opened
            return self.find(upload_id)
        except (memchunk.FileEvicted, memchunk.FileCorrupt):
            state = b""
        upload = Upload(upload_id, **kept, state=state, record=record.info)
        # Whether it is published the file tells: its record may not have been written since.
        with contextlib.suppress(memchunk.FileNotFound, memchunk.FileCorrupt):
            if self.cache.stat(upload.name).version == upload.version:
                return dataclasses.replace(upload, offset=upload.length, done=True)
        return upload

    def start(self, request: Request, length: int) -> Upload:
        """A new upload, of no bytes yet. Raises Problem."""
        metadata = request.headers.get("Upload-Metadata", "")
        digest = request.headers.get("Repr-Digest", "")
        _check(len(metadata + digest) <= MAX_HEADERS, 431, "The upload's headers are too long.")
        wsgi.expected_digests(digest)
        label = wsgi.pack_metadata(*_type_and_filename(metadata))
        expire = self.application.expire(wsgi.query_value(request, "expire"))
        # 128 random bits each: who has the file's address can't delete it by the upload's.
        name = wsgi.query_value(request, "name") or secrets.token_hex(16)
        _check(RESERVED not in name, 400, "The name is not UTF-8.")
        writer = self.cache.create(name, length, expire, label)
        upload = Upload(secrets.token_hex(16), name, length, writer.version, metadata, digest)
        return self.save(upload, writer)

    def save(self, upload: Upload, writer: memchunk.FileWriter | None) -> Upload:
        """Write the record: what the writer has, or, without one, that the file is published.
        Raises FileChanged where another request has written it, FileNotFound where it is gone."""
        offset, state = (writer.tell(), writer.suspend()) if writer else (upload.length, b"")
        changed = dataclasses.replace(upload, offset=offset, state=state, done=not writer)
        kept = {key: getattr(changed, key) for key in KEPT}
        metadata = json.dumps({**kept, "state": len(state)}).encode()
        name, version = RESERVED + upload.id, upload.record.version if upload.record else None
        try:
            with self.cache.create(name, None, EXPIRE, metadata, version=version) as record:
                record.write(state and state.ljust(min(RECORD, upload.length)))
        except memchunk.FileNotFound:  # the upload was deleted while this came
            if state:
                self.cache.abandon(state)
            raise
        return dataclasses.replace(changed, record=record.info)

    def append(self, upload: Upload, content: Iterable[bytes]) -> Upload:
        """Write the content behind what is there; it counts block by block."""
        if upload.done:
            collections.deque(content, 0)  # which has no room, and refuses any bytes
            return upload
        _check(upload.state, *wsgi.ERRORS[memchunk.FileEvicted])
        writer = self.cache.resume(upload.state)
        for piece in content:
            writer.write(piece)
            if writer.tell() - upload.offset >= BLOCK and writer.tell() < upload.length:
                upload = self.save(upload, writer)
                writer = self.cache.resume(upload.state)
        if writer.tell() == upload.length:
            return self.finish(upload, writer)
        return self.save(upload, writer) if writer.tell() > upload.offset else upload

    def finish(self, upload: Upload, writer: memchunk.FileWriter) -> Upload:
        """Publish the file. Where that can't be, nothing is left of the upload."""
        try:
            for _ in wsgi.verified(writer.chunks(), upload.digest) if upload.digest else ():
                pass
            writer.close()
        except (wsgi.Problem, memchunk.FileExists, memchunk.FileCorrupt, memchunk.CacheFull):
            self.remove(upload)
            raise
        try:
            return self.save(upload, None)
        except memchunk.FileNotFound:  # the upload was deleted meanwhile
            self.cache.delete(upload.name, upload.version)
            raise
        except memchunk.MemchunkError:  # the file is there all the same, as `find` will see
            return dataclasses.replace(upload, offset=upload.length, done=True)

    def remove(self, upload: Upload) -> None:
        """Delete the upload, and what it has stored or become. Raises FileNotFound."""
        try:
            self.cache.delete(RESERVED + upload.id)  # first: no request goes on with it then
        finally:  # another request may have been quicker with that, and not have seen the file
            with contextlib.suppress(memchunk.FileNotFound, memchunk.FileChanged):
                self.cache.delete(upload.name, upload.version)
            if upload.state:
                self.cache.abandon(upload.state)


def _check(condition: object, status: int, detail: str) -> None:
    if not condition:
        raise wsgi.Problem(status, detail)


def _limited(pieces: Iterable[bytes], room: int) -> Iterator[bytes]:
    for piece in pieces:
        room -= len(piece)
        _check(room >= 0, 413, BEYOND)
        yield piece


def _checked(pieces: Iterable[bytes], algorithm: str, expected: str) -> Iterator[bytes]:
    """The pieces, once all are there and right: what is stored can't be taken back."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with tempfile.SpooledTemporaryFile(BLOCK) as held:  # in memory, more on disk
        for piece in pieces:
            held.write(piece)
            digest.update(piece)
        is_right = base64.b64encode(digest.digest()).decode() == expected
        _check(is_right, 460, "The body has another checksum. Send it again.")
        held.seek(0)
        yield from iter(lambda: held.read(wsgi.PIECE), b"")


def _type_and_filename(header: str) -> tuple[str, str]:
    """What an Upload-Metadata says of them. Raises Problem."""
    pairs = [pair.strip().partition(" ") for pair in header.split(",") if pair.strip()]
    given: dict[str, str] = {}
    with contextlib.suppress(ValueError):
        for key, _, value in pairs:
            given[key] = base64.b64decode(value, validate=True).decode("utf-8", "replace")
    is_sound = len(given) == len(pairs) and all(re.fullmatch("[!-~]+", key) for key in given)
    _check(is_sound, 400, "Upload-Metadata has not the form KEY BASE64,KEY BASE64,....")
    filename = given.get("filename") or given.get("name", "")
    return given.get("filetype") or given.get("type", ""), filename


import wsgi  # noqa: E402 - at the end, for where this module is first, `wsgi` mounts it now
