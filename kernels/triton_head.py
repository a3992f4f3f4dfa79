"""One step of the dense head in three products: two kernels that do all the rest on the way, and the GPU library's for dx.

    _gradient: z_RN = W_RD x_ND^T + b, dz = dloss/dz            dx_ND += dz^T W            _update: dW = dz x_ND, SGD in place

A chunk of rows at a time; of it only dz passes through memory, in half precision if the operands are. Every chunk sees its old weights
for all N batch rows: dx is taken before the update. _gradient takes all pairs for negatives, _correct then mends the positives, which
are few, and _biases sums: to look for positives in every tile took longer than the product, and biases slow most tiles of the update.

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


FLOAT = HeadTiles(32, 64, 32, 4, 2)
GRADIENT, UPDATE = HeadTiles(128, 128, 64, 8, 3), HeadTiles(64, 64, 64, 4, 3)
MOST_ROWS, LEAST_BESIDE = 128, 64  # of all tiles; their rows divide it
PAIRS = 16  # positives of a program
CANDIDATES = (  # of both kernels
    GRADIENT,
    UPDATE,
    HeadTiles(64, 64, 64, 4, 4),
    *(HeadTiles(64, 128, 64, warps, stages) for warps, stages in ((4, 3), (4, 4), (8, 3), (8, 4))),
    *(HeadTiles(128, 64, 64, warps, 3) for warps in (4, 8)),
    HeadTiles(128, 128, 64, 4, 3),
    HeadTiles(128, 256, 64, 8, 3),
)


def default_tiles(dtype: torch.dtype) -> tuple[HeadTiles, HeadTiles]:
    """The table's choices of the two kernels, for operands of ``dtype``."""
    return (FLOAT, FLOAT) if dtype == torch.float32 else (GRADIENT, UPDATE)


def key(x_ND: Tensor, head: HeadState) -> str:
    """What the best tile depends on; batch sizes share a choice up to the next power of two."""
    momentum = "none" if head.momentum is None else str(head.momentum.dtype)
    n, width = x_ND.shape
    return f"D={width} N={triton.next_power_of_2(n)} {head.weight.dtype} momentum={momentum}".replace("torch.", "")


@triton.jit(do_not_specialize=["rows"])
def _gradient(
    x,  # (N, D) operand type, in
    weight,  # (R, D) operand type, in: the chunk's
    dz,  # (R, N) operand type, out
    bias,  # (R,) float32 or None, in
    db,  # (programs of a row, R) float32 or None, out
    loss,  # (programs) float32 or None, out
    rows,  # R of the chunk
    n,
    D: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    BCE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As if no pair were positive."""
    beside = tl.cdiv(n, B)
    block, part = tl.program_id(0) // beside, tl.program_id(0) % beside
    row = block * R + tl.arange(0, R)
    batch = part * B + tl.arange(0, B)
    z = tl.zeros((R, B), tl.float32)
    for inner in tl.range(0, D, K, num_stages=STAGES):
        w_RK = tiles.matrix_tile(weight, block * R, inner, rows, D, R, K)
        x_BK = tiles.matrix_tile(x, part * B, inner, n, D, B, K)
        z = tl.dot(w_RK, tl.trans(x_BK), z, input_precision="ieee")
    if bias is not None:
        z += tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    inside = (row < rows)[:, None] & (batch < n)[None, :]
    g = tl.where(inside, tiles.gradient_of(z, None, BCE), 0.0)
    if db is not None:
        tl.store(db + part * rows + row, tl.sum(g, 1), mask=row < rows)
    if loss is not None:
        tl.store(loss + tl.program_id(0), tl.sum(tl.where(inside, tiles.loss_of(z, None, BCE), 0.0)))
    tl.store(dz + row.to(tl.int64)[:, None] * n + batch[None, :], g.to(dz.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "last", "count"])
def _correct(
    x,  # (N, D) operand type, in
    weight,  # (R, D) operand type, in: the chunk's
    dz,  # (R, N) operand type, out
    bias,  # (R,) float32 or None, in
    change,  # (P,) float32 or None, out: what a pair adds to its row's sum of dz
    loss,  # (programs) float32 or None, out: what is added to the loss
    positive_row,  # (P,) int64, in
    positive_batch,  # (P,) int64, in
    first,  # row of the chunk's first
    last,  # row after the chunk's last
    count,  # P
    n,
    D: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    BCE: tl.constexpr,
):
    """The positives, after _gradient: few of all pairs, and each costs a product of two rows."""
    at = tl.program_id(0) * P + tl.arange(0, P)
    row = tl.load(positive_row + at, mask=at < count, other=-1)
    batch = tl.load(positive_batch + at, mask=at < count, other=0)
    inside = (row >= first) & (row < last)
    earlier = (at > 0) & (at < count)  # a pair that is there twice counts once
    again = (tl.load(positive_row + at - 1, mask=earlier, other=-1) == row) & (
        tl.load(positive_batch + at - 1, mask=earlier, other=-1) == batch
    )
    real = inside & ~again
    row -= first
    total = tl.zeros((P, K), tl.float32)
    for inner in range(0, D, K):
        d = inner + tl.arange(0, K)
        mask = real[:, None] & (d < D)[None, :]
        w_PK = tl.load(weight + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        x_PK = tl.load(x + batch[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += w_PK.to(tl.float32) * x_PK.to(tl.float32)
    z = tl.sum(total, 1)
    if bias is not None:
        z += tl.load(bias + row, mask=real, other=0.0)
    g = tiles.gradient_of(z, real, BCE)
    tl.store(dz + row * n + batch, g.to(dz.dtype.element_ty), mask=real)
    if change is not None:
        tl.store(change + at, tl.where(real, g - tiles.gradient_of(z, None, BCE), 0.0), mask=inside)
    if loss is not None:
        tl.store(loss + tl.program_id(0), tl.sum(tl.where(real, tiles.loss_of(z, real, BCE) - tiles.loss_of(z, None, BCE), 0.0)))


@triton.jit(do_not_specialize=["first", "count", "rows", "parts"])
def _biases(
    bias,  # (R,) float32, in and out: the chunk's
    momentum,  # (R,) float32 or None, in and out
    db,  # (parts, R) float32, in
    change,  # (P,) float32, in
    positive_row,  # (P,) int64, in
    first,  # row of the chunk's first
    count,  # P
    rows,  # R
    parts,
    lr: tl.float32,
    scale: tl.float32,
    inertia: tl.float32,
    R: tl.constexpr,
    P: tl.constexpr,
):
    """Their step: sums in an order that is always the same."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    total = tl.zeros((R,), tl.float32)
    of = db + row
    for _ in range(parts):
        total += tl.load(of, mask=row < rows, other=0.0)
        of += rows
    ends = tiles.first_places(positive_row, 0, count, first + (tl.program_id(0) + tl.arange(0, 2)) * R)
    last = tl.max(ends)
    for start in range(tl.min(ends), last, P):
        at = start + tl.arange(0, P)
        its = tl.load(positive_row + at, mask=at < last, other=-1) - first
        more = tl.load(change + at, mask=at < last, other=0.0)
        total += tl.sum(tl.where(its[None, :] == row[:, None], more[None, :], 0.0), 1)
    tiles.sgd_bias(bias, momentum, row, row < rows, total, lr, scale, inertia)


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
    block, first_column = tl.program_id(0) // COLUMNS, tl.program_id(0) % COLUMNS * C
    row = (block * R + tl.arange(0, R)).to(tl.int64)
    column = first_column + tl.arange(0, C)
    dw = tl.zeros((R, C), tl.float32)
    for start in tl.range(0, n, K, num_stages=STAGES):
        dz_RK = tiles.matrix_tile(dz, block * R, start, rows, n, R, K)
        x_KC = tiles.matrix_tile(x, start, first_column, n, D, K, C)
        dw = tl.dot(dz_RK, x_KC, dw, input_precision="ieee")
    mask = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    tiles.sgd(
        weight, momentum, at, mask, dw, first_row + row, first_column, lr, scale, decay, inertia, step, seed_low, seed_high, NEAREST
    )  # fmt: skip


@torch.no_grad()
def head_step(
    x_ND: Tensor,
    positives: Positives,
    head: HeadState,
    args: StepArgs,
    want_loss: bool = False,
    gradient: HeadTiles | None = None,
    update: HeadTiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``haste_kernels.head_step`` by Triton: same arguments, same result. Tiles that are None: what was tuned here, else the table's."""
    (n, width), rows, device = x_ND.shape, len(head.weight), x_ND.device
    dtype = operand_dtype(x_ND, head.weight)
    x_ND = x_ND.to(dtype).contiguous()
    of, (first_choice, second_choice) = key(x_ND, head), default_tiles(dtype)
    one = gradient or tuning.chosen("head_gradient", of, CANDIDATES) or first_choice
    two = update or tuning.chosen("head_update", of, CANDIDATES) or second_choice
    batch = min(one.beside, max(16, triton.next_power_of_2(n)))
    columns = min(two.beside, max(16, triton.next_power_of_2(width)))
    parts = triton.cdiv(n, batch)
    row, column = positives.row.contiguous(), positives.batch.contiguous()
    pairs = len(row)
    change = None if head.bias is None else torch.empty(pairs, dtype=torch.float32, device=device)
    most = max(MOST_ROWS, CHUNK_BYTES // (dtype.itemsize * n) // MOST_ROWS * MOST_ROWS)
    losses: list[Tensor] = []
    dx_ND: Tensor | None = None
    for first in range(0, rows, most):
        here = slice(first, min(first + most, rows))
        held = [None if state is None else state[here] for state in (head.weight, head.momentum, head.bias, head.bias_momentum)]
        w_RD, momentum, bias, bias_momentum = held
        assert w_RD is not None
        count = len(w_RD)
        dz_RN = torch.empty(count, n, dtype=dtype, device=device)
        db = None if bias is None else torch.empty(parts, count, dtype=torch.float32, device=device)
        operand_RD = w_RD.to(dtype)  # float8 is converted once, for all products with the weights

        def sums(programs: int) -> Tensor | None:
            if not want_loss:
                return None
            losses.append(torch.empty(programs, dtype=torch.float32, device=device))
            return losses[-1]

        programs = triton.cdiv(count, one.rows) * parts
        _gradient[(programs,)](
            x_ND, operand_RD, dz_RN, bias, db, sums(programs), count, n,
            D=width, R=one.rows, B=batch, K=one.inner, BCE=args.loss == "bce", STAGES=one.stages, num_warps=one.warps,
        )  # fmt: skip
        if pairs:
            programs = triton.cdiv(pairs, PAIRS)
            _correct[(programs,)](
                x_ND, operand_RD, dz_RN, bias, change, sums(programs), row, column, first, here.stop, pairs, n,
                D=width, P=PAIRS, K=min(128, triton.next_power_of_2(width)), BCE=args.loss == "bce", num_warps=4,
            )  # fmt: skip
        if bias is not None:
            _biases[(triton.cdiv(count, 32),)](
                bias, bias_momentum, db, change, row, first, pairs, count, parts, args.lr, args.scale, args.momentum,
                R=32, P=256, num_warps=4,
            )  # fmt: skip
        part = mm(dz_RN.T, operand_RD)
        dx_ND = part if dx_ND is None else dx_ND.add_(part)
        _update[(triton.cdiv(count, two.rows) * triton.cdiv(width, columns),)](
            x_ND, dz_RN, w_RD, momentum, n, count, head.first_row + first, args.lr, args.scale, args.weight_decay, args.momentum,
            args.step, args.seed & 0xFFFFFFFF, args.seed >> 32,
            D=width, R=two.rows, C=columns, K=two.inner, NEAREST=args.rounding == "nearest", STAGES=two.stages, num_warps=two.warps,
        )  # fmt: skip
    if dx_ND is None:
        dx_ND = torch.zeros(n, width, dtype=torch.float32, device=device)
    dx_ND.mul_(args.scale)
    if not want_loss:
        return dx_ND, None
    return dx_ND, torch.cat([*losses, dx_ND.new_zeros(1)]).sum(dtype=torch.float64).mul_(args.scale).float()
