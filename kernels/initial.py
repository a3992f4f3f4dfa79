"""Initial weights keyed by (seed, global row, column), so that a layer starts the same on any number of shards."""

import torch
from torch import Tensor

from haste_kernels.rounding import random_words

CHUNK_BYTES = 2**28  # of the generator's temporaries


def uniform(
    first_row: int, rows: int, columns: int, bound: float, seed: int, stream: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(rows, columns) drawn uniformly from [-bound, bound), rounded to ``dtype``; all zero where ``bound`` is 0."""
    weight = torch.zeros((rows, columns), dtype=dtype, device=device)
    if not bound:
        return weight
    blocks = -(-columns // 4)
    step = max(1, CHUNK_BYTES // (blocks * 4 * 8 * 4))
    for start in range(0, rows, step):
        ids = torch.arange(start, min(start + step, rows), device=device)
        words = random_words(seed, 0, ids + first_row, blocks, stream).view(len(ids), -1)[:, :columns]
        # 24 bits are what float32 holds; the half keeps the mean at 0.
        weight[start : start + len(ids)] = ((words >> 8).float() + 0.5) * (bound * 2.0**-23) - bound
    return weight
