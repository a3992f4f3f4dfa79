"""The tail's step from slabs on a GPU: against float64 and plain torch, and what must not change a bit of it."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tails import ARGS, CUDA, FIRST_ROW, distance, make, plain, poisoned  # noqa: F401
from torch import Tensor

from haste_kernels import Positives, StepArgs, TailState, reference, slab_tail, slabs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if torch.cuda.get_device_capability() < slabs.CAPABILITY:
    pytest.skip("an older GPU", allow_module_level=True)

from haste_kernels.triton_tail import tail_step

pytestmark = pytest.mark.gpu
FIXED = replace(ARGS, deterministic=True)
STATES = ("weight", "momentum", "bias", "bias_momentum")
BF16 = torch.bfloat16


def bits(tensor: Tensor) -> Tensor:
    """So that NaN equals itself."""
    return tensor.contiguous().view(torch.int16 if tensor.dtype == BF16 else torch.int32)


def same_states(a: TailState, b: TailState) -> None:
    for name in STATES:
        if getattr(a, name) is not None:
            assert torch.equal(bits(getattr(a, name)), bits(getattr(b, name))), name


def step(x_ND: Tensor, positives: Positives, tail: TailState, args: StepArgs, want_loss: bool = False):
    """The next state, dx and the loss, by the kernel that these tests are of."""
    assert slab_tail.serves(x_ND, tail, args)
    after = copy.deepcopy(tail)
    return after, *tail_step(x_ND, positives, after, args, want_loss)


def cut(n: int, width: int) -> slab_tail.Cut:
    return slab_tail._cut(torch.empty(n, width, dtype=BF16, device=CUDA))


def groups_for(rounds: int, n: int, width: int) -> int:
    """So many that each range of them has more than ``rounds`` rounds; the ring has four."""
    return (rounds * slab_tail.WARPS + 1) * cut(n, width).ranges


CASES = [
    # n, width, groups, padded, rate, momentum, bias
    (512, 96, 7700, 3, 1e-4, BF16, True),  # many rounds: runs of dx end, the ring goes round
    (300, 384, 900, 7, 0.003, BF16, True),
    (257, 768, 333, 15, 0.02, None, True),
    (512, 768, 2000, 0, 0.003, BF16, False),
    (1, 100, 9, 3, 0.5, BF16, True),
    (64, 768, 3000, 1, 1.0, BF16, True),
    (1000, 391, 500, 0, 0.001, None, False),
    (130, 782, 40, 9, 0.0, BF16, True),
    (256, 96, 7000, 3, 1e-4, BF16, True),  # 2, 6 and 7 slabs, which share the units of a group unevenly; the ring goes round twice
    (700, 96, 2400, 3, 1e-4, BF16, True),
    (800, 96, 2000, 3, 1e-4, BF16, True),
]


def test_cases_are_cut_into_all_numbers_of_slabs_that_differ() -> None:
    assert {cut(n, width).slabs for n, width, *_ in CASES} == set(range(1, 9))
    assert all(groups >= groups_for(8, n, width) for n, width, groups, *_ in CASES[-3:])


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_from_slabs_is_as_exact_as_plain_torch(case: tuple, rounding: str) -> None:
    """And has the same bits again, and where it gives the loss."""
    n, width, groups, padded, rate, momentum, bias = case
    x_ND, tail, positives = make(n, width, groups, 16, 64, rate, padded, momentum, bias)
    args, truth = replace(FIXED, rounding=rounding), copy.deepcopy(tail)
    plain_dx, plain_weight = plain(x_ND, tail, positives, args)
    mine, dx, no_loss = step(x_ND, positives, tail, args)
    true_dx, true_loss = reference.tail_step(x_ND, positives, truth, args)
    assert distance(dx, true_dx) <= 1.5 * distance(plain_dx, true_dx)
    unrounded = replace(copy.deepcopy(tail), weight=tail.weight.float(), momentum=None if tail.momentum is None else tail.momentum.float())
    reference.tail_step(x_ND, positives, unrounded, args)
    assert distance(mine.weight, unrounded.weight) <= 1.5 * distance(plain_weight, unrounded.weight) + 1e-9
    for name in STATES[1:]:
        if getattr(truth, name) is not None:
            assert distance(getattr(mine, name), getattr(truth, name)) < 4e-3, name
    again, same_dx, loss = step(x_ND, positives, tail, args, want_loss=True)
    same_states(mine, again)
    assert torch.equal(dx, same_dx)
    assert no_loss is None
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(true_loss), rel=1e-4)


def test_a_logged_step_of_a_large_layer_changes_no_bit() -> None:
    """Outside the deterministic mode, too: a step that is logged took another kernel once."""
    x_ND, tail, positives = make(512, 384, 16_500, 16, 64, 1e-4, 5, BF16, True)
    plain_one, dx, _ = step(x_ND, positives, tail, ARGS)
    logged, logged_dx, loss = step(x_ND, positives, tail, ARGS, want_loss=True)
    same_states(plain_one, logged)
    assert torch.equal(dx, logged_dx)
    assert loss.isfinite()


@pytest.mark.parametrize("padded", [0, 7])
def test_the_loss_of_certain_labels_is_exact(padded: int) -> None:
    """Logits of +-80 and +-200, right ones and wrong ones: e^z is more than float32 holds, and 1 - p less."""
    x_ND, tail, _ = make(300, 384, 40, 16, 64, 0.0, padded, BF16, True)
    tail.weight.mul_(0.01)
    tail.bias.copy_(torch.tensor([80.0, -80.0, 200.0, -200.0], device=CUDA).repeat(40 * 4).view(40, 16))
    row, batch = (torch.rand(tail.rows, 300, device=CUDA) < 0.5).nonzero(as_tuple=True)
    kept, truth = Positives(batch, row), copy.deepcopy(tail)
    _, true_loss = reference.tail_step(x_ND, kept, truth, FIXED)
    mine, _, loss = step(x_ND, kept, tail, FIXED, want_loss=True)
    assert float(loss) == pytest.approx(float(true_loss), rel=1e-5)
    every = torch.arange(300, device=CUDA).repeat(tail.rows), torch.arange(tail.rows, device=CUDA).repeat_interleave(300)
    right = Positives(*(part[every[1] % 2 == 0] for part in every))
    assert 0 <= float(step(x_ND, right, tail, FIXED, want_loss=True)[2]) < 1e-20
    assert mine.weight.isfinite().all()


def test_slabs_sum_dx_of_one_sign() -> None:
    """x = 1 and weights of 0.15: a feature that all groups read passed float16's end, times 256. One run of dx, then several."""
    for n, width, rounds in ((512, 768, 24), (600, 64, 30)):
        x_ND, tail, _ = make(n, width, groups_for(rounds, n, width), 16, 64, 0.0, 0, BF16, False)
        x_ND.fill_(1)
        tail.weight.uniform_(0.1, 0.2)
        tail.index[:, 0] = 0
        truth = copy.deepcopy(tail)
        none = Positives(*(torch.empty(0, dtype=torch.int64, device=CUDA) for _ in range(2)))
        mine, dx, _ = step(x_ND, none, tail, FIXED)
        true_dx, _ = reference.tail_step(x_ND, none, truth, FIXED)
        assert dx.isfinite().all()
        assert distance(dx[:, 0], true_dx[:, 0]) < 1.5e-2
        assert distance(dx, true_dx) < 1.5e-2
        for name in ("weight", "momentum"):
            assert distance(getattr(mine, name), getattr(truth, name)) < 4e-3, name


@pytest.mark.parametrize("cuts", [(0, 5, 16), (0, 3, 7, 11, 16)], ids=str)
def test_unequal_shards_take_the_same_step_to_the_bit(cuts: tuple[int, ...]) -> None:
    """Each of more than 48 groups a range, so that the ring turns, and a group has its turn in another round than in the whole."""
    sixteenth = -(-groups_for(5, 300, 384) // 3)
    x_ND, tail, positives = make(300, 384, 16 * sixteenth, 16, 64, 1e-4, 0, BF16, True)
    whole, dx, _ = step(x_ND, positives, tail, FIXED)
    total = torch.zeros_like(dx)
    for i, (start, stop) in enumerate(pairwise(cuts)):
        part, first, rows = slice(start * sixteenth, stop * sixteenth), start * sixteenth * 16, (stop - start) * sixteenth * 16
        state = TailState(*[t[part].clone() for t in (tail.weight, tail.index, tail.momentum, tail.bias, tail.bias_momentum)],
                          FIRST_ROW + first, rows, 5 + start * sixteenth)  # fmt: skip
        # Those of other shards stay, for they must be passed over. Some steps are logged.
        after, got, _ = step(x_ND, Positives(positives.batch, positives.row - first), state, FIXED, want_loss=i % 2 == 0)
        total += got
        same_states(after, TailState(*(None if t is None else t[part] for t in (whole.weight, whole.index, whole.momentum, whole.bias,
                                                                               whole.bias_momentum)), 0, rows, 0))  # fmt: skip
    assert distance(total, dx) < 4e-3  # float16 runs, cut elsewhere


@pytest.mark.parametrize("padded", [0, 7])
def test_slabs_pass_over_positives_of_other_shards(padded: int) -> None:
    """Before the first row, at padding, and behind the last; some twice."""
    x_ND, tail, positives = make(300, 384, 200, 16, 64, 0.003, padded, BF16, True)
    before, after = torch.tensor([-4000, -5, -5, -1], device=CUDA), torch.arange(tail.rows, 3200 + 40, device=CUDA).repeat_interleave(2)
    row = torch.cat((before, positives.row, after))
    batch = torch.cat((before % 300, positives.batch, after % 300))
    mine, dx, loss = step(x_ND, positives, tail, FIXED, want_loss=True)
    other, same_dx, same_loss = step(x_ND, Positives(batch, row), tail, FIXED, want_loss=True)
    same_states(mine, other)
    assert torch.equal(dx, same_dx)
    assert torch.equal(loss, same_loss)


@pytest.mark.parametrize("rate", [0.003, 0.2])  # the second: several times 32 a group, so that runs of the same pair are cut
def test_slabs_count_a_pair_once(rate: float) -> None:
    x_ND, tail, positives = make(300, 384, 40, 16, 64, rate, 3, BF16, True)
    mine, dx, loss = step(x_ND, positives, tail, FIXED, want_loss=True)
    _, true_loss = reference.tail_step(x_ND, positives, copy.deepcopy(tail), FIXED)
    assert float(loss) == pytest.approx(float(true_loss), rel=1e-4)
    for times in (2, 3, 33):
        repeated = Positives(*(part.repeat_interleave(times) for part in positives))
        for want_loss in (False, True):
            other, same_dx, same_loss = step(x_ND, repeated, tail, FIXED, want_loss)
            same_states(mine, other)
            assert torch.equal(dx, same_dx)
            assert not want_loss or torch.equal(loss, same_loss)


@pytest.mark.parametrize(("number", "seed"), [(9, 2**40 + 3), (2**31 + 5, 2**64 - 1)])
def test_slabs_round_with_the_same_random_bits(number: int, seed: int) -> None:
    """Gradients are next to nothing here, so that sums of other orders are rounded alike but for the bits."""
    x_ND, tail, positives = make(300, 384, 900, 16, 64, 0.003, 7, BF16, True)
    args = replace(ARGS, scale=1e-6, step=number, seed=seed)
    mine, other = step(x_ND, positives, tail, replace(args, deterministic=True))[0], copy.deepcopy(tail)
    assert not slab_tail.serves(x_ND, tail, args)
    tail_step(x_ND, positives, other, args)
    for name in ("weight", "momentum"):
        assert float((getattr(tail, name) != getattr(mine, name)).float().mean()) > 0.5, name
        assert float((getattr(other, name) != getattr(mine, name)).float().mean()) < 0.01, name


@pytest.mark.parametrize("spoilt", ["x", "weights", "products"])
def test_slabs_end_and_spread_what_is_no_number(spoilt: str) -> None:
    """Parts of dW are told apart by a bit of theirs, which those of no number must have, too; rounds of both marks are here."""
    x_ND, tail, positives = make(300, 384, groups_for(9, 300, 384), 16, 64, 1e-4, 7, BF16, True)
    if spoilt == "x":
        x_ND[7], x_ND[100, ::2] = torch.inf, torch.nan
    elif spoilt == "weights":
        tail.weight.fill_(torch.nan)
    else:  # infinity times zero
        x_ND[:, ::3] = torch.inf
        tail.weight[:, :, ::2] = 0
    after, dx, loss = step(x_ND, positives, tail, FIXED, want_loss=True)
    assert loss.isnan()
    assert dx[100].isnan().any()
    real = slice(0, tail.rows)
    for name in ("weight", "momentum"):
        assert getattr(after, name).view(-1, 64)[real].isnan().all(), name
    for name in ("bias", "bias_momentum"):
        assert getattr(after, name).view(-1)[real].isnan().all(), name
    same_states(after, step(x_ND, positives, tail, FIXED)[0])


def test_slabs_serve_where_they_can_and_pay() -> None:
    x_ND, tail, _ = make(512, 384, 16_384, 16, 64, 0.0, 0, BF16, True)
    assert slab_tail.serves(x_ND, tail, ARGS)
    assert not slab_tail.serves(x_ND[:500], tail, ARGS)
    assert slab_tail.serves(torch.cat((x_ND, x_ND), 1), tail, ARGS)
    assert slab_tail.serves(x_ND[:100], tail, FIXED)
    for other in (replace(FIXED, loss="squared_hinge"), replace(FIXED, half_sums=False)):
        assert not slab_tail.takes(x_ND, tail, other)
    assert not slab_tail.takes(x_ND.float(), tail, FIXED)
    assert not slab_tail.takes(x_ND.repeat(1, 3), tail, FIXED)
    assert not slab_tail.takes(x_ND[:0], tail, FIXED)
    shifted = torch.empty(tail.weight.numel() + 1, dtype=BF16, device=CUDA)[1:].view_as(tail.weight)
    for name, value in (("momentum", tail.momentum.float()), ("index", tail.index.int()), ("weight", shifted)):
        assert not slab_tail.takes(x_ND, replace(tail, **{name: value}), FIXED)


def test_a_kernel_that_does_not_compile_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, tail, positives = make(300, 384, 40, 16, 64, 0.003, 7, BF16, True)
    monkeypatch.setattr(slab_tail, "FILES", ("slab.cuh", "slab_linear.cu"))  # which has no such kernel
    monkeypatch.setattr(slabs, "_refused", set())
    true_dx, _ = reference.tail_step(x_ND, positives, copy.deepcopy(tail), FIXED)
    with pytest.warns(UserWarning, match="cannot be compiled here"):
        dx, loss = tail_step(x_ND, positives, tail, FIXED, want_loss=True)
    assert distance(dx, true_dx) < 1e-2
    assert loss is not None
    assert not slab_tail.serves(x_ND, tail, FIXED)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_slabs_run_on_another_gpu_than_the_current_one() -> None:
    x_ND, tail, positives = make(300, 384, 200, 16, 64, 0.003, 7, BF16, True)
    mine, dx, loss = step(x_ND, positives, tail, FIXED, want_loss=True)
    there = replace(tail, **{name: getattr(tail, name).to("cuda:1") for name in (*STATES, "index")})
    other, same_dx, same_loss = step(x_ND.to("cuda:1"), Positives(*(part.to("cuda:1") for part in positives)), there, FIXED, want_loss=True)
    assert torch.cuda.current_device() == 0
    same_states(mine, replace(other, **{name: getattr(other, name).to(CUDA) for name in STATES}))
    assert torch.equal(dx, same_dx.to(CUDA))
    assert torch.equal(loss, same_loss.to(CUDA))
