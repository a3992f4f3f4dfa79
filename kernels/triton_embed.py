"""The embeddings before a transformer's layers as one pass over its tokens, and their gradients as another.

    h = word[id] + place + kind     y = dropout((h - mean h) / sqrt(var h + eps) * w + c)

h is not kept: the second pass looks its rows up again. The gradient of a table sums the tokens of each id. Tokens are sorted by id, so
that those of one lie side by side, and taken EDGE at a time, however many have one id: ids that begin and end among those are summed at
once; what is left of the first and the last is kept apart, and added by whoever holds its beginning. All of it in a fixed order.

Letters: M tokens (B texts of S), H columns, R tokens of a tile, V rows of the table, N chunks of EDGE tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_kernels.encoder_reference import threshold_and_scale
from haste_kernels.triton_norm import (
    PROGRAMS,
    STAGES,
    WARPS,
    kept,
    norm_gradient,
    norm_of,
    programs,
    seed_words,
    store_sums,
    sum_rows,
    tile_rows,
)

EDGE = 32  # tokens of a chunk
COLUMNS = 256  # of a table, at once
TOGETHER = 8  # chunks of one id that are added at once


@triton.jit
def _rows(ids, word, place, kind, row, real, mask, column, tokens, known, H: tl.constexpr):
    """(R, COLUMNS) h of the tokens ``row``; not a number for an id that the table does not have."""
    name = tl.load(ids + row, mask=real, other=0).to(tl.int64)
    found = (name >= 0) & (name < known)
    h = tl.load(word + name[:, None] * H + column[None, :], mask=mask & found[:, None], other=float("nan")).to(tl.float32)
    h = tl.where(mask, h, 0.0)
    h += tl.load(place + (row % tokens)[:, None] * H + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if kind is not None:
        h += tl.load(kind + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit(do_not_specialize=["rows", "tokens", "known", "threshold"])
def _embed_forward(
    ids,  # (M,) int64, in
    word,  # (V, H), in, as all below of no other type: float32 or bfloat16
    place,  # (S, H), in
    kind,  # (H,) or None, in
    weight,  # (H,), in
    shift,  # (H,), in
    y,  # (M, H), out
    mean,  # (M,) float32, out
    rstd,  # (M,) float32, out: 1 / the deviation
    seed,  # (1,) int64, in, or None: nothing is dropped
    rows,  # M
    tokens,  # S
    known,  # V
    threshold,  # of 16 random bits: what is below is dropped
    keep_scale: tl.float32,
    eps: tl.float32,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,  # the next power of two
    R: tl.constexpr,
    DROPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < H)[None, :]
    h = _rows(ids, word, place, kind, row, row < rows, mask, column, tokens, known, H)
    value, middle, scale = norm_of(h, weight, shift, column, eps, H)
    if DROPS:
        low, high = seed_words(seed)
        value = tl.where(kept(row, low, high, threshold, COLUMNS), value * keep_scale, 0.0)
    tl.store(y + row[:, None] * H + column[None, :], value, mask=mask)
    tl.store(mean + row, middle, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "tokens", "known", "threshold"])
def _embed_backward(
    dy,  # (M, H), in
    ids,  # (M,) int64, in
    word,  # (V, H), in
    place,  # (S, H), in
    kind,  # (H,) or None, in
    weight,  # (H,), in
    mean,  # (M,) float32, in
    rstd,  # (M,) float32, in
    dh,  # (M, H), out
    sums,  # (P, 3, H) float32, out: of a program's rows, to kind, weight and shift
    seed,  # (1,) int64, in
    rows,
    tokens,
    known,
    threshold,
    keep_scale: tl.float32,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    DROPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    if DROPS:
        low, high = seed_words(seed)
    dk = tl.zeros((R, COLUMNS), tl.float32)
    dw = tl.zeros((R, COLUMNS), tl.float32)
    dc = tl.zeros((R, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < H)[None, :]
        at = row[:, None] * H + column[None, :]
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if DROPS:
            g = tl.where(kept(row, low, high, threshold, COLUMNS), g * keep_scale, 0.0)
        h = _rows(ids, word, place, kind, row, row < rows, mask, column, tokens, known, H)
        middle = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        dc += g
        g, share = norm_gradient(g, h, w, middle, scale, mask, H)
        dw += share
        tl.store(dh + at, g, mask=mask)
        dk += g
    store_sums(sums, column, dk, dw, dc, H)


@triton.jit(do_not_specialize=["rows", "known", "padding"])
def _sum_ids(
    dh,  # (M, H), in
    ids,  # (M,) int32, in: sorted
    order,  # (M,) int64, in: the tokens that have them
    dword,  # (V, H), out: of ids that begin and end in a chunk, but not of ``padding``
    edges,  # (N, 2, H) float32, out: of the id that began before a chunk, and of one that goes on behind it
    rows,  # M
    known,  # V
    padding,  # an id without a gradient; -1: none
    H: tl.constexpr,
    EDGE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0)
    t = tl.arange(0, EDGE)
    at = chunk * EDGE + t
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    one = tl.load(ids + at, mask=at < rows, other=-2)
    before = tl.load(ids + at - 1, mask=(at > 0) & (at < rows), other=-2)
    behind = tl.load(ids + at + 1, mask=at + 1 < rows, other=-2)
    token = tl.load(order + at, mask=at < rows, other=0)
    mask = (at < rows)[:, None] & (column < H)[None, :]
    value = tl.load(dh + token[:, None] * H + column[None, :], mask=mask, other=0.0)
    place = tl.cumsum(((one != before) & (t > 0)).to(tl.int32), 0)  # of its id among those of the chunk
    hot = place[None, :] == t[:, None]  # (ids, tokens)
    total = tl.dot(hot.to(value.dtype), value, input_precision="ieee")
    name = tl.max(tl.where(hot, one[None, :], -2), 1).to(tl.int64)  # an id, or -2
    # Of each: whether a token of it begins it, and whether one ends it.
    begins = tl.max((hot & (one != before)[None, :]).to(tl.int32), 1) > 0
    ends = tl.max((hot & (one != behind)[None, :]).to(tl.int32), 1) > 0
    real = (name >= 0) & (name < known) & (name != padding)
    inside = (column < H)[None, :]
    tl.store(dword + name[:, None] * H + column[None, :], total, mask=(real & begins & ends)[:, None] & inside)
    edge = edges + chunk.to(tl.int64) * 2 * H + tl.where(begins, H, 0)[:, None] + column[None, :]
    tl.store(edge, total, mask=(real & ~(begins & ends))[:, None] & inside)


@triton.jit(do_not_specialize=["rows", "known", "padding"])
def _join_edges(
    edges,  # (N, 2, H) float32, in
    ids,  # (M,) int32, in: sorted
    stops,  # (N,) int64, in: where the last id of each chunk ends
    dword,  # (V, H), out: of ids that end in another chunk than they begin
    rows,
    known,
    padding,
    H: tl.constexpr,
    EDGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    last = (chunk + 1) * EDGE - 1
    if last + 1 < rows:
        name = tl.load(ids + last).to(tl.int64)
        stop = tl.load(stops + chunk)
        first = tl.load(ids + chunk * EDGE)
        earlier = tl.load(ids + chunk * EDGE - 1, mask=chunk > 0, other=-2)
        begins = (first != name) | (earlier != name)  # here, not in a chunk before
        if begins & (stop > last + 1) & (name != padding) & (name >= 0) & (name < known):
            total = tl.load(edges + (chunk.to(tl.int64) * 2 + 1) * H + column, mask=column < H, other=0.0)
            for start in range(chunk + 1, ((stop - 1) // EDGE + 1).to(tl.int32), TOGETHER):
                other = start + tl.arange(0, TOGETHER)
                mask = (other <= (stop - 1) // EDGE)[:, None] & (column < H)[None, :]
                total += tl.sum(tl.load(edges + other[:, None].to(tl.int64) * 2 * H + column[None, :], mask=mask, other=0.0), 0)
            tl.store(dword + name * H + column, total, mask=column < H)


def embed_forward(
    ids_BS: Tensor, word_VH: Tensor, place_SH: Tensor, kind_H: Tensor | None, w_H: Tensor, c_H: Tensor, p: float, eps: float,
    seed: Tensor | None, y_BSH: Tensor, mean_M: Tensor, rstd_M: Tensor,
) -> None:  # fmt: skip
    """Fills the last three."""
    rows, width = ids_BS.numel(), word_VH.shape[1]
    columns = max(8, triton.next_power_of_2(width))
    count = tile_rows(columns)
    _embed_forward[(triton.cdiv(rows, count),)](
        ids_BS, word_VH, place_SH, kind_H, w_H, c_H, y_BSH, mean_M, rstd_M, seed, rows, ids_BS.shape[1], len(word_VH),
        *threshold_and_scale(p), eps,
        H=width, COLUMNS=columns, R=count, DROPS=p > 0 and seed is not None, num_warps=WARPS,
    )  # fmt: skip


def embed_backward(
    dy_BSH: Tensor, ids_BS: Tensor, word_VH: Tensor, place_SH: Tensor, kind_H: Tensor | None, w_H: Tensor, mean_M: Tensor, rstd_M: Tensor,
    p: float, seed: Tensor | None, dh_BSH: Tensor,
) -> Tensor:  # fmt: skip
    """Fills ``dh_BSH``. Returns (3, H): gradients of kind, w and c."""
    rows, width = ids_BS.numel(), word_VH.shape[1]
    columns = max(8, triton.next_power_of_2(width))
    count = tile_rows(columns)
    grid = programs(dy_BSH.device, triton.cdiv(rows, count), PROGRAMS)
    sums = torch.empty(grid, 3, width, dtype=torch.float32, device=dy_BSH.device)
    _embed_backward[(grid,)](
        dy_BSH, ids_BS, word_VH, place_SH, kind_H, w_H, mean_M, rstd_M, dh_BSH, sums, seed, rows, ids_BS.shape[1], len(word_VH),
        *threshold_and_scale(p), H=width, COLUMNS=columns, R=count, DROPS=p > 0 and seed is not None, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    total_3H = w_H.new_empty(3, width)
    sum_rows(sums.flatten(1), total_3H)
    return total_3H


def table_gradient(dh_BSH: Tensor, ids_BS: Tensor, dword_VH: Tensor, padding: int | None) -> None:
    """Adds to rows of ``dword_VH``, which is 0, the sums of ``dh_BSH`` over the tokens of each id but ``padding``."""
    rows, width = ids_BS.numel(), dword_VH.shape[1]
    ids_M, order_M = ids_BS.flatten().int().sort(stable=True)  # half the bytes, half the passes
    chunks = triton.cdiv(rows, EDGE)
    edges = torch.empty(chunks, 2, width, dtype=torch.float32, device=dh_BSH.device)
    columns = min(COLUMNS, max(16, triton.next_power_of_2(width)))
    grid = (chunks, triton.cdiv(width, columns))
    numbers = rows, len(dword_VH), -1 if padding is None else padding
    _sum_ids[grid](dh_BSH, ids_M, order_M, dword_VH, edges, *numbers, H=width, EDGE=EDGE, COLUMNS=columns, num_warps=4)
    stops = torch.searchsorted(ids_M, ids_M[EDGE - 1 :: EDGE].contiguous(), right=True)
    _join_edges[grid](edges, ids_M, stops, dword_VH, *numbers, H=width, EDGE=EDGE, COLUMNS=columns, TOGETHER=TOGETHER, num_warps=2)
