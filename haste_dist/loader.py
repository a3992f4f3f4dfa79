"""Batches for training and scoring, from memory-mapped shards, in an order that is a pure function of (seed, epoch, step).

Letters: N rows of the global batch, B padded rows of one rank, S tokens of the longest text in the batch, M most labels of
a text. Each rank reads only its own rows. The order does not depend on the number of ranks.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from haste_dist import augmentation
from haste_dist.held_out import dev_rows
from haste_dist.manifest import Manifest, open_split
from haste_dist.sharding import batch_share

PREFETCHED = 4  # batches made ahead of the step
ORDER_STREAM = 0  # keeps the random streams of one seed apart


@dataclass
class Batch:
    """One rank's part of a global batch. Rows behind the real ones repeat the first one, so that every rank has B rows to compute."""

    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64
    label_rows: Tensor  # (B, M) int64: rows of the label order, -1 behind the last one and in padded rows
    texts: np.ndarray  # (real,) positions in the split of this rank's texts
    rows: int  # N, over all ranks

    @property
    def is_full(self) -> bool:
        """Whether the mask hides nothing."""
        return bool(self.attention_mask.all())


class Texts:
    """Random access to the token ids and labels of a split (or a part of it) without copying it into memory."""

    def __init__(self, table: pa.Table, positions: np.ndarray | None = None):
        """``positions``: rows of ``table`` that belong here, ascending, some more than once perhaps; None for all."""
        self._ids = RaggedColumn(table.column("input_ids"))
        self._labels = RaggedColumn(table.column("labels"))
        self.positions = np.arange(table.num_rows) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    def lengths(self) -> np.ndarray:
        """(rows,) int64 tokens of each text."""
        return self._ids.lengths()[self.positions]

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of ``rows``, one text after another, and how many each has."""
        return self._ids.take(self.positions[rows])

    def labels(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Label ids of ``rows``, one text after another, and how many each has."""
        return self._labels.take(self.positions[rows])


class RaggedColumn:
    """A list<int32> column as numpy views on the mapped files."""

    def __init__(self, column: pa.ChunkedArray):
        chunks = [c for c in column.chunks if len(c)]
        self._offsets = [c.offsets.to_numpy() for c in chunks]
        self._values = [c.values.to_numpy() for c in chunks]
        self._dtype = self._values[0].dtype if chunks else np.dtype(np.int32)
        # Half the time of arrays where rows are taken one by one, which holds up the thread that launches steps.
        self._seen = [(memoryview(o), memoryview(v)) for o, v in zip(self._offsets, self._values, strict=True)]
        self._starts = np.concatenate([[0], np.cumsum([len(c) for c in chunks])]).astype(np.int64)

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        at = int(row - self._starts[chunk])
        offsets = self._offsets[chunk]
        return self._values[chunk][offsets[at] : offsets[at + 1]]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values of ``rows``, one row after another, and how many each row has."""
        chunks, parts = np.searchsorted(self._starts, rows, side="right") - 1, []
        for chunk, at in zip(chunks.tolist(), (rows - self._starts[chunks]).tolist(), strict=True):
            offsets, values = self._seen[chunk]
            parts.append(values[offsets[at] : offsets[at + 1]])
        return np.frombuffer(b"".join(parts), self._dtype), np.fromiter(map(len, parts), np.int64, len(parts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self) -> np.ndarray:
        """(rows,) int64."""
        return np.concatenate([np.diff(o) for o in self._offsets] or [np.zeros(0)]).astype(np.int64)


def open_texts(prepared: Path, manifest: Manifest, split: str, dev_fraction: float, seed: int, label_texts: int = 0) -> Texts:
    """``train``, ``dev`` or ``test``; with a ``dev_fraction`` the dev texts are cut from the training split by the seed.

    ``label_texts``: times that the labels' own texts stand behind those of ``train``. Raises ConfigError where they were not prepared.
    """
    table = open_split(prepared, manifest, "test" if split == "test" else "train")  # dev texts are stored with train
    if split == "test":
        return Texts(table)
    dev = dev_rows(table.num_rows, dev_fraction, seed)
    chosen = dev if split == "dev" else np.delete(np.arange(table.num_rows), dev)
    if split == "train" and label_texts:
        own = table.num_rows + augmentation.kept_rows(prepared, manifest, dev)
        table = pa.concat_tables([table, open_split(prepared, manifest, augmentation.SPLIT)])
        chosen = np.concatenate([chosen, np.repeat(own, label_texts)])
    return Texts(table, chosen)


def epoch_order(lengths: np.ndarray, batch_size: int, buckets: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch as row numbers: a random order in which ``buckets`` batches at a time are sorted by length.

    Every row is in exactly one batch; all batches but one have ``batch_size`` rows.
    """
    rng = np.random.default_rng([seed, ORDER_STREAM, epoch])
    order = rng.permutation(len(lengths))
    if buckets > 1:
        pool = buckets * batch_size
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(pool, len(order), pool))])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


class BatchMaker:
    """Makes this rank's part of global batches."""

    def __init__(
        self,
        texts: Texts,
        row_of_label: np.ndarray,
        max_labels: int,
        pad_id: int,
        ranks: int,
        rank: int,
        pin: bool = False,
    ):
        """``row_of_label`` (L,) int64; ``pin``: page-locked tensors, for copies that overlap the GPU's work."""
        self.texts, self.row_of_label, self.max_labels, self.pad_id = texts, row_of_label, max(1, max_labels), pad_id
        self.ranks, self.rank, self.pin = ranks, rank, pin

    def make(self, rows: np.ndarray) -> Batch:
        """``rows``: the N texts of the global batch."""
        start, stop, padded = batch_share(len(rows), self.ranks, self.rank)
        mine = rows[start:stop]
        filled = np.concatenate([mine, np.repeat(mine[:1] if len(mine) else rows[:1], padded - len(mine))])
        made = self.assemble(*self.texts.tokens(filled), *self.texts.labels(mine))
        return Batch(*made, self.texts.positions[mine], len(rows))

    def assemble(self, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and label rows of a Batch: ``tokens`` of B texts, ``lengths`` each; ``labels`` of the real ones, ``counts`` each."""
        within = np.arange(lengths.max()) < lengths[:, None]
        input_ids = np.full(within.shape, self.pad_id, np.int64)
        input_ids[within] = tokens
        label_rows = np.full((len(lengths), self.max_labels), -1, np.int64)
        label_rows[: len(counts)][np.arange(self.max_labels) < counts[:, None]] = self.row_of_label[labels]
        input_ids_BS, mask_BS, label_rows_BM = (torch.from_numpy(a) for a in (input_ids, within.astype(np.int64), label_rows))
        if self.pin:
            return input_ids_BS.pin_memory(), mask_BS.pin_memory(), label_rows_BM.pin_memory()
        return input_ids_BS, mask_BS, label_rows_BM


class TrainingBatches:
    """The endless sequence of training batches; ``steps_per_epoch`` of them make an epoch."""

    def __init__(self, maker: BatchMaker, batch_size: int, buckets: int, seed: int):
        self._maker, self._batch_size, self._buckets, self._seed = maker, batch_size, buckets, seed
        self._lengths = maker.texts.lengths()
        self.steps_per_epoch = -(-len(self._lengths) // batch_size)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches of steps ``step``, ``step`` + 1, ... made ahead by a thread."""

        def sequence() -> Iterator[np.ndarray]:
            epoch, at = divmod(step, self.steps_per_epoch)
            while True:
                batches = epoch_order(self._lengths, self._batch_size, self._buckets, self._seed, epoch)
                yield from batches[at:]
                epoch, at = epoch + 1, 0

        return ahead(self._maker.make, sequence())


def scoring_batches(maker: BatchMaker, batch_size: int, limit: int = 0) -> Iterator[Batch]:
    """Every text once (or an even spread of ``limit`` of them), sorted by length; no batch where there is no text."""
    chosen = np.arange(len(maker.texts))
    if 0 < limit < len(chosen):
        chosen = np.linspace(0, len(chosen) - 1, limit).astype(np.int64)
    chosen = chosen[np.argsort(maker.texts.lengths()[chosen], kind="stable")]
    return ahead(maker.make, iter(np.split(chosen, range(batch_size, len(chosen), batch_size)) if len(chosen) else []))


def ahead(make: Callable[[Any], Batch], sequence: Iterator[Any]) -> Iterator[Batch]:
    """``map(make, sequence)``, computed a few items ahead in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        waiting = []
        for rows in sequence:
            waiting.append(pool.submit(make, rows))
            if len(waiting) > PREFETCHED:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
