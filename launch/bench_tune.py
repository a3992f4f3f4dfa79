"""``haste bench kernels --tune``: measures every tile of the kernels that the cases use, and keeps the fastest on disk for all later runs.

Compiling takes far longer than measuring, so processes compile ahead, each on tensors without memory, into Triton's cache on disk. Then
each tile is timed at the case's own shape, one after the other. Cases whose kernels share a choice are measured at the first one's shape.
"""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from haste_dist.errors import ConfigError
from haste_kernels import HeadState, TailState, tuning
from haste_kernels.backend import use_triton
from haste_launch.bench_case import BACKWARD, FORWARD, HEAD, HEAD_SHARE, LAYER, TAIL, TOPK, Case
from haste_launch.bench_measure import time_calls
from haste_launch.bench_problem import TIMED, Part, make_parts

META = torch.device("meta")
MOST_PROCESSES = 16  # each holds Triton and torch, about a gigabyte
SHARE = 0.1  # of a measurement's seconds: telling tiles apart takes less than a figure to report
Stages = Callable[[str, int], Callable[[str], None]]


@dataclass(frozen=True)
class Tunable:
    """A kernel at one shape: the table's choice, those it is measured against, and one call of it with a choice."""

    kernel: str
    key: str
    default: Any
    candidates: tuple[Any, ...]
    call: Callable[[Any], Any]

    @property
    def choices(self) -> tuple[Any, ...]:
        """The table's first: of equally fast ones it stays."""
        return tuple(dict.fromkeys((self.default, *self.candidates)))


def check_tunable() -> None:
    """Raises ConfigError where nothing can be measured or kept."""
    if not torch.cuda.is_available():
        raise ConfigError("--tune: there is no GPU here to measure tiles on")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if not use_triton(torch.empty(0, device="cuda")):
            why = "; ".join(str(warning.message) for warning in told) or "plain torch is asked for (HASTE_KERNELS)"
            raise ConfigError(f"--tune: the kernels that have tiles do not run here: {why}")
    folder = tuning.path().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--tune: {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--tune: {folder}: cannot be written to (HASTE_CACHE names another folder)")


def tune_cases(cases: Sequence[Case], device: torch.device, seconds: float, progress: Stages) -> None:
    """Measures and remembers; a line a kernel and shape says what was found."""
    found: dict[tuple[str, str], tuple[Case, int, Tunable]] = {}
    for case in cases:
        for number, one in enumerate(tunables(case, META)):
            found.setdefault((one.kernel, one.key), (case, number, one))
    if not found:
        progress("tuning: none of these has tiles to choose from", 0)
        return
    compile_ahead([(case, number, config) for case, number, one in found.values() for config in one.choices], progress)
    step = progress("tuning", sum(len(one.choices) for _, _, one in found.values()))
    for case, number, _ in found.values():
        progress(_tune_one(case, number, device, SHARE * seconds, step), 0)
    progress(f"tiles are kept in {tuning.path()}", 0)


def tunables(case: Case, device: torch.device) -> list[Tunable]:
    """The kernels with a choice of tiles that ``case`` uses, with states and batch on ``device``; always in the same order.

    Top-k is tuned for the head too, though the case times the tail.
    """
    if case.topic in (TAIL, HEAD, LAYER):
        return [one for part in make_parts(case, device) for one in _step(part)]
    case = replace(case, momentum="none")
    if case.topic == TOPK:
        rows = -(-case.labels // HEAD_SHARE // case.group) * case.group
        (tail,), (head,) = make_parts(case, device), make_parts(replace(case, topic=HEAD, labels=rows), device)
        return [*_topk_tail(tail, case.k), *_topk_head(head, case.k)]
    if case.topic in (FORWARD, BACKWARD):
        return _linear(make_parts(case, device)[0], case.topic)
    return []


def _step(part: Part) -> list[Tunable]:
    return _tail_step(part, part.state) if isinstance(part.state, TailState) else _head_step(part, part.state)


def _head_step(part: Part, head: HeadState) -> list[Tunable]:
    from haste_kernels import triton_head as kernels
    from haste_kernels.products import operand_dtype

    def gradient(config: Any) -> Any:
        return kernels.head_step(part.x_ND, part.positives, head, TIMED, gradient=config)

    def update(config: Any) -> Any:
        return kernels.head_step(part.x_ND, part.positives, head, TIMED, update=config)

    key = kernels.key(part.x_ND, head)
    one, two = kernels.default_tiles(operand_dtype(part.x_ND, head.weight))
    return [
        Tunable("head_gradient", key, one, kernels.CANDIDATES, gradient),
        Tunable("head_update", key, two, kernels.CANDIDATES, update),
    ]


def _tail_step(part: Part, tail: TailState) -> list[Tunable]:
    from haste_kernels import triton_tail as kernels

    n = len(part.x_ND)
    if not kernels.takes(part.x_ND, tail):
        return []
    default = kernels.default_config(tail.weight.shape[1], tail.weight.shape[2], n)

    def call(config: Any) -> Any:
        return kernels.tail_step(part.x_ND, part.positives, tail, TIMED, config=config)

    return [Tunable("tail_step", kernels.key(tail, n), default, kernels.CANDIDATES, call)]


def _topk_tail(part: Part, k: int) -> list[Tunable]:
    from haste_kernels import triton_maxima, triton_topk

    x, tail = part.x_ND, part.state
    assert isinstance(tail, TailState)
    if not triton_topk.takes(None, x, None, tail, k):
        return []
    default = triton_maxima.default_tail(len(x), tail.weight.shape[1], x.dtype)

    def call(config: Any) -> Any:
        return triton_topk.topk(None, x, None, tail, k, tail_tiles=config)

    return [Tunable("topk_tail", triton_topk.tail_key(x, tail), default, triton_maxima.TAIL_CANDIDATES, call)]


def _topk_head(part: Part, k: int) -> list[Tunable]:
    from haste_kernels import triton_maxima, triton_topk

    x, head = part.x_ND, part.state
    assert isinstance(head, HeadState)
    if not triton_topk.takes(x, None, head, None, k):
        return []
    default = triton_maxima.default_head(len(x), x.dtype)

    def call(config: Any) -> Any:
        return triton_topk.topk(x, None, head, None, k, head_tiles=config)

    return [Tunable("topk_head", triton_topk.head_key(x, head), default, triton_maxima.HEAD_CANDIDATES, call)]


def _linear(part: Part, topic: str) -> list[Tunable]:
    from haste_kernels import triton_linear as kernels

    x, state = part.x_ND, part.state
    assert isinstance(state, TailState)
    (_, size, fan_in), weight, index, rows = state.weight.shape, state.weight, state.index, state.rows
    if size == 1 or not kernels.supported(x, weight):
        return []
    bias = None if state.bias is None else state.bias.to(weight.dtype).view(-1)[:rows]
    dw = torch.empty_like(weight)
    dz = torch.randn(len(x) if topic == BACKWARD else 0, rows, dtype=x.dtype, device=x.device)
    calls: dict[kernels.Op, Callable[[Any], Any]] = {
        "forward": lambda config: kernels.forward(x, weight, index, bias, rows, config),
        "grad_x": lambda config: kernels.grad_x(dz, weight, index, x.shape[1], config),
        "grad_weight": lambda config: kernels.grad_weight(dz, x, index, dw, config),
    }
    names: tuple[kernels.Op, ...] = ("forward",) if topic == FORWARD else ("grad_x", "grad_weight")
    return [
        Tunable(f"linear_{op}", kernels.key(size, fan_in, x), kernels.default_config(op, size, fan_in, x), kernels.CONFIGS[op], calls[op])
        for op in names
    ]


def compile_ahead(jobs: Sequence[tuple[Case, int, Any]], progress: Stages, pool: Executor | None = None) -> None:
    """Fills Triton's cache on disk, several processes at a time. What fails here is compiled, or fails again, when it is measured."""
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(jobs))
    if pool is None:
        if processes < 2:
            return  # nothing is gained
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_quiet)
    step = progress("compiling", len(jobs))
    failures = []
    try:
        waiting: list[Future[str]] = [pool.submit(compile_one, *job) for job in jobs]
        step(f"{processes} at a time")
        for done in as_completed(waiting):
            if done.result():
                failures.append(done.result())
            step(f"{processes} at a time")
    except BrokenProcessPool:
        progress("compiling: a process died; kernels are compiled one by one instead", 0)
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        progress(f"compiling: {len(failures)} of {len(jobs)} failed, the first with {failures[0]}", 0)


def compile_one(case: Case, number: int, config: Any) -> str:
    """Compiles what a call of the ``number``-th kernel with ``config`` launches; returns what went wrong, if anything did."""
    try:
        with tuning.compile_only():
            tunables(case, META)[number].call(config)
    except Exception as error:  # a tile that is too large, in whatever words; not every error can be sent to another process
        return _line(error)
    return ""


def _quiet() -> None:
    """A process that compiles leaves Ctrl-C to the one that measures."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _tune_one(case: Case, number: int, device: torch.device, seconds: float, step: Callable[[str], None]) -> str:
    """What is to be told of it. Its states live no longer than this call."""
    shape = " ".join(f"{letter}={value:,}" for letter, value in case.shape().items())
    try:
        one = tunables(case, device)[number]

        def milliseconds(config: Any) -> float:
            step(one.kernel)
            return time_calls(lambda: one.call(config), device, seconds).p50_ms

        tuned = tuning.tune(one.kernel, one.key, one.choices, milliseconds)
    except RuntimeError as error:  # no tile runs, or the state does not fit: the table then says so too
        return f"{case.topic} ({shape}): not tuned: {_line(error)}"
    best = " ".join(f"{name}={value}" for name, value in asdict(tuned.best).items() if value is not None)
    usual = f"{tuned.times[one.default]:.4g} ms" if one.default in tuned.times else "did not run"
    ran = f"{len(tuned.times)} of {len(one.choices)} ran"
    return f"{one.kernel} {one.key} ({shape}): {best}: {tuned.times[tuned.best]:.4g} ms, the table's {usual}; {ran}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
