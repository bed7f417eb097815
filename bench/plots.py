"""The texts and the plot, made from the benchmark's JSON."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from bench.measure import KIB, MIB, Figure
from bench.peers import BARE, HAND, OURS

MARK = "<!-- benchmark: `python -m bench` writes the lines from here to the plot -->\n"
FORMATS = {"x": "{:.2f}", "MiB": "+ {:.1f} MiB", "of -m": "{:.3f} of -m"}
INTRO = """
Written by `{}`, not by hand. Every ratio is ours / theirs, which is memchunk's figure
divided by the other one. Below 1, memchunk is faster or smaller. Times are medians, and
a ratio is that of two medians. Quartiles of the ratios of single rounds are in
brackets. Before each timed call, the same call runs untimed on the same connection. All
clients take turns, and each round shuffles their order. Machine and versions: {}."""
BUSY = """
**The machine was busy before this run, and perhaps during it (its load was {}). So the
times are only a first picture.**"""
MET = {None: "", True: " ({})", False: " (**not {}**)"}  # a ratio and its aim
WHOLE = 50 * MIB
SHOWN = [  # the lines of the README: verb and size
    *(("`set`", WHOLE), ("`chunks()`", WHOLE), ("`get`", WHOLE)),
    *(("`set`", MIB), ("`get`", MIB), ("`set`", 16 * KIB), ("`get`", 16 * KIB)),
]
STYLES = [  # colour and marker of each curve, also for those who see few colours
    *(("#d1242f", "o"), ("#ff8182", "."), ("#24292f", "x"), ("#0969da", "s")),
    *(("#54aeff", "D"), ("#1a7f37", "^"), ("#4ac26b", "v"), ("#8250df", "P")),
]


def document(report: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    about = report["machine"]
    machine = ", ".join(f"{key} {value}" for key, value in about.items())
    parts = ["# Benchmarks", verdict(figures(report["sections"]))]
    parts += [BUSY.format(about["load"]).strip()] if float(about["load"]) > 1 else []
    parts += [INTRO.format(report["command"], machine).strip()]
    for section in report["sections"]:
        found = figures([section])
        sized, rest = [f for f in found if f.size], [f for f in found if not f.size]
        parts += [f"## {section['name']}", section["about"]]
        parts += [by_size(sized)] if sized else []
        parts += [lines(rest)] if rest else []
        parts += [section["note"]] if section["note"] else []
        if section["name"] == "speed":
            parts.append("![MiB/s against the size of the file](throughput.png)")
    return "\n\n".join(filter(None, parts)) + "\n"


def figures(sections: Iterable[dict[str, Any]]) -> list[Figure]:
    return [Figure(**each) for section in sections for each in section["figures"]]


def verdict(found: Sequence[Figure]) -> str:
    """Three sentences, made from the figures, and the aims that are missed."""
    tcp = [each for each in found if each.size and each.what.endswith(" over TCP")]
    whole = [each for each in tcp if each.size == WHOLE]
    bare = [f"{value(each)} for {each.what}" for each in whole if each.beside == BARE]
    hand = [(each.value, each.size) for each in tcp if each.beside == HAND]
    small = sorted(ratio for ratio, size in hand if ratio and size <= 32 * KIB)
    large = sorted(ratio for ratio, size in hand if ratio and size > 128 * KIB)
    if not bare or not small or not large:
        return ""  # only some sections were asked for
    faster = [
        f"{each.beside} ({each.what}: {value(each)})"
        for each in whole
        if each.beside != BARE and each.value and each.value > 1
    ]
    missed = [each for each in found if each.met is False]
    known = sum(each.met is not None for each in found)
    rows = [(f.what, size_text(f.size), f.beside, value(f), f.aim) for f in missed]
    header = "misses its aim", "size", "compared with", "figure", "aim"
    return (
        "Compared with a bare socket that moves the same items, the ratio for a file "
        f"of 50 MiB is {', '.join(bare)}. Compared with pymemcache by hand with a "
        f"CRC-32, it is {small[0]:.2f} to {small[-1]:.2f} up to 32 KiB, and "
        f"{large[0]:.2f} to {large[-1]:.2f} from 256 KiB on. "
        f"{known - len(missed)} of {known} aims are met. At 50 MiB, these are faster "
        f"than memchunk: {', '.join(faster) or 'none'}.\n\n{table(header, rows)}"
    )


def value(figure: Figure) -> str:
    if figure.value is None:
        return "left out"
    return FORMATS.get(figure.unit, "{:g}").format(figure.value)


def lines(found: Iterable[Figure]) -> str:
    """A line for each figure."""
    rows = []
    for figure in found:
        text = value(figure)
        text += " ({:.2f}-{:.2f})".format(*figure.spread) if figure.spread else ""
        times = [seconds(figure.ours), seconds(figure.theirs)]
        met = {None: figure.note, True: "yes", False: "**no**"}[figure.met]
        rows.append((figure.what, figure.beside, *times, text, figure.aim, met))
    header = "test", "compared with", OURS, "the other", "figure", "aim", "aim met"
    return table(header, rows)


def by_size(found: Sequence[Figure]) -> str:
    """A table for each verb: a line for each peer, a column for each size."""
    tables = []
    for what in dict.fromkeys(each.what for each in found):
        chosen = [figure for figure in found if figure.what == what]
        times = {figure.size: seconds(figure.ours) for figure in chosen}
        rows = [(OURS, *times.values())]
        for beside in dict.fromkeys(figure.beside for figure in chosen):
            cells = [
                value(each) + MET[each.met].format(each.aim)
                for each in chosen
                if each.beside == beside
            ]
            rows.append((beside, *cells))
        tables.append(table((what, *map(size_text, times)), rows))
    return "\n\n".join(tables)


def summary(report: dict[str, Any]) -> str:
    """The table of the README: a column for each peer."""
    found = {
        (each.what.removesuffix(" over TCP"), each.size, each.beside): each
        for each in figures(report["sections"])
        if each.what.endswith(" over TCP") and each.size
    }
    beside = list(dict.fromkeys(key[2] for key in found))
    rows = []
    for verb, size in SHOWN:
        chosen = [found[verb, size, each] for each in beside]
        ours = f"{verb}, {size_text(size)}", seconds(chosen[0].ours)
        rows.append((*ours, *map(value, chosen)))
    return "\n" + table(("ours / theirs", OURS, *beside), rows)


def seconds(taken: float | None) -> str:
    return "" if taken is None else f"{taken * 1000:.{1 + (taken < 0.01)}f} ms"


def size_text(size: int) -> str:
    text = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
    return text if size else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, that reads well as it is. Columns without content are left out."""
    columns = [column for column in zip(header, *rows) if any(column[1:])]
    padded = []
    for column in columns:
        width = max(map(len, column))
        first, *rest = [text.ljust(width) for text in column]
        padded.append([first, "-" * width, *rest])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*padded))


def draw(sections: Iterable[dict[str, Any]], path: pathlib.Path) -> None:
    """A panel for `set`, one for `get`, on a ground for light pages and dark ones."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    canvas, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    for what, panel in zip(("`set` over TCP", "`get` over TCP"), axes):
        found = [each for each in figures(sections) if each.what == what]
        labels = OURS, *dict.fromkeys(each.beside for each in found)
        for label, (colour, marker) in zip(labels, STYLES):
            points = rates(found, label)
            look = {"label": label, "color": colour, "marker": marker}
            width = 2.6 if label == OURS else 1
            panel.plot(list(points), list(points.values()), linewidth=width, **look)
        panel.set(xlabel="size of the file", xscale="log", yscale="log")
        panel.set_title(what.replace("`", ""))
        ticks = sorted({each.size for each in found})
        panel.set_xticks(ticks, [*map(size_text, ticks)], rotation=30, fontsize=8)
        panel.minorticks_off()
        panel.grid(color="#d0d7de", linewidth=0.6)
    axes[0].set_ylabel("MiB/s")
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    handles = axes[0].get_legend_handles_labels()
    canvas.legend(*handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    canvas.tight_layout(rect=(0, 0.12, 1, 1))
    canvas.savefig(path, dpi=110)


def rates(found: Iterable[Figure], label: str) -> dict[int, float]:
    """MiB/s of a client by size, from the medians in the tables."""
    return {
        each.size: each.size
        / ((each.ours if label == OURS else each.theirs) or 1)
        / MIB
        for each in found
        if label in (OURS, each.beside)
    }
