"""From a block to an Arrow shard: the work that Ray tasks do, as plain functions that know nothing of Ray.

Shard k holds the good rows of block k, tokenised: the same bytes however many workers there are. A finished shard has a page beside it
(train/00000.json: rows, bytes, sha256, fingerprint, the bad lines). The page is written just before the shard appears under its name, so
after a kill every shard that is there can be told from a stale or damaged one, and its bad lines are not lost.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from haste_dist.blocks import Block, Part
from haste_dist.manifest import SHARD_SCHEMA, Shard, file_sha256
from haste_dist.rows import Problem, Row, parse_block
from haste_dist.storage import Location
from haste_dist.tokens import tokenise

UID_BYTES = 16  # of a uid's hash: n uids are wrongly called repeated with odds of n^2 / 2^129


@dataclass
class ShardPage:
    """What is known of one shard: where its block begins, and its bad rows. A block without a good row has a page and no shard."""

    shard: Shard
    fingerprint: str
    file: str
    first_row: int
    first_line: int
    problems: list[Problem] = field(default_factory=list)

    def without(self, batch: pa.RecordBatch, repeated: np.ndarray) -> tuple[pa.RecordBatch, list[Problem]]:
        """``batch``, the shard's rows, less the ``repeated`` ones, and all problems of the block."""
        bad = {problem.number for problem in self.problems}
        numbers = [n for n in range(self.first_row, self.first_row + batch.num_rows + len(bad)) if n not in bad]
        line = self.first_line - self.first_row
        uids = batch["uid"]
        found = [repeated_uid(self.file, numbers[row] + line, uids[row].as_py(), numbers[row]) for row in repeated.tolist()]
        keep = np.ones(batch.num_rows, bool)
        keep[repeated] = False
        return batch.filter(pa.array(keep)), in_order([*self.problems, *found])


def shard_name(split: str, number: int, suffix: str) -> str:
    """The shard's place in the prepared folder."""
    return f"{split}/{number:05d}{suffix}.arrow"


def page_name(split: str, number: int, suffix: str) -> str:
    return f"{split}/{number:05d}{suffix}.json"


def read_page(folder: Location, split: str, number: int, fingerprint: str, suffix: str) -> ShardPage | None:
    """The page of a shard that is whole and was made with the same ``fingerprint``, else None."""
    place = folder / page_name(split, number, suffix)
    if not place.is_file():
        return None
    try:
        page = json.loads(place.read())
        shard = Shard(**page["shard"])
        if page["fingerprint"] != fingerprint or (shard.rows and not is_intact(folder, shard)):
            return None
        return ShardPage(**{**page, "shard": shard, "problems": [Problem(*problem) for problem in page["problems"]]})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # a page that cannot be read vouches for nothing: its shard is written again


def is_intact(folder: Location, shard: Shard) -> bool:
    """Whether the shard's file has the size of its page and, where that is no download, the checksum."""
    place = folder / shard.file
    if place.size() != shard.bytes:
        return False
    return not place.is_local or file_sha256(place.local) == shard.sha256


def make_shard(
    folder: Location, part: Part, block: Block, labels: int | None, rules: str, fingerprint: str, suffix: str
) -> tuple[ShardPage, pa.RecordBatch]:
    """Parses, checks and tokenises a block, and writes page and shard. Returns the page and the shard's rows."""
    rows, problems = good_rows(part, block, labels)
    tokens = tokenise([row.text for row in rows], rules)
    empty = np.diff(tokens.offsets.to_numpy()) == 0
    if empty.any():
        line = block.first_line - block.first_row
        detail = "the tokenizer makes no token of the text"
        problems += [
            Problem(part.files[0].name, rows[i].number + line, "empty text", detail, rows[i].number) for i in np.flatnonzero(empty)
        ]
        rows, tokens = [row for row, bad in zip(rows, empty, strict=True) if not bad], tokens.filter(pa.array(~empty))
    columns = [
        pa.array([row.uid for row in rows], pa.string()),
        tokens,
        pa.array([row.labels for row in rows], SHARD_SCHEMA.field("labels").type),
    ]
    batch = pa.record_batch(columns, schema=SHARD_SCHEMA)
    shard = Shard(shard_name(part.split, block.number, suffix), 0, 0, "")
    page = ShardPage(shard, fingerprint, part.files[0].name, block.first_row, block.first_line, in_order(problems))
    return write_shard(folder, page, batch), batch


def good_rows(part: Part, block: Block, labels: int | None) -> tuple[list[Row], list[Problem]]:
    """The rows of a block without the bad ones and those that repeat a uid of the block."""
    rows: list[Row] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for item in parse_block(part, block, labels):
        if isinstance(item, Problem):
            problems.append(item)
        elif item.uid in seen:
            line = item.number - block.first_row + block.first_line
            problems.append(repeated_uid(part.files[0].name, line, item.uid, item.number))
        else:
            seen.add(item.uid)
            rows.append(item)
    return rows, problems


def repeated_uid(file: str, line: int, uid: str, number: int) -> Problem:
    return Problem(file, line, "duplicate uid", f"uid '{uid[:80]}' stands on an earlier line already", number)


def in_order(problems: list[Problem]) -> list[Problem]:
    """By row; what cost no single row comes last."""
    return sorted(problems, key=lambda problem: (problem.number < 0, problem.number))


def write_shard(folder: Location, page: ShardPage, batch: pa.RecordBatch) -> ShardPage:
    """Writes first the page, then the shard, each in one step; returns the page with the shard's size and checksum."""
    place = folder / page.shard.file
    data = b""
    if batch.num_rows:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SHARD_SCHEMA) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
    page = dataclasses.replace(page, shard=Shard(page.shard.file, batch.num_rows, len(data), hashlib.sha256(data).hexdigest()))
    Location(f"{str(place).removesuffix('.arrow')}.json").write((json.dumps(dataclasses.asdict(page)) + "\n").encode())
    if batch.num_rows:
        place.write(data)
    else:
        place.delete()
    return page


def read_shard(folder: Location, shard: Shard) -> pa.RecordBatch:
    """A shard's rows. Raises DataError."""
    with (folder / shard.file).open() as file:
        return pa.ipc.open_file(file).get_batch(0)


def shard_sums(batch: pa.RecordBatch) -> dict[str, int]:
    """What a split's sums need of one shard."""
    labels = pc.list_value_length(batch["labels"]).to_numpy()
    return {
        "rows": batch.num_rows,
        "positives": int(labels.sum()),
        "max_labels": int(labels.max(initial=0)),
        "unlabelled": int((labels == 0).sum()),
        "tokens": len(batch["input_ids"].flatten()),
    }


def uid_hashes(uids: Sequence[str]) -> bytes:
    """UID_BYTES a uid."""
    return b"".join(hashlib.blake2b(uid.encode(), digest_size=UID_BYTES).digest() for uid in uids)
