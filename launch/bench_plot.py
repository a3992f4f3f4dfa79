"""Time and memory of every provider against labels, batch, fan-in and group size, the hardware's floor as a line.

One PNG a topic: time above, memory below, a column for each number that varies while the others stay at the first case's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from haste_dist.manifest import replacing
from haste_dist.plot import BLUE, GREEN, GREY, ORANGE, RED, tidy
from haste_launch.bench_case import Case
from haste_launch.progress import short

if TYPE_CHECKING:
    from haste_launch.bench import Row

AXES = {
    "labels": "L, labels",
    "batch": "N, texts a step",
    "width": "D, features",
    "fan_in": "F, fan-in",
    "group": "G, labels a group",
    "k": "K",
}
PURPLE = "#AA4499"
STYLES = {  # colour, marker; told apart without colour too
    "haste_dist": (BLUE, "o"),
    "haste_authors": (RED, "s"),
    "per_label_ffi": (ORANGE, "^"),
    "dense": (GREEN, "D"),
    "dense_width_f": (PURPLE, "v"),
}
NAMES = {
    "haste_dist": "this project",
    "haste_authors": "HASTE's authors",
    "per_label_ffi": "fixed fan-in a label",
    "dense": "dense",
    "dense_width_f": "dense GEMMs of width F",
    "floor": "floor of this device",
}


def plot_rows(rows: Sequence["Row"], path: Path, title: str) -> list[Path]:
    """Draws the rows that have figures; returns the files written: ``path`` for the first topic, ``<stem>-<topic>.png`` for others."""
    written: list[Path] = []
    for topic in dict.fromkeys(row.case.topic for row in rows):
        file = path.with_name(f"{path.stem}-{topic}.png") if written else path
        figure = draw_topic([row for row in rows if row.case.topic == topic], f"{topic.replace('_', ' ')}  ·  {title}")
        with replacing(file) as handle:
            figure.savefig(handle, format="png", dpi=130)
        written.append(file)
    return written


def draw_topic(rows: Sequence["Row"], title: str) -> Figure:
    """Two axes, time and memory, for each number that varies; the batch size where none does."""
    first = rows[0].case
    varied = [name for name in AXES if len(set(values_along(rows, name))) > 1] or ["labels"]
    figure = Figure(figsize=(max(9, 4.2 * len(varied)), 7.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, len(varied), squeeze=False)
    large = max((row.figures["peak_gib"] for row in rows if row.figures), default=0) >= 1
    for column, name in enumerate(varied):
        along = [row for row in rows if on_axis(row.case, first, name) and row.figures]
        _draw(axes[0][column], along, name, "p50_ms", 1)
        axes[0][column].set_ylabel("time a call (ms)")
        _draw(axes[1][column], along, name, "peak_gib", 1 if large else 1024)
        axes[1][column].set_ylabel(f"peak memory ({'GiB' if large else 'MiB'})")
        others = [f"{label[0]} = {getattr(first, other):,}" for other, label in AXES.items() if other != name and getattr(first, other)]
        axes[0][column].set_title(", ".join(others), fontsize=9, color="#555555")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    return figure


def values_along(rows: Sequence["Row"], name: str) -> list[int]:
    """The values of one number among the cases that are else like the first."""
    return sorted({getattr(row.case, name) for row in rows if on_axis(row.case, rows[0].case, name)})


def on_axis(case: Case, first: Case, name: str) -> bool:
    return all(getattr(case, other) == getattr(first, other) for other in AXES if other != name)


def _draw(axis: Axes, rows: Sequence["Row"], name: str, figure: str, scale: float) -> None:
    for provider, label in NAMES.items():
        points = sorted(((getattr(row.case, name), row.figures) for row in rows if row.provider == provider), key=lambda point: point[0])
        if not points:
            continue
        x, y = [value for value, _ in points], [scale * figures[figure] for _, figures in points]
        if provider == "floor":
            axis.plot(x, y, color=GREY, linestyle="--", linewidth=1.6, marker="_", label=label, zorder=1)
            continue
        colour, marker = STYLES[provider]
        ours = provider == "haste_dist"
        axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=2.2 if ours else 1.4, label=label, zorder=3 if ours else 2)
        if figure == "p50_ms" and len(x) > 1:
            low, high = ([figures[key] for _, figures in points] for key in ("p20_ms", "p80_ms"))
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel=AXES[name], xscale="log", yscale="log")
    axis.xaxis.set_major_locator(FixedLocator(sorted({getattr(row.case, name) for row in rows})))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    tidy(axis)
