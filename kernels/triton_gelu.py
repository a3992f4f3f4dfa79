"""A transformer's bias and GELU, and their gradients, one pass over memory each. The bias's gradient is summed in a fixed order.

Letters: M rows, C columns, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_kernels.triton_norm import programs, sum_rows

# Fastest on an H200 (C = 3,072).
ROWS, BACKWARD_ROWS, COLUMNS = 16, 8, 256  # of a tile
WARPS = 4
PROGRAMS, STAGES = 4, 3  # of the backward pass: a processor; tiles in flight


@triton.jit
def _normal(z):
    """(probability that a standard normal number is below z, its density at z). Abramowitz and Stegun 7.1.26: to 1e-7; of small values
    nothing is taken from 1, so that down to z = -5 they lose no more than bfloat16 does."""
    e = tl.exp2(z * z * -0.72134752)  # exp(-z^2 / 2), which is in both
    t = 1.0 / (1.0 + 0.23164190 * tl.abs(z))
    tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * e * 0.5
    return tl.where(z < 0, tail, 1.0 - tail), e * 0.39894228


@triton.jit(do_not_specialize=["rows"])
def _gelu_forward(
    z,  # (M, C) float32 or bfloat16, in
    bias,  # (C,), in
    y,  # (M, C), out
    rows,  # M
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(C, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < C)[None, :]
    at = row[:, None] * C + column[None, :]
    value = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    below, _ = _normal(value)
    tl.store(y + at, value * below, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gelu_backward(
    dy,  # (M, C) float32 or bfloat16, in
    z,  # (M, C), in
    bias,  # (C,), in
    dz,  # (M, C), out
    sums,  # (P, C) float32, out: of a program's rows, to the bias
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    db = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < C)[None, :]
        at = row[:, None] * C + column[None, :]
        value = tl.load(z + at, mask=mask, other=0.0).to(tl.float32) + b[None, :]
        below, density = _normal(value)
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32) * (below + value * density)
        tl.store(dz + at, g, mask=mask)
        db += g
    tl.store(sums + tl.program_id(1) * C + column, tl.sum(db, 0), mask=column < C)


def gelu_forward(z_MC: Tensor, b_C: Tensor, y_MC: Tensor) -> None:
    """Fills ``y_MC``."""
    rows, width = z_MC.shape
    grid = (triton.cdiv(width, COLUMNS) * triton.cdiv(rows, ROWS),)  # one axis: others end at 65,535
    _gelu_forward[grid](z_MC, b_C, y_MC, rows, C=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS)


def gelu_backward(dy_MC: Tensor, z_MC: Tensor, b_C: Tensor, dz_MC: Tensor) -> Tensor:
    """Fills ``dz_MC``. Returns (C,): the gradient of the bias."""
    rows, width = dy_MC.shape
    across, down = triton.cdiv(width, COLUMNS), triton.cdiv(rows, BACKWARD_ROWS)
    grid = (across, max(1, programs(dy_MC.device, across * down, PROGRAMS) // across))
    sums = torch.empty(grid[1], width, dtype=torch.float32, device=dy_MC.device)
    _gelu_backward[grid](dy_MC, z_MC, b_C, dz_MC, sums, rows, C=width, ROWS=BACKWARD_ROWS, COLUMNS=COLUMNS, STAGES=STAGES, num_warps=WARPS)
    db_C = torch.empty_like(b_C)
    sum_rows(sums, db_C)
    return db_C
