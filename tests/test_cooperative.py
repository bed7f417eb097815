"""mcpool under eventlet and gevent, whose sockets wait by switching threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import FOLDER, WAIT, Start


@pytest.mark.parametrize("unix", [False, True])
@pytest.mark.parametrize("library", ["eventlet", "gevent.monkey"])
def test_cooperative_sockets_carry_large_values(
    start_memcached: Start, library: str, unix: bool
) -> None:
    patch = "monkey_patch" if library == "eventlet" else "patch_all"
    script = f"""
import {library} as library
library.{patch}()
import os, threading, mcpool
pool = mcpool.connect({start_memcached(unix=unix).server!r}, max_connections=2)
def work(number):
    value = os.urandom(1000000)
    pool.set(str(number), value)
    head = b"set p%d 0 0 %d\\r\\n" % (number, len(value))
    assert pool.pipeline([(head, value, b"\\r\\n")] * 3) == [b"STORED"] * 3
    keys = [str(number), "p%d" % number]
    assert pool.get_many(keys) == dict.fromkeys(keys, value)
    done.append(number)
done = []
threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
pool.close()
assert pool.get("1") == pool.get("p1")
assert sorted(done) == [0, 1, 2, 3, 4], done
"""
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=FOLDER, check=True, timeout=WAIT)
