"""One step of the sparse tail from shared memory, for NVIDIA GPUs from compute capability 9.0 on: groups of 16, a fan-in of 64, bfloat16.

A program keeps some batch rows of x and of dx in shared memory, where triton_tail.py gathers x from the second-level cache and adds dx
there, which at G = 16 takes most of the time (LOG.md, 2026-12-01). The kernel is slab_tail.cu, compiled at a shape's first use, in a second
or two: for a CUDA graph, use the shape once before it is recorded. The same bits each time, with the loss and without, however rows are
sharded: it is what the deterministic mode takes, too.

dz is kept in float16, times 256; dx is summed in float16 runs that end in float32, as triton_tail.py does it, but times 16, so that a
run ends at 4,094. Programs wait for each other, so none starts before all can run.

x is read as float16: a value beyond 65,504 is infinite. A row of x or of dz that is not finite spoils up to 15 rows beside it, since rows
are transposed by products with the unit matrix, whose zeros it makes NaN.

Letters: N batch rows, D features of x, T groups, S slabs, P parts of 32 rows a slab.
"""

import struct
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from haste_kernels.slabs import PART, aligned, compiles, launch, limits, takes_gpu
from haste_kernels.state import Positives, StepArgs, TailState
from haste_kernels.triton_dx import RUN, gather

# As slab_tail.cu has them.
SIZE, FAN_IN, WARPS, UPDATERS, RING = 16, 64, 12, 4, 4
STAGE, EYES = 2464, 1024  # bytes that wait for a warp, and of unit matrices
FILES = ("slab.cuh", "slab_update.cuh", "slab_tail.cu")
UP = 256  # times dz
PARTS, MOST_SLABS = (4, 2), 8
# Below these, triton_tail.py is faster (LOG.md, 2026-12-01): launching takes longer here, and updates take
# the same time for few batch rows as for many.
WORTH, LEAST_ROWS = 1 << 23, 192  # batch rows times groups, and batch rows


class Cut(NamedTuple):
    """How the work is cut: S slabs of P parts hold all batch rows; each range of groups has S programs."""

    parts: int
    slabs: int
    ranges: int

    @property
    def rows(self) -> int:
        """Batch rows with padding."""
        return PART * self.parts * self.slabs

    @property
    def words(self) -> int:
        """Of 8 bytes, of the ring: record_words in slab_tail.cu for each warp."""
        even = -(-self.slabs // 2) * 2
        return self.ranges * WARPS * (RING * 8 * (32 * self.slabs + even) + even)


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
        and min(len(x), len(tail.weight)) > 0
        and x.dtype == tail.weight.dtype == torch.bfloat16
        and tail.index.dtype == torch.int16
        and (tail.momentum is None or tail.momentum.dtype == torch.bfloat16)
        and all(state.is_contiguous() and state.data_ptr() % 16 == 0 for state in states)
        and (args.loss == "bce" and args.half_sums)
        and takes_gpu(x)
        and _cut(x) is not None
    )


def serves(x: Tensor, tail: TailState, args: StepArgs) -> bool:
    """Whether it is this kernel that takes the step: it can, it pays (in the deterministic mode it always does), and it compiles.

    Whether the loss is wanted has no say: other kernels round otherwise, and what a run logs must not change its weights.
    """
    if not takes(x, tail, args) or not (args.deterministic or (len(x) * len(tail.weight) >= WORTH and len(x) > LEAST_ROWS)):
        return False
    return compiles(FILES, (_name(x, tail, args, False), _name(x, tail, args, True)), x)


def tail_step(x_ND: Tensor, positives: Positives, tail: TailState, args: StepArgs, want_loss: bool = False) -> tuple[Tensor, Tensor | None]:
    """As tail_step.tail_step, where ``takes`` holds."""
    n, width = x_ND.shape
    groups = len(tail.weight)
    device = x_ND.device
    given = _cut(x_ND)
    assert given is not None
    x_DN = aligned(x_ND.T if n == given.rows else functional.pad(x_ND.T, (0, given.rows - n)))
    row = positives.row.contiguous()
    pairs = torch.add(row % SIZE, positives.batch, alpha=SIZE).int()
    bounds = torch.searchsorted(row, torch.arange(0, (groups + 1) * SIZE, SIZE, device=device))
    sums = torch.empty(given.ranges, width, given.rows, device=device)
    loss = torch.empty(given.slabs * given.ranges * WARPS, dtype=torch.float64, device=device) if want_loss else None
    ring = torch.zeros(given.words, dtype=torch.int64, device=device)
    none = torch.empty(0, device=device)  # its address is 0
    states = [none if state is None else state for state in (tail.weight, tail.momentum, tail.index, tail.bias, tail.bias_momentum)]
    # A round adds F / D WARPS parts to each feature's sum, where groups read features evenly.
    flush = 1 << max(0, (RUN * width // (FAN_IN * WARPS)).bit_length() - 1)
    arguments: list[Tensor | int] = [
        x_DN, *states, sums, none if loss is None else loss, ring, bounds, pairs, n, groups, groups * SIZE - tail.rows, given.ranges, flush,
        *_words(tail.first_row), args.step, *_words(args.seed),
        *(_bits(value) for value in (args.lr, args.scale / UP, args.weight_decay, args.momentum)),
    ]  # fmt: skip
    name, programs = _name(x_ND, tail, args, want_loss), given.slabs * given.ranges
    launch(FILES, name, x_DN, programs, WARPS + UPDATERS, arguments, _bytes(width, given.parts), at_once=True)
    dx_ND = torch.empty(n, width, dtype=torch.float32, device=device)
    with torch.cuda.device_of(dx_ND):
        gather(dx_ND, sums, args.scale, add=False)
    return dx_ND, None if loss is None else loss.sum().mul_(args.scale).float()


def _name(x: Tensor, tail: TailState, args: StepArgs, want_loss: bool) -> str:
    given = _cut(x)
    assert given is not None
    flags = [str(flag).lower() for flag in (tail.momentum is not None, args.rounding == "nearest", want_loss)]
    return f"slab_tail_step<{x.shape[1]}, {given.slabs}, {given.parts}, {', '.join(flags)}>"


def _cut(x: Tensor) -> Cut | None:
    _, processors, shared = limits(x.device.index or 0)
    return cut(len(x), x.shape[1], processors, shared)


def _bytes(width: int, parts: int) -> int:
    """Of shared memory: x and dx in float16, what waits for the warps, and unit matrices."""
    return 2 * 2 * PART * parts * width + WARPS * STAGE + EYES


def _words(value: int) -> tuple[int, int]:
    return value & 0xFFFFFFFF, value >> 32


def _bits(value: float) -> int:
    """Those of the float32: Python's floats would be passed as float64, which a GPU is slow to convert."""
    return int(struct.unpack("i", struct.pack("f", value))[0])
