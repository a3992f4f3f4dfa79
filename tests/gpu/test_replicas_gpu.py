"""Replicas of the label shards over NCCL: the same model as one shard a rank."""

import copy
from pathlib import Path

import pytest
import torch
from test_recovery_gpu import CLOSE, WORDS, apart, under_torchrun
from tiny import make_prepared

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_two_replicas_train_as_two_shards_do(tmp_path: Path, grow: str) -> None:
    words = ["train.epochs=5", "rewire.until=1", f"rewire.grow={grow}", "output.tail_dropout=0.1"]
    config = make_prepared(tmp_path, overrides=[*WORDS, *words])
    replicas = copy.deepcopy(config)
    replicas.run.folder += "-replicas"
    replicas.launch.label_parallel = 1
    expected = under_torchrun(2, config, tmp_path / "shards.yaml")
    losses = under_torchrun(2, replicas, tmp_path / "replicas.yaml")
    print(f"two replicas against two shards: at most {apart(losses, expected):.2e} apart over {len(losses)} steps")
    assert len(losses) == 60
    assert apart(losses, expected) < CLOSE
