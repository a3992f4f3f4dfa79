"""One step of the sparse tail from shared memory, for NVIDIA GPUs from compute capability 9.0 on: groups of 16, a fan-in of 64, bfloat16.

A program keeps some batch rows of x and of dx in shared memory, where triton_tail.py gathers x from the second-level cache and adds dx
there, which at G = 16 takes most of the time (LOG.md, 2026-12-01). The kernel is slab_tail.cu, compiled at a shape's first use, in half a
second: for a CUDA graph, use the shape once before it is recorded. The same bits each time, so it is what the deterministic mode takes,
too; whether it serves does not depend on the labels here, nor on who wants the loss.

x, W and dz are float16 here, dz times 256; dx is summed in float16 runs that end in float32, as triton_tail.py does it, and may reach 4,094
in a run. An x beyond 65,504 is infinite; a batch row of x that is not finite makes up to 15 rows beside it NaN, too. Programs wait for
each other, so none starts before all can run.

Letters: N batch rows, D features of x, T groups, S slabs, P parts of 32 rows a slab.
"""

import functools
import struct

import torch
from torch import Tensor
from torch.nn import functional

from haste_kernels.slabs import PART, Cut, aligned, compiles, launch, limits, takes_gpu
from haste_kernels.state import Positives, StepArgs, TailState
from haste_kernels.triton_dx import RUN, gather

# As slab_tail.cu has them.
SIZE, FAN_IN, WARPS, UPDATERS, RING = 16, 64, 12, 4, 4
STAGE = 2464  # bytes that wait for a warp
UP = 256  # times dz
PARTS, MOST_SLABS = (4, 2), 8
LEAST_ROWS = 192  # batch rows: for fewer, triton_tail.py is faster, for an update takes the same time here (LOG.md, 2026-12-01)
FILES = ("slab.cuh", "slab_update.cuh", "slab_tail.cu")


def ring_words(cut: Cut) -> int:
    """Of 8 bytes: record_words in slab_update.cuh for each warp."""
    even = -(-cut.slabs // 2) * 2
    return cut.ranges * WARPS * (RING * 8 * (32 * cut.slabs + even) + even)


@functools.lru_cache(1024)
def cut(n: int, width: int, processors: int, shared: int) -> Cut | None:
    """The cut for N rows of ``width`` features where a program has ``shared`` bytes; None where they do not fit."""
    fits = [p for p in PARTS if _bytes(width, p) <= shared and -(-n // (PART * p)) <= min(MOST_SLABS, processors)]
    if not fits:
        return None
    parts = next((p for p in fits if p == fits[-1] or PART * p // 2 < n), fits[-1])
    slabs = -(-n // (PART * parts))
    return Cut(parts, slabs, processors // slabs)


def takes(x: Tensor, tail: TailState, args: StepArgs) -> bool:
    """Whether there is a kernel for these types, sizes and arguments, and a GPU for it."""
    states = [tail.weight, tail.index, *(state for state in (tail.momentum, tail.bias, tail.bias_momentum) if state is not None)]
    return (
        tail.weight.shape[1:] == (SIZE, FAN_IN)
        and x.dtype == tail.weight.dtype == torch.bfloat16
        and tail.index.dtype == torch.int16
        and (tail.momentum is None or tail.momentum.dtype == torch.bfloat16)
        and all(state.is_contiguous() and state.data_ptr() % 16 == 0 for state in states)
        and (args.loss == "bce" and args.half_sums and len(x) > 0 and len(tail.weight) > 0)
        and takes_gpu(x)
        and (given := _cut(x)) is not None
        and compiles(x.device.index or 0, FILES, _name(x.shape[1], given, tail, args, False))
    )


def serves(x: Tensor, tail: TailState, args: StepArgs) -> bool:
    """Whether it is this kernel that takes the step: it can, and it pays; in the deterministic mode it always does."""
    return (args.deterministic or len(x) > LEAST_ROWS) and takes(x, tail, args)


def tail_step(x_ND: Tensor, positives: Positives, tail: TailState, args: StepArgs, want_loss: bool = False) -> tuple[Tensor, Tensor | None]:
    """As tail_step.tail_step; ``takes`` must hold. What is stored does not depend on ``want_loss``."""
    n, width = x_ND.shape
    groups = len(tail.weight)
    device = x_ND.device
    given = _cut(x_ND)
    assert given is not None
    x_DN = aligned(x_ND.T if n == given.rows else functional.pad(x_ND.T, (0, given.rows - n)))
    row, batch = positives.row.contiguous(), positives.batch.contiguous()
    bounds = torch.searchsorted(row, torch.arange(0, (groups + 1) * SIZE, SIZE, device=device))
    sums = torch.empty(given.ranges, width, given.rows, device=device)
    ring = torch.zeros(ring_words(given), dtype=torch.int64, device=device)
    none = torch.empty(0, device=device)  # its address is 0
    states = [none if state is None else state for state in (tail.weight, tail.momentum, tail.index, tail.bias, tail.bias_momentum)]
    # A round adds F / D WARPS parts to each feature's sum, where groups read features evenly.
    flush = 1 << max(0, (RUN * width // (FAN_IN * WARPS)).bit_length() - 1)
    loss = torch.empty(given.slabs * given.ranges * WARPS, device=device) if want_loss else none
    arguments: list[Tensor | int] = [
        x_DN, *states, sums, ring, bounds, row, batch, loss, n, groups, groups * SIZE - tail.rows, given.ranges, flush,
        *_words(tail.first_row), args.step, *_words(args.seed),
        *(_bits(value) for value in (args.lr, args.scale / UP, args.weight_decay, args.momentum)),
    ]  # fmt: skip
    name = _name(width, given, tail, args, want_loss)
    launch(FILES, name, x_DN, given.slabs * given.ranges, WARPS + UPDATERS, arguments, _bytes(width, given.parts), at_once=True)
    dx_ND = torch.empty(n, width, dtype=torch.float32, device=device)
    with torch.cuda.device(device):
        gather(dx_ND, sums, args.scale, add=False)
    return dx_ND, loss.sum(dtype=torch.float64).mul_(args.scale).float() if want_loss else None


def _name(width: int, cut: Cut, tail: TailState, args: StepArgs, want_loss: bool) -> str:
    flags = (tail.momentum is not None, args.rounding == "nearest", want_loss)
    return f"slab_tail_step<{width}, {cut.slabs}, {cut.parts}, {', '.join(str(flag).lower() for flag in flags)}>"


def _cut(x: Tensor) -> Cut | None:
    _, processors, shared = limits(x.device.index or 0)
    return cut(len(x), x.shape[1], processors, shared)


def _bytes(width: int, parts: int) -> int:
    """Of shared memory: x and dx in float16, and what waits for the warps."""
    return 2 * 2 * PART * parts * width + WARPS * STAGE


def _words(value: int) -> tuple[int, int]:
    return value & 0xFFFFFFFF, value >> 32


def _bits(value: float) -> int:
    """Those of the float32: Python's floats would be passed as float64, which a GPU is slow to convert."""
    return int(struct.unpack("i", struct.pack("f", value))[0])
