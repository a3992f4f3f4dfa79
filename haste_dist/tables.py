"""The small tables beside the shards, made once all shards are there: sums of each split, label texts, filters, quarantine.

Each is streamed: memory grows with the number of labels and of bad lines, not with the number of texts.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from haste_dist.manifest import FILTER_SCHEMA, LABEL_SCHEMA, LABEL_TEXTS, PREPARED, Manifest, Shard, Split, replacing, write_arrow
from haste_dist.rows import Problem
from haste_dist.sources import Source, read_filter, read_labels

LABELS_AT_ONCE = 65536  # rows of a record batch of label_texts.arrow
QUARANTINE = "quarantine.jsonl"


def filter_file(split: str) -> str:
    return f"filter_{split}.arrow"


class Tally:
    """What a split's shards hold, gathered shard by shard in any order: sums, and how many texts have each label."""

    def __init__(self, labels: int | None):
        self.frequency = np.zeros(labels or 0, np.int64)
        self.shards: dict[int, Shard] = {}
        self._sums: dict[int, dict[str, int]] = {}

    def add(self, number: int, shard: Shard, sums: dict[str, int], labels: np.ndarray) -> None:
        """``sums`` as Split has them; ``labels``: the ids of all rows, one after another."""
        self.replace(number, shard, sums)
        ids, counts = np.unique(labels, return_counts=True)
        if len(ids) and ids[-1] >= len(self.frequency):  # no file told how many there are
            grown = np.zeros(max(int(ids[-1]) + 1, 2 * len(self.frequency)), np.int64)
            grown[: len(self.frequency)] = self.frequency
            self.frequency = grown
        self.frequency[ids] += counts

    def replace(self, number: int, shard: Shard, sums: dict[str, int], dropped: np.ndarray | None = None) -> None:
        """The shard was written again without rows that had the labels ``dropped``."""
        self.shards[number], self._sums[number] = shard, sums
        if dropped is not None:
            np.subtract.at(self.frequency, dropped, 1)

    def split(self) -> Split:
        made = Split(shards=[self.shards[number] for number in sorted(self.shards) if self.shards[number].rows])
        for sums in self._sums.values():
            for name, value in sums.items():
                before = getattr(made, name)
                setattr(made, name, max(before, value) if name == "max_labels" else before + value)
        return made

    def highest(self) -> int:
        """The highest label id that a text has, or -1."""
        return int(np.flatnonzero(self.frequency)[-1]) if self.frequency.any() else -1

    def counts(self, labels: int) -> np.ndarray:
        """int64 (labels,): how many texts have each label."""
        counts = np.zeros(labels, np.int64)
        counts[: len(self.frequency)] = self.frequency[:labels]
        return counts


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A folder inside for tables that are not yet to be seen, which the first of them makes; it goes with what is left in it."""
    fresh = folder / ".tables"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_label_texts(folder: Path, source: Source, frequency: np.ndarray) -> tuple[int, list[Problem]]:
    """Writes label_texts.arrow; returns how many labels have no text, and the bad lines (whose labels have none)."""
    without_text, problems = 0, []
    with replacing(folder / LABEL_TEXTS, PREPARED) as file, pa.ipc.new_file(file, LABEL_SCHEMA) as writer:
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


def write_quarantine(folder: Path, problems: Iterable[Problem]) -> dict[str, int]:
    """Writes quarantine.jsonl, a line a problem (file, line, reason, detail), and returns the count of each reason."""
    counts: dict[str, int] = {}
    with replacing(folder / QUARANTINE, PREPARED) as file:
        for problem in problems:
            page = {"file": problem.file, "line": problem.line, "reason": problem.reason, "detail": problem.detail}
            file.write((json.dumps(page, ensure_ascii=False) + "\n").encode())
            counts[problem.reason] = counts.get(problem.reason, 0) + 1
    if not counts:
        (folder / QUARANTINE).unlink()
    return dict(sorted(counts.items()))
