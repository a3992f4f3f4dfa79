"""Ranks that start again after a failure: from the newest checkpoint, on what is left of the cluster, a bounded number of times.

A failure is a rank that died, hung until its peers' collectives timed out, or lost its node. What would only happen again is
none: a user's mistake (HasteError) or a bug. ``launch.retries`` bounds the restarts in a row that bring no new checkpoint, so
a long run outlives any number of failures as long as it gets on between them.

Ray Train can restart ranks itself, but it would also repeat mistakes, and its elastic mode stops healthy ranks to resize them.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

from haste_dist.config import Config
from haste_dist.errors import HasteError, OutOfMemory
from haste_dist.runlog import FILE, RunLog, read_events

COUNT_SECONDS = 1.0  # between two looks at a cluster that lacks ranks


def until_done(
    config: Config,
    ranks: int,
    start: Callable[[int], BaseException | None],
    available: Callable[[], int],
    pause: Callable[[float], bool],
) -> None:
    """Starts ``ranks`` ranks until they are done, and again after failures; raises the error that ends the run.

    ``start(ranks)`` runs them and returns what ended them, None if they are done; ``available()`` is how many ranks the cluster can
    hold now; ``pause(seconds)`` sleeps and tells whether somebody has asked to stop.
    """
    run, wanted = Path(config.run.folder), ranks
    left, reached = config.launch.retries, newest_step(run)
    while (error := start(ranks)) is not None:
        if not may_pass(error):
            raise user_error(error) or error
        step = newest_step(run)
        left = config.launch.retries - 1 if step > reached else left - 1
        reached = max(step, reached)
        if left < 0:
            raise user_error(error) or error
        _note(run, error, step, left)
        ranks = wait_for_ranks(config, wanted, available, pause)
        if not ranks:
            return


def wait_for_ranks(
    config: Config,
    wanted: int,
    available: Callable[[], int],
    pause: Callable[[float], bool],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """How many ranks to start after a failure: ``wanted`` as soon as the cluster has room for them, or after ``launch.wait`` seconds what
    it has, if ``launch.elastic`` allows fewer: whole replicas, where the labels have some. 0 if somebody asked to stop. Raises HasteError
    where there is too little room."""
    end, parts = clock() + config.launch.wait, config.launch.label_parallel or 1
    while (have := available()) < wanted:
        if clock() >= end:
            if config.launch.elastic and have >= parts:
                return have // parts * parts
            too_few = config.launch.elastic and 0 < have < parts
            room = f"{have} of {wanted}, after {config.launch.wait:g} s{f', and label_parallel={parts} needs {parts}' if too_few else ''}"
            raise HasteError(
                f"the run lost ranks and cannot go on: the cluster has room for {room}; "
                f"the same command resumes it once they are back, launch.{'label_parallel=0' if too_few else 'elastic=true'} with fewer"
            )
        if pause(COUNT_SECONDS):
            return 0
    return wanted


def user_error(error: BaseException) -> HasteError | None:
    """What a user can do something about, out of Ray's wrapping: the HasteError that a rank raised, or memory that is full; else None."""
    found = next((one for one in _causes(error) if isinstance(one, HasteError)), None)
    return found or next((OutOfMemory(line) for one in _causes(error) if (line := _full(one))), None)


def _full(error: BaseException) -> str:
    """Which memory is full and what to do, "" where none is: a GPU's, or a machine's, whose ranks Ray ends before the kernel would."""
    import torch
    from ray.exceptions import OutOfMemoryError

    if isinstance(error, torch.OutOfMemoryError):
        return f"a GPU's memory is full ({str(error).splitlines()[0]}); haste plan says which settings fit"
    killed = getattr(error, "health_check_failure", error)
    if not isinstance(killed, OutOfMemoryError):
        return ""
    said = re.search(r"\(IP: (\S+?),.*?was (\S+ used / \S+ limit)", str(killed))
    where = f"of {said[1]} is full ({said[2]})" if said else "of a machine is full"
    return (
        f"the memory {where}, so Ray ended a rank; smaller batches (train.batch_size, or train.accumulation), fewer labels or fewer ranks "
        "there take less, and so does all else that runs on it"
    )


def may_pass(error: BaseException) -> bool:
    """Whether it makes sense to start again: a rank was lost, or all that is said is what ranks say whose peers were lost."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError
    from torch import OutOfMemoryError

    causes = _causes(error)
    if any(isinstance(one, HasteError | OutOfMemoryError) for one in causes):
        return False
    lost = (RayError, RayTrainError)
    return any(isinstance(one, lost) for one in causes) or all(isinstance(one, RuntimeError | OSError) for one in causes)


def newest_step(run: Path) -> int:
    """Steps of the newest complete checkpoint, 0 without one."""
    from haste_dist import checkpoint  # torch, which is not to load before Ray starts

    found = checkpoint.newest(run / checkpoint.CHECKPOINTS)
    return checkpoint.step_of(found) if found else 0


def _causes(error: BaseException) -> list[BaseException]:
    """What the ranks raised, or Ray's controller, or the error itself."""
    inner = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    return [getattr(one, "_base_exc", one) for one in inner]


def _note(run: Path, error: BaseException, step: int, left: int) -> None:
    """Writes into the run's log what happened and what was lost: the steps since the checkpoint, as far as they were logged."""
    logged = [event["step"] for event in read_events(run) if event["event"] == "step"] if (run / FILE).exists() else []
    lost = max(0, max(logged, default=0) - step)
    with RunLog(run) as log:
        log.event("failure", step=step, lost_steps=lost, left=left, reason=reason_of(error))


def reason_of(error: BaseException) -> str:
    """In a few words; a rank that died says more than its peers, who only miss it."""
    from ray.exceptions import RayError

    died = [rank for rank, one in getattr(error, "worker_failures", {}).items() if isinstance(getattr(one, "_base_exc", one), RayError)]
    if died:
        return f"rank {', '.join(map(str, sorted(died)))} died"
    return (str(_causes(error)[0]).strip() or type(error).__name__).splitlines()[0][:160]
