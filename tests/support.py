"""What the tests share: real memcached processes, each on a port of its own."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import time
from typing import Callable
from urllib.parse import unquote

import pytest

import memchunk

WAIT = 120  # seconds for what takes a moment on any machine that is not stuck
INSTALL = "'apt-get install memcached', 'dnf install memcached' or 'brew install memcached'"

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Memcached:
    """A memcached process that a test owns, may damage, stop and kill.

    `server` is its address in the form that `memchunk.connect` takes. `unix=True` listens on a
    Unix socket instead of a free TCP port of the loopback interface.
    """

    def __init__(
        self, folder: pathlib.Path, *options: str, unix: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        program = shutil.which("memcached")
        if program is None:
            pytest.fail(f"these tests need memcached: {INSTALL}")
        self._options = options
        self._tls = tls  # for a server whose options make it speak nothing else
        self._program = program
        self._unix = str(folder / "memcached.sock") if unix else None
        self._port_file = folder / "port"
        self._port = -1  # memcached takes -1 for "any free port" and writes it to the port file
        self.start()

    def start(self) -> None:
        """Start the process, after `kill` on the same address, and wait until it answers."""
        listen = ["-s", self._unix] if self._unix else ["-l", "127.0.0.1", "-p", str(self._port)]
        self._port_file.unlink(missing_ok=True)
        user = ["-u", "root"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [self._program, *listen, "-U", "0", *user, *self._options],
            env={**os.environ, "MEMCACHED_PORT_FILENAME": str(self._port_file)},
        )
        wait_for(self._answers, "memcached to listen")

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"memcached ended with status {self.process.returncode}")
        if not self._unix:
            if not self._port_file.exists():
                return False
            self._port = int(self._port_file.read_text().split(":")[1].split()[0])
        try:
            return bool(self.command("version"))
        except OSError:
            return False

    @property
    def server(self) -> str:
        return f"unix:{self._unix}" if self._unix else f"127.0.0.1:{self._port}"

    @property
    def address(self) -> str | tuple[str, int]:
        return self._unix or ("127.0.0.1", self._port)

    def connection(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX if self._unix else socket.AF_INET)
        connection.settimeout(10)
        try:
            connection.connect(self.address)
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_hostname="localhost")
        except OSError:
            connection.close()
            raise
        return connection

    def command(
        self, line: str, value: bytes | None = None, until: bytes | tuple[bytes, ...] = b"\r\n"
    ) -> bytes:
        """Send one raw command; return the reply up to and including `until`, or one of them."""
        with self.connection() as connection:
            payload = b"" if value is None else value + b"\r\n"
            connection.sendall(line.encode() + b"\r\n" + payload)
            reply = b""
            while not reply.endswith(until):
                piece = connection.recv(1 << 20)
                if not piece:
                    break
                reply += piece
            return reply

    def _items(self) -> list[list[str]]:
        """The fields `key=...`, `exp=...` and so on of all items, neither expired nor deleted."""
        dump = b"BUSY"
        while dump.startswith(b"BUSY"):  # memcached has one crawler, and may be at work with it
            # "all" would walk the LRU lists, and miss items that memcached moves between them.
            dump = self.command("lru_crawler metadump hash", until=(b"END\r\n", b"request\r\n"))
        lines = dump.decode().splitlines()
        return [line.split() for line in lines if line.startswith("key=")]

    def keys(self) -> list[str]:
        """The keys of all items that are neither expired nor deleted, sorted."""
        return sorted(unquote(key[4:]) for key, *_ in self._items())

    def expiries(self) -> dict[str, int]:
        """Key -> the Unix time at which the item expires, -1 for never."""
        return {unquote(key[4:]): int(exp[4:]) for key, exp, *_ in self._items()}

    def read(self, key: str) -> bytes:
        """The raw value of an item that must be there."""
        reply = self.command(f"get {key}", until=b"END\r\n")
        head, _, rest = reply.partition(b"\r\n")
        assert head.startswith(b"VALUE"), f"no item at {key}"
        return rest[: int(head.split()[3])]

    def write(self, key: str, value: bytes) -> None:
        """Overwrite an item with a raw value, behind the library's back."""
        assert self.command(f"set {key} 0 0 {len(value)}", value) == b"STORED\r\n"

    def delete(self, key: str) -> None:
        assert self.command(f"delete {key}") == b"DELETED\r\n"

    def flush(self) -> None:
        """Drop all items at once."""
        assert self.command("flush_all") == b"OK\r\n"

    def fill(self, count: int, size: int) -> None:
        """Store `count` items of `size` bytes, as other users of the cache would."""
        with self.connection() as connection:
            for index in range(count):
                head = f"set other:{index} 0 0 {size} noreply\r\n".encode()
                connection.sendall(head + bytes(size) + b"\r\n")
            connection.sendall(b"version\r\n")
            connection.recv(100)

    def stats(self, what: str = "") -> dict[str, str]:
        reply = self.command(f"stats {what}".strip(), until=b"END\r\n").decode()
        lines = [line.split(" ", 2) for line in reply.splitlines()]
        return {name: value for _, name, value in (line for line in lines if line[0] == "STAT")}

    def pause(self) -> None:
        """SIGSTOP: connections are accepted by the kernel and never answered."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until all of its threads have stopped

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would."""
        self.process.kill()
        self.process.wait()
        if self._unix:
            pathlib.Path(self._unix).unlink(missing_ok=True)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Return as soon as `condition()` is true; fail with `what` where it won't be."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {WAIT} seconds in vain for {what}")
        time.sleep(0.005)


opened: list[memchunk.FileCache] = []  # those that the end of a test closes

Start = Callable[..., Memcached]
