"""What the torture tests share: their length, what they count, what must hold after each case."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any, Callable, NamedTuple, Optional

import memchunk
from memchunk import FileCache, FileInfo
from tests.support import Memcached

LONG = os.environ.get("TORTURE") == "long"
CHUNK = 100  # bytes per chunk in most tests
LEASE = 100  # seconds, less than any file lives, so that what is on a lease can be told
LATEST = LEASE + 60  # seconds that chunks on a lease may have left: chunks get a little slack
FOREVER = 10**12

counts: Counter[str] = Counter()  # what the terminal summary prints


class State(NamedTuple):
    """What a name stands for: the bytes, or why they can't be had, and when they end."""

    data: object
    ends: Optional[int]  # hundreds of seconds from now, None for never


GONE = State("FileNotFound", None)


def result(call: Callable[[], Any]) -> Any:
    """What a call returns, in a form that can be compared, or the name of the error it raises."""
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


def audit(
    server: Memcached,
    *infos: FileInfo,
    spare: str = "-",
    leased: bool = False,
    exact: bool = False,
) -> None:
    """Nothing is in the cache but these files, what is on a lease, and keys with `spare` in them;
    and the chunks of these files outlive their manifests, or, with `leased`, the lease; with
    `exact`, by the slack and no more."""
    now = time.time()
    for key, end in ((key, end % FOREVER) for key, end in server.expiries().items()):
        owners = [info for info in infos if f":{info.version}:" in key]
        if owners:
            least = now + LEASE - 2 if leased else owners[0].expires or FOREVER - 1
            assert end >= least, f"{key} ends too early"
            assert not exact or end <= least + LATEST - LEASE + 2, f"{key} ends too late"
        elif key.count(":") == 2 and spare not in key:
            assert end <= now + LATEST, f"{key} is an orphan"
