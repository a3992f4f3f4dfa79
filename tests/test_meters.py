"""Stages and rates of a step: nothing is measured unless somebody watches; counts add up over ranks."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_prepared, run_ranks

from haste_dist import devices, meters
from haste_dist.config import load_config
from haste_dist.encoder import build_encoder
from haste_dist.loader import Batch
from haste_dist.meters import EncoderWork, StageTimes, StepTimer, encoder_work, stage, watched_by
from haste_dist.runlog import read_events
from haste_dist.train import train
from haste_dist.world import World, join_world


@stage("head")
def work(seconds: float = 0.0) -> int:
    time.sleep(seconds)
    return 3


def test_a_stage_is_measured_only_while_somebody_watches() -> None:
    times = StageTimes(torch.device("cpu"))
    assert work() == 3
    assert times.read() == {}
    with watched_by(times):
        work(0.01)
        work(0.01)
    work(0.01)
    assert 20 <= times.read()["head"] < 200
    assert times.read() == {}


def test_two_watch_at_once_and_a_failure_leaves_nobody_watching() -> None:
    seen: list[str] = []

    class Names:
        @contextlib.contextmanager
        def stage(self, name: str) -> Iterator[None]:
            seen.append(name)
            yield

    def fails() -> None:
        with watched_by(Names()), watched_by(StageTimes(torch.device("cpu"))):
            work()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == ["head"]
    assert meters._watchers == []


def test_the_work_of_an_encoder_is_counted_from_its_matrices() -> None:
    page = load_config(None, ["encoder.width=64", "encoder.heads=4", "encoder.layers=3"]).encoder
    encoder = build_encoder(page, 100, 0, 16)
    matrices = 3 * (4 * 64 * 64 + 2 * 64 * 256)
    assert encoder_work(encoder) == EncoderWork(6.0 * matrices, 12.0 * 3 * 64, 0.0)
    encoder.requires_grad_(False)
    assert encoder_work(encoder) == EncoderWork(2.0 * matrices, 4.0 * 3 * 64, 0.0)


def count_tokens(world: World) -> None:
    page = load_config(None, ["encoder.width=32", "encoder.heads=2", "encoder.layers=1"]).encoder
    timer = StepTimer(3 * world.size - 1, world, encoder_work(build_encoder(page, 50, 0, 8)), torch.float32, 1000)
    mask = torch.zeros(3, 8, dtype=torch.int64)
    mask[:, :5] = 1
    real = 3 if world.rank else 2  # the last text of the first rank is no text
    for _ in range(2):
        timer.waiting()
        timer.working(Batch(mask, mask, mask, np.arange(real), 5), watch=True)
        work()
        timer.stepped()
    values = timer.read()
    tokens = 5 * (3 * world.size - 1)
    assert np.isclose(values["padding"], 1 - tokens / (24 * world.size))
    assert np.isclose(values["tokens_per_s"] * values["step_ms"] / 1e3, tokens)
    assert "head_ms" in values
    assert "encoder_mfu" not in values


def test_tokens_are_real_ones_of_all_ranks() -> None:
    count_tokens(join_world("cpu"))
    run_ranks(2, count_tokens)


def test_a_known_gpu_has_rates_and_an_unknown_one_has_none() -> None:
    assert devices.known_device("NVIDIA H100 80GB HBM3") == devices.KNOWN["NVIDIA H100 80GB HBM3"]
    assert devices.known_device("NVIDIA H200") is not None
    assert devices.known_device("NVIDIA H200 NVL") != devices.known_device("NVIDIA H200")
    assert devices.known_device("NVIDIA GeForce GTX 970") is None
    assert all(devices.known_device(name) for name in devices.SHORT.values())


def test_step_lines_carry_stages_tokens_and_rates(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["train.max_steps=6", "train.log_every=3"])
    train(config, join_world("cpu"))
    steps = [event for event in read_events(config.run.folder) if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 3, 6]
    for event in steps:
        assert event["tokens_per_s"] > 0
        assert 0 <= event["padding"] < 1
        assert event["tail_gb_s"] > 0
        parts = sum(event[f"{name}_ms"] for name in meters.STAGES)
        assert parts > 0
    assert meters._watchers == []
