"""Intervals of a study's figures: over seeds (Student's t), and over the split's texts (paired bootstrap).

Both are of 95%. The bootstrap draws texts with replacement, the same ones for all cases and seeds, and looks at the mean over seeds, of a
case or of the difference of two (so it is paired); sums are weighed anew, so ratios of sums (PSP, recall by frequency) are treated as what
they are.

Letters: n texts, M sums of a text, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from haste_dist.metrics import FREQUENCY_BINS, FrequencyRecall, Metrics, Propensity

LEVEL = 0.95
SAMPLES = 2000
NOBODY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Interval:
    """A figure with its interval; low and high are NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    @property
    def apart_from_zero(self) -> bool:
        return bool(self.low > 0 or self.high < 0)


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean, and Student's interval of it; of one seed none."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def resample(runs: Sequence[NDArray[np.float64]], samples: int = SAMPLES, seed: int = 0) -> list[dict[str, NDArray[np.float64]]]:
    """Every metric of each run's (n, M) sums, (1 + S,): first of all texts, then of S draws of n of them with replacement.

    A draw is the same texts for all runs, and depends on n and ``seed`` alone. Raises ValueError if the runs differ in n.
    """
    if len({texts.shape for texts in runs}) != 1:
        raise ValueError(f"runs of different texts: {[texts.shape for texts in runs]}")
    n = len(runs[0])
    rng = np.random.default_rng(seed)
    sums = [[texts.sum(axis=0, keepdims=True)] for texts in runs]
    for begin in range(0, samples, 200):
        weights_Sn = rng.multinomial(n, np.full(n, 1 / n), size=min(200, samples - begin)).astype(np.float64)
        for kept, texts in zip(sums, runs, strict=True):
            kept.append(weights_Sn @ texts)
    return [metrics_of_sums(np.concatenate(kept)) for kept in sums]


def over_texts(values: NDArray[np.float64]) -> Interval:
    """The percentile interval of (1 + S,) values as ``resample`` has them; of none that is a number, none."""
    drawn = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]) if len(drawn) else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))


def mean_of(
    case: Sequence[dict[str, NDArray[np.float64]]], baseline: Sequence[dict[str, NDArray[np.float64]]] | None = None
) -> dict[str, Interval]:
    """Of each metric the mean over seeds, or that of case - baseline seed by seed; from ``resample`` of one seed."""
    names = set.intersection(*(set(run) for run in [*case, *(baseline or [])]))
    less = [dict.fromkeys(names, np.zeros(1))] * len(case) if baseline is None else baseline
    pairs = list(zip(case, less, strict=True))
    return {name: over_texts(np.mean([ours[name] - theirs[name] for ours, theirs in pairs], axis=0)) for name in case[0] if name in names}


def metrics_of_sums(sums_SM: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Every metric, (S,), of (S, M) sums as ``trials.run_trial`` keeps them; a bin without true pairs in some sample is NaN there."""
    split = len(Metrics(Propensity(NOBODY, 0)).state())
    bins = [f"r_at_5_freq_{name}" for _, _, name in FREQUENCY_BINS]
    rows = []
    for line in sums_SM:
        metrics, rare = Metrics(Propensity(NOBODY, 0)), FrequencyRecall(NOBODY)
        metrics.merge(line[:split])
        rare.merge(line[split:])
        rows.append({**metrics.result(), **dict.fromkeys(bins, np.nan), **rare.result()})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
