"""What launches of kernels on slabs in shared memory have in common: the GPU's limits, compiled kernels (slab.cuh: what a slab is)."""

import functools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haste_kernels import nvrtc

log = logging.getLogger(__name__)
PART = 32  # batch rows
CAPABILITY = (9, 0)


class Cut(NamedTuple):
    """How the work is cut: P parts a slab; S slabs hold all batch rows; each range of groups has S programs, one a multiprocessor."""

    parts: int
    slabs: int
    ranges: int

    @property
    def rows(self) -> int:
        """Batch rows with padding."""
        return PART * self.parts * self.slabs


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


@functools.cache
def compiles(index: int, files: tuple[str, ...], name: str) -> bool:
    """Whether the kernel ``name`` of ``files`` can be had on that GPU. Says once a kernel why not: another serves then."""
    try:
        _kernel(index, files, name)
    except Exception as error:  # another compiler or driver, in whatever words
        log.warning("%s: no kernel for this GPU, Triton's serves: %s", files[-1], str(error).strip().splitlines()[-1][:300])
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
