"""Random features, connection scores, prune and regrow: against the reference, and the properties that training relies on."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_kernels import (
    Positives,
    TailState,
    chunks,
    connection_scores,
    gradient_scores,
    index_dtype,
    prune_and_regrow,
    random_features,
    reference,
)


def make_tail(groups, size, fan_in, width, padded=0, dtype=torch.float32, momentum=True, seed=0):
    torch.manual_seed(seed)
    shape = (groups, size, fan_in)
    weight = (torch.randint(-16, 17, shape) / 8).to(dtype)  # sums are exact, equal scores are common
    kept = torch.randn(shape).to(dtype) if momentum else None
    return TailState(weight, random_features(5, groups, width, fan_in, seed), kept, None, None, 0, groups * size - padded, 5)


def make_scores(groups, width):
    """A table of scores of the global groups, equal ones among them, as what is asked for a range of the groups from ``first_group``."""
    table_TD = torch.randint(0, 4, (groups, width)).float()
    return table_TD, lambda first_group: lambda first, last: table_TD[first_group + first : first_group + last]


def ask(table_TF):
    return lambda first, last: table_TF[first:last]


SHAPES = {
    "groups": st.integers(0, 7),
    "size": st.sampled_from([1, 4, 16]),
    "fan_in": st.integers(1, 12),
    "extra": st.integers(0, 14),
    "padded": st.integers(0, 15),
    "share": st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    "momentum": st.booleans(),
    "scored": st.booleans(),
    "seed": st.integers(0, 2**31 - 1),
    "step": st.integers(0, 10**6),
}


@settings(max_examples=100, deadline=None)
@given(**SHAPES)
def test_prune_and_regrow(groups, size, fan_in, extra, padded, share, dtype, momentum, scored, seed, step):
    width = fan_in + extra
    tail = make_tail(groups, size, fan_in, width, min(padded, size - 1) if groups else 0, dtype, momentum, seed)
    prune = torch.rand(groups, fan_in) < share
    before, slow = copy.deepcopy(tail), copy.deepcopy(tail)
    table_TD, source = make_scores(groups, width)
    scores = source(0) if scored else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_BYTES", 3000)
        replaced = prune_and_regrow(tail, ask(prune), width, seed, step, scores)
    assert replaced == reference.prune_and_regrow(slow, prune, width, seed, step, scores)
    for name in ("index", "weight", "momentum"):
        if getattr(tail, name) is not None:
            assert torch.equal(getattr(tail, name).float(), getattr(slow, name).float())

    assert tail.index.dtype == before.index.dtype
    assert replaced == prune.sum(1).clamp(max=width - fan_in).sum()
    for t in range(groups):
        old, new = before.index[t].tolist(), tail.index[t].tolist()
        assert new == sorted(set(new))
        assert new[0] >= 0
        assert new[-1] < width
        assert len(set(new) - set(old)) == min(int(prune[t].sum()), width - fan_in)
        assert set(old) - set(new) <= {old[slot] for slot in range(fan_in) if prune[t, slot]}
        if scored:  # nothing that was passed over is better than what was taken
            rank = [(-float(table_TD[t, feature]), feature) for feature in range(width)]
            taken, left = [rank[f] for f in set(new) - set(old)], [rank[f] for f in set(range(width)) - set(new) - set(old)]
            assert not taken or not left or max(taken) < min(left)
        for slot, feature in enumerate(new):
            for value, was in ((tail.weight, before.weight), (tail.momentum, before.momentum)):
                if value is not None:
                    expected = was[t, :, old.index(feature)] if feature in old else torch.zeros(size, dtype=dtype)
                    assert torch.equal(value[t, :, slot], expected)


def test_surplus_keeps_its_strongest():
    """Five features, three read, all pruned: the two weakest give way, the strongest stays."""
    tail = make_tail(1, 1, 3, 5)
    tail.weight = torch.tensor([[[0.1, -9.0, 0.2]]])
    strongest = int(tail.index[0, 1])
    old = set(tail.index[0].tolist())
    assert prune_and_regrow(tail, ask(torch.ones(1, 3, dtype=torch.bool)), 5, 0, 0) == 2
    assert set(tail.index[0].tolist()) == set(range(5)) - old | {strongest}
    assert tail.weight[0, 0].sort().values.tolist() == [-9.0, 0.0, 0.0]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_independent_of_sharding(count, scored):
    tail = make_tail(9, 4, 6, 40, padded=1)
    prune = torch.rand(9, 6) < 0.4
    source = make_scores(9, 40)[1]
    whole = copy.deepcopy(tail)
    replaced = prune_and_regrow(whole, ask(prune), 40, 3, 17, source(0) if scored else None)
    parts, total = [], 0
    for ids in torch.arange(9).tensor_split(count):
        a, b = int(ids[0]), int(ids[-1]) + 1
        values = {"weight": tail.weight[a:b].clone(), "momentum": tail.momentum[a:b].clone(), "index": tail.index[a:b].clone()}
        parts.append(replace(tail, **values, first_row=4 * a, rows=min(4 * b, tail.rows) - 4 * a, first_group=5 + a))
        total += prune_and_regrow(parts[-1], ask(prune[a:b]), 40, 3, 17, source(a) if scored else None)
    assert total == replaced
    for name in ("index", "weight", "momentum"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    features = random_features(5, 9, 40, 6, 3)
    split = [random_features(5 + int(ids[0]), len(ids), 40, 6, 3) for ids in torch.arange(9).tensor_split(count)]
    assert torch.equal(torch.cat(split), features)


@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(0, 2**40),
    count=st.integers(0, 6),
    fan_in=st.integers(1, 20),
    extra=st.integers(0, 30),
    seed=st.integers(0, 2**31 - 1),
)
def test_random_features(first, count, fan_in, extra, seed):
    width = fan_in + extra
    got = random_features(first, count, width, fan_in, seed)
    assert got.shape == (count, fan_in)
    assert got.dtype == torch.int16
    assert torch.equal(got, reference.random_features(first, count, width, fan_in, seed))
    assert (got.diff(dim=1) > 0).all()
    assert ((got >= 0) & (got < width)).all()


def test_random_features_are_uniform_and_new_each_seed_and_group():
    features = random_features(0, 4000, 32, 8, 1)
    counts = features.flatten().long().bincount(minlength=32)
    # A feature is read by a quarter of 4000 groups: variance 750. Chi-square over 32 cells (31 degrees): 99.9% lie below 61.
    assert float(((counts - 1000.0) ** 2 / 750).sum()) * 31 / 32 < 61
    assert len({tuple(line) for line in features.tolist()}) > 3990
    assert not torch.equal(features, random_features(0, 4000, 32, 8, 2))


def test_regrowth_differs_by_step_and_seed():
    results = []
    for seed, step in ((0, 1), (0, 2), (1, 1)):
        tail = make_tail(6, 4, 6, 60)
        prune_and_regrow(tail, ask(torch.ones(6, 6, dtype=torch.bool)), 60, seed, step)
        results.append(tuple(tail.index.flatten().tolist()))
    assert len(set(results)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("padded", [0, 1, 15])
def test_connection_scores(dtype, padded):
    tail = make_tail(4, 16, 5, 20, padded, dtype)
    if padded:
        tail.weight[-1, 16 - padded :] = 400
    scores = connection_scores(tail)
    assert scores.dtype == torch.float32
    assert torch.equal(torch.cat([connection_scores(tail, 0, 3), connection_scores(tail, 3, 4), connection_scores(tail, 4)]), scores)
    torch.testing.assert_close(scores.double(), reference.connection_scores(tail), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 7, 33]),
    groups=st.integers(1, 6),
    size=st.sampled_from([1, 4, 16]),
    fan_in=st.integers(1, 9),
    extra=st.integers(0, 14),
    padded=st.integers(0, 15),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    loss=st.sampled_from(["bce", "squared_hinge"]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_gradient_scores(n, groups, size, fan_in, extra, padded, share, loss, bias, dtype, data):
    width = fan_in + extra
    tail = make_tail(groups, size, fan_in, width, min(padded, size - 1), dtype, momentum=False)
    tail.bias = torch.randn(groups, size) if bias else None
    x_ND = torch.randn(n, width).to(dtype)
    row, batch = (torch.rand(tail.rows, n) < share).nonzero(as_tuple=True)
    positives = Positives(batch, row)
    expected = reference.gradient_scores(x_ND, positives, tail, loss, 0, groups)
    first = data.draw(st.integers(0, groups))
    last = data.draw(st.integers(first, groups))
    before = copy.deepcopy(tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_BYTES", data.draw(st.sampled_from([1, 20_000, 1 << 23])))
        scores = gradient_scores(x_ND, positives, tail, loss, first, last)
    assert scores.dtype == torch.float32
    assert scores.shape == (last - first, width)
    torch.testing.assert_close(scores.double(), expected[first:last], rtol=2e-5, atol=2e-5 * max(1.0, float(expected.max())))
    assert all(torch.equal(getattr(tail, name), getattr(before, name)) for name in ("weight", "index"))


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_gradient_scores_are_those_of_autograd(loss):
    """A dense layer with the tail's weights, zero where nothing is read: its gradient is not zero there."""
    tail = make_tail(3, 4, 5, 20, padded=2)
    x_ND, dense = torch.randn(7, 20).double(), reference.dense_tail(tail.weight, tail.index, 20).requires_grad_()
    row, batch = (torch.rand(tail.rows, 7) < 0.3).nonzero(as_tuple=True)
    y_NR = torch.zeros(7, 12).double().index_put_((batch, row), torch.ones(1).double())
    reference.loss_sum((x_ND @ dense.T)[:, : tail.rows], y_NR[:, : tail.rows], loss).backward()
    expected = dense.grad.abs().view(3, 4, 20).sum(1)
    for compute, tolerance in ((reference.gradient_scores, 1e-12), (gradient_scores, 1e-5)):
        scores = compute(x_ND, Positives(batch, row), tail, loss, 0, 3)
        torch.testing.assert_close(scores.double(), expected, rtol=tolerance, atol=tolerance)


def test_scores_are_asked_for_before_their_groups_change_and_for_few_groups_at_once(monkeypatch):
    """What is scored is the state before the rewiring, whatever the chunks; no more scores than fit a chunk exist."""
    tail = make_tail(7, 4, 3, 16)
    before, seen = copy.deepcopy(tail), []

    def scores(first, last):
        assert torch.equal(tail.index[first:], before.index[first:])
        assert torch.equal(tail.weight[first:], before.weight[first:])
        seen.append((first, last))
        return torch.arange(16.0).expand(last - first, 16)

    monkeypatch.setattr(chunks, "CPU_BYTES", 2 * (64 * 16 + 3 * (16 * 4 + 32)))
    prune_and_regrow(tail, ask(torch.ones(7, 3, dtype=torch.bool)), 16, 0, 0, scores)
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 7)]
    for old, new in zip(before.index.tolist(), tail.index.tolist(), strict=True):
        assert new == sorted(set(range(16)) - set(old))[-3:]


def test_index_type_and_width():
    assert index_dtype(2**15) == torch.int16
    assert index_dtype(2**15 + 1) == torch.int32
    assert int(random_features(0, 1, 2**15, 2**15, 0).max()) == 2**15 - 1
    for fan_in in (0, 9):
        with pytest.raises(ValueError, match="between 1 and the width 8"):
            random_features(0, 1, 8, fan_in, 0)
