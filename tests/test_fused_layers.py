"""Fused layers are the layers that they replace: in float64 by plain torch, whose gradients autograd makes. tests/gpu holds the kernels."""

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from haste_dist import fused_layers
from haste_dist.config import EncoderConfig
from haste_dist.dry_run import dry_run
from haste_dist.encoder import Encoder, build_encoder, compile_blocks, fuse_blocks
from haste_dist.flat import FlatModule, join_parameters
from haste_dist.fused_layers import fuse_layers, is_fused, spare_last_layer
from haste_dist.graphs import can_replay
from haste_dist.meters import encoder_work
from haste_kernels import encoder_ops

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


WITHOUT_SDPA = ("mpnet", "convbert", "deberta-v2")


def make_model(family: str, **changed: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = SIZES | changed
    if family == "distilbert":  # the same by other names
        sizes["hidden_dim"], sizes["dropout"] = sizes.pop("intermediate_size"), sizes.pop("hidden_dropout_prob")
        sizes["attention_dropout"] = sizes.pop("attention_probs_dropout_prob")
    config = AutoConfig.for_model(family, **sizes)
    model: nn.Module = AutoModel.from_config(config, attn_implementation=None if family in WITHOUT_SDPA else "sdpa")
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)  # biases and norms too
    return model


def results(encoder: nn.Module, tokens: int, hides: bool) -> list[torch.Tensor]:
    torch.manual_seed(2)
    ids, mask = torch.randint(5, 100, (3, tokens)), torch.ones(3, tokens, dtype=torch.int64)
    if hides:
        mask[0, 7:] = mask[1, tokens - 2 :] = 0
    given = torch.randn(3, SIZES["hidden_size"], dtype=torch.float64)
    torch.manual_seed(3)
    x_BD = encoder(ids, mask if hides else None)
    encoder.zero_grad()
    x_BD.backward(given.to(x_BD.dtype))
    return [x_BD.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet"])
def test_embeddings_and_gradients_are_those_of_the_layers_before(family: str) -> None:
    plain = Encoder(make_model(family)).double().train()
    fused = copy.deepcopy(plain)
    assert fuse_layers(fused.model) == 2
    assert fuse_layers(fused.model) == 0  # once is enough
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in fused.named_parameters()]
    flat = FlatModule(copy.deepcopy(fused))
    assert all("joined_weight" in layer.__dict__ for layer in flat.module.modules() if is_fused(layer))
    fixed = copy.deepcopy(fused).requires_grad_(False)
    join_parameters(fixed)
    assert all("joined_weight" in layer.__dict__ for layer in fixed.modules() if is_fused(layer))
    ids = torch.randint(5, 100, (3, 11))
    torch.testing.assert_close(fixed(ids, None), plain(ids, None), rtol=1e-9, atol=1e-11)
    for tokens, hides in ((9, False), (20, True), (133, True)):
        first, *gradients = expected = results(plain, tokens, hides)
        for own, ours in zip(expected, results(fused, tokens, hides), strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-9, atol=1e-11)
        x_BD, gradient_P = results(flat, tokens, hides)
        torch.testing.assert_close(x_BD, first, rtol=1e-9, atol=1e-11)
        trained = [name for name, p in plain.named_parameters() if p.grad is not None]
        found = dict(flat.unflatten(gradient_P))
        for name, own in zip(trained, gradients, strict=True):
            torch.testing.assert_close(found[name], own, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("interpreted", [False, True])
def test_the_first_token_of_the_last_layer_is_enough_for_its_pooling(
    family: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Encoder(make_model(family), pooling="cls").train()
    fused = copy.deepcopy(plain)
    plain.double()
    if not interpreted:
        fused.double()
    else:
        pytest.importorskip("triton")
    monkeypatch.setattr("haste_dist.encoder.has_kernels", lambda _: True)
    monkeypatch.setattr(encoder_ops, "has_kernels", lambda _: interpreted)
    assert fuse_blocks(fused)
    close = {"rtol": 1e-4, "atol": 1e-5} if interpreted else {"rtol": 1e-9, "atol": 1e-11}
    for tokens, hides in ((9, False), (20, True)):
        for own, ours in zip(results(plain, tokens, hides), results(fused, tokens, hides), strict=True):
            torch.testing.assert_close(ours.double(), own, **close)
    one, two = (layer for layer in fused.modules() if is_fused(layer))
    x_BSH = torch.randn(3, 9, 32, dtype=next(fused.parameters()).dtype)
    assert (one(x_BSH).shape, two(x_BSH).shape) == ((3, 9, 32), (3, 1, 32))
    flops, less = encoder_work(plain).flops(100, 900, 8100), encoder_work(fused).flops(100, 900, 8100)
    heads = 3 * 4 * 32 * 2 * 900  # each takes all embeddings
    assert flops - less == 6 * (900 - 100) * (4 * 32 * 32 + 2 * 32 * 48) + 3 * 4 * 32 * 8100 - heads


def test_models_that_end_otherwise_work_out_all_tokens() -> None:
    mpnet = Encoder(make_model("mpnet"), pooling="cls")
    fuse_layers(mpnet.model)
    assert not spare_last_layer(mpnet.model)
    assert not spare_last_layer(make_model("bert"))
    assert mpnet(torch.randint(5, 100, (2, 9)), None).shape == (2, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels themselves")
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_so_they_are_by_the_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, in float32: what a GPU runs, but for its types. Texts of 70 tokens are too long for MPNet's attention."""
    pytest.importorskip("triton")
    plain = Encoder(make_model(family)).train()
    truth, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    fuse_layers(fused.model)
    monkeypatch.setattr(encoder_ops, "has_kernels", lambda _: True)
    for tokens, hides in ((1, False), (9, False), (20, True), *([(70, True)] if family == "mpnet" else [])):
        for exact, ours in zip(results(truth, tokens, hides), results(fused, tokens, hides), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "place"),
    [
        *itertools.product(("bert", "mpnet"), ("attention", "attention's output", "output", "embeddings")),
        *itertools.product(("distilbert",), ("attention", "output", "embeddings")),
    ],
)
def test_dropout_only_where_it_trains(family: str, place: str) -> None:
    """Each place alone, three of a layer and one before, makes two passes differ in training, and none in evaluation; a seed repeats it."""
    encoder = Encoder(make_model(family))
    fuse_layers(encoder.model)
    layer: Any = next(filter(is_fused, encoder.modules()))
    attention = layer.attention
    places = {
        "attention": {"bert": getattr(attention, "self", None), "mpnet": getattr(attention, "attn", None)}.get(family, attention).dropout,
        "attention's output": attention.output.dropout if family == "bert" else attention.dropout,
        "output": layer.ffn.dropout if family == "distilbert" else layer.output.dropout,
        "embeddings": encoder.model.embeddings.dropout,  # type: ignore[union-attr]
    }
    places[place].p = 0.5
    ids = torch.randint(5, 100, (2, 9))
    one, other = (encoder.train()(ids, None) for _ in range(2))
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    one = encoder(ids, None)
    torch.manual_seed(5)
    assert torch.equal(one, encoder(ids, None))
    assert torch.equal(encoder.eval()(ids, None), encoder(ids, None))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_each_dropout_draws_bits_of_its_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(make_model(family)).train()
    fuse_layers(encoder.model)
    seeds: list[int] = []
    for name in ("attend", "dropout_add_norm", "embed"):
        call = getattr(fused_layers, name)

        def noted(*arguments: Any, call: Any = call) -> Any:
            seeds.extend(int(a) for a in arguments if isinstance(a, torch.Tensor) and a.dtype == torch.int64 and a.numel() == 1)
            return call(*arguments)

        monkeypatch.setattr(fused_layers, name, noted)
    encoder(torch.randint(5, 100, (2, 9)), None)
    encoder(torch.randint(5, 100, (2, 9)), None)
    assert len(seeds) == len(set(seeds)) == 2 * (2 * 3 + (family == "bert"))  # passes, layers, places; and before the layers


def test_activations_made_again_are_the_same() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = EncoderConfig(width=32, heads=2, dropout=0.3, checkpointing=checkpointing)
        encoder = build_encoder(config, 100, 0).double().train()
        assert fuse_layers(encoder.model) == 2
        found.append(results(encoder, 9, True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"hidden_act": "gelu_pytorch_tanh"}),
        ("bert", {"is_decoder": True}),
        ("convbert", {}),
        ("distilbert", {"activation": "relu"}),
        ("deberta-v2", {}),
    ],
    ids=str,
)
def test_layers_of_other_kinds_are_left_alone(family: str, changed: dict[str, Any]) -> None:
    model = make_model(family, **changed)
    kinds = [type(part) for part in model.modules()]
    assert fuse_layers(model) == 0
    assert [type(part) for part in model.modules()] == kinds


def test_adapted_layers_are_left_alone() -> None:
    pytest.importorskip("peft")
    model = build_encoder(EncoderConfig(width=32, heads=2, lora_rank=2), 100, 0).model
    kinds = [type(part) for part in model.modules()]
    assert fuse_layers(model) == 0
    assert [type(part) for part in model.modules()] == kinds


def test_without_a_gpu_nothing_is_fused() -> None:
    encoder = build_encoder(EncoderConfig(width=32, heads=2), 100, 0)
    assert not fuse_blocks(encoder)
    assert not any(map(is_fused, encoder.modules()))


def test_attention_of_another_package_is_left_alone() -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(width=32, heads=2), 100, 0)
    encoder.whole_mask = False
    assert not fuse_blocks(encoder)
    encoder.whole_mask = True
    assert fuse_blocks(encoder)


def test_only_blocks_that_are_not_fused_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    encoder = build_encoder(EncoderConfig(width=32, heads=2), 100, 0)
    fuse_layers(encoder.model)
    compile_blocks(encoder)
    assert not compiled
    compile_blocks(build_encoder(EncoderConfig(width=32, heads=2), 100, 0))
    assert len(compiled) == 2


def test_what_is_not_compiled_may_be_recorded() -> None:
    config = EncoderConfig(width=32, heads=2, compile=True)
    encoder = build_encoder(config, 100, 0)
    assert not can_replay(config, encoder)
    fuse_layers(encoder.model)
    assert can_replay(config, encoder)


def test_a_plan_for_plain_torch_counts_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EncoderConfig(width=64, heads=4, layers=3)
    plain = dry_run(dataclasses.replace(config, fused=False), 100, 0, 4, 32, torch.bfloat16)
    monkeypatch.setenv("HASTE_KERNELS", "torch")
    assert dry_run(config, 100, 0, 4, 32, torch.bfloat16) == plain


def test_a_plan_for_a_gpu_counts_what_fused_layers_keep() -> None:
    """A token and layer: input, qkv, answer, both norms' sums and outputs (H each, qkv three), and two of the wide layer; 2 bytes each."""
    rows, tokens, h, wide = 8, 64, 64, 256
    config = EncoderConfig(width=h, heads=2, layers=8, dropout=0.1)
    fused, plain, cpu = (
        dry_run(dataclasses.replace(config, fused=on), 100, 0, rows, tokens, torch.bfloat16, cuda)
        for on, cuda in ((True, True), (False, True), (True, False))
    )
    assert cpu == plain
    numbers = 8 * (3 * h + h + 2 * h + 2 * h + 2 * wide)
    assert fused.kept == pytest.approx(rows * tokens * 2 * numbers, rel=0.1)
    assert fused.kept < plain.kept
