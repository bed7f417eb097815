"""What is measured: each section yields the figures of one table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Callable

from bench.measure import MIB, Figure, Missing, Options, Task, compare, in_turn, memcached
from bench.peers import BareSocket, Memchunk, Peer, other_version, peers

AIMS = {"set": 1.3, "chunks": 1.2, "get": 1.3}  # multiples of the bare socket's time
WHAT = {"set": "`set` from bytes", "chunks": "`chunks()` drained", "get": "`get` to bytes"}


def task(peer: Peer, verb: str, data: bytes, repeats: int = 1) -> Callable[[], Task]:
    """What `in_turn` takes: one verb of one peer, on one file."""
    operation: Callable[..., object] = getattr(peer, verb)
    arguments = ("file", data) if verb == "set" else ("file",)
    if repeats == 1:
        return lambda: lambda: operation(*arguments)
    return lambda: lambda: [operation(*arguments) for _ in range(repeats)]


def against(options: Options) -> Iterator[Figure]:
    """This memchunk.py beside another one: after and before."""
    assert options.against
    for transport in ("TCP", "Unix socket"):
        with memcached(unix=transport != "TCP") as address:
            now, before = Memchunk(address), Memchunk(address, other_version(options.against))
            for size, repeats in ((options.size, 1), (MIB, 10), (1024, 200)):
                data = bytes(size)
                now.set("file", data)
                for verb in WHAT:
                    tasks = {
                        label: task(peer, verb, data, repeats)
                        for label, peer in (("now", now), ("before", before))
                    }
                    times = in_turn(tasks, options.rounds)
                    what = f"{WHAT[verb]}, {size // 1024} KiB, {transport}"
                    yield compare("against", what, "before", times["now"], times["before"], 1.05)


SECTIONS: dict[str, Callable[[Options], Iterator[Figure]]] = {"against": against}
