"""What ranks tell each other on the host: work that takes longer than they wait for each other, errors, and a rank that dies at it."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_prepared, run_ranks

from haste_dist import scoring, train
from haste_dist.agreement import patiently
from haste_dist.config import Config
from haste_dist.errors import DataError, HasteError
from haste_dist.world import World, join_world

TIMEOUT, LONG = 2.0, 3.5  # seconds


def work_long(world: World) -> None:
    """The first rank does, then the second, and each time the other has nothing to do."""
    world = join_world("cpu", TIMEOUT)
    for busy in range(world.size):
        assert patiently(lambda busy=busy: time.sleep(LONG if world.rank == busy else 0) or world.rank, world) == world.rank  # type: ignore[misc]


def fail_late(world: World) -> None:
    world = join_world("cpu", TIMEOUT)

    def work() -> None:
        if world.is_first:
            time.sleep(LONG)
            raise DataError("shard 7: damaged")

    with pytest.raises(DataError if world.is_first else HasteError, match="shard 7: damaged"):
        patiently(work, world)


def die_at_it(world: World) -> None:
    """Its peer is told by gloo, or by the time-out; the work that it has itself does not keep it."""
    world = join_world("cpu", TIMEOUT)
    began = time.monotonic()

    def work() -> None:
        time.sleep(TIMEOUT / 4 if world.is_first else 100)
        if world.is_first:
            os._exit(0)

    with pytest.raises(RuntimeError):
        patiently(work, world)
    assert time.monotonic() - began < 2 * TIMEOUT
    os._exit(0)  # there is nobody to leave the group with


@pytest.mark.parametrize("task", [work_long, fail_late, die_at_it])
def test_work_may_take_longer_than_ranks_wait_for_each_other(task: Callable[[World], None]) -> None:
    run_ranks(2, task)


def start_slowly(world: World, config: Config) -> None:
    """Ends where all is checked: at the first thing that training and scoring make."""
    world = join_world("cpu", TIMEOUT)

    def slow(check: Callable[..., object], rank: int) -> Callable[..., object]:
        return lambda *given: (time.sleep(LONG if world.rank == rank else 0), check(*given))[1]

    def arrive(*_: object, **__: object) -> None:
        raise HasteError("all is checked")

    with pytest.MonkeyPatch.context() as patch:
        for module, name, rank in ((train, "check_data", 0), (train, "check_run", 1), (train, "restore", 0), (scoring, "check_data", 0)):
            patch.setattr(module, name, slow(getattr(module, name), rank))
        patch.setattr(scoring, "open_prepared", slow(scoring.open_prepared, 1))
        patch.setattr(train, "prior_bias", arrive)
        patch.setattr(scoring, "make_encoder", arrive)
        for start in (lambda: train.train(config, world), lambda: scoring.evaluate_run(config, world)):
            with pytest.raises(HasteError, match="all is checked"):
                start()


@pytest.mark.slow
def test_training_and_scoring_start_however_long_it_takes_to_check_and_fetch(tmp_path: Path) -> None:
    run_ranks(2, start_slowly, make_prepared(tmp_path))


def test_one_rank_works_as_it_is() -> None:
    world = join_world("cpu")
    assert patiently(threading.current_thread, world) is threading.main_thread()
    with pytest.raises(DataError, match="bad"):
        patiently(lambda: (_ for _ in ()).throw(DataError("bad")), world)
