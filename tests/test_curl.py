"""The README's commands with curl print what stands there, but for versions and times.
This needs curl, which `tox run` does not."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest

from tests.support import HOSTS, Memcached, running, snippet

COMMANDS = re.split(r"^\$ ", snippet("README.md", "curl"), flags=re.MULTILINE)[1:]


def without_versions_and_times(text: str) -> str:
    return re.sub(r"\b([0-9a-f]{16}|1[0-9]{9})\b", "x", text).strip()


@pytest.mark.parametrize("host", ["werkzeug", "gunicorn-threads"])
def test_readme_commands_with_curl(
    host: str, memcached: Memcached, tmp_path: pathlib.Path
) -> None:
    with running(HOSTS[host], memcached, tmp_path) as server:
        for command in COMMANDS:
            line, _, expected = command.partition("\n")
            line = line.replace("http://127.0.0.1:8000", server.url(""))
            shell = ["bash", "-c", line]
            done = subprocess.run(
                shell, cwd=tmp_path, capture_output=True, text=True, check=False
            )
            shown = without_versions_and_times(done.stdout)
            assert shown == without_versions_and_times(expected), line
