"""What launches of kernels on slabs in shared memory have in common: the GPU's limits, compiled kernels (slab.cuh: what a slab is)."""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste_kernels import nvrtc

PART = 32  # batch rows
CAPABILITY = (9, 0)
_refused: set[tuple[str, ...]] = set()  # files with a kernel that did not compile


def takes_gpu(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU of NVIDIA's for which such kernels can be compiled."""
    if not x.is_cuda or torch.version.hip is not None:
        return False
    index = x.device.index or 0
    return limits(index)[0] >= CAPABILITY and nvrtc.available(index)


@functools.cache
def limits(index: int) -> tuple[tuple[int, int], int, int]:
    """Capability, multiprocessors, and bytes of shared memory for a slab."""
    of = torch.cuda.get_device_properties(index)
    return (of.major, of.minor), of.multi_processor_count, nvrtc.shared_memory(index)


def compiles(files: tuple[str, ...], names: tuple[str, ...], tensor: Tensor) -> bool:
    """Whether the GPU of ``tensor`` has these kernels of ``files``. Where one cannot be made, says so once, and no other is tried again."""
    if files in _refused:
        return False
    try:
        for name in names:
            _kernel(tensor.device.index or 0, files, name)
    except Exception as error:  # see nvrtc.load
        _refused.add(files)
        warnings.warn(f"other kernels serve in place of {files[-1]}, which cannot be compiled here: {error}", stacklevel=3)
        return False
    return True


def launch(
    files: tuple[str, ...],
    name: str,
    tensor: Tensor,
    programs: int,
    warps: int,
    arguments: list[Tensor | int],
    shared: int,
    at_once: bool = False,
) -> None:
    """The kernel ``name`` of ``files`` on the GPU of ``tensor``, compiled at its first use there; the rest as nvrtc.launch takes it."""
    index = tensor.device.index or 0
    kernel = _kernel(index, files, name)
    with torch.cuda.device(index):
        torch.cuda.set_device(index)  # binds the GPU's context to a thread that has not used it yet, such as autograd's
        nvrtc.launch(kernel, programs, 32 * warps, arguments, shared, at_once)


@functools.cache
def _kernel(index: int, files: tuple[str, ...], name: str) -> Any:
    folder = Path(__file__).parent
    return nvrtc.load("".join((folder / file).read_text() for file in files), name, index)


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` without gaps, at an address of a multiple of 16."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
