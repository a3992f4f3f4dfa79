"""Where a step's time goes: its stages by name, and the rates that follow from them.

A stage is a function marked ``@stage(name)``. Unless somebody watches, the mark costs one look at an empty list. A watcher
is told when stages begin and end: ``StageTimes`` measures them, haste_dist/profile.py names them in a trace. On a GPU times are
between events on the stream, so nothing waits for the device until they are read.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from haste_dist.devices import known_device
from haste_dist.loader import Batch
from haste_dist.world import World
from haste_kernels import TailState

STAGES = ("forward", "gather", "head", "tail", "scatter", "backward", "optimizer")  # as a step goes through them
P = ParamSpec("P")
R = TypeVar("R")


class Watcher(Protocol):
    def stage(self, name: str) -> AbstractContextManager[Any]: ...


_watchers: list[Watcher] = []


def stage(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a function as the stage ``name`` of a step, one of STAGES."""

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def marked(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _watchers:
                return function(*args, **kwargs)
            with ExitStack() as stack:
                for watcher in _watchers:
                    stack.enter_context(watcher.stage(name))
                return function(*args, **kwargs)

        return marked

    return mark


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """While it lasts, ``watcher`` is told of every stage of this process."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class StageTimes:
    """Measures the stages that run while it watches."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def read(self) -> dict[str, float]:
        """Milliseconds by stage, summed since the last reading. The device must have finished the work."""
        total: dict[str, float] = defaultdict(float)
        for name, start, stop in self._marks:
            total[name] += start.elapsed_time(stop) if self._cuda else 1e3 * (stop - start)
        self._marks.clear()
        return dict(total)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class EncoderWork:
    """Floating-point operations of the encoder's forward and backward passes, without what padding costs."""

    a_token: float
    a_token_pair: float  # of one text, in the attention
    a_text: float  # of its first token alone, or its embedding

    def flops(self, texts: float, tokens: float, squares: float) -> float:
        """For ``tokens`` real tokens; ``squares``: the sum over texts of their lengths squared."""
        return self.a_text * texts + self.a_token * tokens + self.a_token_pair * squares


def encoder_work(encoder: nn.Module) -> EncoderWork:
    """Two operations a weight and token forward, two backward to the inputs, two to each weight that is trained; 4 D a layer and pair of
    tokens for attention, three times with its backward pass. Embedding tables are looked up, not multiplied. A projection takes a text at
    once, and so does a layer that works out first tokens alone, with 4 D operations a head and other token.
    """
    config: Any = getattr(getattr(encoder, "model", None), "config", None)
    width, layers, heads = (getattr(config, name, 0) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    tables = {id(m.weight) for m in encoder.modules() if isinstance(m, nn.Embedding)}
    spared = [m for m in encoder.modules() if getattr(m, "first_only", False)]
    once = {id(p) for name, p in encoder.named_parameters() if name.startswith("project.")}
    once |= {id(p) for layer in spared for p in layer.parameters()}
    matrices = [p for p in encoder.parameters() if p.ndim > 1 and id(p) not in tables]
    backward = any(p.requires_grad for p in encoder.parameters())

    def products(parts: list[nn.Parameter]) -> float:
        weights, trained = sum(p.numel() for p in parts), sum(p.numel() for p in parts if p.requires_grad)
        return 2.0 * weights * (2 if backward else 1) + 2.0 * trained

    attention = 4.0 * width * (3 if backward else 1)  # a layer and pair of tokens
    a_token = products([p for p in matrices if id(p) not in once]) + attention * heads * len(spared)
    return EncoderWork(a_token, attention * (layers - len(spared)), products([p for p in matrices if id(p) in once]))


class StepTimer:
    """Times and rates of the steps since the last reading; on a GPU the reading follows a wait for the device.

    Of the step that ends with a reading the stages are measured too.
    """

    def __init__(self, batch_size: int, world: World, work: EncoderWork, dtype: torch.dtype, tail_bytes: int = 0):
        """``dtype``: the encoder's; ``tail_bytes``: what a step of the tail reads and writes of its state on this rank."""
        self.batch_size, self.world, self.work, self.tail_bytes = batch_size, world, work, tail_bytes
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.device = known_device(name)
        self.half = dtype in (torch.bfloat16, torch.float16)
        self._stages, self._watch = StageTimes(world.device), ExitStack()
        self.restart()

    def restart(self) -> None:
        self.since = time.perf_counter()
        self.waited, self.steps, self._wait_start = 0.0, 0, 0.0
        self._tokens = self._cells = self._last_tokens = self._last_squares = 0

    def waiting(self) -> None:
        self._wait_start = time.perf_counter()

    def working(self, batch: Batch, watch: bool = False) -> None:
        """The step on ``batch`` begins; ``watch``: measure its stages, for a reading follows."""
        self.waited += time.perf_counter() - self._wait_start
        lengths = batch.attention_mask.numpy().sum(1)[: len(batch.texts)]
        self._last_tokens, self._last_squares = int(lengths.sum()), int((lengths * lengths).sum())
        self._tokens += self._last_tokens
        self._cells += batch.attention_mask.numel()
        if watch:
            self._watch.enter_context(watched_by(self._stages))

    def stepped(self) -> None:
        self.steps += 1
        self._watch.close()

    def read(self) -> dict[str, float]:
        """Every rank must call it. A rate that the device's data sheet is needed for is absent on an unknown device."""
        steps = max(1, self.steps)
        seconds = max(1e-9, time.perf_counter() - self.since)
        counts = torch.tensor([self._tokens, self._cells, self._last_tokens, self._last_squares], dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(counts, group=self.world.control)
        tokens, cells, last_tokens, last_squares = counts.tolist()
        values = {
            "step_ms": 1e3 * seconds / steps,
            "samples_per_s": self.batch_size * steps / seconds,
            "data_wait_ms": 1e3 * self.waited / steps,
            "tokens_per_s": tokens / seconds,
            "padding": 1 - tokens / max(1.0, cells),
        }
        parts = self._stages.read()
        values |= {f"{name}_ms": parts[name] for name in STAGES if name in parts}
        encoder_s = 1e-3 * (parts.get("forward", 0.0) + parts.get("backward", 0.0))
        if self.device and self.half and encoder_s:
            flops = self.work.flops(self.batch_size, last_tokens, last_squares) / self.world.size
            values["encoder_mfu"] = flops / encoder_s / self.device.flop_s
        if parts.get("tail") and self.tail_bytes:
            values["tail_gb_s"] = self.tail_bytes / parts["tail"] / 1e6
            if self.device:
                values["tail_rate"] = 1e9 * values["tail_gb_s"] / self.device.byte_s
        self.restart()
        return values


def tail_traffic(tail: TailState) -> int:
    """Bytes of state that one step of the tail reads and writes: weights, momentum and biases both ways, indices once."""
    both = [t for t in (tail.weight, tail.momentum, tail.bias, tail.bias_momentum) if t is not None]
    return sum(2 * t.nbytes for t in both) + tail.index.nbytes


def peak_memory(device: torch.device, known: int = 0) -> dict[str, float]:
    """Peak memory of this rank in GiB: on a GPU of the allocator, or ``known`` bytes where these are more; on a CPU of the process."""
    if device.type == "cuda":
        return {"peak_gib": max(torch.cuda.max_memory_allocated(device), known) / 2**30}
    import resource

    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
