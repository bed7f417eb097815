"""Measure memchunk beside its yardsticks; print the tables.

python -m bench                              everything, into docs/benchmarks.json, .md and a plot
python -m bench speed http                   some of the sections
python -m bench --quick                      a smoke run of a minute: its figures mean little
python -m bench --against old/memchunk.py    this version beside another
python -m bench --redraw                     tables and plot anew, from docs/benchmarks.json

Only the first writes into docs/, unless --out says where. What is not installed is left out, and
named. Timings need a machine that does nothing else.
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

PACKAGES = ("pymemcache", "pylibmc", "redis", "hiredis", "werkzeug")
EMPTY: tuple[Any, ...] = (None, "", ())  # what the JSON needs not say
CPUS = pathlib.Path("/proc/cpuinfo")
HOSTS = ("gunicorn", "waitress", "cheroot", "uwsgi")


def machine(options: Options) -> dict[str, str]:
    """What the figures were measured on and with."""
    cpu, *_ = re.findall(r"model name\s*: (.*)", CPUS.read_text()) or [platform.machine()]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "rounds": str(options.rounds),
    }
    for name in ("memcached", "redis-server"):
        with contextlib.suppress(Missing):
            output = subprocess.check_output([program(name), "--version"], text=True)
            found[name] = re.findall(r"\d+\.\d+[\w.]*", output)[0]
    for name in (*PACKAGES, *HOSTS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def measured(name: str, options: Options) -> dict[str, Any]:
    """A section's figures. One that fails keeps those that it had, and says why it has no more."""
    section, start = getattr(sections, name), time.monotonic()
    found: dict[str, Any] = {"name": name, "about": section.__doc__, "figures": [], "note": ""}
    try:
        for figure in section(options):
            fields = dataclasses.asdict(figure).items()
            found["figures"].append({key: value for key, value in fields if value not in EMPTY})
    except Missing as error:
        found["note"] = f"Left out: {error}"
    except Exception as error:
        found["note"] = f"Failed: {error!r}"
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(sections.ALL)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="how often a time is taken; 15 unless quick")
    parser.add_argument("--against", type=pathlib.Path, metavar="MEMCHUNK.PY")
    parser.add_argument("--redraw", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER")
    given = parser.parse_args()
    unknown = set(given.sections) - set(sections.ALL)
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    if not (given.sections or given.quick or given.against) and given.out is None:
        given.out = ROOT / "docs"
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    return given


def report(given: argparse.Namespace) -> dict[str, Any]:
    """All that is measured, as it goes into the JSON."""
    quick, names = given.quick, given.sections or sections.ALL
    options = Options(
        quick=quick,
        size=(8 if quick else 50) * MIB,
        rounds=given.rounds or (3 if quick else 15),
        seeds=range(1, 2 if quick else 4),
        against=given.against or ROOT / "memchunk.py",
    )
    return {
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "machine": machine(options),
        "sections": [
            measured(name, options) for name in (["against"] if given.against else names)
        ],
    }


def main() -> int:
    given = arguments()
    if given.redraw:
        found = json.loads((given.out / "benchmarks.json").read_text())
    else:
        found = report(given)
    print(plots.document(found))
    if given.out:
        (given.out / "benchmarks.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.out / "benchmarks.md").write_text(plots.document(found))
        with contextlib.suppress(ImportError):  # without matplotlib there is no plot
            plots.draw(found["sections"], given.out / "throughput.png")
    return int(any(section["note"].startswith("Failed") for section in found["sections"]))


if __name__ == "__main__":
    sys.exit(main())
