"""The Ray Data pipeline of prepare: reader tasks cut files into blocks, tasks on all CPUs make a shard of each.

A reader only looks for line ends, so one keeps tens of CPUs busy; parsing, checks, tokenising and writing are the other tasks'
work. Ray Data holds the readers back when blocks pile up, so memory stays flat however long the files are. Errors travel as values
of the records, not as exceptions, which Ray would wrap and log.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from haste_dist.blocks import Block, Part, Truncated, read_blocks
from haste_dist.errors import DataError, HasteError
from haste_dist.manifest import first_line
from haste_dist.rows import Problem
from haste_dist.shards import make_shard, read_page, read_shard, shard_sums, uid_hashes
from haste_dist.storage import Location

CPUS_A_READER = 16  # readers at work at once: one for so many CPUs, but two at least


@dataclass(frozen=True)
class Plan:
    """What every task of the pipeline needs to know. ``labels`` is None where there is no label file."""

    parts: tuple[Part, ...]
    folder: Location
    labels: int | None
    rows_per_shard: int
    fingerprint: str
    suffix: str = ""  # of the names of shards


BLOCK_SCHEMA = pa.schema(
    [
        ("part", pa.int64()),
        ("number", pa.int64()),
        ("first_row", pa.int64()),
        ("first_line", pa.int64()),
        ("data", pa.list_(pa.large_binary())),
        ("end", pa.int64()),
        ("problem", pa.string()),
        ("error", pa.string()),
    ]
)
"""A block on its way to be written, or the end of a part. end is how many blocks the part had, -1 before its end."""

RECORD_SCHEMA = pa.schema(
    [
        ("part", pa.int64()),
        ("number", pa.int64()),
        ("end", pa.int64()),
        ("page", pa.string()),
        ("sums", pa.string()),
        ("uids", pa.large_binary()),
        ("labels", pa.large_binary()),
        ("fresh", pa.bool_()),
        ("problem", pa.string()),
        ("error", pa.string()),
    ]
)
"""What became of a block: shard and first problem as JSON, sums, hashes of uids, label ids (int32), whether it was made now.
error is one line that ends the run, or empty."""


def run(plan: Plan, rules: str, workers: int) -> Generator[dict[str, Any], None, None]:
    """Yields a record of RECORD_SCHEMA for each block, and one for the end of each part, in any order; closing it early stops the tasks.

    ``rules`` is the serialised tokenizer, ``workers`` the most CPUs to use (0: all). Raises DataError if a worker dies.
    """
    import ray
    import ray.data
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # an item is a whole block already: never join two into one
    readers = max(2, int(workers or ray.cluster_resources().get("CPU", 1)) // CPUS_A_READER)
    with DataContext.current(context), quiet():
        # The readers ask for no CPU: they mostly wait, and a CPU of their own would cost a machine of two cores half its speed.
        blocks = ray.data.from_items([{"part": part} for part in range(len(plan.parts))]).map_batches(
            partial(_read_task, plan=plan),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(min(readers, len(plan.parts))),
        )
        records = blocks.map_batches(
            partial(_write_task, plan=plan, rules=rules),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(workers or None),
        )
        try:
            for batch in records.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from pa.table(batch).to_pylist()
        except Exception as error:
            raise unwrap(error, "prepare", "data.rows_per_shard or data.workers") from None


def _read_task(batch: pa.Table, plan: Plan) -> Iterator[pa.Table]:
    """Streams parts as items of one block each."""
    for number in batch["part"].to_pylist():
        part, blocks = plan.parts[number], 0
        end = {"part": number, "number": -1, "first_row": 0, "first_line": 0, "data": [], "problem": "", "error": ""}
        try:
            for block in read_blocks(part, plan.rows_per_shard):
                yield _table({**end, **vars(block), "end": -1}, BLOCK_SCHEMA)
                blocks += 1
        except Truncated as error:
            line, detail, file = error.args
            end["problem"] = json.dumps(Problem(file, line + 1, "truncated file", detail))
        except HasteError as error:
            end["error"] = str(error)
        yield _table({**end, "end": blocks}, BLOCK_SCHEMA)


def _table(values: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array([values[field.name]], field.type) for field in schema], schema=schema)


def _write_task(batch: pa.Table, plan: Plan, rules: str) -> pa.Table:
    """Makes the shard of a block, unless an earlier run finished it, and tells what is in it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray gives this task one CPU
    tables = []
    for i in range(batch.num_rows):
        item = batch.slice(i, 1)
        values = {name: item[name][0].as_py() for name in ("part", "number", "first_row", "first_line", "end", "problem", "error")}
        record = {**values, "page": "", "sums": "", "uids": b"", "labels": b"", "fresh": False}
        if values["number"] >= 0:
            data = [run.as_buffer() for run in item["data"][0].values]
            block = Block(values["number"], values["first_row"], values["first_line"], data)
            try:
                record |= _write_block(plan, plan.parts[values["part"]], block, rules)
            except HasteError as error:
                record["error"] = str(error)
        tables.append(_table(record, RECORD_SCHEMA))
    return pa.concat_tables(tables)


def _write_block(plan: Plan, part: Part, block: Block, rules: str) -> dict[str, Any]:
    page = read_page(plan.folder, part.split, block.number, plan.fingerprint, plan.suffix)
    fresh = page is None
    if page is None:
        page, rows = make_shard(plan.folder, part, block, plan.labels, rules, plan.fingerprint, plan.suffix)
    elif page.shard.rows:
        rows = read_shard(plan.folder, page.shard)
    else:
        return {"page": json.dumps(dataclasses.asdict(page.shard)), "sums": "{}", "problem": json.dumps(page.problems[0])}
    return {
        "page": json.dumps(dataclasses.asdict(page.shard)),
        "sums": json.dumps(shard_sums(rows)),
        "uids": uid_hashes(rows["uid"].to_pylist()) if part.format != "text" else b"",
        "labels": rows["labels"].flatten().to_numpy().tobytes(),
        "fresh": fresh,
        "problem": json.dumps(page.problems[0]) if page.problems else "",
    }


def unwrap(error: BaseException, command: str, lower: str) -> BaseException:
    """The HasteError inside an error of Ray; one line for a worker of ``command`` that died; else the error itself."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, HasteError | NodeDiedError | OutOfMemoryError | WorkerCrashedError):
        inner = getattr(inner, "cause", None) or inner.__cause__
    if inner is None or isinstance(inner, HasteError):
        return inner or error
    return DataError(f"a {command} worker died ({first_line(inner)}); with too little memory, lower {lower}")


@contextmanager
def quiet() -> Iterator[None]:
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
