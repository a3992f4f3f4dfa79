"""The curves of a run as one PNG of four panels: loss, precision, sparsity churn, speed.

Drawn from ``metrics.jsonl`` alone, so a run can be looked at while it trains. Where a run was resumed, what the earlier
process did behind the resumed step is left out: those steps were taken again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, StrMethodFormatter

from haste_dist.manifest import replacing
from haste_dist.runlog import read_events

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#D55E00", "#009E73", "#CC3311", "#8A8A8A"  # told apart by colour-blind readers too
SMOOTHED_FROM = 40  # points from which a running mean is drawn over the raw loss
WINDOWS = 60  # most points of the speed curve; each shows the middle of the steps in its window

Event = dict[str, Any]


def plot_run(folder: str | Path) -> Path:
    """Draws ``folder/plot.png`` from ``folder/metrics.jsonl`` and returns its path. Raises DataError if there is no readable log."""
    folder = Path(folder)
    figure = draw_run(read_events(folder), folder.resolve().name)
    path = folder / "plot.png"
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return path


def draw_run(events: Sequence[Event], name: str) -> Figure:
    """The figure; its first four axes are loss, precision, churn and speed, in this order (speed's right-hand scale is the fifth)."""
    kept = valid_events(events)
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    figure.suptitle(_headline(events, name), fontsize=12)
    _draw_loss(axes[0], kept["step"])
    _draw_precision(axes[1], kept["eval"])
    _draw_churn(axes[2], kept["rewire"])
    _draw_speed(axes[3], kept["step"])
    last = max((event["step"] for kind in ("step", "rewire") for event in kept[kind]), default=1)
    resumed = sorted({event["step"] for event in events if event["event"] == "start" and 0 < event.get("step", 0) <= last})
    for axis in (axes[0], axes[2], axes[3]):
        axis.set_xlim(0, last * 1.02)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        for i, step in enumerate(resumed):
            axis.axvline(step, color=GREY, linestyle=":", linewidth=1, zorder=0, label="resumed" if i == 0 else "_")
    for axis in axes:
        tidy(axis)
    for axis, where in zip(axes, ("upper right", "lower right", "upper right", "lower right"), strict=True):
        handles, labels = axis.get_legend_handles_labels()
        for other in axis.figure.axes:
            if other is not axis and axis.get_shared_x_axes().joined(axis, other):
                more = other.get_legend_handles_labels()
                handles, labels = handles + more[0], labels + more[1]
        if handles:
            axis.legend(handles, labels, loc=where, fontsize=9, framealpha=0.9)
    return figure


def valid_events(events: Sequence[Event]) -> dict[str, list[Event]]:
    """The step, eval and rewire events that stand, each list ascending and distinct in step.

    A process that starts at step s takes over: earlier events behind s go. Of two at one step the later one wins.
    """
    kept: dict[str, dict[int, Event]] = {"step": {}, "eval": {}, "rewire": {}}
    for event in events:
        if event["event"] == "start":
            begin = event.get("step", 0)
            kept = {kind: {step: one for step, one in by_step.items() if step <= begin} for kind, by_step in kept.items()}
        elif event["event"] in kept and "step" in event:
            kept[event["event"]][event["step"]] = event
    return {kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in kept.items()}


def tidy(axis: Axes) -> None:
    """What all plots of this project have in common: a light grid behind the curves, no frame above and to the right."""
    axis.grid(True, color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_loss(axis: Axes, steps: list[Event]) -> None:
    axis.set(title="Training loss", xlabel="step", ylabel="loss (sum over all labels)")
    x, y = _columns(steps, "step", "loss")
    if not len(x):
        return _nothing(axis, "no training step logged yet")
    if len(x) >= SMOOTHED_FROM:
        axis.plot(x, y, color=BLUE, linewidth=0.8, alpha=0.35, label="logged")
        axis.plot(x, _running_mean(y, max(5, len(y) // 25)), color=BLUE, linewidth=2, label="running mean")
    else:
        axis.plot(x, y, color=BLUE, linewidth=1.6, marker="o", markersize=3, label="logged")
    if y.min() > 0 and y.max() > 10 * y.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))


def _draw_precision(axis: Axes, evaluations: list[Event]) -> None:
    splits = sorted({event["split"] for event in evaluations if "split" in event})
    axis.set(title=f"Precision{' on ' + ', '.join(splits) if splits else ''}", xlabel="epoch", ylabel="P@k (%)")
    drawn = False
    for key, colour, marker in (("P@1", BLUE, "o"), ("P@3", ORANGE, "s"), ("P@5", GREEN, "^")):
        x, y = _columns(evaluations, "epoch", key)
        if not len(x):
            continue
        drawn = True
        best = int(np.argmax(y))
        axis.plot(x, 100 * y, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=f"{key}, best {100 * y[best]:.1f}")
        axis.plot(x[best], 100 * y[best], color=colour, marker=marker, markersize=9, fillstyle="none", label="_")
    if not drawn:
        return _nothing(axis, "no evaluation yet")
    axis.set_ylim(bottom=0)
    axis.margins(y=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_churn(axis: Axes, rewirings: list[Event]) -> None:
    axis.set(title="Sparsity churn", xlabel="step", ylabel="tail connections replaced (%)")
    x, replaced, connections = _columns(rewirings, "step", "replaced", "connections")
    if not len(x):
        return _nothing(axis, "no rewiring yet")
    share = 100 * replaced / np.maximum(connections, 1)
    lines = axis.vlines(x, 0, share, color=ORANGE, linewidth=1.2, alpha=0.6)
    lines.set_label("_")
    axis.plot(x, share, color=ORANGE, marker="o", markersize=4.5, linestyle="none", label="replaced at a rewiring")
    at, planned = _columns(rewirings, "step", "fraction")
    if len(at) > 1:
        axis.plot(at, 100 * planned, color=GREY, linewidth=1.2, linestyle="--", label="schedule")
    axis.set_ylim(bottom=0)
    axis.margins(y=0.15)


def _draw_speed(axis: Axes, steps: list[Event]) -> None:
    axis.set(title="Speed", xlabel="step", ylabel="time a step (ms)")
    x, ms, rate = _columns(steps, "step", "step_ms", "samples_per_s")
    if not len(x):
        return _nothing(axis, "no training step logged yet")
    if len(x) > 2 and ms[0] > 3 * np.median(ms):  # start-up, not speed: it would flatten all the rest
        x, ms, rate = x[1:], ms[1:], rate[1:]
    windows = np.array_split(np.arange(len(x)), min(WINDOWS, -(-len(x) // 5)) if len(x) >= 10 else len(x))
    middle = np.array([x[part].mean() for part in windows])
    low, half, high = (np.array([np.percentile(ms[part], q) for part in windows]) for q in (20, 50, 80))
    if len(windows) < len(x):
        axis.fill_between(middle, low, high, color=BLUE, alpha=0.2, linewidth=0, label="p20 to p80")
    axis.plot(
        middle,
        half,
        color=BLUE,
        linewidth=1.8,
        marker="o" if len(x) < 10 else None,
        markersize=4,
        label=f"time a step, median {np.median(ms):.3g} ms",
    )
    axis.set_ylim(0, 1.8 * max(high))  # the other scale ends lower, so that the two curves stand apart
    right = axis.twinx()
    right.plot(
        middle,
        [np.median(rate[part]) for part in windows],
        color=RED,
        linewidth=1.4,
        linestyle="--",
        marker="o" if len(x) < 10 else None,
        markersize=4,
        label=f"texts a second, median {np.median(rate):,.0f}",
    )
    right.set_ylabel("texts a second", color=RED)
    right.tick_params(axis="y", colors=RED)
    right.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_ylim(0, 1.15 * max(rate.max(), 1e-9))
    right.spines[["top", "left"]].set_visible(False)


def _nothing(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=GREY, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])


def _headline(events: Sequence[Event], name: str) -> str:
    """The run's name and what it is, from its latest start."""
    starts = [event for event in events if event["event"] == "start"]
    ends = [event for event in events if event["event"] in ("start", "end")]
    parts = [name]
    if starts:
        start = starts[-1]
        for key, unit in (("labels", "labels"), ("texts", "training texts"), ("ranks", "rank")):
            if isinstance(start.get(key), int):
                many = "s" if key == "ranks" and start[key] != 1 else ""
                parts.append(f"{start[key]:,} {unit}{many}")
        if start.get("device"):
            parts.append(str(start["device"]))
    if ends and ends[-1]["event"] == "end" and ends[-1].get("reason"):
        parts.append(str(ends[-1]["reason"]))
    return "  ·  ".join(parts)


def _columns(events: list[Event], *names: str) -> list[np.ndarray]:
    """The named values of the events that have all of them as numbers, as float64."""
    rows = [[event.get(name) for name in names] for event in events]
    table = np.array([row for row in rows if all(isinstance(value, int | float) for value in row)], np.float64)
    return list(table.reshape(-1, len(names)).T)


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Mean over ``width`` points around each one, over fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    low, high = np.maximum(0, at - width // 2), np.minimum(len(y), at + (width + 1) // 2)
    return (total[high] - total[low]) / (high - low)
