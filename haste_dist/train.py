"""The training loop, as each rank runs it. Knows torch.distributed only; launch/ starts it through Ray or torchrun.

The order within a pass is fixed: evaluate, save, stop, step. The loop runs once more than there are steps, so that the end
is no special case. A step is one step of the output layer; evaluations, checkpoints and stops fall where an encoder update is complete.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from haste_dist import checkpoint
from haste_dist.agreement import patiently, same_error
from haste_dist.centroids import start_from_centroids
from haste_dist.checkpoint import CHECKPOINTS, RunState
from haste_dist.collectives import StopVote, barrier
from haste_dist.config import Config
from haste_dist.determinism import make_deterministic
from haste_dist.engine import EncoderEngine
from haste_dist.errors import CheckpointError, ConfigError
from haste_dist.evaluate import evaluate_texts
from haste_dist.guards import Guard, LossSpikes, dead_groups
from haste_dist.held_out import trained_split
from haste_dist.loader import Batch, BatchMaker, open_texts
from haste_dist.meters import StepTimer, peak_memory, stage, tail_traffic
from haste_dist.model import changed_settings, make_classifier, make_encoder, prior_bias, save_run_files
from haste_dist.preflight import check_run, restore
from haste_dist.profiling import StepProfile
from haste_dist.readers import training_batches
from haste_dist.reembedding import reembed
from haste_dist.rewire import keeps_batch, rewire, share_due
from haste_dist.run_lock import alone
from haste_dist.runlog import RunLog
from haste_dist.saver import Saved, Saver
from haste_dist.schedule import due, pace, plan_steps, warmup_cosine
from haste_dist.step import train_step
from haste_dist.trackers import open_trackers
from haste_dist.verify import check_data
from haste_dist.world import World, split_world

LOCK_SECONDS = 120.0  # that a start waits for ranks of an earlier one; a network file system may take long to see that they are gone


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``reason`` is finished, patience, max_steps or stopped (asked to)."""

    reason: str
    step: int
    best: float
    best_step: int


def train(config: Config, world: World, wants_stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Trains until the epochs are over, patience runs out, or ``wants_stop`` turns true on any rank. Every rank calls it."""
    with alone(Path(config.run.folder), world, min(LOCK_SECONDS, config.launch.timeout / 2)):
        config = make_deterministic(config) if config.run.deterministic else config
        return Training(config, split_world(world, config.launch.label_parallel, config.launch.timeout)).run(wants_stop)


def _check_end(run: Path, step: int, last: int, changed: list[str]) -> None:
    """Raises ConfigError where fewer epochs are asked for than a run has. One that is finished has nothing to do, on other ranks too."""
    if step > last and any(one.startswith("train.epochs=") for one in changed):
        raise ConfigError(
            f"{run}: is at step {step:,} already, these settings end at {last:,}; raise train.epochs, or choose another run.folder"
        )


class Training:
    """A run's parts on this rank, new or as its newest checkpoint left them, and what the loop does with them."""

    def __init__(self, config: Config, world: World):
        """Every rank makes one. Raises HasteError."""
        run = Path(config.run.folder)
        self.saved = run / CHECKPOINTS
        patiently(lambda: _restore(config, self.saved) if world.is_first else None, world)
        prepared = patiently(lambda: check_run(config), world)
        patiently(lambda: check_data(prepared.folder) if world.is_first else None, world)
        config = dataclasses.replace(config, output=dataclasses.replace(config.output, bias_init=prior_bias(config, prepared.manifest)))
        self.config, self.world, self.prepared = config, world, prepared

        data = config.data
        texts = open_texts(prepared.folder, prepared.manifest, "train", data.dev_fraction, config.run.seed, data.label_texts)
        most_labels = prepared.manifest.splits["train"].max_labels
        pin = world.device.type == "cuda"
        maker = BatchMaker(texts, prepared.order.row_of_label, most_labels, prepared.manifest.tokenizer.pad_id, world.size, world.rank, pin)
        self.pace = pace(config.train)
        self.batches = training_batches(config, maker, self.pace.texts, prepared.folder)
        self.plan = plan_steps(config, self.batches.steps_per_epoch)

        encoder = make_encoder(config, prepared.manifest)
        start = checkpoint.newest(self.saved)
        self.state = RunState()
        self.classifier = make_classifier(config, prepared.order, encoder.width, world, drawn=start is None)
        self.engine = EncoderEngine(encoder, config.encoder, world)
        if start is not None:
            with same_error(world):
                self.state = checkpoint.load(start, self.engine, self.classifier, prepared.order.fingerprint)
        elif config.output.start == "centroids":
            start_from_centroids(self.classifier, prepared)
        changed = changed_settings(run, config) if start is not None and world.is_first else []
        with same_error(world):
            _check_end(run, self.state.step, self.plan.last, changed)
        if world.is_first:  # now that all fits: a run that is refused stays as it was
            save_run_files(run, config, encoder, prepared.folder)
        barrier(world)

        with same_error(world):
            trackers = open_trackers(config, self.state.step) if world.is_first else []
        self.log = log = RunLog(run, enabled=world.is_first, trackers=trackers)
        self._log_start(len(texts), changed)
        self.vote = StopVote(world)
        self.timer = StepTimer(self.pace.texts, world, self.engine.work, self.engine.dtype, tail_traffic(self.classifier.tail))
        self.profile = StepProfile(config.train.profile, run, world, self.log)
        self.guard, self.spikes = Guard(run, world, config.train.skip_batches, self.state.skipped), LossSpikes()

        def tell(done: Saved) -> None:  # no method: all that this holds on a GPU would be in a circle, and stay until it is collected
            log.event("checkpoint", **dataclasses.asdict(done))

        self.saver = Saver(self.saved, config.checkpoint, world, prepared.order.fingerprint, tell)
        self.saver.reserve(self.classifier)

    def run(self, wants_stop: Callable[[], bool]) -> Outcome:
        """Trains to the end. Raises CheckpointError where the last checkpoint could not be copied to ``checkpoint.store``."""
        with self.log, self.saver:
            reason = self._loop(wants_stop)
            self.vote.close()
            self.saver.wait()
            state, memory = self.state, peak_memory(self.world.device, self.engine.peak_bytes())
            self.log.event("end", step=state.step, reason=reason, best=state.best, best_step=state.best_step, **memory)
        if self.saver.not_copied:
            raise CheckpointError(f"training ended ({reason}), but its last checkpoint is in {self.saved} alone: {self.saver.not_copied}")
        return Outcome(reason, state.step, state.best, state.best_step)

    def _loop(self, wants_stop: Callable[[], bool]) -> str:
        """Steps until there is a reason to end."""
        train, plan, state = self.config.train, self.plan, self.state
        source, resumed_at = self.batches.from_step(state.step), state.step
        while True:
            step, fresh = state.step, state.step > resumed_at
            at_end = step >= plan.last
            if (fresh or at_end) and (at_end or due(step, plan.evaluate)) and state.best_step != step:
                self._evaluate()
                self._save()
                self.timer.restart()
            elif fresh and due(step, plan.checkpoint):
                self._save()
            if train.patience and state.worse >= train.patience:
                return "patience"
            if at_end:
                return "finished" if plan.last == plan.total else "max_steps"
            if step % self.pace.accumulation == 0 and self.vote.exchange(wants_stop() or self.saver.failed() or self.guard.tripped()):
                if fresh and not due(step, plan.evaluate):
                    self._save()
                return "stopped"
            self.timer.waiting()
            batch = stage("data")(next)(source)
            self._step(batch, logged=step == resumed_at or due(step + 1, train.log_every))

    def _evaluate(self) -> None:
        self.guard.settle()
        config, state = self.config, self.state
        split = trained_split(config)
        result = evaluate_texts(config, self.prepared, self.engine, self.classifier, self.world, split, config.train.evaluate_rows)
        result["dead_groups"] = dead_groups(self.classifier, self.world)
        self.log.event("eval", step=state.step, epoch=state.step / self.plan.per_epoch, split=split, **result)
        score = result[config.train.metric]
        state.worse = 0 if score > state.best else state.worse + 1
        if score > state.best:
            state.best, state.best_step = score, state.step

    def _save(self) -> None:
        self.guard.settle()  # a state with a NaN must not take a good one's place
        self.saver.save(self.state, self.engine, self.classifier)

    def _step(self, batch: Batch, logged: bool) -> None:
        config, state, guard, total = self.config, self.state, self.guard, self.plan.total
        step, factor = state.step, warmup_cosine(state.step, total, config.train.warmup, config.train.lowest_lr)
        state.step = step + 1
        self.timer.working(batch, watch=logged)
        rates = {"lr_encoder": factor * config.encoder.lr, "lr_output": factor * config.output.lr}
        loss = train_step(
            self.engine,
            self.classifier,
            batch,
            self.world,
            **rates,
            step=step,
            seed=config.run.seed,
            passes=self.pace.passes,
            accumulation=self.pace.accumulation,
            want_loss=logged,
            keep=keeps_batch(config.rewire, state.step, total),
            guard=guard,
        )
        if guard.skipped > state.skipped:
            state.skipped = guard.skipped
            self.log.event("skipped", step=state.step, skipped=state.skipped, left=config.train.skip_batches - state.skipped)
        if share := share_due(config.rewire, state.step, total):
            self._rewire(share)
        self.timer.stepped()
        self.profile.stepped(state.step)
        if logged and loss is not None:
            self._log_step(loss, rates)

    def _rewire(self, share: float) -> None:
        config, step, began = self.config, self.state.step, time.perf_counter()
        if config.rewire.grow == "embeddings":
            done, of = reembed(config, self.prepared, self.engine, self.classifier, self.world, share), {"renewed": share}
        else:
            of = {"fraction": share}
            if config.rewire.grow == "gradient":
                of["batches"] = min(config.rewire.batches, len(self.classifier.kept))  # 0: all were passed over, nothing is replaced
            done = rewire(self.classifier, config.rewire, share, step, self.world)
        taken = time.perf_counter() - began  # ``replaced`` was asked of the device, so it is done
        self.log.event("rewire", step=step, replaced=done.replaced, connections=done.connections, seconds=taken, **of)

    def _log_start(self, texts: int, changed: list[str]) -> None:
        self.log.event(
            "start",
            step=self.state.step,
            steps=self.plan.last,
            steps_per_epoch=self.plan.per_epoch,
            ranks=self.world.size,
            label_shards=self.world.shards.size,
            device=str(self.world.device),
            labels=self.prepared.order.labels,
            texts=texts,
            output_bytes=self.classifier.bytes(),
            changed=changed,
        )

    def _log_step(self, loss: Tensor, rates: dict[str, float]) -> None:
        step, value = self.state.step, loss.item()  # only here the host waits for the device
        if not math.isfinite(value):
            self.guard.settle(f"the loss became {value} at step {step}")
        epoch, spikes = step / self.plan.per_epoch, self.spikes.add(value)
        self.log.step(step=step, epoch=epoch, loss=value, loss_spikes=spikes, **rates, **self.timer.read())


def _restore(config: Config, saved: Path) -> None:
    checkpoint.put_back(saved)
    restore(config)
