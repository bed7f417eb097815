"""Any sequence of operations, uploads, evictions, expiries and damage, compared with a
dictionary.

Hypothesis makes the sequences, and shrinks one that fails. They run against a real
memcached, through mcpool and through a user's plain client in turn. At the end, no item
is left that should not be there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from pymemcache.client.base import Client

from memchunk import FileCache, FileInfo
from tests.support import Memcached
from torture.model import manifest
from torture.tools import CHUNK, LEASE, LONG, connected, counts, result

NAMES = st.sampled_from(["a", "ä/\0 \r\n", "n" * 1024])
SIZES, SEEDS = st.integers(0, 6 * CHUNK), st.integers(0, 10**6)
DATA = st.builds(lambda size, seed: random.Random(seed).randbytes(size), SIZES, SEEDS)
EXPIRES = st.sampled_from([0, 5000, 10**8])


def chunk_keys(name: str, parts: list[str]) -> list[str]:
    """Those of parts, or of what looks like one, in order."""
    pairs = (part.split(":")[:2] for part in parts)
    return [
        f"{manifest(name)}|#|{segment}:{index}"
        for segment, count in pairs
        for index in range(int(count))
    ]


@dataclass
class File:
    info: FileInfo
    data: bytes
    parts: list[str] = field(default_factory=list)
    missing: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)

    @property
    def keys(self) -> list[str]:
        staged = chunk_keys(self.info.name, self.parts)
        own = f"{self.info.version}:{self.info.chunks - len(staged)}"
        return staged + chunk_keys(self.info.name, [own])

    def read(self, start: int, stop: int) -> object:
        """What reading a part of it gives."""
        part = set(range(start // CHUNK, -(-stop // CHUNK))) if start < stop else set()
        if part & self.missing:  # found before any chunk is verified
            return "FileEvicted"
        return "FileCorrupt" if part & self.damaged else self.data[start:stop]


@dataclass
class Upload:
    parts: list[str] = field(default_factory=list)
    data: bytes = b""  # of the parts
    rest: bytes = b""  # less than a chunk


class Machine(RuleBasedStateMachine):
    """The library, and a dictionary that says what it should do."""

    server: ClassVar[Memcached]
    streams = Bundle("streams")

    @initialize(fast=st.booleans())
    def begin(self, fast: bool) -> None:
        self.server.flush()
        options: Any = {"chunk_size": CHUNK, "lease": LEASE}
        if fast:
            self.cache = connected(self.server, **options)
        else:
            self.cache = FileCache(Client(self.server.address, timeout=5), **options)
        self.files: dict[str, File] = {}
        self.uploads: dict[str, Upload] = {}
        self.orphans: set[str] = set()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            expected = set(self.orphans)
            for name, file in self.files.items():
                found = result(lambda: self.cache.get(name))  # noqa: B023
                assert found == file.read(0, file.info.size)
                expected |= {manifest(name), *self.chunks(file)}
            for name, upload in self.uploads.items():
                expected |= set(chunk_keys(name, upload.parts))
            assert set(self.server.keys()) == expected
            self.cache.close()

    @staticmethod
    def chunks(file: File) -> set[str]:
        keys = enumerate(file.keys)
        return {key for index, key in keys if index not in file.missing}

    @invariant()
    def one_step(self) -> None:
        counts["stateful steps"] += 1

    def write(
        self,
        name: str,
        data: bytes,
        call: Callable[[], FileInfo],
        parts: tuple[str, ...] = (),
    ) -> None:
        info = call()
        assert (info.name, info.size) == (name, len(data))
        assert info == self.cache.stat(name)
        assert self.cache.get(name) == data
        self.files[name] = File(info, data, list(parts))

    @rule(name=NAMES, data=DATA, expire=EXPIRES, metadata=st.binary(max_size=9))
    def add(self, name: str, data: bytes, expire: int, metadata: bytes) -> None:
        file = self.files.get(name)
        if file and not file.missing:
            assert result(lambda: self.cache.add(name, data)) == "FileExists"
        else:
            self.write(
                name,
                data,
                lambda: self.cache.add(name, data, expire=expire, metadata=metadata),
            )

    @rule(name=NAMES, data=DATA, expire=EXPIRES, pieces=st.integers(0, 300))
    def set(self, name: str, data: bytes, expire: int, pieces: int) -> None:
        steps = range(0, len(data), pieces) if pieces else ()
        source: Any = (data[slice(at, at + pieces)] for at in steps) if pieces else data
        self.write(name, data, lambda: self.cache.set(name, source, expire=expire))

    @rule(name=NAMES, data=DATA, right=st.booleans())
    def cas(self, name: str, data: bytes, right: bool) -> None:
        file = self.files.get(name)
        version = file.info.version if file and right else "0" * 16
        if file and right:
            self.write(name, data, lambda: self.cache.cas(name, data, version))
        else:
            error = "FileChanged" if file else "FileNotFound"
            assert result(lambda: self.cache.cas(name, data, version)) == error

    @rule(name=NAMES, data=DATA)
    def stage(self, name: str, data: bytes) -> None:
        upload = self.uploads.setdefault(name, Upload())
        data, parts = upload.rest + data, upload.parts
        part, taken = self.cache.stage(name, data, parts=parts, lease=LEASE)
        assert taken == len(data) // CHUNK * CHUNK
        upload.parts.append(part)
        upload.data += data[:taken]
        upload.rest = data[taken:]

    @rule(name=NAMES, expire=EXPIRES, is_add=st.booleans())
    def publish(self, name: str, expire: int, is_add: bool) -> None:
        upload, file = self.uploads.get(name), self.files.get(name)
        if upload is None:
            return
        options: Any = {"parts": upload.parts, "expire": expire}
        if is_add and file and not file.missing:
            outcome = result(lambda: self.cache.add(name, upload.rest, **options))
            assert outcome == "FileExists"
            return
        write = self.cache.add if is_add else self.cache.set
        data, parts = upload.data + upload.rest, tuple(upload.parts)
        self.write(name, data, lambda: write(name, upload.rest, **options), parts)
        del self.uploads[name]

    @rule(name=NAMES)
    def unstage(self, name: str) -> None:
        if name in self.uploads:
            self.cache.unstage(name, self.uploads.pop(name).parts)
        elif name in self.files:
            self.cache.unstage(name, self.files[name].parts)  # which stay

    @rule(name=NAMES, index=st.integers(0, 9))
    def evict_staged_chunk(self, name: str, index: int) -> None:
        upload = self.uploads.get(name)
        keys = chunk_keys(name, upload.parts) if upload else []
        if upload and keys:
            self.server.delete(keys[index % len(keys)])
            options: Any = {"parts": upload.parts}
            error = result(lambda: self.cache.stage(name, b"", **options))
            assert error == "FileEvicted"
            if name not in self.files:
                error = result(lambda: self.cache.set(name, upload.rest, **options))
                assert error == "CacheFull"
            self.cache.unstage(name, self.uploads.pop(name).parts)

    @rule(name=NAMES)
    def get(self, name: str) -> None:
        file = self.files.get(name)
        expected = file.read(0, file.info.size) if file else "FileNotFound"
        assert result(lambda: self.cache.get(name)) == expected

    @rule(name=NAMES)
    def stat(self, name: str) -> None:
        if name in self.files:
            assert self.cache.stat(name) == self.files[name].info
        else:
            assert result(lambda: self.cache.stat(name)) == "FileNotFound"

    @rule(target=streams, name=NAMES)
    def open(self, name: str) -> Any:
        if name in self.files:
            return self.files[name], self.cache.open(name)
        assert result(lambda: self.cache.open(name)) == "FileNotFound"
        return multiple()

    @rule(stream=streams, start=st.integers(0, 700), length=st.integers(0, 700))
    def read(self, stream: Any, start: int, length: int) -> None:
        """A stream stays on its version, whatever has become of the file."""
        file, opened = stream
        start, stop = min(start, len(file.data)), min(start + length, len(file.data))
        outcome = result(lambda: b"".join(opened.chunks(start, stop)))
        if any(file is current for current in self.files.values()):
            assert outcome == file.read(start, stop)
        else:
            assert outcome in (file.data[start:stop], "FileChanged", "FileCorrupt")
            assert outcome != "FileCorrupt" or file.damaged

    @rule(name=NAMES, expire=EXPIRES)
    def touch(self, name: str, expire: int) -> None:
        file = self.files.get(name)
        if file is None or file.missing:
            error = "FileEvicted" if file else "FileNotFound"
            assert result(lambda: self.cache.touch(name, expire)) == error
        else:
            file.info = self.cache.touch(name, expire)
            assert self.cache.stat(name) == file.info

    @rule(name=NAMES, version=st.sampled_from(["any", "right", "wrong"]))
    def delete(self, name: str, version: str) -> None:
        file = self.files.get(name)
        right = file.info.version if file else None
        versions = {"any": None, "right": right, "wrong": "0" * 16}
        expected = (
            "FileNotFound"
            if not file
            else "FileChanged"
            if version == "wrong"
            else "done"
        )
        assert result(lambda: self.cache.delete(name, versions[version])) == expected
        if expected == "done":
            del self.files[name]

    @rule(name=NAMES, index=st.integers(0, 5))
    def evict_chunk(self, name: str, index: int) -> None:
        file = self.files.get(name)
        index %= max(file.info.chunks, 1) if file else 1
        if file and file.info.chunks and index not in file.missing:
            self.server.delete(file.keys[index])
            file.missing.add(index)
            file.damaged.discard(index)
            counts["stateful: chunks evicted"] += 1

    @rule(
        name=NAMES,
        index=st.integers(0, 5),
        flip=st.integers(1, 255),
        at=st.integers(0, 200),
    )
    def damage_chunk(self, name: str, index: int, flip: int, at: int) -> None:
        file = self.files.get(name)
        index %= max(file.info.chunks, 1) if file else 1
        if file and file.info.chunks and index not in file.missing | file.damaged:
            key = file.keys[index]
            value = bytearray(self.server.read(key))
            value[at % len(value)] ^= flip
            self.server.write(key, bytes(value))
            file.damaged.add(index)
            counts["stateful: chunks damaged"] += 1

    @rule(name=NAMES)
    def evict_manifest(self, name: str) -> None:
        if name in self.files:
            self.server.delete(manifest(name))
            self.orphans |= self.chunks(self.files.pop(name))

    @rule(name=NAMES)
    def expire(self, name: str) -> None:
        """As time would: first the manifest, then the chunks."""
        file = self.files.pop(name, None)
        for key in [manifest(name), *sorted(self.chunks(file))] if file else ():
            assert self.server.command(f"touch {key} -1") == b"TOUCHED\r\n"
            assert result(lambda: self.cache.get(name)) == "FileNotFound"


def test_any_sequence_of_operations_does_what_a_dictionary_does(
    server: Memcached,
) -> None:
    Machine.server = server
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=1000 if LONG else 60,
            stateful_step_count=100 if LONG else 50,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
