"""Names of files, the names that downloads are saved under, and content types."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

import memchunk
from tests.support import cases

NAMES = {
    "plain": "plain.txt",
    "space": "with space",
    "slashes": "a/b/c",
    "slash before": "/leading",
    "slash after": "trailing/",
    "two slashes": "a//b",
    "other alphabets": "\u00e9\u00e8 \u4f60\u597d \U0001f600.txt",
    "delimiters of addresses": "question?mark#hash%25&=+;",
    "quotes": 'quote"back\\slash',
    "a header": "line\r\nSet-Cookie: a=b",
    "control characters": "nul\x00tab\t\x7f",
    "bidi controls": "bidi\u202egpj.exe",
    "1024 bytes": "x" * 1024,
    "1024 bytes of emoji": "\U0001f600" * 256,
}


@cases("name", NAMES)
def test_name_of_any_text(client: Any, name: str) -> None:
    path = "/files/" + quote(name)
    created = client.put(path, data=b"x")
    assert (created.status_code, created.json["name"]) == (201, name)
    read = client.get(created.json["url"])
    assert (read.status_code, read.data) == (200, b"x")
    assert all(
        32 <= ord(c) < 127 for value in read.headers.values() for c in str(value)
    )
    assert client.get(path).headers["ETag"] == created.headers["ETag"]


SAVED_AS = {
    "folder": ("folder/report.pdf", "report.pdf", "report.pdf"),
    "folder of Windows": ("C:\\temp\\x.txt", "x.txt", "x.txt"),
    "folder above": ("../../etc/passwd", "passwd", "passwd"),
    "fullwidth /../": ("a\uff0f\uff0e\uff0e\uff0fevil.sh", "evil.sh", "evil.sh"),
    "a character that becomes a/c": ("\u2100.txt", "c.txt", "c.txt"),
    "two that become dots": ("\u2024\u2024", "file", "file"),
    "bidi control": ("exe\u202egpj.txt", "exegpj.txt", "exegpj.txt"),
    "control characters": ("a\r\nb\x00c.txt", "abc.txt", "abc.txt"),
    "hidden": (".bashrc", "bashrc", "bashrc"),
    "dots": ("..", "file", "file"),
    "quote": ('50% "a".txt', '50% "a".txt', "50_ _a_.txt"),
    "long": ("x" * 50 + "." + "y" * 99, "y" * 99, "y" * 99),
    "accents": ("caf\u00e9 \u4f60.txt", "caf\u00e9 \u4f60.txt", "cafe .txt"),
    "no ASCII": ("\u4e2d\u6587", "\u4e2d\u6587", "file"),
    "only the extension": ("\u65e5\u672c.pdf", "\u65e5\u672c.pdf", "file.pdf"),
    "two of them": ("\u4e2d.tar.gz", "\u4e2d.tar.gz", "file.tar.gz"),
    "spaces": ("\u4e2d \u6587.\u6587.pdf", "\u4e2d \u6587.\u6587.pdf", "file.pdf"),
    "brackets": ("\u4e2d(1).pdf", "\u4e2d(1).pdf", "(1).pdf"),
}


@cases(("name", "expected", "plain"), SAVED_AS)
def test_file_name_is_cleaned(
    client: Any, name: str, expected: str, plain: str
) -> None:
    """And those who can't read UTF-8 get a name with a stem."""
    client.put("/files/" + quote(name), data=b"x")
    header = client.get("/files/" + quote(name)).headers["Content-Disposition"]
    extended = quote(expected, safe="")
    assert header == f"attachment; filename=\"{plain}\"; filename*=UTF-8''{extended}"


BINARY, CURL = "application/octet-stream", "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("name", "sent", "expected"),
    [
        ("folder/A.PDF", "", "application/pdf"),
        ("a.png", CURL, "image/png"),  # curl says it of any body
        ("a.png", f"{CURL}; charset=UTF-8", "image/png"),
        ("a.png", BINARY, BINARY),
        *[(name, "", BINARY) for name in ("a.tar.gz", "a.tgz", "png", ".png")],
        ("data:text/html,x", "", BINARY),
        *[(name, "", "application/pdf") for name in ("data:,x.pdf", "Re: #5.pdf")],
        *[("a", sent, BINARY) for sent in ("text", "text/a\u00e9", "a/b, c/d", CURL)],
        ("a", "x/" + "y" * 300, BINARY),
    ],
)
def test_content_type_that_is_none_is_guessed_from_the_name(
    client: Any, name: str, sent: str, expected: str
) -> None:
    path, headers = "/files/" + quote(name), {"Content-Type": sent}
    stored = client.put(path, data=b"x", headers=headers)
    read = client.get(path)
    assert read.headers["Content-Type"] == stored.json["content_type"] == expected
    assert read.headers["Content-Disposition"].startswith("attachment;")


METADATA = {
    "none": b"",
    "no UTF-8": b"\xff\x00",
    "a list": b"[]",
    "deep nesting": b"[" * 60_000,
    "a number": b"7",
    "a header in the type": b'{"type": "a\\r\\nb/c", "filename": 3}',
}


@cases("metadata", METADATA)
def test_metadata_of_others_is_not_trusted(
    client: Any, cache: memchunk.FileCache, metadata: bytes
) -> None:
    cache.set("theirs", b"x", metadata=metadata)
    read = client.get("/files/theirs")
    assert (read.status_code, read.data) == (200, b"x")
    assert read.headers["Content-Type"] == BINARY
