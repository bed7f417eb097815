"""The documents agree with the code: examples run, links and commands lead somewhere,
and what stands in two places is the same in both.

tests/test_curl.py runs the README's commands with curl. The examples of docs/lambda.md,
docs/uploads.md and docs/deployment.md need more than memcached: test_lambda.py,
test_tus_clients.py, test_hosts.py and test_proxies.py run them."""

from __future__ import annotations

import configparser
import dataclasses
import inspect
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

import mcpool
import memchunk
import wsgi
from tests.support import FOLDER, Memcached

README = (FOLDER / "README.md").read_text("utf-8")
API = (FOLDER / "docs/api.md").read_text("utf-8")
DOCUMENTS = sorted([*FOLDER.glob("*.md"), *FOLDER.glob("docs/*.md")])
TEXT = "\n".join(each.read_text("utf-8") for each in DOCUMENTS)
EXAMPLE = re.compile(  # with the output that may follow it, and what may stand before
    r"(?P<before>[^\n]*)\n```python\n(?P<code>.*?)```(?:\n```\n(?P<output>.*?)```)?",
    re.DOTALL,
)
SIGNATURES = re.findall(r"^(?:#+ |\| |- |)`([\w.]+)(\([^`]*\))`", API, re.MULTILINE)


def example_output(code: str, folder: pathlib.Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("text", [README, API], ids=["README.md", "docs/api.md"])
def test_examples_print_what_stands_below_them(
    text: str, memcached: Memcached, tmp_path: pathlib.Path
) -> None:
    examples = [each for each in EXAMPLE.finditer(text) if "not run:" not in each[0]]
    assert examples
    for each in examples:
        code = each["code"].replace("127.0.0.1:11211", memcached.server)
        assert example_output(code, tmp_path) == (each["output"] or "")


def test_readme_is_short() -> None:
    assert README.count("\n") <= 180


@pytest.mark.parametrize("name", ["serve", "test"])
def test_readme_commands_are_one_line_each(name: str) -> None:
    [block] = re.findall(rf"<!-- {name} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert block.count("\n") == 1
    subprocess.run(["bash", "-n", "-c", block], check=True)


def test_readme_leads_to_every_document_and_names_every_file_to_copy() -> None:
    for path in FOLDER.glob("docs/*.md"):
        assert f"(docs/{path.name})" in README
    for path in FOLDER.glob("*.py"):
        if not path.name.startswith(("test_", "conftest")):
            assert f"`{path.name}`" in README


def anchors(document: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)", document.read_text("utf-8"), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", each.lower()) for each in headings]
    return {each.replace(" ", "-") for each in kept}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: pathlib.Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", document.read_text("utf-8"))
    for path, anchor in links:
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor[1:] in anchors(target), path + anchor


def test_settings_of_the_readme_are_those_of_the_server() -> None:
    fields = dataclasses.fields(wsgi.Settings)
    defaults = {f"MEMCHUNK_{each.name.upper()}": each.default for each in fields}
    rows = re.findall(r"^\| (`MEMCHUNK_.*?) \| (.*?) \|", README, re.MULTILINE)
    shown = {name: cell for row, cell in rows for name in re.findall(r"\w+", row)}
    assert shown.keys() == defaults.keys()
    for name, cell in shown.items():
        if cell.startswith("`"):  # others are words, such as "none"
            default, text = defaults[name], cell.strip("`")
            is_text = isinstance(default, str)
            assert (text if is_text else float(text)) == default, name


def test_limits_of_the_documents_are_those_of_the_code() -> None:
    assert f"0 to {memchunk.MAX_SIZE:,} bytes" in README
    assert f"`MAX_SIZE` is {memchunk.MAX_SIZE:,} " in API
    assert f"1 to {memchunk.MAX_NAME} bytes" in README
    assert f"1 to {memchunk.MAX_NAME} bytes" in API
    assert f"up to {memchunk.MAX_METADATA:,} bytes" in API


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name != "self"]


@pytest.mark.parametrize(("name", "text"), [s for s in SIGNATURES if "..." not in s[1]])
def test_signatures_of_the_api_are_those_of_the_code(name: str, text: str) -> None:
    places = memchunk.FileCache, memchunk.CachedFile, memchunk
    known = {"mcpool.connect": mcpool.connect}
    for place in reversed(places):
        known.update(vars(place))
    scope: dict[str, Any] = dict(vars(memchunk))
    exec(f"def documented{text}: ...", scope)
    assert parameters(known[name]) == parameters(scope["documented"])


def test_errors_of_the_api_are_those_of_the_code() -> None:
    table = API.partition("## Errors")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([A-Z]\w+)` \|", table, re.MULTILINE)
    before = memchunk.__all__.index("MemchunkError") + 1
    assert rows == memchunk.__all__[before:]


def test_statuses_that_the_code_answers_are_documented() -> None:
    code = "\n".join(path.read_text("utf-8") for path in FOLDER.glob("*.py"))
    table = (FOLDER / "docs/http.md").read_text("utf-8")
    raised = set(re.findall(r"(?:Problem\(|memchunk\.\w+: \()\s*([45]\d\d),", code))
    assert len(raised) > 10
    assert raised <= set(re.findall(r"^\| ([45]\d\d) \|", table, re.MULTILINE))


def test_tests_that_the_documents_name_exist() -> None:
    code = "\n".join(path.read_text("utf-8") for path in FOLDER.rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {name}(" in code, name


def test_versions_agree() -> None:
    changes = (FOLDER / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == memchunk.__version__
    for path in FOLDER.glob("*.py"):
        header = re.match(r"# \w+ (\d\S+),", path.read_text("utf-8"))
        assert not header or header[1] == memchunk.__version__, path.name


COMMANDS = sorted(set(re.findall(r"`tox run -e (\w+)(?: -- ([^`]+))?`", TEXT)))


@pytest.mark.parametrize(("environment", "arguments"), COMMANDS)
def test_tox_commands_of_the_documents(environment: str, arguments: str) -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(FOLDER / "tox.ini")
    names = tox["tox"]["env_list"].split(", ")
    section = f"testenv:{environment}"
    assert tox.has_section(section) or environment in names
    command = tox.get(section if tox.has_section(section) else "testenv", "commands")
    assert not arguments or "{posargs" in command
    if arguments and command.startswith("pytest"):
        line = command.replace("{posargs}", f"--collect-only -q {arguments}")
        subprocess.run(
            [sys.executable, "-m", *shlex.split(line)],
            cwd=FOLDER,
            check=True,
            capture_output=True,
        )
