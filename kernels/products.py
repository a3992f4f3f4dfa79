"""Matrix products whose result is float32, whatever the operands: bfloat16 on a GPU's tensor cores, float32 on a CPU."""

import torch
from torch import Tensor

from haste_kernels.rounding import FLOAT8

_HALF = (torch.bfloat16, torch.float16)


def operand_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What both operands are cast to: their own half type if they share one and lie on a GPU, else float32 (or float64) for both.

    Float8 weights are only stored so: they become what x is.

    Tensors without memory, for which kernels are only compiled, stand for a GPU's.
    """
    held = x.dtype if weight.dtype == FLOAT8 else weight.dtype
    if (x.is_cuda or x.is_meta) and x.dtype == held and x.dtype in _HALF:
        return x.dtype
    return torch.promote_types(torch.promote_types(x.dtype, held), torch.float32)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """(I, J) @ (J, K) -> (I, K), accumulated and returned in float32 (float64 from float64)."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype in _HALF else torch.mm(a, b)


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """(T, I, J) @ (T, J, K) -> (T, I, K), accumulated and returned in float32 (float64 from float64), into ``out`` if given."""
    return torch.bmm(a, b, out_dtype=torch.float32, out=out) if a.dtype in _HALF else torch.bmm(a, b, out=out)
