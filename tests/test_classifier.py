"""The output layer of a rank: sharding changes nothing, slices and dropout reach the right features."""

import copy
import dataclasses
from contextlib import ExitStack

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tiny import run_ranks
from torch import Tensor

from haste_dist.classifier import HEAD_DROPOUT, LEFT_OUT, TAIL_DROPOUT, Classifier, counted_from, sort_positives
from haste_dist.config import RewireConfig, load_config
from haste_dist.errors import ConfigError
from haste_dist.live_bytes import LiveBytes
from haste_dist.rewire import gradients, keeps_batch, limit_of_lowest, rewire
from haste_dist.schedule import rewire_fraction
from haste_dist.sharding import label_shard
from haste_dist.world import World, join_world
from haste_kernels import Positives, StepArgs, TailState, chunks, head_step, merge_topk, random_features, reference, tail_step

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
        ("output.bias=true", "output.weight_dtype=float8"),
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
        torch.testing.assert_close(whole(three, name).double(), whole(one, name).double(), rtol=1e-5, atol=1e-6)
    scores, found = one[0].topk(x_ND, 7)
    merged = merge_topk(*(torch.cat(t, dim=1) for t in zip(*(part.topk(x_ND, 7) for part in three), strict=True)), 7)
    torch.testing.assert_close(merged[0], scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged[1], found)
    assert int(found.max()) < LABELS


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_updates_below_the_last_bit_are_lost_by_the_nearest_alone(rounding: str) -> None:
    x_ND, rows_NM = batch()
    words = ("output.weight_dtype=bfloat16", "output.momentum=0", "output.weight_decay=0", f"output.rounding={rounding}")
    (one,) = classifiers(1, *words)
    for name in ("head.weight", "tail.weight"):
        one.tensors()[name][0].fill_(1.0)
    moved = []
    for step in range(3):
        one.step(x_ND, rows_NM, 1e-4, step)
        moved.append(all(bool((one.tensors()[name][0] != 1).any()) for name in ("head.weight", "tail.weight")))
    assert moved == [rounding == "stochastic"] * 3


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


@pytest.mark.parametrize("bias", ["true", "false"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_that_are_left_out_are_answered_behind_all_others(ranks: int, bias: str) -> None:
    parts, (x_ND, _) = classifiers(ranks, f"output.bias={bias}", "output.bias_init=-1" if bias == "true" else "output.lr=1"), batch()
    out = torch.tensor([0, 7, HEAD, HEAD + 1, LABELS - 1])

    def answers() -> tuple[Tensor, Tensor]:
        found = [part.topk(x_ND, LABELS) for part in parts]
        return merge_topk(torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1), LABELS)

    scores, rows = answers()
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.leaving_out(out))
        fewer_scores, fewer_rows = answers()
    left = ~torch.isin(rows, out)
    assert torch.equal(fewer_rows[:, :-5], rows[left].view(N, -1))
    assert torch.equal(fewer_scores[:, :-5], scores[left].view(N, -1))
    assert (fewer_scores[:, -5:] < LEFT_OUT / 2).all()
    assert all(map(torch.equal, answers(), (scores, rows)))  # and none is once it is left


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


def found_after_rewiring(world: World, grow: str) -> int:
    """Groups that read the feature that tells their labels, after one rewiring of one connection in four, over all ranks.

    Label r of group t is true where feature f_t of 256 exceeds a limit of its own; no group reads its f_t at first.
    """
    groups, width, texts = 24, 256, 64
    config = load_config(None, ["output.group_size=16", "output.fan_in=4", "output.reduction=mean", "output.tail_dropout=0.1"]).output
    shard = label_shard(0, groups, 16, groups * 16 - 5, world.size, world.rank)
    layer = Classifier(config, shard, width, 5, CPU)
    first = random_features(0, groups, width, 4, 5).long()
    planted = torch.tensor([next(f for f in range(7 * t, width) if f not in first[t]) for t in range(groups)])
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        x_ND = torch.randn(texts, width, generator=generator)
        true_NL = (x_ND[:, planted, None] > torch.linspace(0.5, 1.5, 16)).flatten(1)[:, : shard.labels]
        rows_NM = torch.where(true_NL, torch.arange(shard.labels), -1)
        layer.step(x_ND, rows_NM, 0.1, step)
        if step >= 4:
            layer.keep(x_ND, rows_NM, step)
    rewire(layer, RewireConfig(grow=grow), 0.25, 8, world)
    assert layer.kept == []
    mine = planted[shard.group_start : shard.group_stop]
    assert not (first[shard.group_start : shard.group_stop] == mine[:, None]).any()
    return int((layer.tail.index.long() == mine[:, None]).sum())


def found_by_two_ranks(world: World) -> None:
    assert found_after_rewiring(world, "gradient") == 12


def test_gradients_find_the_feature_that_tells_the_labels_and_chance_does_not() -> None:
    assert found_after_rewiring(join_world("cpu"), "gradient") == 24
    assert found_after_rewiring(join_world("cpu"), "random") <= 2
    run_ranks(2, found_by_two_ranks)


def test_gradients_are_summed_over_the_last_batches_as_the_tail_saw_them() -> None:
    """Two of the three batches that were kept, each with the mask of its step, on the tail's slice of the features."""
    [layer] = classifiers(1, "output.tail_dropout=0.5", "output.tail_features=[8,24]", "output.fan_in=2")
    x_ND, rows_NM = batch()
    for step in range(3):
        layer.keep(x_ND, rows_NM, step)
    seen = [layer._masked(x_ND, layer.tail_slice, 0.5, step, TAIL_DROPOUT)[0] for step in range(3)]
    positives = counted_from(sort_positives(rows_NM), layer.tail.first_row)
    expected = sum(reference.gradient_scores(x, positives, layer.tail, "bce", 1, 4) for x in seen[1:])
    torch.testing.assert_close(gradients(layer, 2)(1, 4).double(), expected, rtol=1e-5, atol=1e-5)
    layer.kept.clear()
    with pytest.raises(ValueError, match="no batch was kept"):
        gradients(layer, 2)


@given(st.integers(0, 12), st.integers(1, 15), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.25]))
def test_batches_are_kept_only_where_a_rewiring_follows(interval: int, batches: int, until: float, fraction: float) -> None:
    config = RewireConfig(interval=interval, batches=batches, until=until, fraction=fraction, grow="gradient")
    steps = range(1, 41)
    due = [step for step in steps if rewire_fraction(step, 40, interval, until, fraction)]
    expected = {step for step in steps if any(step <= when < step + batches and step > when - interval for when in due)}
    assert {step for step in steps if keeps_batch(config, step, 40)} == expected
    assert not any(keeps_batch(dataclasses.replace(config, grow="random"), step, 40) for step in steps)


@given(st.lists(st.sampled_from([0.0, 1e-40, 0.5, 0.75, 3.0, 3e38]), min_size=1, max_size=30), st.integers(0, 30))
def test_the_lowest_of_all_ranks_are_found_without_sorting(scores: list[float], count: int) -> None:
    """With those equal to the highest of them; for more than there are, all."""
    weight = torch.tensor(scores).view(-1, 1, 1)
    tail = TailState(weight, torch.zeros(len(scores), 1, dtype=torch.int16), None, None, None, 0, len(scores), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_BYTES", 200)  # a few groups at a time
        limit = limit_of_lowest(tail, count, join_world("cpu"))
    expected = sorted(scores)[min(count, len(scores)) - 1] if count else -1.0
    assert torch.equal(weight.view(torch.int32) <= limit, weight <= expected)


@pytest.mark.parametrize("prune", ["group", "global", "threshold"])
def test_a_rewiring_takes_a_few_groups_at_a_time_and_chooses_the_same(prune: str) -> None:
    """Of 3,000 groups it holds the scores of 20 or so; with room for all at once, the outcome is the same."""
    groups, width = 3000, 48
    config = load_config(None, ["output.group_size=16", "output.fan_in=24", "output.weight_dtype=bfloat16"]).output
    first = Classifier(config, label_shard(0, groups, 16, groups * 16 - 5, 1, 0), width, 5, CPU)
    generator = torch.Generator().manual_seed(1)
    first.tail.weight.copy_(torch.randn(first.tail.weight.shape, generator=generator) * 0.02)
    second = copy.deepcopy(first)
    settings = RewireConfig(prune=prune, threshold=0.014)
    whole = rewire(first, settings, 0.25, 8, join_world("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_BYTES", 200_000)
        with LiveBytes([t for t, _ in second.tensors().values()]) as live:
            held = live.now
            cut = rewire(second, settings, 0.25, 8, join_world("cpu"))
    assert whole == cut
    assert 0 < whole.replaced < whole.connections
    assert torch.equal(first.tail.index, second.tail.index)
    assert torch.equal(first.tail.weight, second.tail.weight)
    assert live.peak - held <= 200_000 < groups * 24 * 4  # less than all scores alone


LABELS_OF_TEXTS = st.lists(st.sets(st.integers(0, LABELS - 1), max_size=5), min_size=1, max_size=8)


@given(LABELS_OF_TEXTS, st.integers(0, 2))
def test_positives_are_all_pairs_in_row_order_and_absent_ones_first(labels: list[set[int]], padding: int) -> None:
    most = max(map(len, labels)) + padding or 1
    rows_NM = torch.tensor([[*found, *[-1] * (most - len(found))] for found in labels])
    batch, row = sort_positives(rows_NM)
    expected = sorted((row, n) for n, found in enumerate(rows_NM.tolist()) for row in found)
    assert list(zip(row.tolist(), batch.tolist(), strict=True)) == expected


@given(LABELS_OF_TEXTS, st.sampled_from(["bce", "squared_hinge"]))
def test_steps_pass_over_positives_of_other_shards(labels: list[set[int]], loss: str) -> None:
    """Rows before and behind the shard, absent ones and those in the last group's padding change no bit of a step."""
    rows_NM = torch.tensor([[*found, *[-1] * (5 - len(found))] for found in labels])
    every = sort_positives(rows_NM)
    x_ND = torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(1))
    args = StepArgs(lr=0.1, scale=1.0, loss=loss)
    for part in classifiers(3):
        for state, step, count in ((part.head, head_step, len(part.head.weight)), (part.tail, tail_step, part.tail.rows)):
            given = counted_from(every, state.first_row)
            mine = (given.row >= 0) & (given.row < count)
            few, all_of_them = copy.deepcopy(state), state
            expected = step(x_ND, Positives(given.batch[mine], given.row[mine]), few, args, True)
            got = step(x_ND, given, all_of_them, args, True)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert torch.equal(all_of_them.weight, few.weight)
