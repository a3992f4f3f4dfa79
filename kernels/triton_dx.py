"""The tail's gradient to the embedding, summed: where groups add their parts of dx, and how those become one.

Groups add into one or several copies of dx in memory, in float32, or in float16 runs that end in float32 (RUN). In the deterministic
mode each group's part goes to scratch memory, and a kernel adds them in a fixed order.

Letters: N batch rows, NP of them with padding, D embedding width, F fan-in.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# dx is a sum of thousands of small parts, and adding them is what bounds the step. Added in float16, they are half the bytes; a
# sum of about RUN parts (where groups read features evenly; a feature that all groups read has D / F times as many) then goes to
# float32. With several copies of dx the runs stay short in one launch.
RUN, COPIES_BYTES = 128, 24 << 20
SCRATCH_BYTES = 256 << 20  # what the deterministic mode may take beside the states


@triton.jit(do_not_specialize=["copies"])
def _collect(
    dx,  # (N, D) any float type, out (ADD: float32, in and out)
    parts,  # (copies, D, NP) float32 or float16, in
    scale: tl.float32,
    n,
    width,
    stride,  # NP
    copies,
    copy_stride: tl.int64,
    ADD: tl.constexpr,
    B: tl.constexpr,
):
    """Sums the copies in float32, scales, and turns (D, N) into (N, D)."""
    batch = tl.program_id(0) * B + tl.arange(0, B)
    d = tl.program_id(1) * B + tl.arange(0, B)
    inside = (d < width)[:, None] & (batch < n)[None, :]
    total = tl.zeros((B, B), tl.float32)
    at = d[:, None].to(tl.int64) * stride + batch[None, :]
    for copy in range(copies):
        total += tl.load(parts + copy * copy_stride + at, mask=inside, other=0.0).to(tl.float32)
    out = dx + batch[:, None].to(tl.int64) * width + d[None, :]
    total = tl.trans(total) * scale
    if ADD:
        total += tl.load(out, mask=tl.trans(inside), other=0.0)
    tl.store(out, total, mask=tl.trans(inside))


@triton.jit
def _add_in_order(
    dx,  # (D, NP) float32, in and out
    parts,  # (slots, NP) float32, in
    order,  # (slots,) int64, in: slots by feature
    bounds,  # (D + 1,) int64, in: where each feature's slots begin in ``order``
    stride,
    B: tl.constexpr,
):
    d = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1) * B + tl.arange(0, B)
    at = d * stride + batch
    inside = batch < stride
    total = tl.load(dx + at, mask=inside)
    for i in range(tl.load(bounds + d), tl.load(bounds + d + 1)):
        total += tl.load(parts + tl.load(order + i) * stride + batch, mask=inside)
    tl.store(dx + at, total, mask=inside)


def zeros_for_parts(groups: int, fan_in: int, width: int, padded: int, half: bool, device: torch.device) -> tuple[Tensor, int]:
    """Zeros to add dx into, (copies, D, NP), and how many groups may be added before they are gathered."""
    if not half:
        return torch.zeros(1, width, padded, dtype=torch.float32, device=device), max(1, groups)
    needed = -(-groups * fan_in // (width * RUN))
    copies = max(1, min(needed, COPIES_BYTES // (2 * width * padded)))
    return torch.zeros(copies, width, padded, dtype=torch.float16, device=device), max(1, RUN * copies * width // fan_in)


def gather(dx_ND: Tensor, parts: Tensor, scale: float, add: bool) -> None:
    n, width = dx_ND.shape
    copies, _, padded = parts.shape
    grid = (triton.cdiv(n, 32), triton.cdiv(width, 32))
    _collect[grid](dx_ND, parts, scale, n, width, padded, copies, width * padded, ADD=add, B=32, num_warps=4)


def sum_in_order(dx_DN: Tensor, index: Tensor, launch: Callable[[Tensor, int, int], None]) -> None:
    """The deterministic mode: chunks of groups write their parts of dx to scratch memory, then each feature adds its own by group."""
    groups, fan_in = index.shape
    width, padded = dx_DN.shape
    most = max(1, SCRATCH_BYTES // (4 * fan_in * padded))
    parts = torch.empty(min(most, groups) * fan_in, padded, dtype=torch.float32, device=dx_DN.device)
    block = min(1024, triton.next_power_of_2(padded))
    features = torch.arange(width + 1, device=dx_DN.device)
    for first in range(0, groups, most):
        count = min(most, groups - first)
        launch(parts, first, count)
        feature, order = index[first : first + count].flatten().int().sort(stable=True)
        bounds = torch.searchsorted(feature, features)
        _add_in_order[(width, triton.cdiv(padded, block))](dx_DN, parts, order, bounds, padded, B=block)
