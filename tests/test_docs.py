"""Every `python` and `console` snippet of README.md and docs/ is run here, from the
document.

A fenced block is a snippet by its language: `python` is run as a script, `console` line
by line in a shell, and what they print must be what stands there, but for versions and
times. All of a document share a folder, a memcached, and a server of the API, in the
order in which they stand. Where a snippet can't be run, a comment before it says why:
`<!-- not run: ... -->`. Those of docs/lambda.md and docs/uploads.md need more than
that, and are run by the tests of these."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.support import FOLDER, HOSTS, MIB, Memcached, running

DOCUMENTS = sorted([FOLDER / "README.md", *FOLDER.glob("docs/*.md")])
# Run by tests/test_lambda.py and tests/test_tus_clients.py.
ELSEWHERE = ("lambda.md", "uploads.md")
FENCE = re.compile(
    r"(?P<before>[^\n]*)\n\s*```(?P<language>\w*)\n(?P<text>.*?)```"
    r"(?:\n```\n(?P<output>.*?)```)?",
    re.DOTALL,
)
CHANGING = (
    (r"\b[0-9a-f]{16}\b|\b[0-9a-f]{32}\b", "<version>"),
    (r"\b1[0-9]{9}\b", "<time>"),
)


class Snippet(NamedTuple):
    language: str
    text: str
    output: str


def snippets(document: pathlib.Path) -> list[Snippet]:
    found = FENCE.finditer("\n" + document.read_text())
    return [
        Snippet(each["language"], each["text"], each["output"] or "")
        for each in found
        if each["language"] in ("python", "console")
        and "not run:" not in each["before"]
    ]


def same(text: str) -> str:
    for pattern, name in CHANGING:
        text = re.sub(pattern, name, text)
    return "\n".join(map(str.rstrip, text.strip().splitlines()))


def run(command: list[str], folder: pathlib.Path) -> str:
    path = os.pathsep.join(
        [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    )
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(FOLDER)},
        # a terminal would not show the progress that curl tells elsewhere
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or command[0] != sys.executable, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "document",
    [each for each in DOCUMENTS if each.name not in ELSEWHERE],
    ids=lambda path: path.name,
)
def test_a_document_shows_what_happens(
    document: pathlib.Path, memcached: Memcached, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "bigoldfile.dat").write_bytes(os.urandom(50 * MIB))
    shown = snippets(document)
    with running(HOSTS["gunicorn-threads"], memcached, tmp_path) as server:
        for snippet in shown:
            text = snippet.text.replace("127.0.0.1:11211", memcached.server)
            text = text.replace("http://127.0.0.1:8000", server.url(""))
            if snippet.language == "python":
                output = run([sys.executable, "-c", text], tmp_path)
                assert same(output) == same(snippet.output), snippet.text
                continue
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, expected = part.partition("\n")
                output = run(["bash", "-c", command], tmp_path)
                assert same(output) == same(expected), command


def test_the_commands_of_the_readme_are_one_line_each() -> None:
    text = (FOLDER / "README.md").read_text()
    for name in ("serve", "test"):
        [block] = re.findall(rf"<!-- {name} -->\n```sh\n(.*?)```", text, re.DOTALL)
        assert block.count("\n") == 1
        subprocess.run(["bash", "-n", "-c", block], check=True)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (FOLDER / "README.md").read_text()
    assert text.count("\n") <= 180
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
