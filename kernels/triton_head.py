"""One step of the dense head in three products: two kernels that do all the rest on the way, and the GPU library's for dx.

    _gradient: z_RN = W_RD x_ND^T + b, dz = dloss/dz, loss, biases' step      dx_ND += dz^T W      _update: dW = dz x_ND, SGD in place

A chunk of rows at a time; of it only dz passes through memory, in half precision if the operands are. Every chunk sees its old weights
for all N batch rows: dx is taken before the update.

Letters: N batch rows, D embedding width, R rows of a chunk, P positives; B, C and K batch rows, features and inner values of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_kernels import triton_tiles as tiles
from haste_kernels import tuning
from haste_kernels.products import mm, operand_dtype
from haste_kernels.state import HeadState, Positives, StepArgs

CHUNK_BYTES = 64 << 20  # a chunk's dz


@dataclass(frozen=True)
class HeadTiles:
    """Rows of a program, the most batch rows or features beside them, inner values of a product, warps, loads in flight."""

    rows: int
    beside: int
    inner: int
    warps: int
    stages: int
    registers: int | None = None  # fewer let two programs share a processor


HALF, FLOAT = HeadTiles(64, 128, 64, 4, 4), HeadTiles(32, 64, 32, 4, 2)
MOST_ROWS = 128
CANDIDATES = (
    HALF,
    *(HeadTiles(64, beside, 64, warps, 3) for beside, warps in ((128, 4), (256, 4), (256, 8))),
    *(HeadTiles(128, 128, 64, warps, stages) for warps, stages in ((4, 3), (8, 3), (8, 4))),
    HeadTiles(128, 128, 64, 8, 3, 128),
    HeadTiles(64, 64, 64, 4, 4),
    HeadTiles(128, 64, 64, 4, 4),
    HeadTiles(128, 256, 64, 8, 3),
)


def default_config(dtype: torch.dtype) -> HeadTiles:
    """The table's choice for operands of ``dtype``."""
    return FLOAT if dtype == torch.float32 else HALF


def key(x_ND: Tensor, head: HeadState) -> str:
    """What the best tile depends on; batch sizes share a choice up to the next power of two."""
    momentum = "none" if head.momentum is None else str(head.momentum.dtype)
    n, width = x_ND.shape
    return f"D={width} N={triton.next_power_of_2(n)} {head.weight.dtype} momentum={momentum}".replace("torch.", "")


@triton.jit(do_not_specialize=["first", "last", "count"])
def _mark(
    bits,  # (R, N / 32 rounded up) int32, in and out
    positive_row,  # (P,) int64, in
    positive_batch,  # (P,) int64, in
    first,  # row of the chunk's first
    last,  # row after the chunk's last
    count,  # P
    words,
    P: tl.constexpr,
):
    at = tl.program_id(0) * P + tl.arange(0, P)
    row = tl.load(positive_row + at, mask=at < count, other=-1)
    batch = tl.load(positive_batch + at, mask=at < count, other=0).to(tl.int32)
    tl.atomic_or(bits + (row - first) * words + batch // 32, 1 << (batch % 32), mask=(row >= first) & (row < last), sem="relaxed")


@triton.jit(do_not_specialize=["first", "last"])
def _gradient(
    x,  # (N, D) operand type, in
    weight,  # (R, D) operand type, in: the chunk's
    dz,  # (R, N) operand type, out
    bits,  # (R, words) int32, in: the positives
    bias,  # (H,) float32 or None, in and out
    bias_momentum,  # (H,) float32 or None, in and out
    loss,  # (programs) float32 or None, out
    positive_bounds,  # (programs + 1) int64, in: where the positives of each program's rows begin
    first,  # row of the chunk's first
    last,  # row after the chunk's last
    n,
    words,
    lr: tl.float32,
    scale: tl.float32,
    inertia: tl.float32,
    D: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    BCE: tl.constexpr,
    STAGES: tl.constexpr,
):
    here = tl.program_id(0) * R + tl.arange(0, R)
    row = (first + here).to(tl.int64)
    real = row < last
    if bias is None:
        b = tl.zeros((R,), tl.float32)
    else:
        b = tl.load(bias + row, mask=real, other=0.0)
    any_positive = tl.load(positive_bounds + tl.program_id(0)) < tl.load(positive_bounds + tl.program_id(0) + 1)
    db = tl.zeros((R,), tl.float32)
    total = 0.0
    for start in range(0, n, B):
        batch = start + tl.arange(0, B)
        z = tl.zeros((R, B), tl.float32)
        for inner in tl.range(0, D, K, num_stages=STAGES):
            d = inner + tl.arange(0, K)
            w_RK = tl.load(weight + here.to(tl.int64)[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
            x_BK = tl.load(x + batch[:, None] * D + d[None, :], mask=(batch < n)[:, None] & (d < D)[None, :], other=0.0)
            z = tl.dot(w_RK, tl.trans(x_BK), z, input_precision="ieee")
        z += b[:, None]
        inside = real[:, None] & (batch < n)[None, :]
        g = tiles.gradient_of(z, None, BCE)
        if loss is not None:
            value = tiles.loss_of(z, None, BCE)
        if any_positive:
            word = tl.load(bits + here.to(tl.int64)[:, None] * words + (batch // 32)[None, :], mask=inside, other=0)
            y = (word >> (batch % 32)[None, :]) & 1
            g = tiles.gradient_of(z, y, BCE)
            if loss is not None:
                value = tiles.loss_of(z, y, BCE)
        g = tl.where(inside, g, 0.0)
        db += tl.sum(g, 1)
        if loss is not None:
            total += tl.sum(tl.where(inside, value, 0.0))
        tl.store(dz + here.to(tl.int64)[:, None] * n + batch[None, :], g.to(dz.dtype.element_ty), mask=inside)
    if bias is not None:
        tiles.sgd_bias(bias, bias_momentum, row, real, db, lr, scale, inertia)
    if loss is not None:
        tl.store(loss + tl.program_id(0), total)


@triton.jit(do_not_specialize=["rows", "first_row", "step", "seed_low", "seed_high"])
def _update(
    x,  # (N, D) operand type, in
    dz,  # (R, N) operand type, in
    weight,  # (R, D) float32, bfloat16 or float8, in and out
    momentum,  # the same shape or None, in and out
    n,
    rows,  # R
    first_row: tl.int64,  # global row of the first
    lr: tl.float32,
    scale: tl.float32,
    decay: tl.float32,
    inertia: tl.float32,
    step: tl.uint32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    D: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    NEAREST: tl.constexpr,
    STAGES: tl.constexpr,
):
    COLUMNS: tl.constexpr = (D + C - 1) // C
    row = (tl.program_id(0) // COLUMNS * R + tl.arange(0, R)).to(tl.int64)
    first_column = tl.program_id(0) % COLUMNS * C
    column = first_column + tl.arange(0, C)
    dw = tl.zeros((R, C), tl.float32)
    for start in tl.range(0, n, K, num_stages=STAGES):
        batch = start + tl.arange(0, K)
        dz_RK = tl.load(dz + row[:, None] * n + batch[None, :], mask=(row < rows)[:, None] & (batch < n)[None, :], other=0.0)
        x_KC = tl.load(x + batch[:, None] * D + column[None, :], mask=(batch < n)[:, None] & (column < D)[None, :], other=0.0)
        dw = tl.dot(dz_RK, x_KC, dw, input_precision="ieee")
    mask = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    tiles.sgd(
        weight, momentum, at, mask, dw, first_row + row, first_column, lr, scale, decay, inertia, step, seed_low, seed_high, NEAREST
    )  # fmt: skip


@torch.no_grad()
def head_step(
    x_ND: Tensor, positives: Positives, head: HeadState, args: StepArgs, want_loss: bool = False, config: HeadTiles | None = None
) -> tuple[Tensor, Tensor | None]:
    """``haste_kernels.head_step`` by Triton: same arguments, same result. ``config`` None: what was tuned here, else the table's."""
    (n, width), rows, device = x_ND.shape, len(head.weight), x_ND.device
    dtype = operand_dtype(x_ND, head.weight)
    x_ND = x_ND.to(dtype).contiguous()
    tile = config or tuning.chosen("head_step", key(x_ND, head), CANDIDATES) or default_config(dtype)
    batch = min(tile.beside, max(16, triton.next_power_of_2(n)))
    columns = min(tile.beside, max(16, triton.next_power_of_2(width)))
    loss = torch.empty(triton.cdiv(rows, tile.rows), dtype=torch.float32, device=device) if want_loss else None
    row, column = positives.row.contiguous(), positives.batch.contiguous()
    bounds = torch.searchsorted(row, torch.arange(0, rows + tile.rows, tile.rows, device=device))
    most = max(tile.rows, CHUNK_BYTES // (dtype.itemsize * n) // tile.rows * tile.rows)
    words = triton.cdiv(n, 32)
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    dx_ND: Tensor | None = None
    for first in range(0, rows, most):
        last = min(first + most, rows)
        programs, block = triton.cdiv(last - first, tile.rows), first // tile.rows
        bits = torch.zeros(last - first, words, dtype=torch.int32, device=device)
        if len(row):
            _mark[(triton.cdiv(len(row), 128),)](bits, row, column, first, last, len(row), words, P=128, num_warps=4)
        dz_RN = torch.empty(last - first, n, dtype=dtype, device=device)
        w_RD = head.weight[first:last]
        operand_RD = w_RD.to(dtype)  # float8 is converted once, for both products with the weights
        _gradient[(programs,)](
            x_ND, operand_RD, dz_RN, bits, head.bias, head.bias_momentum, None if loss is None else loss[block:], bounds[block:],
            first, last, n, words, args.lr, args.scale, args.momentum,
            D=width, R=tile.rows, B=batch, K=tile.inner, BCE=args.loss == "bce", STAGES=tile.stages, num_warps=tile.warps, **limit,
        )  # fmt: skip
        part = mm(dz_RN.T, operand_RD)
        dx_ND = part if dx_ND is None else dx_ND.add_(part)
        momentum = None if head.momentum is None else head.momentum[first:last]
        _update[(programs * triton.cdiv(width, columns),)](
            x_ND, dz_RN, w_RD, momentum, n, last - first, head.first_row + first, args.lr, args.scale, args.weight_decay, args.momentum,
            args.step, args.seed & 0xFFFFFFFF, args.seed >> 32,
            D=width, R=tile.rows, C=columns, K=tile.inner, NEAREST=args.rounding == "nearest", STAGES=tile.stages, num_warps=tile.warps,
            **limit,
        )  # fmt: skip
    if dx_ND is None:
        dx_ND = torch.zeros(n, width, dtype=torch.float32, device=device)
    return dx_ND.mul_(args.scale), None if loss is None else loss.sum(dtype=torch.float64).mul_(args.scale).float()
