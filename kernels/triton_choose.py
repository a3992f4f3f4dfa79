"""Exact choice among candidates in Triton: the k best of up to a few thousand for each batch row, and their order.

The k-th largest key is found bit by bit, counting the keys not below a guess: 32 counts over numbers that stay in registers. Then all keys
above it are kept, and the first few of those equal to it. Keys are integers in the order of the scores; NaN counts as -inf, and -inf is
never chosen. Nothing is sorted: the place of each of the last k is the number of those that come before it.

Letters: N batch rows, K = k, M candidates. Candidates come in lists of 16: the blocks of a span, the rows of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LIST = 16  # members of a list

_LIST = tl.constexpr(LIST)
_LEAST = tl.constexpr(-(2**31))  # the key of what must not be chosen


@triton.jit
def _key(score):
    """Integers in the order of the float32 scores; NaN is -inf, -0.0 is 0.0."""
    bits = (tl.where(score == score, score, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["count"])
def _choose(
    values,  # float32, in: candidate c of batch row n at c * candidate_stride + n * batch_stride
    parents,  # (N, K) int32 or None, in: the lists whose members are the candidates; -1 none
    floor,  # (N, K) float32 or None, in: scores, descending; only what is above the last counts
    chosen,  # (N, K) int32, out: candidates, ascending, then -1
    count,  # candidates, if they have no parents
    candidate_stride,
    batch_stride,
    K: tl.constexpr,
    M: tl.constexpr,  # a power of two, not below the number of candidates
    NESTED: tl.constexpr,  # a candidate's number is 16 parent + member; else its place among the candidates
):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, M)
    candidate = i
    if parents is None:
        real = i < count
    else:
        parent = tl.load(parents + n * K + i // _LIST, mask=i < K * _LIST, other=-1)
        real = parent >= 0
        if NESTED:
            candidate = parent * _LIST + i % _LIST
    score = tl.load(values + candidate.to(tl.int64) * candidate_stride + n * batch_stride, mask=real, other=float("-inf"))
    bound = _key(tl.full((), float("-inf"), tl.float32))
    if floor is not None:
        bound = tl.maximum(bound, _key(tl.load(floor + n * K + K - 1)))
    key = _key(score)
    key = tl.where(key > bound, key, _LEAST)
    # The greatest guess that K keys reach is the K-th largest key; _LEAST if fewer than K count.
    guess = tl.where(tl.sum((key >= 0).to(tl.int32)) >= K, 0, _LEAST)
    for bit in range(31):
        higher = guess | (0x40000000 >> bit)
        guess = tl.where(tl.sum((key >= higher).to(tl.int32)) >= K, higher, guess)
    above = (key > guess).to(tl.int32)
    equal = ((key == guess) & (key > _LEAST)).to(tl.int32)
    left = K - tl.sum(above)  # how many of the equal ones are wanted
    counts = tl.cumsum(above + (equal << 16), 0)  # two counts in one
    before, ties = counts & 0xFFFF, counts >> 16
    keep = (above > 0) | ((equal > 0) & (ties <= left))
    tl.store(chosen + n * K + before + tl.minimum(ties, left) - 1, candidate, mask=keep)
    slot = tl.arange(0, triton.next_power_of_2(K))
    tl.store(chosen + n * K + slot, -1, mask=(slot >= tl.sum(keep.to(tl.int32))) & (slot < K))


@triton.jit(do_not_specialize=["head_blocks", "head_row", "tail_row"])
def _rank(
    scores,  # (N, K * 16) float32, in
    blocks,  # (N, K) int32, in: the blocks whose scores these are
    chosen,  # (N, K) int32, in: the best of them, -1 none
    best_scores,  # (N, K) float32 or None, in: the best so far
    best_rows,  # (N, K) int64 or None, in
    out_scores,  # (N, K) float32, out
    out_rows,  # (N, K) int64, out
    head_blocks,  # blocks below this are of the head
    head_row: tl.int64,  # global row of block 0
    tail_row: tl.int64,  # global row of the first block of the tail
    K: tl.constexpr,
    E: tl.constexpr,  # a power of two, not below K, or 2 K with a best so far
):
    n = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    # In the order that decides ties: the best so far, which have lower rows, then the new ones.
    new = e if best_scores is None else e - K
    at = tl.load(chosen + n * K + new, mask=(new >= 0) & (new < K), other=-1)
    block = tl.load(blocks + n * K + at // _LIST, mask=at >= 0, other=0)
    row = tl.where(block < head_blocks, head_row + block.to(tl.int64) * _LIST, tail_row + (block - head_blocks).to(tl.int64) * _LIST)
    row = tl.where(at >= 0, row + at % _LIST, -1)
    score = tl.load(scores + n * K * _LIST + at, mask=at >= 0, other=float("-inf"))
    if best_scores is not None:
        score = tl.where(e < K, tl.load(best_scores + n * K + e, mask=e < K, other=float("-inf")), score)
        row = tl.where(e < K, tl.load(best_rows + n * K + e, mask=e < K, other=-1), row)
    real = row >= 0
    key = tl.where(real, _key(score), _LEAST)
    # Of equal keys the earlier is ahead. A real key is far above the least, so 1 can be taken off.
    ahead = key[:, None] > key[None, :] - (e[:, None] < e[None, :]).to(tl.int32)
    place = tl.sum(ahead.to(tl.int32), 0)
    tl.store(out_scores + n * K + place, score, mask=real & (place < K))
    tl.store(out_rows + n * K + place, row, mask=real & (place < K))
    none = (e >= tl.sum(real.to(tl.int32))) & (e < K)
    tl.store(out_scores + n * K + e, float("-inf"), mask=none)
    tl.store(out_rows + n * K + e, -1, mask=none)


def choose(
    values: Tensor,
    k: int,
    n: int,
    floor: Tensor | None,
    count: int | None = None,
    parents: Tensor | None = None,
    by_column: bool = False,
) -> Tensor:
    """The ``k`` best candidates (n, k) int32 of each batch row, ascending, then -1; of equal ones the lower number.

    ``values`` (candidates, NP), of which the first ``count`` or the members of ``parents`` (n, k) are meant; or, ``by_column``,
    (n, k * 16): the scores of the members, whose number is then their column. Only what is above the last column of ``floor`` counts.
    """
    chosen = torch.empty(n, k, dtype=torch.int32, device=values.device)
    candidates = LIST * triton.next_power_of_2(k) if count is None else max(128, triton.next_power_of_2(count))
    strides = values.stride() if not by_column else values.stride()[::-1]
    _choose[(n,)](
        values, parents, floor, chosen, count or 0, *strides,
        K=k, M=candidates, NESTED=not by_column, num_warps=8 if candidates > 2048 else 4,
    )  # fmt: skip
    return chosen


def rank(
    scores: Tensor,
    blocks: Tensor,
    chosen: Tensor,
    best: tuple[Tensor, Tensor] | None,
    head_blocks: int,
    head_row: int,
    tail_row: int,
) -> tuple[Tensor, Tensor]:
    """The ``chosen`` (n, k) of ``scores`` (n, k * 16) merged with the ``best`` so far: scores and global rows, each (n, k), in order."""
    n, k = chosen.shape
    found = torch.empty(n, k, device=scores.device), torch.empty(n, k, dtype=torch.int64, device=scores.device)
    entries = triton.next_power_of_2(k if best is None else 2 * k)
    _rank[(n,)](
        scores, blocks, chosen, *(best or (None, None)), *found, head_blocks, head_row, tail_row,
        K=k, E=entries, num_warps=4 if entries <= 128 else 8,
    )  # fmt: skip
    return found
