"""`?inline`: which files a browser may show, and what they may do there."""

from __future__ import annotations

from typing import Any

import pytest
from werkzeug.test import Client, TestResponse

import wsgi
from tests.support import Memcached, opened


@pytest.fixture
def client(memcached: Memcached) -> Any:
    settings = wsgi.Settings(servers=memcached.server)
    cache = settings.connect()
    opened.append(cache)
    return Client(wsgi.Application(cache, settings))


def get(client: Any, content_type: str, query: str = "?inline", **options: Any) -> Any:
    """Store a file of that type, and ask for it."""
    client.put("/files/a", data=b"0123456789", content_type=content_type)
    answer: TestResponse = client.open("/files/a" + query, **options)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Security-Policy"].startswith("sandbox")
    return answer


def kind(answer: TestResponse) -> str:
    return answer.headers["Content-Disposition"].partition(";")[0]


SHOWN = [
    "image/png",
    "IMAGE/JPEG",
    "image/avif",
    "audio/mpeg",
    "video/mp4",
    "video/webm; codecs=vp9",
    "text/plain",
    "text/plain; charset=utf-8",
    "text/markdown",
    "text/csv",
    "application/pdf",
]
NOT_SHOWN = [
    "text/html",
    "Text/HTML; charset=utf-8",
    "text/xml",
    "text/xsl",
    "image/svg+xml",
    "IMAGE/SVG+XML; x=1",
    "application/xml",
    "application/xhtml+xml",
    "application/rss+xml",
    "application/javascript",
    "application/octet-stream",
    "application/pdfx",
    "text/plain;a,text/html",
    "video/mp4;a,text/html",
    "application/x-pdf",
    "multipart/x-mixed-replace",
    "message/rfc822",
    "x-image/png",
    "image/",
    "",
]


@pytest.mark.parametrize("content_type", SHOWN)
def test_inline_shows_pictures_sound_video_text_and_pdf(
    client: Any, content_type: str
) -> None:
    answer = get(client, content_type)
    assert (answer.status_code, answer.data) == (200, b"0123456789")
    assert kind(answer) == "inline"
    assert answer.headers["Content-Type"] == content_type


@pytest.mark.parametrize("content_type", NOT_SHOWN)
def test_inline_of_any_other_type_stays_an_attachment(
    client: Any, content_type: str
) -> None:
    assert kind(get(client, content_type)) == "attachment"


@pytest.mark.parametrize("content_type", SHOWN)
def test_without_inline_all_are_attachments(client: Any, content_type: str) -> None:
    answer = get(client, content_type, "")
    assert kind(answer) == "attachment"
    policy = answer.headers["Content-Security-Policy"]
    assert policy == "sandbox; default-src 'none'"


@pytest.mark.parametrize("content_type", SHOWN)
def test_inline_runs_no_script(client: Any, content_type: str) -> None:
    policy = get(client, content_type).headers["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";")[1:])
    assert rules["default-src"] == "'none'"
    assert rules.keys() == {"default-src", "img-src", "media-src", "style-src"}
    assert "allow-scripts" not in policy
    # Chromium's own player has to load the file once more, from the same origin.
    is_media = content_type.lower().startswith(("audio/", "video/"))
    assert ("allow-same-origin" in policy) == is_media


def test_inline_names_the_file_to_save(client: Any) -> None:
    header = get(client, "image/png").headers["Content-Disposition"]
    assert header == "inline; filename=\"a\"; filename*=UTF-8''a"


@pytest.mark.parametrize("query", ["?inline", "?inline=1", "?x=1&inline="])
def test_inline_of_ranges_and_heads(client: Any, query: str) -> None:
    part = get(client, "video/mp4", query, headers={"Range": "bytes=2-3"})
    assert (part.status_code, part.data, kind(part)) == (206, b"23", "inline")
    head = get(client, "video/mp4", query, method="HEAD")
    assert (head.status_code, kind(head)) == (200, "inline")
    assert head.headers["Content-Length"] == "10"


def test_inline_that_is_not_modified_keeps_its_policy(client: Any) -> None:
    """A browser takes the headers of a 304 for those of what it has kept."""
    first = get(client, "video/mp4")
    again = {"If-None-Match": first.headers["ETag"]}
    second = client.get("/files/a?inline", headers=again)
    assert second.status_code == 304
    for header in ("Content-Security-Policy", "ETag", "Cache-Control"):
        assert second.headers[header] == first.headers[header]
