"""The report of a study: ``report.md`` with its tables, and ``report.png``. All of it comes from what the runs left in their folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from haste_dist.intervals import Interval, over_seeds, paired_bootstrap
from haste_dist.manifest import replacing
from haste_dist.metrics import FREQUENCY_BINS
from haste_dist.plot import BLUE, GREEN, GREY, ORANGE, RED, tidy
from haste_dist.trials import Study, Trial, read_result, read_texts

MAIN = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5")
BINS = [f"r_at_5_freq_{name}" for _, _, name in FREQUENCY_BINS]
BIN_NAMES = [name.replace("_", "-").replace("over-", "over ") for _, _, name in FREQUENCY_BINS]
COLOURS = (BLUE, ORANGE, GREEN, RED, "#AA4499", "#44AA99", GREY, "#DDAA33")


def write_report(study: Study, trials: Sequence[Trial], out: Path, plot: bool = True) -> Path:
    """Writes the report of the finished ``trials`` and returns its path. Raises HasteError."""
    results = {name: [result for t in trials if t.case == name and (result := read_result(t))] for name in study.cases}
    results = {name: found for name, found in results.items() if found}
    first = next(iter(results.values()))[0]
    lines = [
        f"# {study.config}: {len(results)} cases",
        "",
        f"{int(first['rows']):,} texts of the {study.split} split, percent, the last checkpoint of each run. Settings of all cases: "
        f"`{' '.join(study.settings) or 'none'}`. Seeds: {', '.join(map(str, study.seeds))}. {first['device']}, torch {first['torch']}, "
        f"commit {first['commit'][:12]}.",
        "",
        "Mean over seeds, ± half of its 95% interval (Student's t) where there are several.",
        "",
        *_table(["case", "seeds", *MAIN], [[name, str(len(found)), *_cells(found, MAIN)] for name, found in results.items()]),
        "",
        "Recall@5 by the number of training texts of a label:",
        "",
        *_table(["case", *BIN_NAMES], [[name, *_cells(found, BINS)] for name, found in results.items()]),
        "",
        "What it costs (a run alone on its device is faster than runs side by side):",
        "",
        *_table(
            ["case", "output layer, MB", "peak, GiB", "ms a step (median)", "steps", "training, s"],
            [[name, *_costs(found)] for name, found in results.items()],
        ),
    ]
    base = study.baseline
    compared = [name for name in results if name != base] if base in results else []
    rows = [row for name in compared if (row := _difference_row(name, base, trials))]
    if rows:
        lines += [
            "",
            f"Difference to {base}, with the 95% interval of a paired bootstrap over the texts (seeds that both have); bold: apart from 0.",
            "",
            *_table(["case", *("P@1", "P@5", "PSP@5"), *(f"R@5, seen {name}" for name in BIN_NAMES[:2])], rows),
        ]
    lines += ["", "Settings of each case:", "", *(f"- {name}: `{' '.join(study.cases[name]) or 'as above'}`" for name in results)]
    if plot:
        with replacing(out / "report.png") as file:
            draw_report(results).savefig(file, format="png", dpi=130)
        lines += ["", "![metrics by case](report.png)"]
    with replacing(out / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    return out / "report.md"


def draw_report(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Two axes: the main metrics, and recall by frequency; a bar a case, a dot a run."""
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    axes = figure.subplots(2, 1)
    _bars(axes[0], results, MAIN, MAIN, "Metrics")
    _bars(axes[1], results, BINS, BIN_NAMES, "Recall@5 by the number of training texts of a label")
    axes[0].legend(loc="upper right", fontsize=8, ncols=max(1, min(4, len(results))), framealpha=0.9)
    return figure


def _bars(axis: Axes, results: dict[str, list[dict[str, Any]]], names: Sequence[str], labels: Sequence[str], title: str) -> None:
    axis.set(title=title, ylabel="%")
    width = 0.8 / len(results)
    for i, (case, found) in enumerate(results.items()):
        at = np.arange(len(names)) - 0.4 + width * (i + 0.5)
        values = 100 * np.array([[result.get(name, np.nan) for name in names] for result in found])
        axis.bar(at, values.mean(axis=0), 0.92 * width, color=COLOURS[i % len(COLOURS)], label=case)
        for run in values:
            axis.plot(at, run, ".", color="black", markersize=3)
    axis.set_xticks(np.arange(len(names)), labels)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.margins(x=0.01, y=0.18 if title == "Metrics" else 0.05)
    tidy(axis)


def _cells(found: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        values = [100 * result[name] for result in found if name in result]
        cells.append(_plus_minus(over_seeds(values)) if values else "")
    return cells


def _plus_minus(one: Interval) -> str:
    return f"{one.value:.2f}" if np.isnan(one.half) else f"{one.value:.2f} ± {one.half:.2f}"


def _costs(found: list[dict[str, Any]]) -> list[str]:
    def mean(name: str) -> float:
        return float(np.mean([result[name] for result in found]))

    figures = (f"{mean('output_bytes') / 1e6:.4g}", f"{mean('peak_gib'):.2f}", f"{mean('step_p50_ms'):.1f}")
    return [*figures, f"{mean('step'):,.0f}", f"{mean('train_seconds'):,.0f}"]


def _difference_row(case: str, base: str, trials: Sequence[Trial]) -> list[str] | None:
    by_key = {(t.case, t.seed): t for t in trials}
    seeds = [t.seed for t in trials if t.case == case and (base, t.seed) in by_key]
    if not seeds:
        return None
    ours, theirs = ([read_texts(by_key[name, seed]) for seed in seeds] for name in (case, base))
    found = paired_bootstrap(ours, theirs)
    cells = []
    for name in ("P@1", "P@5", "PSP@5", *BINS[:2]):
        one = found[name]
        text = f"{100 * one.value:+.2f} [{100 * one.low:+.2f}, {100 * one.high:+.2f}]"
        cells.append(f"**{text}**" if one.apart_from_zero else text)
    return [case, *cells]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
