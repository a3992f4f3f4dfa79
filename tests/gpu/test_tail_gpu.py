"""The fused tail step on a GPU in bfloat16: against float64 and plain torch, poisoned memory, sharding, the deterministic mode."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from haste_kernels import Positives, StepArgs, TailState, random_features, reference

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


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_take_the_same_step_to_the_bit(shards: int) -> None:
    x_ND, tail, positives = make(300, 384, 40, 16, 64, 0.003, 0, torch.bfloat16, True)
    whole = copy.deepcopy(tail)
    dx, _ = tail_step(x_ND, positives, whole, ARGS)
    each, total = 40 // shards, torch.zeros_like(dx)
    for i in range(shards):
        part = slice(i * each, (i + 1) * each)
        rows = each * 16
        mine = (positives.row >= i * rows) & (positives.row < (i + 1) * rows)
        state = TailState(*[t[part].clone() for t in (tail.weight, tail.index, tail.momentum, tail.bias, tail.bias_momentum)],
                          FIRST_ROW + i * rows, rows, 5 + i * each)  # fmt: skip
        got, _ = tail_step(x_ND, Positives(positives.batch[mine], positives.row[mine] - i * rows), state, ARGS)
        total += got
        for name in ("weight", "momentum", "bias"):
            assert torch.equal(getattr(state, name), getattr(whole, name)[part]), name
    assert distance(total, dx) < 2e-3  # float16 runs, cut elsewhere


def test_deterministic_mode_gives_the_same_bits() -> None:
    x_ND, tail, positives = make(300, 384, 400, 16, 64, 0.003, 0, torch.bfloat16, True)
    args = replace(ARGS, deterministic=True)
    runs = [tail_step(x_ND, positives, copy.deepcopy(tail), args)[0] for _ in range(5)]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def test_a_pair_that_stands_twice_counts_once() -> None:
    x_ND, tail, positives = make(300, 384, 40, 16, 64, 0.01, 0, torch.float32, True)
    twice = Positives(positives.batch.repeat_interleave(2), positives.row.repeat_interleave(2))
    first, second = copy.deepcopy(tail), copy.deepcopy(tail)
    tail_step(x_ND, positives, first, ARGS)
    tail_step(x_ND, twice, second, ARGS)
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


def test_a_feature_that_every_group_reads_is_still_summed_well() -> None:
    """Its float16 runs are D / F = 12 times as long as RUN: LOG.md has the error that comes of it."""
    x_ND, tail, positives = make(256, 768, 4096, 16, 64, 1e-4, 0, torch.bfloat16, True)
    tail.index[:, 0] = 0
    truth = copy.deepcopy(tail)
    dx, _ = tail_step(x_ND, positives, tail, ARGS)
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
