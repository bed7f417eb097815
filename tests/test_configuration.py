"""Settings from the environment, and `python wsgi.py`.

These need `wsgi.Settings` itself, because a bad setting stops the start."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from werkzeug.test import Client

import memchunk
import wsgi
from tests.support import WAIT, Host, Memcached, Server, cases

FIELDS = {
    f"MEMCHUNK_{each.name.upper()}": each for each in dataclasses.fields(wsgi.Settings)
}


VALUES: dict[str, Any] = {
    "SERVERS": "a:1,b:2",
    "NAMESPACE": "n",
    "MAX_SIZE": 1000,
    "EXPIRE": 60,
    "MAX_EXPIRE": 60,
    "TIMEOUT": 0.5,
    "TOKEN": "t",
    "PUBLIC_READ": True,
    "ORIGINS": "https://a.example, http://b.example:81",
    "HOSTS": "files.example, .b.example",
    "PROXIES": 2,
    "MAX_RESPONSE": 500,
}


@pytest.mark.parametrize("name", VALUES)
def test_setting_is_read(name: str) -> None:
    value = VALUES[name]
    text = "1" if value is True else str(value)
    environ = {f"MEMCHUNK_{name}": text, "MEM": "", "OTHER_MEMCHUNK_SETTING": "x"}
    expected = dataclasses.replace(wsgi.Settings(), **{name.lower(): value})
    assert wsgi.Settings.from_environment(environ) == expected


@pytest.mark.parametrize("variable", FIELDS)
def test_setting_may_be_its_default(variable: str) -> None:
    default = FIELDS[variable].default
    text = str(int(default)) if isinstance(default, bool) else str(default)
    environ = {variable: text} if text else {}
    assert wsgi.Settings.from_environment(environ) == wsgi.Settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MEMCHUNK_MAX_SIZE", "50M"),
        ("MEMCHUNK_MAX_SIZE", "0"),
        ("MEMCHUNK_MAX_SIZE", ""),
        ("MEMCHUNK_EXPIRE", "-1"),
        ("MEMCHUNK_TIMEOUT", "nan"),
        ("MEMCHUNK_TIMEOUT", "0"),
        ("MEMCHUNK_MAX_RESPONSE", "1.5"),
        ("MEMCHUNK_MAX_EXPIRE", "-1"),
        ("MEMCHUNK_PROXIES", "-1"),
        ("MEMCHUNK_PUBLIC_READ", "yes"),
        ("MEMCHUNK_ORIGINS", "example.com"),
        ("MEMCHUNK_ORIGINS", "https://example.com/page"),
        ("MEMCHUNK_TOKEN", ""),
        ("MEMCHUNK_TOKEN", "two words"),
        ("MEMCHUNK_TOKEN", "\u00e9"),
        ("MEMCHUNK_TOKEN", ","),
        ("MEMCHUNK_TOKEN", "one,two words"),
        ("MEMCHUNK_HOSTS", ","),
        ("MEMCHUNK_HOSTS", "*"),
        ("MEMCHUNK_HOSTS", "https://files.example"),
        ("MEMCHUNK_HOSTS", "files.example:8000"),
        ("MEMCHUNK_HOSTS", "a.example,b\u00fccher.example"),
        ("MEMCHUNK_NAMESPACE", "two words"),
        ("MEMCHUNK_SERVERS", " "),
        ("MEMCHUNK_SERVERS", ","),
    ],
)
def test_setting_that_is_bad_stops_the_start(variable: str, value: str) -> None:
    with pytest.raises(wsgi.SettingError, match=variable):
        wsgi.Settings.from_environment({variable: value}).connect()


TOKEN_FILES = {
    "missing": None,
    "empty": b"",
    "only commas": b"\n,\n",
    "two words": b"a b",
    "no UTF-8": b"\xff",
    "no ASCII": b"\xc3\xa9",
}


@cases("text", TOKEN_FILES)
def test_token_file_without_a_token_stops_the_start(
    tmp_path: pathlib.Path, text: bytes | None
) -> None:
    file = tmp_path / "tokens"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(wsgi.SettingError, match="MEMCHUNK_TOKEN_FILE"):
        wsgi.Settings.from_environment({"MEMCHUNK_TOKEN_FILE": str(file)})


@pytest.mark.parametrize(("name", "least"), [("MAX_SIZE", "1"), ("TIMEOUT", "0.001")])
def test_setting_below_its_least_is_told_it(name: str, least: str) -> None:
    with pytest.raises(wsgi.SettingError, match=f"must be {least} to "):
        wsgi.Settings.from_environment({f"MEMCHUNK_{name}": "0"})


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("MEMCHUNK_TOKENS", "MEMCHUNK_TOKEN"),
        ("MEMCHUNK_SERVER", "MEMCHUNK_SERVERS"),
        ("MEMCHUNK_MAXSIZE", "MEMCHUNK_MAX_SIZE"),
        ("MEMCHUNK_", "MEMCHUNK_"),
        ("MEMCHUNK_token", "MEMCHUNK_"),
    ],
)
def test_setting_that_is_unknown_stops_the_start(variable: str, nearest: str) -> None:
    expected = f"^{variable} is not a setting; the nearest is {nearest}"
    with pytest.raises(wsgi.SettingError, match=expected):
        wsgi.Settings.from_environment({variable: "x", "PATH": "/bin"})


@pytest.mark.parametrize(
    "servers",
    [
        "user:s3cret@127.0.0.1:1",
        "127.0.0.1:1,user:s3cret@localhost:1",
        "tls://user:s3cret@127.0.0.1:1",
        "user:s3cret@127.0.0.1:port",
        "user:s3,cret@127.0.0.1:1",
        "user:s3cret@127.0.0.1:1,user:s3cret@127.0.0.1:1",
    ],
)
def test_servers_passwords_are_neither_logged_nor_answered(
    servers: str, caplog: Any
) -> None:
    settings = wsgi.Settings.from_environment({"MEMCHUNK_SERVERS": servers})
    told = repr(settings)
    try:
        client = Client(wsgi.Application(settings.connect(), settings))
        answers = [client.get(path) for path in ("/files/a", "/readyz")]
        assert [answer.status_code for answer in answers] == [503, 503]
        for answer in answers:
            told += f"{answer.headers} {answer.text} {caplog.text}"
    except wsgi.SettingError as error:
        told += f"{error!r}"
    assert "cret" not in told


# python wsgi.py

Run = Callable[..., Server]


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Iterator[Run]:
    """Start `python wsgi.py` with the given arguments and environment."""
    started: list[Server] = []

    def start(arguments: str = "", **environ: str) -> Server:
        host = Host("{python} wsgi.py --port {port} " + arguments)
        started.append(Server(host, tmp_path / "log", **environ))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_python_wsgi_py_brings_its_own_memcached(
    run: Run, tmp_path: pathlib.Path, stop: int
) -> None:
    (tmp_path / "folders").mkdir()
    server = run(TMPDIR=str(tmp_path / "folders")).wait()
    assert server.request("PUT", "/files/a", b"x").status == 201
    assert server.request("GET", "/files/a").data == b"x"
    [folder] = (tmp_path / "folders").iterdir()
    assert folder.stat().st_mode & 0o77 == 0
    [path] = folder.iterdir()
    with memchunk.FileCache(f"unix:{path}") as cache:
        cache.ping()
        server.process.send_signal(stop)
        assert server.process.wait(WAIT) == 0
        assert not folder.exists()
        # Its idle connection has ended with it.
        with pytest.raises(memchunk.CacheUnavailable):
            cache.ping()


def test_python_wsgi_py_with_servers(
    run: Run, memcached: Memcached, cache: memchunk.FileCache
) -> None:
    server = run(MEMCHUNK_SERVERS=memcached.server).wait()
    assert server.request("PUT", "/files/a", b"x").status == 201
    assert cache.get("a") == b"x"


def test_python_wsgi_py_without_memcached(run: Run, tmp_path: pathlib.Path) -> None:
    server = run(PATH=str(tmp_path))
    assert server.process.wait(WAIT) == 1
    assert "apt-get install memcached" in server.output()


def test_python_wsgi_py_with_a_bad_setting(run: Run) -> None:
    server = run(MEMCHUNK_MAX_SIZE="50M")
    assert server.process.wait(WAIT) == 1
    told = "wsgi.py: MEMCHUNK_MAX_SIZE must be a number, not '50M'\n"
    assert server.output() == told


@pytest.mark.parametrize(
    ("host", "token", "warns"),
    [
        ("0.0.0.0", {}, True),
        ("0.0.0.0", {"MEMCHUNK_TOKEN": "t"}, False),
        ("127.0.0.1", {}, False),
        ("localhost", {}, False),
    ],
)
def test_python_wsgi_py_warns_if_it_is_open_to_other_machines(
    run: Run, memcached: Memcached, host: str, token: dict[str, str], warns: bool
) -> None:
    environ = {"MEMCHUNK_SERVERS": memcached.server, **token}
    server = run(f"--host {host}", **environ).wait()
    assert "memchunk: http://" in server.output()
    assert ("set MEMCHUNK_TOKEN" in server.output()) == warns
