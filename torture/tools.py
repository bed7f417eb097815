"""What the torture tests share: their length, what they count, and what must hold after
each case."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any, Callable, NamedTuple, Optional

import mcpool
import memchunk
from memchunk import FileCache, FileInfo
from tests.support import Memcached

LONG = os.environ.get("TORTURE") == "long"
CHUNK = 100  # bytes per chunk in most tests; so files of up to 6 bytes have none
LEASE = 100  # seconds, less than any file lives, so that what is on a lease can be told
LATEST = LEASE + 60  # chunks live longer than their manifest by this slack
FOREVER = 10**12

counts: Counter[str] = Counter()  # what the terminal summary prints


def connected(server: Memcached, timeout: float = 10, **options: Any) -> FileCache:
    """A cache over mcpool."""
    return FileCache(mcpool.connect(server.server, timeout=timeout), **options)


class State(NamedTuple):
    """What a name stands for: bytes, or why they can't be had; and when they end."""

    data: object
    ends: Optional[int]  # hundreds of seconds from now, None for never


GONE = State("FileNotFound", None)


def result(call: Callable[[], Any]) -> Any:
    """What a call returns, in a form that can be compared, or the name of the error
    that it raises."""
    try:
        returned = call()
    except memchunk.MemchunkError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return next(kind for kind in kinds if not kind.startswith("_"))
    return "done" if returned is None or isinstance(returned, FileInfo) else returned


def state(cache: FileCache, name: str = "file") -> State:
    data = result(lambda: cache.get(name))
    if data == GONE.data:
        return GONE
    expires = cache.stat(name).expires
    return State(data, expires and round((expires - time.time()) / 100))


def segment_of(key: str) -> str:
    """The segment of a chunk's key; "" of other keys."""
    return key.partition("|#|")[2].partition(":")[0]


def audit(
    server: Memcached,
    *infos: FileInfo,
    parts: tuple[str, ...] = (),
    spare: str = "-",
    leased: bool = False,
    exact: bool = False,
) -> None:
    """Nothing is in the cache but these files, what is on a lease, keys with `spare` in
    them, and `parts`, which may lie anywhere. The chunks of these files outlive their
    manifests, or, with `leased`, the lease; with `exact`, by the slack and no more."""
    now = time.time()
    kept = {part.partition(":")[0] for part in parts}
    ends = {key: end % FOREVER for key, end in server.expiries().items()}
    for key, end in ends.items():
        owners = [info for info in infos if info.version == segment_of(key)]
        if owners:
            least = now + LEASE - 2 if leased else owners[0].expires or FOREVER - 1
            assert end >= least, f"{key} ends too early"
            most = least + LATEST - LEASE + 2
            assert not exact or end <= most, f"{key} ends too late"
        elif segment_of(key) and spare not in key and segment_of(key) not in kept:
            assert end <= now + LATEST, f"{key} is an orphan"
