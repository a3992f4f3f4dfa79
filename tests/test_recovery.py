"""Runs that survive: a killed rank, a hung rank and a lost node cost steps since the last checkpoint, nothing else."""

import copy
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import hosts
import numpy as np
import pytest
import torch
from ray_nodes import SECONDS, alive_with, answers, command_of, kill_all, ranks_with, start_node, wait_for
from tiny import FULL, free_port, make_prepared, read_losses

from haste_dist.config import Config, save_config
from haste_dist.errors import HasteError
from haste_dist.runlog import read_events
from haste_dist.train import train
from haste_dist.world import join_world
from haste_launch.attempts import may_pass, newest_step, until_done, wait_for_ranks

IN_HOSTS = pytest.mark.skipif(not FULL and hosts.are_possible(), reason="test_hosts kills a rank too; HASTE_FULL=1 runs it")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, marks=IN_HOSTS),
        pytest.param(signal.SIGSTOP, marks=pytest.mark.skipif(not FULL, reason="HASTE_FULL=1 runs it")),
    ],
)
def test_a_killed_or_hung_rank_changes_nothing_but_the_time(tmp_path: Path, number: int) -> None:
    config = make_prepared(tmp_path, overrides=["launch.ranks=2", "train.epochs=30", "train.evaluate_every=0", "train.checkpoint_every=10"])
    config.launch.timeout = 20 if number == signal.SIGSTOP else 120
    save_config(config, tmp_path / "c.yaml")
    said = hurt(tmp_path / "c.yaml", config, [number])
    assert said.count("going on from step ") == 1
    assert [e["event"] for e in read_events(config.run.folder)].count("failure") == 1
    whole = copy.deepcopy(config)
    whole.run.folder += "-whole"
    train(whole, join_world("cpu"))
    np.testing.assert_allclose(read_losses(config.run.folder), read_losses(whole.run.folder), rtol=1e-5)


def hurt(page: Path, config: Config, numbers: list[int]) -> str:
    """Runs ``haste train page``, sends the second rank each of the signals once it is some steps further; what the run said at its end."""
    mark, run = f"mark-{uuid.uuid4()}", Path(config.run.folder)
    words = [sys.executable, "-m", "haste_launch.cli", "train", str(page)]
    process = subprocess.Popen(words, env={**os.environ, "HASTE_TEST_MARK": mark}, stderr=subprocess.PIPE, text=True)
    try:
        for failures, number in enumerate(numbers):
            wait_for(lambda failures=failures: failures_and_steps(run) >= (failures, 12) and newest_step(run))
            os.kill(ranks_with(mark)[1], number)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
        wait_for(lambda: not alive_with(mark), 30)
        return said
    finally:
        kill_all(mark)


def failures_and_steps(run: Path) -> tuple[int, int]:
    """How often ranks failed, and how many steps the present ones have done."""
    events = read_events(run) if (run / "metrics.jsonl").exists() else []
    starts = [i for i, e in enumerate(events) if e["event"] == "start"]
    failures = [i for i, e in enumerate(events) if e["event"] == "failure"]
    if not starts or (failures and failures[-1] > starts[-1]):
        return len(failures), 0
    return len(failures), sum(e["event"] == "step" for e in events[starts[-1] :])


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="a minute long; set HASTE_FULL=1")
def test_a_lost_node_leaves_a_run_that_goes_on_with_fewer_ranks(tmp_path: Path, short: Path) -> None:
    """A cluster of two nodes of one CPU each on this machine; the second, which holds a rank, is killed whole."""
    config = make_prepared(tmp_path, overrides=["launch.ranks=2", "train.epochs=20", "train.evaluate_every=0", "train.checkpoint_every=10"])
    config.launch.elastic, config.launch.wait, config.launch.timeout = True, 1.0, 10
    save_config(config, tmp_path / "c.yaml")
    run, port = Path(config.run.folder), free_port()
    marks = [f"mark-{uuid.uuid4()}" for _ in range(2)]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    environment |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
    try:
        start_node(["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}"], marks[0], environment)
        wait_for(lambda: answers(port))
        start_node([f"--address=127.0.0.1:{port}"], marks[1], environment)
        wait_for(lambda: any(b"raylet" in command_of(pid) for pid in alive_with(marks[1])))
        words = [sys.executable, "-m", "haste_launch.cli", "train", str(tmp_path / "c.yaml"), f"launch.address=127.0.0.1:{port}"]
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: (run / "metrics.jsonl").exists() and step_of(run) > 12 and newest_step(run))
        assert len(ranks_with(marks[1])) == 1
        kill_all(marks[1])
        _, said = process.communicate(timeout=SECONDS)
    finally:
        for mark in marks:
            kill_all(mark)
    assert process.returncode == 0, said
    assert [e["ranks"] for e in read_events(run) if e["event"] == "start"] == [2, 1]
    assert "going on from step 10" in said or "going on from step 20" in said
    losses = read_losses(run)
    assert len(losses) == 20 * 12
    assert losses[-1] < losses[0]


def step_of(run: Path) -> int:
    return max((e["step"] for e in read_events(run) if e["event"] == "step"), default=0)


class Lost(Exception):
    """Shaped like Ray's error."""

    def __init__(self, *failures: BaseException):
        super().__init__("ranks failed")
        self.worker_failures = dict(enumerate(failures))


def make_checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")


def test_what_may_pass() -> None:
    from ray.exceptions import RayActorError

    peer = RuntimeError("connection closed by peer")
    assert may_pass(Lost(peer, peer))
    assert may_pass(Lost(RayActorError()))
    assert may_pass(Lost(RayActorError(), KeyError("a peer's bug does not hide that a rank died")))
    assert not may_pass(Lost(KeyError("a bug")))
    assert not may_pass(Lost(peer, HasteError("a mistake")))
    assert not may_pass(Lost(peer, torch.OutOfMemoryError("it will be as full again")))
    assert not may_pass(KeyError("a bug of the driver"))


def test_restarts_are_bounded_by_those_without_progress(tmp_path: Path) -> None:
    config = Config()
    config.run.folder, config.launch.retries = str(tmp_path), 2
    started: list[int] = []

    def start(ranks: int) -> BaseException:
        started.append(ranks)
        if len(started) == 2:
            make_checkpoint(tmp_path, 10)
        return Lost(RuntimeError("a peer is gone"))

    with pytest.raises(Lost):
        until_done(config, 2, start, lambda: 2, lambda _: False)
    assert len(started) == 4
    failures = [e for e in read_events(tmp_path) if e["event"] == "failure"]
    assert [(e["step"], e["left"]) for e in failures] == [(0, 1), (10, 1), (10, 0)]
    assert failures[0]["reason"] == "a peer is gone"


def test_a_mistake_is_told_at_once(tmp_path: Path) -> None:
    config = Config()
    config.run.folder = str(tmp_path)
    with pytest.raises(HasteError, match="a mistake"):
        until_done(config, 2, lambda _: Lost(HasteError("a mistake")), lambda: 2, lambda _: False)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("elastic", "room", "expected"),
    [
        (False, [1, 1, 2], 2),
        (True, [1, 1, 2], 2),
        (True, [1] * 99, 1),
        (False, [1] * 99, None),
        (True, [0] * 99, None),
    ],
)
def test_lost_ranks_are_waited_for(elastic: bool, room: list[int], expected: int | None) -> None:
    config, now, left = Config(), SimpleNamespace(t=0.0), iter(room)
    config.launch.elastic, config.launch.wait = elastic, 10.0

    def pause(seconds: float) -> bool:
        now.t += seconds
        return False

    if expected is None:
        with pytest.raises(HasteError, match=r"room for \d of 2, after 10 s"):
            wait_for_ranks(config, 2, lambda: next(left), pause, lambda: now.t)
        assert now.t == 10
    else:
        assert wait_for_ranks(config, 2, lambda: next(left), pause, lambda: now.t) == expected


@pytest.mark.parametrize(("room", "expected"), [(7, 6), (6, 6), (3, 3), (2, None)])
def test_what_is_left_makes_whole_replicas(room: int, expected: int | None) -> None:
    config = Config()
    config.launch.elastic, config.launch.wait, config.launch.label_parallel = True, 0.0, 3
    if expected is None:
        with pytest.raises(HasteError, match=r"2 of 9, after 0 s, and label_parallel=3 needs 3;.* launch.label_parallel=0 with fewer"):
            wait_for_ranks(config, 9, lambda: room, lambda _: False)
    else:
        assert wait_for_ranks(config, 9, lambda: room, lambda _: False) == expected


def test_a_wish_to_stop_ends_the_waiting() -> None:
    assert wait_for_ranks(Config(), 2, lambda: 1, lambda _: True) == 0
