"""Weights in float8 on a GPU: steps against float64, top-k exact, as many bytes as it should take."""

import copy

import pytest
import torch
from test_steps import ARGS, WIDTH, distance, make, plain_gradients
from test_topk_gpu import check_exact
from test_topk_gpu import make as make_whole

from haste_kernels import STORED, head_step, reference, stochastic_round, tail_step
from haste_kernels.update import sgd_

FLOAT8, CUDA = STORED["float8"], torch.device("cuda")
NEW = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not NEW, reason="needs a GPU that converts float8")]


@pytest.mark.parametrize("momentum", ["bfloat16", "float8", None])
@pytest.mark.parametrize(("size", "bias"), [(16, True), (32, False), (64, True), (128, False)])
def test_steps_are_as_exact_as_plain_torch(size: int, bias: bool, momentum: str | None) -> None:
    x_ND, tail, head, tail_positives, head_positives = make(size, 40, 7, bias)
    for step, slow, state, positives, rows in (
        (tail_step, reference.tail_step, tail, tail_positives, tail.rows),
        (head_step, reference.head_step, head, head_positives, 512),
    ):
        state.weight = state.weight.to(FLOAT8)
        state.momentum = None if momentum is None else state.momentum.to(STORED[momentum])
        state.bias_momentum = None if momentum is None else state.bias_momentum
        mine, truth, plain = (copy.deepcopy(state) for _ in range(3))
        dense = (reference.dense_tail(state.weight, tail.index, WIDTH) if state is tail else state.weight).bfloat16()
        plain_dx, dw_RD = plain_gradients(x_ND, dense, None if state.bias is None else state.bias.view(-1), positives, rows, "bce")
        if state is tail:
            dw_RD = dw_RD.view(-1, size, WIDTH).gather(2, tail.index.long()[:, None].expand(-1, size, -1)).flatten(0, 1)
        flat = [None if t is None else t.view(dw_RD.shape) for t in (plain.weight, plain.momentum)]
        sgd_(*flat, dw_RD, ARGS, state.first_row)
        dx, value = step(x_ND, positives, mine, ARGS, want_loss=True)  # type: ignore[operator]
        true_dx, true_value = slow(x_ND, positives, truth, ARGS)  # type: ignore[operator]
        assert distance(dx, true_dx) <= 1.5 * distance(plain_dx, true_dx)
        assert float(value) == pytest.approx(float(true_value), rel=1e-4)
        for name in ("weight", "momentum"):
            if getattr(truth, name) is not None:  # the same random bits, on sums that a bfloat16 dz moves a little
                got, naive, want = (getattr(one, name).float() for one in (mine, plain, truth))
                assert getattr(mine, name).dtype == getattr(truth, name).dtype
                ours, theirs = (float((one != want).float().mean()) for one in (got, naive))
                print(f"{name} of {type(state).__name__}: {ours:.4f} of it other than exact, plain torch {theirs:.4f}")
                assert ours <= 1.1 * theirs + 1e-3, name
                assert distance(got, want) < (0.03 if getattr(mine, name).dtype == FLOAT8 else 4e-3), name


def test_rounding_bits_are_those_of_the_cpu() -> None:
    values, rows = torch.randn(700, 45) * torch.logspace(-4, 3, 45), torch.arange(700) + 2**33
    on_gpu = stochastic_round(values.to(CUDA), 7, 11, rows.to(CUDA), 1, FLOAT8).cpu()
    assert torch.equal(on_gpu.view(torch.uint8), stochastic_round(values, 7, 11, rows, 1, FLOAT8).view(torch.uint8))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("k", [1, 100])
def test_topk_of_whole_numbers_is_exact(size: int, k: int) -> None:
    x_ND, head, tail = make_whole(2400 // size, size, 3, 600, 96, 48, 70, torch.bfloat16, 3, True)
    head.weight, tail.weight = head.weight.to(FLOAT8), tail.weight.to(FLOAT8)
    check_exact(x_ND, head, tail, k)


def test_a_step_holds_no_wider_copy_of_the_weights() -> None:
    x_ND, tail, _, _, _ = make(32, 40_000, 0, False)
    tail.weight, tail.momentum = tail.weight.to(FLOAT8), None
    positives = make(32, 40, 0, False)[3]
    tail_step(x_ND, positives, tail, ARGS)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tail_step(x_ND, positives, tail, ARGS)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < tail.weight.numel()  # the 82 MB that the weights take themselves
