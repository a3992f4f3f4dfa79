"""The plots of ``haste inspect``: two panels a page."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from haste_dist.plot import BLUE, GREEN, GREY, ORANGE, tidy

COLOURS = (BLUE, ORANGE, GREEN)
BARS = 60  # most bars of a histogram


def draw(kind: str, title: str, series: dict[str, NDArray]) -> Figure:
    """The figure of a page of that kind; ``series``: the numbers behind it, by name."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(1, 2)
    {"data": _draw_data, "labels": _draw_labels, "groups": _draw_groups}[kind](axes, series)
    for axis in axes:
        tidy(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=9, framealpha=0.9)
    return figure


def _draw_data(axes: NDArray, series: dict[str, NDArray]) -> None:
    for axis, what in zip(axes, ("tokens", "labels"), strict=True):
        axis.set(title=f"{what.capitalize()} a text", xlabel=what, ylabel="share of the split's texts (%)")
        for colour, (name, counts) in zip(COLOURS, ((n, c) for n, c in series.items() if n.endswith(what)), strict=False):
            _steps(axis, counts, colour, name.removesuffix(f" {what}"))
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_labels(axes: NDArray, series: dict[str, NDArray]) -> None:
    frequency, head = series["frequency"], int(series["head"][0])
    axes[0].set(title="The long tail", xlabel="label, most frequent first", ylabel="training texts", xscale="log", yscale="symlog")
    at = np.unique(np.geomspace(1, len(frequency), 400).astype(int))
    axes[0].plot(at, frequency[at - 1], color=BLUE, linewidth=2, drawstyle="steps-post")
    axes[0].set_ylim(bottom=0)
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_major_formatter(EngFormatter(sep=""))
    if head:
        axes[0].axvline(head, color=GREY, linestyle="--", linewidth=1.2, label=f"end of the dense head, {head:,} labels")
    axes[1].set(title="Words of a label's text", xlabel="words (0: no text)", ylabel="share of labels (%)")
    _steps(axes[1], series["words"], BLUE, "_")


def _draw_groups(axes: NDArray, series: dict[str, NDArray]) -> None:
    axes[0].set(title="How close the labels of a group are", xlabel="mean cosine to the group's centroid", ylabel="share of groups (%)")
    axes[1].set(title="How close neighbouring groups are", xlabel="cosine of a centroid to the next one", ylabel="share of groups (%)")
    if not series:
        for axis in axes:
            axis.text(0.5, 0.5, "labels were not embedded", transform=axis.transAxes, ha="center", va="center", color=GREY)
        return
    both = np.concatenate([series["cohesion"], series["random"]])
    for name, key, colour in (("groups", "cohesion", BLUE), ("random groups", "random", GREY)):
        _histogram(axes[0], series[key], (both.min(), both.max()), colour, f"{name}, mean {series[key].mean():.3f}")
    if len(series["next"]) > 1:
        _histogram(axes[1], series["next"][:-1], None, BLUE, f"mean {series['next'][:-1].mean():.3f}")


def _histogram(axis: Axes, values: NDArray, span: tuple[float, float] | None, colour: str, label: str) -> None:
    share = np.full(len(values), 100 / len(values))
    axis.hist(values, bins=BARS, range=span, weights=share, color=colour, alpha=0.65, label=label)


def _steps(axis: Axes, counts: NDArray, colour: str, label: str) -> None:
    """A histogram from counts by length; what is beyond the 99.9th percentile of a long one goes into its last bar."""
    total = max(1, counts.sum())
    end = int(np.searchsorted(np.cumsum(counts), 0.999 * total)) + 2 if len(counts) > BARS else len(counts)
    width = -(-end // BARS)
    bars = np.add.reduceat(counts[:end], np.arange(0, end, width)) if end <= len(counts) else counts
    bars[-1] += counts[end:].sum()
    if counts[end:].any() and not label.startswith("_"):
        label += " (last bar: and more)"
    axis.stairs(100 * bars / total, np.arange(len(bars) + 1) * width - 0.5, color=colour, fill=True, alpha=0.45, label=label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
