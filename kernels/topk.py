"""The k best rows of a shard for each batch row, exact, without ever holding all logits.

Order: higher score first; of equal scores the lower row first. A row whose score is -inf or NaN is never returned.

Per chunk of R rows: (1) the rows are taken in blocks of S, and only the k blocks that come first by (largest score, lower
block) are looked at further. That is exact: a block before another one holds a row that comes before all rows of the other,
so a row beyond the k first blocks has k rows before it. (2) Scores become integers of the same order, joined with a position
that decides ties, so that an ordinary integer top-k of distinct keys is exact. (3) The chunk's candidates and the best so
far, which have lower rows and stand first, are merged in the same way.

Letters: N batch rows, D embedding width, R rows of a chunk, S rows of a block, G rows a group, F fan-in, K = k, M candidates.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from haste_kernels.backend import use_triton
from haste_kernels.chunks import spans
from haste_kernels.products import bmm, mm, operand_dtype
from haste_kernels.state import HeadState, TailState

# Bytes of a chunk's logits. Fewer chunks mean fewer candidates in all; on a CPU a chunk should stay in the last cache
# (measured, 137k labels, N = 256, k = 100, 2 cores: 137 ms with 16 MiB, 161 ms with 64 MiB).
CUDA_BYTES = 128 << 20
CPU_BYTES = 16 << 20

Best = tuple[Tensor, Tensor]


def topk(x_head_ND: Tensor | None, x_tail_ND: Tensor | None, head: HeadState | None, tail: TailState | None, k: int) -> Best:
    """Scores (N, k) float32, descending, and global rows (N, k) int64; -inf and -1 where the shard has fewer than k real rows.

    Either part may be None, with its x. All rows of the head come before those of the tail. On a GPU Triton kernels do it.
    """
    given = [x for x in (x_head_ND, x_tail_ND) if x is not None]
    if not given or k < 1:
        raise ValueError(f"top-k needs the embedding of the head or of the tail, and k={k} of at least 1")
    if use_triton(given[0]):
        from haste_kernels import triton_topk

        if triton_topk.takes(x_head_ND, x_tail_ND, head, tail, k):
            return triton_topk.topk(x_head_ND, x_tail_ND, head, tail, k)
    return plain_topk(x_head_ND, x_tail_ND, head, tail, k)


@torch.no_grad()
def plain_topk(x_head_ND: Tensor | None, x_tail_ND: Tensor | None, head: HeadState | None, tail: TailState | None, k: int) -> Best:
    """The same in plain torch, on any device, for any k, G and F."""
    given = [x for x in (x_head_ND, x_tail_ND) if x is not None]
    n, device = len(given[0]), given[0].device
    best = _nothing(n, k, device)
    if head is not None and x_head_ND is not None:
        for first, z_RN in _head_logits(x_head_ND, head):
            best = _merge(best, _chunk_best(z_RN, head.first_row + first, k), k)
    if tail is not None and x_tail_ND is not None:
        for first, z_RN in _tail_logits(x_tail_ND, tail):
            best = _merge(best, _chunk_best(z_RN, tail.first_row + first, k), k)
    return best


def merge_topk(scores: Tensor, rows: Tensor, k: int) -> Best:
    """The k best of M candidates a batch row: (N, M) scores and distinct global rows (-1: none) to (N, k) of each, by the order above."""
    by_row = rows.argsort(dim=1, stable=True)
    more = scores.float().gather(1, by_row), rows.gather(1, by_row)
    return _merge(_nothing(len(scores), k, scores.device), more, k)


def _nothing(n: int, k: int, device: torch.device) -> Best:
    return torch.full((n, k), -torch.inf, device=device), torch.full((n, k), -1, dtype=torch.int64, device=device)


def _chunk_rows(n: int, device: torch.device) -> int:
    """Rows whose logits for ``n`` batch rows fit the budget, but not so few that the candidates outnumber them."""
    return max(1024, (CUDA_BYTES if device.type == "cuda" else CPU_BYTES) // (4 * max(1, n)))


def _head_logits(x_ND: Tensor, head: HeadState) -> Iterator[tuple[int, Tensor]]:
    """First row and float32 logits (R, N) of each chunk of the head."""
    dtype = operand_dtype(x_ND, head.weight)
    x_DN = x_ND.to(dtype).T.contiguous()
    length = _chunk_rows(len(x_ND), x_ND.device)
    for start in range(0, len(head.weight), length):
        stop = min(start + length, len(head.weight))
        z_RN = mm(head.weight[start:stop].to(dtype), x_DN)
        yield start, z_RN if head.bias is None else z_RN.add_(head.bias[start:stop, None])


def _tail_logits(x_ND: Tensor, tail: TailState) -> Iterator[tuple[int, Tensor]]:
    """First row and float32 logits (R, N) of each chunk of the tail, without padded rows."""
    groups, size, fan_in = tail.weight.shape
    n = len(x_ND)
    dtype = operand_dtype(x_ND, tail.weight)
    x_DN = x_ND.to(dtype).T.contiguous()
    length = max(1, _chunk_rows(n, x_ND.device) // size)
    for first in range(0, groups, length):
        last = min(first + length, groups)
        z_TGN = torch.empty(last - first, size, n, dtype=torch.promote_types(dtype, torch.float32), device=x_ND.device)
        for start, stop in spans(last - first, 4 * (fan_in + size) * n, x_ND.device):  # gathered features, in the cache
            a, b = first + start, first + stop
            xg_TFN = x_DN.index_select(0, tail.index[a:b].reshape(-1).long()).view(-1, fan_in, n)
            bmm(tail.weight[a:b].to(dtype), xg_TFN, out=z_TGN[start:stop])
        if tail.bias is not None:
            z_TGN += tail.bias[first:last, :, None]
        yield first * size, z_TGN.view(-1, n)[: max(0, tail.rows - first * size)]


def _chunk_best(z_RN: Tensor, first_row: int, k: int) -> Best:
    """Candidates of one chunk, k or a few more a batch row, ascending in row: scores (N, M) and global rows (N, M)."""
    count, n = z_RN.shape
    z_RN = z_RN.float().nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    row_R = torch.arange(count, device=z_RN.device)
    size = 1 << max(0, (count // k).bit_length() // 2)  # near sqrt(R / k), which makes R / S blocks + k S candidates fewest
    blocks = count // size
    if size == 1 or blocks <= k:
        return z_RN.T.contiguous(), (row_R + first_row).expand(n, count)
    largest_NB = z_RN[: blocks * size].view(blocks, size, n).amax(1).T.contiguous()
    block_NK = _keys(largest_NB).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    row_NM = (block_NK[:, :, None] * size + row_R[:size]).view(n, -1)
    row_NM = torch.cat([row_NM, row_R[blocks * size :].expand(n, -1)], 1)  # rows beyond the last whole block
    return z_RN.T.gather(1, row_NM), row_NM + first_row


def _merge(best: Best, more: Best, k: int) -> Best:
    """The k first of two lists of candidates; ties go to the one that stands first."""
    scores, rows = torch.cat([best[0], more[0]], 1), torch.cat([best[1], more[1]], 1)
    at = _keys(scores).topk(k, dim=1).indices
    scores = scores.gather(1, at)
    absent = ~(scores > -torch.inf)
    return scores.masked_fill_(absent, -torch.inf), rows.gather(1, at).masked_fill_(absent, -1)


def _keys(scores_NM: Tensor) -> Tensor:
    """(N, M) distinct int64 that order float32 scores and, of equal ones, put the earlier column first; NaN is last."""
    clean = scores_NM.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).add_(0.0)  # -0.0 becomes 0.0
    bits = clean.view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # two's complement order for negative floats too
    later = torch.arange(scores_NM.shape[1], device=scores_NM.device)
    return (order.long() << 32) - later
