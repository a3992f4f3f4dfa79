"""Labels' own texts as training texts (data.label_texts): each text that a label has, with that label as its only one.

They are prepared as a split of their own, "label_texts", counted apart from the real texts, which all else goes by: frequencies,
propensities, groups, evaluation. Training puts them behind the training texts, ``data.label_texts`` times each an epoch.

A label text whose tokens are those of a test or dev text is never trained on. label_twins.arrow names the label texts that a test or
training text equals; which of the latter are dev texts is known in training only.
"""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa

from haste_dist.errors import ConfigError
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, PREPARED, Manifest, open_split, read_arrow, replacing, write_arrow

SPLIT = "label_texts"
SOURCE = ".label_texts.arrow"  # what the pipeline of prepare reads the split from; removed when it is done
TWINS = "label_twins.arrow"
TWIN_SCHEMA = pa.schema([("row", pa.int64()), ("train", pa.int64())])
"""label_twins.arrow: a row of the label_texts split, and a row of the train split with the same tokens; -1: a test text has them."""
ROWS_AT_ONCE = 65536
KEY = np.dtype([("high", "<u8"), ("low", "<u8")])  # a hash of a text's tokens


def write_source(folder: Path) -> int:
    """Writes every label text with its label as a table that prepare can read; returns how many there are. Raises ConfigError for none."""
    labels, count = read_arrow(folder / LABEL_TEXTS, LABEL_SCHEMA)["text"], 0
    fields = pa.schema([("uid", pa.string()), ("text", pa.string()), ("labels", pa.list_(pa.int32()))])
    with replacing(folder / SOURCE, PREPARED) as file, pa.ipc.new_file(file, fields) as writer:
        for start in range(0, len(labels), ROWS_AT_ONCE):
            texts = labels.slice(start, ROWS_AT_ONCE).to_pylist()
            own = [i for i, text in enumerate(texts) if text]
            ids = pa.array([[start + i] for i in own], fields.field("labels").type)
            uids = pa.array([str(start + i) for i in own], pa.string())
            writer.write_batch(pa.record_batch([uids, pa.array([texts[i] for i in own], pa.string()), ids], schema=fields))
            count += len(own)
    if count == 0:
        raise ConfigError("data.label_texts: no label has a text of its own; add a file of label texts, or set data.label_texts=0")
    return count


def write_twins(folder: Path, manifest: Manifest) -> int:
    """Writes label_twins.arrow; returns how many label texts are a test text too. Memory grows with the labels, not the texts."""
    keys = np.concatenate([np.zeros(0, KEY), *(_keys(chunk) for chunk in open_split(folder, manifest, SPLIT)["input_ids"].chunks)])
    order = np.argsort(keys, order=("high", "low"), kind="stable")
    pairs = [np.zeros((0, 2), np.int64)]
    for split in (name for name in ("train", "test") if name in manifest.splits):
        first = 0
        for chunk in open_split(folder, manifest, split)["input_ids"].chunks:
            theirs = _keys(chunk)
            low, high = (np.searchsorted(keys, theirs, side=side, sorter=order) for side in ("left", "right"))
            count = high - low
            at = np.repeat(low, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            texts = np.repeat(first + np.arange(len(theirs)), count) if split == "train" else np.full(len(at), -1)
            pairs.append(np.stack([order[at], texts], 1))
            first += len(theirs)
    table = np.unique(np.concatenate(pairs), axis=0)
    write_arrow(folder / TWINS, pa.record_batch([pa.array(table[:, 0]), pa.array(table[:, 1])], schema=TWIN_SCHEMA))
    return int((table[:, 1] < 0).sum())


def has_label_texts(folder: Path, manifest: Manifest) -> bool:
    """Whether prepare has made a split of label texts."""
    return SPLIT in manifest.splits and (folder / TWINS).is_file()


def check_label_texts(folder: Path, manifest: Manifest) -> None:
    """Raises ConfigError where prepare has made no split of label texts."""
    if not has_label_texts(folder, manifest):
        raise ConfigError(f"{folder}: was prepared without label texts as training texts; run haste prepare with data.label_texts=1")


def kept_rows(folder: Path, manifest: Manifest, dev: np.ndarray) -> np.ndarray:
    """Rows of the label_texts split, ascending, that are neither a test text nor one of ``dev``, rows of the train split.

    Raises ConfigError where prepare has made no such split.
    """
    check_label_texts(folder, manifest)
    twins = read_arrow(folder / TWINS, TWIN_SCHEMA)
    row, text = twins["row"].to_numpy(), twins["train"].to_numpy()
    return np.setdiff1d(np.arange(manifest.splits[SPLIT].rows), row[(text < 0) | np.isin(text, dev)])


def held_out_keys(folder: Path, manifest: Manifest, counts: np.ndarray) -> np.ndarray:
    """KEY (n,) of all test texts, and of the training texts that ``counts`` (rows,) bool leaves out: 16 bytes a text."""
    keys, first = [np.zeros(0, KEY)], 0
    if "test" in manifest.splits:
        keys += [_keys(chunk) for chunk in open_split(folder, manifest, "test")["input_ids"].chunks]
    if not counts.all():
        for chunk in open_split(folder, manifest, "train")["input_ids"].chunks:
            keys.append(_keys(chunk.filter(pa.array(~counts[first : first + len(chunk)]))))
            first += len(chunk)
    return np.concatenate(keys)


def text_keys(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """KEY (n,) of n texts, int32 ``values`` cut at ``offsets`` (n + 1,): equal where the tokens are."""
    tokens = np.ascontiguousarray(values).data
    hashes = (hashlib.blake2b(tokens[a:b], digest_size=KEY.itemsize).digest() for a, b in itertools.pairwise(offsets.tolist()))
    return np.frombuffer(b"".join(hashes), KEY)


def _keys(ids: pa.ListArray) -> np.ndarray:
    return text_keys(ids.values.to_numpy(), ids.offsets.to_numpy())
