"""Which implementation an operation runs: Triton's kernels where a GPU and Triton are there, else plain torch."""

import functools
import importlib.metadata
import os
import warnings

import torch
from torch import Tensor

from haste_kernels.rounding import FLOAT8

OLDEST = (3, 6)  # of Triton
CAPABILITY = (8, 0)  # of the GPU: bfloat16 products
FLOAT8_CAPABILITY = (8, 9)  # conversions of float8
SWITCH = "HASTE_KERNELS"  # set to "torch": plain torch everywhere


def use_triton(x: Tensor) -> bool:
    """Whether work on ``x`` goes to the Triton kernels. Says once, by a warning, why a GPU is left to plain torch."""
    if not x.is_cuda or os.environ.get(SWITCH) == "torch":
        return False
    reason = _missing(x.device.index or 0)
    return reason is None


def takes_types(x: Tensor, weight: Tensor) -> bool:
    """Whether Triton's kernels are made for these types there; in the interpreter, and where they are only compiled, as on a new GPU."""
    old = x.is_cuda and torch.cuda.get_device_capability(x.device) < FLOAT8_CAPABILITY
    return torch.float64 not in (x.dtype, weight.dtype) and not (old and weight.dtype == FLOAT8)


@functools.cache
def _missing(device: int) -> str | None:
    """Why there are no kernels for this GPU; None where there are. Warns on the first call."""
    reason = _triton()
    if reason is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        reason = f"{torch.cuda.get_device_name(device)} is older than the kernels need (compute capability 8.0)"
    if reason is not None:
        warnings.warn(f"plain torch does the kernels' work, several times slower: {reason}", stacklevel=3)
    return reason


def _triton() -> str | None:
    needed = ".".join(map(str, OLDEST))
    try:
        version = importlib.metadata.version("triton")
        import triton  # noqa: F401
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return f"Triton is not installed (pip install 'triton>={needed}')"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is too old (pip install 'triton>={needed}')"
    return None
