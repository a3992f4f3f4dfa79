"""The fused tail step on a GPU in bfloat16: against float64 and plain torch, poisoned memory, sharding, the deterministic mode."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from haste_kernels import Positives, StepArgs, TailState, random_features, reference, slab_tail, slabs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from haste_kernels.triton_tail import CANDIDATES, TABLE, TailConfig, tail_step

pytestmark = pytest.mark.gpu
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


CASES = [
    # n, width, groups, size, fan_in, rate, padded, momentum, bias, loss
    (300, 384, 40, 16, 64, 0.003, 7, torch.bfloat16, True, "bce"),
    (300, 384, 40, 32, 64, 0.0, 0, torch.bfloat16, False, "bce"),
    (257, 768, 33, 64, 64, 0.02, 63, torch.float32, True, "bce"),
    (512, 768, 17, 128, 128, 0.003, 1, None, True, "bce"),
    (1, 100, 9, 16, 16, 0.5, 3, torch.bfloat16, True, "bce"),
    (130, 8192, 12, 32, 256, 0.01, 5, torch.bfloat16, True, "squared_hinge"),
    (200, 500, 12, 64, 100, 1.0, 5, torch.bfloat16, True, "squared_hinge"),
    (1111, 384, 5, 16, 32, 1.0, 0, torch.float32, False, "bce"),
    (2100, 384, 12, 32, 64, 0.0002, 0, torch.bfloat16, True, "bce"),  # some groups have few positives, some many
    (700, 384, 12, 64, 64, 0.0004, 0, torch.bfloat16, True, "squared_hinge"),
]


@pytest.mark.parametrize("sums", ["float16", "float32", "in order"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_as_exact_as_plain_torch(case: tuple, sums: str) -> None:
    *shape, loss = case
    x_ND, tail, positives = make(*shape)
    args = replace(ARGS, loss=loss, deterministic=sums == "in order", half_sums=sums == "float16")
    mine, truth = copy.deepcopy(tail), copy.deepcopy(tail)
    plain_dx, plain_weight = plain(x_ND, tail, positives, args)
    dx, value = tail_step(x_ND, positives, mine, args, want_loss=True)
    true_dx, true_value = reference.tail_step(x_ND, positives, truth, args)
    assert distance(dx, true_dx) <= 1.5 * distance(plain_dx, true_dx)
    assert float(value) == pytest.approx(float(true_value), rel=1e-4)
    # The update before it is rounded: the same states in float32.
    unrounded = replace(copy.deepcopy(tail), weight=tail.weight.float(), momentum=None if tail.momentum is None else tail.momentum.float())
    reference.tail_step(x_ND, positives, unrounded, args)
    assert distance(mine.weight, unrounded.weight) <= 1.5 * distance(plain_weight, unrounded.weight) + 1e-9
    for name in ("momentum", "bias", "bias_momentum"):
        if getattr(truth, name) is not None:
            assert distance(getattr(mine, name), getattr(truth, name)) < 4e-3, name


SLAB_CASES = [
    # n, width, groups, padded, rate, momentum, bias
    (512, 96, 7700, 3, 1e-4, torch.bfloat16, True),  # many rounds: runs of dx end, the ring goes round
    (300, 384, 900, 7, 0.003, torch.bfloat16, True),
    (257, 768, 333, 15, 0.02, None, True),
    (512, 768, 2000, 0, 0.003, torch.bfloat16, False),
    (1, 100, 9, 3, 0.5, torch.bfloat16, True),
    (64, 768, 3000, 1, 1.0, torch.bfloat16, True),
    (1000, 391, 500, 0, 0.001, None, False),
    (130, 782, 40, 9, 0.0, torch.bfloat16, True),
]
new_gpu = pytest.mark.skipif(torch.cuda.get_device_capability() < slabs.CAPABILITY, reason="an older GPU")


@new_gpu
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("case", SLAB_CASES, ids=str)
def test_a_step_from_slabs_is_as_exact_as_plain_torch(case: tuple, rounding: str) -> None:
    n, width, groups, padded, rate, momentum, bias = case
    x_ND, tail, positives = make(n, width, groups, 16, 64, rate, padded, momentum, bias)
    args = replace(ARGS, rounding=rounding, deterministic=True)
    mine, again, truth = copy.deepcopy(tail), copy.deepcopy(tail), copy.deepcopy(tail)
    assert slab_tail.serves(x_ND, mine, args, want_loss=False)
    plain_dx, plain_weight = plain(x_ND, tail, positives, args)
    dx, _ = tail_step(x_ND, positives, mine, args)
    true_dx, _ = reference.tail_step(x_ND, positives, truth, args)
    assert distance(dx, true_dx) <= 1.5 * distance(plain_dx, true_dx)
    unrounded = replace(copy.deepcopy(tail), weight=tail.weight.float(), momentum=None if tail.momentum is None else tail.momentum.float())
    reference.tail_step(x_ND, positives, unrounded, args)
    assert distance(mine.weight, unrounded.weight) <= 1.5 * distance(plain_weight, unrounded.weight) + 1e-9
    for name in ("momentum", "bias", "bias_momentum"):
        if getattr(truth, name) is not None:
            assert distance(getattr(mine, name), getattr(truth, name)) < 4e-3, name
    assert torch.equal(dx, tail_step(x_ND, positives, again, args)[0])
    for name in ("weight", "momentum", "bias", "bias_momentum"):
        assert getattr(mine, name) is None or torch.equal(getattr(mine, name), getattr(again, name)), name


@new_gpu
def test_slabs_round_with_the_same_random_bits() -> None:
    """Gradients are next to nothing here, so that sums of other orders are rounded alike but for the bits."""
    x_ND, tail, positives = make(300, 384, 900, 16, 64, 0.003, 7, torch.bfloat16, True)
    args = replace(ARGS, scale=1e-6)
    mine, other = copy.deepcopy(tail), copy.deepcopy(tail)
    tail_step(x_ND, positives, mine, replace(args, deterministic=True))
    tail_step(x_ND, positives, other, args)
    for name in ("weight", "momentum"):
        assert float((getattr(tail, name) != getattr(mine, name)).float().mean()) > 0.5, name
        assert float((getattr(other, name) != getattr(mine, name)).float().mean()) < 0.01, name


@new_gpu
def test_slabs_end_whatever_is_not_finite() -> None:
    """Parts of dW are told apart by a bit of theirs, which must be there in those of no number, too."""
    x_ND, tail, positives = make(300, 384, 900, 16, 64, 0.003, 7, torch.bfloat16, True)
    args = replace(ARGS, deterministic=True)
    x_ND[7] = torch.inf
    x_ND[100, ::2] = torch.nan
    tail.weight[5] = torch.nan
    dx, _ = tail_step(x_ND, positives, tail, args)
    assert not dx[7].isfinite().any()
    assert tail.weight.isnan().any()


@new_gpu
def test_slabs_serve_where_they_can_and_pay() -> None:
    x_ND, tail, _ = make(512, 384, 16_384, 16, 64, 0.0, 0, torch.bfloat16, True)
    args = replace(ARGS, deterministic=True)
    assert slab_tail.serves(x_ND, tail, ARGS, want_loss=False)
    assert not slab_tail.serves(x_ND[:500], tail, ARGS, want_loss=False)
    assert slab_tail.serves(torch.cat((x_ND, x_ND), 1), tail, ARGS, want_loss=False)
    assert slab_tail.serves(x_ND[:100], tail, args, want_loss=False)
    for other in (replace(args, loss="squared_hinge"), replace(args, half_sums=False)):
        assert not slab_tail.takes(x_ND, tail, other, want_loss=False)
    assert not slab_tail.takes(x_ND, tail, args, want_loss=True)
    assert not slab_tail.takes(x_ND.float(), tail, args, want_loss=False)
    assert not slab_tail.takes(x_ND.repeat(1, 3), tail, args, want_loss=False)
    shifted = torch.empty(tail.weight.numel() + 1, dtype=torch.bfloat16, device=CUDA)[1:].view_as(tail.weight)
    for name, value in (("momentum", tail.momentum.float()), ("index", tail.index.int()), ("weight", shifted)):
        assert not slab_tail.takes(x_ND, replace(tail, **{name: value}), args, want_loss=False)


@pytest.mark.parametrize("config", [*TABLE.values(), *CANDIDATES[::5], TailConfig(128, False, 8, 1)], ids=str)
def test_every_tile_gives_the_same_step(config: TailConfig) -> None:
    x_ND, tail, positives = make(300, 384, 40, 32, 64, 0.003, 7, torch.float32, True)
    tail.weight = tail.weight.bfloat16()
    first, second = copy.deepcopy(tail), copy.deepcopy(tail)
    dx, _ = tail_step(x_ND, positives, first, ARGS)
    other, _ = tail_step(x_ND, positives, second, ARGS, config=config)
    assert distance(other, dx) < 2e-3
    assert distance(second.momentum, first.momentum) < 1e-4
    assert distance(second.bias, first.bias) < 1e-5


@pytest.mark.parametrize("deterministic", [False, True])  # which on new GPUs is another kernel
@pytest.mark.parametrize("shards", [2, 4])
def test_shards_take_the_same_step_to_the_bit(shards: int, deterministic: bool) -> None:
    x_ND, tail, positives = make(300, 384, 40, 16, 64, 0.003, 0, torch.bfloat16, True)
    whole, args = copy.deepcopy(tail), replace(ARGS, deterministic=deterministic)
    dx, _ = tail_step(x_ND, positives, whole, args)
    each, total = 40 // shards, torch.zeros_like(dx)
    for i in range(shards):
        part = slice(i * each, (i + 1) * each)
        rows = each * 16
        mine = (positives.row >= i * rows) & (positives.row < (i + 1) * rows)
        state = TailState(*[t[part].clone() for t in (tail.weight, tail.index, tail.momentum, tail.bias, tail.bias_momentum)],
                          FIRST_ROW + i * rows, rows, 5 + i * each)  # fmt: skip
        got, _ = tail_step(x_ND, Positives(positives.batch[mine], positives.row[mine] - i * rows), state, args)
        total += got
        for name in ("weight", "momentum", "bias"):
            assert torch.equal(getattr(state, name), getattr(whole, name)[part]), name
    assert distance(total, dx) < 2e-3  # float16 runs, cut elsewhere


@pytest.mark.parametrize("half_sums", [False, True])
def test_deterministic_mode_gives_the_same_bits(half_sums: bool) -> None:
    x_ND, tail, positives = make(300, 384, 400, 16, 64, 0.003, 0, torch.bfloat16, True)
    args = replace(ARGS, deterministic=True, half_sums=half_sums)
    runs = [tail_step(x_ND, positives, copy.deepcopy(tail), args)[0] for _ in range(5)]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16])
def test_a_pair_that_stands_twice_counts_once(momentum: torch.dtype) -> None:
    x_ND, tail, positives = make(300, 384, 40, 16, 64, 0.01, 0, momentum, True)
    args = replace(ARGS, deterministic=momentum == torch.bfloat16)
    twice = Positives(positives.batch.repeat_interleave(2), positives.row.repeat_interleave(2))
    first, second = copy.deepcopy(tail), copy.deepcopy(tail)
    tail_step(x_ND, positives, first, args)
    tail_step(x_ND, twice, second, args)
    assert torch.equal(first.momentum, second.momentum)


def test_long_sums_are_cut_into_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, tail, positives = make(300, 384, 400, 16, 64, 0.003, 0, torch.bfloat16, True)
    truth, whole = copy.deepcopy(tail), copy.deepcopy(tail)
    true_dx, _ = reference.tail_step(x_ND, positives, truth, ARGS)
    short, _ = tail_step(x_ND, positives, tail, ARGS)
    monkeypatch.setattr("haste_kernels.triton_dx.COPIES_BYTES", 1)  # one copy, so more launches than one
    monkeypatch.setattr("haste_kernels.triton_dx.RUN", 24)
    cut, _ = tail_step(x_ND, positives, whole, ARGS)
    assert torch.equal(tail.weight, whole.weight)
    assert distance(cut, true_dx) < 4e-3
    assert distance(short, true_dx) < 4e-3


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_feature_that_every_group_reads_is_still_summed_well(deterministic: bool) -> None:
    """Its float16 runs are D / F = 12 times as long as RUN: LOG.md has the error that comes of it."""
    x_ND, tail, positives = make(256, 768, 4096, 16, 64, 1e-4, 0, torch.bfloat16, True)
    tail.index[:, 0] = 0
    truth = copy.deepcopy(tail)
    dx, _ = tail_step(x_ND, positives, tail, replace(ARGS, deterministic=deterministic))
    true_dx, _ = reference.tail_step(x_ND, positives, truth, ARGS)
    assert distance(dx[:, 0], true_dx[:, 0]) < 1.5e-2
    assert distance(dx[:, 1:], true_dx[:, 1:]) < 4e-3


def test_memory_is_the_states_and_little_more() -> None:
    x_ND, tail, positives = make(512, 768, 4096, 16, 64, 1e-5, 0, torch.bfloat16, True)
    states = sum(t.numel() * t.element_size() for t in (tail.weight, tail.index, tail.momentum, tail.bias, tail.bias_momentum))
    tail_step(x_ND, positives, tail, ARGS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tail_step(x_ND, positives, tail, ARGS)
    logits = 4 * 512 * tail.rows
    assert torch.cuda.max_memory_allocated() - before < min(40 << 20, logits / 3, 3 * states)
