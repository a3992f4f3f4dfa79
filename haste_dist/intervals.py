"""Intervals of a study's figures: over seeds (Student's t), and over the split's texts (paired bootstrap).

Both are of 95%. The bootstrap draws texts with replacement, the same ones for both cases and for all seeds, and looks at the mean over
seeds of the difference; sums are weighed anew, so ratios of sums (PSP, recall by frequency) are treated as what they are.

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


def paired_bootstrap(
    case: Sequence[NDArray[np.float64]], baseline: Sequence[NDArray[np.float64]], samples: int = SAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Difference case - baseline of every metric: the runs' (n, M) sums, seed by seed in the same order. Raises ValueError if n differs."""
    if len({texts.shape for texts in (*case, *baseline)}) != 1 or len(case) != len(baseline):
        raise ValueError(f"runs of different texts: {[t.shape for t in case]} and {[t.shape for t in baseline]}")
    n = len(case[0])
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[NDArray[np.float64]]] = {}
    for begin in range(0, samples, 200):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(200, samples - begin)).astype(np.float64)
        for name, values in _mean_difference(weights, case, baseline).items():
            drawn.setdefault(name, []).append(values)
    here = _mean_difference(np.ones((1, n)), case, baseline)
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    found = {}
    for name, parts in drawn.items():
        every = np.concatenate(parts)
        every = every[~np.isnan(every)]
        low, high = np.percentile(every, tails) if len(every) else (np.nan, np.nan)
        found[name] = Interval(float(here[name][0]), float(low), float(high))
    return found


def _mean_difference(
    weights_Sn: NDArray[np.float64], case: Sequence[NDArray[np.float64]], baseline: Sequence[NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """Mean over seeds of the difference of each metric, (S,)."""
    ours, theirs = ([metrics_of_sums(weights_Sn @ texts) for texts in side] for side in (case, baseline))
    return {name: np.mean([a[name] - b[name] for a, b in zip(ours, theirs, strict=True)], axis=0) for name in ours[0] if name in theirs[0]}


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
