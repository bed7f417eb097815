"""Resumable uploads: tus 1.0.0 (https://tus.io) at /uploads, which `wsgi.py` mounts.

    POST    /uploads        start an upload           PATCH   /uploads/<id>   send the next bytes
    HEAD    /uploads/<id>   how far it has come       DELETE  /uploads/<id>   end it

An upload is the file from its first byte on: its chunks lie where the file will have them, and the
end only publishes it. What else there is to know of it is its record, a small file in the cache
whose content is the state of the library's writer and whose metadata says the rest. So any worker
can take the next piece, and one that dies takes no more with it than what came since the record
was last written. Records are changed by `cas`: of two requests that continue at one place, one
wins.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, Callable

from werkzeug.http import http_date
from werkzeug.routing import MapAdapter, Rule
from werkzeug.wrappers import Request, Response

import memchunk

__all__ = ["Uploads"]

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,checksum,expiration,termination"
TYPE = "application/offset+octet-stream"
CHECKSUMS: dict[str, Callable[[], Any]] = {
    "sha1": functools.partial(hashlib.sha1, usedforsecurity=False),
    "sha256": hashlib.sha256,
    "sha512": hashlib.sha512,
}

EXPIRE = 24 * 3600
"""Seconds that an upload lives after its last piece."""

BLOCK = 3_500_000
"""Bytes of a request after which they count: what is lost with a worker that dies."""

RECORD = 480_000
"""Bytes that the record of a larger file has at least. It fills a chunk, as the file's own are:
memcached has pages for each size of items, and each size that a record had would take one more."""

MAX_HEADERS = 32 * 1024  # bytes that a record keeps of the headers of its start
HELD = 4 * 1024 * 1024  # bytes of a piece with a checksum that wait in memory, more on disk

# Begins the names of records. No address can spell it: see `wsgi.Application.dispatch`.
RESERVED = "\ufffd"

# What errors of the library mean here, where it is not what they mean for files.
ERRORS: dict[type[memchunk.MemchunkError], tuple[int, str]] = {
    memchunk.FileNotFound: (404, "There is no such upload. It may have expired: start a new one."),
    memchunk.FileExists: (409, "A file of this name exists. Start again, with another name."),
    memchunk.FileChanged: (409, "Another request continued this upload. Ask where it is."),
    memchunk.FileEvicted: (410, "The cache dropped parts of this upload. Start again."),
    memchunk.FileCorrupt: (410, "The cache damaged this upload. Start again."),
    memchunk.SizeMismatch: (413, "The upload was announced with fewer bytes."),
}


@dataclasses.dataclass(frozen=True)
class Upload:
    """An upload, as its record has it.

    name: of the file that it becomes. length: bytes of that. expire: seconds to keep that.
    metadata, digest: the Upload-Metadata and the Repr-Digest of its start. offset: bytes that
    count. state: of the writer; empty once the file is published.
    """

    id: str
    name: str
    length: int
    expire: int
    metadata: str
    digest: str
    offset: int = 0
    state: bytes = b""
    version: str = ""  # of the record
    expires: int | None = None  # Unix time at which the record does
    file: memchunk.FileInfo | None = None  # that the upload has become, where it is there

    @property
    def record(self) -> str:
        """Name of the record."""
        return RESERVED + self.id

    @property
    def label(self) -> bytes:
        """Metadata of the file, by which it is known as this upload's."""
        given = _upload_metadata(self.metadata)
        content_type = given.get("filetype") or given.get("type", "")
        filename = given.get("filename") or given.get("name", "")
        return wsgi._pack(content_type, filename, upload=self.id)


class Uploads:
    """What is at /uploads of an application."""

    headers = {"Tus-Resumable": VERSION}  # noqa: RUF012
    """Of every answer."""

    def __init__(self, application: wsgi.Application) -> None:
        self.application = application
        self.cache = copy.copy(application.cache)  # the same connections
        self.cache.lease = EXPIRE

    def rules(self) -> list[Rule]:
        return [
            Rule("/uploads", endpoint="start", methods=["POST"]),
            Rule("/uploads/<upload_id>", endpoint="progress", methods=["HEAD"]),
            Rule("/uploads/<upload_id>", endpoint="append", methods=["PATCH"]),
            Rule("/uploads/<upload_id>", endpoint="terminate", methods=["DELETE"]),
        ]

    def dispatch(self, request: Request, adapter: MapAdapter, body: wsgi.Body) -> Response:
        request.method = request.headers.get("X-HTTP-Method-Override", request.method).upper()
        if request.method == "OPTIONS":
            return self.on_options(request, adapter)
        endpoint, arguments = adapter.match(method=request.method)
        if request.headers.get("Tus-Resumable") != VERSION:
            detail = f"Send 'Tus-Resumable: {VERSION}', the version that is spoken here."
            raise wsgi.Problem(412, detail, {"Tus-Version": VERSION})
        if request.method != "HEAD":
            self.application.refuse_foreign_site(request)
        handler: Callable[..., Response] = getattr(self, f"on_{endpoint}")
        try:
            return handler(request, body, **arguments)
        except tuple(ERRORS) as error:
            status, detail = next(ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS)
            raise wsgi.Problem(status, detail) from error

    def on_options(self, request: Request, adapter: MapAdapter) -> Response:
        response = self.application.on_options(request, adapter)
        response.headers["Tus-Version"] = VERSION
        response.headers["Tus-Extension"] = EXTENSIONS
        response.headers["Tus-Checksum-Algorithm"] = ",".join(CHECKSUMS)
        response.headers["Tus-Max-Size"] = str(self.cache.max_size)
        return response

    def on_start(self, request: Request, body: wsgi.Body) -> Response:
        wsgi._refuse_coding(request)
        upload = self.begin(self.announced(request))
        content = self.content(request, body) if request.mimetype == TYPE else ()
        upload = self.append(upload, content)
        location = self.application.url(request, "progress", upload_id=upload.id)
        return self.progress(request, upload, 201, Location=location)

    def announced(self, request: Request) -> Upload:
        """What the start of an upload says. Raises Problem."""
        headers, text = request.headers, request.headers.get("Upload-Length", "")
        if not re.fullmatch("[0-9]{1,18}", text) or "Upload-Concat" in headers:
            detail = "Send an Upload-Length: it can't come later, nor in other uploads."
            raise wsgi.Problem(400, detail)
        if int(text) > self.cache.max_size:
            limit = {"Tus-Max-Size": str(self.cache.max_size)}
            raise wsgi.Problem(413, wsgi._too_large(self.cache.max_size).detail, limit)
        metadata, digest = headers.get("Upload-Metadata", ""), headers.get("Repr-Digest", "")
        if len(metadata) + len(digest) > MAX_HEADERS:
            raise wsgi.Problem(431, "The upload's headers are too long.")
        wsgi._expected_digests(digest)
        # 128 random bits each: who knows where the file is can't delete it by the upload.
        name = wsgi._query(request, "name") or secrets.token_hex(16)
        if RESERVED in name:
            raise wsgi.Problem(400, "The name is not UTF-8.")
        expire = self.application.expire(wsgi._query(request, "expire"))
        return Upload(secrets.token_hex(16), name, int(text), expire, metadata, digest)

    def on_progress(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        upload = self.find(upload_id)
        if not upload.file:
            self.resume(upload)  # asks for all chunks
        headers = {"Upload-Length": str(upload.length)}
        if upload.metadata:
            headers["Upload-Metadata"] = upload.metadata
        return self.progress(request, upload, 200, **headers)

    def on_append(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        wsgi._refuse_coding(request)
        if request.mimetype != TYPE:
            raise wsgi.Problem(415, f"Send it as 'Content-Type: {TYPE}'.")
        offset = request.headers.get("Upload-Offset", "")
        if not re.fullmatch("[0-9]{1,18}", offset):
            raise wsgi.Problem(400, "The Upload-Offset is not a number.")
        upload = self.find(upload_id)
        if int(offset) != upload.offset:
            raise wsgi.Problem(409, f"The upload has {upload.offset} bytes. Continue there.")
        if (body.size or 0) > upload.length - upload.offset:
            raise memchunk.SizeMismatch(
                name=upload.name, size=upload.length, received=upload.offset + (body.size or 0)
            )
        if not upload.file:
            upload = self.append(upload, self.content(request, body))
        return self.progress(request, upload, 204)

    def on_terminate(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        upload = self.find(upload_id)
        while True:
            with contextlib.suppress(memchunk.FileChanged):  # by a piece that came at this moment
                self.remove(upload)
                return wsgi._empty({})
            upload = self.find(upload_id)

    def progress(
        self, request: Request, upload: Upload, status: int, **more: str
    ) -> Response:
        headers = {"Upload-Offset": str(upload.offset), "Cache-Control": "no-store", **more}
        if not upload.file:
            headers["Upload-Expires"] = http_date(upload.expires or 0)
        else:
            headers["Content-Location"] = self.application.path(request, "read", name=upload.name)
        return wsgi._empty(headers, status)

    def content(self, request: Request, body: wsgi.Body) -> Iterator[bytes]:
        """What comes of the body, to its end or to where it breaks off; with a checksum, nothing
        before all of it is verified: what is stored can't be taken back."""
        digest, expected = _checksum(request.headers.get("Upload-Checksum", ""))
        with contextlib.suppress(wsgi.CutOff):
            if digest is None:
                yield from body
                return
        with tempfile.SpooledTemporaryFile(HELD) as held:
            with contextlib.suppress(wsgi.CutOff):
                for piece in body:
                    held.write(piece)
                    digest.update(piece)
            if digest.digest() != expected:
                raise wsgi.Problem(460, "The body has another checksum. Send it again.")
            held.seek(0)
            yield from iter(functools.partial(held.read, wsgi.PIECE), b"")

    def begin(self, upload: Upload) -> Upload:
        """Write the first record. Raises InvalidName, FileExists."""
        writer = self.cache.create(upload.name, upload.length, upload.expire, upload.label)
        return self.save(upload, 0, writer.suspend())

    def find(self, upload_id: str) -> Upload:
        """The upload as its record has it. Raises FileNotFound; FileEvicted, FileCorrupt."""
        while True:
            with contextlib.suppress(memchunk.FileChanged):  # since it was opened
                file = self.cache.open(RESERVED + upload_id)
                kept: dict[str, Any] = json.loads(file.info.metadata)
                state = file.read(kept.pop("state"))
                here: dict[str, Any] = {"version": file.info.version, "expires": file.info.expires}
                upload = Upload(id=upload_id, state=state, **kept, **here)
                return self.finished(upload, self.published(upload))

    def save(self, upload: Upload, offset: int, state: bytes) -> Upload:
        """Write the record. Raises FileChanged where another request has, since it was read, and
        FileNotFound where it was deleted, or has expired."""
        fields = ("name", "length", "expire", "metadata", "digest")
        kept = {field: getattr(upload, field) for field in fields}
        metadata = json.dumps({**kept, "offset": offset, "state": len(state)}).encode()
        content = state and state.ljust(min(RECORD, upload.length), b"\0")
        write: Callable[..., memchunk.FileInfo] = self.cache.add
        if upload.version:
            write = functools.partial(self.cache.cas, version=upload.version)
        info = write(upload.record, content, expire=EXPIRE, metadata=metadata)
        return dataclasses.replace(
            upload, offset=offset, state=state, version=info.version, expires=info.expires
        )

    def append(self, upload: Upload, content: Iterable[bytes]) -> Upload:
        """Write the content behind what is there. It counts block by block."""
        writer = self.resume(upload)
        for piece in content:
            writer.write(piece)
            if BLOCK <= writer.tell() - upload.offset < upload.length - upload.offset:
                upload = self.save(upload, writer.tell(), writer.suspend())
                writer = self.resume(upload)
        if writer.tell() == upload.length:
            return self.finish(upload, writer)
        if writer.tell() > upload.offset:
            upload = self.save(upload, writer.tell(), writer.suspend())
        return upload

    def resume(self, upload: Upload) -> memchunk.FileWriter:
        """Raises FileNotFound where the upload was deleted, FileEvicted where the cache did it."""
        if not upload.state:
            raise wsgi.Problem(*ERRORS[memchunk.FileEvicted])
        try:
            return self.cache.resume(upload.state)
        except memchunk.FileEvicted:
            self.find(upload.id)
            raise

    def finish(self, upload: Upload, writer: memchunk.FileWriter) -> Upload:
        """Publish the file. What can't be published is deleted, and the upload with it."""
        try:
            if upload.digest:
                for _ in wsgi._verified(writer.chunks(), upload.digest):
                    pass
            writer.close()
        except (wsgi.Problem, memchunk.FileExists):
            self.remove(upload)
            raise
        try:
            upload = self.save(upload, upload.length, b"")
        except memchunk.FileNotFound:  # deleted meanwhile
            self.cache.delete(upload.name, writer.info.version)
            raise
        except memchunk.MemchunkError:
            pass  # the file is there all the same, as `find` will see
        return self.finished(upload, writer.info)

    def finished(self, upload: Upload, file: memchunk.FileInfo | None) -> Upload:
        """The upload, with the file that it has become, if it has."""
        offset = upload.length if file else upload.offset
        return dataclasses.replace(upload, offset=offset, file=file)

    def published(self, upload: Upload) -> memchunk.FileInfo | None:
        """The file that the upload has become, where it is there."""
        with contextlib.suppress(memchunk.FileNotFound, memchunk.FileCorrupt):
            info = self.cache.stat(upload.name)
            return info if info.metadata == upload.label else None
        return None

    def remove(self, upload: Upload) -> None:
        """Delete the upload and what it has stored, the file that it has become too. Raises
        FileChanged, and does nothing, where its record is another now."""
        self.cache.delete(upload.record, upload.version)
        file = self.published(upload)
        if file:
            with contextlib.suppress(memchunk.FileNotFound, memchunk.FileChanged):
                self.cache.delete(upload.name, file.version)
        elif upload.state:
            self.cache.abandon(upload.state)


def _upload_metadata(header: str) -> dict[str, str]:
    """Keys and values of Upload-Metadata. Raises Problem."""
    values: dict[str, str] = {}
    for pair in filter(None, map(str.strip, header.split(","))):
        key, _, value = pair.partition(" ")
        try:
            text = base64.b64decode(value, validate=True).decode("utf-8", "replace")
        except ValueError:
            text = None
        if text is None or key in values or not re.fullmatch("[!-~]+", key):
            detail = "Upload-Metadata has not the form KEY BASE64,KEY BASE64,...."
            raise wsgi.Problem(400, detail)
        values[key] = text
    return values


def _checksum(header: str) -> tuple[Any, bytes]:
    """A digest to feed, and what it must come to; None where no Upload-Checksum is sent."""
    algorithm, _, value = header.partition(" ")
    if not header:
        return None, b""
    with contextlib.suppress(ValueError):
        if algorithm in CHECKSUMS and value:
            return CHECKSUMS[algorithm](), base64.b64decode(value, validate=True)
    names = ", ".join(CHECKSUMS)
    raise wsgi.Problem(400, f"Upload-Checksum is 'ALGORITHM BASE64', by one of {names}.")


# At the end: where this module is imported first, `wsgi` mounts it now.
import wsgi  # noqa: E402
