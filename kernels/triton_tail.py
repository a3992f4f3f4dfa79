"""One step of the sparse tail as one kernel: a program takes a group through all batch tiles, then updates it in place.

    z_GB = W_GF xg_FB + b     xg_FB = x_DN[idx_F, tile]     dz = dloss/dz     dx_DN[idx_F, tile] += W^T dz     dW_GF += dz xg^T

Logits, gathered features and dW stay in registers and shared memory: per group the device reads weights and momentum once and writes
them once. x is transposed once, so a feature's batch values lie side by side: gather and scatter move whole runs of them.
dx is summed by the cache's atomic additions, in float32, or in float16 runs that end in float32 (RUN); in the deterministic mode each
group's part goes to scratch memory instead, and a second kernel adds them in a fixed order.

Letters: N batch rows, B of them a tile, D embedding width, T groups, G rows a group, F fan-in, P positives.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_kernels import slab_tail, tuning
from haste_kernels import triton_tiles as tiles
from haste_kernels.backend import takes_types
from haste_kernels.products import operand_dtype
from haste_kernels.state import Positives, StepArgs, TailState
from haste_kernels.triton_dx import gather, sum_in_order, zeros_for_parts


@dataclass(frozen=True)
class TailConfig:
    """How a program works: batch tile, orientation of the logits' tile, warps, loads in flight, registers a thread may use."""

    batch: int
    rows_first: bool  # the logits' tile is (G, B); else (B, G), which suits the tensor cores where G is below 64
    warps: int
    stages: int
    registers: int | None = None  # fewer let more programs share a processor; too few spill
    ahead: int = 0  # how many groups ahead a program asks the cache for another's weights


# Fastest on an H100 (Triton 3.6, D = 768, F = 64, N = 512, bfloat16), by G. LOG.md tells what the others took.
TABLE = {
    16: TailConfig(64, False, 4, 3, 112),
    32: TailConfig(64, False, 4, 3, 128),
    64: TailConfig(64, True, 4, 3, 168),
    128: TailConfig(32, True, 8, 2),
}
CANDIDATES = tuple(
    TailConfig(batch, rows_first, 4, stages, registers, ahead)
    for batch, rows_first in ((32, True), (64, True), (64, False))
    for stages, registers, ahead in (*product((2, 3), (168, 128, 112), (0,)), (3, 128, 512), (2, 112, 512))
)


def default_config(size: int, fan_in: int, n: int) -> TailConfig:
    """The table's choice; wide fan-ins take their registers as they need them, small batches a small tile."""
    config = TABLE[size]
    batch = min(config.batch, max(16, triton.next_power_of_2(n)))
    return replace(config, batch=batch, registers=config.registers if fan_in <= 64 else None)


@triton.jit
def _tile(
    read_FB, w_GF, b, few, hot_GP, p_batch, batch, y_GB, real_r, real_b, dw, db, total,
    BCE: tl.constexpr, ROWS_FIRST: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """One group, one batch tile: adds to dW, to the biases' gradient and to the loss; returns them and dx_FB, unscaled.

    Positives are ``y_GB``, or, where it is None and ``few`` holds, the product of ``hot_GP`` and ``hot_PB``. ``real_r`` and ``real_b``
    may be None: no padded rows, no batch rows beyond N.
    """
    AXIS: tl.constexpr = 1 if ROWS_FIRST else 0  # of the batch
    xg_FB = tl.load(read_FB)
    if ROWS_FIRST:
        z = tl.dot(w_GF, xg_FB, input_precision="ieee")
    else:
        z = tl.dot(tl.trans(xg_FB), tl.trans(w_GF), input_precision="ieee")
    z += tl.expand_dims(b, AXIS)
    if y_GB is None:
        dz = tiles.gradient_of(z, None, BCE)
        if LOSS:
            value = tiles.loss_of(z, None, BCE)
        if few is not None and few:
            y = tl.dot(hot_GP, (p_batch[:, None] == batch[None, :]).to(tl.float16))
            y = y if ROWS_FIRST else tl.trans(y)
            dz = tiles.gradient_of(z, y, BCE)
            if LOSS:
                value = tiles.loss_of(z, y, BCE)
    else:
        y = y_GB if ROWS_FIRST else tl.trans(y_GB)
        dz = tiles.gradient_of(z, y, BCE)
        if LOSS:
            value = tiles.loss_of(z, y, BCE)
    if real_r is not None:
        dz = tl.where(tl.expand_dims(real_r, AXIS), dz, 0.0)
        if LOSS:
            value = tl.where(tl.expand_dims(real_r, AXIS), value, 0.0)
    if real_b is not None:
        dz = tl.where(tl.expand_dims(real_b, 1 - AXIS), dz, 0.0)
        if LOSS:
            value = tl.where(tl.expand_dims(real_b, 1 - AXIS), value, 0.0)
    if ROWS_FIRST:
        db += tl.sum(dz, 1)
    else:
        db += dz  # a sum over warps would make all of them wait; it is made once, at the end
    if LOSS:
        total += tl.sum(value)
    low = dz.to(xg_FB.dtype)
    if ROWS_FIRST:
        dw = tl.dot(low, tl.trans(xg_FB), dw, input_precision="ieee")
        dx_FB = tl.dot(tl.trans(w_GF), low, input_precision="ieee")
    else:
        dw = tl.dot(xg_FB, low, dw, input_precision="ieee")
        dx_FB = tl.dot(tl.trans(w_GF), tl.trans(low), input_precision="ieee")
    return dx_FB, dw, db, total


@triton.jit
def _by_warp(row, A: tl.constexpr):
    """Of which of dx's rows ``_scatter`` makes ``row``: a product leaves 16 at a time with a warp, which adds A of them at a time."""
    return row // 64 * 64 + row // A % 4 * 16 + row % 64 // (4 * A) * A + row % A


@triton.jit
def _scatter(out, value, mask, A: tl.constexpr, SCRATCH: tl.constexpr):
    """Adds a tile of dx to its features; to scratch memory, which nobody shares, it is only written.

    A above 0: rows are first numbered so that each warp adds what it holds. The exchange is then within warps, without a barrier.
    """
    F: tl.constexpr = value.shape[0]
    value = value.to(out.dtype.element_ty)
    if A:
        value = tl.reshape(tl.permute(tl.reshape(value, (F // 64, 4, 16 // A, A, value.shape[1])), (0, 2, 1, 3, 4)), value.shape)
    if SCRATCH:
        tl.store(out, value, mask=mask)
    else:
        tl.atomic_add(out, value, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["first_group", "copies", "rows", "first_row", "step", "seed_low", "seed_high"])
def _tail_step(
    x,  # (D, NP) operand type, in: x transposed, zero beyond N
    dx,  # (copies, D, NP) float32 or float16, added to; SCRATCH: (groups of this launch * F, NP) float32, out
    weight,  # (T, G, F) float32, bfloat16 or float8, in and out
    momentum,  # the same shape or None, in and out
    index,  # (T, F) int16 or int32, in
    bias,  # (T, G) float32 or None, in and out
    bias_momentum,  # (T, G) float32 or None, in and out
    loss,  # (T,) float32 or None, out: the sum over a group's pairs
    positive_bounds,  # (T + 1,) int64, in: where each group's positives begin
    positive_row,  # (P,) int64, in
    positive_batch,  # (P,) int64, in
    first_group: tl.int64,  # of this launch
    n,
    stride,  # NP
    copies,
    copy_stride: tl.int64,  # D * NP
    rows: tl.int64,  # real rows of the shard
    first_row: tl.int64,  # global row of the shard's first
    lr: tl.float32,
    scale: tl.float32,
    decay: tl.float32,
    inertia: tl.float32,
    step: tl.uint32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    G: tl.constexpr,
    F: tl.constexpr,
    F_PADDED: tl.constexpr,  # the next power of two
    B: tl.constexpr,
    BCE: tl.constexpr,
    NEAREST: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    RAGGED: tl.constexpr,  # N is no multiple of B
    SCRATCH: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    WARPS: tl.constexpr,
):
    group = first_group + tl.program_id(0)
    r = tl.arange(0, G)
    f = tl.arange(0, F_PADDED)
    real_f = f < F
    if AHEAD:
        later = group + AHEAD
        if later * G < rows:
            tiles.prefetch(weight + later * G * F, G * F_PADDED // 64)
            if momentum is not None:
                tiles.prefetch(momentum + later * G * F, G * F_PADDED // 64)
            tiles.prefetch(index + later * F, 1)
    idx = tl.load(index + group * F + f, mask=real_f, other=0).to(tl.int32)
    at = group * G * F + r[:, None] * F + f[None, :]
    real_rf = tl.broadcast_to(real_f[None, :], (G, F_PADDED))
    A: tl.constexpr = 4096 // (dx.dtype.element_ty.primitive_bitwidth * B) if WARPS == 4 and F_PADDED >= 64 else 0
    at_f = _by_warp(f, A) if A else f
    real_fb = tl.broadcast_to((at_f < F)[:, None], (F_PADDED, B))
    w_GF = tl.load(weight + at, mask=real_rf, other=0.0).to(x.dtype.element_ty)
    if bias is None:
        b = tl.zeros((G,), tl.float32)
    else:
        b = tl.load(bias + group * G + r)
    real_r = group * G + r < rows
    begin = tl.load(positive_bounds + group).to(tl.int32)
    end = tl.load(positive_bounds + group + 1).to(tl.int32)
    dw = tl.zeros((G, F_PADDED) if ROWS_FIRST else (F_PADDED, G), tl.float32)
    db = tl.zeros((G,) if ROWS_FIRST else (B, G), tl.float32)
    total = 0.0
    if SCRATCH:
        out = (tl.program_id(0) * F + at_f).to(tl.int64) * stride
    else:
        out = tl.load(index + group * F + at_f, mask=at_f < F, other=0).to(tl.int64) * stride + tl.program_id(0) % copies * copy_stride
    read = x + idx.to(tl.int64)[:, None] * stride + tl.arange(0, B)[None, :]
    write = dx + out[:, None] + tl.arange(0, B)[None, :]
    # Three loops. Most groups have no positive in a batch and no padded rows; what few positives others have stay in registers; and a
    # loop that holds another, to look for many, is not pipelined.
    whole = (group + 1) * G <= rows
    if whole & (begin == end):
        for start in tl.range(0, n, B, num_stages=STAGES):
            real_b = start + tl.arange(0, B) < n if RAGGED else None
            dx_FB, dw, db, total = _tile(
                read + start, w_GF, b, None, None, None, None, None, None, real_b, dw, db, total, BCE, ROWS_FIRST, loss is not None
            )  # fmt: skip
            _scatter(write + start, dx_FB, real_fb, A, SCRATCH)
    elif whole & (end - begin <= tiles.POSITIVES):
        p = begin + tl.arange(0, tiles.POSITIVES)
        p_row = tl.load(positive_row + p, mask=p < end, other=-1)
        p_batch = tl.load(positive_batch + p, mask=p < end, other=-1).to(tl.int32)
        hot_GP = ((group * G + r)[:, None] == p_row[None, :]).to(tl.float16)
        first_batch = tl.min(tl.where(p < end, p_batch, 2**31 - 1))
        last_batch = tl.max(p_batch)
        for start in tl.range(0, n, B, num_stages=STAGES):
            batch = start + tl.arange(0, B)
            real_b = batch < n if RAGGED else None
            few = (first_batch < start + B) & (last_batch >= start)
            dx_FB, dw, db, total = _tile(
                read + start, w_GF, b, few, hot_GP, p_batch, batch, None, None, real_b, dw, db, total, BCE, ROWS_FIRST, loss is not None
            )  # fmt: skip
            _scatter(write + start, dx_FB, real_fb, A, SCRATCH)
    else:
        place = tiles.first_places(positive_row, begin, end, group * G + r)
        row_end = tiles.first_places(positive_row, begin, end, group * G + r + 1)
        for start in tl.range(0, n, B, num_stages=1):
            real_b = start + tl.arange(0, B) < n if RAGGED else None
            y_GB, place = tiles.next_targets(positive_batch, place, row_end, start, B)
            dx_FB, dw, db, total = _tile(
                read + start, w_GF, b, None, None, None, None, y_GB, real_r, real_b, dw, db, total, BCE, ROWS_FIRST, loss is not None
            )  # fmt: skip
            _scatter(write + start, dx_FB, real_fb, A, SCRATCH)
    if not ROWS_FIRST:
        dw = tl.trans(dw)
        db = tl.sum(db, 0)
    # The weights are read a second time, from the cache: keeping them in float32 through the loop would cost registers.
    tiles.sgd(
        weight, momentum, at, real_rf, dw, first_row + group * G + r, 0, lr, scale, decay, inertia, step, seed_low, seed_high, NEAREST
    )  # fmt: skip
    if bias is not None:
        tiles.sgd_bias(bias, bias_momentum, group * G + r, r < G, db, lr, scale, inertia)
    if loss is not None:
        tl.store(loss + group, total)


@torch.no_grad()
def tail_step(
    x_ND: Tensor, positives: Positives, tail: TailState, args: StepArgs, want_loss: bool = False, config: TailConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """``haste_kernels.tail_step`` by Triton: same arguments, same result. ``config`` None: what was tuned here, else the table's; where
    slab_tail.py serves, its kernel takes the step."""
    n, width = x_ND.shape
    groups, size, fan_in = tail.weight.shape
    if groups and not 0 <= groups * size - tail.rows < size:
        raise ValueError(f"rows={tail.rows}: only the last of {groups} groups of {size} may hold padding")
    if config is None and slab_tail.serves(x_ND, tail, args):
        return slab_tail.tail_step(x_ND, positives, tail, args, want_loss)
    dtype = operand_dtype(x_ND, tail.weight)
    config = config or tuning.chosen("tail_step", key(tail, n), CANDIDATES) or default_config(size, fan_in, n)
    padded = -(-n // config.batch) * config.batch
    device = x_ND.device
    x_DN = x_ND.to(dtype).T.contiguous() if padded == n else torch.nn.functional.pad(x_ND.to(dtype).T, (0, padded - n))
    loss = torch.empty(groups, dtype=torch.float32, device=device) if want_loss else None
    row, batch = positives.row.contiguous(), positives.batch.contiguous()
    bounds = torch.searchsorted(row, torch.arange(0, (groups + 1) * size, size, device=device))

    limit = {} if config.registers is None else {"maxnreg": config.registers}

    def launch(out: Tensor, first: int, count: int) -> None:
        _tail_step[(count,)](
            x_DN, out, tail.weight, tail.momentum, tail.index, tail.bias, tail.bias_momentum, loss, bounds,
            row, batch, first, n, padded, len(out), out[0].numel(), tail.rows, tail.first_row, args.lr, args.scale,
            args.weight_decay, args.momentum, args.step, args.seed & 0xFFFFFFFF, args.seed >> 32,
            G=size, F=fan_in, F_PADDED=triton.next_power_of_2(fan_in), B=config.batch, BCE=args.loss == "bce", STAGES=config.stages,
            NEAREST=args.rounding == "nearest", ROWS_FIRST=config.rows_first, RAGGED=padded != n, SCRATCH=args.deterministic,
            AHEAD=config.ahead, WARPS=config.warps, num_warps=config.warps, **limit,
        )  # fmt: skip

    dx_ND = torch.empty(n, width, dtype=torch.float32, device=device)
    if args.deterministic:
        parts = torch.zeros(1, width, padded, dtype=torch.float32, device=device)
        sum_in_order(parts[0], tail.index, launch)
        gather(dx_ND, parts, args.scale, add=False)
    else:
        half = args.half_sums and dtype != torch.float32
        parts, most = zeros_for_parts(groups, fan_in, width, padded, half, device)
        for first in range(0, groups, most):
            if first:
                parts.zero_()
            launch(parts, first, min(most, groups - first))
            gather(dx_ND, parts, args.scale, add=first > 0)
        if not groups:
            dx_ND.zero_()
    return dx_ND, None if loss is None else loss.sum(dtype=torch.float64).mul_(args.scale).float()


def takes(x_ND: Tensor, tail: TailState) -> bool:
    """Whether these kernels are made for the state's G, F and types; plain torch takes any."""
    _, size, fan_in = tail.weight.shape
    return takes_types(x_ND, tail.weight) and size in TABLE and 16 <= fan_in <= 256


def key(tail: TailState, n: int) -> str:
    """What the best tile depends on; batch sizes share a choice up to the next power of two."""
    _, size, fan_in = tail.weight.shape
    momentum = "none" if tail.momentum is None else str(tail.momentum.dtype)
    return f"G={size} F={fan_in} N={triton.next_power_of_2(n)} {tail.weight.dtype} momentum={momentum}".replace("torch.", "")
