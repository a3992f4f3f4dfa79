"""The encoder's settings: what should change nothing changes nothing, and adapters train, resume and predict."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_prepared, read_losses, run_ranks

from haste_dist.config import Config, load_config
from haste_dist.errors import ConfigError
from haste_dist.train import train
from haste_dist.world import World, join_world

STEPS = "train.max_steps=12"


def train_all(world: World, configs: list[Config]) -> None:
    for config in configs:
        train(config, world)


def test_checkpointing_and_compiling_change_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, whose masks must come back in the backward pass."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # without the minute of C++
    plain = make_prepared(tmp_path, overrides=[STEPS, "encoder.dropout=0.1"])
    compiled = make_prepared(tmp_path / "compiled", overrides=[STEPS, "encoder.compile=true", "encoder.dropout=0"])
    checkpointed, reference = copy.deepcopy(plain), copy.deepcopy(compiled)
    checkpointed.encoder.checkpointing, reference.encoder.compile = True, False
    for config in (checkpointed, reference):
        config.run.folder += "-other"
    train_all(join_world("cpu"), [plain, checkpointed, compiled, reference])
    assert read_losses(checkpointed.run.folder) == read_losses(plain.run.folder)
    np.testing.assert_allclose(read_losses(compiled.run.folder), read_losses(reference.run.folder), rtol=1e-5)


def test_attention_kernels_that_are_missing_are_told(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["encoder.attention=flash"])
    with pytest.raises(ConfigError, match="flash-attn or a GPU for it is missing"):
        train(config, join_world("cpu"))


def test_adapters_that_cannot_be_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"encoder.lora_rank=4: encoder.frozen=true trains nothing"):
        load_config(None, ["encoder.lora_rank=4", "encoder.frozen=true"])
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'haste-dist\[lora\]'"):
        train(make_prepared(tmp_path, overrides=["encoder.lora_rank=4"]), join_world("cpu"))


@pytest.mark.slow
def test_adapters_train_resume_and_predict(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from haste_dist.predictor import Predictor

    one = make_prepared(tmp_path, overrides=["train.max_steps=24", "encoder.lora_rank=4", "encoder.lr=1e-3", "encoder.zero=1"])
    broken, two = copy.deepcopy(one), copy.deepcopy(one)
    broken.run.folder += "-broken"
    two.run.folder += "-two"
    train(one, join_world("cpu"))
    for steps in (10, 24):
        broken.train.max_steps = steps
        train(broken, join_world("cpu"))
    run_ranks(2, train_all, [two])
    losses = read_losses(one.run.folder)
    assert read_losses(broken.run.folder) == losses
    np.testing.assert_allclose(read_losses(two.run.folder), losses, rtol=1e-5)

    folder = Path(one.run.folder) / "checkpoints"
    saved = load_file(folder / f"step-{json.loads((folder / 'best.json').read_text())['step']:08d}" / "encoder.safetensors")
    adapters = {name for name in saved if "lora_" in name}
    assert len(adapters) == 2 * 6  # A and B of the six linear layers of its one block
    assert all(saved[name].any() for name in adapters)
    moments = load_file(folder / "step-00000024" / "optimizer.safetensors")
    assert {name.partition(".")[2] for name in moments if name != "step"} == adapters
    texts = ["w0 w1", "w7 w8 w9"]
    expected = Predictor(one.run.folder, device="cpu").predict(texts, k=5)
    for name in adapters:  # B starts at zero: without adapters the answers are others
        saved[name].zero_()
    predictor = Predictor(one.run.folder, device="cpu")
    predictor._engine.load_state(saved, {})
    assert not np.allclose(predictor.predict(texts, k=5)[1], expected[1])
