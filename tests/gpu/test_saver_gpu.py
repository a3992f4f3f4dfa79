"""Checkpoints, guards and determinism on a GPU."""

import copy
import math
from pathlib import Path

import pytest
import torch
from test_checkpoint import classifier as cpu_classifier
from test_guards import batch
from test_saver import NoEncoder
from tiny import make_prepared

from haste_dist import checkpoint
from haste_dist.checkpoint import RunState
from haste_dist.classifier import Classifier
from haste_dist.config import CheckpointConfig, load_config
from haste_dist.errors import HasteError
from haste_dist.guards import LATE, Guard
from haste_dist.saver import Saver
from haste_dist.sealed import unseal
from haste_dist.sharding import label_shard
from haste_dist.train import train
from haste_dist.world import join_world

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_what_is_saved_is_the_state_at_the_save(tmp_path: Path) -> None:
    """bfloat16 labels, changed by the GPU right after the copy; the host memory is page-locked and the same at each save."""
    world = join_world("cuda")
    config = load_config(None, ["output.group_size=16", "output.fan_in=8"]).output
    layer = Classifier(config, label_shard(512, 4096, 16, 65_000, 1, 0), 64, 1, world.device)
    with Saver(tmp_path, CheckpointConfig(), world, "order") as saver:
        saver.reserve(layer)
        held = {name: tensor.data_ptr() for name, tensor in saver._host.items()}
        assert all(tensor.is_pinned() for tensor in saver._host.values())
        for step in (1, 2):
            expected = {name: tensor.clone() for name, (tensor, _) in layer.tensors().items()}
            saver.save(RunState(step), NoEncoder(), layer)  # type: ignore[arg-type]
            for tensor, _ in layer.tensors().values():
                tensor.zero_()
            saver.wait()
            assert checkpoint.load(tmp_path / f"step-{step:08d}", None, layer, "order").step == step
            assert all(torch.equal(tensor, expected[name]) for name, (tensor, _) in layer.tensors().items())
        assert held == {name: tensor.data_ptr() for name, tensor in saver._host.items()}


def test_a_bad_number_is_found_without_waiting(tmp_path: Path) -> None:
    guard = Guard(tmp_path, join_world("cuda"))
    for step in range(1, 3 + LATE):
        dx = torch.randn(64, 8, device="cuda")
        dx[3, 7] = math.inf if step == 1 else 0.0
        guard.watch(step, batch(step), dx=dx)
    assert guard.tripped()
    with pytest.raises(HasteError, match=r"first seen at step 1 in dx \(inf\) on rank 0"):
        guard.settle()


def test_a_deterministic_run_gives_the_same_bits_twice(tmp_path: Path) -> None:
    words = ["run.deterministic=true", "train.max_steps=12", "launch.device=cuda", "encoder.dropout=0.1", "output.tail_dropout=0.1"]
    first = make_prepared(tmp_path, overrides=words)
    second = copy.deepcopy(first)
    second.run.folder += "-again"
    pages = []
    try:
        for config in (first, second):
            train(config, join_world("cuda"))
            pages.append(unseal((Path(config.run.folder) / "checkpoints/step-00000012/state.json").read_bytes())["files"])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
    assert pages[0] == pages[1]


def test_a_checkpoint_of_a_cpu_loads_on_a_gpu(tmp_path: Path) -> None:
    with Saver(tmp_path, CheckpointConfig(), join_world("cpu"), "order") as saver:
        saver.save(RunState(1), NoEncoder(), cpu_classifier(1, 0, 1))  # type: ignore[arg-type]
    layer = cpu_classifier(1, 0, 2)
    for part in (layer.head, layer.tail):
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.cuda())
    checkpoint.load(tmp_path / "step-00000001", None, layer, "order")
    expected = cpu_classifier(1, 0, 1).tensors()
    assert all(torch.equal(tensor.cpu(), expected[name][0]) for name, (tensor, _) in layer.tensors().items())
