"""The settings: those that the README lists are those in `wsgi.py`; what each one of
the cache does, with real servers; and no secret in a log or an error."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import trustme

import memchunk
import wsgi
from tests.support import FOLDER, Memcached, Start, opened

ROW = re.compile(r"\| `(MEMCHUNK_\w+)` \| (.*?) \| (.*?) \| .+ \|")


def connect(**environ: str) -> Any:
    variables = {f"MEMCHUNK_{name.upper()}": value for name, value in environ.items()}
    cache = wsgi.Settings.from_environment(variables).connect()
    opened.append(cache)
    return cache


def in_words(field: dataclasses.Field[Any]) -> tuple[str, str]:
    """Default and bounds, as the README writes them."""
    if isinstance(field.default, str):
        return f"`{field.default}`" if field.default else "none", "text"
    least, most = field.metadata["least"], field.metadata["most"]
    return f"`{field.default:.8g}`", f"{least} to {most}"


def test_the_readme_lists_all_settings_with_defaults_and_bounds() -> None:
    rows = ROW.findall((FOLDER / "README.md").read_text())
    listed = {name: (default, bounds) for name, default, bounds in rows}
    fields = dataclasses.fields(wsgi.Settings)
    known = {f"MEMCHUNK_{field.name.upper()}": in_words(field) for field in fields}
    assert len(rows) == len(listed)
    assert listed == known


NUMBERS = [
    field
    for field in dataclasses.fields(wsgi.Settings)
    if not isinstance(field.default, str)
]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_bounds_are_inclusive(field: dataclasses.Field[Any]) -> None:
    least, most = field.metadata["least"], field.metadata["most"]
    variable = f"MEMCHUNK_{field.name.upper()}"
    for value in (least, most):
        settings = wsgi.Settings.from_environment({variable: str(value)})
        assert getattr(settings, field.name) == value
    for value in (least - 1, most + 1, "1e3x"):
        with pytest.raises(wsgi.SettingError, match=f"^{variable} "):
            wsgi.Settings.from_environment({variable: str(value)})


def test_chunk_size_cuts_files(memcached: Memcached) -> None:
    cache = connect(servers=memcached.server, chunk_size="1000")
    assert cache.set("a", bytes(10_000)).chunks == 10
    cache = connect(servers=memcached.server, chunk_size="0")
    assert cache.set("a", bytes(1_000_000)).chunks == 2  # the best for the server


@pytest.mark.parametrize("most", [1, 2])
def test_max_connections_bounds_them(memcached: Memcached, most: int) -> None:
    options = {"servers": memcached.server, "timeout": "0.2"}
    client = connect(**options, max_connections=str(most)).client

    def commands() -> Iterator[list[bytes]]:
        client.get("a")  # while the pipeline has a connection
        yield [b"touch a 0\r\n"]

    if most == 2:
        assert client.pipeline(commands()) == [b"NOT_FOUND"]
        return
    with pytest.raises(TimeoutError, match="max_connections is 1"):
        client.pipeline(commands())


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: pathlib.Path) -> dict[str, str]:
    """Settings that trust the authority and show a certificate of it."""
    ours = authority.issue_cert("client.example")
    names = {name: str(tmp_path / name) for name in ("tls_ca", "tls_cert", "tls_key")}
    authority.cert_pem.write_to_path(names["tls_ca"])
    ours.cert_chain_pems[0].write_to_path(names["tls_cert"])
    ours.private_key_pem.write_to_path(names["tls_key"])
    return names


@pytest.fixture
def start_tls(
    start_memcached: Start,
    authority: trustme.CA,
    files: dict[str, str],
    tmp_path: pathlib.Path,
) -> Any:
    """Start a memcached that speaks TLS, and asks for a certificate if told so."""

    def start(*options: str) -> str:
        certificate = authority.issue_cert("localhost")
        certificate.private_key_pem.write_to_path(str(tmp_path / "key"))
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "chain"))
        paths = f"ssl_chain_cert={tmp_path / 'chain'},ssl_key={tmp_path / 'key'}"
        context = ssl.create_default_context(cafile=files["tls_ca"])
        context.load_cert_chain(files["tls_cert"], files["tls_key"])
        told = ",".join([paths, *options])
        server = start_memcached("-Z", "-o", told, tls=context).server
        return server.replace("127.0.0.1", "localhost")

    return start


def works(cache: Any) -> bool:
    data = bytes(range(256)) * 1000
    cache.set("a", data)
    return bool(cache.get("a") == data)


def test_tls_ca_is_trusted(start_tls: Any, files: dict[str, str]) -> None:
    server = start_tls()
    assert works(connect(servers=server, tls_ca=files["tls_ca"]))
    with pytest.raises(Exception, match="certificate verify failed"):
        connect(servers=f"tls://{server}").get("a")


def test_tls_cert_is_shown_to_a_server_that_asks_for_it(
    start_tls: Any, files: dict[str, str], tmp_path: pathlib.Path
) -> None:
    server = start_tls("ssl_verify_mode=2", f"ssl_ca_cert={files['tls_ca']}")
    assert works(connect(servers=server, **files))
    both = tmp_path / "both"
    both.write_text(
        "".join(
            pathlib.Path(files[f"tls_{each}"]).read_text() for each in ("cert", "key")
        )
    )
    assert works(connect(servers=server, tls_ca=files["tls_ca"], tls_cert=str(both)))
    with pytest.raises(memchunk.CacheUnavailable):
        connect(servers=server, tls_ca=files["tls_ca"]).get("a")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tls_ca": "/nowhere"}, "MEMCHUNK_TLS_CA"),
        ({"tls_ca": __file__}, "MEMCHUNK_TLS_CA"),
        ({"tls_cert": "/nowhere"}, "MEMCHUNK_TLS_CERT"),
        ({"tls_cert": __file__}, "MEMCHUNK_TLS_CERT"),
        ({"tls_key": __file__}, "MEMCHUNK_TLS_KEY"),
    ],
)
def test_tls_files_that_are_none_stop_the_start(
    given: dict[str, str], named: str
) -> None:
    with pytest.raises(wsgi.SettingError, match=named):
        connect(**given)


def test_tls_key_of_another_certificate_stops_the_start(
    files: dict[str, str], authority: trustme.CA, tmp_path: pathlib.Path
) -> None:
    authority.issue_cert("x").private_key_pem.write_to_path(str(tmp_path / "other"))
    with pytest.raises(wsgi.SettingError, match="MEMCHUNK_TLS_KEY"):
        connect(**{**files, "tls_key": str(tmp_path / "other")})


@pytest.mark.parametrize(
    "environ",
    [
        {"servers": "user:s3cret@localhost:port"},
        {"servers": "user:s3cret@localhost:1", "tls_ca": "/nowhere"},
        {"servers": "user:s3cret@localhost:1", "namespace": "two words"},
        {"servers": "user:s3cret@localhost:1", "token": "s3cret s3cret"},
    ],
)
def test_errors_show_no_secret(environ: dict[str, str]) -> None:
    with pytest.raises(wsgi.SettingError) as caught:
        connect(**environ)
    assert "s3cret" not in repr(caught.value)
