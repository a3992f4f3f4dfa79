"""A sweep as one PNG: the metric against each setting that varied; the best trial is ringed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from haste_dist.manifest import replacing
from haste_dist.plot import BLUE, ORANGE, tidy
from haste_launch.sweep_space import Varied

if TYPE_CHECKING:
    from haste_launch.sweep import Trial

MOST_COLUMNS = 3


def plot_sweep(folder: Path, trials: Sequence["Trial"], varied: Sequence[Varied], metric: str) -> Path:
    """Draws ``folder/sweep.png`` and returns its path."""
    path = folder / "sweep.png"
    with replacing(path) as file:
        draw_sweep(trials, varied, metric).savefig(file, format="png", dpi=130)
    return path


def draw_sweep(trials: Sequence["Trial"], varied: Sequence[Varied], metric: str) -> Figure:
    """The figure; an axis a setting. Trials that failed are left out."""
    good = [trial for trial in trials if trial.value is not None]
    best = max(good, key=lambda trial: trial.value or 0.0)
    columns = min(len(varied), MOST_COLUMNS)
    rows = -(-len(varied) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    figure.suptitle(f"{len(good)} trials, best {metric} {100 * (best.value or 0.0):.2f} (ringed)", fontsize=12)
    y = [100 * (trial.value or 0.0) for trial in good]
    for axis, one in zip(axes, varied, strict=False):
        x = [_place(one, trial.settings[one.name]) for trial in good]
        axis.scatter(x, y, s=28, color=BLUE)
        axis.scatter(
            [_place(one, best.settings[one.name])], [100 * (best.value or 0.0)], s=130, facecolors="none", edgecolors=ORANGE, linewidths=2
        )
        if one.log:
            axis.set_xscale("log")
        if one.is_list:
            axis.set_xticks(range(len(one.words)), one.words)
            axis.set_xlim(-0.5, len(one.words) - 0.5)
        axis.set_xlabel(one.name)
        tidy(axis)
    for axis in axes[len(varied) :]:
        axis.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel(f"{metric}, %")
    return figure


def _place(one: Varied, value: object) -> float:
    return float(one.words.index(str(value))) if one.is_list else float(value)  # type: ignore[arg-type]
