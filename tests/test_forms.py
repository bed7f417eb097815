"""Forms: multipart/form-data in all its variants, whole and broken."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from tests.support import (
    BOUNDARY,
    FORM,
    Memcached,
    Stream,
    address,
    cases,
    content,
    is_problem,
    make,
    multipart,
    post_form,
    send,
)

Parts = list[tuple[str, Optional[str], bytes]]
LINE = f"--{BOUNDARY}".encode()
CONTENTS = {
    "empty": b"",
    "line break": b"\r\n",
    "half a line break": b"\r",
    "last boundary after half a line break": b"\n" + LINE + b"--\r\n",
    "last boundary": LINE + b"--",
    "half a boundary": b"\r\n" + LINE[:4],
    "boundary in capitals": b"a\r\n" + LINE.upper() + b"\r\n",
    "dashes": b"-" * 99,
    "large": content(300_000),
}


@cases("data", CONTENTS)
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50, 1 << 20])
def test_form_in_pieces_of_any_size(client: Any, data: bytes, piece: int) -> None:
    if len(data) > 1000 * piece:
        data = data[:1000]
    body = multipart(("expire", None, b"60"), ("file", "caf\u00e9 1.png", data))
    # Not as a header, in which the test client would put a boundary of its own.
    stream, environ = Stream(body, piece=piece), {"CONTENT_TYPE": FORM}
    created = send(client, "POST", "/files", stream, len(body), environ=environ)
    assert created.json["expires"] - created.json["created"] == 60
    read = client.get(address(created))
    assert (read.data, read.mimetype) == (data, "image/png")
    assert "filename*=UTF-8''caf%C3%A9%201.png" in read.headers["Content-Disposition"]


BEFORE: dict[str, Parts] = {
    "another field": [("other", None, b"1")],
    "a part of the same field": [("field", None, b"{}")],  # as FilePond sends it
    "a field called file": [("file", None, b"no file")],
    "no file chosen": [("field", "", b""), ("file", "", b"")],  # as browsers send it
}


@cases("before", BEFORE)
@pytest.mark.parametrize("field", ["file", "data", "files[]", "filepond", ""])
def test_form_file_is_the_first_part_that_has_a_file_name(
    client: Any, field: str, before: Parts
) -> None:
    named = {"field": field}
    parts = [(named.get(name, name), text, data) for name, text, data in before]
    after: Parts = [(field, "a.png", b"1"), ("file", None, b"2"), ("file", "", b"")]
    created = post_form(client, multipart(*parts, *after))
    assert created.status_code == 201
    read = client.get(address(created))
    assert (read.data, read.mimetype) == (b"1", "image/png")
    assert 'filename="a.png"' in read.headers["Content-Disposition"]


def test_form_without_a_file_name_is_told_what_to_do(client: Any) -> None:
    problem = is_problem(post_form(client, multipart(("file", None, b"text"))), 400)
    assert "-F file=@PATH" in problem["detail"]


def test_form_may_have_bytes_beside_its_file(client: Any) -> None:
    spare: Any = ("other", None, b"x" * 10_000)
    form = multipart(spare, ("file", "a", b"1"), spare)
    created = post_form(client, b"x" * 10_000 + b"\r\n" + form + b"x" * 10_000)
    assert client.get(address(created)).data == b"1"


def test_form_file_name_that_is_long_keeps_its_end(client: Any) -> None:
    created = post_form(client, multipart(("file", "x" * 300 + ".png", b"1")))
    assert ".png" in client.get(address(created)).headers["Content-Disposition"]


def coded(coding: str, where: str) -> bytes:
    """A form with a Content-Transfer-Encoding in the file's part, or the one before."""
    body = multipart(("other", None, b"eA=="), ("file", "a", b"eA=="))
    before, head, after = body.partition(f'name="{where}"'.encode())
    rest, end, more = after.partition(b"\r\n\r\n")
    header = f"\r\nContent-Transfer-Encoding: {coding}".encode()
    return before + head + rest + header + end + more


@pytest.mark.parametrize("coding", ["binary", "7bit", "8bit", "BINARY"])
def test_form_part_in_a_coding_that_changes_no_byte(client: Any, coding: str) -> None:
    created = post_form(client, coded(coding, "file"))
    assert client.get(address(created)).data == b"eA=="


FILE: Any = ("file", "a", b"1")
FIELD: Any = ("other", None, b"")
LONG_FIELD: Any = ("other", None, b"x" * 70_000)
HEAD = b"Content-Disposition: form-data; name=file\r\n\r\nabc"
BROKEN = {
    "empty": b"",
    "no form": b"nonsense",
    "no part": LINE + b"--\r\n",
    "no file": multipart(("other", None, b"x")),
    "no file chosen": multipart(("file", "", b"")),
    "no file name": multipart(("file", None, b"1")),
    "no end": multipart(FILE, end=""),
    "half an end": multipart(FILE, end="-"),
    "another end": multipart(FILE, end="x"),
    "headers without an end": LINE + b"\r\n" + b"x" * 100_000,
    "file without an end": LINE + b"\r\n" + HEAD,
    "no headers": LINE + b"\r\n\r\n" + HEAD + b"\r\n" + LINE + b"--\r\n",
    "an expire that is no number": multipart(("expire", None, b"soon"), FILE),
    "a long expire": multipart(("expire", None, b"x" * 5000), FILE),
    "expire after the file": multipart(FILE, ("expire", None, b"60")),
    "many fields before": multipart(*[FIELD] * 2000, FILE),
    "many fields after": multipart(FILE, *[FIELD] * 2000),
    "a long text before": b"x" * 70_000 + b"\r\n" + multipart(FILE),
    "a long text after": multipart(FILE) + b"x" * 70_000,
    "a long field before": multipart(LONG_FIELD, FILE),
    "a long field after": multipart(FILE, LONG_FIELD),
    "base64": coded("base64", "file"),
    "base64 before": coded("base64", "other"),
    "quoted-printable": coded("Quoted-Printable", "file"),
    "uuencode": coded("x-uuencode", "file"),
    "an empty coding": coded("", "other"),
}


@cases("body", BROKEN)
def test_form_that_is_broken(client: Any, memcached: Memcached, body: bytes) -> None:
    is_problem(post_form(client, body), 400)
    assert memcached.keys() == []


BOUNDARIES = {
    "none": "",
    "empty": "; boundary=",
    "71 characters": "; boundary=" + "x" * 71,
    "no ASCII": "; boundary=\u00e9",
}


@cases("options", BOUNDARIES)
def test_form_without_a_boundary(client: Any, options: str) -> None:
    headers = {"Content-Type": "multipart/form-data" + options}
    is_problem(client.post("/files", data=multipart(FILE), headers=headers), 400)


@pytest.mark.parametrize(("more", "status"), [(0, 201), (1, 413)])
def test_form_of_the_largest_file_has_64_kib_beside_it(
    memcached: Memcached, more: int, status: int
) -> None:
    def body(padding: int) -> bytes:
        return multipart(("a", None, b"x" * padding), ("file", "a", content(9999)))

    room = 9999 + 65_536 + more - len(body(0))
    client = make(memcached, max_size=9999)
    assert post_form(client, body(room)).status_code == status


# The length gives the last one away, and not the second.
@pytest.mark.parametrize(
    ("size", "status"), [(9999, 201), (10_000, 413), (99_999, 413)]
)
def test_form_over_the_limit(memcached: Memcached, size: int, status: int) -> None:
    client = make(memcached, max_size=9999)
    answer = post_form(client, multipart(("file", "a", content(size))))
    assert answer.status_code == status
    if status == 413:
        assert is_problem(answer, 413)["limit"] == 9999
        assert memcached.keys() == []
