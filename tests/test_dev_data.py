"""Held-out texts as a data set of their own: the dev texts, and nothing else that knows them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from in_turn import run_in_turn, settings
from raw_sources import make_wordpiece
from test_augmentation import LABELS, source

import haste_dist.prepare
from haste_dist.augmentation import SPLIT, kept_rows
from haste_dist.config import Config
from haste_dist.dev_data import hold_out
from haste_dist.evaluate import load_filters, load_frequency
from haste_dist.held_out import dev_rows
from haste_dist.label_groups import make_label_order
from haste_dist.loader import open_texts
from haste_dist.manifest import FILTER_SCHEMA, open_split, read_manifest, write_arrow, write_manifest
from haste_dist.prepare import prepare
from haste_dist.sealed import seal_data
from haste_dist.verify import verify


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Prepared with label texts, of which one equals a test text and one a training text, and with filters."""
    monkeypatch.setattr(haste_dist.prepare, "run", run_in_turn)
    made = settings(source(tmp_path / "source"), tmp_path / "prepared", make_wordpiece(tmp_path / "tokenizer"), "data.label_texts=1")
    prepare(made)
    folder = Path(made.data.prepared)
    manifest = read_manifest(folder)
    rows = np.arange(manifest.splits["train"].rows)
    columns = [pa.array(rows), pa.array((rows % LABELS).astype(np.int32))]
    write_arrow(folder / "filter_train.arrow", pa.record_batch(columns, schema=FILTER_SCHEMA))
    manifest.filters = ["train"]
    write_manifest(folder, manifest)
    seal_data(folder)
    return made


@pytest.mark.parametrize("seed", range(4))  # the text that equals a label's is held out by some
def test_a_held_out_folder_is_the_dev_split_as_a_data_set(config: Config, tmp_path: Path, seed: int) -> None:
    old, out = Path(config.data.prepared), tmp_path / f"held-{seed}"
    before, manifest = read_manifest(old), hold_out(old, out, 0.3, seed)
    texts, rows = open_split(old, before, "train"), dev_rows(before.splits["train"].rows, 0.3, seed)
    train, dev = texts.take(np.delete(np.arange(texts.num_rows), rows)), texts.take(rows)
    assert open_split(out, manifest, "train").equals(train)
    assert open_split(out, manifest, "test").equals(dev)
    assert len(open_texts(old, before, "dev", 0.3, seed)) == dev.num_rows == round(0.3 * before.splits["train"].rows)
    labels = train["labels"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(load_frequency(out), np.bincount(labels, minlength=LABELS))
    unseen = [label for label in dev["labels"].combine_chunks().flatten().to_pylist() if label not in set(labels.tolist())]
    assert (manifest.unseen_test_labels, manifest.unseen_test_positives) == (len(set(unseen)), len(unseen))
    assert manifest.fingerprint != before.fingerprint

    positions = open_texts(old, before, "dev", 0.3, seed).positions
    assert np.array_equal(kept_rows(out, manifest, np.arange(0)), kept_rows(old, before, positions))
    assert len(open_texts(out, manifest, "train", 0, 0, 1)) == len(open_texts(old, before, "train", 0.3, seed, 1))
    assert manifest.splits[SPLIT] == before.splits[SPLIT]
    filters = load_filters(out, "test")
    assert filters is not None
    assert filters.of(np.arange(len(positions))).values.tolist() == (positions % LABELS).tolist()

    make_label_order(config, out, manifest)
    seal_data(out)
    assert len(verify(out)) > 5
    written = (out / "train/00000.arrow").stat().st_mtime_ns
    assert hold_out(old, out, 0.3, seed) == manifest  # found made
    assert (out / "train/00000.arrow").stat().st_mtime_ns == written
