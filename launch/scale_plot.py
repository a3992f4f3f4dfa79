"""A scaling study as one PNG of four panels: strong scaling, weak scaling, memory, and time a step against labels.

Markers are measured. A dashed line is ideal scaling; a solid one is the cost model, or the memory that was planned.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from haste_dist.cost_model import CostModel, load_of_row
from haste_dist.manifest import replacing
from haste_dist.plot import BLUE, GREEN, GREY, ORANGE, RED, tidy
from haste_dist.study import KEYS, Row, layer_ms, measured
from haste_launch.progress import short

COLOURS, MARKERS = (BLUE, ORANGE, GREEN, RED, "#AA4499", "#44AA99"), "osD^vP"
MOST_LINES = len(COLOURS)


def plot_study(folder: Path, rows: Sequence[Row], model: CostModel | None) -> Path:
    """Draws ``folder/study.png`` and returns its path."""
    path = folder / "study.png"
    with replacing(path) as file:
        draw_study(rows, model).savefig(file, format="png", dpi=130)
    return path


def draw_study(rows: Sequence[Row], model: CostModel | None) -> Figure:
    """The figure; its axes are strong scaling, weak scaling, memory and time against labels. Other numbers stay at the commonest row's."""
    rows = measured(rows)
    base = _commonest(rows)
    along = [row for row in rows if all(row[name] == base[name] for name in KEYS if name not in ("labels", "ranks", "head_rows"))]
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    shape = f"N = {base['batch']:,}, F = {base['fan_in']}, G = {base['group']}, {base['tokens']} tokens"
    figure.suptitle(f"{base['device']}  ·  {shape}  ·  {base['encoder_parameters'] / 1e6:.4g}M encoder weights", fontsize=12)
    model = model if model is not None and model.device == base["device"] else None
    _draw_strong(axes[0], along, model)
    _draw_weak(axes[1], along, model)
    _draw_memory(axes[2], along)
    _draw_labels(axes[3], along, model)
    for axis in axes:
        if model is not None and axis is not axes[2]:
            axis.plot([], [], color=GREY, linewidth=1.3, label="cost model")
        tidy(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, framealpha=0.9)
    return figure


def _draw_strong(axis: Axes, rows: list[Row], model: CostModel | None) -> None:
    axis.set(title="Strong scaling: the same labels on more ranks", xlabel="ranks", ylabel="time a step (ms)")
    lines = [(labels, part) for labels, part in _by(rows, lambda row: row["labels"]) if len(part) > 1][-MOST_LINES:]
    for (labels, part), colour, marker in zip(lines, COLOURS, MARKERS, strict=False):
        _measured(axis, part, "ranks", colour, marker, f"{short(labels)} labels")
        _ideal(axis, part, "ideal" if part is lines[-1][1] else "_")
        _predicted(axis, part, "ranks", colour, model)
    _finish(axis, [part for _, part in lines], "ranks")


def _draw_weak(axis: Axes, rows: list[Row], model: CostModel | None) -> None:
    axis.set(title="Weak scaling: the same labels a rank", xlabel="ranks", ylabel="ms")
    lines = [(each, part) for each, part in _by(rows, lambda row: row["labels"] / row["ranks"]) if len(part) > 1][-MOST_LINES // 2 :]
    for (each, part), colour, marker in zip(lines, COLOURS, MARKERS, strict=False):
        _measured(axis, part, "ranks", colour, marker, f"{short(each)} labels a rank, step")
        x, y = [row["ranks"] for row in part], [layer_ms(row) for row in part]
        axis.plot(x, y, color=colour, marker=marker, fillstyle="none", linestyle=":", markersize=5, label="its output layer")
        _predicted(axis, part, "ranks", colour, model)
    _finish(axis, [part for _, part in lines], "ranks")


def _draw_memory(axis: Axes, rows: list[Row]) -> None:
    axis.set(title="Memory of the fullest rank", xlabel="labels", ylabel="GiB")
    lines = _by(rows, lambda row: row["ranks"])[:MOST_LINES]
    for (ranks, part), colour, marker in zip(lines, COLOURS, MARKERS, strict=False):
        part = sorted(part, key=lambda row: row["labels"])
        x = [row["labels"] for row in part]
        axis.plot(x, [row["peak_gib"] for row in part], color=colour, marker=marker, linestyle="none", markersize=6, label=_ranks(ranks))
        axis.plot(x, [row["planned_gib"] for row in part], color=colour, linewidth=1.3, label="planned" if ranks == lines[-1][0] else "_")
    _finish(axis, [part for _, part in lines], "labels")


def _draw_labels(axis: Axes, rows: list[Row], model: CostModel | None) -> None:
    axis.set(title="Time a step against labels", xlabel="labels", ylabel="time a step (ms)")
    lines = _by(rows, lambda row: row["ranks"])[:MOST_LINES]
    for (ranks, part), colour, marker in zip(lines, COLOURS, MARKERS, strict=False):
        _measured(axis, part, "labels", colour, marker, _ranks(ranks))
        _predicted(axis, part, "labels", colour, model)
    _finish(axis, [part for _, part in lines], "labels")


def _measured(axis: Axes, rows: list[Row], name: str, colour: str, marker: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: row[name])
    x, low, middle, high = ([row[key] for row in rows] for key in (name, "p20_ms", "p50_ms", "p80_ms"))
    spread = [np.subtract(middle, low), np.subtract(high, middle)]
    axis.errorbar(x, middle, yerr=spread, color=colour, marker=marker, linestyle="none", markersize=6, elinewidth=1, label=label)


def _ideal(axis: Axes, rows: list[Row], label: str) -> None:
    rows = sorted(rows, key=lambda row: row["ranks"])
    first, last = rows[0], rows[-1]
    y = [first["p50_ms"], first["p50_ms"] * first["ranks"] / last["ranks"]]
    axis.plot([first["ranks"], last["ranks"]], y, color=GREY, linestyle="--", linewidth=1.1, zorder=1, label=label)


def _predicted(axis: Axes, rows: list[Row], name: str, colour: str, model: CostModel | None) -> None:
    if model is not None:
        rows = sorted(rows, key=lambda row: row[name])
        y = [1e3 * model.predict(load_of_row(row)).step for row in rows]
        axis.plot([row[name] for row in rows], y, color=colour, linewidth=1.3, alpha=0.8, label="_")


def _finish(axis: Axes, lines: Sequence[list[Row]], name: str) -> None:
    """Logarithmic scales with the measured values as ticks, or a word that there is nothing to show."""
    values = sorted({row[name] for part in lines for row in part})
    if not values:
        axis.text(0.5, 0.5, "no two points that differ so", transform=axis.transAxes, ha="center", va="center", color=GREY, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
        return
    axis.set(xscale="log", yscale="log")
    axis.margins(x=0.08, y=0.12)
    ticks = [value for i, value in enumerate(values) if i == 0 or value >= 1.3 * values[i - 1]]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _by(rows: Sequence[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    return [(value, [row for row in rows if key(row) == value]) for value in sorted({key(row) for row in rows})]


def _commonest(rows: Sequence[Row]) -> Row:
    """A row of the configuration that has most points."""

    def fixed(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in KEYS if name not in ("labels", "ranks", "head_rows"))

    counts = [sum(fixed(other) == fixed(row) for other in rows) for row in rows]
    return rows[int(np.argmax(counts))]


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
