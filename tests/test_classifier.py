"""The output layer of a rank: sharding changes nothing, slices and dropout reach the right features."""

import copy
import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from haste_dist.classifier import HEAD_DROPOUT, TAIL_DROPOUT, Classifier, select_positives
from haste_dist.config import load_config
from haste_dist.errors import ConfigError
from haste_dist.sharding import label_shard
from haste_kernels import merge_topk

HEAD, GROUPS, SIZE, LABELS, WIDTH, N = 23, 5, 16, 23 + 5 * 16 - 3, 24, 10
CPU = torch.device("cpu")


def classifiers(ranks: int, *words: str) -> list[Classifier]:
    config = load_config(None, ["output.group_size=16", "output.fan_in=6", *words]).output
    return [Classifier(config, label_shard(HEAD, GROUPS, SIZE, LABELS, ranks, r), WIDTH, 5, CPU) for r in range(ranks)]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(N, WIDTH, generator=generator)
    rows = torch.stack([torch.randperm(LABELS, generator=generator)[:3] for _ in range(N)])
    rows[4, 1:] = -1
    return x_ND, rows


def whole(parts: list[Classifier], name: str) -> Tensor:
    return torch.cat([p.tensors()[name][0] for p in parts])


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("output.bias=true", "output.loss=squared_hinge", "output.weight_dtype=bfloat16"),
        ("output.tail_dropout=0.5", "output.head_dropout=0.3"),
    ],
)
def test_shards_together_are_the_whole_layer(words: tuple[str, ...]) -> None:
    x_ND, rows_NM = batch()
    one, three = classifiers(1, *words), classifiers(3, *words)
    for step in range(3):
        dx, loss = one[0].step(x_ND, rows_NM, 0.1, step, want_loss=True)
        parts = [part.step(x_ND, rows_NM, 0.1, step, want_loss=True) for part in three]
        torch.testing.assert_close(sum(p[0] for p in parts), dx, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sum(p[1] for p in parts), loss, rtol=1e-5, atol=1e-6)
    for name in one[0].tensors():
        torch.testing.assert_close(whole(three, name), whole(one, name), rtol=1e-5, atol=1e-6)
    scores, found = one[0].topk(x_ND, 7)
    merged = merge_topk(*(torch.cat(t, dim=1) for t in zip(*(part.topk(x_ND, 7) for part in three), strict=True)), 7)
    torch.testing.assert_close(merged[0], scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged[1], found)
    assert int(found.max()) < LABELS


def test_initial_weights_do_not_depend_on_shards_and_fill_their_range() -> None:
    one, four = classifiers(1), classifiers(4)
    for name in ("head.weight", "tail.weight", "tail.index"):
        assert torch.equal(whole(four, name), whole(one, name))
    weight = whole(one, "tail.weight")
    bound = 6**-0.5
    assert weight.abs().max() <= bound
    assert weight.abs().mean() == pytest.approx(bound / 2, rel=0.1)
    assert weight.mean().abs() < 0.05
    assert not whole(classifiers(1, "output.init_scale=0"), "tail.weight").any()


def test_private_slices_read_and_send_gradient_to_their_features_only() -> None:
    [layer] = classifiers(1, "output.head_features=[16,24]", "output.tail_features=[0,8]", "output.head_fraction=0")
    x_ND, rows_NM = batch()
    dx_ND, _ = layer.step(x_ND, rows_NM, 0.1, 0)
    assert dx_ND[:, :8].abs().sum() > 0
    assert dx_ND[:, 16:].abs().sum() > 0
    assert not dx_ND[:, 8:16].any()
    changed = x_ND.clone()
    changed[:, 8:16] = 99
    assert torch.equal(layer.topk(changed, 5)[0], layer.topk(x_ND, 5)[0])


def test_dropout_zeroes_gradient_where_it_zeroed_input_and_keeps_the_mean() -> None:
    [layer] = classifiers(1, "output.tail_dropout=0.5")
    x = torch.ones(2000, WIDTH)
    dropped, mask = layer._masked(x, layer.tail_slice, 0.5, 3, 12)
    assert mask is not None
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(mask, layer._masked(x, layer.tail_slice, 0.5, 4, 12)[1])


def test_the_gradient_passes_the_mask_that_the_input_passed() -> None:
    [dropping], [plain] = classifiers(1, "output.tail_dropout=0.5", "output.head_dropout=0.5"), classifiers(1)
    x_ND, rows_NM = batch()
    masks = [dropping._masked(x_ND, dropping.tail_slice, 0.5, 3, stream)[1] for stream in (HEAD_DROPOUT, TAIL_DROPOUT)]
    dx, _ = dropping.step(x_ND, rows_NM, 0.0, 3)
    expected = torch.zeros_like(dx)
    for mask, other in zip(masks, ("tail", "head"), strict=True):  # the plain layer without its other part
        part = copy.deepcopy(plain)
        setattr(part, other, dataclasses.replace(getattr(part, other), weight=getattr(part, other).weight[:0]))
        expected += part.step(x_ND * mask, rows_NM, 0.0, 3)[0] * mask
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-6)


def test_momentum_none_holds_no_state() -> None:
    [layer] = classifiers(1, "output.momentum=0", "output.bias=false")
    assert set(layer.tensors()) == {"head.weight", "tail.weight", "tail.index"}
    assert layer.bytes() == 4 * (HEAD * WIDTH + GROUPS * SIZE * 6) + 2 * GROUPS * 6


@pytest.mark.parametrize(
    ("words", "said"), [(("output.fan_in=25",), "fan_in=25 is larger than the 24"), (("output.head_features=[0,32]",), "only 24 features")]
)
def test_settings_that_do_not_fit_the_embedding_are_named(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classifiers(1, *words)


@given(st.lists(st.lists(st.integers(-1, 30), min_size=3, max_size=3), min_size=1, max_size=8), st.integers(0, 20), st.integers(0, 20))
def test_positives_are_the_pairs_of_the_shard_in_row_order(rows: list[list[int]], first: int, count: int) -> None:
    positives = select_positives(torch.tensor(rows), first, count)
    pairs = list(zip(positives.row.tolist(), positives.batch.tolist(), strict=True))
    expected = sorted((row - first, n) for n, labels in enumerate(rows) for row in labels if first <= row < first + count)
    assert sorted(pairs) == expected
    assert [p[0] for p in pairs] == [p[0] for p in expected]
