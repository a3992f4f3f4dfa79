"""Predictions over all shards are those of one rank: the same rows, and the same scores to the bit. What a step draws its dropout from."""

from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tiny import run_ranks
from torch import Tensor

from haste_dist.classifier import Classifier
from haste_dist.config import load_config
from haste_dist.loader import Batch
from haste_dist.sharding import batch_share, label_shard
from haste_dist.step import predict_batch, seed_generators
from haste_dist.world import World
from haste_kernels import merge_topk

WIDTH, SIZE, TEXTS = 48, 16, 13


def shards(ranks: int, head: int, groups: int, padded: int, exact: bool) -> list[Classifier]:
    """``exact``: every weight is one of five small integers, so sums are exact in any order, and many scores are equal."""
    config = load_config(None, [f"output.group_size={SIZE}", "output.fan_in=8", "output.bias=false"]).output
    labels = head + max(0, groups * SIZE - padded)
    made = [Classifier(config, label_shard(head, groups, SIZE, labels, ranks, r), WIDTH, 5, torch.device("cpu")) for r in range(ranks)]
    for part in made if exact else ():
        for weight in (part.head.weight, part.tail.weight):
            weight.copy_((weight * 1e4).round().remainder(5) - 2)
    return made


def embeddings(exact: bool) -> Tensor:
    x_ND = torch.randn(TEXTS, WIDTH, generator=torch.Generator().manual_seed(1))
    return x_ND.round() if exact else x_ND


@settings(max_examples=40)
@given(st.integers(0, 50), st.integers(0, 9), st.integers(0, SIZE - 1), st.integers(2, 4), st.integers(1, 260))
def test_the_best_of_the_best_are_the_best(head: int, groups: int, padded: int, ranks: int, k: int) -> None:
    """Shards of no label at all, k beyond the rows of a shard and beyond all labels."""
    x_ND = embeddings(exact=True)
    [whole] = shards(1, head, groups, padded, exact=True)
    scores, rows = whole.topk(x_ND, k)
    found = [part.topk(x_ND, k) for part in shards(ranks, head, groups, padded, exact=True)]
    merged = merge_topk(torch.cat([s for s, _ in found], 1), torch.cat([r for _, r in found], 1), k)
    assert torch.equal(merged[0], scores)
    assert torch.equal(merged[1], rows)
    labels = whole.shard.labels
    assert ((rows >= 0).sum(1) == min(k, labels)).all()
    assert (rows < max(labels, 1)).all()


def predict(world: World, cases: list[tuple[int, int, bool]]) -> None:
    start, stop, padded = batch_share(TEXTS, world.size, world.rank)
    for head, k, exact in cases:
        x_ND = embeddings(exact)
        mine = torch.cat([x_ND[start:stop], x_ND[:1].expand(padded - (stop - start), WIDTH)])
        engine: Any = SimpleNamespace(embed=lambda ids, mask, mine=mine: mine)
        nothing = torch.zeros(padded, 1, dtype=torch.int64)
        batch = Batch(nothing, nothing, nothing, np.arange(start, stop), TEXTS)
        part = shards(world.size, head, 30, 5, exact)[world.rank]
        got = predict_batch(engine, part, batch, world, k)
        [whole] = shards(1, head, 30, 5, exact)
        assert all(torch.equal(a, b) for a, b in zip(got, whole.topk(x_ND, k), strict=True)), (head, k, exact)


@pytest.mark.slow
def test_four_ranks_predict_what_one_predicts() -> None:
    run_ranks(4, predict, [(500, 10, False), (500, 400, False), (23, 7, True), (2, 600, True)])


def test_generators_are_seeded_as_torch_does_it() -> None:
    torch.manual_seed(2**62 + 7)
    expected = torch.rand(5)
    torch.manual_seed(0)
    seed_generators(2**62 + 7, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
