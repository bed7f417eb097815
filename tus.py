"""Resumable uploads: tus 1.0.0 (https://tus.io) at /uploads, which `wsgi.py` mounts.

An upload is the file from its first byte on: its chunks lie where the file will have them, and its
end publishes them. All else that there is to know is in its record, a small file in the cache: as
content the state of the library's writer, as metadata the rest. So any worker can go on, and one
that dies takes with it what came since the record was last written: BLOCK bytes. Records are
changed by `cas`: of two requests that go on at one place, one wins.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator

from werkzeug.http import http_date
from werkzeug.routing import MapAdapter, Rule
from werkzeug.wrappers import Request, Response

import memchunk

__all__ = ["Upload", "Uploads"]

CHECKSUMS = "sha1,sha256,sha512"
HEADERS = {
    "Tus-Resumable": "1.0.0",
    "Tus-Version": "1.0.0",
    "Tus-Extension": "creation,creation-with-upload,checksum,expiration,termination",
    "Tus-Checksum-Algorithm": CHECKSUMS,
}
TYPE = "application/offset+octet-stream"

EXPIRE = 24 * 3600  # seconds that an upload lives after its last piece
LEASE = EXPIRE + 3600  # and its chunks: what comes slowly is stored before it counts
BLOCK = 3_500_000  # bytes of a request after which they count: 4 MB with what is under way
HELD = 4 * 1024 * 1024  # bytes of a piece with a checksum that wait in memory; more do on disk
MAX_HEADERS = 8 * 1024  # bytes that a record keeps of its upload's start

# Bytes that the record of a larger file has at least, and thus the size of the file's own chunks:
# of each other size it would take a page of memcached's memory, which the file may need.
RECORD = 480_000

KEPT = ("name", "length", "label", "metadata", "digest", "offset")  # in the record
RESERVED = "\ufffd"  # begins the names of records: no address can spell it, see `wsgi`

# What errors of the library mean for an upload.
ERRORS: dict[type[memchunk.MemchunkError], tuple[int, str]] = {
    memchunk.FileNotFound: (404, "There is no such upload. It may have expired: start a new one."),
    memchunk.FileChanged: (409, "Another request continued this upload. Ask where it is."),
    memchunk.FileEvicted: (410, "The cache dropped parts of this upload. Start again."),
    memchunk.SizeMismatch: (413, "This is more than the upload was announced with."),
}


@dataclasses.dataclass(frozen=True)
class Upload:
    """An upload, as its record has it.

    name, length: of the file. label: its metadata, by which it is known as this upload's.
    metadata, digest: the Upload-Metadata and Repr-Digest of the start. offset: bytes that count.
    state: of the writer; empty once the file is published, or where the cache dropped it.
    file: what the upload has become, where that is there.
    """

    id: str
    name: str
    length: int
    label: str
    metadata: str = ""
    digest: str = ""
    offset: int = 0
    state: bytes = b""
    record: memchunk.FileInfo | None = None
    file: memchunk.FileInfo | None = None


class Uploads:
    """What is at /uploads of an application. headers: of its every answer."""

    def __init__(self, application: wsgi.Application) -> None:
        self.application = application
        self.cache = copy.copy(application.cache)  # on the same connections
        self.cache.lease = LEASE
        self.headers = {**HEADERS, "Tus-Max-Size": str(self.cache.max_size)}

    def rules(self) -> list[Rule]:
        path = "/uploads/<upload_id>"
        methods = {"progress": "HEAD", "append": "PATCH", "terminate": "DELETE"}
        rules = [Rule(path, endpoint=key, methods=[method]) for key, method in methods.items()]
        return [Rule("/uploads", endpoint="start", methods=["POST"]), *rules]

    def dispatch(self, request: Request, adapter: MapAdapter, body: wsgi.Body) -> Response:
        request.method = request.headers.get("X-HTTP-Method-Override", request.method).upper()
        if request.method == "OPTIONS":
            return self.application.on_options(request, adapter)
        endpoint, arguments = adapter.match(method=request.method)
        if request.headers.get("Tus-Resumable") != HEADERS["Tus-Resumable"]:
            raise wsgi.Problem(412, "Send 'Tus-Resumable: 1.0.0': no other version is spoken.")
        if request.method != "HEAD":
            self.application.refuse_foreign_site(request)
            wsgi._refuse_coding(request)
        try:
            response: Response = getattr(self, f"on_{endpoint}")(request, body, **arguments)
            return response
        except tuple(ERRORS) as error:
            status, detail = next(ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS)
            raise wsgi.Problem(status, detail) from error

    def on_start(self, request: Request, body: wsgi.Body) -> Response:
        expire = self.application.expire(wsgi._query(request, "expire"))
        content = self.content(request, body) if request.mimetype == TYPE else ()
        upload = self.announced(request)
        label = upload.label.encode()
        writer = self.cache.create(upload.name, upload.length, expire, label)
        upload = self.append(self.save(upload, writer), content)
        location = self.application.url(request, "progress", upload_id=upload.id)
        return self.progress(request, upload, 201, Location=location)

    def announced(self, request: Request) -> Upload:
        """What the start of an upload says of it. Raises Problem."""
        headers, length = request.headers, request.headers.get("Upload-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length) or "Upload-Concat" in headers:
            detail = "Send an Upload-Length: it can't come later, nor in other uploads."
            raise wsgi.Problem(400, detail)
        if int(length) > self.cache.max_size:
            raise wsgi._too_large(self.cache.max_size)
        metadata, digest = headers.get("Upload-Metadata", ""), headers.get("Repr-Digest", "")
        if len(metadata) + len(digest) > MAX_HEADERS:
            raise wsgi.Problem(431, "The upload's headers are too long.")
        wsgi._expected_digests(digest)
        # 128 random bits each: who knows where the file is can't delete it by way of the upload.
        upload_id, random = secrets.token_hex(16), secrets.token_hex(16)
        name = wsgi._query(request, "name") or random
        if RESERVED in name:
            raise wsgi.Problem(400, "The name is not UTF-8.")
        label = _label(metadata, upload_id)
        return Upload(upload_id, name, int(length), label, metadata, digest)

    def on_progress(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        upload = self.find(upload_id)
        if not upload.file:
            self.resume(upload)  # which asks for its chunks
        more = {"Upload-Metadata": upload.metadata} if upload.metadata else {}
        return self.progress(request, upload, 200, **{"Upload-Length": str(upload.length)}, **more)

    def on_append(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        offset = request.headers.get("Upload-Offset", "")
        if request.mimetype != TYPE:
            raise wsgi.Problem(415, f"Send it as 'Content-Type: {TYPE}'.")
        if not re.fullmatch("[0-9]{1,18}", offset):
            raise wsgi.Problem(400, "The Upload-Offset is not a number.")
        upload = self.find(upload_id)
        if int(offset) != upload.offset:
            raise wsgi.Problem(409, f"The upload has {upload.offset} bytes. Continue there.")
        if int(offset) + (body.size or 0) > upload.length:
            raise wsgi.Problem(*ERRORS[memchunk.SizeMismatch])
        return self.progress(request, self.append(upload, self.content(request, body)), 204)

    def on_terminate(self, request: Request, body: wsgi.Body, upload_id: str) -> Response:
        while True:
            with contextlib.suppress(memchunk.FileChanged):  # by a piece that came at this moment
                self.remove(self.find(upload_id))
                return wsgi._empty({})

    def progress(self, request: Request, upload: Upload, status: int, **more: str) -> Response:
        headers = {"Upload-Offset": str(upload.offset), "Cache-Control": "no-store", **more}
        if upload.file:
            headers["Content-Location"] = self.application.path(request, "read", name=upload.name)
        elif upload.record:
            headers["Upload-Expires"] = http_date(upload.record.expires)
        return wsgi._empty(headers, status)

    def content(self, request: Request, body: wsgi.Body) -> Iterator[bytes]:
        """What comes of the body, to where it ends or breaks off; with a checksum, once all of it
        is there and right: what is stored can't be taken back. Raises Problem."""
        header = request.headers.get("Upload-Checksum")
        if header is None:
            yield from body.arrived()
            return
        match = re.fullmatch(r"(sha1|sha256|sha512) ([A-Za-z0-9+/]+=*)", header)
        if not match:
            raise wsgi.Problem(400, f"Upload-Checksum is 'ALGORITHM BASE64', by {CHECKSUMS}.")
        digest = hashlib.new(match[1], usedforsecurity=False)
        with tempfile.SpooledTemporaryFile(HELD) as held:
            for piece in body.arrived():
                held.write(piece)
                digest.update(piece)
            if base64.b64encode(digest.digest()).decode() != match[2]:
                raise wsgi.Problem(460, "The body has another checksum. Send it again.")
            held.seek(0)
            yield from iter(lambda: held.read(wsgi.PIECE), b"")

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
        file = self.published(upload)
        return dataclasses.replace(upload, offset=upload.length, file=file) if file else upload

    def save(self, upload: Upload, writer: memchunk.FileWriter | None) -> Upload:
        """Write the record, with what the writer has; None: the file is published. Raises
        FileChanged where another request has, since it was read; FileNotFound where it is gone."""
        offset, state = (writer.tell(), writer.suspend()) if writer else (upload.length, b"")
        changed = dataclasses.replace(upload, offset=offset, state=state)
        kept = {key: getattr(changed, key) for key in KEPT}
        metadata = json.dumps({**kept, "state": len(state)}).encode()
        version = upload.record.version if upload.record else None
        name = RESERVED + upload.id
        with self.cache.create(name, None, EXPIRE, metadata, version=version) as record:
            record.write(state and state.ljust(min(RECORD, upload.length)))
        return dataclasses.replace(changed, record=record.info)

    def append(self, upload: Upload, content: Iterable[bytes]) -> Upload:
        """Write the content behind what is there; it counts block by block."""
        if upload.file:
            return upload
        writer = self.resume(upload)
        for piece in content:
            writer.write(piece)
            if writer.tell() - upload.offset >= BLOCK and writer.tell() < upload.length:
                upload = self.save(upload, writer)
                writer = self.resume(upload)
        if writer.tell() < upload.length:
            return self.save(upload, writer)
        return self.finish(upload, writer)

    def resume(self, upload: Upload) -> memchunk.FileWriter:
        """Its writer. Raises Problem or FileEvicted where the cache dropped a part."""
        if not upload.state:
            raise wsgi.Problem(*ERRORS[memchunk.FileEvicted])
        return self.cache.resume(upload.state)

    def finish(self, upload: Upload, writer: memchunk.FileWriter) -> Upload:
        """Publish the file. Where that can't be, nothing is left of the upload."""
        try:
            for _ in wsgi._verified(writer.chunks(), upload.digest) if upload.digest else ():
                pass
            writer.close()
        except (wsgi.Problem, memchunk.FileExists, memchunk.CacheFull):
            self.remove(upload)
            raise
        try:
            upload = self.save(upload, None)
        except memchunk.FileNotFound:  # the upload was deleted meanwhile
            self.cache.delete(upload.name, writer.info.version)
            raise
        except memchunk.MemchunkError:  # the file is there all the same, as `find` will see
            pass
        return dataclasses.replace(upload, offset=upload.length, file=writer.info)

    def published(self, upload: Upload) -> memchunk.FileInfo | None:
        """The file that the upload has become, where it is there."""
        with contextlib.suppress(memchunk.FileNotFound, memchunk.FileCorrupt):
            info = self.cache.stat(upload.name)
            return info if info.metadata == upload.label.encode() else None
        return None

    def remove(self, upload: Upload) -> None:
        """Delete the upload, and what it has stored or become. Raises FileChanged, and does
        nothing, where its record is another now."""
        self.cache.delete(RESERVED + upload.id, upload.record.version if upload.record else None)
        file = self.published(upload)
        if file:
            with contextlib.suppress(memchunk.FileNotFound, memchunk.FileChanged):
                self.cache.delete(upload.name, file.version)
        if upload.state:
            self.cache.abandon(upload.state)


def _label(header: str, upload_id: str) -> str:
    """Metadata for the file of an upload with this Upload-Metadata. Raises Problem."""
    pairs = [pair.strip().partition(" ") for pair in header.split(",") if pair.strip()]
    given: dict[str, str] = {}
    with contextlib.suppress(ValueError):
        for key, _, value in pairs:
            given[key] = base64.b64decode(value, validate=True).decode("utf-8", "replace")
    if len(given) < len(pairs) or not all(re.fullmatch("[!-~]+", key) for key in given):
        raise wsgi.Problem(400, "Upload-Metadata has not the form KEY BASE64,KEY BASE64,....")
    content_type = given.get("filetype") or given.get("type", "")
    filename = given.get("filename") or given.get("name", "")
    return wsgi._pack(content_type, filename, upload=upload_id).decode()


# At the end: where this module is the first to be imported, `wsgi` mounts it now.
import wsgi  # noqa: E402
