"""Texts and long-tailed labels drawn from a stated law, for scaling studies: any number of labels, no table of them, nothing on disk.

Label of frequency rank r = 0, 1, ... has a share proportional to the integral of (x + shift)^-exponent from r to r + 1: Zipf-Mandelbrot's
law, whose inverse is a formula. The most frequent labels are the head's rows, in order; the others are spread over the tail's rows by a
fixed bijection, as semantic groups spread them. Everything is keyed by (seed, step): the number of ranks changes nothing.

Letters: N rows of the global batch, B padded rows of one rank, S tokens of a text, M most labels of a text.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from haste_dist.loader import Batch
from haste_dist.sharding import batch_share

LAW_STREAM = 7  # keeps these random numbers apart from those of other uses of a seed
FIRST_TOKEN = 5  # lower ids are special tokens in most vocabularies


@dataclass(frozen=True)
class LabelLaw:
    """How often labels occur and how many a text has: 1 + Poisson(positives - 1), at most four times ``positives``, distinct."""

    exponent: float = 1.0
    shift: float = 10.0
    positives: float = 5.0

    @property
    def most(self) -> int:
        """M"""
        return math.ceil(4 * self.positives)

    def frequency_ranks(self, uniform: np.ndarray, labels: int) -> np.ndarray:
        """Uniform numbers of [0, 1) to frequency ranks below ``labels``, int64."""
        low, high = self.shift, labels + self.shift
        if abs(self.exponent - 1) < 1e-9:
            x = low * (high / low) ** uniform
        else:
            power = 1 - self.exponent
            x = (low**power + uniform * (high**power - low**power)) ** (1 / power)
        return np.clip((x - low).astype(np.int64), 0, labels - 1)


def spread(index: np.ndarray, count: int) -> np.ndarray:
    """A bijection of 0..count-1 that sends neighbours far apart: a multiplication modulo ``count``."""
    factor = max(1, int(0.6180339887 * min(count, 2**62 // max(1, count))))
    while math.gcd(factor, count) != 1:
        factor -= 1
    return index * factor % count


def synthetic_batch(
    law: LabelLaw, labels: int, head_rows: int, rows: int, tokens: int, vocabulary: int, seed: int, step: int, ranks: int, rank: int
) -> Batch:
    """This rank's part of the global batch of ``step``: ``rows`` texts of exactly ``tokens`` tokens, label rows of a whole label order."""
    rng = np.random.default_rng([seed, LAW_STREAM, step])
    counts = np.minimum(1 + rng.poisson(max(0.0, law.positives - 1), rows), law.most)
    chosen = law.frequency_ranks(rng.random((rows, law.most)), labels)
    in_tail = chosen >= head_rows
    chosen[in_tail] = head_rows + spread(chosen[in_tail] - head_rows, labels - head_rows)
    chosen[np.arange(law.most) >= counts[:, None]] = -1
    chosen = -np.sort(-chosen, axis=1)
    chosen[:, 1:][chosen[:, 1:] == chosen[:, :-1]] = -1  # a label once a text
    ids = rng.integers(min(FIRST_TOKEN, vocabulary - 1), vocabulary, (rows, tokens))
    start, stop, padded = batch_share(rows, ranks, rank)
    mine = np.arange(start, stop)
    repeated = np.concatenate([mine, np.zeros(padded - len(mine), np.int64)])
    label_rows = np.full((padded, law.most), -1, np.int64)
    label_rows[: len(mine)] = chosen[mine]
    mask = torch.ones(padded, tokens, dtype=torch.int64)
    return Batch(torch.from_numpy(ids[repeated]), mask, torch.from_numpy(label_rows), mine, rows)
