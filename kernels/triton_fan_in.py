"""The linear layer whose labels each read F features of their own, by Triton: what group sharing is measured against.

    z_NL[n, l] = sum over f of x_DN[index[l, f], n] w[l, f] + b[l]

No two labels share what they gather, so there is no matrix to multiply: a program takes R labels, gathers a run of batch values for each,
feature after feature, 16 bytes a thread, and multiplies and adds as vectors. Batch tiles are the slow axis of the grid: all programs at
work at a time gather from one tile, which the first-level cache holds. dx is summed by atomic additions of 16 bytes.

Letters: N batch rows, B of them a tile, D input features, R labels a program, F fan-in, C features at a time, L labels.
"""

import triton
import triton.language as tl
from torch import Tensor

LABELS = 64  # of a program that makes logits or dx
LABELS_DW = 16  # of one that makes dW, of so many features:
FEATURES_DW = 8


@triton.jit(do_not_specialize=["n"])
def _forward(
    x,  # (D, NP) any float type, in: x transposed, NP a multiple of B
    weight,  # (L, F) any float type, in
    index,  # (L, F) int16 or int32, in
    bias,  # (L,) any float type or None, in
    out,  # (N, L) the type of x, out
    n,
    stride,  # NP
    rows,  # L
    F: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    batch = tl.program_id(1) * B + tl.arange(0, B)
    real = row < rows
    z_RB = tl.zeros((R, B), tl.float32)
    for f in tl.range(0, F, loop_unroll_factor=4):
        idx = tl.load(index + row * F + f, mask=real, other=0).to(tl.int32)
        w = tl.load(weight + row * F + f, mask=real, other=0.0).to(tl.float32)
        z_RB += w[:, None] * tl.load(x + idx[:, None] * stride + batch[None, :]).to(tl.float32)
    if bias is not None:
        z_RB += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)[:, None]
    at = batch.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + at, tl.trans(z_RB).to(out.dtype.element_ty), mask=(batch < n)[:, None] & real[None, :])


@triton.jit(do_not_specialize=["n"])
def _grad_x(
    dz,  # (N, L) any float type, in
    weight,  # (L, F) any float type, in
    index,  # (L, F) int16 or int32, in
    dx,  # (D, NP) float32, added to: the gradient, transposed
    n,
    stride,  # NP
    rows,  # L
    stride_dz,
    F: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    batch = tl.program_id(1) * B + tl.arange(0, B)
    real = row < rows
    at = batch.to(tl.int64)[:, None] * stride_dz + row[None, :]
    dz_RB = tl.trans(tl.load(dz + at, mask=(batch < n)[:, None] & real[None, :], other=0.0)).to(tl.float32)
    for f in tl.range(0, F, loop_unroll_factor=4):
        idx = tl.load(index + row * F + f, mask=real, other=0).to(tl.int32)
        w = tl.load(weight + row * F + f, mask=real, other=0.0).to(tl.float32)
        tl.atomic_add(dx + idx[:, None] * stride + batch[None, :], w[:, None] * dz_RB, mask=real[:, None], sem="relaxed")


@triton.jit(do_not_specialize=["n", "parts"])
def _grad_weight(
    dz,  # (N, L) any float type, in
    x,  # (D, NP) any float type, in: x transposed, NP a multiple of B
    index,  # (L, F) int16 or int32, in
    dw,  # (L, F) any float type, out
    db,  # (L,) float32, out
    n,
    stride,  # NP
    rows,  # L
    stride_dz,
    parts,  # F / C
    F: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
):
    # Programs that read the same dz are neighbours.
    row = (tl.program_id(0) // parts).to(tl.int64) * R + tl.arange(0, R)
    part = tl.program_id(0) % parts
    f = part * C + tl.arange(0, C)
    real = row < rows
    inside = real[:, None] & (f < F)[None, :]
    idx_RC = tl.load(index + row[:, None] * F + f[None, :], mask=inside, other=0).to(tl.int32)
    dw_RCB = tl.zeros((R, C, B), tl.float32)  # summed over the batch tile at the end, once
    db_R = tl.zeros((R,), tl.float32)
    for start in range(0, n, B):
        batch = start + tl.arange(0, B)
        at = batch.to(tl.int64)[:, None] * stride_dz + row[None, :]
        dz_RB = tl.trans(tl.load(dz + at, mask=(batch < n)[:, None] & real[None, :], other=0.0)).to(tl.float32)
        dw_RCB += dz_RB[:, None, :] * tl.load(x + idx_RC[:, :, None] * stride + batch[None, None, :]).to(tl.float32)
        if part == 0:
            db_R += tl.sum(dz_RB, 1)
    tl.store(dw + row[:, None] * F + f[None, :], tl.sum(dw_RCB, 2).to(dw.dtype.element_ty), mask=inside)
    if part == 0:
        tl.store(db + row, db_R, mask=real)


def forward(x_DN: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fills ``out`` (N, L). ``x_DN`` is transposed and padded to whole tiles of 64; ``weight`` (L, 1, F) and ``index`` contiguous."""
    n, rows = out.shape
    padded = x_DN.shape[1]
    _forward[(triton.cdiv(rows, LABELS), padded // 64)](
        x_DN, weight, index, bias, out, n, padded, rows, F=index.shape[1], R=LABELS, B=64, num_warps=4
    )


def grad_x(dz: Tensor, weight: Tensor, index: Tensor, dx_DN: Tensor) -> None:
    """Adds to ``dx_DN`` (D, NP), NP a multiple of 64."""
    n, rows = dz.shape
    padded = dx_DN.shape[1]
    _grad_x[(triton.cdiv(rows, LABELS), padded // 64)](
        dz, weight, index, dx_DN, n, padded, rows, dz.stride(0), F=index.shape[1], R=LABELS, B=64, num_warps=4
    )


def grad_weight(dz: Tensor, x_DN: Tensor, index: Tensor, dw: Tensor, db: Tensor) -> None:
    """Fills ``dw`` (L, 1, F) and ``db`` (L,); NP of ``x_DN`` is a multiple of 64."""
    n, rows = dz.shape
    fan_in = index.shape[1]
    parts = triton.cdiv(fan_in, FEATURES_DW)
    _grad_weight[(triton.cdiv(rows, LABELS_DW) * parts,)](
        dz, x_DN, index, dw, db, n, x_DN.shape[1], rows, dz.stride(0), parts, F=fan_in, R=LABELS_DW, C=FEATURES_DW, B=64, num_warps=8
    )
