"""A trace of a few steps by torch.profiler, and one page that says where they went.

The page is computed from the trace alone. A kernel belongs to the stage in which the host launched it; what the device did at the same
time on several streams counts once as busy. The trace opens in Perfetto or chrome://tracing.
"""

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from haste_dist.meters import STAGES, watched_by
from haste_dist.runlog import RunLog
from haste_dist.world import World

FOLDER = "profile"
WARM_STEPS = 10  # compiling, tuning and growing buffers are no part of a step
DATA = "data"  # the stage of waiting for a batch
SHOWN = 12  # kernels or operations on the page
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
Event = dict[str, Any]


class StepProfile:
    """Records ``steps`` steps after the first ten of this process, then writes ``run/profile``; with 0 steps it does nothing."""

    def __init__(self, steps: int, run: Path, world: World, log: RunLog):
        self._steps, self._folder, self._world, self._log = steps, run / FOLDER, world, log
        self._seen = 0
        self._open = ExitStack()
        self._profiler: Any = None

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """Names a stage in the trace."""
        return record_function(name)

    def stepped(self, step: int) -> None:
        """After every step; ``step`` is how many there were."""
        self._seen += 1
        if not self._steps or self._seen > WARM_STEPS + self._steps:
            return
        if self._seen == WARM_STEPS:
            self._begin()
        elif self._seen == WARM_STEPS + self._steps:
            self._end(step)

    def _begin(self) -> None:
        cuda = self._world.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
        self._profiler.start()
        self._open.enter_context(watched_by(self))

    def _end(self, step: int) -> None:
        self._open.close()
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._world.rank}.json.gz"
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        if self._world.is_first:
            found = summarize(read_trace(path), self._steps)
            (self._folder / "summary.txt").write_text(page(found, self._steps, path.name), encoding="utf-8")
            figures = {f"{name}_ms": host for name, host, _, _ in found.stages}
            on_device = {f"{name}_device_ms": device for name, _, device, _ in found.stages} if found.busy_ms else {}
            idle = {"busy_ms": found.busy_ms, "idle_ms": found.step_ms - found.busy_ms} if found.busy_ms else {}
            self._log.event("profile", step=step, step_ms=found.step_ms, **figures, **on_device, **idle)


class StageShare(NamedTuple):
    """Milliseconds a step: of the host, of kernels that it launched, of the host waiting for the device."""

    name: str
    host_ms: float
    device_ms: float
    waited_ms: float


class Summary(NamedTuple):
    """Milliseconds a step. ``busy_ms`` is 0 where there is no device."""

    step_ms: float
    stages: list[StageShare]
    busy_ms: float
    waits: dict[str, int]  # how often the host waited for the device in all steps, by stage
    largest: list[tuple[str, float, int]]  # kernels, or operations of a CPU: name, ms a step, calls a step


def read_trace(path: Path) -> list[Event]:
    """The complete events of a Chrome trace, gzipped or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [event for event in json.loads(data)["traceEvents"] if event.get("ph") == "X"]


def summarize(events: Sequence[Event], steps: int) -> Summary:
    """Where ``steps`` traced steps went. Pure."""
    each = 1e3 * steps  # microseconds of all steps to milliseconds of one
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in (DATA, *STAGES)]
    ranges.sort(key=lambda e: e["ts"])
    starts = [e["ts"] for e in ranges]

    def stage_at(when: float) -> str:
        i = bisect_right(starts, when) - 1
        return ranges[i]["name"] if i >= 0 and when <= ranges[i]["ts"] + ranges[i]["dur"] else "other"

    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "args" in e]
    launched: dict[int, float] = {e["args"]["correlation"]: e["ts"] for e in calls if "correlation" in e["args"]}
    kernels = [e for e in events if e.get("cat") in ON_DEVICE]
    waiting = [e for e in calls if "Synchronize" in e["name"]]
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    waited: dict[str, float] = defaultdict(float)
    waits: dict[str, int] = defaultdict(int)
    for e in ranges:
        host[e["name"]] += e["dur"]
    for e in kernels:
        number: int = e.get("args", {}).get("correlation", -1)
        device[stage_at(launched[number] if number in launched else e["ts"])] += e["dur"]
    for e in waiting:
        waited[stage_at(e["ts"])] += e["dur"]
        waits[stage_at(e["ts"])] += 1
    within = [*ranges, *kernels]
    wall = max((e["ts"] + e["dur"] for e in within), default=0.0) - min((e["ts"] for e in within), default=0.0)
    host["other"] = max(0.0, wall - sum(host.values()))
    names = [name for name in (DATA, *STAGES, "other") if host[name] or device[name]]
    stages = [StageShare(name, host[name] / each, device[name] / each, waited[name] / each) for name in names]
    took: dict[str, list[float]] = defaultdict(list)
    for name, duration in ((e["name"], e["dur"]) for e in kernels) if kernels else _own_times(events):
        took[name].append(duration)
    largest = sorted(((name, sum(all_) / each, len(all_) // steps) for name, all_ in took.items()), key=lambda one: -one[1])[:SHOWN]
    return Summary(wall / each, stages, _union(kernels) / each, dict(waits), largest)


def page(found: Summary, steps: int, trace: str) -> str:
    """The summary as text."""
    cuda = found.busy_ms > 0
    lines = [f"{steps} steps, {found.step_ms:.2f} ms each; milliseconds a step. The whole trace: {trace} (ui.perfetto.dev opens it)", ""]
    lines.append(f"{'stage':<12}{'host':>10}{'share':>8}" + (f"{'device':>10}{'share':>8}{'waited':>10}{'waits':>8}" if cuda else ""))
    for name, host, device, waited in found.stages:
        line = f"{name:<12}{host:>10.2f}{host / found.step_ms:>8.1%}"
        count = found.waits.get(name, 0)
        lines.append(line + (f"{device:>10.2f}{device / found.step_ms:>8.1%}{waited:>10.2f}{count:>8}" if cuda else ""))
    if cuda:
        idle = found.step_ms - found.busy_ms
        lines += ["", f"device busy {found.busy_ms:.2f} ms, idle {idle:.2f} ms ({idle / found.step_ms:.1%})"]
        lines.append("waited: the host, for the device (*Synchronize); a step outside logging should have none")
    lines += ["", f"{'largest kernels' if cuda else 'largest operations, without what they call':<80}{'ms':>9}{'calls':>7}"]
    lines += [f"{name[:78]:<80}{ms:>9.3f}{calls:>7}" for name, ms, calls in found.largest]
    return "\n".join(lines) + "\n"


def _own_times(events: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """Name and duration of each CPU operation, less what it calls."""
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            by_thread[event["tid"]].append(event)
    for thread in by_thread.values():
        inside: list[tuple[str, float, list[float]]] = []  # open operations: name, end, [own time]
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while inside and inside[-1][1] <= event["ts"]:
                name, _, (own,) = inside.pop()
                yield name, own
            if inside:
                inside[-1][2][0] -= event["dur"]
            inside.append((event["name"], event["ts"] + event["dur"], [event["dur"]]))
        for name, _, (own,) in inside:
            yield name, own


def _union(events: Sequence[Event]) -> float:
    """Time that at least one of the events covers."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        start, stop = max(event["ts"], end), event["ts"] + event["dur"]
        total += max(0.0, stop - start)
        end = max(end, stop)
    return total
