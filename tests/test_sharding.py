"""Partition arithmetic: everything is owned once, in order, and nearly evenly."""

import itertools

import hypothesis.strategies as st
from hypothesis import given

from haste_dist.sharding import batch_share, label_shard, span

COUNT, PARTS = st.integers(0, 10_000), st.integers(1, 64)


@given(COUNT, PARTS)
def test_spans_tile_the_range_evenly(count: int, parts: int) -> None:
    spans = [span(count, parts, p) for p in range(parts)]
    assert spans[0][0] == 0
    assert spans[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 500), st.integers(0, 200), st.sampled_from([1, 16, 32]), st.integers(0, 31), PARTS)
def test_label_shards_hold_each_real_row_once(head: int, groups: int, size: int, missing: int, ranks: int) -> None:
    labels = head + max(0, groups * size - missing % size)
    shards = [label_shard(head, groups, size, labels, ranks, r) for r in range(ranks)]
    rows = [row for s in shards for row in range(s.head_start, s.head_stop)]
    tails = [row for s in shards for row in range(s.tail_start, s.tail_start + s.tail_rows)]
    assert rows == list(range(head))
    assert tails == list(range(head, labels))


@given(st.integers(1, 5_000), PARTS)
def test_batch_shares_gather_to_the_batch_with_padding_last(rows: int, ranks: int) -> None:
    shares = [batch_share(rows, ranks, r) for r in range(ranks)]
    padded = shares[0][2]
    assert {share[2] for share in shares} == {padded}
    gathered = [start + i if start + i < stop else None for start, stop, _ in shares for i in range(padded)]
    assert gathered[:rows] == list(range(rows))
    assert set(gathered[rows:]) <= {None}
