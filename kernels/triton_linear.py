"""The group-shared linear layer's three operations by Triton: launchers, table of tiles, and kernels for any type and size.

    z_NL[:, group] = x_DN[index]^T W^T + b       dx_DN[index] += W^T dz^T       dW = dz^T x_DN[index]^T

x is transposed once, so that a gathered feature is one run of batch values; dx is summed so too, in float32, by the cache's atomic
additions. In half precision the forward pass and dW have faster kernels in gluon_linear.py; on newer GPUs large forward passes and
gradients to x go to slab_linear.py. Labels of their own (G = 1) have others in triton_fan_in.py.

Letters: N batch rows, B of them a tile, D input features, T groups, G labels a group, S groups a program, F fan-in, L labels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_kernels import slab_linear, triton_fan_in, tuning

try:
    from haste_kernels import gluon_linear
except (ImportError, AttributeError):  # Gluon is an experimental part of Triton: without it the kernels below do
    gluon_linear = None  # type: ignore[assignment]

INTERPRETED = triton.knobs.runtime.interpret
HALF = (torch.bfloat16, torch.float16)
REGISTERS = 65536  # of a multiprocessor
Op = Literal["forward", "grad_x", "grad_weight"]


@dataclass(frozen=True)
class LinearConfig:
    """How a program works: batch tile, labels a unit (a warp's share of a group), units a program, warps, most registers a thread."""

    batch: int
    labels: int = 16
    units: int = 4
    warps: int = 4
    registers: int | None = None
    gluon: bool = True

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time. The forward kernel starts no more: each works until nothing is left."""
        return max(1, REGISTERS // (32 * self.warps * (self.registers or 255)))


PLAIN = LinearConfig(64, warps=8, gluon=False)
PLAIN_FLOAT = LinearConfig(32, warps=8, gluon=False)
CONFIGS: dict[Op, tuple[LinearConfig, ...]] = {
    "forward": (
        *(
            LinearConfig(64, labels, warps, warps, registers)
            for labels in (16, 32)
            for warps in (1, 4, 8, 16)
            for registers in (128, 168, 255)
            if warps * registers <= 2048
        ),
        PLAIN,
    ),
    "grad_x": (PLAIN, *(LinearConfig(batch, warps=warps, gluon=False) for batch, warps in ((32, 4), (64, 4), (128, 8)))),
    "grad_weight": (
        *(
            LinearConfig(batch, labels, units, warps)
            for batch in (32, 64)
            for labels in (16, 32, 64)
            for units, warps in ((4, 4), (8, 4), (8, 8), (16, 16))
            if batch * labels * units <= 2048 * warps
        ),
        PLAIN,
    ),
}


def key(size: int, fan_in: int, x: Tensor) -> str:
    """What the best choice depends on; batch sizes share one up to the next power of two. ``x`` is (N, D) or dz (N, L)."""
    return f"G={size} F={fan_in} N={triton.next_power_of_2(len(x))} {x.dtype}".replace("torch.", "")


def choice(op: Op, size: int, fan_in: int, x: Tensor) -> LinearConfig:
    """The tuned choice, or the table's."""
    if size == 1:
        return PLAIN
    return tuning.chosen(f"linear_{op}", key(size, fan_in, x), CONFIGS[op]) or default_config(op, size, fan_in, x)


def default_config(op: Op, size: int, fan_in: int, x: Tensor) -> LinearConfig:
    """A sound choice where nothing was measured. A warp's share of a product must fit its registers."""
    if op == "grad_x" or (op == "grad_weight" and fan_in > 128) or not _tensor_cores(x):
        return PLAIN if x.dtype in HALF else PLAIN_FLOAT
    if op == "grad_weight":
        return LinearConfig(32, 16 if fan_in > 64 else max(16, min(64, triton.next_power_of_2(size))))
    if size <= 16 or fan_in > 64:
        return LinearConfig(64, registers=168)
    return LinearConfig(64, 32, registers=255) if size <= 32 else LinearConfig(64, 32, 8, 8, 168)


def _tensor_cores(x: Tensor) -> bool:
    """Whether the kernels of gluon_linear.py can run: they need half precision, but in the interpreter."""
    if gluon_linear is None:
        return False
    return INTERPRETED or (x.dtype in HALF and torch.version.hip is None and torch.cuda.get_device_capability(_gpu(x.device)) >= (8, 0))


def supported(x: Tensor, weight: Tensor) -> bool:
    """Whether there are kernels for these types and sizes; ``weight`` is (T, G, F). Large float32 groups are left to the GPU's library."""
    groups, size, fan_in = weight.shape
    if not groups or not len(x) or not 0 < fan_in <= 256 or weight.dtype not in (*HALF, torch.float32):
        return False
    if x.dtype == torch.float32:
        return size == 1 or (fan_in <= 128 and _power(size) * _power(fan_in) <= 4096)
    return x.dtype in HALF and size <= 128


def repeats(dz: Tensor, weight: Tensor, width: int) -> bool:
    """Whether ``grad_x`` gives the same bits each time."""
    return slab_linear.serves("grad_x", dz, weight, width)


# ---- Kernels for any type


@triton.jit(do_not_specialize=["n", "groups", "tiles"])
def _forward(
    x,  # (D, NP) any float type, in: x transposed, NP a multiple of B
    weight,  # (T, G, F) any float type, in
    index,  # (T, F) int16 or int32, in
    bias,  # (L,) any float type or None, in
    out,  # (N, L) the type of x, out
    n,
    stride,  # NP
    rows,  # L
    groups,  # T
    tiles,  # NP / B
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    F: tl.constexpr,
    F_PADDED: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
):
    batch = tl.program_id(0) % tiles * B + tl.arange(0, B)
    first = tl.program_id(0) // tiles * S
    group = tl.minimum(first + tl.arange(0, S), groups - 1).to(tl.int64)[:, None, None]
    g = tl.arange(0, G_PADDED)[None, :, None]
    f = tl.arange(0, F_PADDED)
    idx_SF1 = tl.load(index + group * F + f[None, :, None], mask=f[None, :, None] < F, other=0).to(tl.int32)
    x_SFB = tl.load(x + idx_SF1 * stride + batch[None, None, :], mask=f[None, :, None] < F, other=0.0)
    at = (group * G + g) * F + f[None, None, :]
    w_SGF = tl.load(weight + at, mask=(g < G) & (f[None, None, :] < F), other=0.0).to(x.dtype.element_ty)
    if S > 1:
        z_SGB = tl.dot(w_SGF, x_SFB, input_precision="ieee")
    else:  # a product of its own, that all warps share
        z_GB = tl.dot(tl.reshape(w_SGF, (G_PADDED, F_PADDED)), tl.reshape(x_SFB, (F_PADDED, B)), input_precision="ieee")
        z_SGB = tl.reshape(z_GB, (1, G_PADDED, B))
    z = tl.reshape(tl.permute(z_SGB, (2, 0, 1)), (B, S * G_PADDED))
    r = tl.arange(0, S * G_PADDED)
    row = (first + r // G_PADDED).to(tl.int64) * G + r % G_PADDED
    real = (r % G_PADDED < G) & (row < rows)
    if bias is not None:
        z += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(out + batch.to(tl.int64)[:, None] * rows + row[None, :], z.to(out.dtype.element_ty), mask=real[None, :] & (batch < n)[:, None])


@triton.jit(do_not_specialize=["n"])
def _grad_x(
    dz,  # (N, L) any float type, in
    weight,  # (T, G, F) any float type, in
    index,  # (T, F) int16 or int32, in
    dx,  # (D, NP) float32, added to: the gradient, transposed
    n,
    stride,  # NP
    rows,  # L
    stride_dz,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    F: tl.constexpr,
    F_PADDED: tl.constexpr,
    B: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, G_PADDED)
    f = tl.arange(0, F_PADDED)
    b = tl.arange(0, B)
    real = (g < G) & (group * G + g < rows)
    idx = tl.load(index + group * F + f, mask=f < F, other=0).to(tl.int32)
    w_GF = tl.load(weight + (group * G + g[:, None]) * F + f[None, :], mask=real[:, None] & (f < F)[None, :], other=0.0)
    w_FG = tl.trans(w_GF.to(dz.dtype.element_ty))
    to = dx + idx[:, None] * stride + b[None, :]
    for start in range(0, n, B):
        batch = start + b
        at = batch.to(tl.int64)[:, None] * stride_dz + group * G + g[None, :]
        dz_BG = tl.load(dz + at, mask=(batch < n)[:, None] & real[None, :], other=0.0)
        tl.atomic_add(to + start, tl.dot(w_FG, tl.trans(dz_BG), input_precision="ieee"), mask=(f < F)[:, None], sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def _grad_weight(
    dz,  # (N, L) any float type, in
    x,  # (D, NP) the type of dz, in: x transposed, NP a multiple of B
    index,  # (T, F) int16 or int32, in
    dw,  # (T, G, F) any float type, out
    db,  # (L,) float32, out
    n,
    stride,  # NP
    rows,  # L
    stride_dz,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    F: tl.constexpr,
    F_PADDED: tl.constexpr,
    B: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, G_PADDED)
    f = tl.arange(0, F_PADDED)
    b = tl.arange(0, B)
    row = group * G + g
    real = (g < G) & (row < rows)
    idx = tl.load(index + group * F + f, mask=f < F, other=0).to(tl.int32)
    dw_FG = tl.zeros((F_PADDED, G_PADDED), tl.float32)
    db_G = tl.zeros((G_PADDED,), tl.float32)
    for start in range(0, n, B):
        batch = start + b
        x_FB = tl.load(x + idx[:, None] * stride + batch[None, :])
        at = batch.to(tl.int64)[:, None] * stride_dz + row[None, :]
        dz_BG = tl.load(dz + at, mask=(batch < n)[:, None] & real[None, :], other=0.0)
        dw_FG = tl.dot(x_FB, dz_BG, dw_FG, input_precision="ieee")
        db_G += tl.sum(dz_BG.to(tl.float32), 0)
    inside = (g < G)[:, None] & (f < F)[None, :]
    tl.store(dw + row[:, None] * F + f[None, :], tl.trans(dw_FG).to(dw.dtype.element_ty), mask=inside)
    tl.store(db + row, db_G, mask=real)


# ---- Launchers: what a custom operation calls


def forward(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, rows: int, config: LinearConfig | None = None) -> Tensor:
    """(N, L) in the type of ``x``; arguments as in linear.group_shared_linear. ``config``: by Triton, in these tiles."""
    groups, size, fan_in = weight.shape
    if config is None and slab_linear.serves("forward", x, weight, x.shape[1]):
        return slab_linear.forward(x, weight, index, bias, rows)
    config = config or choice("forward", size, fan_in, x)
    n = len(x)
    weight, index = weight.contiguous(), index.contiguous()
    bias = None if bias is None else bias.contiguous()  # a gradient may be one number, expanded
    out = torch.empty(n, rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        x_DN = transposed(x, config.batch)
        padded = x_DN.shape[1]
        tiles = padded // config.batch
        if size == 1:
            triton_fan_in.forward(x_DN, weight, index, bias, out)
        elif config.gluon:
            units = groups * triton.cdiv(size, config.labels)
            processors = _processors(x.device)
            gluon_linear.forward[(processors * config.resident,)](
                x_DN, weight, index, bias, out, n, padded, rows, units, tiles, processors, max(1, processors // tiles),
                G=size, F=fan_in, F_PADDED=_power(fan_in, 32), R=config.labels, S=config.units, B=config.batch, WARPS=config.warps,
                num_warps=config.warps, maxnreg=config.registers,
            )  # fmt: skip
        else:
            together = max(1, 4096 // (_power(size) * _power(fan_in)))
            _forward[(triton.cdiv(groups, together) * tiles,)](
                x_DN, weight, index, bias, out, n, padded, rows, groups, tiles,
                G=size, G_PADDED=_power(size), F=fan_in, F_PADDED=_power(fan_in), S=together, B=config.batch, num_warps=config.warps,
            )  # fmt: skip
    return out


def grad_x(dz: Tensor, weight: Tensor, index: Tensor, width: int, config: LinearConfig | None = None) -> Tensor:
    """dx (N, ``width``) in the type of ``dz`` (N, L)."""
    groups, size, fan_in = weight.shape
    if config is None and slab_linear.serves("grad_x", dz, weight, width):
        return slab_linear.grad_x(dz, weight, index, width)
    config = config or choice("grad_x", size, fan_in, dz)
    n, rows = dz.shape
    dz, weight, index = _rows_whole(dz), weight.contiguous(), index.contiguous()
    with torch.cuda.device_of(dz):
        padded = triton.cdiv(n, config.batch) * config.batch
        dx_DN = torch.zeros(width, padded, dtype=torch.float32, device=dz.device)
        if size == 1:
            triton_fan_in.grad_x(dz, weight, index, dx_DN)
        else:
            _grad_x[(groups,)](
                dz, weight, index, dx_DN, n, padded, rows, dz.stride(0),
                G=size, G_PADDED=_power(size), F=fan_in, F_PADDED=_power(fan_in), B=config.batch, num_warps=config.warps,
            )  # fmt: skip
        return dx_DN[:, :n].T.to(dz.dtype).contiguous()


def grad_weight(dz: Tensor, x: Tensor, index: Tensor, dw: Tensor, config: LinearConfig | None = None) -> tuple[Tensor, Tensor]:
    """Fills ``dw`` (T, G, F) and returns it with the biases' gradient (L,) float32. ``dz`` (N, L) is cast to the type of ``x``."""
    groups, size, fan_in = dw.shape
    config = config or choice("grad_weight", size, fan_in, x)
    n, rows = dz.shape
    dz, index = _rows_whole(dz.to(x.dtype)), index.contiguous()
    db = torch.empty(rows, dtype=torch.float32, device=dz.device)
    with torch.cuda.device_of(dz):
        x_DN = transposed(x, config.batch)
        padded = x_DN.shape[1]
        if size == 1:
            triton_fan_in.grad_weight(dz, x_DN, index, dw, db)
        elif config.gluon:
            units = groups * triton.cdiv(size, config.labels)
            gluon_linear.grad_weight[(triton.cdiv(units, config.units),)](
                dz, x_DN, index, dw, db, n, padded, rows, units, dz.stride(0),
                G=size, F=fan_in, F_PADDED=_power(fan_in, 32), R=config.labels, S=config.units, B=config.batch, WARPS=config.warps,
                num_warps=config.warps, maxnreg=config.registers,
            )  # fmt: skip
        else:
            _grad_weight[(groups,)](
                dz, x_DN, index, dw, db, n, padded, rows, dz.stride(0),
                G=size, G_PADDED=_power(size), F=fan_in, F_PADDED=_power(fan_in), B=config.batch, num_warps=config.warps,
            )  # fmt: skip
    return dw, db


def transposed(x: Tensor, batch: int) -> Tensor:
    """(D, NP) of ``x`` (N, D): NP is N rounded up to whole tiles, zero beyond N."""
    n, width = x.shape
    if n % batch == 0:
        return x.T.contiguous()
    x_DN = torch.zeros(width, triton.cdiv(n, batch) * batch, dtype=x.dtype, device=x.device)
    x_DN[:, :n] = x.T
    return x_DN


def _gpu(device: torch.device) -> torch.device | None:
    """``device``; for tensors without memory, for which kernels are only compiled, the current GPU."""
    return None if device.type == "meta" else device


def _processors(device: torch.device) -> int:
    return 3 if INTERPRETED else torch.cuda.get_device_properties(_gpu(device)).multi_processor_count


def _rows_whole(dz: Tensor) -> Tensor:
    """``dz`` with neighbouring labels side by side, copied only if they are not."""
    return dz if dz.stride(1) == 1 else dz.contiguous()


def _power(count: int, least: int = 16) -> int:
    """The power of two that holds ``count``, and at least what a tensor core takes."""
    return max(least, triton.next_power_of_2(count))
