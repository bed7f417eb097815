"""Tables and the plot, made from the benchmark's JSON."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from bench.measure import KIB, MIB, Figure

FORMATS = {
    "x": "{:.2f}",
    "MiB": "+ {:.1f} MiB",
    "bytes": "{:.3f}",
    "of -m": "{:.3f} of -m",
    "writes": "{:.0f}",
}
STYLES = [  # colour and marker of each curve; neighbours differ for those who see few colours
    *(("#d1242f", "o"), ("#24292f", "x"), ("#0969da", "s"), ("#54aeff", "D"), ("#1a7f37", "^")),
    *(("#4ac26b", "v"), ("#8250df", "P"), ("#c297ff", "*"), ("#bf8700", "<")),
]


def document(report: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    machine = [(f"**{key}**", str(value)) for key, value in report["machine"].items()]
    parts = [
        "# Benchmarks",
        f"Written by `{report['command']}`; not by hand. Every figure is measured in turn with "
        "what it stands beside, in an order that is shuffled in each round. A ratio is the median "
        "of the rounds' ratios, with its quartiles in brackets; times are medians. Below 1, "
        "memchunk is faster. A line that has an aim says whether it is met.",
        table(("", ""), machine),
    ]
    for section in report["sections"]:
        figures = [Figure(**each) for each in section["figures"]]
        made = by_size(figures) if figures and figures[0].size else lines(figures)
        parts += [f"## {section['name']}", " ".join(section["about"].split()), made]
        parts += [section["note"]] if section["note"] else []
        if figures and figures[0].size:
            parts.append("![MiB/s against the size of the file](throughput.png)")
    return "\n\n".join(parts) + "\n"


def lines(figures: Iterable[Figure]) -> str:
    """A line for each figure."""
    rows = []
    for figure in figures:
        text = "left out" if figure.value is None else FORMATS[figure.unit].format(figure.value)
        text += " ({:.2f}-{:.2f})".format(*figure.spread) if figure.spread else ""
        times = [seconds(figure.ours), seconds(figure.theirs)]
        met = {None: figure.note, True: "yes", False: "**no**"}[figure.met]
        rows.append((figure.what, figure.beside, *times, text, figure.aim, met))
    return table(("what", "beside", "memchunk", "beside it", "figure", "aim", "met"), rows)


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1000:.1f} ms"


def by_size(figures: Sequence[Figure]) -> str:
    """A line for each peer, a column for each size."""
    sizes = sorted({figure.size for figure in figures})
    rows = [
        (f"`{verb}`", label, *(f"{series[size]:,.0f}" for size in sizes))
        for (verb, label), series in curves(figures).items()
    ]
    return table(("MiB/s", "", *map(size_text, sizes)), rows)


def curves(figures: Iterable[Figure]) -> dict[tuple[str, str], dict[int, float]]:
    """MiB/s by size, of each verb and peer."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for figure in figures:
        found.setdefault((figure.what, figure.beside), {})[figure.size] = figure.value or 0
    return found


def size_text(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, that reads well as it is. Columns without content are left out."""
    columns = [column for column in zip(header, *rows) if any(column[1:])]
    padded = []
    for column in columns:
        width = max(map(len, column))
        first, *rest = [cell.ljust(width) for cell in column]
        padded.append([first, "-" * width, *rest])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*padded))


def draw(sections: Iterable[dict[str, Any]], path: pathlib.Path) -> None:
    """One panel for `set`, one for `get`, on a ground that reads on light pages and dark ones."""
    figures = [Figure(**each) for section in sections for each in section["figures"]]
    series = curves(figure for figure in figures if figure.size)
    if not series:
        return
    styles = dict(zip(dict.fromkeys(label for _, label in series), STYLES))
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    canvas, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, facecolor="#f6f8fa")
    panels = dict(zip(("set", "get"), axes))
    for (verb, label), points in series.items():
        colour, marker = styles[label]
        look = {"color": colour, "marker": marker, "linewidth": 2.6 if label == "memchunk" else 1}
        panels[verb].plot(list(points), list(points.values()), label=label, **look)
    for verb, panel in panels.items():
        panel.set(title=verb, xlabel="size of the file", xscale="log", yscale="log")
        panel.set_xticks(list(points), list(map(size_text, points)), rotation=30, fontsize=8)
        panel.minorticks_off()
        panel.grid(color="#d0d7de", linewidth=0.6)
    axes[0].set_ylabel("MiB/s")
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    labels = axes[0].get_legend_handles_labels()
    canvas.legend(*labels, loc="lower center", ncols=5, frameon=False, fontsize=9)
    canvas.tight_layout(rect=(0, 0.1, 1, 1))
    canvas.savefig(path, dpi=110)
