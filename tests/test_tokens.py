"""Tokens: those that are sent, several, and those in a file."""

from __future__ import annotations

import base64
import hmac
from typing import Any

import pytest

from tests.support import BROWSER, Memcached, bearer, is_problem, make


def basic(user: str, token: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()


NONE = (
    *("", "Bearer", "Bearer wrong", "Bearer s3cret2", "Bearer \xff", "s3cret", "\xff"),
    *("Basic", "Basic =", "Basic \xe9", "Basic /w==", "Basic s3cret"),
    *(basic("s3cret", ""), "Digest username=a", "Digest \xff"),
)


@pytest.mark.parametrize("value", NONE)
def test_token_that_is_none(memcached: Memcached, value: str) -> None:
    headers = {"Authorization": value}
    client = make(memcached, token="s3cret")
    refused = client.get("/files/a", headers=headers)
    is_problem(refused, 401)
    assert refused.headers["WWW-Authenticate"] == 'Bearer realm="memchunk"'
    # Nor does it harm if none is wanted.
    is_problem(make(memcached).get("/files/a", headers=headers), 404)


@pytest.mark.parametrize(
    "value",
    ["Bearer s3cret", "bearer s3cret", "Bearer  s3cret ", basic("anyone", "s3cret")],
)
def test_token_in_any_spelling(memcached: Memcached, value: str) -> None:
    client = make(memcached, token="s3cret")
    read = client.get("/files/a", headers={"Authorization": value})
    assert read.status_code == 404


@pytest.mark.parametrize("token", ["abc=def", "a=b=", "==", 'a="b;c"', "a:b"])
def test_token_of_any_characters(memcached: Memcached, token: str) -> None:
    client = make(memcached, token=token)
    for value in (f"Bearer {token}", basic("me", token)):
        read = client.get("/files/a", headers={"Authorization": value})
        assert read.status_code == 404
    is_problem(client.get("/files/a", headers=bearer(token + "x")), 401)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        *[("one", 404), ("two", 404), ("three", 404)],
        *[("", 401), ("one,two", 401), ("one, two,three,", 401), (",", 401)],
    ],
)
def test_token_is_one_of_several(memcached: Memcached, sent: str, status: int) -> None:
    client = make(memcached, token="one, two,three,")
    assert client.get("/files/a", headers=bearer(sent)).status_code == status


def test_tokens_are_all_compared(memcached: Memcached, monkeypatch: Any) -> None:
    """So that the time that it takes doesn't tell which of them is near."""
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    client = make(memcached, token="one,two")
    monkeypatch.setattr(hmac, "compare_digest", compare)
    is_problem(client.get("/files/a", headers=bearer("one")), 404)
    assert compared == [b"one", b"two"]


def test_token_file_has_more_of_them(memcached: Memcached, tmp_path: Any) -> None:
    file = tmp_path / "tokens"
    file.write_text("\ufeffone\n\ntwo, three\n", "utf-8")
    client = make(memcached, token="fixed", token_file=file)
    file.write_text("four")  # it was read at the start
    for token in ("fixed", "one", "two", "three"):
        assert client.get("/files/a", headers=bearer(token)).status_code == 404
    for token in ("four", "\ufeffone", ""):
        is_problem(client.get("/files/a", headers=bearer(token)), 401)


def test_token_file_alone_is_enough(memcached: Memcached, tmp_path: Any) -> None:
    (tmp_path / "tokens").write_text("t")
    client = make(memcached, token_file=tmp_path / "tokens")
    assert client.get("/files/a", headers=bearer("t")).status_code == 404
    is_problem(client.get("/files/a"), 401)
    assert 'id="token-label" hidden' not in client.get("/").text


def test_token_is_what_a_browser_asks_its_user_for(memcached: Memcached) -> None:
    answer = make(memcached, token="s3cret").get("/files/a", headers=BROWSER)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="memchunk"'
