"""How time, memory and the device's ceilings are measured.

Time: on a GPU an event before and after each call, caches flushed in between, so the host's launches are in it where they are
the slower part; on a CPU the clock. The answer is three quantiles of all calls. Memory: the most that lay allocated during a call,
states and inputs included; on a CPU that is the tensors that live, without what an operation takes and frees inside.
"""

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haste_dist.live_bytes import LiveBytes
from haste_launch.bench_case import Ceilings

FLUSH_BYTES = 256 << 20  # several times any cache there is
LEAST_CALLS, MOST_CALLS = 5, 2000
WARM_CALLS = 3
GIB = 1 << 30


class Times(NamedTuple):
    p20_ms: float
    p50_ms: float
    p80_ms: float


def time_calls(call: Callable[[], Any], device: torch.device, seconds: float) -> Times:
    """Quantiles of ``call``'s time over about ``seconds``; compiling and tuning happen in calls that are not counted."""
    for _ in range(WARM_CALLS):
        call()
    ms = _time_cuda(call, seconds) if device.type == "cuda" else _time_cpu(call, seconds)
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Times(*torch.quantile(torch.tensor(ms, dtype=torch.float64), at).tolist())


def _time_cpu(call: Callable[[], Any], seconds: float) -> list[float]:
    ms: list[float] = []
    end = time.perf_counter() + seconds
    while len(ms) < LEAST_CALLS or (len(ms) < MOST_CALLS and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        ms.append(1e3 * (time.perf_counter() - start))
    return ms


def _time_cuda(call: Callable[[], Any], seconds: float) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def run(count: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, stop in pairs:
            flush.zero_()  # this also keeps the GPU busy while the host launches the call
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]

    first = run(LEAST_CALLS)
    return run(max(LEAST_CALLS, min(MOST_CALLS, int(1e3 * seconds / max(min(first), 1e-3)))))


def peak_gib(call: Callable[[], Any], device: torch.device, held: Callable[[], list[Tensor]], before: int) -> float:
    """The most memory in use during ``call``. ``held``: tensors of states and inputs; ``before``: ``allocated`` ahead of their making."""
    if device.type == "cuda":
        call()  # tuning may allocate
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / GIB
    with LiveBytes(held()) as live:
        call()
    return live.peak / GIB


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU, after what nobody holds any more has gone; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Median rates of a large copy and of a large square GEMM of random values."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 26, 768)
    copy_ms, gemm_ms = _copy(size, device, seconds), _gemm(side, dtype, device, seconds)
    return Ceilings(2 * size / copy_ms / 1e6, 2 * side**3 / gemm_ms / 1e9)


def _copy(size: int, device: torch.device, seconds: float) -> float:
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return time_calls(lambda: target.copy_(source), device, seconds).p50_ms


def _gemm(side: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return time_calls(lambda: torch.mm(a, b, out=out), device, seconds).p50_ms
