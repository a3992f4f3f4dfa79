"""The fused tail step on a GPU in bfloat16: against float64 and plain torch, poisoned memory, sharding, the deterministic mode."""

import copy
from dataclasses import replace

import pytest
import torch
from tails import ARGS, FIRST_ROW, distance, make, plain, poisoned  # noqa: F401

from haste_kernels import Positives, TailState, reference, slabs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from haste_kernels.triton_tail import CANDIDATES, TABLE, TailConfig, tail_step

pytestmark = pytest.mark.gpu
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


@pytest.mark.parametrize("deterministic", [False, True])  # on older GPUs Triton's scratch memory is more
def test_memory_is_the_states_and_little_more(deterministic: bool) -> None:
    if deterministic and torch.cuda.get_device_capability() < slabs.CAPABILITY:
        pytest.skip("an older GPU")
    args = replace(ARGS, deterministic=deterministic)
    x_ND, tail, positives = make(512, 768, 4096, 16, 64, 1e-5, 0, torch.bfloat16, True)
    states = sum(t.numel() * t.element_size() for t in (tail.weight, tail.index, tail.momentum, tail.bias, tail.bias_momentum))
    tail_step(x_ND, positives, tail, args)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tail_step(x_ND, positives, tail, args)
    logits = 4 * 512 * tail.rows
    assert torch.cuda.max_memory_allocated() - before < min(40 << 20, logits / 3, 3 * states)
