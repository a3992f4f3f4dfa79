"""The Ray Data pipeline of prepare: reader tasks stream chunks of rows, tasks on all CPUs make a shard of each.

Only a few chunks exist at a time, so memory stays flat however long the files are. Errors travel as values of the records, not as
exceptions, which Ray would wrap and log.
"""

import json
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from haste_dist.errors import DataError, HasteError
from haste_dist.manifest import first_line
from haste_dist.shards import read_chunks, shard_name, write_shard
from haste_dist.sources import Problem, Source


@dataclass(frozen=True)
class Plan:
    """What every task of the pipeline needs to know. ``labels`` is None where there is no label file."""

    source: Source
    folder: Path
    labels: int | None
    rows_per_shard: int
    limit: int
    stop: bool
    fingerprint: str
    finished: frozenset[str]


ITEM_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.int64()),
        ("uids", pa.list_(pa.string())),
        ("texts", pa.list_(pa.large_string())),
        ("labels", pa.list_(pa.list_(pa.int32()))),
        ("problems", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)
"""A chunk on its way to be written. shard is -1 and the rows are left out where there is nothing to write."""

RECORD_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.int64()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("problems", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)
"""What became of a chunk. problems are Problem tuples as JSON; error is one line that ends the run, or empty."""


def run(plan: Plan, rules: str, workers: int) -> Generator[dict[str, Any], None, None]:
    """Yields a record of RECORD_SCHEMA for each chunk, in any order; closing it early stops the tasks.

    ``rules`` is the serialised tokenizer, ``workers`` the most CPUs to use (0: all). Raises DataError if a worker dies.
    """
    import ray.data
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # an item is a whole chunk already: never join two into one block
    with DataContext.current(context), _quiet():
        # The readers ask for no CPU: they mostly wait, and a CPU of their own would cost a machine of two cores half its speed.
        chunks = ray.data.from_items([{"split": split} for split in plan.source.splits]).map_batches(
            partial(_read_task, plan=plan), batch_size=1, batch_format="pyarrow", num_cpus=0
        )
        records = chunks.map_batches(
            partial(_write_task, plan=plan, rules=rules),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            concurrency=workers or None,
        )
        try:
            for batch in records.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from pa.table(batch).to_pylist()
        except Exception as error:
            raise _unwrap(error) from None


def _read_task(batch: pa.Table, plan: Plan) -> Iterator[pa.Table]:
    """Streams a split as items of one chunk each; the rows of finished shards are left out. shard is -1 where there is none."""
    for split in batch["split"].to_pylist():
        number = 0
        try:
            limit = plan.limit if split == "train" else 0
            for rows, problems in read_chunks(plan.source, split, plan.labels, plan.rows_per_shard, limit, plan.stop):
                shard = number if rows else -1
                send = [] if shard_name(split, shard) in plan.finished else rows
                yield _item(split, shard, [row.uid for row in send], [row.text for row in send], [row.labels for row in send], problems)
                number += 1
        except HasteError as error:
            yield _item(split, -1, [], [], [], [], str(error))


def _item(
    split: str, shard: int, uids: list[str], texts: list[str], labels: list[list[int]], problems: list[Problem], error: str = ""
) -> pa.Table:
    values = [[split], [shard], [uids], [texts], [labels], [[json.dumps(problem) for problem in problems]], [error]]
    return pa.table([pa.array(value, field.type) for value, field in zip(values, ITEM_SCHEMA, strict=True)], schema=ITEM_SCHEMA)


def _write_task(batch: pa.Table, plan: Plan, rules: str) -> pa.Table:
    """Tokenises and writes the chunk of an item, if it has one, and passes its problems on."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray gives this task one CPU
    records = []
    for item in batch.to_pylist():
        record = {"split": item["split"], "shard": item["shard"], "problems": item["problems"], "error": item["error"]}
        record |= {"rows": 0, "bytes": 0, "sha256": ""}
        if item["uids"]:
            file = shard_name(item["split"], item["shard"])
            try:
                shard = write_shard(plan.folder, file, item["uids"], item["texts"], item["labels"], rules, plan.fingerprint)
                record |= {"rows": shard.rows, "bytes": shard.bytes, "sha256": shard.sha256}
            except HasteError as error:
                record["error"] = str(error)
        records.append(record)
    return pa.Table.from_pylist(records, schema=RECORD_SCHEMA)


def _unwrap(error: BaseException) -> BaseException:
    """The HasteError inside an error of Ray; one line for a worker that died; else the error itself."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, HasteError | NodeDiedError | OutOfMemoryError | WorkerCrashedError):
        inner = getattr(inner, "cause", None) or inner.__cause__
    if inner is None or isinstance(inner, HasteError):
        return inner or error
    return DataError(f"a prepare worker died ({first_line(inner)}); with too little memory, lower data.rows_per_shard or data.workers")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray Data's own messages off the terminal (they stay in its log file)."""
    handlers = [handler for handler in logging.getLogger("ray.data").handlers if handler.name == "console"]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
