"""Batches: the order is pure, loses nothing, and does not depend on ranks."""

import itertools
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from tiny import make_prepared

from haste_dist.loader import BatchMaker, Texts, TrainingBatches, epoch_order, open_texts, scoring_batches
from haste_dist.manifest import SHARD_SCHEMA, Manifest, read_manifest


def texts_of(rows: list[tuple[list[int], list[int]]], chunks: int = 2) -> Texts:
    """Texts in memory from (tokens, labels) pairs, in several chunks."""
    cut = max(1, len(rows) // chunks)
    parts = [rows[i : i + cut] for i in range(0, len(rows), cut)]
    batches = [
        pa.RecordBatch.from_arrays(
            [pa.array(["u"] * len(p)), *(pa.array(list(c), pa.list_(pa.int32())) for c in zip(*p, strict=True))], schema=SHARD_SCHEMA
        )
        for p in parts
    ]
    return Texts(pa.Table.from_batches(batches))


ROWS = st.lists(
    st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.lists(st.integers(0, 19), unique=True, max_size=4)),
    min_size=1,
    max_size=40,
)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 40), st.integers(1, 8), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation_in_full_batches(lengths: list[int], size: int, buckets: int, seed: int, epoch: int) -> None:
    batches = epoch_order(np.array(lengths), size, buckets, seed, epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert sorted(len(b) for b in batches)[1:] == [size] * (len(batches) - 1)
    again = epoch_order(np.array(lengths), size, buckets, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_epochs_and_seeds_differ_and_buckets_save_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 4096)
    first = epoch_order(lengths, 32, 16, 0, 0)
    assert not np.array_equal(np.concatenate(first), np.concatenate(epoch_order(lengths, 32, 16, 0, 1)))
    assert not np.array_equal(np.concatenate(first), np.concatenate(epoch_order(lengths, 32, 16, 1, 0)))

    def padded(batches: list[np.ndarray]) -> int:
        return sum(len(b) * lengths[b].max() for b in batches)

    assert padded(first) < 0.7 * padded(epoch_order(lengths, 32, 1, 0, 0))


@settings(max_examples=30, deadline=None)
@given(ROWS, st.integers(1, 5), st.integers(1, 11))
def test_ranks_together_read_the_batch(rows: list[tuple[list[int], list[int]]], ranks: int, size: int) -> None:
    texts = texts_of(rows)
    row_of_label = np.random.default_rng(0).permutation(20)
    wanted = np.arange(len(rows))[:size]
    parts = [BatchMaker(texts, row_of_label, 4, 0, ranks, r).make(wanted) for r in range(ranks)]
    assert len({p.input_ids.shape[0] for p in parts}) == 1
    ids = [[int(t) for t in row[mask.bool()]] for p in parts for row, mask in zip(p.input_ids, p.attention_mask, strict=True)]
    labels = [sorted(int(x) for x in row if x >= 0) for p in parts for row in p.label_rows]
    assert ids[: len(wanted)] == [rows[i][0] for i in wanted]
    assert labels[: len(wanted)] == [sorted(int(row_of_label[x]) for x in rows[i][1]) for i in wanted]
    assert not any(labels[len(wanted) :])
    assert np.concatenate([p.texts for p in parts]).tolist() == wanted.tolist()


def test_a_stream_continues_from_any_step() -> None:
    texts = texts_of([([i + 1] * (1 + i % 5), [i % 20]) for i in range(50)])
    batches = TrainingBatches(BatchMaker(texts, np.arange(20), 1, 0, 1, 0), 8, 2, seed=3)
    assert batches.steps_per_epoch == 7

    def take(start: int, count: int) -> list[list[int]]:
        stream = batches.from_step(start)
        return [next(stream).texts.tolist() for _ in range(count)]

    whole = take(0, 21)
    assert take(10, 11) == whole[10:]
    assert sorted(itertools.chain(*whole[7:14])) == list(range(50))


def test_scoring_reads_every_text_once() -> None:
    texts = texts_of([([i + 1] * (1 + i % 7), []) for i in range(45)])
    maker = BatchMaker(texts, np.arange(20), 1, 0, 1, 0)
    seen = [b.texts.tolist() for b in scoring_batches(maker, 8)]
    assert sorted(itertools.chain(*seen)) == list(range(45))
    assert sum(len(b.texts) for b in scoring_batches(maker, 8, limit=10)) == 10
    texts.positions = texts.positions[:0]
    assert not list(scoring_batches(maker, 8))


def test_dev_texts_are_cut_from_training(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, texts=100)
    folder = Path(config.data.prepared)
    manifest: Manifest = read_manifest(folder)
    train, dev = (open_texts(folder, manifest, split, 0.2, 1).positions for split in ("train", "dev"))
    assert len(dev) == 20
    assert sorted([*train, *dev]) == list(range(100))
    assert np.array_equal(dev, open_texts(folder, manifest, "dev", 0.2, 1).positions)
    assert not np.array_equal(dev, open_texts(folder, manifest, "dev", 0.2, 2).positions)


def test_an_error_in_the_loading_thread_reaches_the_step() -> None:
    texts = texts_of([([1], [19])] * 4)
    batches = TrainingBatches(BatchMaker(texts, np.arange(5), 1, 0, 1, 0), 2, 1, seed=0)  # label 19 has no row
    with pytest.raises(IndexError):
        next(batches.from_step(0))
