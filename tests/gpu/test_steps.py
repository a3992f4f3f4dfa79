"""The steps, top-k and rounding on a GPU in bfloat16, against float64 and against plain torch at the same precision.

Run on a GPU host: python -m pytest tests/gpu
"""

import copy

import pytest
import torch
from torch import Tensor

from haste_kernels import (
    HeadState,
    Positives,
    StepArgs,
    TailState,
    head_step,
    random_features,
    reference,
    stochastic_round,
    tail_step,
    topk,
)

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
N, WIDTH, FAN_IN = 300, 384, 64
ARGS = StepArgs(lr=0.05, scale=1.0, momentum=0.9, weight_decay=1e-4, seed=3, step=9)


def make(size: int, groups: int, padded: int, bias: bool) -> tuple[Tensor, TailState, HeadState, Positives, Positives]:
    torch.manual_seed(size)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (0.1 * torch.randn(*shape, device=CUDA)).to(dtype)

    biases = (normal(groups, size, dtype=torch.float32), normal(groups, size, dtype=torch.float32)) if bias else (None, None)
    index = random_features(5, groups, WIDTH, FAN_IN, 1, CUDA)
    tail = TailState(normal(groups, size, FAN_IN), index, normal(groups, size, FAN_IN), *biases, 512, groups * size - padded, 5)
    head = HeadState(normal(512, WIDTH), normal(512, WIDTH), None, None, 0)
    x_ND = torch.randn(N, WIDTH, device=CUDA).bfloat16()

    def positives(rows: int) -> Positives:
        row, batch = (torch.rand(rows, N, device=CUDA) < 0.003).nonzero(as_tuple=True)
        return Positives(batch, row)

    return x_ND, tail, head, positives(tail.rows), positives(512)


def distance(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def plain_gradients(
    x_ND: Tensor, weight_RD: Tensor, bias: Tensor | None, positives: Positives, rows: int, loss: str
) -> tuple[Tensor, Tensor]:
    """dx and dW as plain torch gives them in bfloat16: logits, their gradient and dx rounded, dW summed in float32."""
    z = x_ND @ weight_RD.T
    if bias is not None:
        z = z + bias.to(z.dtype)
    y = reference.targets(positives, len(x_ND), weight_RD.shape[0]).to(z.dtype)
    dz = reference.loss_gradient(z, y, loss).bfloat16()  # type: ignore[arg-type]
    dz[:, rows:] = 0
    return dz @ weight_RD, dz.float().T @ x_ND.float()


def naive_dx(x_ND: Tensor, weight_RD: Tensor, bias: Tensor | None, positives: Positives, rows: int, loss: str) -> Tensor:
    return plain_gradients(x_ND, weight_RD, bias, positives, rows, loss)[0]


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize(("size", "bias"), [(1, True), (16, False), (32, True), (64, False), (128, True)])
def test_steps_are_as_exact_as_plain_torch(size: int, bias: bool, loss: str) -> None:
    x_ND, tail, head, tail_positives, head_positives = make(size, 40, min(7, size - 1), bias)
    args = StepArgs(**{**ARGS.__dict__, "loss": loss})
    dense = reference.dense_tail(tail.weight, tail.index, WIDTH).bfloat16()
    flat_bias = None if tail.bias is None else tail.bias.view(-1)
    for step, slow, state, positives, naive in (
        (tail_step, reference.tail_step, tail, tail_positives, naive_dx(x_ND, dense, flat_bias, tail_positives, tail.rows, loss)),
        (head_step, reference.head_step, head, head_positives, naive_dx(x_ND, head.weight, None, head_positives, 512, loss)),
    ):
        mine, truth = copy.deepcopy(state), copy.deepcopy(state)
        dx, value = step(x_ND, positives, mine, args, want_loss=True)  # type: ignore[operator]
        true_dx, true_value = slow(x_ND, positives, truth, args)  # type: ignore[operator]
        assert distance(dx, true_dx) <= 1.5 * distance(naive, true_dx)
        assert float(value) == pytest.approx(float(true_value), rel=1e-4)
        for name in ("weight", "momentum", "bias"):
            if getattr(truth, name) is not None:
                assert distance(getattr(mine, name), getattr(truth, name)) < 4e-3, name


def test_rounding_bits_are_those_of_the_cpu() -> None:
    values = torch.randn(700, 45)
    rows = torch.arange(700) + 2**33
    on_gpu = stochastic_round(values.to(CUDA), 7, 11, rows.to(CUDA), 1).cpu()
    assert torch.equal(on_gpu.view(torch.int16), stochastic_round(values, 7, 11, rows, 1).view(torch.int16))


@pytest.mark.parametrize("k", [1, 5, 100])
def test_topk_is_exact(k: int) -> None:
    x_ND, tail, head, _, _ = make(32, 40, 7, False)
    scores, rows = topk(x_ND, x_ND, head, tail, k)
    dense = reference.dense_tail(tail.weight, tail.index, WIDTH)
    z_NR = torch.cat([reference.logits(x_ND, head.weight, None), reference.logits(x_ND, dense, None)[:, : tail.rows]], dim=1).cpu()
    best = z_NR.topk(k).values
    torch.testing.assert_close(scores.cpu().double(), best, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z_NR.gather(1, rows.cpu()), best, rtol=1e-3, atol=1e-3)


def test_features_drawn_on_a_gpu_are_those_of_the_cpu() -> None:
    assert torch.equal(random_features(9, 50, WIDTH, FAN_IN, 4, CUDA).cpu(), random_features(9, 50, WIDTH, FAN_IN, 4, CPU))
