"""The tail's step from slabs on a GPU: as exact as plain torch, the same bits in each run, with and without the loss, for any shards."""

import copy
from dataclasses import replace

import pytest
import torch
from tails import ARGS, CUDA, FIRST_ROW, check_step, distance, make, poisoned  # noqa: F401 (a fixture)
from torch import Tensor

from haste_kernels import Positives, StepArgs, TailState, reference, slab_tail, slabs

if not torch.cuda.is_available() or torch.cuda.get_device_capability() < slabs.CAPABILITY:
    pytest.skip("needs an NVIDIA GPU of compute capability 9.0 or newer", allow_module_level=True)

from haste_kernels.triton_tail import TABLE, tail_step

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
STATES = ("weight", "momentum", "bias", "bias_momentum")

# The slabs of each: 4, 3, 5, 8, 1, 1, 8, 3, 2, 6, 7. In most a place of the ring is used again, in some more than twice.
CASES = [
    # n, width, groups, padded, rate, momentum, bias
    (512, 96, 7700, 3, 1e-4, BF16, True),  # runs of dx end
    (300, 384, 5000, 7, 0.003, BF16, True),
    (257, 768, 333, 15, 0.02, None, True),
    (512, 768, 2000, 0, 0.003, BF16, False),
    (1, 100, 9, 3, 0.5, BF16, True),
    (64, 768, 3000, 1, 1.0, BF16, True),
    (1000, 391, 500, 0, 0.001, None, False),
    (130, 782, 40, 9, 0.0, BF16, True),
    (128, 768, 8000, 0, 0.001, BF16, True),
    (380, 768, 2600, 5, 0.001, BF16, True),
    (430, 768, 2300, 5, 0.001, None, True),
]


def step(x_ND: Tensor, positives: Positives, tail: TailState, args: StepArgs, loss: bool = True) -> tuple[Tensor, Tensor | None]:
    assert slab_tail.serves(x_ND, tail, args)
    return tail_step(x_ND, positives, tail, args, loss)


def assert_same_bits(first: TailState, second: TailState, part: slice = slice(None)) -> None:
    for name in STATES:
        mine, other = getattr(first, name), getattr(second, name)
        assert mine is None or torch.equal(mine.float().nan_to_num(7e30), other[part].float().nan_to_num(7e30)), name


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_as_exact_as_plain_torch_and_always_the_same(case: tuple, rounding: str) -> None:
    n, width, groups, padded, rate, momentum, bias = case
    x_ND, tail, positives = make(n, width, groups, 16, 64, rate, padded, momentum, bias)
    args = replace(ARGS, rounding=rounding, deterministic=True)
    mine, again = copy.deepcopy(tail), copy.deepcopy(tail)
    got = step(x_ND, positives, mine, args)
    check_step(got, mine, tail, x_ND, positives, args)
    dx, none = step(x_ND, positives, again, args, loss=False)
    assert none is None
    assert torch.equal(got[0], dx), "the loss changes nothing"
    assert_same_bits(mine, again)


@pytest.mark.parametrize("n", [300, 512])
def test_unequal_shards_take_the_same_step_to_the_bit(n: int) -> None:
    """Many groups a range, so that a group's round, and with it the mark of its sums, is another one in each shard."""
    x_ND, tail, positives = make(n, 768, 2200, 16, 64, 0.003, 0, BF16, True)
    whole = copy.deepcopy(tail)
    dx, value = step(x_ND, positives, whole, ARGS)
    total, losses = torch.zeros_like(dx), 0.0
    for first, last in ((0, 700), (700, 701), (701, 2200)):
        mine = (positives.row >= 16 * first) & (positives.row < 16 * last)
        states = [t[first:last].clone() for t in (tail.weight, tail.index, tail.momentum, tail.bias, tail.bias_momentum)]
        state = TailState(*states, FIRST_ROW + 16 * first, 16 * (last - first), 5 + first)
        got, loss = step(x_ND, Positives(positives.batch[mine], positives.row[mine] - 16 * first), state, ARGS)
        total += got
        losses += float(loss)
        assert_same_bits(state, whole, slice(first, last))
    assert distance(total, dx) < 2e-3  # float16 runs, cut elsewhere
    assert losses == pytest.approx(float(value), rel=1e-5)


def test_sums_of_dx_of_one_sign_stay_finite() -> None:
    """All x are 1 and all weights 0.3, so that each of 192,000 labels is taken for certain, and all of dx is their sum."""
    x_ND, tail, positives = make(600, 64, 12_000, 16, 64, 0.0, 0, BF16, False)
    x_ND.fill_(1)
    tail.weight.fill_(0.3)
    truth = copy.deepcopy(tail)
    dx, _ = step(x_ND, positives, tail, ARGS)
    true_dx, _ = reference.tail_step(x_ND, positives, truth, ARGS)
    assert dx.isfinite().all()
    assert distance(dx, true_dx) < 1.5e-2


@pytest.mark.parametrize("what", ["a text", "all weights", "some"])
def test_it_ends_whatever_is_not_finite(what: str) -> None:
    """Sums of dW are told apart by a bit of theirs, which must be there in those of no number, too; and these must stay NaN."""
    x_ND, tail, positives = make(300, 384, 4000, 16, 64, 0.003, 7, BF16, True)
    before = tail.weight.clone()
    if what == "a text":
        x_ND[100] = torch.nan
    elif what == "all weights":
        tail.weight.fill_(torch.nan)
    else:
        x_ND[7] = torch.inf
        x_ND[100, ::2] = torch.nan
        tail.weight[5] = torch.nan
    dx, value = step(x_ND, positives, tail, ARGS)
    assert float(value) != float(value)
    real = tail.weight.view(-1, 64)[: tail.rows]
    if what == "some":
        assert not dx[7].isfinite().any()
        assert tail.weight[5].isnan().all()
        reads = (tail.index % 2 == 0)[:, None].expand_as(before).reshape(-1, 64)[: tail.rows]
        assert real[reads].isnan().all()
    else:
        assert real.isnan().all()
        assert tail.bias.view(-1)[: tail.rows].isnan().all()


def test_random_bits_are_those_of_the_other_kernel() -> None:
    """Gradients are next to nothing here, so that sums of other orders are rounded alike but for the bits."""
    x_ND, tail, positives = make(300, 384, 900, 16, 64, 0.003, 7, BF16, True)
    args = replace(ARGS, scale=1e-6)
    mine, other = copy.deepcopy(tail), copy.deepcopy(tail)
    step(x_ND, positives, mine, args)
    tail_step(x_ND, positives, other, args, config=TABLE[16])
    for name in ("weight", "momentum"):
        assert float((getattr(tail, name) != getattr(mine, name)).float().mean()) > 0.5, name
        assert float((getattr(other, name) != getattr(mine, name)).float().mean()) < 0.01, name


def test_pairs_outside_the_shard_are_passed_over_and_those_that_repeat_count_once() -> None:
    x_ND, tail, positives = make(300, 384, 900, 16, 64, 0.003, 7, BF16, True)
    hot = (positives.row // 16 != 3) & (positives.row // 16 != 4)
    many = torch.arange(48, 80, device=CUDA).repeat_interleave(300)  # groups 3 and 4: each text has all labels
    row = torch.cat((positives.row[hot], many))
    batch = torch.cat((positives.batch[hot], torch.arange(300, device=CUDA).repeat(32)))
    order = torch.argsort(row, stable=True)
    row, batch = row[order], batch[order]
    thrice_row, thrice_batch = row.repeat_interleave(3), batch.repeat_interleave(3)
    outside = torch.tensor([-(2**40), -5, -5, -1, tail.rows, tail.rows + 6, 14_400, 2**33], device=CUDA)
    every = Positives(
        torch.cat((torch.zeros(4, dtype=torch.int64, device=CUDA), thrice_batch, torch.arange(4, device=CUDA))),
        torch.cat((outside[:4], thrice_row, outside[4:])),
    )
    first, second, before = copy.deepcopy(tail), copy.deepcopy(tail), copy.deepcopy(tail)
    clean = Positives(batch, row)
    got, other = step(x_ND, clean, first, ARGS), step(x_ND, every, second, ARGS)
    check_step(got, first, before, x_ND, clean, ARGS)
    assert torch.equal(got[0], other[0])
    assert float(got[1]) == float(other[1])
    assert_same_bits(first, second)


def test_what_it_serves_does_not_depend_on_the_labels_nor_on_the_loss() -> None:
    x_ND, tail, _ = make(512, 384, 8, 16, 64, 0.0, 0, BF16, True)
    args = replace(ARGS, deterministic=True)
    assert slab_tail.serves(x_ND, tail, ARGS)
    assert slab_tail.serves(torch.cat((x_ND, x_ND), 1), tail, ARGS)
    assert not slab_tail.serves(x_ND[:192], tail, ARGS)
    assert slab_tail.serves(x_ND[:100], tail, args)
    for other in (replace(args, loss="squared_hinge"), replace(args, half_sums=False)):
        assert not slab_tail.serves(x_ND, tail, other)
    assert not slab_tail.serves(x_ND.float(), tail, args)
    assert not slab_tail.serves(x_ND[:0], tail, args)
    assert not slab_tail.serves(x_ND.repeat(1, 3), tail, args)
    shifted = torch.empty(tail.weight.numel() + 1, dtype=BF16, device=CUDA)[1:].view_as(tail.weight)
    for name, value in (("momentum", tail.momentum.float()), ("index", tail.index.int()), ("weight", shifted)):
        assert not slab_tail.serves(x_ND, replace(tail, **{name: value}), args)


def test_where_it_does_not_compile_the_other_kernel_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    x_ND, tail, positives = make(300, 384, 40, 16, 64, 0.003, 7, BF16, True)
    monkeypatch.setattr(slab_tail, "FILES", ("slab.cuh", "slab_tail.cu"))
    for _ in range(2):
        assert not slab_tail.serves(x_ND, tail, ARGS)
        tail_step(x_ND, positives, tail, ARGS)
    assert len(caplog.records) == 1
    assert "Triton's serves" in caplog.text
