"""Mutation testing of memchunk.py: changes of one operator or constant that no test
notices.

    tox run -e mutation                           the functions below, in some minutes
    tox run -e mutation -- "memchunk.*exptime*"   those of these names

mutmut writes beside the code that it changes; so it runs in a copy. It prints what
survived, each with its difference, and fails where that is more than
docs/contributing.md explains."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = """\
[mutmut]
source_paths=memchunk.py
pytest_add_cli_args_test_selection=test_memchunk.py
also_copy=
    tests
    conftest.py
    tox.ini
    httpfiles.py
    wsgi.py
    tus.py
"""
BOUNDED = [
    "memchunk.*_seconds*",
    "memchunk.*exptime*",
    "memchunk.*require*",
    "memchunk.*_store*",
    "memchunk.*replace*",
]
EXPLAINED = 10  # survivors


def main(folder: pathlib.Path, names: list[str]) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "docs")
    )
    (folder / "setup.cfg").write_text(SETTINGS)
    subprocess.run(
        ["mutmut", "run", "--max-children", "2", *names], cwd=folder, check=True
    )
    results = subprocess.run(
        ["mutmut", "results"], cwd=folder, check=True, capture_output=True, text=True
    )
    survivors = [
        line.split(":")[0].strip()
        for line in results.stdout.splitlines()
        if "surv" in line
    ]
    for name in survivors:
        subprocess.run(["mutmut", "show", name], cwd=folder, check=True)
    print(f"{len(survivors)} survivors")
    return int(len(survivors) > EXPLAINED)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2:] or BOUNDED))
