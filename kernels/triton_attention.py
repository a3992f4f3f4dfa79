"""Attention over texts of at most 128 tokens: a program takes heads of texts one by one, each through a whole pass.

Kernels for long texts go through blocks of keys: they keep a running maximum, sum dq by atomic additions in float32, and convert it in a
pass of its own. Here the scores of a head are one tile, so that all of it stays in registers, while q, k and v of the next are on their
way. They are read as one product leaves them, and their gradient is written as the next one takes it. Nothing of the dropout is kept: the
second pass draws the same bits.

Letters: B texts, S tokens, A heads, d features a head, T tokens of a tile (a power of 2), C = 3 A d columns.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from haste_kernels import rounding
from haste_kernels.encoder_ops import tile_tokens
from haste_kernels.encoder_reference import threshold_and_scale
from haste_kernels.triton_norm import programs, seed_words, sum_rows

DROPOUT = tl.constexpr(rounding.DROPOUT)
ROUNDS = tl.constexpr(rounding.ROUNDS)
HIDDEN = tl.constexpr(-1e30)  # a score; finite, so that no difference is NaN
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
PART = 16  # rows of a tile that lie in one warp: their sum needs no barrier


@dataclass(frozen=True)
class AttentionConfig:
    """How a pass works: warps, heads in flight (one of them at work), programs a processor."""

    warps: int
    stages: int
    programs: int


# By T, fastest on an H200 (Triton 3.6, d = 64). LOG.md tells what others took.
FORWARD = {128: AttentionConfig(8, 3, 1), 64: AttentionConfig(4, 3, 2), 32: AttentionConfig(2, 3, 4)}
BACKWARD = {128: AttentionConfig(8, 3, 1), 64: AttentionConfig(4, 3, 2), 32: AttentionConfig(2, 3, 4)}


@triton.jit
def _kept(first, low, high, threshold, T: tl.constexpr):
    """(T, T): whether dropout keeps each probability of the rows from global row ``first`` on. See encoder_reference.attention.

    Numbered as a product's registers lie over warps and lanes, so that the bits are made by the threads that need them.
    """
    number = tl.arange(0, T * T // 8)  # of a generator call: (4 of columns, 2, T / 16, 8 of rows, 4 lanes) from the highest bits down
    row = first + (number // 4 % 8 + number // (2 * T) % 2 * 8 + number // 32 % (T // 16) * 16)
    block = number // (4 * T) * 4 + number % 4
    stream = (row >> 32).to(tl.uint32) | (DROPOUT << 16)
    a, b, c, d = tl.philox_impl(block.to(tl.uint32), row.to(tl.uint32), stream, stream & 0, low.to(tl.uint32), high.to(tl.uint32), ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    least = threshold.to(tl.uint32)
    keep = tl.join((words & 0xFFFF) >= least, (words >> 16) >= least)
    keep = tl.reshape(keep, (T // 32, 2, T // 16, 8, 4, 4, 2))
    return tl.reshape(tl.permute(keep, (2, 1, 3, 0, 5, 4, 6)), (T, T))


@triton.jit
def _read_head(qkv, one, real, tokens, A: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """Of all heads of all texts the ``one``-th: its text, head, rows (T,) and columns (d,), where they lie in ``qkv``, and q, k and v."""
    text, head = tl.cast(one // A, tl.int64), one % A
    token = text * tokens + tl.arange(0, T)
    column = head * D + tl.arange(0, D)
    at = token[:, None] * (3 * A * D) + column[None, :]
    q = tl.load(qkv + at, mask=real[:, None], other=0.0)
    k = tl.load(qkv + A * D + at, mask=real[:, None], other=0.0)
    v = tl.load(qkv + 2 * A * D + at, mask=real[:, None], other=0.0)
    return text, head, token, column, at, q, k, v


@triton.jit
def _scores(q, k, pair, seen, text, head, tokens, scale, T: tl.constexpr):
    """(T, T) q k^T ``scale``, to base 2, and what a pair of places adds; keys that are hidden or not there come to HIDDEN."""
    key = tl.arange(0, T)
    real = key < tokens
    if seen is not None:
        real = real & (tl.load(seen + text * tokens + key, mask=real, other=0) != 0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if pair is not None:
        at = (head * tokens + key[:, None]) * tokens + key[None, :]
        s += tl.load(pair + at, mask=(key < tokens)[:, None] & real[None, :], other=0.0).to(tl.float32) * LOG2_E
    return tl.where(real[None, :], s, HIDDEN)


@triton.jit(do_not_specialize=["count", "tokens", "threshold"])
def _attention_forward(
    qkv,  # (B, S, 3, A, d) float32 or bfloat16, in
    pair,  # (A, S, S) or None, in: added to the scores of all texts
    seen,  # (B, S) bool or None, in: keys that are no padding
    out,  # (B, S, A, d), out
    lse,  # (B, A, S) float32, out: of a row of scores, to base 2; infinite where all are hidden
    seed,  # (1,) int64, in, or None: nothing is dropped
    count,  # B A
    tokens,  # S
    threshold,  # of 16 random bits: what is below is dropped
    keep_scale: tl.float32,
    scale: tl.float32,  # of the scores, to base 2
    A: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    DROPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    if DROPS:
        low, high = seed_words(seed)
    real = tl.arange(0, T) < tokens
    for one in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=STAGES):
        text, head, token, column, _, q, k, v = _read_head(qkv, one, real, tokens, A, D, T)
        s = _scores(q, k, pair, seen, text, head, tokens, scale, T)
        most = tl.max(s, 1)
        p = tl.exp2(s - most[:, None])
        total = tl.sum(p, 1)
        first = (text * A + head) * tokens
        nothing = most <= HIDDEN  # to see: a text of padding alone, whose answer and gradients are 0
        tl.store(lse + first + tl.arange(0, T), tl.where(nothing, float("inf"), most + tl.log2(total)), mask=real)
        if DROPS:
            p = tl.where(_kept(first, low, high, threshold, T), p, 0.0)
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee") * tl.where(nothing, 0.0, keep_scale / total)[:, None]
        tl.store(out + token[:, None] * (A * D) + column[None, :], o, mask=real[:, None])


@triton.jit
def _store_sums(sums, column, value, P: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Of each R rows of ``value`` (P R, d) the sum, to a row of ``sums``."""
    parts = tl.sum(tl.reshape(value, (P, R, value.shape[1])), 1)
    tl.store(sums + tl.arange(0, P)[:, None] * C + column[None, :], parts)


@triton.jit(do_not_specialize=["count", "tokens", "threshold"])
def _attention_backward(
    qkv,  # (B, S, 3, A, d) float32 or bfloat16, in
    pair,  # (A, S, S) or None, in
    seen,  # (B, S) bool or None, in
    lse,  # (B, A, S) float32, in
    do,  # (B, S, A, d), in
    dqkv,  # (B, S, 3, A, d), out
    dpair,  # (P, T, T) float32 or None, out: of a program's texts; P is a multiple of A, so that they have one head
    sums,  # (B, T / R, 2, A, d) float32, out: dq and dv, of R rows each
    seed,  # (1,) int64, in
    count,
    tokens,
    threshold,
    keep_scale: tl.float32,
    scale: tl.float32,
    A: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    DROPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    if DROPS:
        low, high = seed_words(seed)
    real = tl.arange(0, T) < tokens
    if pair is not None:
        to_pair = tl.zeros((T, T), tl.float32)
    for one in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=STAGES):
        text, head, token, column, at, q, k, v = _read_head(qkv, one, real, tokens, A, D, T)
        g = tl.load(do + token[:, None] * (A * D) + column[None, :], mask=real[:, None], other=0.0)
        first = (text * A + head) * tokens
        # Rows that are not there have probabilities 0.
        level = tl.load(lse + first + tl.arange(0, T), mask=real, other=float("inf"))
        p = tl.exp2(_scores(q, k, pair, seen, text, head, tokens, scale, T) - level[:, None])
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        if DROPS:
            keep = _kept(first, low, high, threshold, T)
            dp = tl.where(keep, dp * keep_scale, 0.0)
            used = tl.where(keep, p * keep_scale, 0.0).to(v.dtype)
        else:
            used = p.to(v.dtype)
        total = sums + text * (T // R * 2 * A * D)
        dv = tl.dot(tl.trans(used), g, input_precision="ieee")
        tl.store(dqkv + 2 * A * D + at, dv, mask=real[:, None])
        _store_sums(total + A * D, column, dv, T // R, R, 2 * A * D)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if pair is not None:
            to_pair += ds
        ds = ds.to(v.dtype)
        dq = tl.dot(ds, k, input_precision="ieee") * (scale * LN_2)
        tl.store(dqkv + at, dq, mask=real[:, None])
        _store_sums(total, column, dq, T // R, R, 2 * A * D)
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * (scale * LN_2)
        tl.store(dqkv + A * D + at, dk, mask=real[:, None])
    if pair is not None:
        tl.store(dpair + (tl.program_id(0) * T + tl.arange(0, T))[:, None] * T + tl.arange(0, T)[None, :], to_pair)


_fitting: dict[tuple[object, ...], int] = {}  # stages that were found to fit


def _launch(kernel: Any, arguments: tuple[Any, ...], grid: int, config: AttentionConfig, **constants: Any) -> None:
    """With as many heads in flight as the shared memory of this GPU holds."""
    key = (kernel.fn, arguments[0].device, arguments[0].dtype, *(argument is None for argument in arguments), *constants.values())
    for stages in range(_fitting.get(key, config.stages), 0, -1):
        try:
            kernel[(grid,)](*arguments, **constants, STAGES=stages, num_warps=config.warps)
        except OutOfResources:
            if stages == 1:
                raise
        else:
            _fitting[key] = stages
            return


def attention_forward(
    qkv_BSC: Tensor, pair_ASS: Tensor | None, seen_BS: Tensor | None, heads: int, p: float, seed: Tensor | None, out_BSH: Tensor,
    lse_BAS: Tensor, config: AttentionConfig | None = None,
) -> None:  # fmt: skip
    """Fills the last two tensors: the answer, and the logarithm to base 2 of the sum of each row's exponentials."""
    texts, tokens, width = qkv_BSC.shape
    size, tile = width // (3 * heads), tile_tokens(tokens)
    config = config or FORWARD[tile]
    numbers = (texts * heads, tokens, *threshold_and_scale(p), LOG2_E.value / size**0.5)
    _launch(
        _attention_forward, (qkv_BSC, pair_ASS, seen_BS, out_BSH, lse_BAS, seed, *numbers),
        programs(qkv_BSC.device, texts * heads, config.programs), config, A=heads, D=size, T=tile, DROPS=p > 0 and seed is not None,
    )  # fmt: skip


def attention_backward(
    do_BSH: Tensor, qkv_BSC: Tensor, pair_ASS: Tensor | None, seen_BS: Tensor | None, lse_BAS: Tensor, heads: int, p: float,
    seed: Tensor | None, dqkv_BSC: Tensor, config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Fills ``dqkv_BSC``. Returns its sum over tokens (C,), the gradient of the biases in qkv, and that of ``pair_ASS``. Of the biases that
    of k's is zero, for what is added to all scores of a row changes no probability."""
    texts, tokens, width = qkv_BSC.shape
    size, tile = width // (3 * heads), tile_tokens(tokens)
    config = config or BACKWARD[tile]
    grid = programs(qkv_BSC.device, texts * heads, config.programs)
    grid = grid if pair_ASS is None else max(1, grid // heads) * heads
    sums = lse_BAS.new_empty(texts * (tile // PART), 2, width // 3)
    dpair = None if pair_ASS is None else lse_BAS.new_empty(grid // heads, heads, tile, tile)
    numbers = (texts * heads, tokens, *threshold_and_scale(p), LOG2_E.value / size**0.5)
    _launch(
        _attention_backward, (qkv_BSC, pair_ASS, seen_BS, lse_BAS, do_BSH, dqkv_BSC, dpair, sums, seed, *numbers), grid, config,
        A=heads, D=size, T=tile, R=PART, DROPS=p > 0 and seed is not None,
    )  # fmt: skip
    db_C = qkv_BSC.new_zeros(width)
    sum_rows(sums.flatten(1), db_C, width // 3)
    return db_C, None if dpair is None else dpair.sum(0)[:, :tokens, :tokens].to(qkv_BSC.dtype)
