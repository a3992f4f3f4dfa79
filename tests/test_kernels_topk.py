"""topk and merge_topk: exact, ties by lower row, padding, odd scores, chunks and shards."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_kernels import HeadState, TailState, chunks, merge_topk, random_features, reference, topk
from haste_kernels import topk as topk_function

topk_module = __import__("sys").modules[topk_function.__module__]


def make(groups, size, padded, head_rows, width, fan_in, n, seed, levels):
    """Whole-number values, few of them, so that many scores are equal and exact in float32."""
    torch.manual_seed(seed)

    def whole(*shape):
        return torch.randint(-levels, levels + 1, shape).float()

    head = HeadState(whole(head_rows, width), None, whole(head_rows), None, 2**33)
    first = 2**33 + 5000
    features = random_features(0, groups, width, fan_in, seed)
    tail = TailState(whole(groups, size, fan_in), features, None, whole(groups, size), None, first, groups * size - padded, 0)
    return whole(n, width), whole(n, width), head, tail


def all_scores(x_head, x_tail, head, tail):
    dense = reference.dense_tail(tail.weight, tail.index, x_tail.shape[1])
    z_head = reference.logits(x_head, head.weight, head.bias)
    z_tail = reference.logits(x_tail, dense, tail.bias.view(-1))[:, : tail.rows]
    rows = torch.cat([head.first_row + torch.arange(len(head.weight)), tail.first_row + torch.arange(tail.rows)])
    return torch.cat([z_head, z_tail], 1), rows


@settings(max_examples=120, deadline=None)
@given(
    groups=st.integers(0, 40),
    size=st.sampled_from([1, 4, 16]),
    padded=st.integers(0, 15),
    head_rows=st.sampled_from([0, 1, 7, 300]),
    n=st.integers(1, 5),
    k=st.sampled_from([1, 2, 5, 40, 128]),
    levels=st.sampled_from([0, 1, 30]),
    chunk=st.sampled_from([16, 100, 1 << 14]),
    seed=st.integers(0, 100),
)
def test_equals_reference(groups, size, padded, head_rows, n, k, levels, chunk, seed):
    x_head, x_tail, head, tail = make(groups, size, min(padded, size - 1) if groups else 0, head_rows, 9, 4, n, seed, levels)
    z, rows = all_scores(x_head, x_tail, head, tail)
    expected_scores, expected_rows = reference.topk(z, rows, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_module, "_chunk_rows", lambda n, device: chunk)
        patch.setattr(chunks, "CPU_BYTES", 2000)
        scores, got = topk(x_head, x_tail, head, tail, k)
    assert scores.dtype == torch.float32
    assert torch.equal(got, expected_rows)
    assert torch.equal(scores, expected_scores.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_equals_torch_topk_where_blocks_are_left_out(dtype):
    """Thousands of rows and real-valued scores: most blocks are never looked at, in the default chunks."""
    torch.manual_seed(0)
    tail = TailState(torch.randn(400, 16, 8).to(dtype), random_features(0, 400, 32, 8, 0), None, None, None, 0, 6393, 0)
    x = torch.randn(6, 32)
    scores, rows = topk(None, x, None, tail, 100)
    z = reference.logits(x, reference.dense_tail(tail.weight, tail.index, 32), None)[:, :6393]
    best = z.topk(100)
    assert torch.equal(rows, best.indices)
    torch.testing.assert_close(scores.double(), best.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [2, 3])
def test_merged_shards_equal_the_whole(shards):
    x, _, head, tail = make(12, 4, 3, 20, 9, 4, 4, 1, 1)
    whole = topk(x, x, head, tail, 11)
    found = []
    for h, t in zip(torch.arange(20).tensor_split(shards), torch.arange(12).tensor_split(shards), strict=True):
        a, b = int(t[0]), int(t[-1]) + 1
        part_head = replace(head, weight=head.weight[h], bias=head.bias[h], first_row=head.first_row + int(h[0]))
        part_tail = replace(
            tail,
            weight=tail.weight[a:b],
            index=tail.index[a:b],
            bias=tail.bias[a:b],
            first_row=tail.first_row + 4 * a,
            rows=min(4 * b, tail.rows) - 4 * a,
        )
        found.append(topk(x, x, part_head, part_tail, 11))
    for order in (found, found[::-1]):
        merged = merge_topk(torch.cat([f[0] for f in order], 1), torch.cat([f[1] for f in order], 1), 11)
        assert torch.equal(merged[0], whole[0])
        assert torch.equal(merged[1], whole[1])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-torch.inf, torch.nan, -2.5, -0.0, 0.0, 1.0, 3e38, torch.inf]), min_size=1, max_size=30),
    st.integers(1, 40),
    st.randoms(),
)
def test_merge_of_odd_scores(scores, k, random):
    rows = random.sample(range(2**40), len(scores))
    got = merge_topk(torch.tensor([scores]), torch.tensor([rows]), k)
    expected = reference.topk(torch.tensor([scores]).double(), torch.tensor(rows), k)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0], expected[0].float())


def test_rows_that_are_infinite_or_nan():
    """+inf is first, -inf and NaN never appear, and a NaN does not hide its block."""
    weight = torch.zeros(3000, 1)
    weight[:, 0] = torch.arange(3000) / 1000
    weight[2999], weight[2500], weight[7] = torch.nan, -torch.inf, torch.inf
    scores, rows = topk(torch.ones(2, 1), None, HeadState(weight, None, None, None, 10), None, 4)
    assert rows.tolist() == [[17, 3008, 3007, 3006]] * 2
    assert scores[0, 0] == torch.inf
    scores, rows = topk(torch.full((2, 1), torch.nan), None, HeadState(weight, None, None, None, 10), None, 4)
    assert (rows == -1).all()
    assert (scores == -torch.inf).all()


def test_nothing_to_rank():
    x, _, head, tail = make(0, 4, 0, 0, 9, 4, 3, 0, 1)
    for scores, rows in (topk(x, x, head, tail, 2), topk(x, None, None, None, 2)):
        assert rows.tolist() == [[-1, -1]] * 3
        assert (scores == -torch.inf).all()
    with pytest.raises(ValueError, match="at least 1"):
        topk(x, x, head, tail, 0)
