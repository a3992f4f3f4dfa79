"""A transformer's layer by its own kernels, in bfloat16: as exact as plain torch, the same bits each time, the memory that is planned.

Run on a GPU host: python -m pytest tests/gpu
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from haste_dist.config import EncoderConfig
from haste_dist.dry_run import dry_run
from haste_dist.encoder import Encoder, build_encoder, fuse_blocks
from haste_dist.flat import FlatModule
from haste_dist.graphs import LEAST_TOKENS, GraphedModule
from haste_kernels import encoder_ops as ops
from haste_kernels import encoder_reference as reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
BF16, CUDA = torch.bfloat16, torch.device("cuda")
SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256, "vocab_size": 100}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=BF16)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def compare(mine: Any, plain: Any, inputs: list[Tensor], given: Tensor, shared: Tensor | None = None) -> None:
    """Answers and gradients of kernels and of plain torch in bfloat16, against float64. ``shared``: a gradient of the first input."""
    results = []
    for call, dtype in ((plain, torch.float64), (plain, BF16), (mine, BF16)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        y, *again = call(*leaves)
        into, to = [y, *again], [given.to(dtype), *([] if shared is None else [shared.to(dtype).clone()])]
        results.append([y, *torch.autograd.grad(into, leaves, to)])
    for number, (exact, own, ours) in enumerate(zip(*results, strict=True)):
        errors = error(own, exact), error(ours, exact)
        print(f"{'answer' if number == 0 else f'gradient {number}'}: {errors[0]:.2e} plain, {errors[1]:.2e} kernels")
        assert 0 < errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize(
    ("texts", "tokens", "heads", "width", "p", "hides", "paired"),
    [
        (6, 128, 3, 64, 0.1, True, False),
        (40, 77, 12, 64, 0.1, False, False),
        (50, 20, 12, 32, 0.1, True, True),
        (300, 50, 12, 32, 0.0, False, False),
        (90, 64, 12, 64, 0.1, True, True),
        (9, 128, 2, 128, 0.2, True, False),
        (3, 1, 2, 16, 0.0, False, False),
    ],
)
def test_attention_is_as_exact_as_plain_torch(texts: int, tokens: int, heads: int, width: int, p: float, hides: bool, paired: bool) -> None:
    torch.manual_seed(tokens)
    size, seed = heads * width, torch.tensor([2**61 + tokens], device=CUDA)
    seen = None
    if hides:
        seen = torch.rand(texts, tokens, device=CUDA) < 0.7
        seen[:, 0] = True
    inputs = [normal(texts, tokens, size), normal(3 * size, size) / size**0.5, normal(3 * size)]
    if paired:
        inputs.append(normal(heads, tokens, tokens))

    def plain(x: Tensor, w: Tensor, b: Tensor, pair: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reference.attention(x @ w.T + b, seen, heads, p, seed, pair), x * 1

    def mine(x: Tensor, w: Tensor, b: Tensor, pair: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.attend(x, w, b, seen, heads, p, seed, pair)

    if tokens == 1:  # its only probability is 1, whatever q and k are: their gradients are 0
        c_BSH, _ = mine(*inputs)
        torch.testing.assert_close(c_BSH, plain(*inputs)[0])
        return
    compare(mine, plain, inputs, normal(texts, tokens, size), normal(texts, tokens, size))


@pytest.mark.parametrize(("rows", "width", "p"), [(1000, 768, 0.1), (333, 384, 0.0), (70_001, 128, 0.3), (5, 1024, 0.1)])
def test_norms_are_as_exact_as_plain_torch(rows: int, width: int, p: float) -> None:
    torch.manual_seed(rows)
    seed = torch.tensor([rows], device=CUDA)
    inputs = [normal(rows, width), normal(width), normal(rows, width), normal(width), normal(width)]
    compare(
        lambda *i: [ops.dropout_add_norm(*i, p, 1e-12, seed)],
        lambda *i: [reference.dropout_add_norm(*i, p, 1e-12, seed)],
        inputs,
        normal(rows, width),
    )


@pytest.mark.parametrize(("rows", "width", "wide"), [(1000, 64, 3072), (333, 48, 200), (1, 32, 128)])
def test_gelu_is_as_exact_as_plain_torch(rows: int, width: int, wide: int) -> None:
    torch.manual_seed(rows)
    inputs = [normal(rows, width), 2 * normal(wide, width) / width**0.5, normal(wide)]
    plain = lambda x, w, b: (reference.bias_gelu(x @ w.T, b), x * 1)  # noqa: E731
    compare(ops.widen, plain, inputs, normal(rows, wide), normal(rows, width))


@pytest.mark.parametrize(("texts", "tokens", "width", "ids", "p"), [(300, 60, 384, 2000, 0.1), (5, 128, 768, 7, 0.0), (1, 3, 128, 9, 0.2)])
def test_embeddings_are_as_exact_as_plain_torch(texts: int, tokens: int, width: int, ids: int, p: float) -> None:
    """With words that most texts have, as in any language."""
    torch.manual_seed(texts)
    seed = torch.tensor([texts], device=CUDA)
    ids_BS = (ids * torch.rand(texts, tokens, device=CUDA) ** 4).long()
    inputs = [normal(ids, width), normal(tokens, width), *(normal(width) for _ in range(3))]
    compare(
        lambda *i: [ops.embed(ids_BS, *i, 1, p, 1e-12, seed)],
        lambda *i: [reference.embed(ids_BS, *i, 1, p, 1e-12, seed)],
        inputs,
        normal(texts, tokens, width),
    )


def make_texts(tokens: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 99, (5, tokens), device=CUDA)
    mask = torch.ones_like(ids)
    mask[0, 7:] = mask[1, tokens - 3 :] = 0
    return ids, mask


@pytest.mark.parametrize("tokens", [24, 61, 128, 200])
@pytest.mark.parametrize(
    ("family", "pooling"),
    [("bert", "mean"), ("roberta", "mean"), ("mpnet", "mean"), ("bert", "cls"), ("distilbert", "mean"), ("distilbert", "cls")],
)
def test_an_encoder_is_as_exact_as_before(family: str, pooling: str, tokens: int) -> None:
    """Embeddings and the gradient of all weights at once, against float64: an error of at most 1.5 times that of the layers replaced."""
    torch.manual_seed(tokens)
    model = AutoModel.from_config(AutoConfig.for_model(family, **SIZES)).to(CUDA).eval()
    model.pooler = None
    truth = Encoder(model, pooling).to(BF16).double()  # what bfloat16 holds
    plain = copy.deepcopy(truth).bfloat16()
    fused = copy.deepcopy(plain)
    assert fuse_blocks(fused)
    ids, mask = make_texts(tokens)
    given = torch.randn(5, 128, device=CUDA)
    results, gradients = [], []
    for encoder in (truth, plain, fused):
        x_BD = encoder(ids, mask)
        x_BD.backward(given.to(x_BD.dtype))
        results.append(x_BD)
        gradients.append(torch.cat([p.grad.double().flatten() for p in encoder.parameters()]))  # type: ignore[union-attr]
    for name, (exact, own, ours) in {"embeddings": results, "gradients": gradients}.items():
        errors = error(own, exact), error(ours, exact)
        print(f"{family}, {tokens} tokens, {name}: {errors[0]:.2e} before, {errors[1]:.2e} fused")
        assert 0 < errors[1] <= 1.5 * errors[0]


def make_fused(**changed: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(width=128, heads=2, layers=3, dropout=0.1, **changed), 100, 0).to(CUDA).to(BF16).train()
    assert fuse_blocks(encoder)
    return encoder


def both_passes(module: FlatModule, ids: Tensor, mask: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    x_BD = module(ids, mask)
    [gradient] = torch.autograd.grad(x_BD, [module.flat], torch.ones_like(x_BD))
    return [x_BD.detach().clone(), gradient.clone()]


@pytest.mark.parametrize("tokens", [24, 100, 200])
def test_a_seed_gives_the_same_bits_each_time_and_made_again(tokens: int) -> None:
    ids, mask = make_texts(tokens)
    kept, again = FlatModule(make_fused()), FlatModule(make_fused(checkpointing=True))
    first, second, other = both_passes(kept, ids, mask, 7), both_passes(kept, ids, mask, 7), both_passes(kept, ids, mask, 8)
    for a, b, c, d in zip(first, second, both_passes(again, ids, mask, 7), other, strict=True):
        if tokens <= ops.LONGEST:  # torch's own attention sums as it comes
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        assert not torch.equal(a, d)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_recorded_passes_are_launched_ones(pooling: str) -> None:
    launched, recorded = (GraphedModule(make_fused(pooling=pooling), most) for most in (0, LEAST_TOKENS))
    for seed in range(4):
        ids, mask = make_texts(24)
        for one, other in zip(both_passes(launched, ids, mask, seed), both_passes(recorded, ids, mask, seed), strict=True):
            assert torch.equal(one, other)
    assert (launched.replays, recorded.replays) == (0, 3)


@pytest.mark.parametrize("more", [{}, {"checkpointing": True}, {"pooling": "cls"}], ids=str)
def test_memory_is_what_a_plan_says(more: dict[str, Any]) -> None:
    config = EncoderConfig(width=384, heads=12, layers=6, dropout=0.1, **more)
    needs = dry_run(config, 100, 0, 256, 128, BF16)
    torch.manual_seed(0)
    encoder = build_encoder(config, 100, 0).to(CUDA).to(BF16).train()
    assert fuse_blocks(encoder)
    ids, mask = torch.randint(5, 99, (256, 128), device=CUDA), torch.ones(256, 128, dtype=torch.int64, device=CUDA)
    for _ in range(2):
        encoder.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x_BD = encoder(ids, mask)
        forward, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        x_BD.backward(torch.ones_like(x_BD))
        backward = torch.cuda.max_memory_allocated() - before
        del x_BD
    for name, planned, found in (("forward", needs.forward, forward), ("kept", needs.kept, kept), ("backward", needs.backward, backward)):
        print(f"{name}: {planned / 2**20:.0f} MiB planned, {found / 2**20:.0f} used")
        assert found == pytest.approx(planned, rel=0.1)
