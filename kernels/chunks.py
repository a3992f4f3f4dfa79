"""How the steps cut a shard into chunks of rows, so that temporaries stay small, and which positives fall in each chunk.

Letters: N batch rows, P positives. Rows are relative to the shard's first row.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from haste_kernels.state import Positives

# Bytes that one chunk's temporaries may take. On a CPU a chunk should stay in the cache, between the products that use it.
CUDA_BYTES = 1 << 30
CPU_BYTES = 8 << 20


class Chunk(NamedTuple):
    """A range of rows, or of groups, and where its positives lie in its logits, flattened from (rows, N)."""

    start: int
    stop: int
    flat: Tensor  # (P,) int64
    weight: Tensor | None  # (P,) 1 for a pair of this chunk, 0 for another's; None: all are this chunk's


def spans(count: int, bytes_each: int, device: torch.device) -> list[tuple[int, int]]:
    """Cuts ``range(count)`` into (start, stop) ranges whose temporaries, ``bytes_each`` an item, fit the budget (at least 1 item)."""
    length = max(1, (CUDA_BYTES if device.type == "cuda" else CPU_BYTES) // max(1, bytes_each))
    return [(start, min(start + length, count)) for start in range(0, count, length)]


def chunks(count: int, size: int, rows: int, bytes_each: int, positives: Positives, n: int) -> list[Chunk]:
    """Chunks of ``count`` items of ``size`` rows each (groups of G, or rows), with their positives; ``n`` batch rows.

    ``rows`` are real: the last item may have fewer than ``size``. On a CPU the boundaries among the positives are read once. A GPU
    is not waited for: there every chunk takes all P pairs, those of other chunks moved into it with weight 0.
    """
    cut = spans(count, bytes_each, positives.row.device)
    edges = [start * size for start, _ in cut] + [rows]
    parts = _split(edges, positives, n) if positives.row.device.type == "cpu" else _mask(edges, positives, n)
    return [Chunk(start, stop, flat, weight) for (start, stop), (flat, weight) in zip(cut, parts, strict=True)]


def _split(edges: list[int], positives: Positives, n: int) -> list[tuple[Tensor, Tensor | None]]:
    at = torch.searchsorted(positives.row.contiguous(), torch.tensor(edges)).tolist()
    flat = positives.row * n + positives.batch
    return [(flat[p:q] - first * n, None) for first, p, q in zip(edges, at, at[1:], strict=False)]


def _mask(edges: list[int], positives: Positives, n: int) -> list[tuple[Tensor, Tensor | None]]:
    parts: list[tuple[Tensor, Tensor | None]] = []
    for first, end in pairwise(edges):
        inside = (positives.row >= first) & (positives.row < end)
        flat = ((positives.row - first) * n + positives.batch).clamp_(0, (end - first) * n - 1)
        parts.append((flat, inside.float()))
    return parts
