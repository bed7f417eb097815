"""The pages for browsers, as the API sends them; tests/test_browser.py uses them."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.support import BROWSER, FOLDER, Memcached, make, multipart, post_form


def test_page_knows_the_settings(memcached: Memcached) -> None:
    client = make(memcached, max_size=12345, token="t", expire=7 * 86400)
    page = client.get("/").text
    assert '<option value="604800" selected>for 7 days<' in page
    assert "12345" in page
    assert "{{" not in page
    assert 'action="files"' in page
    assert 'id="token-label" hidden' in make(memcached).get("/").text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_expire": 2 * 86400}, ["1 hour", "1 day", "*2 days"]),
        ({"max_expire": 86400, "expire": 5400}, ["1 hour", "*90 minutes", "1 day"]),
        ({"expire": 1}, ["*1 second", "1 hour", "1 day", "7 days", "30 days"]),
    ],
)
def test_page_offers_no_longer_than_allowed(
    memcached: Memcached, settings: Any, expected: list[str]
) -> None:
    page = make(memcached, **settings).get("/").text
    offers = re.findall(r"<option value=\"\d+\"( selected)?>for (.*?)<", page)
    assert ["*"[: len(is_default)] + words for is_default, words in offers] == expected


@pytest.mark.parametrize("path", ["/", "/nowhere"])
def test_page_may_run_its_own_scripts_and_no_more(client: Any, path: str) -> None:
    page = client.get(path, headers=BROWSER)
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for block in re.findall(r"<(?:style|script)>(.*?)</", page.text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_page_of_an_answer_has_no_markup_of_others(client: Any) -> None:
    assert "<b>" not in client.get("/files/<b>", headers=BROWSER).text
    named = client.put("/files/%3Ci%3E&", data=b"1", headers=BROWSER)
    assert "&lt;i&gt;&amp;" in named.text


def test_page_says_how_long_a_file_is_kept(client: Any) -> None:
    form = multipart(("file", "a.png", b"1"))
    stored = post_form(client, form, "/files?expire=60", headers=BROWSER)
    assert "1 bytes, kept until 20" in stored.text
    stored = post_form(client, form, headers=BROWSER)
    assert "kept until the cache needs the room" in stored.text


# PyPI has a module of this name; here Python finds it before the file.
SCRIPT = """import sys; sys.path.insert(0, "elsewhere")
import wsgi, werkzeug.test
client = werkzeug.test.Client(wsgi.application)
print(client.post("/uploads").status_code, client.post("/files").status_code)
print(client.get("/").text)
"""


def run_copy(memcached: Memcached, folder: Any, *left_out: str) -> Any:
    for file in [*FOLDER.glob("*.py"), FOLDER / "upload.html"]:
        if not file.name.startswith(("test_", "conftest", *left_out)):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "tus.py").write_text("")
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env={**os.environ, "MEMCHUNK_SERVERS": memcached.server},
        capture_output=True,
        check=False,
        text=True,
    )


def test_page_without_tus_sends_files_whole(
    memcached: Memcached, tmp_path: Any
) -> None:
    run = run_copy(memcached, tmp_path, "tus.py")
    assert run.stdout.startswith("404 201\n")
    assert 'data-uploads=""' in run.stdout


def test_page_is_not_served_with_another_tus(
    memcached: Memcached, tmp_path: Any
) -> None:
    run = run_copy(memcached, tmp_path)
    assert run.returncode == 1
    assert "module 'tus' has no attribute 'Uploads'" in run.stderr
