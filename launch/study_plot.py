"""The plots of a study: metrics by case with intervals, recall by label frequency, accuracy against the output layer's memory.

A case is a line in the first two, with the mean over seeds as a point, its 95% interval (bootstrap over texts) as a bar, and a small dot
a seed; the first case's mean is drawn through all lines. In the third a case is a point, and what no other case beats is joined.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from haste_dist.intervals import Interval
from haste_dist.manifest import replacing
from haste_dist.metrics import FREQUENCY_BINS
from haste_dist.plot import BLUE, GREY, ORANGE, tidy

MAIN = ("P@1", "P@5", "PSP@1", "PSP@5")
BINS = {f"r_at_5_freq_{name}": name.replace("over_", "over ").replace("_", " to ") for _, _, name in FREQUENCY_BINS}
PLACES = [(x, y) for x in (6, -6, 0) for y in (0, 7, -7, 14, -14, 22, -22, 30, -30) if x or y]  # points a label may lie off its dot
NEAR = 7  # points: a line leads to a label that lies further off


@dataclass(frozen=True)
class Seen:
    """What is drawn of a case: of each metric the interval of the mean and the seeds' values, as fractions; the layer's memory."""

    means: Mapping[str, Interval]
    seeds: Mapping[str, Sequence[float]]
    output_bytes: float


def write_plots(cases: Mapping[str, Seen], out: Path) -> list[tuple[str, str]]:
    """Draws all, and returns (title, file name) of each. The first of ``cases`` is what the others are compared with."""
    names = {name: f"R@5, seen {bin}" for name, bin in BINS.items()}
    drawn = [
        ("Metrics", "metrics.png", draw_lines(cases, dict(zip(MAIN, MAIN, strict=True)))),
        ("Recall@5 by the number of training texts of a label", "recall.png", draw_lines(cases, names)),
        ("Accuracy against the output layer's memory", "memory.png", draw_memory(cases)),
    ]
    for _, name, figure in drawn:
        with replacing(out / name) as file:
            figure.savefig(file, format="png", dpi=130)
    return [(title, name) for title, name, _ in drawn]


def draw_lines(cases: Mapping[str, Seen], metrics: Mapping[str, str]) -> Figure:
    """An axis for each of ``metrics`` (name to title) that some case has, a line a case, the first on top."""
    shown = {name: title for name, title in metrics.items() if any(name in seen.means for seen in cases.values())}
    figure = Figure(figsize=(2.4 + 2.3 * len(shown), 1.3 + 0.3 * len(cases)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, max(1, len(shown)), sharey=True))
    for axis, (name, title) in zip(axes, shown.items(), strict=False):
        for at, (case, seen) in enumerate(cases.items()):
            if name in seen.means:
                _line(axis, at, seen.means[name], seen.seeds[name], ORANGE if case == next(iter(cases)) else BLUE)
        first = next(iter(cases.values()))
        if name in first.means:
            axis.axvline(100 * first.means[name].value, color=ORANGE, linewidth=0.9, linestyle="--", zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("%")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.margins(x=0.08)
        tidy(axis)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(cases)), list(cases))
    axes[0].set_ylim(len(cases) - 0.4, -0.6)
    return figure


def _line(axis: Axes, at: int, mean: Interval, seeds: Sequence[float], colour: str) -> None:
    if not np.isnan(mean.low):
        axis.plot([100 * mean.low, 100 * mean.high], [at, at], color=colour, linewidth=3.5, alpha=0.35, solid_capstyle="butt")
    if len(seeds) > 1:
        axis.plot([100 * value for value in seeds], [at] * len(seeds), "|", color="black", markersize=7, markeredgewidth=0.8)
    axis.plot([100 * mean.value], [at], "o", color=colour, markersize=5)


def draw_memory(cases: Mapping[str, Seen]) -> Figure:
    """P@1 and PSP@5 against megabytes of weights, momentum, biases and indices."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    drawn = {}
    for axis, name in zip(figure.subplots(1, 2), ("P@1", "PSP@5"), strict=True):
        drawn[axis] = points = {
            case: (seen.output_bytes / 1e6, 100 * seen.means[name].value) for case, seen in cases.items() if name in seen.means
        }
        best = pareto(list(points.values()))
        axis.plot(*zip(*best, strict=True), color=GREY, linewidth=1, linestyle="--", zorder=1)
        for case, (x, y) in points.items():
            half = 100 * cases[case].means[name].half
            colour = ORANGE if case == next(iter(cases)) else BLUE if (x, y) in best else GREY
            if not np.isnan(half):
                axis.plot([x, x], [y - half, y + half], color=colour, linewidth=2.5, alpha=0.25, solid_capstyle="butt", zorder=1)
            axis.plot([x], [y], "o", color=colour, markersize=5.5, zorder=2)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(title=name, xlabel="output layer, MB (log scale)", ylabel="%")
        axis.margins(x=0.18, y=0.12)
        tidy(axis)
    figure.draw_without_rendering()  # else nothing has its place yet
    figure.set_layout_engine("none")
    for axis, points in drawn.items():
        label_points(axis, points, figure.bbox.x1)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that have more of the second number than all with less or as much of the first, by the first."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept


def label_points(axis: Axes, points: Mapping[str, tuple[float, float]], right: float) -> None:
    """Writes each point's name beside it: where no other name or point is, and no other point nearer, if there is such a place.

    Of a figure that was laid out, and ends at ``right``.
    """
    where = dict(zip(points, axis.transData.transform(list(points.values())), strict=True))
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in where.values()]
    frame = axis.get_window_extent()
    for name, at in sorted(points.items(), key=lambda item: (-item[1][1], item[1][0])):
        text = axis.annotate(name, at, xytext=(0, 0), textcoords="offset points", fontsize=8)
        text.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})
        found = []
        for number, (x, y) in enumerate(PLACES):
            text.set(position=(x, y), ha="left" if x > 0 else "right" if x < 0 else "center", va="center")
            box = text.get_window_extent()
            outside = not (frame.x0 <= box.x0 and box.x1 <= min(frame.x1 + 30, right) and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            misread = min(where, key=lambda point: _distance(box, where[point])) != name
            found.append((sum(box.overlaps(other) for other in taken) + outside + 0.5 * misread, number))
            if not found[-1][0]:
                break
        x, y = PLACES[min(found)[1]]
        text.set(position=(x, y), ha="left" if x > 0 else "right" if x < 0 else "center", va="center")
        taken.append(text.get_window_extent())
        if abs(y) > NEAR:
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            axis.annotate("", at, xytext=(x, y), textcoords="offset points", arrowprops=line)


def _distance(box: Bbox, point: Sequence[float]) -> float:
    x, y = point
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
