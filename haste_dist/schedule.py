"""The steps of a run: how many there are, and learning rates and rewiring over them. Pure functions."""

import math
from dataclasses import dataclass

from haste_dist.config import Config, TrainConfig


@dataclass(frozen=True)
class Pace:
    """What a step is made of."""

    texts: int  # over all ranks
    passes: int  # of the encoder, one behind the other
    accumulation: int  # steps an encoder update


def pace(train: TrainConfig) -> Pace:
    """From batch size and accumulation."""
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
    """Turns epochs into steps."""
    train, whole = config.train, pace(config.train).accumulation

    def up(steps: float) -> int:
        return max(1, math.ceil(round(steps / whole, 6))) * whole if steps > 0 else 0

    total = max(whole, up(train.epochs * per_epoch))
    last = min(total, up(train.max_steps)) if train.max_steps else total
    return Plan(per_epoch, total, last, up(train.evaluate_every * per_epoch), up(train.checkpoint_every))


def warmup_cosine(step: int, total: int, warmup: float, lowest: float = 0.0) -> float:
    """Factor on the peak learning rate: a line from 0 over the first ``warmup`` of training, then half a cosine to 0, or to ``lowest``,
    where it stays."""
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    return max(lowest, 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1e-9, total - rising)))))


def rewire_fraction(step: int, total: int, interval: int, until: float, fraction: float) -> float:
    """Share of connections to replace after ``step`` steps (RigL's cosine decay); 0 when no rewiring is due."""
    end = until * total
    if not interval or step <= 0 or step % interval or step >= end:
        return 0.0
    return 0.5 * fraction * (1 + math.cos(math.pi * step / end))


def due(step: int, interval: int) -> bool:
    """True at each whole ``interval`` after step 0; an interval of 0 is never due."""
    return interval > 0 and step > 0 and step % interval == 0
