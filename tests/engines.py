"""Memcacheds as users run them: behind proxies, in clusters, with TLS, passwords, and
without `stats`. `ENGINES` has a function for each, which starts it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Sequence
from typing import Any, Callable

import pytest
import trustme

import mcpool
from tests.support import Memcached, Proxy, shut, wait_for

ROUTES = """
function mcp_config_pools()
  local servers = {{}}
  for number, port in ipairs({{ {ports} }}) do
    servers[number] = mcp.backend("b" .. number, "127.0.0.1", port)
  end
  return mcp.pool(servers, {{ {options} }})
end

function mcp_config_routes(pool)
  local fgen = mcp.funcgen_new()
  local handle = fgen:new_handle(pool)
  fgen:ready({{ f = function(rctx)
    return function(r) return rctx:enqueue_and_wait(r, handle) end
  end }})
  mcp.attach(mcp.CMD_ANY_STORAGE, fgen)
end
"""
TAGS = 'filter = "tags", filter_conf = "{}"'


@dataclasses.dataclass
class Engine:
    """Where clients connect, and the processes behind it."""

    server: str | list[str]
    memcacheds: list[Memcached]
    tls: ssl.SSLContext | None = None
    frozen: str = ""  # the address of the server that does not answer
    is_stock: bool = False  # clients are pymemcache's

    def client(self) -> Any:
        if self.is_stock:
            return self.server
        return mcpool.connect(self.server, tls=self.tls)


class Lab:
    """Starts processes in a folder; `close` ends them."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.stack, self._count = folder, contextlib.ExitStack(), 0

    def path(self, name: str) -> pathlib.Path:
        """A new file's."""
        self._count += 1
        return self.folder / f"{self._count}-{name}"

    def memcached(self, *options: str, **more: Any) -> Memcached:
        return self._start(Memcached, *options, **more)

    def newer(self, *options: str) -> Memcached:
        return self._start(Newer, *options)

    def _start(self, kind: type[Memcached], *options: str, **more: Any) -> Memcached:
        folder = self.path("memcached")
        folder.mkdir()
        memcached = kind(folder, *options, **more)
        self.stack.callback(memcached.kill)
        return memcached

    def memcacheds(self, count: int, memory: str = "128") -> list[Memcached]:
        return [self.memcached("-m", memory) for _ in range(count)]

    def twemproxy(self, memcacheds: Sequence[Memcached], tag: str = "") -> str:
        """Its address. Servers are hashed by names, so that keys are where they are in
        every run."""
        program = shutil.which("nutcracker", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            pytest.fail("these tests need twemproxy: 'apt-get install nutcracker'")
        port, statistics = free_ports(2)
        lines = ["memchunk:", f"  listen: 127.0.0.1:{port}", "  hash: fnv1a_64"]
        lines += ["  distribution: ketama", "  auto_eject_hosts: false"]
        lines += ["  timeout: 2000"]
        lines += [f'  hash_tag: "{tag}"'] if tag else []
        lines += ["  servers:"]
        for number, memcached in enumerate(memcacheds):
            lines += [f"   - {memcached.server}:1 n{number}"]
        file, log = self.path("twemproxy.yml"), self.path("twemproxy.log")
        file.write_text("\n".join(lines) + "\n")
        command = [program, "-c", str(file), "-o", str(log), "-s", str(statistics)]
        process = subprocess.Popen(command)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        wait_for(lambda: listens(port), "twemproxy to listen")
        return f"127.0.0.1:{port}"

    def proxy(self, memcacheds: Sequence[Memcached], options: str = "") -> str:
        """The address of memcached's own proxy."""
        ports = ", ".join(each.server.split(":")[1] for each in memcacheds)
        file = self.path("proxy.lua")
        file.write_text(ROUTES.format(ports=ports, options=options))
        return self.newer("-o", f"proxy_config={file}").server

    def without_stats(self, memcached: Memcached, answer: bytes) -> str:
        """The address of a filter that says `answer` to `stats`, or closes."""
        proxy = Filter(int(memcached.server.split(":")[1]), answer)
        self.stack.callback(proxy.close)
        return f"127.0.0.1:{proxy.port}"

    def close(self) -> None:
        self.stack.close()


class Newer(Memcached):
    """A newer memcached than the one on PATH, with `--enable-proxy`."""

    def start(self) -> None:
        self._program = os.environ["MEMCACHED_PROXY"]
        super().start()


class Filter(Proxy):
    """Passes all on but `stats`. `answer` is the reply to it; b"" closes."""

    def __init__(self, port: int, answer: bytes) -> None:
        self.answer = answer
        super().__init__(port)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if not data.startswith(b"stats"):
                    server.sendall(data)
                elif self.answer:
                    client.sendall(self.answer)
                else:
                    break
        shut(client, server)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def options_of(text: str) -> list[str]:
    """Options of memcached in a text with `slab_chunk_max` in KiB. memcached takes it
    in bytes up to 1.6.23."""
    said = subprocess.run(["memcached", "-V"], capture_output=True, check=True).stdout
    version = tuple(map(int, re.findall(rb"\d+", said)[:3]))
    unit = 1 if version >= (1, 6, 24) else 1024
    pattern = r"(?<=slab_chunk_max=)\d+"
    return re.sub(pattern, lambda kib: str(int(kib[0]) * unit), text).split()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


def behind_twemproxy(lab: Lab, tag: str = "") -> Engine:
    memcacheds = lab.memcacheds(3)
    return Engine(lab.twemproxy(memcacheds, tag), memcacheds)


def behind_proxy(lab: Lab, options: str = "") -> Engine:
    memcacheds = lab.memcacheds(3)
    return Engine(lab.proxy(memcacheds, options), memcacheds)


def ten(lab: Lab) -> Engine:
    """Ten servers, of which one is frozen."""
    memcacheds = lab.memcacheds(10)
    memcacheds[3].pause()
    servers = [each.server for each in memcacheds]
    return Engine(servers, memcacheds, frozen=servers[3])


def tls(lab: Lab) -> Engine:
    """A server that wants a certificate of its clients."""
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    authority.issue_cert("client").configure_cert(context)
    certificate, folder = authority.issue_cert("localhost"), lab.folder
    certificate.private_key_pem.write_to_path(str(folder / "key"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "chain"))
    authority.cert_pem.write_to_path(str(folder / "ca"))
    options = f"ssl_chain_cert={folder}/chain,ssl_key={folder}/key"
    options += f",ssl_ca_cert={folder}/ca,ssl_verify_mode=2"
    memcached = lab.memcached("-m", "128", "-Z", "-o", options, tls=context)
    port = memcached.server.split(":")[1]
    return Engine(f"tls://localhost:{port}", [memcached], context)


def login(lab: Lab) -> Engine:
    passwords = lab.path("passwords")
    passwords.write_text("user:secret\n")
    memcached = lab.memcached("-m", "128", "-Y", str(passwords))
    return Engine(f"user:secret@{memcached.server}", [memcached])


def without_stats(lab: Lab, answer: bytes) -> Engine:
    memcached = lab.memcached("-m", "128")
    return Engine(lab.without_stats(memcached, answer), [memcached])


def stock(engine: Engine) -> Engine:
    return dataclasses.replace(engine, is_stock=True)


ENGINES: dict[str, Callable[[Lab], Engine]] = {
    "twemproxy": behind_twemproxy,
    "twemproxy with tags": lambda lab: behind_twemproxy(lab, "{}"),
    "ten servers": ten,
    "tls": tls,
    "login": login,
    "ERROR to stats": lambda lab: without_stats(lab, b"ERROR\r\n"),
    "closed by stats": lambda lab: without_stats(lab, b""),
    "twemproxy, pymemcache": lambda lab: stock(behind_twemproxy(lab, "{}")),
    "closed by stats, pymemcache": lambda lab: stock(without_stats(lab, b"")),
}
if "MEMCACHED_PROXY" in os.environ:
    ENGINES["proxy"] = behind_proxy
    ENGINES["proxy with tags"] = lambda lab: behind_proxy(lab, TAGS)
