"""From checked rows to Arrow shards: the work that Ray tasks do, as plain functions that know nothing of Ray.

``read_chunks`` cuts a split into chunks of exactly rows_per_shard rows, without repeated uids; ``write_shard`` tokenises one chunk
and writes it. Shard k holds the same rows, and the same bytes, however many workers there are.

A finished shard has a record beside it (train/00000.json: rows, bytes, sha256, fingerprint). The record is written just before
the shard appears under its name, so after a kill every shard that is there can be told from a stale or damaged one.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from haste_dist.errors import DataError
from haste_dist.manifest import SHARD_SCHEMA, Shard, atomic_file, file_sha256, replacing
from haste_dist.sources import Problem, Row, Source, read_rows

TEXTS_AT_ONCE = 1024  # the tokenizer keeps strings and masks for every token of a call


class SeenUids:
    """Tells repeated uids by 64-bit hashes, 8 bytes a uid: n uids are wrongly called repeated with odds of n^2 / 2^65.

    Hashes are kept in sorted runs, each at least twice as long as the next, so that n uids cost n log n and no Python loop.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, uids: Sequence[str]) -> np.ndarray:
        """bool (n,): whether each uid was there before, in an earlier call or earlier in this one."""
        hashes = np.frombuffer(b"".join(hashlib.blake2b(uid.encode(), digest_size=8).digest() for uid in uids), np.uint64)
        repeated = np.ones(len(uids), bool)
        fresh, first = np.unique(hashes, return_index=True)
        repeated[first] = False
        known = np.zeros(len(fresh), bool)
        for run in self.runs:
            known |= run[np.minimum(np.searchsorted(run, fresh), len(run) - 1)] == fresh
        repeated[first[known]] = True
        if not known.all():
            self.runs.append(fresh[~known])
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            self.runs.append(np.sort(np.concatenate([self.runs.pop(), self.runs.pop()]), kind="stable"))
        return repeated


def read_chunks(
    source: Source, split: str, labels: int | None, rows_per_shard: int, limit: int, stop: bool
) -> Iterator[tuple[list[Row], list[Problem]]]:
    """Chunks of exactly ``rows_per_shard`` rows (the last has what is left) with the problems met on the way, in file order.

    ``limit`` ends the split after so many rows (0: never). With ``stop`` the first problem is raised as a DataError.
    """
    seen = SeenUids()
    rows: list[Row] = []
    unchecked: list[Row] = []  # not yet held against the uids seen
    problems: list[Problem] = []
    left = limit or 2**62
    for item in chain(read_rows(source, split, labels), [None]):
        if isinstance(item, Row):
            unchecked.append(item)
        elif item is not None:
            problems.append(item)
        wanted = min(rows_per_shard, left)
        if item is None or len(rows) + len(unchecked) == wanted or (stop and problems):
            for row, repeated in zip(unchecked, seen.add([row.uid for row in unchecked]), strict=True):
                if repeated:
                    detail = f"uid '{row.uid[:80]}' stands on an earlier line already"
                    problems.append(Problem(row.file, row.line, "duplicate uid", detail, row.number))
                else:
                    rows.append(row)
            unchecked = []
            if stop and problems:
                raise min(problems, key=lambda problem: (problem.number < 0, problem.number)).error()
        if len(rows) == wanted or (item is None and (rows or problems)):
            yield rows, problems
            left -= len(rows)
            rows, problems = [], []
            if left == 0:
                return


def tokenizer_rules(backend: Tokenizer, max_length: int, side: str) -> str:
    """A tokenizer as one string that workers can load without transformers: it cuts to ``max_length`` and does not pad."""
    rules = Tokenizer.from_str(backend.to_str())
    rules.no_padding()
    rules.enable_truncation(max_length, direction=side)
    return rules.to_str()


@functools.lru_cache(maxsize=1)
def _load_tokenizer(rules: str) -> Tokenizer:
    return Tokenizer.from_str(rules)


def tokenise(texts: Sequence[str], rules: str) -> pa.ListArray:
    """list<int32> (n,): the token ids of each text, special tokens included, at most max_length of them."""
    tokenizer = _load_tokenizer(rules)
    pieces, lengths = [], []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts[start : start + TEXTS_AT_ONCE])]
        pieces.append(np.fromiter(chain.from_iterable(ids), np.int32))
        lengths += [len(row) for row in ids]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(pieces))


def shard_name(split: str, number: int) -> str:
    """The shard's place in the prepared folder."""
    return f"{split}/{number:05d}.arrow"


def record_path(folder: Path, file: str) -> Path:
    return (folder / file).with_suffix(".json")


def write_shard(folder: Path, file: str, uids: list[str], texts: list[str], labels: list[list[int]], rules: str, fingerprint: str) -> Shard:
    """Tokenises a chunk and writes it, first its record, then the shard itself, each in one step. Raises DataError."""
    columns = [pa.array(uids, pa.string()), tokenise(texts, rules), pa.array(labels, SHARD_SCHEMA.field("labels").type)]
    batch = pa.record_batch(columns, schema=SHARD_SCHEMA)
    empty = np.flatnonzero(np.diff(batch["input_ids"].offsets.to_numpy()) == 0)
    if len(empty):
        raise DataError(f"{file}: the tokenizer makes no token of the text with uid '{uids[empty[0]][:80]}'; remove or mend that text")
    path = folder / file
    with replacing(path) as out:
        with pa.ipc.new_file(out, SHARD_SCHEMA) as writer:
            writer.write_batch(batch)
        out.flush()
        shard = Shard(file, len(uids), out.tell(), file_sha256(Path(out.name)))
        with atomic_file(record_path(folder, file)) as record:
            record.write((json.dumps({**dataclasses.asdict(shard), "fingerprint": fingerprint}) + "\n").encode())
    return shard


def finished_shards(folder: Path, splits: Sequence[str], fingerprint: str) -> dict[str, Shard]:
    """The shards, by file name, that an earlier run with the same ``fingerprint`` finished, each held against its checksum."""
    found = {}
    for record in (path for split in splits for path in sorted((folder / split).glob("*.json"))):
        try:
            page = json.loads(record.read_text(encoding="utf-8"))
            if page.pop("fingerprint") == fingerprint and is_intact(folder, shard := Shard(**page)):
                found[shard.file] = shard
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # a record that cannot be read vouches for nothing: its shard is written again
    return found


def is_intact(folder: Path, shard: Shard) -> bool:
    """Whether the shard's file has the size and the checksum of its record."""
    path = folder / shard.file
    return path.is_file() and path.stat().st_size == shard.bytes and file_sha256(path) == shard.sha256
