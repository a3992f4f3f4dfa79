"""Logits as probabilities that hold: of the labels told at 0.8, four in five should be right.

Platt's scaling (1999, "Probabilistic outputs for support vector machines"): p = sigmoid(scale * logit + offset), both fitted by maximum
likelihood on held-out texts, on the labels that the model ranks first for each. The sums of squared hinge losses and of
rare labels' cross-entropies need it most. Order is kept, since scale is positive.

The fit lies in the run folder as calibration.json, with the checkpoint that it belongs to and what it changed on texts
that it did not see (expected calibration error: Guo et al. 2017, arXiv 1706.04599, 15 bins of equal width).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from haste_dist.errors import DataError
from haste_dist.manifest import replacing
from haste_dist.sealed import seal, unseal

FILE = "calibration.json"
EXPORTED = "exported"  # the version of an exported folder, which has one checkpoint only
DEPTH = 10  # labels of a text, the best ones, that are looked at
BINS = 15
LEAST = 100  # pairs right and pairs wrong, without which nothing is fitted


@dataclass(frozen=True)
class Calibration:
    """p = sigmoid(scale * logit + offset)."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Probabilities of logits of any shape, without overflow, -inf included."""
        return 0.5 * (1.0 + np.tanh(0.5 * (self.scale * logits.astype(np.float64) + self.offset)))


def read_calibration(folder: str | Path, version: str) -> Calibration:
    """The fit in a run or exported folder, if it is of the checkpoint ``version``; else none. Raises DataError if it is damaged."""
    path = Path(folder) / FILE
    if not path.exists():
        return Calibration()
    try:
        page = unseal(path.read_bytes())
        if version not in (page["checkpoint"], EXPORTED):
            return Calibration()
        return Calibration(float(page["scale"]), float(page["offset"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); delete it, or run haste evaluate --calibrate again") from None


def calibrate(folder: str | Path, checkpoint: str, split: str, predictions: str | Path) -> dict[str, Any]:
    """Fits on the texts of ``predictions`` (of SCORED_SCHEMA), writes the page into ``folder`` and returns it.

    Texts at odd places measure what a fit on those at even places changes; the fit that is kept uses all. Raises DataError where the
    model's first labels are right, or wrong, too seldom to tell.
    """
    logits, hits, text = _pairs(predictions)
    least = min(int(hits.sum()), int((~hits).sum()))
    if least < LEAST:
        raise DataError(f"{folder}: {least} right or wrong labels among the first {DEPTH} of each text, too few to calibrate ({LEAST})")
    seen = text % 2 == 0
    half, plain = fit(logits[seen], hits[seen]), Calibration()
    measured: dict[str, float] = {}
    for name, one in (("before", plain), ("after", half)):
        probability = one(logits[~seen])
        measured |= {f"log_loss_{name}": log_loss(probability, hits[~seen]), f"ece_{name}": calibration_error(probability, hits[~seen])}
    whole = fit(logits, hits)
    page = {"checkpoint": checkpoint, "scale": whole.scale, "offset": whole.offset, "split": split, "pairs": len(hits), **measured}
    with replacing(Path(folder) / FILE) as file:
        file.write(seal(page))
    return page


def fit(logits: NDArray[np.float64], hits: NDArray[np.bool_]) -> Calibration:
    """The most likely scale and offset for logits (n,) and whether each label was right (n,), by Newton's method.

    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(size=20_000)
    >>> hits = rng.random(20_000) < Calibration(2.0, -1.0)(logits)
    >>> fitted = fit(logits, hits)
    >>> round(fitted.scale), round(fitted.offset)
    (2, -1)
    """
    x = np.stack([logits, np.ones_like(logits)])
    ridge = np.diag([1e-6, 1e-6])  # where a threshold parts right from wrong there is no most likely scale
    best, loss = np.array([1.0, 0.0]), np.inf
    step = np.zeros(2)
    for _ in range(100):
        now = _loss(best + step, x, hits, ridge)
        if not now <= loss:  # too far: half of the way
            step = step / 2
            if np.abs(step).max() < 1e-10:
                break
            continue
        best, gained, loss = best + step, loss - now, now
        if gained < 1e-12 * len(hits):
            break
        p = Calibration(*best)(logits)
        step = np.linalg.solve((x * (p * (1 - p))) @ x.T + len(hits) * ridge, x @ (hits - p) - len(hits) * ridge @ best)
    return Calibration(max(float(best[0]), 1e-3), float(best[1]))


def log_loss(probability: NDArray[np.float64], hits: NDArray[np.bool_]) -> float:
    """Mean of -log of the probability given to what was the case."""
    given = np.where(hits, probability, 1 - probability)
    return float(-np.log(np.maximum(given, 1e-12)).mean())


def calibration_error(probability: NDArray[np.float64], hits: NDArray[np.bool_]) -> float:
    """Mean distance of the probability told from the share that was right, over bins of the probability."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    told, right = np.bincount(bins, probability, BINS), np.bincount(bins, hits, BINS)
    return float(np.abs(told - right).sum() / len(hits))


def _loss(at: NDArray[np.float64], x: NDArray[np.float64], hits: NDArray[np.bool_], ridge: NDArray[np.float64]) -> float:
    z = at @ x
    return float((np.logaddexp(0.0, z) - hits * z).sum() + 0.5 * len(hits) * at @ ridge @ at)


def _pairs(predictions: str | Path) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Logit, whether it is right, and text, of the first DEPTH labels of each text."""
    logits, hits, texts = [], [], []
    with pq.ParquetFile(predictions) as file:
        for batch in file.iter_batches():
            for row, labels, scores, true in zip(*(batch[name].to_pylist() for name in batch.schema.names), strict=True):
                known = set(true)
                for label, score in zip(labels[:DEPTH], scores[:DEPTH], strict=True):
                    logits.append(score)
                    hits.append(label in known)
                    texts.append(row)
    return np.array(logits, np.float64), np.array(hits, bool), np.array(texts, np.int64)
