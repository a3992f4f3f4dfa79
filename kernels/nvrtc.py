"""CUDA C++ to a loaded kernel, by NVIDIA's runtime compiler (NVRTC), which comes with torch.

torch loads modules and launches kernels itself (torch.cuda._utils), but its own call of the compiler wants a CUDA toolkit on the machine,
for headers that nothing here includes. Those functions of torch are private: ``available`` tells whether all of it works.
"""

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPTIONS = ("--std=c++17",)


def load(source: str, name: str, device: int) -> Any:
    """The kernel ``name``, a template's with its arguments, compiled for the GPU and loaded there; it may have all its shared memory.

    Raises RuntimeError with the compiler's log, or whatever a missing library or another version of torch raises.
    """
    of = torch.cuda.get_device_properties(device)
    # a: with what this architecture alone has (slab_tail.cu moves registers between warps).
    binary, symbol = compiled(library(), source, name, f"sm_{of.major}{of.minor}a")
    with torch.cuda.device(device):
        torch.cuda.set_device(device)  # binds the GPU's context to a thread that has not used it yet
        kernel = torch.cuda._utils._cuda_load_module(binary, [symbol])[symbol]  # type: ignore[index]
        kernel.set_shared_memory_config(shared_memory(device))
    return kernel


def launch(kernel: Any, programs: int, threads: int, arguments: list[Tensor | int], shared: int, at_once: bool = False) -> None:
    """What `load` loaded, on the current stream of the current GPU; ``shared`` bytes of memory. Raises RuntimeError.

    ``at_once``: programs wait for each other, so none starts before all can run; more than fit the GPU are refused.
    """
    values = [ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_int(one) for one in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values))
    driver = torch.cuda._utils._get_gpu_runtime_library()  # type: ignore[attr-defined]
    where = (kernel.func, programs, 1, 1, threads, 1, 1, shared, torch.cuda.current_stream()._as_parameter_, pointers)
    status = driver.cuLaunchCooperativeKernel(*where) if at_once else driver.cuLaunchKernel(*where, None)
    torch.cuda._utils._check_cuda(status)  # type: ignore[attr-defined]


@functools.cache
def available(device: int) -> bool:
    """Whether kernels can be compiled and loaded there. Says once why not."""
    try:
        load("__global__ void nothing() {}", "nothing", device)
    except Exception as error:  # see load
        warnings.warn(f"slower kernels serve the group-shared layer, for CUDA C++ cannot be compiled here: {error}", stacklevel=3)
        return False
    return True


def shared_memory(device: int) -> int:
    """Bytes of shared memory that a program may ask for, less a kibibyte for what kernels declare themselves."""
    most: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return most - 1024


def compiled(nvrtc: ctypes.CDLL, source: str, name: str, architecture: str) -> tuple[bytes, str]:
    """Machine code for ``architecture`` (sm_90), and the symbol that ``name`` became. Raises RuntimeError with the compiler's log."""

    def check(status: int) -> None:
        if status:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")

    program = ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        check(nvrtc.nvrtcAddNameExpression(program, name.encode()))
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
        if nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            log = _made(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(f"{name}: {log.rstrip(bytes(1)).decode(errors='replace')}")
        symbol = ctypes.c_char_p()
        check(nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol)))
        return _made(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), (symbol.value or b"").decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _made(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    """What the compiler made, by its two functions for it."""
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    made = ctypes.create_string_buffer(size.value)
    get(program, made)
    return made.raw


def library() -> ctypes.CDLL:
    """NVRTC as torch finds it, else in the package beside torch that brings it. Raises OSError."""
    try:
        found: ctypes.CDLL = torch.cuda._utils._get_gpu_rtc_library()  # type: ignore[attr-defined]
        return found
    except OSError:
        for path in sorted(Path(torch.__file__).parents[1].glob("nvidia/**/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
        raise
