"""Ranking metrics of extreme classification, streamed and mergeable: P@k, PSP@k, nDCG@k, PSnDCG@k, recall@k.

Letters: n texts, K predictions a text, L labels, P true (text, label) pairs. All values are fractions in 0..1 (PS: of the best
reachable). The conventions are those of pyxclib, and equal to it to 1e-6:

* every text counts in the mean, also one with no true label (it scores 0) and one with fewer than k predictions;
* a label never seen in training is a true label like any other (frequency 0, the largest weight), so it stays in denominators;
* P@k divides by k even where a text has fewer than k labels; nDCG@k divides by the best DCG of min(k, true labels);
* PSP@k and PSnDCG@k are ratios of two sums over all texts: what the predictions collect, and what the true labels of largest
  weight would collect. They are not means of ratios;
* recall@k is the mean over texts of (found in the first k) / (true labels).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from haste_dist.errors import ConfigError

KS = (1, 3, 5)
RECALL_KS = (1, 3, 5, 10, 100)

# (lowest, highest) number of training texts of a label, and the name of its bin in results
FREQUENCY_BINS = ((1, 1, "1"), (2, 5, "2_5"), (6, 20, "6_20"), (21, 100, "21_100"), (101, 2**62, "over_100"))


class Ragged(NamedTuple):
    """Lists of label ids of n texts, end to end: text i has ``values[offsets[i]:offsets[i + 1]]``."""

    values: NDArray[np.int64]  # (P,)
    offsets: NDArray[np.int64]  # (n + 1,), offsets[0] is 0

    @classmethod
    def of(cls, lists: "Ragged | pa.ListArray | pa.ChunkedArray | Sequence[ArrayLike]") -> "Ragged":
        """From lists of ids, or an Arrow list column (sliced and chunked ones too; no Python loop)."""
        if isinstance(lists, Ragged):
            return lists
        if isinstance(lists, pa.ChunkedArray):
            lists = lists.combine_chunks()
        if isinstance(lists, pa.Array):
            offsets = lists.offsets.to_numpy().astype(np.int64)  # flatten() drops what a slice leaves out, offsets keep it
            return cls(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64), offsets - offsets[0])
        arrays = [np.asarray(one, dtype=np.int64).reshape(-1) for one in lists]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(one) for one in arrays], out=offsets[1:])
        return cls(np.concatenate([np.empty(0, np.int64), *arrays]), offsets)

    @property
    def rows(self) -> NDArray[np.int64]:
        """(P,) the text of each value."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True)
class Propensity:
    """Inverse propensity of a label (Jain et al. 2016): 1 + (ln rows - 1) (b + 1)^a (frequency + b)^-a.

    Weights are computed for the labels asked for, so that ``frequency`` may be a memory map over a billion labels.
    Raises ConfigError where b = 0 would give a label without training texts an infinite weight.
    """

    frequency: NDArray[np.integer]  # (L,) training texts of each label
    rows: int  # training texts
    a: float = 0.55
    b: float = 1.5

    def __post_init__(self) -> None:
        if self.b == 0 and self.a > 0 and len(self.frequency) and self.frequency.min() == 0:
            raise ConfigError("evaluate.propensity_b=0: labels without a training text would weigh infinitely much; use a value above 0")

    def weights(self, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Inverse propensities, float64, of label ids of any shape."""
        scale = (np.log(max(self.rows, 1)) - 1.0) * (self.b + 1.0) ** self.a
        return 1.0 + scale * np.power(self.frequency[labels] + self.b, -self.a)


class Match(NamedTuple):
    """Predictions against truth. True pairs are distinct, ascending in text, then in label."""

    hits: NDArray[np.bool_]  # (n, K) the prediction is a true label of its text
    place: NDArray[np.int64]  # (n, K) index of the true pair of a hit; undefined elsewhere
    row: NDArray[np.int64]  # (P,) text of each true pair
    label: NDArray[np.int64]  # (P,) label of each true pair
    true_count: NDArray[np.int64]  # (n,) true labels of each text


def match(predicted: ArrayLike, labels: "Ragged | pa.ListArray | Sequence[ArrayLike]") -> Match:
    """``predicted`` (n, K): label ids, best first, distinct in a row, -1 where there is none. ``labels``: true ids of n texts.

    Raises ValueError if the two differ in n.
    """
    ids = np.asarray(predicted, dtype=np.int64)
    true = Ragged.of(labels)
    n = len(true.offsets) - 1
    if ids.ndim != 2 or len(ids) != n:
        raise ValueError(f"predictions of shape {ids.shape} for {n} texts")
    span = int(max(ids.max(initial=0), true.values.max(initial=0))) + 1
    key = np.unique(true.rows * span + true.values)  # one sorted key a pair: membership is a binary search
    wanted = np.arange(n)[:, None] * span + ids
    place = np.searchsorted(key, wanted)
    found = key[np.minimum(place, max(len(key) - 1, 0))] if len(key) else np.full(ids.shape, -1)
    row = key // span
    return Match((found == wanted) & (ids >= 0), place, row, key % span, np.bincount(row, minlength=n))


class Metrics:
    """Sums over texts, added batch by batch and merged across ranks.

    ``propensity`` None leaves the PS metrics out. ``ks`` are the cut-offs of P, nDCG and PS; recall has its own.
    """

    def __init__(self, propensity: Propensity | None = None, ks: Sequence[int] = KS, recall_ks: Sequence[int] = RECALL_KS) -> None:
        self.propensity = propensity
        self.ks, self.recall_ks = tuple(ks), tuple(recall_ks)
        per_k = 2 if propensity is None else 6  # P, nDCG, and of PSP and PSnDCG what was reached and the best reachable
        self._sums = np.zeros(1 + per_k * len(self.ks) + len(self.recall_ks))

    @property
    def depth(self) -> int:
        """How many predictions a text are used: the largest k."""
        return max(self.ks + self.recall_ks)

    def add(self, predicted: ArrayLike, labels: "Ragged | pa.ListArray | Sequence[ArrayLike]") -> None:
        """``predicted`` (n, K) as in ``match``; K may be smaller than k, then the rest counts as wrong."""
        self._sums += self.per_text(predicted, labels).sum(axis=0)

    def per_text(self, predicted: ArrayLike, labels: "Ragged | pa.ListArray | Sequence[ArrayLike]") -> NDArray[np.float64]:
        """(n, M): what each text adds to ``state``. Whoever keeps it can weigh texts anew: ``merge(weights @ kept)``."""
        pairs = match(predicted, labels)
        n, width = pairs.hits.shape
        gain = 1.0 / np.log2(np.arange(max(width, pairs.true_count.max(initial=0), *self.ks)) + 2.0)  # of a hit at each place
        best_dcg = np.concatenate([[1.0], np.cumsum(gain)])  # of 0, 1, 2 ... true labels; the 1 is never divided into a hit
        columns: list[NDArray[np.float64]] = [np.ones(n)]
        hits = pairs.hits.astype(np.float64)
        values = [hits]
        best = self._best(pairs) if self.propensity is not None else None
        if self.propensity is not None:
            weight = np.zeros(hits.shape)
            weight[pairs.hits] = self.propensity.weights(pairs.label[pairs.place[pairs.hits]])
            values.append(weight)
        for k in self.ks:
            normaliser = 1.0 / best_dcg[np.minimum(pairs.true_count, k)]
            for value in values:
                columns += [value[:, :k].sum(axis=1) / k, (value[:, :k] * gain[: min(k, width)]).sum(axis=1) * normaliser]
            if best is not None:
                weight_of, rank = best
                top = rank < k
                row, reachable = pairs.row[top], weight_of[top]
                reachable_dcg = reachable * gain[rank[top]] * normaliser[row]
                columns += [np.bincount(row, reachable, n) / k, np.bincount(row, reachable_dcg, n).astype(np.float64)]
        share = 1.0 / np.maximum(pairs.true_count, 1)
        columns += [hits[:, :k].sum(axis=1) * share for k in self.recall_ks]
        return np.stack(columns, axis=1)

    def _best(self, pairs: Match) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(P,) weight of each true pair and its place in the best ranking of its text: heaviest first."""
        assert self.propensity is not None
        weight = self.propensity.weights(pairs.label)
        order = np.lexsort((-weight, pairs.row))
        start = np.cumsum(pairs.true_count) - pairs.true_count
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - start[pairs.row]  # pairs.row is ascending, so it is the row of sorted places too
        return weight, rank

    def state(self) -> NDArray[np.float64]:
        """The sums as one vector: states of ranks combine by addition (an all-reduce)."""
        return self._sums.copy()

    def merge(self, state: NDArray[np.float64]) -> None:
        """Adds what another instance with the same settings has summed."""
        self._sums += state

    @property
    def rows(self) -> int:
        """Texts added so far."""
        return int(self._sums[0])

    def result(self) -> dict[str, float]:
        """``{'P@1': ..., 'nDCG@1': ..., 'PSP@1': ..., 'PSnDCG@1': ..., 'R@1': ...}``; all 0 before the first text."""
        rows, sums = max(self._sums[0], 1.0), iter(self._sums[1:])
        out: dict[str, float] = {}
        for k in self.ks:
            out[f"P@{k}"], out[f"nDCG@{k}"] = next(sums) / rows, next(sums) / rows
            if self.propensity is not None:
                psp, psndcg, best_psp, best_psndcg = (next(sums) for _ in range(4))
                out[f"PSP@{k}"], out[f"PSnDCG@{k}"] = _ratio(psp, best_psp), _ratio(psndcg, best_psndcg)
        out |= {f"R@{k}": next(sums) / rows for k in self.recall_ks}
        order = [f"{name}@{k}" for name in ("P", "PSP", "nDCG", "PSnDCG", "R") for k in (*self.ks, *self.recall_ks)]
        return {key: float(out[key]) for key in dict.fromkeys(order) if key in out}


class FrequencyRecall:
    """Share of true pairs found in the first k predictions, by how often the label was seen in training.

    A mean over pairs, not over texts. Labels never seen belong to no bin. ``frequency``: (L,) training texts of a label.
    """

    def __init__(self, frequency: NDArray[np.integer], k: int = 5) -> None:
        self.frequency, self.k = frequency, k
        self._sums = np.zeros((len(FREQUENCY_BINS), 2))  # found, all

    def add(self, predicted: ArrayLike, labels: "Ragged | pa.ListArray | Sequence[ArrayLike]") -> None:
        """As ``Metrics.add``."""
        self._sums += self.per_text(predicted, labels).sum(axis=0).reshape(self._sums.shape)

    def per_text(self, predicted: ArrayLike, labels: "Ragged | pa.ListArray | Sequence[ArrayLike]") -> NDArray[np.float64]:
        """(n, 2 * bins): as ``Metrics.per_text``."""
        pairs = match(np.asarray(predicted)[:, : self.k], labels)
        lows = np.array([low for low, _, _ in FREQUENCY_BINS])
        bins = len(lows) + 1
        cell = pairs.row * bins + np.searchsorted(lows, self.frequency[pairs.label], side="right")  # bin 0: never seen
        size = len(pairs.true_count) * bins
        counts = [np.bincount(cell[pairs.place[pairs.hits]], minlength=size), np.bincount(cell, minlength=size)]  # found, all
        return np.stack(counts, axis=1).reshape(-1, bins, 2)[:, 1:].reshape(-1, 2 * len(lows)).astype(np.float64)

    def state(self) -> NDArray[np.float64]:
        """The sums as one vector, combined by addition."""
        return self._sums.reshape(-1).copy()

    def merge(self, state: NDArray[np.float64]) -> None:
        """Adds what another instance has summed."""
        self._sums += state.reshape(self._sums.shape)

    def result(self) -> dict[str, float]:
        """``{'r_at_5_freq_1': ..., 'r_at_5_freq_2_5': ...}``; a bin without true pairs is left out."""
        rows = zip(self._sums, FREQUENCY_BINS, strict=True)
        return {f"r_at_{self.k}_freq_{name}": float(found / every) for (found, every), (_, _, name) in rows if every}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
