# memchunk 1.0.0, MIT licence; README.md and docs/uploads.md belong to it.
"""Resumable uploads: tus 1.0.0 (https://tus.io) at /uploads, which `wsgi.py` mounts.

Each upload has a record, a small file in the cache. A worker needs nothing else to go
on with the upload, so any worker can. A record has three states:

* Open: bytes are missing. A PATCH stores the whole chunks of what it brings ahead of
  the file (`FileCache.stage`), 2 MiB at a time, and adds them to the record as parts.
  The bytes behind the last whole chunk, the tail, lie in the record itself. Bytes count
  once the record has them.
* Finishing: the record has all bytes. The request that brought the last of them
  publishes parts and tail as the file.
* Done: the file is published. The record has its version.

A request changes the record by `cas`. DELETE removes it only if it is unchanged. So if
two requests go on at one place, or a DELETE comes as well, exactly one wins. The others
answer 409 or 404 and delete what they stored, which nobody else knows.

If a worker dies in "finishing", the next HEAD or PATCH publishes the file in its place.
Several may try: the file's metadata names the upload, so the later ones see that it is
there. Each then writes "done". If the record is gone, a DELETE has won, and the
publisher takes its file back.

A record ends a day after its start, and its parts an hour later.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from werkzeug.http import http_date
from werkzeug.wrappers import Response

import httpfiles
import memchunk
from httpfiles import ERRORS, FileRequest, Problem, require

LIFETIME = 24 * 3600  # seconds of an upload
SLACK = 3600  # seconds that its parts live longer, so that the last piece can finish
BLOCK = 2 * 1024 * 1024  # bytes of a request after which they count
MAX_HEADERS = 8 * 1024  # bytes of Upload-Metadata that a record keeps
# memcached keeps items of each size in pages of their own. So a tail is padded to one
# of two sizes; the second is about that of the file's own chunks.
SMALL = 32 * 1024
RECORD = 480_000
RESERVED = "\ufffd"  # begins the names of records: no address can spell it, see wsgi.py
TYPE = "application/offset+octet-stream"
BEYOND = "The upload was announced with fewer bytes."
Handler = Callable[..., Response]


@dataclasses.dataclass(frozen=True)
class Upload:
    """An upload, as its record tells.

    name, length, expire: of the file, bytes and seconds. metadata: the Upload-Metadata.
    end: of the upload, a Unix time. offset: bytes that count, those of the parts and
    the tail. tail: None if the cache dropped it. version: of the file, "" until it is
    published. record: the version of the record, "" until there is one.
    """

    id: str
    name: str
    length: int
    expire: int
    metadata: str
    end: int
    offset: int = 0
    parts: Sequence[str] = ()
    version: str = ""
    tail: bytes | None = b""
    record: str = ""

    @property
    def is_finishing(self) -> bool:
        return self.offset == self.length and not self.version

    @property
    def seconds(self) -> int:
        """How long it has to live."""
        return max(self.end - int(time.time()), 1)

    @property
    def label(self) -> bytes:
        """The metadata of its file, which no other file has."""
        about = _type_and_filename(self.metadata)
        return httpfiles.pack_metadata(*about, upload=self.id)


class Application(Protocol):
    """What this module needs of the application that it belongs to."""

    cache: memchunk.FileCache

    def file_path(self, name: str) -> str: ...
    def seconds_to_keep(self, text: str | None) -> int: ...


class Uploads:
    """What is at /uploads of an application. headers: of its every answer."""

    def __init__(self, application: Application) -> None:
        self.application, self.cache = application, application.cache
        extensions = "creation,creation-with-upload,checksum,expiration,termination"
        self.headers = {
            "Tus-Resumable": "1.0.0",
            "Tus-Version": "1.0.0",
            "Tus-Extension": extensions,
            "Tus-Checksum-Algorithm": "sha1,sha256,sha512",
            "Tus-Max-Size": str(self.cache.max_size),
        }

    def routes(self) -> dict[str, dict[str, Handler]]:
        """For the application's table: what answers at each address, by method."""
        one: dict[str, Handler] = dict.fromkeys(
            ("HEAD", "PATCH", "DELETE"), self.answer
        )
        return {"/uploads": {"POST": self.answer}, "/uploads/": one}

    def answer(self, request: FileRequest, *ids: str) -> Response:
        """Check the request. Then call the handler, which is named like the method."""
        version = request.headers.get("Tus-Resumable")
        detail = "Send 'Tus-Resumable: 1.0.0', no other version."
        require(version == "1.0.0", 412, detail)
        if request.method != "HEAD":
            httpfiles.refuse_content_coding(request)
        handler: Handler = getattr(self, request.method.lower())
        try:
            return handler(request, *ids)
        except memchunk.FileChanged as error:
            detail = "Another request continued this upload. Ask where it is."
            raise Problem(409, detail) from error

    def post(self, request: FileRequest) -> Response:
        text = request.headers.get("Upload-Length", "")
        is_sound = "Upload-Concat" not in request.headers and _is_number(text)
        detail = "Send an Upload-Length now, and no Upload-Concat."
        require(is_sound, 400, detail)
        if int(text) > self.cache.max_size:
            raise httpfiles.too_large(self.cache.max_size)
        has_bytes = request.mimetype == TYPE
        content = self.content(request, int(text)) if has_bytes else ()
        upload = self.start(request, int(text))
        try:
            upload = self.append(upload, content)
        except (Problem, memchunk.CacheFull, memchunk.FileEvicted):
            # Its sender is not told where it is.
            with contextlib.suppress(memchunk.FileNotFound):
                self.remove(upload.id)
            raise
        location = httpfiles.relative_reference(request, f"/uploads/{upload.id}")
        return self.progress(request, upload, 201, Location=location)

    def head(self, request: FileRequest, upload_id: str) -> Response:
        upload = self.current(upload_id)
        if not upload.version:
            self.stage(upload, b"")  # raises FileEvicted if chunks are gone
        return self.progress(request, upload, 200)

    def patch(self, request: FileRequest, upload_id: str) -> Response:
        require(request.mimetype == TYPE, 415, f"Send it as 'Content-Type: {TYPE}'.")
        text = request.headers.get("Upload-Offset", "")
        require(_is_number(text), 400, "The Upload-Offset is not a number.")
        upload, offset = self.current(upload_id), int(text)
        detail = f"The upload has {upload.offset} bytes: go on there."
        require(offset == upload.offset, 409, detail)
        content = self.content(request, upload.length - offset)
        return self.progress(request, self.append(upload, content), 204)

    def delete(self, request: FileRequest, upload_id: str) -> Response:
        self.remove(upload_id)
        return httpfiles.empty_response({})

    def progress(
        self, request: FileRequest, upload: Upload, status: int, **more: str
    ) -> Response:
        more["Upload-Offset"] = str(upload.offset)
        more["Upload-Length"] = str(upload.length)
        if upload.metadata:
            more["Upload-Metadata"] = upload.metadata
        if upload.version:
            path = self.application.file_path(upload.name)
            more["Content-Location"] = httpfiles.absolute_path(request, path)
        else:
            more["Upload-Expires"] = http_date(upload.end)
        return httpfiles.empty_response({**more, "Cache-Control": "no-store"}, status)

    def content(self, request: FileRequest, room: int) -> Iterator[bytes]:
        """What comes of the body until it ends or breaks off, up to `room` bytes.
        Raises Problem; at once, if the headers say enough."""
        require((request.body.size or 0) <= room, 413, BEYOND)
        pieces, beyond = request.body.until_cut_off(), Problem(413, BEYOND)
        content = httpfiles.limited(pieces, room, beyond)
        header = request.headers.get("Upload-Checksum")
        if header is None:
            return content
        is_known = re.fullmatch("(sha1|sha256|sha512) [A-Za-z0-9+/]+=*", header)
        detail = "Send an Upload-Checksum of sha1, sha256 or sha512: 'sha1 BASE64'."
        require(is_known, 400, detail)
        return _checked(content, *header.split())

    def start(self, request: FileRequest, length: int) -> Upload:
        """A new upload, of no bytes yet. Raises Problem."""
        metadata = request.headers.get("Upload-Metadata", "")
        require(len(metadata) <= MAX_HEADERS, 431, "The Upload-Metadata is too long.")
        extension = httpfiles.extension(*_type_and_filename(metadata))
        expire = self.application.seconds_to_keep(request.query_value("expire"))
        # 128 random bits each: the file's address does not tell the upload's.
        name = request.query_value("name") or secrets.token_hex(16) + extension
        require(RESERVED not in name, 400, "The name is not UTF-8.")
        require(name not in self.cache, *ERRORS[memchunk.FileExists])
        about = length, expire, metadata, int(time.time()) + LIFETIME
        return self.save(Upload(secrets.token_hex(16), name, *about))

    def find(self, upload_id: str) -> Upload:
        """The upload, as its record is now. Raises FileNotFound."""
        record = self.cache.open(RESERVED + upload_id)
        kept = json.loads(record.info.metadata)
        try:
            tail = record.read(kept.pop("tail"))
        except memchunk.FileChanged:  # since it was opened
            return self.find(upload_id)
        except (memchunk.FileEvicted, memchunk.FileCorrupt):
            tail = None
        return Upload(upload_id, **kept, tail=tail, record=record.info.version)

    def current(self, upload_id: str) -> Upload:
        """The upload to go on with, finished if all of it is there. Raises
        FileNotFound; Problem if its tail, or the file that it became, is gone."""
        upload = self.find(upload_id)
        gone = ERRORS[memchunk.FileEvicted]
        require(upload.tail is not None, *gone)
        if upload.is_finishing:
            return self.finish(upload)
        if upload.version:
            info = self.published(upload)
            require(info and info.version == upload.version, *gone)
        return upload

    def save(self, upload: Upload) -> Upload:
        """Write the record in place of the one that was read. Raises FileChanged if
        another request has written it, FileNotFound if it is gone."""
        kept, tail = dict(vars(upload)), upload.tail or b""
        del kept["id"], kept["record"]
        metadata = json.dumps({**kept, "tail": len(tail)}).encode()
        detail = "The upload came in too many small pieces."
        require(len(metadata) <= memchunk.MAX_METADATA, 507, detail)
        if tail:
            size = SMALL if len(tail) <= SMALL else RECORD
            tail = tail.ljust(min(size, upload.length))
        write: Callable[..., memchunk.FileInfo] = self.cache.add
        if upload.record:
            write = functools.partial(self.cache.cas, version=upload.record)
        name, expire = RESERVED + upload.id, upload.seconds
        info = write(name, tail, expire=expire, metadata=metadata)
        return dataclasses.replace(upload, record=info.version)

    def append(self, upload: Upload, content: Iterable[bytes]) -> Upload:
        """Store the content behind what is there; it counts block by block."""
        block = bytearray()
        for piece in content:
            block += piece
            if len(block) >= BLOCK:
                upload, block = self.store(upload, block), bytearray()
        if block:
            upload = self.store(upload, block)
        return self.finish(upload) if upload.is_finishing else upload

    def stage(self, upload: Upload, data: bytes | bytearray) -> tuple[str, int]:
        """Store whole chunks. Raises FileEvicted if some of its parts are gone."""
        lease = upload.seconds + SLACK
        return self.cache.stage(upload.name, data, parts=upload.parts, lease=lease)

    def store(self, upload: Upload, block: bytearray) -> Upload:
        """Store a block behind the tail. The end of both is the new tail."""
        data = (upload.tail or b"") + block
        part, taken = self.stage(upload, data)
        parts = [*upload.parts, part] if taken else upload.parts
        offset = upload.offset + len(block)
        tail = bytes(memoryview(data)[taken:])
        new = dataclasses.replace(upload, offset=offset, parts=parts, tail=tail)
        try:
            return self.save(new)
        except memchunk.CacheUnavailable:
            raise  # the record may name the part
        except (Problem, memchunk.MemchunkError):
            self.cache.unstage(upload.name, [part])
            raise

    def finish(self, upload: Upload) -> Upload:
        """Publish the file, and note its version in the record. If the file can't be
        published, nothing is left of the upload. Others may do the same at once."""
        try:
            version = self.publish(upload)
        except (memchunk.FileExists, memchunk.FileCorrupt, memchunk.CacheFull):
            self.discard(upload)
            raise
        done = dataclasses.replace(upload, parts=(), tail=b"", version=version)
        try:
            return self.save(done)
        except (memchunk.CacheFull, memchunk.CacheUnavailable):
            return done  # the file is there all the same, as `publish` would see
        except (memchunk.FileChanged, memchunk.FileNotFound):
            with contextlib.suppress(memchunk.FileNotFound):
                found = self.find(upload.id)
                if found.version == version:
                    return found
            self.unpublish(upload, version)
            raise

    def publish(self, upload: Upload) -> str:
        """The version of the file, which is there afterwards."""
        name, tail, label = upload.name, upload.tail or b"", upload.label
        add = functools.partial(self.cache.add, name, tail, parts=upload.parts)
        try:
            return add(expire=upload.expire, metadata=label).version
        except memchunk.FileExists as error:
            if error.info.metadata != label:
                raise
            return error.info.version

    def published(self, upload: Upload) -> memchunk.FileInfo | None:
        """The file of that name, if there is one."""
        with contextlib.suppress(memchunk.FileNotFound, memchunk.FileCorrupt):
            return self.cache.stat(upload.name)
        return None

    def unpublish(self, upload: Upload, version: str) -> None:
        with contextlib.suppress(memchunk.FileNotFound, memchunk.FileChanged):
            self.cache.delete(upload.name, version)

    def discard(self, upload: Upload) -> None:
        """Delete the upload as it was read, and what it has stored or become. Raises
        FileChanged if another request has written its record, FileNotFound."""
        self.cache.delete(RESERVED + upload.id, upload.record)
        # From here on nobody goes on with it. Who is about to publish its file will
        # miss the record, and take the file back.
        info = self.published(upload)
        if info and info.metadata == upload.label:
            self.unpublish(upload, info.version)
        self.cache.unstage(upload.name, upload.parts)

    def remove(self, upload_id: str) -> None:
        """Delete the upload as it is now. Raises FileNotFound."""
        while True:
            with contextlib.suppress(memchunk.FileChanged):
                return self.discard(self.find(upload_id))


def _is_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,18}", text) is not None


def _checked(pieces: Iterable[bytes], algorithm: str, expected: str) -> Iterator[bytes]:
    """The pieces, if all are there and right. Stored bytes can't be undone."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with tempfile.SpooledTemporaryFile(BLOCK) as held:  # in memory, more on disk
        for piece in pieces:
            held.write(piece)
            digest.update(piece)
        is_right = base64.b64encode(digest.digest()).decode() == expected
        require(is_right, 460, "The body has another checksum. Send it again.")
        held.seek(0)
        yield from iter(lambda: held.read(httpfiles.PIECE), b"")


def _type_and_filename(header: str) -> tuple[str, str]:
    """What an Upload-Metadata says of them. Raises Problem."""
    pairs = [pair.strip().partition(" ") for pair in header.split(",") if pair.strip()]
    given: dict[str, str] = {}
    with contextlib.suppress(ValueError):
        for key, _, value in pairs:
            data = base64.b64decode(value, validate=True)
            given[key] = data.decode("utf-8", "replace")
    is_sound = all(re.fullmatch("[!-~]+", key) for key in given)
    detail = "Upload-Metadata has not the form KEY BASE64,KEY BASE64,...."
    require(is_sound and len(given) == len(pairs), 400, detail)
    filename = given.get("filename") or given.get("name", "")
    return given.get("filetype") or given.get("type", ""), filename
