"""Measure memchunk beside its yardsticks; print the tables.

python -m bench                              everything, into docs/ and the README
python -m bench speed http                   some of the sections
python -m bench --quick                      a smoke run; its figures mean little
python -m bench --against old/memchunk.py    this version beside another
python -m bench --redraw                     all texts anew, from docs/benchmarks.json

Only the first and the last write into docs/; --out names another folder. What is not
installed is left out, and named. Timings need a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from typing import Any

from bench import plots, sections
from bench.measure import MIB, ROOT, Missing, Options, program

PACKAGES = "pymemcache pylibmc redis hiredis werkzeug gunicorn waitress cheroot uwsgi"
CPUS = pathlib.Path("/proc/cpuinfo")
DOCS = ROOT / "docs"


def machine(options: Options) -> dict[str, str]:
    """What the figures were measured on and with."""
    cpu, *_ = re.findall(r"model name\s*: (.*)", CPUS.read_text()) or ["unknown CPU"]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.2f}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "rounds": str(options.rounds),
    }
    for name in ("memcached", "redis-server"):
        with contextlib.suppress(Missing):
            output = subprocess.check_output([program(name), "--version"], text=True)
            found[name] = re.findall(r"\d+\.\d+[\w.]*", output)[0]
    for name in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def measured(name: str, options: Options) -> dict[str, Any]:
    """A section's figures. One that fails keeps those that it had, and says why."""
    section, start = getattr(sections, name), time.monotonic()
    figures: list[dict[str, Any]] = []
    note = ""
    try:
        for figure in section(options):
            figures.append(dataclasses.asdict(figure))
    except (Missing, ImportError) as error:
        note = f"Left out: {error}"
    except Exception as error:
        note = f"Failed: {error!r}"
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    about = " ".join((section.__doc__ or "").split())
    return {"name": name, "about": about, "figures": figures, "note": note}


def arguments() -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=kind)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(sections.ALL)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="how often a time is taken; 15")
    parser.add_argument("--against", type=pathlib.Path, metavar="MEMCHUNK.PY")
    parser.add_argument("--redraw", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER")
    given = parser.parse_args()
    unknown = set(given.sections) - set(sections.ALL)
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    if not (given.sections or given.quick or given.against or given.out):
        given.out = DOCS
    return given


def report(given: argparse.Namespace) -> dict[str, Any]:
    """All that is measured, as it goes into the JSON."""
    names = ["against"] if given.against else given.sections or sections.ALL
    rounds = max(2, given.rounds or (2 if given.quick else 15))
    size, other = 8 * MIB if given.quick else 50 * MIB, given.against or ROOT
    options = Options(given.quick, size, rounds, other)
    return {
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "machine": machine(options),
        "sections": [measured(name, options) for name in names],
    }


def write(found: dict[str, Any], folder: pathlib.Path) -> None:
    """Put a report into a folder. That in docs/ goes into the README, too."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (folder / "benchmarks.json").write_text(text, "utf-8")
    (folder / "benchmarks.md").write_text(plots.document(found), "utf-8")
    with contextlib.suppress(ImportError):  # without matplotlib there is no plot
        plots.draw(found["sections"], folder / "throughput.png")
    if folder == DOCS:
        readme = ROOT / "README.md"
        before, mark, rest = readme.read_text("utf-8").partition(plots.MARK)
        after = rest[slice(rest.index("!["), None)]
        text = f"{before}{mark}{plots.summary(found)}\n\n{after}"
        readme.write_text(text, "utf-8")


def main() -> int:
    given = arguments()
    if given.redraw:
        found = json.loads((given.out / "benchmarks.json").read_text("utf-8"))
    else:
        found = report(given)
    print(plots.document(found))
    if given.out:
        write(found, given.out)
    notes = [section["note"] for section in found["sections"]]
    return int(any(note.startswith("Failed") for note in notes))


if __name__ == "__main__":
    sys.exit(main())
