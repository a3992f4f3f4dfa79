"""A run that nothing disturbed, and how another one is held against it."""

import json
import os
import statistics
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tiny import read_losses

from haste_dist import checkpoint
from haste_dist.checkpoint import CHECKPOINTS
from haste_dist.errors import HasteError
from haste_dist.run_lock import lock
from haste_dist.runlog import read_events
from haste_dist.verify import verify

INTERVAL = 10  # steps between checkpoints
HANG_SECONDS = 60.0


@dataclass
class Result:
    """What a campaign found."""

    kills: Counter = field(default_factory=Counter)
    recover_s: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # steps, at each start after the first
    corrupted: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)  # runs that gave up

    @property
    def sound(self) -> bool:
        return not (self.corrupted or self.silent or self.hangs or self.ended)

    def figures(self) -> dict[str, object]:
        times = sorted(self.recover_s)
        return {
            "kills": self.kills.total(),
            **{f"kills_{kind}": count for kind, count in sorted(self.kills.items())},
            "corrupted": len(self.corrupted),
            "silently_lost": len(self.silent),
            "hangs": len(self.hangs),
            "gave_up": len(self.ended),
            "lost_steps": max(self.lost, default=0),
            "lost_steps_p50": statistics.median(self.lost) if self.lost else 0,
            "interval": INTERVAL,
            "recover_p50_s": round(times[len(times) // 2], 2) if times else 0.0,
            "recover_p95_s": round(times[min(len(times) - 1, int(0.95 * len(times)))], 2) if times else 0.0,
            "recover_max_s": round(times[-1], 2) if times else 0.0,
        }


@dataclass
class Reference:
    """A run that nothing disturbed: files (with checksums) and state of each checkpoint, and all losses."""

    pages: dict[int, dict]
    losses: list[float]

    @classmethod
    def of(cls, run: Path) -> "Reference":
        found = checkpoint.complete(run / CHECKPOINTS)
        return cls({checkpoint.step_of(path): checkpoint.read_page(path) for path in found}, read_losses(run))


def look_at(run: Path, folder: Path, reference: Reference) -> None:
    """Holds the run folder against the reference, once nobody writes there; notes problems in a file beside it."""
    os.close(lock(run, HANG_SECONDS))
    problems = problems_of(run, reference)
    with (folder / "problems.jsonl").open("a") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems)


def problems_of(run: Path, reference: Reference) -> list[str]:
    """What is not as it would be without kills. Nobody must write there meanwhile."""
    saved = run / CHECKPOINTS
    found = checkpoint.complete(saved)
    if not found:
        return []
    problems = []
    try:
        verify(run)
    except HasteError as error:
        problems.append(str(error))
    for path in found:
        with suppress(HasteError):  # told by verify
            page, expected = checkpoint.read_page(path), reference.pages.get(checkpoint.step_of(path))
            if expected is not None and (page["files"], page["state"]) != (expected["files"], expected["state"]):
                problems.append(f"{path}: is not what an undisturbed run saves")
    return problems


def read_history(run: Path, reference: Reference, result: Result) -> None:
    """What the log of a run says of its losses and its starts."""
    reached = published = 0
    for event in read_events(run):
        if event["event"] == "step":
            reached = max(reached, event["step"])
            if event["loss"] != reference.losses[event["step"] - 1]:
                result.corrupted.append(f"{run}: loss {event['loss']} at step {event['step']}, not {reference.losses[event['step'] - 1]}")
        elif event["event"] == "checkpoint":
            published = max(published, event["step"])
        elif event["event"] == "start" and reached:
            result.lost.append(max(0, reached - event["step"]))
            if event["step"] < published:
                result.silent.append(f"{run}: step {published} had been published, went on from {event['step']}")
            if reached - event["step"] > 2 * INTERVAL:
                result.silent.append(f"{run}: {reached - event['step']} steps lost")
            reached = event["step"]
