"""Held-out training texts as a data set of their own: a prepared folder whose test split they are, and which knows nothing else of them.

A run with ``data.dev_fraction`` trains on none of its dev texts, and its label embeddings leave them out (held_out.py); but frequencies,
and so the head, are those of all training texts, and each seed holds out others, which takes an order of its own. Here all is made from
what is left, once for all seeds, so that settings can be chosen by the dev texts as later they are judged by the test texts.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from haste_dist import augmentation
from haste_dist.columns import take_rows
from haste_dist.held_out import dev_rows
from haste_dist.manifest import (
    FILTER_SCHEMA,
    LABEL_SCHEMA,
    LABEL_TEXTS,
    MANIFEST,
    SHARD_SCHEMA,
    Manifest,
    Shard,
    Split,
    file_sha256,
    open_split,
    read_arrow,
    read_manifest,
    write_arrow,
    write_manifest,
)

ROWS = 16384  # of a shard


def hold_out(source: Path, folder: Path, fraction: float, seed: int) -> Manifest:
    """Makes ``folder`` of the prepared folder ``source``, or finds it made; it has no label order yet. Raises DataError.

    The texts are those that ``data.dev_fraction`` and this ``run.seed`` hold out. The test split of ``source`` stays behind, but a label
    text that equals one of its texts is still not trained on.
    """
    old = read_manifest(source)
    mark = {"held_out": fraction, "seed": seed, "of": old.fingerprint}
    fingerprint = hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()
    if (folder / MANIFEST).is_file() and read_manifest(folder).fingerprint == fingerprint:
        return read_manifest(folder)
    table = open_split(source, old, "train")
    dev = dev_rows(table.num_rows, fraction, seed)
    kept = np.delete(np.arange(table.num_rows), dev)
    splits = {"train": _write_split(folder, "train", table, kept), "test": _write_split(folder, "test", table, dev)}
    counts = np.bincount(_labels(table, kept), minlength=old.labels)
    _write_labels(source, folder, counts)
    if augmentation.SPLIT in old.splits:
        splits[augmentation.SPLIT] = old.splits[augmentation.SPLIT]
        _link_shards(source, folder, splits[augmentation.SPLIT])
        _write_twins(source, folder, table.num_rows, kept)
    filters = ["test", "train"] if "train" in old.filters else []
    for split, rows in (("test", dev), ("train", kept)) if filters else ():
        _write_filter(source, folder, split, table.num_rows, rows)
    unseen = _labels(table, dev)
    unseen = unseen[counts[unseen] == 0]
    made = dataclasses.replace(
        old,
        source={**old.source, **mark},
        splits=splits,
        filters=filters,
        unseen_test_labels=len(np.unique(unseen)),
        unseen_test_positives=len(unseen),
        fingerprint=fingerprint,
    )
    write_manifest(folder, made)
    return made


def link(path: Path, there: Path) -> None:
    """The same file at another place, or a copy of it where that is another disk."""
    there.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, there)
    except OSError:
        shutil.copyfile(path, there)


def _write_split(folder: Path, name: str, table: pa.Table, rows: np.ndarray) -> Split:
    split = Split()
    for number, start in enumerate(range(0, len(rows), ROWS)):
        columns = [take_rows(column, rows[start : start + ROWS]) for column in table.columns]
        part = pa.record_batch(columns, schema=SHARD_SCHEMA)
        path = folder / name / f"{number:05d}.arrow"
        write_arrow(path, part)
        labels, tokens = (np.diff(part[column].offsets.to_numpy()) for column in ("labels", "input_ids"))
        split.rows += part.num_rows
        split.positives += int(labels.sum())
        split.max_labels = max(split.max_labels, int(labels.max()))
        split.tokens += int(tokens.sum())
        split.unlabelled += int((labels == 0).sum())
        split.shards.append(Shard(f"{name}/{path.name}", part.num_rows, path.stat().st_size, file_sha256(path)))
    return split


def _labels(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    parts = (take_rows(table["labels"], rows[start : start + ROWS]) for start in range(0, len(rows), ROWS))
    return np.concatenate([np.zeros(0, np.int32), *(part.flatten().to_numpy() for part in parts)])


def _write_labels(source: Path, folder: Path, counts: np.ndarray) -> None:
    table = read_arrow(source / LABEL_TEXTS, LABEL_SCHEMA)
    columns = [table["uid"], table["text"], pa.array(counts, pa.int64())]
    write_arrow(folder / LABEL_TEXTS, pa.table(columns, schema=LABEL_SCHEMA))


def _link_shards(source: Path, folder: Path, split: Split) -> None:
    for shard in split.shards:
        (folder / shard.file).unlink(missing_ok=True)
        link(source / shard.file, folder / shard.file)


def _write_twins(source: Path, folder: Path, rows: int, kept: np.ndarray) -> None:
    """A held-out text counts as a test text now, and so do those of before."""
    table = read_arrow(source / augmentation.TWINS, augmentation.TWIN_SCHEMA)
    place = _places(rows, kept)
    train = table["train"].to_numpy()
    pairs = np.unique(np.stack([table["row"].to_numpy(), np.where(train < 0, -1, place[train])], 1), axis=0)
    columns = [pa.array(pairs[:, 0]), pa.array(pairs[:, 1])]
    write_arrow(folder / augmentation.TWINS, pa.record_batch(columns, schema=augmentation.TWIN_SCHEMA))


def _write_filter(source: Path, folder: Path, split: str, rows: int, chosen: np.ndarray) -> None:
    table = read_arrow(source / "filter_train.arrow", FILTER_SCHEMA)
    row = _places(rows, chosen)[table["row"].to_numpy()]
    columns = [pa.array(row[row >= 0]), pa.array(table["label"].to_numpy()[row >= 0])]
    write_arrow(folder / f"filter_{split}.arrow", pa.record_batch(columns, schema=FILTER_SCHEMA))


def _places(rows: int, chosen: np.ndarray) -> np.ndarray:
    """(rows,) int64: the place of each row among ``chosen``, -1 for none."""
    place = np.full(rows, -1, np.int64)
    place[chosen] = np.arange(len(chosen))
    return place
