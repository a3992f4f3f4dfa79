"""Measures the points of a scaling study, as each rank runs it: the real step on made-up texts. Knows torch.distributed only.

Only token ids and labels are synthetic. Weights and features are made on the device, shard by shard, by the same code as in training; a
label exists nowhere but in its row. A step's time runs from its beginning to the next one's; its parts are measured in further steps,
so that measuring them does not slow the first.

Letters: N texts of the global batch, S tokens, W ranks.
"""

import dataclasses
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from haste_dist import __version__
from haste_dist.classifier import Classifier, feature_slice
from haste_dist.collectives import barrier
from haste_dist.config import Config
from haste_dist.devices import known_device
from haste_dist.encoder import Encoder, build_encoder
from haste_dist.engine import EncoderEngine
from haste_dist.errors import OutOfMemory
from haste_dist.live_bytes import LiveBytes
from haste_dist.loader import Batch
from haste_dist.memory import GIB, Facts, memory_plan, room
from haste_dist.meters import STAGES, StageTimes, watched_by
from haste_dist.records import package_version, stamp
from haste_dist.rewire import rewire
from haste_dist.runlog import RunLog
from haste_dist.sharding import label_shard
from haste_dist.step import predict_batch, train_step
from haste_dist.study import QUANTILES, Point, Row, add_row, append_records, missing, read_study
from haste_dist.synthetic import LabelLaw, synthetic_batch
from haste_dist.world import World

VOCABULARY = 30_522  # of BERT; for encoders that are made from scratch
BATCHES = 4  # made before the clock starts, and taken in turn
RISE = 1000  # steps in which learning rates would reach their peak: the study's few are the first of them
WAITING = ("gather", "scatter")  # of these the fastest rank's time counts: the others wait for it
TOPK, TOPK_CALLS = 5, 3


@dataclass(frozen=True)
class Effort:
    """How long a point is measured."""

    warmup: int = 5
    steps: int = 20


def measure_points(
    config: Config,
    world: World,
    points: Sequence[Point],
    law: LabelLaw,
    folder: Path,
    effort: Effort,
    records: Path | None = None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Measures each point and adds its row to the study in ``folder``; the first rank writes. All points have W ranks.

    Raises OutOfMemory, with nothing written about that point; ends early, on all ranks, where one ``wants_stop``.
    """
    points = missing(points, read_study(folder), config, law, device_name(world.device))
    barrier(world)  # the first rank writes to the study only when all have read it
    log = RunLog(folder, enabled=world.is_first)
    bench: Bench | None = None
    with log:
        log.event("study", points=len(points), ranks=world.size, device=device_name(world.device))
        for point in points:
            if _agree(wants_stop(), world):
                return
            page = point.config(config)
            bench = bench or Bench(page, world)
            began = time.perf_counter()
            key = {**point.key(config, law), "device": device_name(world.device)}
            try:
                row = {**key, "note": "", **bench.measure(page, point, law, effort)}
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(str(error).splitlines()[0]) from None
            _free(world.device)
            if world.is_first:
                row |= {**stamp(), "haste": __version__, "deepspeed": package_version("deepspeed")}
                add_row(folder, row)
                if records is not None and not row["note"]:
                    append_records(row, read_study(folder), records)
            shown = {name: row.get(name) for name in ("labels", "ranks", "batch", "fan_in", "group", "p50_ms", "peak_gib", "note")}
            log.event("point", seconds=time.perf_counter() - began, **shown)
            barrier(world)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


class Bench:
    """The encoder of a study; every point puts another output layer on it."""

    def __init__(self, config: Config, world: World):
        self.world = world
        torch.manual_seed(config.run.seed)
        vocabulary = VOCABULARY if config.encoder.name == "scratch" else 0
        self.encoder: Encoder = build_encoder(config.encoder, vocabulary, 0, config.data.max_length, pretrained=False)
        self.engine = EncoderEngine(self.encoder, config.encoder, world)

    def measure(self, config: Config, point: Point, law: LabelLaw, effort: Effort) -> Row:
        """The figures of one point; of the slowest and fullest rank where ranks differ."""
        world, device = self.world, self.world.device
        vocabulary: int = self.encoder.model.config.vocab_size  # type: ignore[union-attr, assignment]
        facts = Facts(point.labels, law.most, vocabulary, 0, world.size, device.type, one_shape=True)
        plan = memory_plan(config, facts)
        head_rows = point.head_rows(config)
        row: Row = {
            "width": self.encoder.width,
            "encoder_parameters": plan.encoder.parameters,
            "gpus_a_host": int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
            "planned_gib": plan.step_peak / GIB,
        }
        if device.type == "cuda":
            gib = torch.cuda.get_device_properties(device).total_memory / GIB
            if plan.step_peak > room(gib):
                return {**row, "note": f"does not fit: {plan.step_peak / GIB:.1f} GiB planned of {gib:.1f}"}
        self.engine.forget_recorded()  # a plan knows of one size of batches
        _free(device)
        classifier, started = self._classifier(config, point, head_rows, law)
        row |= {"head_width": classifier.head_slice.width, "tail_width": classifier.tail_slice.width, "steps": effort.steps}
        batches = [self._batch(config, point, head_rows, vocabulary, law, i) for i in range(BATCHES)]
        done = 0

        def step(want_loss: bool = False) -> torch.Tensor | None:
            nonlocal done
            factor = (done + 1) / RISE
            loss = train_step(
                self.engine,
                classifier,
                batches[done % BATCHES],
                world,
                lr_encoder=factor * config.encoder.lr,
                lr_output=factor * config.output.lr,
                step=done,
                seed=config.run.seed,
                want_loss=want_loss,
            )
            done += 1
            return loss

        first = step(want_loss=True)
        for _ in range(effort.warmup - 1):
            step()
        _settle(world)
        _forget_peak(device)
        times = _time_steps(step, effort.steps, world)
        parts = self._time_parts(step, max(3, effort.steps // 2))
        peak = _peak(step, device, [*self.encoder.parameters(), *(t for t, _ in classifier.tensors().values())])
        peak += self.engine.held_bytes()
        last = step(want_loss=True)
        row |= self._figures(times, parts, peak, point, config)
        row |= {"start_gib": started / GIB, "state_gib": _most(classifier.bytes(), world) / GIB}
        row |= {"loss_first": _finite(first), "loss_last": _finite(last)}
        row["encoder_only_ms"] = self._encoder_only(batches, effort)
        row["topk_ms"] = _clock(lambda: predict_batch(self.engine, classifier, batches[0], world, TOPK), world, TOPK_CALLS)
        fits = device.type != "cuda" or plan.peak <= room(gib)
        if config.rewire.interval and fits:
            random = dataclasses.replace(config.rewire, grow="random")
            row["rewire_ms"] = _clock(lambda: rewire(classifier, random, random.fraction, done, world), world, 1)
        return row

    def _classifier(self, config: Config, point: Point, head_rows: int, law: LabelLaw) -> tuple[Classifier, float]:
        """The output layer, and the most memory that making it took."""
        world, output = self.world, config.output
        share = min(0.5, law.positives / point.labels)
        prior = -1.0 if output.loss == "squared_hinge" else math.log(share / (1 - share))
        output = dataclasses.replace(output, bias_init=output.bias_init if output.bias_init is not None else max(-30.0, prior))
        groups = -(-(point.labels - head_rows) // point.group)
        shard = label_shard(head_rows, groups, point.group, point.labels, world.size, world.rank)
        _forget_peak(world.device)
        width = self.encoder.width
        basis = torch.eye(feature_slice(output.tail_features, width).width, dtype=torch.float16)  # made-up labels have none of their own
        made = Classifier(output, shard, width, config.run.seed, world.device, basis=basis)
        most = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else made.bytes()
        return made, _most(most, world)

    def _batch(self, config: Config, point: Point, head_rows: int, vocabulary: int, law: LabelLaw, step: int) -> Batch:
        ranks, rank = self.world.size, self.world.rank
        made = synthetic_batch(
            law, point.labels, head_rows, point.batch, config.data.max_length, vocabulary, config.run.seed, step, ranks, rank
        )  # fmt: skip
        if self.world.device.type == "cuda":
            pinned = {name: getattr(made, name).pin_memory() for name in ("input_ids", "attention_mask", "label_rows")}
            made = dataclasses.replace(made, **pinned)
        return made

    def _encoder_only(self, batches: list[Batch], effort: Effort) -> float:
        """Median milliseconds of a step of the encoder alone, as if its gradient were given: what a user waits for without any labels."""
        made = itertools.count()

        def step() -> None:
            batch = batches[next(made) % BATCHES]
            x_BD = self.engine.forward(batch.input_ids.to(self.world.device, non_blocking=True), None)
            self.engine.backward(x_BD, dx_BD)
            self.engine.step(0.0)  # all of its work, but the weights stay

        rows = len(batches[0].input_ids)
        dx_BD = torch.randn(rows, self.encoder.width, device=self.world.device) / rows
        for _ in range(effort.warmup):
            step()
        _settle(self.world)
        return _reduce(np.array([np.median(_time_steps(step, effort.steps, self.world))]), self.world)[0]

    def _time_parts(self, step: Callable[[], Any], count: int) -> list[dict[str, float]]:
        watch = [StageTimes(self.world.device) for _ in range(count)]
        for one in watch:
            with watched_by(one):
                step()
        _settle(self.world)
        return [one.read() for one in watch]

    def _figures(self, times: np.ndarray, parts: list[dict[str, float]], peak: float, point: Point, config: Config) -> Row:
        world = self.world
        quantiles = [0.2, 0.5, 0.8]
        found: Row = dict(zip((f"{q}_ms" for q in QUANTILES), _reduce(np.quantile(times, quantiles), world), strict=True))
        for name in STAGES:
            values = [one[name] for one in parts if name in one]
            each = np.quantile(values, quantiles) if values else np.zeros(3)
            reduced = _reduce(each, world, dist.ReduceOp.MIN if name in WAITING else dist.ReduceOp.MAX)
            if any(reduced):
                found |= dict(zip((f"{name}_{q}_ms" for q in QUANTILES), reduced, strict=True))
        tokens, length = point.batch * config.data.max_length, config.data.max_length
        flops = self.engine.work.flops(point.batch, tokens, tokens * length) / world.size
        found |= {"encoder_flops": flops, "peak_gib": _most(peak, world) / GIB}
        seconds = found["p50_ms"] / 1e3
        found |= {"samples_per_s": point.batch / seconds, "tokens_per_s": tokens / seconds}
        known = known_device(device_name(world.device))
        encoder_ms = found.get("forward_p50_ms", 0.0) + found.get("backward_p50_ms", 0.0)
        if known and self.engine.dtype == torch.bfloat16:
            found["encoder_mfu"] = flops / (encoder_ms / 1e3) / known.flop_s
        return found


def _time_steps(step: Callable[[], Any], count: int, world: World) -> np.ndarray:
    """Milliseconds from the beginning of each of ``count`` steps to that of the next."""
    if world.device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return 1e3 * np.diff(marks)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return np.array([a.elapsed_time(b) for a, b in itertools.pairwise(events)])


def _clock(call: Callable[[], Any], world: World, count: int) -> float:
    """Median milliseconds of a call with a wait for the device behind it; of the slowest rank."""
    taken = []
    for _ in range(count):
        _settle(world)
        began = time.perf_counter()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - began))
    return _reduce(np.array([np.median(taken)]), world)[0]


def _peak(step: Callable[[], Any], device: torch.device, held: list[torch.Tensor]) -> float:
    """Most bytes during a step: of the allocator since ``_forget_peak``; on a CPU of the tensors that two more steps show."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with LiveBytes(held) as live:
        step()  # an optimizer's state is seen when it is first used, behind what may be the peak
        live.restart()
        step()
    return live.peak


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _settle(world: World) -> None:
    """Everything launched so far is done, on all ranks."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    barrier(world)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _agree(wish: bool, world: World) -> bool:
    return _most(float(wish), world) > 0


def _most(value: float, world: World) -> float:
    return _reduce(np.array([value], np.float64), world)[0]


def _reduce(values: np.ndarray, world: World, op: Any = dist.ReduceOp.MAX) -> list[float]:
    """Over ranks, on the host."""
    shared = torch.from_numpy(np.asarray(values, np.float64).copy())
    if world.size > 1:
        dist.all_reduce(shared, op=op, group=world.control)
    return shared.tolist()


def _finite(loss: torch.Tensor | None) -> float | None:
    value = math.nan if loss is None else loss.item()
    return value if math.isfinite(value) else None
