"""The n-th memcached command fails, for every operation, every n, and in every way.

Three levels: the client of a user; and, behind a proxy, the sockets of pymemcache's
PooledClient and of mcpool. After each case: The operation did what it says, or raised
an error that fits the fault. The old file or the new one is whole. No other chunk is
left but on a lease, except as `Case.is_helpless` says. The next operations on the same
cache work. And in it: chunks that are being stored are on a lease.

The short form waits for fewer time-outs, and tries fewer moments if another writer
comes first.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any, Callable, Union

import pytest
from pymemcache.client.base import PooledClient

import mcpool
import memchunk
from memchunk import FileCache
from tests.faults import ON_THE_WIRE, Faulty, Proxy
from tests.support import Memcached
from torture.model import manifest
from torture.tools import (
    CHUNK,
    GONE,
    LATEST,
    LEASE,
    LONG,
    State,
    audit,
    connected,
    counts,
    result,
    segment_of,
    state,
)


class Pooled(Proxy):
    """Between mcpool and a memcached."""

    def cache(self, timeout: float = 10, **options: Any) -> FileCache:
        return FileCache(mcpool.connect(self.server, timeout=timeout), **options)


Site = Union[Faulty, Proxy]
LEVELS: dict[str, Callable[[Memcached], Site]] = {
    "client": Faulty,
    "wire": Proxy,
    "mcpool": Pooled,
}
Operation = Callable[[FileCache, str, bytes], object]
EXPIRE, TIMEOUT = 5000, 0.15  # seconds

staged: list[str] = []  # the parts of the upload of the present case


def upload(cache: FileCache, version: str, data: bytes) -> object:
    """Stage what is whole chunks, and publish it with the rest."""
    staged.clear()
    part, taken = cache.stage("file", data, lease=LEASE)
    staged.append(part)
    return cache.set("file", data[taken:], parts=staged, expire=EXPIRE)


READS: dict[str, Operation] = {
    "get": lambda cache, version, data: cache.get("file"),
    "chunks": lambda cache, version, data: b"".join(cache.open("file").chunks()),
    "part": lambda cache, version, data: b"".join(
        cache.open("file").chunks(CHUNK - 1, CHUNK + 1)
    ),
    "stat": lambda cache, version, data: cache.stat("file").size,
}
OPERATIONS: dict[str, Operation] = {
    **READS,
    "add": lambda cache, version, data: cache.add("file", data),
    "set": lambda cache, version, data: cache.set("file", data, expire=EXPIRE),
    "set unsized": lambda cache, version, data: cache.set(
        "file", iter([data[:7], data[7:]])
    ),
    "upload": upload,
    "cas": lambda cache, version, data: cache.cas("file", data, version),
    "touch": lambda cache, version, data: cache.touch("file", EXPIRE // 2),
    "touch for ever": lambda cache, version, data: cache.touch("file", 0),
    "delete": lambda cache, version, data: cache.delete("file"),
    "delete version": lambda cache, version, data: cache.delete("file", version),
}
CASES = [(name, True) for name in OPERATIONS] + [
    (name, False) for name in ("get", "add", "set", "set unsized", "upload", "delete")
]
# Bytes of the old file and of the new. Batches have three chunks. The chunks of the
# large old file are so many that their deletion waits for replies.
SIZES = {"empty": (0, 1), "small": (250, 150), "large": (950, 750)}

UNAVAILABLE = {"CacheUnavailable"}
RAISED = {  # what these faults may raise; anything may succeed all the same
    "out of memory": {"CacheFull", "CacheUnavailable"},
    "no": {"CacheFull", "FileNotFound", "FileEvicted", "FileExists", "FileChanged"},
    "taken for a no": {"CacheUnavailable", "CacheFull", "FileEvicted"},
    "evicted": {
        "CacheFull",
        "FileNotFound",
        "FileEvicted",
        "FileExists",
        "FileChanged",
    },
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks travel together, so that a file of some hundred bytes has several
    batches; and mcpool goes on at once after a time-out. By private names, because each
    case would take hundreds of commands, and two seconds, without.
    """
    monkeypatch.setattr(memchunk, "_WRITE_BATCH", 3 * CHUNK)
    monkeypatch.setattr(memchunk, "_READ_BATCH", 3 * CHUNK)
    monkeypatch.setattr(mcpool, "_DOWN", 0)


@pytest.fixture(params=LEVELS)
def site(request: pytest.FixtureRequest, server: Memcached) -> Iterator[Site]:
    with contextlib.closing(LEVELS[request.param](server)) as site:
        yield site


@pytest.fixture
def direct(server: Memcached) -> Iterator[FileCache]:
    """A cache that meets no fault."""
    with connected(server, chunk_size=CHUNK, lease=LEASE) as cache:
        yield cache


def be_patient(client: Any) -> None:
    """The short time-out is for the fault alone: a busy machine needs more afterwards.
    By a private name of mcpool."""
    if isinstance(client, PooledClient):
        for each in (client, *client.client_pool.free):
            each.timeout = each.connect_timeout = 10
            if getattr(each, "sock", None):
                each.sock.settimeout(10)
    elif isinstance(client, mcpool.ServerPool):
        client._timeout = 10


class Case:
    """One operation on one state of the cache, on which faults are tried."""

    def __init__(
        self, site: Site, direct: FileCache, operation: str, present: bool, size: str
    ):
        self.site, self.direct, self.operation = site, direct, operation
        self.present, self.size = present, size
        old, new = SIZES[size]
        self.old, self.new = b"o" * old, b"n" * new
        self.before, self.wanted = self.prepare(), self.run(direct)
        self.after = state(direct)

    def prepare(self) -> State:
        self.site.upstream.flush()
        self.version = "0" * 16
        if self.present:
            self.version = self.direct.set("file", self.old, expire=EXPIRE).version
        return state(self.direct)

    def run(self, cache: FileCache) -> object:
        return result(lambda: OPERATIONS[self.operation](cache, self.version, self.new))

    def cache(self, timeout: float) -> FileCache:
        return self.site.cache(timeout, chunk_size=CHUNK, lease=LEASE)

    def attempt(
        self, *faults: tuple[int, str], action: Callable[[], object] = bool
    ) -> object:
        """The operation's result, with these faults. Then the cache works on."""
        self.prepare()
        self.is_garbage = "garbage" in dict(faults).values()
        unleased: list[str] = []

        def strike() -> None:
            if self.site.verbs[-1] == "set" and "touch" not in self.site.verbs:
                now = time.time()
                for key, end in self.site.upstream.expiries().items():
                    if segment_of(key) not in ("", self.version):
                        unleased.extend([key] * (not now < end <= now + LATEST))
            action()

        waits = any(fault.startswith("timeout") for _, fault in faults)
        with contextlib.closing(self.cache(TIMEOUT if waits else 10)) as cache:
            self.site.arm(*faults, action=strike)
            outcome = self.run(cache)
            with contextlib.suppress(memchunk.MemchunkError):
                # If a delete without a reply fails, only the next command meets that.
                cache.stat("other")
            self.fired, self.evicted = self.site.fired, self.site.evicted
            self.struck, self.verbs = self.site.struck, self.site.verbs
            self.commands = len(self.verbs)
            self.site.disarm()
            be_patient(cache.client)
            assert not unleased
            cache.set("other", b"other" * 50)
            assert cache.get("other") == b"other" * 50
            assert state(cache) == state(self.direct)
            cache.delete("other")
        return outcome

    def check(self, fault: str, outcome: object) -> None:
        """That the outcome is true, the file whole, and nothing left over."""
        if fault == "garbage" and type(self.site) is Proxy:
            fault = "taken for a no"  # by pymemcache, of a touch and a delete
        now = state(self.direct)
        lost = bool(self.evicted) and now.data in ("FileNotFound", "FileEvicted")
        if outcome == self.wanted:
            assert now == self.after or lost
        else:
            assert outcome in RAISED.get(fault, UNAVAILABLE)
            assert now in (self.before, self.after) or lost
        # Chunks whose touch says no, falsely, keep the later of two ends.
        exact = outcome == self.wanted and "no" not in fault.split()
        self.audit(outcome, exact=exact, is_gone=fault == "gone")

    def audit(
        self, outcome: object, exact: bool = False, is_gone: bool = False
    ) -> None:
        is_there = state(self.direct) != GONE
        infos = [self.direct.stat("file")] if is_there else []
        spare = "" if is_gone or self.is_helpless(outcome) else "-"
        # The parts of an upload that failed are its uploader's.
        parts = tuple(staged) if self.operation == "upload" else ()
        audit(self.site.upstream, *infos, parts=parts, spare=spare, exact=exact)

    def is_helpless(self, outcome: object) -> bool:
        """Whether nobody can delete chunks: memcached evicted their manifest; a
        deletion failed twice, or is a quick one, whose failure nobody hears of; or the
        reply to a publication was lost, and a look did not find it."""
        if manifest() in self.evicted or self.struck == ["delete", "delete"]:
            return True
        if "delete" in self.struck and outcome == self.wanted:
            is_quick = isinstance(self.site, Proxy) and self.size != "large"
            return is_quick or (self.is_garbage and type(self.site) is Proxy)
        is_lost = not {"add", "cas"}.isdisjoint(self.struck)
        return is_lost and outcome == "CacheUnavailable"


@pytest.mark.parametrize("fault", ON_THE_WIRE)
@pytest.mark.parametrize(("operation", "present"), CASES)
def test_every_command_fails_in_every_way(
    site: Site, direct: FileCache, operation: str, present: bool, fault: str
) -> None:
    strides = {"small": 1, "large": 20}
    if isinstance(site, Proxy):
        is_slow = fault.startswith("timeout")
        strides = {"small": 10} if is_slow else {"small": 5, "large": 25}
    sample = operation, fault, type(site).__name__
    for size in SIZES if LONG else strides:
        case = Case(site, direct, operation, present, size)
        for moment in moments(1 if LONG else strides[size], *sample):
            outcome = case.attempt((moment, fault))
            if not case.fired:
                break
            case.check(fault, outcome)
            counts[f"single faults, {type(site).__name__}"] += 1


def moments(stride: int, *what: str) -> Iterator[int]:
    """From the first command on; in the short form a sample, another for each case."""
    return itertools.count(random.Random("".join(what)).randrange(stride), stride)


@pytest.mark.parametrize(("operation", "present"), CASES)
def test_two_commands_fail(
    site: Site, direct: FileCache, operation: str, present: bool
) -> None:
    """A sample. The second fault often strikes what was to mend the first."""
    dice = random.Random(operation)
    faults = ["reset before", "reset after", "out of memory", "server error"]
    faults += ["timeout before", "timeout after"] * isinstance(site, Faulty)
    case = Case(site, direct, operation, present, "small")
    case.attempt()
    for _ in range(500 if LONG else 10):
        first = dice.randrange(case.commands + 1)
        second = first + dice.choice([1, 1, 1, 2, 5])
        one, two = dice.choice(faults), dice.choice(faults)
        outcome = case.attempt((first, one), (second, two))
        now = state(direct)
        if outcome == case.wanted:
            assert now == case.after
        else:
            assert outcome in (*UNAVAILABLE, "CacheFull")
            assert now in (case.before, case.after)
        case.audit(outcome)
        counts[f"double faults, {type(site).__name__}"] += case.fired == 2


OVERTAKING: dict[str, Callable[[FileCache], object]] = {
    "set": lambda cache: cache.set("file", b"other" * 50),
    "touch": lambda cache: cache.touch("file", 3 * EXPIRE),
    "delete": lambda cache: cache.delete("file"),
}


class Orders:
    """What an operation and another one give, one after the other, in both orders."""

    def __init__(self, case: Case, other: Callable[[FileCache], object]) -> None:
        case.prepare()
        first = case.run(case.direct)
        self.known = {(first, result(lambda: other(case.direct)), state(case.direct))}
        case.prepare()
        second = result(lambda: other(case.direct))
        # Where the operation was not done.
        self.unknown = {(second, state(case.direct))}
        self.known.add((case.run(case.direct), second, state(case.direct)))
        self.unknown |= {(second, left) for _, second, left in self.known}
        if case.operation.startswith("delete"):
            # Who lost the reply to a delete, and finds no file, may have deleted it, or
            # another did.
            self.known |= {
                ("done", second, left)
                for first, second, left in self.known
                if first == "FileNotFound"
            }
        if case.operation in ("chunks", "part"):
            self.known |= {
                ("FileChanged", second, left) for _, second, left in self.known
            }


@pytest.mark.parametrize("fault", ["reset before", "reset after", "timeout after"])
@pytest.mark.parametrize("overtaking", OVERTAKING)
@pytest.mark.parametrize(("operation", "present"), CASES)
def test_a_reply_is_lost_and_another_writer_comes_first(
    site: Site,
    direct: FileCache,
    operation: str,
    present: bool,
    overtaking: str,
    fault: str,
) -> None:
    """The other one is done before the sender knows that the reply is lost."""
    case = Case(site, direct, operation, present, "small")
    orders = Orders(case, OVERTAKING[overtaking])
    stride = 1 if LONG else 8 if isinstance(site, Faulty) else 16
    sample = operation, overtaking, fault, type(site).__name__
    for moment in moments(stride, *sample):
        others: list[object] = []

        def overtake(others: list[object] = others) -> None:
            others.append(result(lambda: OVERTAKING[overtaking](direct)))

        outcome = case.attempt((moment, fault), action=overtake)
        if not case.fired:
            break
        [other], now = others, state(direct)
        if outcome in UNAVAILABLE:
            assert (other, now) in orders.unknown
        else:
            assert (outcome, other, now) in orders.known
        case.audit(outcome)
        counts[f"lost replies and another writer, {type(site).__name__}"] += 1
