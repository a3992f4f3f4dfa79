"""Tails in bfloat16 on a GPU, and what plain torch makes of them: for test_tail_gpu.py and test_slab_tail_gpu.py."""

import pytest
import torch
from torch import Tensor

from haste_kernels import Positives, StepArgs, TailState, random_features, reference

CUDA = torch.device("cuda")
ARGS = StepArgs(lr=0.05, scale=0.25, momentum=0.9, weight_decay=1e-3, seed=2**40 + 3, step=9)
FIRST_ROW = 2**33 + 1


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: a value that no one writes is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(n: int, width: int, groups: int, size: int, fan_in: int, rate: float, padded: int, momentum: torch.dtype | None, bias: bool):
    torch.manual_seed(n + size + fan_in)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (0.1 * torch.randn(*shape, device=CUDA)).to(dtype)

    index = random_features(5, groups, width, fan_in, 1, CUDA)
    m = None if momentum is None else normal(groups, size, fan_in, dtype=momentum)
    b = normal(groups, size, dtype=torch.float32) if bias else None
    bm = normal(groups, size, dtype=torch.float32) if bias and momentum else None
    tail = TailState(normal(groups, size, fan_in), index, m, b, bm, FIRST_ROW, groups * size - padded, 5)
    row, batch = (torch.rand(tail.rows, n, device=CUDA) < rate).nonzero(as_tuple=True)
    return torch.randn(n, width, device=CUDA).bfloat16(), tail, Positives(batch, row)


def distance(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def plain(x_ND: Tensor, tail: TailState, positives: Positives, args: StepArgs) -> tuple[Tensor, Tensor]:
    """dx and the next weights as plain torch gives them in bfloat16."""
    groups, size, _ = tail.weight.shape
    dense = reference.dense_tail(tail.weight, tail.index, x_ND.shape[1]).bfloat16()
    z = x_ND @ dense.T
    if tail.bias is not None:
        z = z + tail.bias.view(-1).to(z.dtype)
    dz = reference.loss_gradient(z, reference.targets(positives, len(x_ND), dense.shape[0]).to(z.dtype), args.loss).bfloat16()
    dz[:, tail.rows :] = 0
    dw = (dz.T @ x_ND).view(groups, size, -1).gather(2, tail.index.long()[:, None].expand(-1, size, -1))
    m = dw * args.scale + args.weight_decay * tail.weight
    if tail.momentum is not None:
        m = args.momentum * tail.momentum + m
    return (dz @ dense) * args.scale, tail.weight - args.lr * m
