"""One step of the dense head: the GPU library's products, and two kernels for all that stands between them.

    z_RN = W_RD x_DN      _gradient: + b, dz = dloss/dz, loss, db      dx_ND += dz^T W      dW = dz x_ND      _update: SGD in place

A chunk of rows at a time, so that logits and dW never stand whole; every chunk sees its old weights for all N batch rows. The dense
products are the library's best case: fusing them with the rest would save passes over chunks that stay in the cache anyway.

Letters: N batch rows, D embedding width, R rows of a chunk, P positives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_kernels import triton_tiles as tiles
from haste_kernels.products import mm, operand_dtype
from haste_kernels.state import HeadState, Positives, StepArgs

CHUNK_BYTES = 48 << 20  # a chunk's logits, dz and dW: about what the cache holds
ROWS, BATCH, COLUMNS = 16, 128, 64  # tiles


@triton.jit
def _gradient(
    z,  # (R, N) float32, in
    dz,  # (R, N) operand type, out
    bias,  # (H,) float32 or None, in and out
    bias_momentum,  # (H,) float32 or None, in and out
    loss,  # (H / ROWS, rounded up) float32 or None, out
    positive_bounds,  # (H / ROWS rounded up, + 1) int64, in: where the positives of each ROWS rows begin
    positive_row,  # (P,) int64, in
    positive_batch,  # (P,) int64, in
    first,  # row of the chunk's first, a multiple of ROWS
    last,  # row after the chunk's last
    n,
    lr: tl.float32,
    scale: tl.float32,
    inertia: tl.float32,
    R: tl.constexpr,
    B: tl.constexpr,
    BCE: tl.constexpr,
):
    block = first // R + tl.program_id(0)
    row = block * R + tl.arange(0, R)
    real = row < last
    if bias is None:
        b = tl.zeros((R,), tl.float32)
    else:
        b = tl.load(bias + row, mask=real, other=0.0)
    begin = tl.load(positive_bounds + block).to(tl.int32)
    end = tl.load(positive_bounds + block + 1).to(tl.int32)
    db = tl.zeros((R,), tl.float32)
    total = 0.0
    for start in range(0, n, B):
        batch = start + tl.arange(0, B)
        inside = real[:, None] & (batch < n)[None, :]
        at = (row - first).to(tl.int64)[:, None] * n + batch[None, :]
        logits = tl.load(z + at, mask=inside, other=0.0) + b[:, None]
        y = tiles.targets(positive_row, positive_batch, begin, end, row, batch, tiles.POSITIVES)
        g = tl.where(inside, tiles.gradient_of(logits, y, BCE), 0.0)
        db += tl.sum(g, 1)
        if loss is not None:
            total += tl.sum(tl.where(inside, tiles.loss_of(logits, y, BCE), 0.0))
        tl.store(dz + at, g.to(dz.dtype.element_ty), mask=inside)
    if bias is not None:
        tiles.sgd_bias(bias, bias_momentum, row, real, db, lr, scale, inertia)
    if loss is not None:
        tl.store(loss + block, total)


@triton.jit(do_not_specialize=["first_row", "step", "seed_low", "seed_high"])
def _update(
    weight,  # (R, D) float32 or bfloat16, in and out
    momentum,  # the same shape or None, in and out
    gradient,  # (R, D) float32, in
    rows,
    width,
    first_row: tl.int64,  # global row of the first
    lr: tl.float32,
    scale: tl.float32,
    decay: tl.float32,
    inertia: tl.float32,
    step: tl.uint32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    old = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=mask, other=0.0)
    tiles.sgd(
        weight, momentum, at, mask, old, g, first_row + row, tl.program_id(1) * C, lr, scale, decay, inertia, step, seed_low, seed_high
    )


@torch.no_grad()
def head_step(x_ND: Tensor, positives: Positives, head: HeadState, args: StepArgs, want_loss: bool = False) -> tuple[Tensor, Tensor | None]:
    """``haste_kernels.head_step`` by Triton: same arguments, same result."""
    n, width = x_ND.shape
    rows, device = len(head.weight), x_ND.device
    dtype = operand_dtype(x_ND, head.weight)
    x_ND = x_ND.to(dtype).contiguous()
    dx_ND = torch.zeros(n, width, dtype=torch.float32, device=device)
    loss = torch.empty(triton.cdiv(rows, ROWS), dtype=torch.float32, device=device) if want_loss else None
    edges = torch.arange(0, rows + ROWS, ROWS, device=device)
    row, batch = positives.row.contiguous(), positives.batch.contiguous()
    bounds = torch.searchsorted(row, edges)
    most = max(ROWS, CHUNK_BYTES // max(6 * n, 2 * n + 4 * width) // ROWS * ROWS)  # logits and dz, then dz and dW
    for first in range(0, rows, most):
        last = min(first + most, rows)
        w_RD = head.weight[first:last]
        operand = w_RD.to(dtype)
        z_RN = mm(operand, x_ND.T)
        dz_RN = torch.empty(last - first, n, dtype=dtype, device=device)
        _gradient[(triton.cdiv(last - first, ROWS),)](
            z_RN, dz_RN, head.bias, head.bias_momentum, loss, bounds, row, batch, first, last, n,
            args.lr, args.scale, args.momentum, R=ROWS, B=BATCH, BCE=args.loss == "bce", num_warps=4,
        )  # fmt: skip
        del z_RN
        dx_ND += mm(dz_RN.T, operand)
        momentum = None if head.momentum is None else head.momentum[first:last]
        _update[(triton.cdiv(last - first, ROWS), triton.cdiv(width, COLUMNS))](
            w_RD, momentum, mm(dz_RN, x_ND), last - first, width, head.first_row + first, args.lr, args.scale, args.weight_decay,
            args.momentum, args.step, args.seed & 0xFFFFFFFF, args.seed >> 32, R=ROWS, C=COLUMNS, num_warps=4,
        )  # fmt: skip
    return dx_ND.mul_(args.scale), None if loss is None else loss.sum(dtype=torch.float64).mul_(args.scale).float()
