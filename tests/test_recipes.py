"""The files of docs/recipes/, and the tables and snippets of docs/deployment.md,
docs/scale.md and docs/api.md that tests/test_docs.py does not run."""

from __future__ import annotations

import configparser
import contextlib
import functools
import http.client
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import mcpool
import memchunk
from memchunk import FileCache
from tests.engines import free_ports
from tests.support import (
    FOLDER,
    MIB,
    Host,
    Memcached,
    Server,
    opened,
    snippet,
    wait_for,
)

yaml: Any = importlib.import_module("yaml")  # it has no annotations
RECIPES = FOLDER / "docs" / "recipes"
PROGRAM = str(pathlib.Path(sys.executable).with_name("gunicorn"))
DATA = os.urandom(3 * MIB)


@pytest.fixture
def copied(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with the files that docs/deployment.md says to copy."""
    text = (FOLDER / "docs/deployment.md").read_text()
    [sentence] = re.findall(r"^Copy (.*?)one folder\.$", text, re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([\w.]+)`", sentence):
        if (FOLDER / name).exists():
            shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


@contextlib.contextmanager
def serving(
    command: str, memcached: Memcached, folder: pathlib.Path, **environ: str
) -> Iterator[Server]:
    """A recipe's command, on a free port, in a folder with copies of the files."""
    assert command.count(":8000") == 1
    command = re.sub(r"\S+:8000", "127.0.0.1:{port}", command)
    if "MEMCHUNK_SERVERS" in environ:
        environ["MEMCHUNK_SERVERS"] = memcached.server
    host = Host(f"{PROGRAM} {command.rpartition('gunicorn ')[2]} --chdir {folder}")
    server = Server(host, folder / "log", PYTHONPATH=str(folder), **environ)
    try:
        yield server.wait()
    finally:
        server.stop()


def assert_it_keeps_files(server: Server) -> None:
    assert server.request("PUT", "/files/a", DATA).status == 201
    assert server.request("GET", "/files/a").data == DATA
    assert server.request("GET", "/readyz").status == 200


def yamls(name: str) -> list[Any]:
    return list(yaml.safe_load_all((RECIPES / name).read_text()))


# --- systemd --------------------------------------------------------------------------


class Unit(configparser.RawConfigParser):
    """A unit, whose names have capitals, and come more than once."""

    def __init__(self) -> None:
        super().__init__(strict=False)
        self.read_string((RECIPES / "memchunk.service").read_text())

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def test_the_unit_starts_the_api(memcached: Memcached, copied: pathlib.Path) -> None:
    text = (RECIPES / "memchunk.service").read_text()
    pairs = re.findall("^Environment=(.*?)=(.*)$", text, re.MULTILINE)
    command = Unit()["Service"]["ExecStart"]
    with serving(command, memcached, copied, **dict(pairs)) as server:
        assert_it_keeps_files(server)


def test_the_unit_is_one_that_systemd_takes(tmp_path: pathlib.Path) -> None:
    unit, program = Unit(), "/opt/memchunk/venv/bin/gunicorn"
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert unit["Service"]["ExecStart"].split()[0] == program
    analyze = shutil.which("systemd-analyze")
    if analyze:
        text = (RECIPES / "memchunk.service").read_text()
        file = tmp_path / "memchunk.service"
        file.write_text(text.replace(program, PROGRAM))
        command = [analyze, "verify", "--man=no", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "memchunk.service" in done.stderr) == (0, False)


# --- Containers -----------------------------------------------------------------------


def test_the_containers_commands_start_the_api(
    memcached: Memcached, copied: pathlib.Path
) -> None:
    services = yamls("compose.yaml")[0]["services"]
    *_, line = services["api"]["command"]
    environ = services["api"]["environment"]
    assert environ["MEMCHUNK_SERVERS"] == "memcached:11211"  # the service's name
    with serving(line, memcached, copied, **environ) as server:
        assert_it_keeps_files(server)
        check = services["api"]["healthcheck"]["test"][3]
        check = check.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        subprocess.run([sys.executable, "-c", check], check=True)


def test_memcacheds_of_containers_take_their_options(start_memcached: Any) -> None:
    _, stateful, *_ = yamls("kubernetes.yaml")
    [container] = stateful["spec"]["template"]["spec"]["containers"]
    command = yamls("compose.yaml")[0]["services"]["memcached"]["command"]
    for options in (container["args"], command[1:]):
        with FileCache(start_memcached(*options).server) as cache:
            cache.set("file", DATA)
            assert cache.get("file") == DATA


def test_kubernetes_names_every_memcached(
    memcached: Memcached, copied: pathlib.Path
) -> None:
    headless, stateful, deployment, service = yamls("kubernetes.yaml")
    pod, name = deployment["spec"]["template"]["spec"], headless["metadata"]["name"]
    assert headless["spec"]["clusterIP"] == "None"
    assert stateful["spec"]["serviceName"] == name
    environ = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert environ["MEMCHUNK_SERVERS"].split(",") == [
        f"{stateful['metadata']['name']}-{number}.{name}:11211"
        for number in range(stateful["spec"]["replicas"])
    ]
    assert pod["enableServiceLinks"] is False
    assert service["spec"]["ports"][0]["targetPort"] == 8000
    [container] = pod["containers"]
    with serving(container["command"][-1], memcached, copied, **environ) as server:
        assert_it_keeps_files(server)
        for kind, path in (("liveness", "/healthz"), ("readiness", "/readyz")):
            assert container[f"{kind}Probe"]["httpGet"]["path"] == path
            assert server.request("GET", path).status == 200
        memcached.kill()
        statuses = [server.request("GET", p).status for p in ("/healthz", "/readyz")]
        assert statuses == [200, 503]


def test_a_configmap_holds_the_files(copied: pathlib.Path) -> None:
    """Kubernetes bounds it to 1 MiB."""
    text = (RECIPES / "kubernetes.yaml").read_text()
    named = set(re.findall(r"--from-file=(\S+)", text))
    files = {file.name: file.stat().st_size for file in copied.iterdir()}
    assert set(files) <= named
    assert sum(files.values()) < MIB


# --- Proxies --------------------------------------------------------------------------


@contextlib.contextmanager
def proxied(command: list[str], port: int, folder: pathlib.Path) -> Iterator[None]:
    folders = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(folder))
    process = subprocess.Popen(command, env={**os.environ, **folders})
    try:
        wait_for(lambda: process.poll() is not None or answers(port), "the proxy")
        assert process.poll() is None
        yield
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask(port, "GET", "/healthz")[0] == 200
    return False


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"X-Forwarded-Prefix": "/evil"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def assert_it_passes_files_on(port: int) -> None:
    status, info = ask(port, "POST", "/files", DATA)
    assert (status, b"/evil" in info) == (201, False)
    assert ask(port, "GET", json.loads(info)["url"]) == (200, DATA)


def test_nginx_of_the_containers_passes_files_on(
    memcached: Memcached, copied: pathlib.Path
) -> None:
    services = yamls("compose.yaml")[0]["services"]
    *_, line = services["api"]["command"]
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "these tests need nginx: 'apt-get install nginx-light'"
    [port] = free_ports(1)
    with serving(line, memcached, copied, **services["api"]["environment"]) as server:
        text = (RECIPES / "nginx.conf").read_text()
        text = text.replace("listen 80;", f"listen 127.0.0.1:{port};")
        text = text.replace("http://api:8000", server.url(""))
        user = "user root;" if os.geteuid() == 0 else ""
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {copied}/{kind};" for kind in kinds)
        head = f"{user} daemon off; pid {copied}/pid; events {{}}"
        file = copied / "all.conf"
        file.write_text(f"{head} http {{ access_log off; {paths}\n{text} }}")
        command = [program, "-e", f"{copied}/error.log", "-c", str(file)]
        subprocess.run([*command, "-t", "-q"], check=True)
        with proxied(command, port, copied):
            assert_it_passes_files_on(port)


if shutil.which("caddy"):  # not every distribution has it

    def test_caddy_passes_files_on(memcached: Memcached, copied: pathlib.Path) -> None:
        command = "gunicorn --threads 8 -b 127.0.0.1:8000 wsgi:application"
        environ = {"MEMCHUNK_SERVERS": "", "MEMCHUNK_PROXIES": "1"}
        [port] = free_ports(1)
        with serving(command, memcached, copied, **environ) as server:
            text = (RECIPES / "Caddyfile").read_text()
            text = text.replace("files.example.com", f"http://127.0.0.1:{port}")
            text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
            file = copied / "Caddyfile"
            file.write_text("{\n\tadmin off\n}\n" + text)
            options = ["--config", str(file), "--adapter", "caddyfile"]
            with proxied(["caddy", "run", *options], port, copied):
                assert_it_passes_files_on(port)


# --- Snippets and tables --------------------------------------------------------------


def test_a_files_keys_are_found_by_hand(memcached: Memcached) -> None:
    with FileCache(memcached.server) as cache:
        info = cache.set("report.pdf", DATA)
    text = snippet("docs/deployment.md", "keys")
    text = text.replace("127.0.0.1:11211", memcached.server)
    environ = {**os.environ, "PYTHONPATH": str(FOLDER)}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, env=environ, capture_output=True, check=True)
    shown = done.stdout.decode().split()
    assert shown[0] == memcached.server
    assert sorted(shown[1:]) == memcached.keys()
    assert len(shown) == 2 + info.chunks
    line = snippet("docs/deployment.md", "key").removeprefix("$ ")
    key = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert key.stdout.decode().strip() == shown[1]


def rows(document: str, mark: str) -> dict[str, list[str]]:
    """The table behind a mark: first cell -> the others."""
    text = (FOLDER / document).read_text().partition(f"<!-- {mark} -->\n")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells
    return {first: rest for first, *rest in cells}


def test_round_trips_are_as_the_table_says(
    large_memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    call: Any = mcpool.ServerPool._call

    def counted(pool: Any, command: str, *args: Any, **options: Any) -> Any:
        calls.append(command)
        return call(pool, command, *args, **options)

    monkeypatch.setattr(mcpool.ServerPool, "_call", counted)
    table = rows("docs/scale.md", "round-trips")
    for column, size in enumerate((1000, 2 * MIB, 20_000_000, 50 * MIB)):
        with FileCache(mcpool.connect(large_memcached.server)) as files:
            files.set("other", b"")  # asks for `stats settings`, once
            for verb, work in verbs(files, bytes(size)).items():
                calls.clear()
                work()
                assert (verb, str(len(calls))) == (verb, table[verb][column])
            files.delete("file")


def verbs(files: FileCache, data: bytes) -> dict[str, Any]:
    def cas() -> None:
        files.cas("file", data, version[0])

    version: list[str] = []
    return {
        "`add`, or `set` of a new file": lambda: files.add("file", data),
        "`set` of an old one": lambda: files.set("file", data),
        "`stat`": lambda: version.append(files.stat("file").version),
        "`cas`": cas,
        "`get`": lambda: files.get("file"),
        "`open` and a range in one chunk": lambda: [*files.open("file").chunks(0, 9)],
        "`in`": lambda: "file" in files,
        "`touch`": lambda: files.touch("file", 1000),
        "`delete`": lambda: files.delete("file"),
        "`get_or_set` that stores": lambda: files.get_or_set("file", lambda: data),
    }


@pytest.mark.parametrize("count", [3, 10])
def test_a_new_server_takes_its_share_and_no_more(count: int) -> None:
    told = float(rows("docs/scale.md", "moved")[f"{count} → {count + 1}"][0].split()[0])
    servers = [f"10.0.0.{number}:11211" for number in range(count + 1)]
    old, new = mcpool.connect(servers[:-1]), mcpool.connect(servers)
    keys = [f"memchunk2:{{{number}}}" for number in range(10_000)]
    moved = [key for key in keys if server(old, key) != server(new, key)]
    assert {server(new, key) for key in moved} == {servers[-1]}
    assert abs(100 * len(moved) / len(keys) - told) < 1


def server(pool: Any, key: str) -> str:
    name: str = pool.for_key(key).server
    return name


# --- Applications ---------------------------------------------------------------------


def test_the_recipe_for_applications_computes_once(memcached: Memcached) -> None:
    scope = application(memcached.server)
    made: list[str] = []
    scope["compute"] = functools.partial(compute, made)
    table = scope["table"]("2026-01")
    assert len(table) > 30_000_000
    assert scope["table"]("2026-01") == table
    assert made == ["2026-01"]


def test_the_recipe_for_applications_works_without_memcached(
    memcached: Memcached,
) -> None:
    scope = application(memcached.server)
    made: list[str] = []
    scope["compute"] = functools.partial(compute, made)
    memcached.kill()
    assert scope["table"]("2026-01") == scope["table"]("2026-01")
    assert len(made) == 2


def test_errors_that_applications_see_are_those_of_the_recipe(
    memcached: Memcached,
) -> None:
    scope = application(memcached.server)
    scope["compute"] = lambda month: bytes(60 * MIB)
    with pytest.raises(memchunk.FileTooLarge):
        scope["table"]("2026-01")
    scope["compute"] = lambda month: 1 // 0
    with pytest.raises(ZeroDivisionError):
        scope["table"]("2026-02")
    with pytest.raises(memchunk.InvalidName):
        scope["table"]("x" * 2000)
    with FileCache(memcached.server) as cache:
        cache.set("table-2026-03", b"no pickle")
    with pytest.raises(scope["pickle"].UnpicklingError):
        scope["table"]("2026-03")


def application(address: str) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    text = snippet("docs/api.md", "get-or-compute")
    exec(text.replace("127.0.0.1:11211", address), scope)
    for framework in ("flask", "django"):
        compile(snippet("docs/api.md", framework), framework, "exec")
    opened.append(scope["cache"])
    return scope


def compute(made: list[str], month: str) -> bytes:
    made.append(month)
    return bytes(30_000_001)
