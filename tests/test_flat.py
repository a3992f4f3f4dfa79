"""The flat parameter: the same gradients, the same updates as torch's AdamW on each parameter."""

import copy

import pytest
import torch
from torch import Tensor, nn

from haste_dist.flat import ClippedAdamW, FlatModule, join_parameters

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99)}


class Twice(nn.Module):
    """Shared weights, a norm, a bias, and a matrix that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.fixed = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.fixed(self.first(x))).tanh())


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_updates_are_those_of_adamw_on_each_parameter(clip: float) -> None:
    torch.manual_seed(0)
    plain = Twice()
    flat = FlatModule(copy.deepcopy(plain))
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    reference, mine = torch.optim.AdamW(groups, **OPTIONS), ClippedAdamW(flat.flat, flat.decayed, clip, 0.3, **OPTIONS)
    assert {name for name, _ in flat.named_parameters()} == {"flat", "module.fixed.weight"}
    for _ in range(4):
        x = torch.randn(5, 6)
        for model, optimizer in ((plain, reference), (flat, mine)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if clip and model is plain:
                norm = nn.utils.clip_grad_norm_(trained.values(), clip)
                assert norm > clip
            optimizer.step()
        if clip:
            torch.testing.assert_close(mine.norm, norm)
    found = dict(flat.unflatten(flat.flat))
    assert set(found) == set(trained)
    for name, p in trained.items():
        torch.testing.assert_close(found[name], p, msg=lambda text, name=name: f"{name}: {text}")


class Joined(nn.Module):
    """Takes three layers as one, and the last of them once more by itself."""

    joined = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.before, self.scale = nn.Linear(6, 6), nn.Parameter(torch.tensor(2.0))
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.__dict__.get("joined_weight"), self.__dict__.get("joined_bias")
        if weight is None:
            weight = torch.cat([part.weight for part in (self.a, self.b, self.c)])
        if bias is None:
            bias = torch.cat([part.bias for part in (self.a, self.b, self.c)])
        x = nn.functional.linear(self.scale * self.before(x), weight, bias)
        return torch.cat([x, self.c(x[:, :6])], 1)


@pytest.mark.parametrize("fixed", ["", "b.weight", "c.bias", "a"])
def test_parameters_that_lie_end_to_end_are_taken_as_one(fixed: str) -> None:
    """Unless one of them is not trained. Their gradients are those that each has by itself."""
    torch.manual_seed(0)
    plain = Joined()
    for name, p in plain.named_parameters():
        p.requires_grad_(not (fixed and name.startswith(fixed)))
    flat = FlatModule(copy.deepcopy(plain))
    module = flat.module
    kinds = {kind for kind in ("weight", "bias") if f"joined_{kind}" in module.__dict__}
    assert kinds == {"weight", "bias"} - ({"weight", "bias"} if fixed == "a" else {fixed[2:]})
    for _ in range(2):
        x = torch.randn(5, 6)
        for model in (plain, flat):
            model.zero_grad()
            model(x).square().sum().backward()
        assert flat.flat.grad is not None
        gradients = dict(flat.unflatten(flat.flat.grad))
        for name, p in plain.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(gradients[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")
        with torch.no_grad():
            flat.flat.mul_(0.5)
            for p in plain.parameters():
                p.mul_(0.5 if p.requires_grad else 1)
            flat.bind()
        for kind in kinds:
            whole = torch.cat([getattr(part, kind) for part in (module.a, module.b, module.c)])  # type: ignore[union-attr]
            assert torch.equal(module.__dict__[f"joined_{kind}"], whole)


def test_a_module_that_is_not_trained_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    plain, other = Joined(), Joined()
    module = copy.deepcopy(plain).requires_grad_(False)
    join_parameters(module)
    assert [(name, p.shape) for name, p in module.named_parameters()] == [(name, p.shape) for name, p in plain.named_parameters()]
    x = torch.randn(5, 6)
    for weights in (plain, other):
        for (name, p), own in zip(module.named_parameters(), weights.parameters(), strict=True):
            p.copy_(own)  # as new weights come while a service answers
            assert torch.equal(p, own), name
        assert torch.equal(module.__dict__["joined_weight"], torch.cat([weights.a.weight, weights.b.weight, weights.c.weight]))
        torch.testing.assert_close(module(x), weights(x))


@pytest.mark.parametrize("first", [5, 36, 40])
def test_parts_of_the_flat_tensor_decay_what_is_theirs(first: int) -> None:
    """A cut among the 36 numbers that decay, behind them, and among the others."""
    torch.manual_seed(0)
    flat = FlatModule(Twice())
    whole = ClippedAdamW(flat.flat, flat.decayed, 0.0, 0.3, **OPTIONS)
    flat.flat.grad = torch.randn_like(flat.flat)
    parts = []
    for start, stop in ((0, first), (first, flat.flat.numel())):
        part = nn.Parameter(flat.flat.detach()[start:stop].clone())
        part.grad = flat.flat.grad[start:stop].clone()
        optimizer = ClippedAdamW(part, flat.decayed, 0.0, 0.3, **OPTIONS)
        optimizer.first = start
        optimizer.step()
        parts.append(part.detach())
    whole.step()
    assert flat.decayed == 36
    torch.testing.assert_close(torch.cat(parts), flat.flat.detach())
