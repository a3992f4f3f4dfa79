"""The reference against torch.autograd and torch.optim.SGD on a dense layer whose weights are masked, in float64."""

import pytest
import torch
from torch.nn import functional

from haste_kernels import HeadState, Positives, StepArgs, TailState, random_features, reference

N, D, GROUPS, SIZE, FAN_IN, PADDED = 5, 12, 3, 4, 5, 2


def random_positives(n: int, rows: int, share: float) -> Positives:
    row, batch = (torch.rand(rows, n) < share).nonzero(as_tuple=True)
    return Positives(batch, row)


def loss_of(z, y, args):
    if args.loss == "bce":
        return args.scale * functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
    return args.scale * torch.where(y == 1, (1 - z).clamp(min=0), (1 + z).clamp(min=0)).square().sum()


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("part", ["head", "tail"])
def test_steps_equal_autograd_and_sgd(loss, bias, momentum, weight_decay, part):
    torch.manual_seed(0)
    rows = GROUPS * SIZE
    real = rows if part == "head" else rows - PADDED
    args = StepArgs(0.3, 1 / N, momentum, weight_decay, loss)
    b = torch.randn(rows).double() if bias else None
    bias_momentum = torch.zeros(rows).double() if bias and momentum else None
    if part == "head":
        w = torch.randn(rows, D).double()
        state = HeadState(w, torch.zeros_like(w) if momentum else None, b, bias_momentum, 7)
        mask, dense = torch.ones(rows, D), w.clone()
    else:
        w, index = torch.randn(GROUPS, SIZE, FAN_IN).double(), random_features(0, GROUPS, D, FAN_IN, 1)
        two = [None if t is None else t.view(GROUPS, SIZE) for t in (b, bias_momentum)]
        state = TailState(w, index, torch.zeros_like(w) if momentum else None, *two, 7, real, 0)
        mask, dense = (reference.dense_tail(v, index, D) for v in (torch.ones_like(w), w))
        assert (mask.sum(1) == FAN_IN).all()
    dense.requires_grad_()
    own = [dense] if b is None else [dense, b.clone().requires_grad_()]
    groups = [{"params": [dense], "weight_decay": weight_decay}, {"params": own[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=args.lr, momentum=momentum)
    for _ in range(3):
        x = torch.randn(N, D).double().requires_grad_()
        positives = random_positives(N, real, 0.3)
        y = torch.zeros(N, rows).double()
        y[positives.batch, positives.row] = 1
        z = x @ (dense * mask).T + (own[1] if bias else 0)
        expected = loss_of(z[:, :real], y[:, :real], args)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        dx, got = (reference.head_step if part == "head" else reference.tail_step)(x.detach(), positives, state, args)
        after = state.weight if part == "head" else reference.dense_tail(state.weight, state.index, D)
        torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(after, dense.detach(), rtol=1e-12, atol=1e-14)
        if bias:
            torch.testing.assert_close(b, own[1].detach(), rtol=1e-12, atol=1e-14)


def test_written_gradient_is_that_of_the_loss():
    z = (3 * torch.randn(6, 9).double()).requires_grad_()
    y = (torch.rand(6, 9) < 0.4).double()
    for loss in ("bce", "squared_hinge"):
        (expected,) = torch.autograd.grad(reference.loss_sum(z, y, loss), z)
        torch.testing.assert_close(reference.loss_gradient(z, y, loss), expected)


def test_worked_example():
    """Two labels, one feature: figures by hand."""
    head = HeadState(torch.zeros(2, 1).double(), torch.ones(2, 1).double(), None, None, 0)
    x = torch.tensor([[2.0], [4.0]])
    positives = Positives(torch.tensor([1]), torch.tensor([0]))
    dx, loss = reference.head_step(x, positives, head, StepArgs(lr=0.1, scale=0.5, momentum=0.5))
    assert loss.item() == pytest.approx(0.5 * 4 * 0.693147180559945)
    assert dx.tolist() == [[0.0], [0.0]]
    # dz = 0.5 * (0.5 - y): label 0: (0.25, -0.25), label 1: (0.25, 0.25); dW = dz^T x = -0.5, 1.5; m = 0.5 + dW
    torch.testing.assert_close(head.momentum, torch.tensor([[0.0], [2.0]]).double())
    torch.testing.assert_close(head.weight, torch.tensor([[0.0], [-0.2]]).double())
