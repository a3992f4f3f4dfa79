"""Learning rate and rewiring over the steps of a run: pure functions of the step."""

import math


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
