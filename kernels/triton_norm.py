"""Bias, dropout, residual and layer norm of a transformer as one pass over its rows, and all their gradients as another.

    h = r + dropout(x + b)     y = (h - mean h) / sqrt(var h + eps) * w + c

Nothing of the dropout is kept: the second pass draws the same bits. Sums over rows are made in a fixed order: a program's own rows, then
the programs. Letters: M rows, H columns, R rows of a tile, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_kernels.encoder_reference import threshold_and_scale
from haste_kernels.rounding import DROPOUT as STREAM
from haste_kernels.triton_tiles import random_halves

DROPOUT = tl.constexpr(STREAM)
# Fastest on an H200 (H = 768).
ELEMENTS, WARPS = 2048, 2  # of a tile, about
PROGRAMS, STAGES = 4, 3  # of the backward pass: a processor; tiles in flight
SUM_ROWS, SUM_COLUMNS = 256, 16  # of a tile of what its programs leave


@triton.jit
def seed_words(seed):
    """The two halves of the int64 at ``seed``."""
    whole = tl.load(seed)
    return whole & 0xFFFFFFFF, (whole >> 32) & 0xFFFFFFFF


@triton.jit(do_not_specialize=["rows", "columns", "gap"])
def _sum_rows(
    parts,  # (P, C) float32, in
    out,  # (C,), out; or (C + gap,)
    rows,  # P
    columns,  # C
    gap,  # this many of ``out`` are left out, behind as many that are written
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(parts + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)
    tl.store(out + column + tl.where(column < gap, 0, gap), tl.sum(total, 0), mask=column < columns)


@triton.jit
def kept(row, seed_low, seed_high, threshold, COLUMNS: tl.constexpr):
    """(R, COLUMNS): whether dropout keeps each of the first columns of global ``row`` (R,) int64. See encoder_reference.py."""
    block = tl.arange(0, COLUMNS // 8)
    half = random_halves(row[:, None], block[None, :], seed_low * 0, seed_low, seed_high, DROPOUT)
    return tl.reshape(half, (row.shape[0], COLUMNS)) >= threshold.to(tl.uint32)


@triton.jit
def norm_of(value, weight, shift, column, eps, H: tl.constexpr):
    """The norm of each row of ``value`` (R, COLUMNS), which is 0 beyond H, and rows' means and 1 / deviations."""
    real = column < H
    middle = tl.sum(value, 1) / H
    away = tl.where(real[None, :], value - middle[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(away * away, 1) / H + eps)
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    c = tl.load(shift + column, mask=real, other=0.0).to(tl.float32)
    return away * scale[:, None] * w[None, :] + c[None, :], middle, scale


@triton.jit
def norm_gradient(g, value, w, middle, scale, mask, H: tl.constexpr):
    """Of ``g`` (R, COLUMNS), the gradient of the norm of ``value``: to ``value``, and to each row's share of the weight."""
    normed = tl.where(mask, (value - middle[:, None]) * scale[:, None], 0.0)
    share = g * normed
    g *= w[None, :]
    along = tl.sum(g * normed, 1) / H
    level = tl.sum(g, 1) / H
    return tl.where(mask, (g - level[:, None] - normed * along[:, None]) * scale[:, None], 0.0), share


@triton.jit
def store_sums(sums, column, first, second, third, H: tl.constexpr):
    """Of each (R, COLUMNS) the sum over rows, to this program's (3, H) of ``sums``."""
    at = sums + tl.program_id(0) * 3 * H + column
    tl.store(at, tl.sum(first, 0), mask=column < H)
    tl.store(at + H, tl.sum(second, 0), mask=column < H)
    tl.store(at + 2 * H, tl.sum(third, 0), mask=column < H)


@triton.jit(do_not_specialize=["rows", "threshold"])
def _norm_forward(
    x,  # (M, H), in, as all below of no other type: float32 or bfloat16
    bias,  # (H,), in
    residual,  # (M, H), in
    weight,  # (H,), in
    shift,  # (H,), in
    h,  # (M, H), out
    y,  # (M, H), out
    mean,  # (M,) float32, out
    rstd,  # (M,) float32, out: 1 / the deviation
    seed,  # (1,) int64, in, or None: nothing is dropped
    rows,  # M
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
    real = column < H
    mask = (row < rows)[:, None] & real[None, :]
    at = row[:, None] * H + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    if DROPS:
        low, high = seed_words(seed)
        value = tl.where(kept(row, low, high, threshold, COLUMNS), value * keep_scale, 0.0)
    value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + at, value, mask=mask)
    normed, middle, scale = norm_of(value, weight, shift, column, eps, H)
    tl.store(y + at, normed, mask=mask)
    tl.store(mean + row, middle, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "threshold"])
def _norm_backward(
    dy,  # (M, H), in
    h,  # (M, H), in
    weight,  # (H,), in
    mean,  # (M,) float32, in
    rstd,  # (M,) float32, in
    dr,  # (M, H), out: to the residual
    dx,  # (M, H), out: to x, where it is another
    sums,  # (P, 3, H) float32, out: of a program's rows, to bias, weight and shift
    seed,  # (1,) int64, in
    rows,
    threshold,
    keep_scale: tl.float32,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    DROPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    real = column < H
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    if DROPS:
        low, high = seed_words(seed)
    db = tl.zeros((R, COLUMNS), tl.float32)
    dw = tl.zeros((R, COLUMNS), tl.float32)
    dc = tl.zeros((R, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        mask = (row < rows)[:, None] & real[None, :]
        at = row[:, None] * H + column[None, :]
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        middle = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        dc += g
        g, share = norm_gradient(g, value, w, middle, scale, mask, H)
        dw += share
        tl.store(dr + at, g, mask=mask)
        if DROPS:
            g = tl.where(kept(row, low, high, threshold, COLUMNS), g * keep_scale, 0.0)
            tl.store(dx + at, g, mask=mask)
        db += g
    store_sums(sums, column, db, dw, dc, H)


def sum_rows(parts_PC: Tensor, out_C: Tensor, gap: int = 0) -> None:
    """Fills ``out_C`` with what programs left, summed in a fixed order; but ``gap`` of it, behind as many, where that is not 0."""
    rows, columns = parts_PC.shape
    grid = (triton.cdiv(columns, SUM_COLUMNS),)
    _sum_rows[grid](parts_PC, out_C, rows, columns, gap, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=8)


def tile_rows(columns: int) -> int:
    return max(1, ELEMENTS // columns)


def programs(device: torch.device, tiles: int, each: int) -> int:
    """Of a kernel whose programs each take tile after tile: ``each`` a processor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(tiles, processors * each)


def norm_forward(
    x_MH: Tensor, b_H: Tensor, r_MH: Tensor, w_H: Tensor, c_H: Tensor, p: float, eps: float, seed: Tensor | None,
    h_MH: Tensor, y_MH: Tensor, mean_M: Tensor, rstd_M: Tensor,
) -> None:  # fmt: skip
    """Fills the last four."""
    rows, width = x_MH.shape
    columns = max(8, triton.next_power_of_2(width))
    count = tile_rows(columns)
    _norm_forward[(triton.cdiv(rows, count),)](
        x_MH, b_H, r_MH, w_H, c_H, h_MH, y_MH, mean_M, rstd_M, seed, rows, *threshold_and_scale(p), eps,
        H=width, COLUMNS=columns, R=count, DROPS=p > 0 and seed is not None, num_warps=WARPS,
    )  # fmt: skip


def norm_backward(
    dy_MH: Tensor, h_MH: Tensor, w_H: Tensor, mean_M: Tensor, rstd_M: Tensor, p: float, seed: Tensor | None, dr_MH: Tensor, dx_MH: Tensor
) -> Tensor:
    """Fills the last two, which may be one where nothing is dropped. Returns (3, H): gradients of b, w and c."""
    rows, width = dy_MH.shape
    columns = max(8, triton.next_power_of_2(width))
    count = tile_rows(columns)
    grid = programs(dy_MH.device, triton.cdiv(rows, count), PROGRAMS)
    sums = torch.empty(grid, 3, width, dtype=torch.float32, device=dy_MH.device)
    _norm_backward[(grid,)](
        dy_MH, h_MH, w_H, mean_M, rstd_M, dr_MH, dx_MH, sums, seed, rows, *threshold_and_scale(p),
        H=width, COLUMNS=columns, R=count, DROPS=p > 0 and seed is not None, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    total_3H = w_H.new_empty(3, width)
    sum_rows(sums.flatten(1), total_3H)
    return total_3H
