"""Ranks over NCCL: one killed, then one stopped, and checkpoints of two GPUs on one and back."""

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_recovery import hurt
from tiny import make_prepared, read_losses

from haste_dist.config import Config, save_config
from haste_dist.runlog import read_events

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
WORDS = ["launch.ranks=2", "launch.device=cuda", "launch.check_memory=false", "train.evaluate_every=0", "train.checkpoint_every=10"]
CLOSE = 0.02  # bfloat16, and gradients added in any order


def under_torchrun(ranks: int, config: Config, page: Path) -> list[float]:
    """The losses of a run of its own, or of its going on."""
    save_config(config, page)
    words = ["--nproc-per-node", str(ranks), "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "haste_launch.torchrun"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *words, str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return read_losses(config.run.folder)


def apart(ours: list[float], theirs: list[float]) -> float:
    return float(np.max(np.abs(np.array(ours) / np.array(theirs) - 1)))


def test_a_killed_and_a_hung_rank_over_nccl(tmp_path: Path) -> None:
    """In one run. The stopped rank leaves its peer in a collective, which NCCL's watchdog and Ray's health check end."""
    config = make_prepared(tmp_path, overrides=[*WORDS, "train.epochs=60", "launch.timeout=25"])
    save_config(config, tmp_path / "c.yaml")
    said = hurt(tmp_path / "c.yaml", config, [signal.SIGKILL, signal.SIGSTOP])
    print(said)
    events = read_events(config.run.folder)
    failures = [e for e in events if e["event"] == "failure"]
    for failure in failures:
        again = next(e for e in events if e["event"] == "step" and e["time"] > failure["time"])
        before = max(e["time"] for e in events if e["event"] == "step" and e["time"] < failure["time"])
        print(json.dumps({**failure, "first_step_again_s": round(again["time"] - before, 2)}))
    assert len(failures) == 2
    assert {e["ranks"] for e in events if e["event"] == "start"} == {2}
    whole = copy.deepcopy(config)
    whole.run.folder += "-whole"
    expected, losses = under_torchrun(2, whole, tmp_path / "whole.yaml"), read_losses(config.run.folder)
    print(f"{len(losses)} losses, at most {apart(losses, expected):.2e} from an unbroken run; last {losses[-1]:.5f}, {expected[-1]:.5f}")
    assert len(losses) == 60 * 12
    assert apart(losses, expected) < CLOSE


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_on_another_number_of_gpus(tmp_path: Path, first: int, then: int) -> None:
    config = make_prepared(tmp_path, overrides=[*WORDS, "train.epochs=5", "encoder.zero=1"])
    unbroken, stopped = copy.deepcopy(config), copy.deepcopy(config)
    unbroken.run.folder += "-unbroken"
    stopped.train.max_steps = 30
    expected = under_torchrun(first, unbroken, tmp_path / "unbroken.yaml")
    under_torchrun(first, stopped, tmp_path / "stopped.yaml")
    losses = under_torchrun(then, config, tmp_path / "c.yaml")
    assert [(e["step"], e["ranks"]) for e in read_events(config.run.folder) if e["event"] == "start"] == [(0, first), (30, then)]
    print(f"saved on {first}, gone on on {then}: at most {apart(losses[30:], expected[30:]):.2e} from an unbroken run")
    assert len(losses) == 60
    assert apart(losses, expected) < CLOSE
