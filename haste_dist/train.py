"""The training loop, as each rank runs it. Knows torch.distributed only; launch/ starts it through Ray or torchrun.

The order within a pass is fixed: evaluate, save, stop, step. The loop runs once more than there are steps, so that the end
is no special case. A step is one step of the output layer; evaluations, checkpoints and stops fall where an encoder update is complete.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from haste_dist import checkpoint
from haste_dist.agreement import same_error
from haste_dist.augmentation import check_label_texts
from haste_dist.basis import check_basis_features
from haste_dist.centroids import check_centroids, start_from_centroids
from haste_dist.checkpoint import RunState
from haste_dist.checkpoint_store import CheckpointStore
from haste_dist.classifier import check_basis, feature_slice
from haste_dist.collectives import StopVote, barrier
from haste_dist.config import Config, TrainConfig
from haste_dist.determinism import make_deterministic
from haste_dist.engine import EncoderEngine
from haste_dist.errors import CheckpointError
from haste_dist.evaluate import evaluate_texts
from haste_dist.guards import Guard, LossSpikes, dead_groups
from haste_dist.held_out import check_held_out
from haste_dist.label_groups import GROUPS_FILE
from haste_dist.loader import BatchMaker, open_texts
from haste_dist.meters import StepTimer, encoder_work, peak_memory, stage, tail_traffic
from haste_dist.model import Prepared, check_features, make_classifier, make_encoder, open_prepared, prior_bias, save_run_files
from haste_dist.profiling import StepProfile
from haste_dist.readers import training_batches
from haste_dist.reembedding import reembed
from haste_dist.rewire import keeps_batch, rewire, share_due
from haste_dist.run_lock import alone
from haste_dist.runlog import RunLog
from haste_dist.saver import Saved, Saver
from haste_dist.schedule import due, warmup_cosine
from haste_dist.step import train_step
from haste_dist.trackers import check_trackers, open_trackers
from haste_dist.verify import check_data
from haste_dist.world import World, split_world

CHECKPOINTS = "checkpoints"
LOCK_SECONDS = 120.0  # that a start waits for ranks of an earlier one; a network file system may take long to see that they are gone


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``reason`` is finished, patience, max_steps or stopped (asked to)."""

    reason: str
    step: int
    best: float
    best_step: int


@dataclass(frozen=True)
class Pace:
    """What a step is made of."""

    texts: int  # over all ranks
    passes: int  # of the encoder, one behind the other
    accumulation: int  # steps an encoder update


def pace(train: TrainConfig) -> Pace:
    """From batch size and accumulation. Pure."""
    if train.classifier_step == "global":
        return Pace(train.batch_size * train.accumulation, train.accumulation, 1)
    return Pace(train.batch_size, 1, train.accumulation)


@dataclass(frozen=True)
class Plan:
    """Steps of a run; all but ``total`` are intervals, 0 for never, and all are multiples of the accumulation."""

    per_epoch: int
    total: int
    last: int
    evaluate: int
    checkpoint: int


def plan_steps(config: Config, per_epoch: int) -> Plan:
    """Turns epochs into steps. Pure."""
    train, whole = config.train, pace(config.train).accumulation

    def up(steps: float) -> int:
        return max(1, math.ceil(round(steps / whole, 6))) * whole if steps > 0 else 0

    total = max(whole, up(train.epochs * per_epoch))
    last = min(total, up(train.max_steps)) if train.max_steps else total
    return Plan(per_epoch, total, last, up(train.evaluate_every * per_epoch), up(train.checkpoint_every))


def check_run(config: Config) -> Prepared:
    """All that can be checked before ranks start. Raises HasteError."""
    check_trackers(config)
    prepared = open_prepared(config)
    width = check_features(config, prepared.manifest)
    if config.output.basis == "labels":
        check_basis(prepared.order.basis, feature_slice(config.output.tail_features, width).width)
        check_basis_features(config, prepared.folder / GROUPS_FILE)
    check_held_out(config, prepared.folder / GROUPS_FILE)
    if config.data.label_texts:
        check_label_texts(prepared.folder, prepared.manifest)
    if config.output.start == "centroids":
        check_centroids(prepared, width)
    folder = Path(config.run.folder) / CHECKPOINTS
    found = checkpoint.newest(folder)
    if config.run.resume == "must" and found is None:
        raise CheckpointError(f"{folder}: no checkpoint to resume from (run.resume=must)")
    if config.run.resume == "never" and found is not None:
        raise CheckpointError(f"{folder}: holds a run already ({found.name}); choose another run.folder or run.resume=auto")
    if found is not None:
        checkpoint.read_page(found)
    return prepared


def restore(config: Config) -> None:
    """Fetches what ``checkpoint.store`` has that is newer than the run folder's checkpoints. Raises HasteError."""
    if not config.checkpoint.store:
        return
    store = CheckpointStore(config.checkpoint.store)
    store.check()
    if config.run.resume != "never":
        store.restore(Path(config.run.folder) / CHECKPOINTS)
    elif store.steps():
        raise CheckpointError(f"{store.place}: holds a run already; choose another checkpoint.store or run.resume=auto")


def train(config: Config, world: World, wants_stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Trains until the epochs are over, patience runs out, or ``wants_stop`` turns true on any rank. Every rank calls it."""
    with alone(Path(config.run.folder), world, min(LOCK_SECONDS, config.launch.timeout / 2)):
        return _train(config, world, wants_stop)


def _train(config: Config, world: World, wants_stop: Callable[[], bool]) -> Outcome:
    config = make_deterministic(config) if config.run.deterministic else config
    world = split_world(world, config.launch.label_parallel, config.launch.timeout)
    run = Path(config.run.folder)
    saved = run / CHECKPOINTS
    with same_error(world):
        if world.is_first:
            checkpoint.put_back(saved)
            restore(config)
    prepared = check_run(config)
    with same_error(world):
        if world.is_first:
            check_data(prepared.folder)
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, bias_init=prior_bias(config, prepared.manifest)))
    data = config.data
    texts = open_texts(prepared.folder, prepared.manifest, "train", data.dev_fraction, config.run.seed, data.label_texts)
    held_out = "dev" if data.dev_fraction else "test"
    most_labels = prepared.manifest.splits["train"].max_labels
    pin = world.device.type == "cuda"
    maker = BatchMaker(texts, prepared.order.row_of_label, most_labels, prepared.manifest.tokenizer.pad_id, world.size, world.rank, pin)
    going = pace(config.train)
    batches = training_batches(config, maker, going.texts, prepared.folder)
    plan = plan_steps(config, batches.steps_per_epoch)

    encoder = make_encoder(config, prepared.manifest)
    work = encoder_work(encoder)
    state, start = RunState(), checkpoint.newest(saved)
    classifier = make_classifier(config, prepared.order, encoder.width, world, drawn=start is None)
    if world.is_first:
        save_run_files(run, config, encoder, prepared.folder)
    engine = EncoderEngine(encoder, config.encoder, world)
    if start is not None:
        with same_error(world):
            state = checkpoint.load(start, engine, classifier, prepared.order.fingerprint)
    elif config.output.start == "centroids":
        start_from_centroids(classifier, prepared)
    barrier(world)

    with same_error(world):
        trackers = open_trackers(config, state.step) if world.is_first else []
    log = RunLog(run, enabled=world.is_first, trackers=trackers)
    log.event(
        "start",
        step=state.step,
        steps=plan.last,
        steps_per_epoch=plan.per_epoch,
        ranks=world.size,
        label_shards=world.shards.size,
        device=str(world.device),
        labels=prepared.order.labels,
        texts=len(texts),
        output_bytes=classifier.bytes(),
    )
    vote, timer = StopVote(world), StepTimer(going.texts, world, work, engine.dtype, tail_traffic(classifier.tail))
    profile = StepProfile(config.train.profile, run, world, log)
    source = batches.from_step(state.step)
    resumed_at, reason = state.step, ""

    def tell(done: Saved) -> None:
        log.event("checkpoint", **dataclasses.asdict(done))

    guard, spikes = Guard(run, world, config.train.skip_batches, state.skipped), LossSpikes()
    saver = Saver(saved, config.checkpoint, world, prepared.order.fingerprint, tell)
    saver.reserve(classifier)

    def save_now() -> None:
        guard.settle()  # a state with a NaN must not take a good one's place
        saver.save(state, engine, classifier)

    def evaluate_now() -> None:
        guard.settle()
        result = evaluate_texts(config, prepared, engine, classifier, world, held_out, config.train.evaluate_rows)
        log.event(
            "eval", step=state.step, epoch=state.step / plan.per_epoch, split=held_out, **result, dead_groups=dead_groups(classifier, world)
        )
        score = result[config.train.metric]
        state.worse = 0 if score > state.best else state.worse + 1
        if score > state.best:
            state.best, state.best_step = score, state.step

    with log, saver:
        while True:
            step, fresh = state.step, state.step > resumed_at
            at_end = step >= plan.last
            if (fresh or at_end) and (at_end or due(step, plan.evaluate)) and state.best_step != step:
                evaluate_now()
                save_now()
                timer.restart()
            elif fresh and due(step, plan.checkpoint):
                save_now()
            if config.train.patience and state.worse >= config.train.patience:
                reason = "patience"
            elif at_end:
                reason = "finished" if plan.last == plan.total else "max_steps"
            elif step % going.accumulation == 0 and vote.exchange(wants_stop() or saver.failed() or guard.tripped()):
                reason = "stopped"
                if fresh and not due(step, plan.evaluate):
                    save_now()
            if reason:
                break

            timer.waiting()
            batch = stage("data")(next)(source)
            factor = warmup_cosine(step, plan.total, config.train.warmup, config.train.lowest_lr)
            state.step = step + 1
            logged = state.step == resumed_at + 1 or due(state.step, config.train.log_every)
            timer.working(batch, watch=logged)
            loss = train_step(
                engine,
                classifier,
                batch,
                world,
                lr_encoder=factor * config.encoder.lr,
                lr_output=factor * config.output.lr,
                step=step,
                seed=config.run.seed,
                passes=going.passes,
                accumulation=going.accumulation,
                want_loss=logged,
                keep=keeps_batch(config.rewire, state.step, plan.total),
                guard=guard,
            )
            if guard.skipped > state.skipped:
                state.skipped = guard.skipped
                log.event("skipped", step=state.step, skipped=state.skipped, left=config.train.skip_batches - state.skipped)
            if share := share_due(config.rewire, state.step, plan.total):
                if config.rewire.grow == "embeddings":
                    done, of = reembed(config, prepared, engine, classifier, world, share), {"renewed": share}
                else:
                    done, of = rewire(classifier, config.rewire, share, state.step, world), {"fraction": share}
                log.event("rewire", step=state.step, replaced=done.replaced, connections=done.connections, **of)
            timer.stepped()
            profile.stepped(state.step)
            if logged and loss is not None:
                value = loss.item()  # only here the host waits for the device
                if not math.isfinite(value):
                    guard.settle(f"the loss became {value} at step {state.step}")
                log.step(
                    step=state.step,
                    epoch=state.step / plan.per_epoch,
                    loss=value,
                    loss_spikes=spikes.add(value),
                    lr_encoder=factor * config.encoder.lr,
                    lr_output=factor * config.output.lr,
                    **timer.read(),
                )
        vote.close()
        saver.wait()
        memory = peak_memory(world.device, engine.peak_bytes())
        log.event("end", step=state.step, reason=reason, best=state.best, best_step=state.best_step, **memory)
    if saver.not_copied:
        raise CheckpointError(f"training ended ({reason}), but its last checkpoint is in {saved} alone: {saver.not_copied}")
    return Outcome(reason, state.step, state.best, state.best_step)
