"""The report of a study: ``report.md`` with its tables and plots. All of it comes from what the runs left in their folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haste_dist.errors import DataError
from haste_dist.intervals import Interval, mean_of, over_seeds, resample
from haste_dist.manifest import replacing
from haste_dist.trials import AVERAGE, Study, Trial, read_result, read_texts
from haste_launch.study_plot import BINS, Seen, write_plots

MAIN = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5")
COMPARED = ("P@1", "P@5", "PSP@5", *list(BINS)[:2])

Draws = dict[tuple[str, int], dict[str, NDArray[np.float64]]]  # of each case and seed, as from ``resample``


def write_report(study: Study, trials: Sequence[Trial], out: Path, plot: bool = True) -> Path:
    """Writes the report of the finished ``trials`` and returns its path. Raises HasteError."""
    results = {name: [result for t in trials if t.case == name and (result := read_result(t))] for name in study.all_cases}
    results = {name: found for name, found in results.items() if found}
    first = next(iter(results.values()))[0]
    lines = [
        f"# {study.config}: {len(results)} cases",
        "",
        f"{int(first['rows']):,} texts of the {study.split} split, percent, the last checkpoint of each run. Settings of all cases: "
        f"`{' '.join(study.settings) or 'none'}`. Seeds: {', '.join(map(str, study.seeds))}. {first['device']}, torch {first['torch']}"
        f"{first['commit'] and ', commit ' + first['commit'][:12]}.",
        "",
        "Mean over seeds, ± half of its 95% interval (Student's t) where there are several.",
        "",
        *_table(["case", "seeds", *MAIN], [[name, str(len(found)), *_cells(found, MAIN)] for name, found in results.items()]),
        "",
        "Recall@5 by the number of training texts of a label:",
        "",
        *_table(["case", *BINS.values()], [[name, *_cells(found, list(BINS))] for name, found in results.items()]),
        "",
        "What it costs (a run alone on its device is faster than runs side by side):",
        "",
        *_table(
            ["case", "output layer, MB", "peak, GiB", "ms a step (median)", "steps", "training, s"],
            [[name, *_costs(found)] for name, found in results.items()],
        ),
    ]
    base = study.baseline
    runs = [trial for trial in trials if trial.case in results]
    texts = [read_texts(trial) for trial in runs]
    if different := [t.folder for t, one in zip(runs, texts, strict=True) if one.shape != texts[0].shape]:
        raise DataError(f"{different[0]}: scored other texts than {runs[0].folder}; remove it and run the study again")
    draws: Draws = dict(zip([(t.case, t.seed) for t in runs], resample(texts), strict=True))
    rows = [row for name in results if name != base and (row := _difference_row(name, base, draws))]
    if rows:
        lines += [
            "",
            f"Difference to {base}, with the 95% interval of a paired bootstrap over the texts (seeds that both have); bold: apart from 0.",
            "",
            *_table(["case", *COMPARED[:3], *(f"R@5, seen {BINS[name]}" for name in COMPARED[3:])], rows),
        ]
    if study.average:
        lines += ["", f"CASE{AVERAGE} is the mean of the weights of {study.average} seeds each; its steps and time are theirs together."]
    cases = [name for name in results if name in study.cases]
    lines += ["", "Settings of each case:", "", *(f"- {name}: `{' '.join(study.cases[name]) or 'as above'}`" for name in cases)]
    if plot:
        lines += [
            "",
            "Points are means over seeds, bars their 95% interval (bootstrap over texts), strokes single seeds; "
            f"orange: {next(iter(results))}. The dashed line of the last plot joins the cases that no other beats with as little memory.",
        ]
        for title, name in write_plots({case: _seen(case, found, draws) for case, found in results.items()}, out):
            lines += ["", f"![{title}]({name})"]
    with replacing(out / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    return out / "report.md"


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


def _difference_row(case: str, base: str, draws: Draws) -> list[str] | None:
    seeds = [seed for name, seed in draws if name == case and (base, seed) in draws]
    if not seeds:
        return None
    found = mean_of([draws[case, seed] for seed in seeds], [draws[base, seed] for seed in seeds])
    cells = []
    for name in COMPARED:
        one = found[name]
        text = f"{100 * one.value:+.2f} [{100 * one.low:+.2f}, {100 * one.high:+.2f}]"
        cells.append("" if np.isnan(one.value) else f"**{text}**" if one.apart_from_zero else text)
    return [case, *cells]


def _seen(case: str, found: list[dict[str, Any]], draws: Draws) -> Seen:
    means = {name: one for name, one in mean_of([of for key, of in draws.items() if key[0] == case]).items() if not np.isnan(one.value)}
    seeds = {name: [result[name] for result in found if name in result] for name in means}
    return Seen(means, seeds, float(np.mean([result["output_bytes"] for result in found])))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
