"""Replicas of the label shards: the same model as without them, equal to the bit among themselves, no row of a batch lost."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from safetensors.torch import load_file
from tiny import final_tensors, make_prepared, read_losses, run_ranks

from haste_dist import replicas
from haste_dist.classifier import KERNELS, Classifier, Steps
from haste_dist.config import CheckpointConfig, Config, load_config
from haste_dist.errors import ConfigError
from haste_dist.guards import Guard, dead_groups
from haste_dist.loader import Batch
from haste_dist.replicas import head_chunks, summed_over, tail_chunks
from haste_dist.runlog import read_events
from haste_dist.saver import Saver
from haste_dist.sharding import batch_share, label_parts, label_shard, replica_rows
from haste_dist.step import predict_batch
from haste_dist.train import train
from haste_dist.world import Ranks, World, join_world, split_world

HEAD, GROUPS, SIZE, LABELS, WIDTH = 21, 7, 16, 128, 32  # 5 rows of padding in the last group
CHUNK = 300  # weights at once, so that a shard has several chunks


# Arithmetic


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 8))
def test_replicas_share_the_rows_as_their_ranks_do(rows: int, parts: int, copies: int) -> None:
    ranks = parts * copies
    padded = batch_share(rows, ranks, 0)[2]
    places = [replica_rows(rows, padded, parts, replica) for replica in range(copies)]
    assert [row for place in places for row in range(place.start, place.stop)] == list(range(rows))
    for rank in range(ranks):
        start, stop, _ = batch_share(rows, ranks, rank)
        place = places[rank // parts]
        assert start == stop or place.start + rank % parts * padded == start < stop <= place.stop
        assert (place.total, len(place)) == (rows, place.stop - place.start)


def test_labels_are_cut_into_a_divisor_of_the_ranks() -> None:
    assert [label_parts(asked, 6) for asked in (0, 1, 2, 3, 6)] == [6, 1, 2, 3, 6]
    for asked in (4, 5, 7, 12):
        with pytest.raises(ConfigError, match=f"label_parallel={asked} does not divide the 6 ranks.* 1, 2, 3, 6 ") as refused:
            label_parts(asked, 6)
        assert "\n" not in str(refused.value)


def layer(parts: int = 1, part: int = 0, steps: Steps = KERNELS, *words: str) -> Classifier:
    config = load_config(
        None, [f"output.group_size={SIZE}", "output.fan_in=8", "output.head_dropout=0.2", "output.tail_dropout=0.3", *words]
    )
    return Classifier(config.output, label_shard(HEAD, GROUPS, SIZE, LABELS, parts, part), WIDTH, 5, torch.device("cpu"), steps)


def test_chunks_are_views_that_cover_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "ELEMENTS", CHUNK)
    whole = layer()
    heads, tails = list(head_chunks(whole.head)), list(tail_chunks(whole.tail))
    assert (len(heads), len(tails)) == (3, 4)
    assert [chunk.first_row for chunk in heads] == [0, 9, 18]
    assert [(chunk.first_row, chunk.first_group, chunk.rows) for chunk in tails] == [(21, 0, 32), (53, 2, 32), (85, 4, 32), (117, 6, 11)]
    for chunk in (*heads, *tails):
        chunk.weight.fill_(7)
        chunk.bias_momentum.fill_(7)
    for state in (whole.head, whole.tail):
        assert (state.weight == 7).all()
        assert (state.bias_momentum == 7).all()


# A step of the layer


@pytest.mark.parametrize(("triton", "momentum"), [(False, 0.9), (False, 0.0), (True, 0.9)])
def test_a_summed_gradient_makes_the_kernels_own_update(triton: bool, momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one replica, whose sum is its gradient; by the kernels of the CPU and, in the interpreter, of the GPU."""
    monkeypatch.setattr(replicas, "ELEMENTS", 512)
    monkeypatch.setattr(replicas, "start_sum", lambda gradient, copies: SimpleNamespace(wait=lambda: None))
    kernels = KERNELS
    if triton:
        pytest.importorskip("triton")
        from haste_kernels import triton_head, triton_tail

        kernels = Steps(triton_head.head_step, triton_tail.tail_step)
    monkeypatch.setattr(replicas, "KERNELS", kernels)
    words = ["output.fan_in=16", f"output.momentum={momentum}", "output.head_dropout=0", "output.tail_dropout=0"]
    ours, theirs = layer(1, 0, summed_over(Ranks(0, 1)), *words), layer(1, 0, kernels, *words)
    for step in range(2):
        x_ND, labels_NM = batch_of(step, 9)
        for got, expected in zip(*(one.step(x_ND, labels_NM, 0.05, step, True) for one in (ours, theirs)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for name, (tensor, _) in theirs.tensors().items():
        torch.testing.assert_close(ours.tensors()[name][0], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def batch_of(step: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, WIDTH, generator=generator), torch.randint(-1, LABELS, (rows, 3), generator=generator)


def step_layers(world: World, parts: int) -> None:
    """Against one layer that sees all; with bfloat16 state that is rounded at random, the replicas' bits alone are the same."""
    replicas.ELEMENTS = CHUNK
    world = split_world(world, parts)
    shards, copies = world.shards, world.copies
    for words in ([], ["output.momentum=0", "output.bias=false", "output.reduction=mean", "output.lr=2"], ["output.weight_dtype=bfloat16"]):
        whole, mine = layer(1, 0, KERNELS, *words), layer(parts, shards.rank, summed_over(copies), *words)
        for step, rows in enumerate((13, 8, 1, 2)):
            x_ND, labels_NM = batch_of(step, rows)
            place = replica_rows(rows, batch_share(rows, world.size, 0)[2], parts, copies.rank)
            here = slice(place.start, place.stop)
            dx, loss = mine.step(x_ND[here], labels_NM[here], 0.05, step, True, place)
            expected, total = whole.step(x_ND, labels_NM, 0.05, step, True)
            sums = torch.zeros(rows, WIDTH)
            sums[here] = dx
            dist.all_reduce(sums)
            dist.all_reduce(loss)
            if "output.weight_dtype=bfloat16" not in words:
                torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
        for name, (tensor, start) in mine.tensors().items():
            if "output.weight_dtype=bfloat16" not in words:
                torch.testing.assert_close(tensor, whole.tensors()[name][0][start : start + len(tensor)], rtol=1e-4, atol=1e-5)
            bits = tensor.view(torch.uint8)
            found = [torch.empty_like(bits) for _ in range(copies.size)]
            dist.all_gather(found, bits, group=copies.group)
            assert all(torch.equal(one, bits) for one in found), name
        assert dead_groups(mine, world) == dead_groups(whole, alone_in(world))


def alone_in(world: World) -> World:
    return World(0, 1, world.device, world.control)


def predict(world: World, parts: int) -> None:
    """As one rank ranks all rows, to the bit; a batch of one row leaves most ranks none."""
    world = split_world(world, parts)
    part, whole = layer(parts, world.shards.rank), layer()
    for rows in (13, 1):
        x_ND, _ = batch_of(0, rows)
        start, stop, padded = batch_share(rows, world.size, world.rank)
        mine = torch.cat([x_ND[start:stop], x_ND[:1].expand(padded - (stop - start), WIDTH)])
        engine: Any = SimpleNamespace(embed=lambda ids, mask, mine=mine: mine)
        nothing = torch.zeros(padded, 1, dtype=torch.int64)
        batch = Batch(nothing, nothing, nothing, np.arange(start, stop), rows)
        for got, expected in zip(predict_batch(engine, part, batch, world, 50), whole.topk(x_ND, 50), strict=True):
            assert torch.equal(got, expected)


def skip(world: World, folder: Path) -> None:
    """One replica's rows are bad: all pass over the batch."""
    guard = Guard(folder, split_world(world, 2), allowed=1)
    x_ND = torch.full((2, 3), torch.nan if world.rank >= 2 else 1.0)
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch(nothing, nothing, nothing, np.arange(1), 4)
    assert guard.skips(1, batch, x_ND)
    assert not guard.skips(2, batch, x_ND)  # no more are allowed


def save(world: World, folder: Path) -> None:
    """Of the replicas of a shard one alone copies and writes its rows."""
    world = split_world(world, 2)
    mine = layer(2, world.shards.rank)
    with Saver(folder, CheckpointConfig(), world, "order") as saver:
        saver.reserve(mine)
        assert set(saver._host) == (set(mine.tensors()) if world.rank < 2 else set())


def check_layers(world: World, folder: Path) -> None:
    for parts in (1, 2):
        step_layers(world, parts)
        predict(world, parts)
    skip(world, folder)
    save(world, folder)


@pytest.mark.slow
def test_the_layer_steps_and_ranks_as_one_and_replicas_keep_equal_bits(tmp_path: Path) -> None:
    run_ranks(4, check_layers, tmp_path)


# Whole runs


def train_all(world: World, configs: list[Config]) -> None:
    replicas.ELEMENTS = CHUNK
    for config in configs:
        train(config, world)


def on_grid(config: Config, name: str, parts: int) -> Config:
    config = copy.deepcopy(config)
    config.run.folder += name
    config.launch.label_parallel = parts
    return config


def same_runs(config: Config, other: Config, rewirings: int = 2) -> None:
    one, two = config.run.folder, other.run.folder
    np.testing.assert_allclose(read_losses(two), read_losses(one), rtol=1e-5)
    rewired, again = ([(e["step"], e["replaced"]) for e in read_events(run) if e["event"] == "rewire"] for run in (one, two))
    assert rewired == again
    assert len(rewired) >= rewirings
    ours, theirs = ([e for e in read_events(run) if e["event"] == "eval"][-1] for run in (one, two))
    assert all(abs(ours[name] - theirs[name]) < 0.03 for name in ours if "@" in name)  # one text of 44 may have a tie
    assert all(ours[name] == theirs[name] for name in ("step", "rows", "dead_groups"))
    expected, got = final_tensors(one), final_tensors(two)
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{two} {name}: {text}")


@pytest.mark.slow
def test_replicas_train_the_same_model(tmp_path: Path) -> None:
    """Thirty steps on label and row counts that divide by nothing; the last batch of an epoch has one text, so replicas have none."""
    words = ["train.max_steps=30", "output.head_dropout=0.1", "output.tail_dropout=0.2"]
    plain = make_prepared(tmp_path / "plain", labels=101, texts=177, overrides=[*words, "encoder.zero=1"])
    more = ["rewire.prune=global", "rewire.grow=gradient", "output.momentum=0", "output.reduction=sum", "output.lr=0.1"]
    more += ["train.batch_size=8", "train.accumulation=2", "train.classifier_step=global", "encoder.clip=0"]
    other = make_prepared(tmp_path / "other", labels=115, texts=177, overrides=[*words, *more])
    train_all(join_world("cpu"), [plain, other])
    assert len(read_losses(plain.run.folder)) == 30
    for ranks, grids in ((2, [(plain, 1), (other, 1)]), (4, [(plain, 2), (plain, 1), (plain, 4), (other, 2)])):
        runs = [on_grid(config, f"-{ranks}-{parts}", parts) for config, parts in grids]
        run_ranks(ranks, train_all, runs)
        for (config, _), run in zip(grids, runs, strict=True):
            same_runs(config, run)
    # AdamW does not feel the size of a gradient, its moments do.
    made = "checkpoints/step-00000030/optimizer.safetensors"
    ours, theirs = (load_file(Path(config.run.folder) / made) for config in (other, runs[-1]))
    for part in ("exp_avg.", "exp_avg_sq."):
        one, two = (torch.cat([moments[name].flatten() for name in sorted(ours) if name.startswith(part)]) for moments in (ours, theirs))
        assert (one - two).norm() <= 1e-3 * one.norm()
    shards = {p.name for p in (Path(f"{plain.run.folder}-4-2") / "checkpoints/step-00000030").glob("output-*")}
    assert shards == {"output-00000-of-00002.safetensors", "output-00001-of-00002.safetensors"}


@pytest.mark.slow
def test_any_grid_goes_on_from_a_checkpoint_of_another(tmp_path: Path) -> None:
    """Stopped among the batches that a rewiring by gradients looks at."""
    words = ["train.max_steps=12", "rewire.until=1", "rewire.grow=gradient", "output.tail_dropout=0.2", "train.batch_size=15"]
    whole = make_prepared(tmp_path, labels=101, texts=187, overrides=words)
    train(whole, join_world("cpu"))
    first = on_grid(whole, "-first", 2)
    first.train.max_steps = 5
    run_ranks(4, train_all, [first])
    kept = load_file(Path(first.run.folder) / "checkpoints/step-00000005/kept.safetensors")
    assert kept["0.x"].shape == (15, 32)
    for ranks, parts in ((2, 2), (1, 1), (4, 1)):
        run = on_grid(whole, f"-{ranks}-{parts}", parts)
        shutil.copytree(first.run.folder, run.run.folder)
        if ranks == 1:
            train(run, join_world("cpu"))
        else:
            run_ranks(ranks, train_all, [run])
        assert [e["step"] for e in read_events(run.run.folder) if e["event"] == "start"] == [0, 5]
        same_runs(whole, run, 1)


def refuse(world: World, config: Config) -> None:
    with pytest.raises(ConfigError, match="label_parallel=2 does not divide the 1 rank of this run"):
        train(config, world)


def test_a_number_that_does_not_divide_the_ranks_is_refused(tmp_path: Path) -> None:
    refuse(join_world("cpu"), make_prepared(tmp_path, overrides=["launch.label_parallel=2"]))
