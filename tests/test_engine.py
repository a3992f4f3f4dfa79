"""The encoder under DeepSpeed: the gradient that reaches it is that of a dense-masked layer, at any stage; its state moves."""

import copy
import gc
from pathlib import Path

import pytest
import torch
from tiny import check_restored_engine, make_prepared, run_ranks
from torch import Tensor

from haste_dist.config import Config
from haste_dist.errors import CheckpointError
from haste_dist.world import World

ROWS = 13  # of a global batch: no number of ranks divides it
BETA1 = 0.9


def batches_of(config: Config, world: World, count: int) -> list:
    from haste_dist.loader import BatchMaker, open_texts
    from haste_dist.model import open_prepared

    prepared = open_prepared(config)
    texts = open_texts(prepared.folder, prepared.manifest, "train", 0.0, 0)
    maker = BatchMaker(texts, prepared.order.row_of_label, prepared.manifest.splits["train"].max_labels, 0, world.size, world.rank)
    import numpy as np

    return [maker.make(np.arange(i * ROWS, (i + 1) * ROWS)) for i in range(count)]


def stepped(config: Config, world: World, lr_output: float) -> tuple:
    """Engine and classifier after one encoder update through the real step."""
    from haste_dist.engine import EncoderEngine
    from haste_dist.model import make_classifier, make_encoder, open_prepared
    from haste_dist.step import train_step

    prepared = open_prepared(config)
    encoder = make_encoder(config, prepared.manifest)
    classifier = make_classifier(config, prepared.order, encoder.width, world)
    engine = EncoderEngine(encoder, config.encoder, world)
    accumulation = config.train.accumulation
    for step, batch in enumerate(batches_of(config, world, accumulation)):
        train_step(engine, classifier, batch, world, lr_encoder=1e-3, lr_output=lr_output, step=step, seed=0, accumulation=accumulation)
    return engine, classifier


def dense_masked_gradient(config: Config, lr_output: float) -> dict[str, Tensor]:
    """By autograd, in one process: mean over micro-batches of the gradient of BCE over all labels through a dense matrix."""
    from haste_dist.model import make_classifier, make_encoder, open_prepared
    from haste_dist.world import join_world

    prepared, world = open_prepared(config), join_world("cpu")
    encoder = make_encoder(config, prepared.manifest)
    layer = make_classifier(config, prepared.order, encoder.width, world)
    weight_RD = torch.zeros(prepared.order.rows, encoder.width)
    head = layer.head.weight.shape[0]
    weight_RD[:head] = layer.head.weight
    groups, size, _ = layer.tail.weight.shape
    index_RF = layer.tail.index.long().repeat_interleave(size, 0)
    weight_RD[head:].scatter_(1, index_RF, layer.tail.weight.reshape(groups * size, -1))
    mask_RD = (weight_RD != 0).float()
    bias_R = torch.cat([layer.head.bias, layer.tail.bias.view(-1)])
    labels = prepared.order.labels
    for batch in batches_of(config, world, config.train.accumulation):
        x_ND = encoder(batch.input_ids, batch.attention_mask)
        weight, bias = weight_RD.detach().requires_grad_(), bias_R.detach().requires_grad_()
        target = torch.zeros(ROWS, labels)
        n, column = (batch.label_rows >= 0).nonzero(as_tuple=True)
        target[n, batch.label_rows[n, column]] = 1
        logits = (x_ND @ weight.T + bias)[:, :labels]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / ROWS
        (loss / config.train.accumulation).backward()
        # The layer steps at each micro-batch, on its own gradient (no momentum or decay in this test).
        lr = lr_output * config.train.accumulation
        weight_RD, bias_R = weight_RD - lr * weight.grad * mask_RD, bias_R - lr * bias.grad
    return {name: p.grad for name, p in encoder.named_parameters()}


def compare_gradients(world: World, configs: list[Config], lr_output: float, truths: list[str]) -> None:
    for config, truth in zip(configs, truths, strict=True):
        _, moments = stepped(config, world, lr_output)[0].state()
        assert moments["step"].item() == 1
        for name, gradient in _read(truth).items():
            # AdamW's first moment after one update is (1 - beta1) times the gradient.
            case = f"{name} at ZeRO {config.encoder.zero}, accumulation {config.train.accumulation}"
            torch.testing.assert_close(
                moments[f"exp_avg.{name}"] / (1 - BETA1), gradient, rtol=2e-5, atol=1e-7, msg=lambda text, case=case: f"{case}: {text}"
            )


def _read(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.slow
def test_gradient_equals_autograd_on_the_dense_masked_layer(tmp_path: Path) -> None:
    """At ZeRO 0, 1 and 2, each with and without gradient accumulation, on two ranks."""
    from safetensors.torch import save_file

    lr = 0.5
    config = make_prepared(tmp_path, overrides=["encoder.clip=0", "output.momentum=0", "output.weight_decay=0"])
    configs, truths = [], []
    for accumulation in (1, 2):
        config.train.accumulation = accumulation
        truth = str(tmp_path / f"truth-{accumulation}.safetensors")
        save_file(dense_masked_gradient(config, lr), truth)
        for zero in (0, 1, 2):
            config.encoder.zero = zero
            configs.append(copy.deepcopy(config))
            truths.append(truth)
    run_ranks(2, compare_gradients, configs, lr, truths)


def save_then_load(world: World, config: Config, path: str) -> None:
    """Saves at ZeRO 2 and loads at 0, 1 and 2, on the same ranks."""
    from safetensors.torch import save_file

    config.encoder.zero = 2
    weights, moments = stepped(config, world, 0.1)[0].state()
    if world.is_first:
        save_file({**{f"w.{k}": v for k, v in weights.items()}, **{f"m.{k}": v for k, v in moments.items()}}, path)
    for zero in (0, 1, 2):
        config.encoder.zero = zero
        check_load(world, config, weights, moments)


def check_load(world: World, config: Config, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    from haste_dist.engine import EncoderEngine
    from haste_dist.model import make_encoder, open_prepared

    engine = EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world)
    fresh, none = engine.state()
    assert not none
    assert not all(torch.equal(fresh[k], weights[k]) for k in weights)
    engine.load_state(weights, moments)
    for got, expected in zip(engine.state(), (weights, moments), strict=True):
        assert set(got) == set(expected)
        assert all(torch.equal(got[k], expected[k]) for k in expected)
    with pytest.raises(CheckpointError, match="is in one of them only"):
        engine.load_state({k: v for k, v in weights.items() if "embeddings" not in k}, moments)


@pytest.mark.slow
def test_state_moves_between_stages_and_numbers_of_ranks(tmp_path: Path) -> None:
    from haste_dist.world import join_world

    config = make_prepared(tmp_path)
    path = str(tmp_path / "state.safetensors")
    run_ranks(2, save_then_load, config, path)
    both = _read(path)
    weights = {k[2:]: v for k, v in both.items() if k.startswith("w.")}
    check_load(join_world("cpu"), config, weights, {k[2:]: v for k, v in both.items() if k.startswith("m.")})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restored_engine_takes_the_same_next_step(tmp_path: Path, precision: str) -> None:
    from haste_dist.world import join_world

    check_restored_engine(make_prepared(tmp_path, overrides=[f"encoder.precision={precision}"]), join_world("cpu"))


@pytest.mark.parametrize("words", ["encoder.zero=0", "encoder.zero=1", "encoder.zero=2", "encoder.precision=bfloat16"])
def test_deepspeed_does_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """What can be seen of it without a GPU (tests/gpu/test_step_gpu.py sees the rest): its timers, and its overlap_comm."""
    from deepspeed.accelerator import get_accelerator

    from haste_dist.world import join_world

    config, waits = make_prepared(tmp_path, overrides=[words]), []
    gc.collect()  # an engine of an earlier test waits when it is collected
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.append(1))
    engine = stepped(config, join_world("cpu"), 0.1)[0]
    for _ in range(4):  # the timers start with the third update
        input_ids = torch.randint(2, 9, (4, 5))
        x_BD = engine.forward(input_ids, torch.ones_like(input_ids))
        engine.backward(x_BD, torch.ones_like(x_BD))
        engine.step(1e-3)
    assert not waits


def test_a_frozen_encoder_has_no_optimizer_and_does_not_move(tmp_path: Path) -> None:
    from haste_dist.world import join_world

    config = make_prepared(tmp_path, overrides=["encoder.frozen=true"])
    engine, classifier = stepped(config, join_world("cpu"), 0.1)
    weights, moments = engine.state()
    assert not moments
    from haste_dist.model import make_encoder, open_prepared

    fresh = dict(make_encoder(config, open_prepared(config).manifest).named_parameters())
    assert all(torch.equal(weights[k], fresh[k]) for k in fresh)
    assert classifier.tail.momentum.abs().sum() > 0


def test_a_pass_that_is_run_again_has_the_dropout_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from haste_dist.engine import EncoderEngine
    from haste_dist.model import make_classifier, make_encoder, open_prepared
    from haste_dist.step import train_step
    from haste_dist.world import join_world

    config, world = make_prepared(tmp_path, overrides=["encoder.dropout=0.5"]), join_world("cpu")
    prepared = open_prepared(config)
    encoder = make_encoder(config, prepared.manifest)
    engine, classifier = EncoderEngine(encoder, config.encoder, world), make_classifier(config, prepared.order, encoder.width, world)
    seen: list[Tensor] = []
    forward = engine.forward
    monkeypatch.setattr(engine, "forward", lambda *arguments: seen.append(forward(*arguments)) or seen[-1])
    [batch] = batches_of(config, world, 1)
    train_step(engine, classifier, batch, world, lr_encoder=1e-3, lr_output=0.1, step=0, seed=0, passes=3)
    first, repeated = seen[:3], [seen[4], seen[3], seen[2]]  # the last pass is not run again, the others are in reverse
    assert [x.requires_grad for x in first] == [False, False, True]
    assert all(x.requires_grad for x in repeated)
    assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))
    assert not torch.equal(first[0], first[1][: len(first[0])])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_told(tmp_path: Path, precision: str, value: float) -> None:
    config = make_prepared(tmp_path, overrides=[f"encoder.precision={precision}"])
    run_ranks(1, step_on_a_bad_gradient, config, value)


def step_on_a_bad_gradient(world: World, config: Config, value: float) -> None:
    from haste_dist.engine import EncoderEngine
    from haste_dist.model import make_encoder, open_prepared

    engine = EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world)
    input_ids = torch.randint(2, 9, (4, 5))
    for step, bad in enumerate((False, True, False)):
        x_BD = engine.forward(input_ids, torch.ones_like(input_ids))
        dx_BD = torch.ones(x_BD.shape)
        if bad:
            dx_BD[0, 0] = value
        engine.backward(x_BD, dx_BD)
        norm = engine.step(1e-3)
        assert norm is not None
        assert bool(norm.isfinite()) == (step == 0)  # the weights stay lost
