"""data.reader=ray: the rows of an epoch, whatever the ranks, exactly once; resume; a lost row is told."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_turn import read_in_turn
from tiny import make_prepared

from haste_dist import ray_reader
from haste_dist.config import Config
from haste_dist.errors import ConfigError, DataError
from haste_dist.loader import Batch, BatchMaker, open_texts
from haste_dist.manifest import read_manifest
from haste_dist.ray_reader import RayBatches, epoch_ranges
from haste_dist.readers import training_batches


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_prepared(tmp_path_factory.mktemp("ray"), texts=203, overrides=["data.reader=ray"])


def batches_of(config: Config, ranks: int, rank: int) -> RayBatches:
    folder = Path(config.data.prepared)
    manifest = read_manifest(folder)
    texts = open_texts(folder, manifest, "train", config.data.dev_fraction, config.run.seed, config.data.label_texts)
    made = training_batches(config, BatchMaker(texts, np.arange(manifest.labels), 5, 0, ranks, rank), config.train.batch_size, folder)
    assert isinstance(made, RayBatches)
    return made


def take(source: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(source, count))


@settings(max_examples=100)
@given(st.integers(1, 5000), st.integers(0, 9), st.lists(st.integers(0, 5000), max_size=5))
def test_stretches_of_an_epoch_hold_every_row_once(rows: int, epoch: int, cuts: list[int]) -> None:
    edges = sorted({0, rows, *(cut % rows for cut in cuts)})
    parts = [epoch_ranges(rows, 1, epoch, low, high - low) for low, high in itertools.pairwise(edges)]
    assert [sum(stop - start for start, stop in part) for part in parts] == [high - low for low, high in itertools.pairwise(edges)]
    assert sorted(row for part in parts for start, stop in part for row in range(start, stop)) == list(range(rows))


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_ranks_share_every_epoch(config: Config, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_turn(monkeypatch)
    steps = batches_of(config, ranks, 0).steps_per_epoch
    assert steps == 13  # 203 texts, 16 a batch: the last has 11
    of_rank = [take(batches_of(config, ranks, rank).from_step(0), 2 * steps) for rank in range(ranks)]
    for epoch in (0, 1):
        taken = [batch for batches in of_rank for batch in batches[epoch * steps : (epoch + 1) * steps]]
        assert sorted(np.concatenate([batch.texts for batch in taken])) == list(range(203))
    assert [batch.rows for batch in of_rank[0]] == 2 * ([16] * 12 + [11])
    for together in zip(*of_rank, strict=True):
        assert len({batch.input_ids.shape[0] for batch in together}) == 1
        assert sum(len(batch.texts) for batch in together) == together[0].rows
    first, second = (np.concatenate([batch.texts for batch in of_rank[0][e * steps : (e + 1) * steps]]) for e in (0, 1))
    assert first.tolist() != second.tolist()


def test_a_batch_holds_what_the_shards_hold(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_turn(monkeypatch)
    source = batches_of(config, 1, 0)
    texts = source._maker.texts
    for batch in take(source.from_step(3), 12):
        ids, lengths = texts.tokens(batch.texts)
        assert batch.input_ids[batch.attention_mask.bool()].tolist() == ids.tolist()
        assert batch.attention_mask.sum(1).tolist() == lengths.tolist()
        assert batch.label_rows[batch.label_rows >= 0].tolist() == texts.labels(batch.texts)[0].tolist()


@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (16, 15)])  # of the last batch's 11 texts the second one has none
def test_a_stream_continues_from_any_step(config: Config, ranks: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_turn(monkeypatch)
    whole = [batch.texts.tolist() for batch in take(batches_of(config, ranks, rank).from_step(0), 30)]
    for step in (1, 7, 12, 13, 20):
        assert [b.texts.tolist() for b in take(batches_of(config, ranks, rank).from_step(step), 30 - step)] == whole[step:]


def test_a_lost_row_is_told(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_turn(monkeypatch)
    read = RayBatches._read
    monkeypatch.setattr(RayBatches, "_read", lambda self, ranges: read(self, ranges[:-1]))
    with pytest.raises(DataError, match=r"data.reader=ray: \d+ rows came to this rank in an epoch, of 203 by the manifest"):
        take(batches_of(config, 1, 0).from_step(0), 13)
    monkeypatch.setattr(RayBatches, "_read", lambda self, ranges: read(self, np.concatenate([ranges, ranges[:1]])))
    with pytest.raises(DataError, match=r"\d+ rows came to this rank in an epoch, of 203 by the manifest"):
        take(batches_of(config, 1, 0).from_step(0), 14)


def test_without_ray_it_says_so(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"data.reader=ray: Ray does not run here; start with haste train"):
        batches_of(config, 1, 0).from_step(0)


@pytest.mark.usefixtures("ray_session")
def test_through_ray_an_epoch_is_the_same(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = [batch.texts.tolist() for batch in take(batches_of(config, 2, 1).from_step(0), 15)]
    with monkeypatch.context() as patch:
        slice_rows = ray_reader.SLICE
        read_in_turn(patch)
        patch.setattr(ray_reader, "SLICE", slice_rows)
        assert streamed == [batch.texts.tolist() for batch in take(batches_of(config, 2, 1).from_step(0), 15)]
