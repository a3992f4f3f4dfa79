"""Random features, connection scores, prune and regrow: against the reference, and the properties that training relies on."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_kernels import TailState, chunks, connection_scores, index_dtype, prune_and_regrow, random_features, reference


def make_tail(groups, size, fan_in, width, padded=0, dtype=torch.float32, momentum=True, seed=0):
    torch.manual_seed(seed)
    shape = (groups, size, fan_in)
    weight = (torch.randint(-16, 17, shape) / 8).to(dtype)  # sums are exact, equal scores are common
    kept = torch.randn(shape).to(dtype) if momentum else None
    return TailState(weight, random_features(5, groups, width, fan_in, seed), kept, None, None, 0, groups * size - padded, 5)


SHAPES = {
    "groups": st.integers(0, 7),
    "size": st.sampled_from([1, 4, 16]),
    "fan_in": st.integers(1, 12),
    "extra": st.integers(0, 14),
    "padded": st.integers(0, 15),
    "share": st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "momentum": st.booleans(),
    "seed": st.integers(0, 2**31 - 1),
    "step": st.integers(0, 10**6),
}


@settings(max_examples=100, deadline=None)
@given(**SHAPES)
def test_prune_and_regrow(groups, size, fan_in, extra, padded, share, dtype, momentum, seed, step):
    width = fan_in + extra
    tail = make_tail(groups, size, fan_in, width, min(padded, size - 1) if groups else 0, dtype, momentum, seed)
    prune = torch.rand(groups, fan_in) < share
    before, slow = copy.deepcopy(tail), copy.deepcopy(tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_BYTES", 3000)
        replaced = prune_and_regrow(tail, prune, width, seed, step)
    assert replaced == reference.prune_and_regrow(slow, prune, width, seed, step)
    for name in ("index", "weight", "momentum"):
        if getattr(tail, name) is not None:
            assert torch.equal(getattr(tail, name), getattr(slow, name))

    assert tail.index.dtype == before.index.dtype
    assert replaced == prune.sum(1).clamp(max=width - fan_in).sum()
    for t in range(groups):
        old, new = before.index[t].tolist(), tail.index[t].tolist()
        assert new == sorted(set(new))
        assert new[0] >= 0
        assert new[-1] < width
        assert len(set(new) - set(old)) == min(int(prune[t].sum()), width - fan_in)
        assert set(old) - set(new) <= {old[slot] for slot in range(fan_in) if prune[t, slot]}
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
    assert prune_and_regrow(tail, torch.ones(1, 3, dtype=torch.bool), 5, 0, 0) == 2
    assert set(tail.index[0].tolist()) == set(range(5)) - old | {strongest}
    assert tail.weight[0, 0].sort().values.tolist() == [-9.0, 0.0, 0.0]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_independent_of_sharding(count):
    tail = make_tail(9, 4, 6, 40, padded=1)
    prune = torch.rand(9, 6) < 0.4
    whole = copy.deepcopy(tail)
    replaced = prune_and_regrow(whole, prune, 40, 3, 17)
    parts, total = [], 0
    for ids in torch.arange(9).tensor_split(count):
        a, b = int(ids[0]), int(ids[-1]) + 1
        values = {"weight": tail.weight[a:b].clone(), "momentum": tail.momentum[a:b].clone(), "index": tail.index[a:b].clone()}
        parts.append(replace(tail, **values, first_row=4 * a, rows=min(4 * b, tail.rows) - 4 * a, first_group=5 + a))
        total += prune_and_regrow(parts[-1], prune[a:b], 40, 3, 17)
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
        prune_and_regrow(tail, torch.ones(6, 6, dtype=torch.bool), 60, seed, step)
        results.append(tuple(tail.index.flatten().tolist()))
    assert len(set(results)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [0, 1, 15])
def test_connection_scores(dtype, padded):
    tail = make_tail(4, 16, 5, 20, padded, dtype)
    if padded:
        tail.weight[-1, 16 - padded :] = 1e6
    scores = connection_scores(tail)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), reference.connection_scores(tail), rtol=1e-5, atol=1e-6)


def test_index_type_and_width():
    assert index_dtype(2**15) == torch.int16
    assert index_dtype(2**15 + 1) == torch.int32
    assert int(random_features(0, 1, 2**15, 2**15, 0).max()) == 2**15 - 1
    for fan_in in (0, 9):
        with pytest.raises(ValueError, match="between 1 and the width 8"):
            random_features(0, 1, 8, fan_in, 0)
