"""Training batches streamed through Ray Data (data.reader=ray): other machines' CPUs read the shards, a rank only pads what arrives.

An epoch's rows are cut into slices of SLICE rows, put in an order drawn from (seed, epoch), and dealt out: each rank gets one stretch of
them, as long as its share of all batches. Within a pool of batches a rank draws an order from (seed, epoch, rank, pool) and sorts by
length, so that ranks have texts of like length at a step. Each row comes once an epoch, all ranks have the same number of batches, and a
resumed run goes on with the batch that an unbroken one would have; the batches are not those of the memory-mapped reader.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from haste_dist.config import DataConfig
from haste_dist.errors import ConfigError, DataError
from haste_dist.loader import Batch, BatchMaker, RaggedColumn, Texts, ahead, open_texts
from haste_dist.manifest import read_manifest
from haste_dist.sharding import batch_share

SLICE = 64  # rows that stay neighbours in an epoch's order; few, so that a pool of a sorted source holds a bit of everything
SLICES_A_TASK = 128
TASKS = 2  # at once, for one rank
ROWS_STREAM, POOL_STREAM, BATCH_STREAM = 2, 3, 4  # loader.py has streams 0 and 1 of the same seed


class RayBatches:
    """The endless sequence of training batches; ``steps_per_epoch`` of them make an epoch. Ray must be running."""

    def __init__(self, maker: BatchMaker, batch_size: int, buckets: int, seed: int, prepared: Path, data: DataConfig):
        """``prepared`` and ``data`` say again, for tasks elsewhere, what the texts of ``maker`` are."""
        self._maker, self._buckets, self._seed = maker, buckets, seed
        self._texts = (str(prepared), data.dev_fraction, seed, data.label_texts)
        self._rows, self._batch_size = len(maker.texts), batch_size
        self.steps_per_epoch = -(-self._rows // batch_size)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches of steps ``step``, ``step`` + 1, ... made ahead by a thread. Raises ConfigError where Ray does not run."""
        import ray

        if not ray.is_initialized():
            raise ConfigError("data.reader=ray: Ray does not run here; start with haste train, or set data.reader=mmap")
        batches = self._sequence(step)
        return ahead(lambda _: next(batches), repeat(None))

    def _sequence(self, step: int) -> Iterator[Batch]:
        epoch, at = divmod(step, self.steps_per_epoch)
        while True:
            yield from self._epoch(epoch, at)
            epoch, at = epoch + 1, 0

    def _epoch(self, epoch: int, at: int) -> Iterator[Batch]:
        """The batches of an epoch from its step ``at``."""
        maker, steps = self._maker, self.steps_per_epoch
        totals = [self._batch_size] * (steps - 1) + [self._rows - (steps - 1) * self._batch_size]
        shares = [
            np.array([stop - start for start, stop, _ in (batch_share(n, maker.ranks, r) for n in totals)]) for r in range(maker.ranks)
        ]
        mine = shares[maker.rank]
        first = at // self._buckets * self._buckets  # the pool that has the step starts there
        begin = int(sum(share.sum() for share in shares[: maker.rank]) + mine[:first].sum())
        ranges = epoch_ranges(self._rows, self._seed, epoch, begin, int(mine[first:].sum()))
        stream = RowStream(self._read(ranges), int(mine[first:].sum()))
        for start in range(first, steps, self._buckets):
            stop = min(start + self._buckets, steps)
            count = int(mine[start:stop].sum())
            pool = stream.take(count) if count else maker.texts  # no row is this rank's; others have some
            order = np.random.default_rng([self._seed, POOL_STREAM, epoch, maker.rank, start]).permutation(count)
            order = order[np.argsort(pool.lengths()[order], kind="stable")] if count else order
            ends = np.cumsum(mine[start:stop])
            # All ranks draw the same order of batches; the short last batch of an epoch stays last.
            full = stop - start - (stop == steps)
            turns = [*np.random.default_rng([self._seed, BATCH_STREAM, epoch, start]).permutation(full), *range(full, stop - start)]
            for i, turn in enumerate(turns, start):
                rows = order[ends[turn] - mine[start + turn] : ends[turn]]
                if i >= at:
                    yield self._batch(pool, rows, totals[start + turn])
        stream.close()

    def _batch(self, pool: Texts, rows: np.ndarray, total: int) -> Batch:
        padded = batch_share(total, self._maker.ranks, self._maker.rank)[2]
        filled = np.concatenate([rows, np.repeat(rows[:1], padded - len(rows))]) if len(rows) else np.zeros(padded, np.int64)
        made = self._maker.assemble(*pool.tokens(filled), *pool.labels(rows))
        return Batch(*made, pool.positions[rows], total)

    def _read(self, ranges: np.ndarray) -> Iterator[pa.Table]:
        import ray.data
        from ray.data import DataContext

        if not len(ranges):
            return
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        with DataContext.current(context):
            parts = [ranges[at : at + SLICES_A_TASK] for at in range(0, len(ranges), SLICES_A_TASK)]
            slices = ray.data.from_arrow([pa.table({"start": part[:, 0], "stop": part[:, 1]}) for part in parts])
            task = partial(_read_task, chosen=self._texts)
            # Ranks hold the CPUs that Ray counts, so the tasks ask for none.
            pool = ray.data.TaskPoolStrategy(min(TASKS, len(parts)))
            tables = slices.map_batches(task, batch_size=None, batch_format="pyarrow", num_cpus=0, compute=pool)
            for table in tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
                yield pa.table(table)


def epoch_ranges(rows: int, seed: int, epoch: int, begin: int, count: int) -> np.ndarray:
    """int64 (k, 2): the slices, as [start, stop) of rows, that ``count`` rows from ``begin`` on are in the order of an epoch. Pure."""
    starts = np.random.default_rng([seed, ROWS_STREAM, epoch]).permutation(-(-rows // SLICE)) * SLICE
    stops = np.minimum(starts + SLICE, rows)
    ends = np.cumsum(stops - starts)
    low = np.clip(begin - (ends - (stops - starts)), 0, stops - starts)
    high = np.clip(begin + count - (ends - (stops - starts)), 0, stops - starts)
    return np.stack([starts + low, starts + high], 1)[high > low]


class Pool(Texts):
    """Rows that arrived, in memory; ``positions`` are those in the split."""

    def __init__(self, table: pa.Table):
        self._ids, self._labels = RaggedColumn(table["input_ids"]), RaggedColumn(table["labels"])
        self.positions = table["position"].to_numpy()

    def lengths(self) -> np.ndarray:
        return self._ids.lengths()

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._ids.take(rows)

    def labels(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._labels.take(rows)


class RowStream:
    """Takes pools off a stream of tables and holds their number against what must come."""

    def __init__(self, tables: Iterator[pa.Table], rows: int):
        self._tables, self._rows, self._came = tables, rows, 0
        self._held: pa.Table | None = None

    def take(self, rows: int) -> Pool:
        """The next ``rows`` rows, at least one."""
        held = [self._held] if self._held is not None else []
        while sum(table.num_rows for table in held) < rows:
            table = next(self._tables, None)
            if table is None:
                break
            self._came += table.num_rows
            held.append(table)
        whole = pa.concat_tables(held) if held else None
        if whole is None or whole.num_rows < rows:
            raise self._miscounted(self._came)
        self._held = whole.slice(rows) if whole.num_rows > rows else None
        return Pool(whole.slice(0, rows))

    def close(self) -> None:
        """Raises DataError if rows are left."""
        self._came += sum(table.num_rows for table in self._tables)
        if self._came != self._rows:
            raise self._miscounted(self._came)

    def _miscounted(self, came: int) -> DataError:
        return DataError(
            f"data.reader=ray: {came} rows came to this rank in an epoch, of {self._rows} by the manifest; try data.reader=mmap"
        )


def _read_task(batch: pa.Table, chosen: tuple[str, float, int, int]) -> pa.Table:
    texts = _texts(*chosen)
    rows = np.concatenate(
        [np.arange(start, stop) for start, stop in zip(*batch.select(["start", "stop"]).to_pydict().values(), strict=True)]
    )
    columns: dict[str, Any] = {"position": texts.positions[rows]}
    for name, (values, counts) in (("input_ids", texts.tokens(rows)), ("labels", texts.labels(rows))):
        columns[name] = pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(counts)]), values)
    return pa.table(columns)


@lru_cache(maxsize=1)
def _texts(prepared: str, dev_fraction: float, seed: int, label_texts: int) -> Texts:
    return open_texts(Path(prepared), read_manifest(prepared), "train", dev_fraction, seed, label_texts)
