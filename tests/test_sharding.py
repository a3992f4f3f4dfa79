"""Partition arithmetic: everything is owned once, in order, and nearly evenly."""

import itertools

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from haste_dist.sharding import batch_share, label_shard, span, spread

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
    assert all(s.all_groups == -(-(labels - head) // size) for s in shards)


@given(st.integers(1, 5_000), PARTS)
def test_batch_shares_gather_to_the_batch_with_padding_last(rows: int, ranks: int) -> None:
    shares = [batch_share(rows, ranks, r) for r in range(ranks)]
    padded = shares[0][2]
    assert {share[2] for share in shares} == {padded}
    gathered = [start + i if start + i < stop else None for start, stop, _ in shares for i in range(padded)]
    assert gathered[:rows] == list(range(rows))
    assert set(gathered[rows:]) <= {None}


@given(st.integers(1, 20_000), st.integers(1, 64), st.floats(0.0, 1.0))
def test_every_rank_gets_its_share_of_the_most_frequent_labels(count: int, ranks: int, share: float) -> None:
    order = spread(count)
    assert np.array_equal(np.sort(order), np.arange(count))
    frequent = round(share * count)
    for rank in range(ranks):
        start, stop = span(count, ranks, rank)
        assert abs((order[start:stop] < frequent).sum() - frequent * (stop - start) / count) < 4


def test_positives_of_a_long_tailed_head_are_shared_out() -> None:
    frequency = 1e6 / np.arange(100, 20_100)  # Zipf's law, behind its first hundred
    for ranks in (2, 3, 4, 8, 16):
        sums = [frequency[spread(20_000)][slice(*span(20_000, ranks, r))].sum() for r in range(ranks)]
        assert max(sums) < 1.1 * np.mean(sums)
        assert max(frequency[slice(*span(20_000, ranks, r))].sum() for r in range(ranks)) > 1.3 * np.mean(sums)
