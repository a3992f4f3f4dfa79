"""The small tables beside the shards, made once all shards are there: sums of each split, label texts, filters, quarantine.

Each is streamed: memory grows with the number of labels and of bad lines, not with the number of texts.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from haste_dist.manifest import FILTER_SCHEMA, LABEL_SCHEMA, LABEL_TEXTS, Manifest, open_split, replacing, write_arrow
from haste_dist.sources import Problem, Source, read_filter, read_labels

LABELS_AT_ONCE = 65536  # rows of a record batch of label_texts.arrow
QUARANTINE = "quarantine.jsonl"


def filter_file(split: str) -> str:
    return f"filter_{split}.arrow"


def fill_sums(folder: Path, manifest: Manifest, split: str) -> int:
    """Counts positives, tokens and so on of a split into ``manifest``; returns the highest label id, or -1."""
    table, sums = open_split(folder, manifest, split), manifest.splits[split]
    highest = -1
    for labels, tokens in zip(table["labels"].chunks, table["input_ids"].chunks, strict=True):
        lengths, ids = pc.list_value_length(labels).to_numpy(), labels.flatten().to_numpy()
        sums.positives += len(ids)
        sums.max_labels = max(sums.max_labels, int(lengths.max(initial=0)))
        sums.unlabelled += int((lengths == 0).sum())
        sums.tokens += len(tokens.flatten())
        highest = max(highest, int(ids.max(initial=-1)))
    return highest


def label_frequency(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    """int64 (L,): how many texts of the split have each label."""
    frequency = np.zeros(manifest.labels, np.int64)
    if split in manifest.splits:
        for chunk in open_split(folder, manifest, split)["labels"].chunks:
            np.add.at(frequency, chunk.flatten().to_numpy(), 1)  # no array of L a shard, as bincount would make
    return frequency


def write_label_texts(folder: Path, source: Source, frequency: np.ndarray) -> tuple[int, list[Problem]]:
    """Writes label_texts.arrow; returns how many labels have no text, and the bad lines (whose labels have none)."""
    without_text, problems = 0, []
    with replacing(folder / LABEL_TEXTS) as file, pa.ipc.new_file(file, LABEL_SCHEMA) as writer:
        rows = _label_rows(source, len(frequency))
        for start in range(0, len(frequency), LABELS_AT_ONCE):
            counts = frequency[start : start + LABELS_AT_ONCE]
            uids, texts = [], []
            for label, item in zip(range(start, start + len(counts)), rows, strict=False):
                if isinstance(item, Problem):
                    problems.append(item)
                uid, text = (str(label), "") if isinstance(item, Problem) else item
                without_text += not text
                uids.append(uid)
                texts.append(text)
            writer.write_batch(pa.record_batch([pa.array(uids), pa.array(texts), pa.array(counts)], schema=LABEL_SCHEMA))
    return without_text, problems


def _label_rows(source: Source, labels: int) -> Iterator[tuple[str, str] | Problem]:
    if source.labels:
        yield from read_labels(source)
    else:
        yield from ((str(label), "") for label in range(labels))


def write_filter(folder: Path, source: Source, split: str, manifest: Manifest, dropped: np.ndarray, limited: bool) -> list[Problem]:
    """Writes filter_<split>.arrow with row numbers of the split as written; returns the bad lines.

    A filter file counts rows of the source: ``dropped`` (ascending) are those of them that were not written, ``limited`` tells that
    the source was not read to its end.
    """
    written = manifest.splits[split].rows
    pairs, problems = [], []
    for item in read_filter(source.filters[split], None if limited else written + len(dropped), manifest.labels):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            pairs.append(item)
    table = np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0)
    before = np.searchsorted(dropped, table[:, 0])
    gone = np.isin(table[:, 0], dropped) | (table[:, 0] - before >= written)
    columns = [pa.array((table[:, 0] - before)[~gone]), pa.array(table[~gone, 1].astype(np.int32))]
    write_arrow(folder / filter_file(split), pa.record_batch(columns, schema=FILTER_SCHEMA))
    return problems


def write_quarantine(folder: Path, problems: list[Problem]) -> dict[str, int]:
    """Writes quarantine.jsonl, a line a problem (file, line, reason, detail), and returns the count of each reason."""
    counts: dict[str, int] = {}
    if not problems:
        (folder / QUARANTINE).unlink(missing_ok=True)
        return counts
    with replacing(folder / QUARANTINE) as file:
        for problem in sorted(problems):
            page = {"file": problem.file, "line": problem.line, "reason": problem.reason, "detail": problem.detail}
            file.write((json.dumps(page, ensure_ascii=False) + "\n").encode())
            counts[problem.reason] = counts.get(problem.reason, 0) + 1
    return dict(sorted(counts.items()))
