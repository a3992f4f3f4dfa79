"""The group-shared layer's forward pass and gradient to x from shared memory, for NVIDIA GPUs from compute capability 9.0 on.

A multiprocessor keeps all D features of some batch rows in its shared memory, and gathers and adds there. Triton cannot address shared
memory by data, so the kernels are CUDA C++ (slab_linear.cu), compiled at a shape's first use, in half a second: for a CUDA graph, use the
shape once before it is recorded. dx is summed in float32, always in the same order: the same bits each time. A row that is not finite
spoils up to 15 rows beside it.

Letters: N batch rows, D features of x, T groups, G labels a group, F fan-in, L labels, P parts of 32 rows a slab.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from haste_kernels.slabs import PART, Cut, aligned, launch, limits, takes_gpu
from haste_kernels.triton_dx import gather

Op = Literal["forward", "grad_x"]
BYTES: dict[Op, int] = {"forward": 2, "grad_x": 4}  # of a value in the slab
FILES = ("slab.cuh", "slab_linear.cu")
PARTS: dict[Op, tuple[int, ...]] = {"forward": (4, 2, 1), "grad_x": (2, 1)}  # the more, the less is read again
FAN_INS, LARGEST_GROUP = (16, 32, 64, 128), 128
# Below these, filling and emptying slabs took as long as the other kernels took in all. Larger groups have few additions to dx.
WORTH: dict[Op, int] = {"forward": 1 << 26, "grad_x": 1 << 20}  # logits, and batch rows times groups
LARGEST_ADDED = 64  # labels a group


def parts(op: Op, n: int, width: int, shared: int) -> int:
    """P: the most parts of which a slab fits ``shared`` bytes and has rows; 0 if not even one fits."""
    return next((p for p in PARTS[op] if width * PART * p * BYTES[op] <= shared and (p == 1 or PART * (p // 2) < n)), 0)


def takes(op: Op, x: Tensor, weight: Tensor, width: int) -> bool:
    """Whether there is a kernel for these types and sizes, and a GPU for it. ``x`` is x, or dz; ``weight`` is (T, G, F)."""
    _, size, fan_in = weight.shape
    if x.dtype not in (torch.bfloat16, torch.float16) or size % 16 or size > LARGEST_GROUP:
        return False
    if fan_in not in FAN_INS or weight.dtype not in (x.dtype, torch.float32):
        return False
    return takes_gpu(x) and parts(op, len(x), width, limits(x.device.index or 0)[2]) > 0


def serves(op: Op, x: Tensor, weight: Tensor, width: int) -> bool:
    """Whether it is these kernels that do it: they take it, and it pays."""
    groups, size, _ = weight.shape
    work = len(x) * groups * (size if op == "forward" else 1)
    return work >= WORTH[op] and (op == "forward" or size <= LARGEST_ADDED) and takes(op, x, weight, width)


def forward(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """(N, L) in the type of ``x``; arguments as in linear.group_shared_linear."""
    n, width = x.shape
    cut = _cut("forward", x.device, n, width)
    x_DN = aligned(x.T if n == cut.rows else functional.pad(x.T, (0, cut.rows - n)))
    out = torch.empty(n, rows, dtype=x.dtype, device=x.device)
    bias = torch.empty(0, device=x.device) if bias is None else aligned(bias.float())  # an empty tensor's address is 0
    _launch("forward", cut, [x_DN, weight, index, bias, out], n, width, rows, even=rows % 4 == 0)
    return out


def grad_x(dz: Tensor, weight: Tensor, index: Tensor, width: int) -> Tensor:
    """dx (N, ``width``) in the type of ``dz`` (N, L)."""
    n, rows = dz.shape
    cut = _cut("grad_x", dz.device, n, width)
    dz = dz.contiguous()
    sums = torch.empty(cut.ranges, width, cut.rows, dtype=torch.float32, device=dz.device)
    _launch("grad_x", cut, [dz, weight, index, sums], n, width, rows, even=rows % 4 == 0 and dz.data_ptr() % 8 == 0)
    dx = torch.empty(n, width, dtype=dz.dtype, device=dz.device)
    with torch.cuda.device_of(dz):
        gather(dx, sums, 1.0, add=False)
    return dx


def _cut(op: Op, device: torch.device, n: int, width: int) -> Cut:
    _, processors, shared = limits(device.index or 0)
    count = parts(op, n, width, shared)
    slabs = -(-n // (PART * count))
    return Cut(count, slabs, max(1, processors // slabs))


def _launch(op: Op, cut: Cut, tensors: list[Tensor], n: int, width: int, rows: int, even: bool) -> None:
    """``tensors`` as the kernel takes them; ``even``: rows of logits are aligned, see store_four in slab_linear.cu."""
    x, weight, index, *rest = tensors
    groups, size, fan_in = weight.shape
    weight, index = aligned(weight), aligned(index if index.dtype == torch.int16 else index.to(torch.int16))
    warps = 8 if op == "forward" and size % 32 == 0 else 12  # as many as have the registers that they need
    values = "float" if weight.dtype == torch.float32 else "unsigned short"
    flags = [str(flag).lower() for flag in (x.dtype == torch.bfloat16, even)]
    if op == "forward":
        flags.append(str(rows % 8 == 0 and size % 32 == 0).lower())
    name = f"slab_{op}<{flags[0]}, {values}, {width}, {fan_in}, {size}, {cut.parts}, {warps}, {', '.join(flags[1:])}>"
    arguments: list[Tensor | int] = [x, weight, index, *rest, n, groups, groups * size - rows, cut.slabs, cut.ranges]
    launch(FILES, name, x, cut.slabs * cut.ranges, warps, arguments, width * PART * cut.parts * BYTES[op])
