"""Sparse layers for any model: GroupSharedLinear, whose groups of labels read the same features, and FixedFanInLinear, label by label.

    z_NL[:, group t] = x_ND[:, index_t] W_t^T + b        dx_ND[:, index_t] += dz W_t        dW_t = dz^T x_ND[:, index_t]

Three operations of ``torch.ops.haste``. The form <dz, z> is linear in x, in W and in dz, so each operation's derivatives are the other two:
all can be differentiated, as often as one likes. A label of its own is a group of one (G = 1).

Types: the result and dx have the type of x, dW that of W, the biases' gradient is float32. The GPU's kernels multiply in the type of x, to
which W is rounded as it is read, and sum in float32; a row that is not finite may spoil up to 15 rows beside it (slab_linear.py).
Autocast casts x alone: W needs no copy, and its gradient is not rounded.

Letters: N batch rows, D input features, L labels (output features), T groups, G labels a group, F fan-in; the last group may be padded.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from haste_kernels.backend import use_triton
from haste_kernels.chunks import spans
from haste_kernels.products import bmm, operand_dtype
from haste_kernels.rewire import index_dtype, random_features

AUTOCAST = ("cuda", "cpu")  # devices with the rule below; torch.compile does not see through torch's own question before torch 2.12


@torch.library.custom_op("haste::group_shared_linear", mutates_args=())
def group_shared_linear(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """(N, L) from ``x`` (N, D), ``weight`` (T, G, F), ``index`` (T, F) integers below D, distinct within a group, ``bias`` (L,) or None.

    ``rows`` is L, of which the last group holds what is left: (T - 1) G < L <= T G.
    """
    _check(weight, index, rows, x, bias)
    fast = _fast(x, weight)
    if fast is not None:
        return fast.forward(x, weight, index, bias, rows)
    size = weight.shape[1]
    z_NL = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    dtype = operand_dtype(x, weight)
    x_DN = x.to(dtype).T.contiguous()
    for a, b in _chunks(weight, len(x)):
        z_RN = bmm(weight[a:b].to(dtype), _gathered(x_DN, index[a:b])).flatten(0, 1)[: rows - a * size]
        if bias is not None:
            z_RN += bias[a * size : b * size, None]
        z_NL[:, a * size : b * size] = z_RN.T
    return z_NL


@torch.library.custom_op("haste::group_shared_linear_grad_x", mutates_args=())
def grad_x(dz: Tensor, weight: Tensor, index: Tensor, width: int) -> Tensor:
    """dx (N, D) in the type of ``dz`` (N, L); ``width`` is D. On a GPU its last bits may differ from run to run, unless torch is set to be
    deterministic, which is slower but where slab_linear.py serves."""
    _check(weight, index, dz.shape[1], dz)
    fast = _fast(dz, weight)
    if fast is not None and (not torch.are_deterministic_algorithms_enabled() or fast.repeats(dz, weight, width)):
        return fast.grad_x(dz, weight, index, width)
    dtype = operand_dtype(dz, weight)
    dx_DN = torch.zeros(width, len(dz), dtype=torch.promote_types(dtype, torch.float32), device=dz.device)
    for a, b in _chunks(weight, len(dz)):
        part = bmm(weight[a:b].to(dtype).mT, _grouped(dz, a, b, weight.shape[1]).to(dtype))
        dx_DN.index_add_(0, index[a:b].flatten().long(), part.flatten(0, 1))
    return dx_DN.T.to(dz.dtype).contiguous()


@torch.library.custom_op("haste::group_shared_linear_grad_weight", mutates_args=())
def grad_weight(dz: Tensor, x: Tensor, index: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dW (T, G, F) in ``dtype`` and the sum of ``dz`` (N, L) over the batch, (L,) float32; ``size`` is G. Padded rows get zeros."""
    groups, fan_in = index.shape
    dw_TGF = torch.empty(groups, size, fan_in, dtype=dtype, device=dz.device)
    _check(dw_TGF, index, dz.shape[1], x)
    fast = _fast(x, dw_TGF)
    if fast is not None:
        return fast.grad_weight(dz, x, index, dw_TGF)
    operand = operand_dtype(dz, x)
    x_DN = x.to(operand).T.contiguous()
    for a, b in _chunks(dw_TGF, len(x)):
        dw_TGF[a:b] = bmm(_grouped(dz, a, b, size).to(operand), _gathered(x_DN, index[a:b]).mT)
    return dw_TGF, dz.sum(0, dtype=_sum_dtype(dz))


def _check(weight: Tensor, index: Tensor, rows: int, *others: Tensor | None) -> None:
    groups, size, fan_in = weight.shape
    for tensor in (index, *others):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"tensors lie on {weight.device} and {tensor.device}: all must be on one device")
    if tuple(index.shape) != (groups, fan_in):
        raise ValueError(f"index is {tuple(index.shape)}: one row of features for each of {groups} groups, {fan_in} each")
    if not (groups - 1) * size < rows <= groups * size:
        raise ValueError(f"{rows} labels: {groups} groups of {size} hold at most {groups * size}, and only the last may be padded")


def _fast(x: Tensor, weight: Tensor) -> types.ModuleType | None:
    """The GPU launchers, if they can do it."""
    if not use_triton(x):
        return None
    from haste_kernels import triton_linear

    return triton_linear if triton_linear.supported(x, weight) else None


def _sum_dtype(dz: Tensor) -> torch.dtype:
    return torch.promote_types(dz.dtype, torch.float32)


def _chunks(weight: Tensor, n: int) -> list[tuple[int, int]]:
    groups, size, fan_in = weight.shape
    return spans(groups, 4 * n * (fan_in + 3 * size), weight.device)


def _gathered(x_DN: Tensor, index: Tensor) -> Tensor:
    """(T, F, N) of the features of some groups."""
    return x_DN.index_select(0, index.flatten().long()).view(*index.shape, -1)


def _grouped(dz_NL: Tensor, a: int, b: int, size: int) -> Tensor:
    """(b - a, G, N) of the labels of groups ``a`` to ``b``; zero where padded."""
    part = dz_NL[:, a * size : b * size].T
    return functional.pad(part, (0, 0, 0, (b - a) * size - len(part))).reshape(b - a, size, -1)


# ---- Shapes, for torch.compile and the meta device


@group_shared_linear.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@grad_x.register_fake
def _(dz: Tensor, weight: Tensor, index: Tensor, width: int) -> Tensor:
    return dz.new_empty(dz.shape[0], width)


@grad_weight.register_fake
def _(dz: Tensor, x: Tensor, index: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(index.shape[0], size, index.shape[1], dtype=dtype), dz.new_empty(dz.shape[1], dtype=_sum_dtype(dz))


# ---- Derivatives


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, index, bias, _ = inputs
    ctx.save_for_backward(x, weight, index)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, index = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = grad_x(dz, weight, index, x.shape[1])
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        dw, db = grad_weight(dz, x, index, weight.shape[1], weight.dtype)
        db = None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
    return dx, dw, None, db, None


def _save_grad_x(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _grad_x_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dz, weight, index = ctx.saved_tensors
    ddz = group_shared_linear(ddx, weight, index, None, dz.shape[1]) if ctx.needs_input_grad[0] else None
    dw = grad_weight(dz, ddx, index, weight.shape[1], weight.dtype)[0] if ctx.needs_input_grad[1] else None
    return ddz, dw, None, None


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])


def _grad_weight_backward(ctx: Any, ddw: Tensor, ddb: Tensor) -> tuple[Tensor | None, ...]:
    dz, x, index = ctx.saved_tensors
    ddz = group_shared_linear(x, ddw, index, ddb, dz.shape[1]).to(dz.dtype) if ctx.needs_input_grad[0] else None
    dx = grad_x(dz, ddw, index, x.shape[1]).to(x.dtype) if ctx.needs_input_grad[1] else None
    return ddz, dx, None, None, None


group_shared_linear.register_autograd(_linear_backward, setup_context=_save_linear)
grad_x.register_autograd(_grad_x_backward, setup_context=_save_grad_x)
grad_weight.register_autograd(_grad_weight_backward, setup_context=_save_grad_weight)


# ---- Autocast. torch.library.register_autocast knows one fixed type, but a user chooses between two, so the rule is written out.

_library = torch.library.Library("haste", "FRAGMENT")


def _autocast_on(device: str, key: str) -> None:
    def rule(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return group_shared_linear(x, weight, index, bias, rows)

    _library.impl("group_shared_linear", rule, key)


for _device in AUTOCAST:
    _autocast_on(_device, f"Autocast{_device.upper()}")


# ---- Modules


class GroupSharedLinear(nn.Module):
    """A linear layer (..., D) -> (..., L) in which each group of G outputs reads the same F random inputs, with weights of their own.

    Parameters ``weight`` (T, G, F) and ``bias`` (L,); buffer ``index`` (T, F), ascending in a row, drawn from ``seed``. Where
    ``out_features`` is no multiple of ``group_size``, the last rows of ``weight`` are padding: zero, their gradient too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int = 64,
        group_size: int = 16,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < fan_in <= in_features or out_features < 1 or group_size < 1:
            raise ValueError(
                f"in_features={in_features} out_features={out_features} fan_in={fan_in} group_size={group_size}: "
                "all positive, and the fan-in at most in_features"
            )
        self.in_features, self.out_features, self.fan_in, self.group_size, self.seed = in_features, out_features, fan_in, group_size, seed
        groups = -(-out_features // group_size)
        self.weight = nn.Parameter(torch.empty(self._weight_shape(groups), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.index: Tensor
        self.register_buffer("index", torch.empty(groups, fan_in, device=device, dtype=index_dtype(in_features)))
        self.reset_parameters()

    def _weight_shape(self, groups: int) -> tuple[int, ...]:
        return (groups, self.group_size, self.fan_in)

    def reset_parameters(self) -> None:
        """Draws features by ``seed``, and weights and biases from torch's generator, uniformly in +-1/sqrt(F), as nn.Linear would."""
        if self.weight.is_meta:
            return
        self.index.copy_(random_features(0, len(self.index), self.in_features, self.fan_in, self.seed, self.index.device))
        bound = self.fan_in**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        with torch.no_grad():
            self.weight.view(-1, self.fan_in)[self.out_features :] = 0
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} features; in_features={self.in_features}")
        device = x.device.type
        if device in AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # The operation's own rule would do it too, but unseen by torch.compile, whose cache mixes up graphs of two such types.
            x = x.to(torch.get_autocast_dtype(device))
        weight = self.weight.view(-1, self.group_size, self.fan_in)
        z = group_shared_linear(x.reshape(-1, self.in_features), weight, self.index, self.bias, self.out_features)
        return z.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, fan_in={self.fan_in}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


class FixedFanInLinear(GroupSharedLinear):
    """The same with F inputs for each output alone: ``weight`` and ``index`` are (L, F). What group sharing is measured against."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int = 64,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, fan_in, 1, bias, device, dtype, seed)

    def _weight_shape(self, groups: int) -> tuple[int, ...]:
        return (groups, self.fan_in)
