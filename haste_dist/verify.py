"""``haste verify``: every checksum, shape and range of a prepared folder, a run folder or one checkpoint.

All problems are found, not the first alone: a file that cannot be opened keeps no other from being looked at. ``check_data`` and
``check_run_files`` are the part that training, evaluation and prediction do themselves before they use a folder.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open

from haste_dist import augmentation
from haste_dist.basis import BASIS_FILE
from haste_dist.checkpoint import CHECKPOINTS, ENCODER, OPTIMIZER, PAGE, STEP_NAME, complete, pointed, read_page, step_of, verify_files
from haste_dist.classifier import embedding_width, feature_slice
from haste_dist.config import ENCODER_FOLDER, load_config
from haste_dist.errors import DataError, HasteError
from haste_dist.label_groups import GROUPS_FILE, LABELS_FILE, ORDER_SCHEMA, LabelOrder, load_label_order
from haste_dist.manifest import FILTER_SCHEMA, LABEL_SCHEMA, LABEL_TEXTS, MANIFEST, Manifest, Shard, open_split, read_arrow, read_manifest
from haste_dist.sealed import CHECKSUMS, check_file, check_folder, read_checksums, seal_folder

CONFIG, EXPORTED = "config.yaml", "output.safetensors"
PREPARE_AGAIN, TRAIN_AGAIN = "run haste prepare again", "haste train with the same settings writes it again"
PIECE = 2**26  # numbers looked at at once
P = ParamSpec("P")
T = TypeVar("T")


def seal_run(folder: Path) -> None:
    """Writes the checksums of what a run folder holds besides checkpoints and logs. Raises HasteError."""
    encoder = (f"{ENCODER_FOLDER}/{path.name}" for path in (folder / ENCODER_FOLDER).iterdir() if path.is_file())
    basis = [BASIS_FILE] if (folder / BASIS_FILE).is_file() else []
    seal_folder(folder, [CONFIG, LABELS_FILE, GROUPS_FILE, *basis, *encoder])


def check_data(folder: Path) -> None:
    """Holds a prepared folder against its checksums before anything in it is used. Raises DataError naming the first bad file."""
    try:
        check_folder(folder, PREPARE_AGAIN)
        for split in read_manifest(folder).splits.values():
            for shard in split.shards:
                _check_shard(folder, shard)
    except HasteError as error:
        raise DataError(str(error)) from None


def check_run_files(folder: Path) -> None:
    """Holds a run folder's settings, label order and tokenizer against their checksums. Raises HasteError naming the first bad file."""
    check_folder(folder, TRAIN_AGAIN)


def verify(folder: str | Path) -> list[str]:
    """The files and folders that were found in order. Raises HasteError, in one line, naming all that are not."""
    folder, found = Path(folder), Findings()
    if (folder / MANIFEST).exists() or (folder / LABEL_TEXTS).exists():
        _verify_data(folder, found)
    elif (folder / EXPORTED).exists():
        _verify_sealed(folder, found, "run haste export again")
        found.check(folder / LABELS_FILE, _check_order, folder)
    elif (folder / CONFIG).exists() or (folder / CHECKPOINTS).exists():
        _verify_run(folder, found)
    elif (folder / PAGE).exists() or STEP_NAME.fullmatch(folder.name):
        _verify_checkpoint(folder, found)
    else:
        raise HasteError(f"{folder}: no prepared folder, no run folder and no checkpoint")
    if found.bad:
        raise HasteError(f"{folder}: {len(found.bad)} bad: {' | '.join(found.bad)}")
    return found.sound


class Findings:
    """What was looked at, and how it was."""

    def __init__(self) -> None:
        self.sound: list[str] = []
        self.bad: list[str] = []

    def check(self, path: Path, look: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """``look(*args)``, whose errors are about ``path``; None if there was one."""
        try:
            result = look(*args, **kwargs)
        except (HasteError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            self.bad.append(text if path.name in text else f"{path}: {text}")
            return None
        self.sound.append(str(path))
        return result


def _verify_data(folder: Path, found: Findings) -> None:
    _verify_sealed(folder, found, PREPARE_AGAIN)
    manifest = found.check(folder / MANIFEST, read_manifest, folder)
    if manifest is None:
        return
    for name, split in manifest.splits.items():
        before = len(found.bad)
        for shard in split.shards:
            found.check(folder / shard.file, _check_shard, folder, shard)
        if len(found.bad) == before:
            found.check(folder / name, _check_split, folder, manifest, name)
    found.check(folder / LABEL_TEXTS, _check_label_texts, folder, manifest)
    if augmentation.SPLIT in manifest.splits:
        found.check(folder / augmentation.TWINS, _check_twins, folder, manifest)
    for name in manifest.filters:
        found.check(folder / f"filter_{name}.arrow", _check_filter, folder, manifest, name)
    found.check(folder / LABELS_FILE, _check_order, folder, manifest.labels)


def _verify_run(folder: Path, found: Findings) -> None:
    _verify_sealed(folder, found, TRAIN_AGAIN)
    order = found.check(folder / LABELS_FILE, _check_order, folder)
    width = found.check(folder / CONFIG, run_tail_width, folder)
    saved = folder / CHECKPOINTS
    for name in ("last", "best"):
        if (saved / f"{name}.json").exists():
            found.check(saved / f"{name}.json", pointed, saved, name)
    for path in sorted(saved.glob("step-*")):  # with or without its page
        _verify_checkpoint(path, found, order, width)
    found.check(saved, _need, bool(complete(saved)), "no complete checkpoint")


def _verify_checkpoint(folder: Path, found: Findings, order: LabelOrder | None = None, width: int | None = None) -> None:
    page = found.check(folder / PAGE, read_page, folder)
    if page is None:
        return
    before = len(found.bad)
    for name in page["files"]:
        found.check(folder / name, verify_files, folder, page, [name])
    if len(found.bad) == before:
        found.check(folder, _check_tensors, folder, page, order, width)


def _verify_sealed(folder: Path, found: Findings, what_to_do: str) -> None:
    records = found.check(folder / CHECKSUMS, read_checksums, folder, what_to_do)
    for name, record in (records or {}).items():
        found.check(folder / name, check_file, folder, name, record, what_to_do)


def _check_shard(folder: Path, shard: Shard) -> None:
    check_file(folder, shard.file, {"bytes": shard.bytes, "sha256": shard.sha256}, PREPARE_AGAIN)


def _check_split(folder: Path, manifest: Manifest, name: str) -> None:
    """Ranges of token and label ids, labels ascending and distinct, and the manifest's sums."""
    split = manifest.splits[name]
    sums = {"positives": 0, "max_labels": 0, "tokens": 0, "unlabelled": 0}
    for chunk in open_split(folder, manifest, name).to_batches():
        labels, tokens = chunk["labels"], chunk["input_ids"]
        _need(labels.null_count + tokens.null_count == 0, "a text has no list of labels or of tokens")
        ids, lengths = labels.flatten().to_numpy(), pc.list_value_length(labels).to_numpy()
        token_lengths = pc.list_value_length(tokens).to_numpy()
        _need_range(tokens.flatten().to_numpy(), 0, manifest.tokenizer.vocab_size - 1, "token ids")
        _need_range(ids, 0, manifest.labels - 1, "label ids")
        _need_range(token_lengths, 1, manifest.max_length, "tokens of a text")
        text = np.repeat(np.arange(len(lengths)), lengths)
        _need(bool((np.diff(ids) > 0)[np.diff(text) == 0].all()), "labels of a text are not ascending and distinct")
        sums["positives"] += len(ids)
        sums["max_labels"] = max(sums["max_labels"], int(lengths.max(initial=0)))
        sums["tokens"] += int(token_lengths.sum())
        sums["unlabelled"] += int((lengths == 0).sum())
    for key, value in sums.items():
        _need(getattr(split, key) == value, f"{key} are {value:,}, the manifest says {getattr(split, key):,}")


def _check_label_texts(folder: Path, manifest: Manifest) -> None:
    table = read_arrow(folder / LABEL_TEXTS, LABEL_SCHEMA)
    _need(table.num_rows == manifest.labels, f"has {table.num_rows} labels, the manifest says {manifest.labels}")
    _need_range(table["frequency"].to_numpy(), 0, manifest.splits["train"].rows, "frequencies")


def _check_twins(folder: Path, manifest: Manifest) -> None:
    table = read_arrow(folder / augmentation.TWINS, augmentation.TWIN_SCHEMA)
    _need_range(table["row"].to_numpy(), 0, manifest.splits[augmentation.SPLIT].rows - 1, "rows")
    _need_range(table["train"].to_numpy(), -1, manifest.splits["train"].rows - 1, "training texts")


def _check_filter(folder: Path, manifest: Manifest, name: str) -> None:
    table = read_arrow(folder / f"filter_{name}.arrow", FILTER_SCHEMA)
    _need_range(table["row"].to_numpy(), 0, manifest.splits[name].rows - 1, "rows")
    _need_range(table["label"].to_numpy(), 0, manifest.labels - 1, "labels")


def _check_order(folder: Path, labels: int | None = None) -> LabelOrder:
    order = load_label_order(folder)
    _need(labels in (None, order.labels), f"orders {order.labels} labels, the manifest says {labels}")
    table, row = read_arrow(folder / LABELS_FILE, ORDER_SCHEMA), np.arange(order.rows)
    group = np.where(row < order.head_rows, -1, (row - order.head_rows) // order.group_size)
    _need(np.array_equal(table["row"].to_numpy(), row) and np.array_equal(table["group"].to_numpy(), group), "rows or groups are wrong")
    return order


def run_tail_width(run: Path) -> int:
    """How many features the tail of a run reads; from its files, which must be whole."""
    page = json.loads((run / ENCODER_FOLDER / "config.json").read_text(encoding="utf-8"))
    config = load_config(run / CONFIG)
    return feature_slice(config.output.tail_features, embedding_width(config.encoder, int(page["hidden_size"]))).width


def _check_tensors(folder: Path, page: dict[str, Any], order: LabelOrder | None, width: int | None) -> None:
    """Shards that join without a gap, numbers that are finite, features that are distinct and in range."""
    _need({ENCODER, OPTIMIZER} <= set(page["files"]), f"{ENCODER} or {OPTIMIZER} is not among its files")
    _need(page["state"]["step"] == step_of(folder), f"is of step {page['state']['step']}, which its name does not say")
    spans: dict[str, list[tuple[int, int]]] = {}
    for name in page["files"]:
        with safe_open(folder / name, framework="pt") as file:
            starts = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118  not a dict
                source = file.get_slice(key)
                shape = source.get_shape() or [1]
                if name.startswith("output-"):
                    spans.setdefault(key, []).append((int(starts[key]), shape[0]))
                rows = max(1, PIECE // max(1, int(np.prod(shape[1:], dtype=np.int64))))
                for at in range(0, shape[0], rows):
                    part = source[at : at + rows] if source.get_shape() else file.get_tensor(key)
                    _need(bool(torch.isfinite(part.double()).all()), f"{name}: {key} holds a number that is not finite")
                    if key == "tail.index":
                        sound = bool((part[:, 1:] > part[:, :-1]).all()) and 0 <= int(part.min()) <= int(part.max()) < (width or 2**31)
                        _need(sound, f"{name}: features of a group are not ascending or not within 0 .. {(width or 2**31) - 1}")
    ends = {}
    for key, parts in spans.items():
        ends[key] = 0
        for start, count in sorted(parts):
            _need(start == ends[key], f"rows from {min(start, ends[key])} of {key} are missing or there twice")
            ends[key] += count
    if order is not None:
        _need(page["label_order"] == order.fingerprint, "belongs to another label order than the run's")
        _need((ends["head.weight"], ends["tail.weight"]) == (order.head_rows, order.groups), "has not the label order's rows and groups")


def _need(sound: bool, otherwise: str) -> None:
    if not sound:
        raise HasteError(otherwise)


def _need_range(values: np.ndarray, low: int, high: int, what: str) -> None:
    if len(values):
        least, most = int(values.min()), int(values.max())
        _need(low <= least and most <= high, f"{what} are {least} .. {most}, not within {low} .. {high}")
