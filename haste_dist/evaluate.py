"""Scoring a split: what training does each epoch and ``haste evaluate`` once.

``evaluate_split`` holds the arithmetic: the model is any function from a batch to ranked labels, so it knows no device and no
process group. ``evaluate_texts`` joins it to encoder, output layer and ranks. Letters: n texts of a batch, K predictions a
text, L labels.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from haste_dist.classifier import LEFT_OUT, Classifier
from haste_dist.collectives import sum_over_ranks
from haste_dist.config import Config
from haste_dist.engine import EncoderEngine
from haste_dist.loader import Batch, BatchMaker, RaggedColumn, open_texts, scoring_batches
from haste_dist.manifest import FILTER_SCHEMA, LABEL_SCHEMA, LABEL_TEXTS, open_split, read_arrow, replacing
from haste_dist.metrics import FREQUENCY_BINS, KS, RECALL_KS, FrequencyRecall, Metrics, Propensity, Ragged, match
from haste_dist.model import Prepared
from haste_dist.sharding import batch_share
from haste_dist.step import predict_batch
from haste_dist.world import World


class TextBatch(Protocol):
    """What scoring must know of a batch; the model's function gets the whole object."""

    @property
    def texts(self) -> NDArray[np.int64]:
        """(n,) positions of the texts in the split as written; may be empty."""


BatchT = TypeVar("BatchT", bound=TextBatch)
Score = Callable[[BatchT, int], tuple[Any, Any]]
"""(batch, K) -> label ids and scores, (n or more, K or fewer) arrays or tensors: best first, -1 for none; rows behind n are padding."""

Keep = Callable[[NDArray[np.int64], Ragged, NDArray[np.int64], NDArray[np.float32]], None]
"""(positions (n,), true labels, predicted ids (n, K), scores (n, K)) of each batch, after filtering."""


@dataclass(frozen=True)
class Positions:
    """A batch for scoring functions that need no tokens."""

    texts: NDArray[np.int64]


class TrueLabels:
    """The labels of any texts of a split, read from the memory-mapped shards."""

    def __init__(self, table: pa.Table, frequency: NDArray[np.integer] | None = None) -> None:
        """``table`` as from ``open_split``; with ``frequency`` (L,), training texts of each label, labels that have none are left out."""
        self._column = RaggedColumn(table.column("labels"))
        self._frequency = frequency

    def __len__(self) -> int:
        return len(self._column)

    def of(self, positions: NDArray[np.int64]) -> Ragged:
        """Labels of the texts at ``positions`` (n,)."""
        found = [self._column[int(row)] for row in positions]
        return Ragged.of(found if self._frequency is None else [labels[self._frequency[labels] > 0] for labels in found])

    def scored(self, true: Ragged) -> NDArray[np.bool_]:
        """(n,) which texts count, given what ``of`` said of them: where labels are left out, only those that still have one."""
        return (np.diff(true.offsets) > 0) | (self._frequency is None)


class Filters:
    """(text, label) pairs that are taken out of predictions before scoring, such as a product's own title."""

    def __init__(self, row: NDArray[np.int64], label: NDArray[np.int64]) -> None:
        """Both (P,), ``row`` being positions in the split; in any order."""
        order = np.lexsort((label, row))
        self._row, self._label = row[order].astype(np.int64), label[order].astype(np.int64)
        self.most = int(np.unique(self._row, return_counts=True)[1].max(initial=0))
        """The most labels filtered from one text: ask for this many predictions more."""

    def __len__(self) -> int:
        return len(self._row)

    def of(self, positions: NDArray[np.int64]) -> Ragged:
        """Filtered labels of the texts at ``positions`` (n,)."""
        low, high = np.searchsorted(self._row, positions, side="left"), np.searchsorted(self._row, positions, side="right")
        return Ragged.of([self._label[a:b] for a, b in zip(low, high, strict=True)])

    def apply(
        self, positions: NDArray[np.int64], labels: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(n, K) labels and scores without the filtered pairs: the rest moves up, -1 and -inf follow."""
        out = match(labels, self.of(positions)).hits
        order = np.argsort(out, axis=1, kind="stable")
        labels, scores = np.where(out, -1, labels), np.where(out, np.float32(-np.inf), scores)
        return np.take_along_axis(labels, order, axis=1), np.take_along_axis(scores, order, axis=1)


class Popularity:
    """The baseline that answers every text with the most frequent labels (ties: lower id first)."""

    def __init__(self, frequency: NDArray[np.integer]) -> None:
        """``frequency`` (L,): training texts of each label."""
        self._frequency = frequency
        self._best = np.empty(0, np.int64)

    def __call__(self, batch: TextBatch, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        k = min(k, len(self._frequency))
        if len(self._best) < k:
            least = np.partition(self._frequency, -k)[-k]
            above = np.flatnonzero(self._frequency > least)
            ties = np.flatnonzero(self._frequency == least)[: k - len(above)]
            self._best = np.concatenate([above[np.argsort(-self._frequency[above], kind="stable")], ties])
        best = self._best[:k]
        shape = (len(batch.texts), k)
        return np.broadcast_to(best, shape), np.broadcast_to(self._frequency[best].astype(np.float32), shape)


def load_frequency(prepared: str | Path) -> NDArray[np.int64]:
    """(L,) training texts of each label. Raises DataError if the prepared folder lacks its labels."""
    return read_arrow(Path(prepared) / LABEL_TEXTS, LABEL_SCHEMA).column("frequency").to_numpy()


def load_filters(prepared: str | Path, split: str) -> Filters | None:
    """The filter pairs of a split, or None where the data set has none. The dev texts are training texts."""
    path = Path(prepared) / f"filter_{'test' if split == 'test' else 'train'}.arrow"
    if not path.exists():
        return None
    table = read_arrow(path, FILTER_SCHEMA)
    return Filters(table.column("row").to_numpy(), table.column("label").to_numpy())


def position_batches(positions: NDArray[np.int64], size: int = 4096) -> Iterator[Positions]:
    """``positions`` (n,) in pieces, for ``Popularity``."""
    for start in range(0, len(positions), size):
        yield Positions(positions[start : start + size])


def evaluate_split(
    score: Score[BatchT],
    batches: Iterable[BatchT],
    truth: TrueLabels,
    propensity: Propensity,
    *,
    filters: Filters | None = None,
    sum_ranks: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    keep: Keep | None = None,
) -> dict[str, float]:
    """All metrics over the texts of ``batches``, as fractions: ``Metrics.result``, ``FrequencyRecall.result``, and ``rows``.

    Every rank passes its own texts; ``sum_ranks`` adds a float64 vector over ranks (called once, at the end, by every rank).
    The K that ``score`` is asked for is the same for all batches and ranks, so ``score`` may be a collective call.
    """
    metrics, rare = Metrics(propensity), FrequencyRecall(propensity.frequency)
    wanted = metrics.depth
    asked = min(wanted + (filters.most if filters else 0), len(propensity.frequency))
    for batch in batches:
        labels, scores = (_array(part)[: len(batch.texts)] for part in score(batch, asked))
        if filters is not None:
            labels, scores = filters.apply(batch.texts, labels, scores)
        labels, scores = labels[:, :wanted], scores[:, :wanted]
        true = truth.of(batch.texts)
        scored = truth.scored(true)
        true, labels, scores = Ragged(true.values, np.append(0, true.offsets[1:][scored])), labels[scored], scores[scored]
        metrics.add(labels, true)
        rare.add(labels, true)
        if keep is not None:
            keep(batch.texts[scored], true, labels, scores)
    if sum_ranks is not None:
        mine = metrics.state()
        total = sum_ranks(np.concatenate([mine, rare.state()]))
        metrics, rare = Metrics(propensity), FrequencyRecall(propensity.frequency)
        metrics.merge(total[: len(mine)])
        rare.merge(total[len(mine) :])
    return {**metrics.result(), **rare.result(), "rows": metrics.rows}


def evaluate_texts(
    config: Config,
    prepared: Prepared,
    engine: EncoderEngine,
    classifier: Classifier,
    world: World,
    split: str,
    limit: int = 0,
    keep: Keep | None = None,
) -> dict[str, float]:
    """``evaluate_split`` of a model on ``train``, ``dev`` or ``test`` (an even spread of ``limit`` texts; 0: all), and its ``seconds``.

    Every rank calls it and gets the same metrics; ``keep`` sees the texts of its own rank.
    """
    started = time.perf_counter()
    order, manifest = prepared.order, prepared.manifest
    most_labels = manifest.splits["test" if split == "test" else "train"].max_labels
    texts = open_texts(prepared.folder, manifest, split, config.data.dev_fraction, config.run.seed)
    maker = BatchMaker(texts, order.row_of_label, most_labels, manifest.tokenizer.pad_id, world.size, world.rank)

    def score(batch: Batch, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        scores_NK, rows_NK = predict_batch(engine, classifier, batch, world, k)
        start, stop, _ = batch_share(batch.rows, world.size, world.rank)
        rows = rows_NK[start:stop].cpu().numpy()
        scores = scores_NK[start:stop].cpu().numpy()
        answered = (rows >= 0) & (scores > LEFT_OUT / 2)
        return np.where(answered, order.label_of_row[rows], -1), np.where(answered, scores, np.float32(-np.inf))

    def sum_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return sum_over_ranks(torch.from_numpy(values).to(world.device), world).cpu().numpy()

    unseen = np.flatnonzero(load_frequency(prepared.folder) == 0) if config.evaluate.labels == "seen" else np.zeros(0, np.int64)
    with classifier.leaving_out(torch.from_numpy(order.row_of_label[unseen])):
        result = evaluate_split(
            score,
            scoring_batches(maker, config.evaluate.batch_size, limit),
            _truth(config, prepared, split),
            _propensity(config, prepared),
            filters=load_filters(prepared.folder, split),
            sum_ranks=sum_ranks,
            keep=keep,
        )
    return {**result, "seconds": time.perf_counter() - started}


def evaluate_baseline(config: Config, prepared: Prepared, split: str) -> dict[str, float]:
    """The metrics of ``Popularity`` on all texts of ``train``, ``dev`` or ``test``; no rank but one need call it."""
    propensity = _propensity(config, prepared)
    positions = open_texts(prepared.folder, prepared.manifest, split, config.data.dev_fraction, config.run.seed).positions
    return evaluate_split(
        Popularity(propensity.frequency),
        position_batches(positions),
        _truth(config, prepared, split),
        propensity,
        filters=load_filters(prepared.folder, split),
    )


def _truth(config: Config, prepared: Prepared, split: str) -> TrueLabels:
    frequency = load_frequency(prepared.folder) if config.evaluate.labels == "seen" else None
    return TrueLabels(open_split(prepared.folder, prepared.manifest, "test" if split == "test" else "train"), frequency)


def _propensity(config: Config, prepared: Prepared) -> Propensity:
    settings, rows = config.evaluate, prepared.manifest.splits["train"].rows
    return Propensity(load_frequency(prepared.folder), rows, settings.propensity_a, settings.propensity_b)


def write_evaluation(folder: str | Path, split: str, model: Mapping[str, float], baseline: Mapping[str, float], **more: Any) -> Path:
    """``evaluate-<split>.json`` in the run folder, replaced in one step; ``more`` (step, seconds ...) stands at the top."""
    path = Path(folder) / f"evaluate-{split}.json"
    page = {
        "split": split,
        **more,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "metrics": dict(model),
        "most_frequent_labels": dict(baseline),
    }
    with replacing(path) as file:
        file.write((json.dumps(page, indent=1) + "\n").encode())
    return path


def print_metrics(model: Mapping[str, float], baseline: Mapping[str, float], console: Console | None = None) -> None:
    """Two tables in percent: the metrics, and recall@5 by how often a label was seen; under each row what the baseline reaches."""
    console = console or Console()
    ks = sorted({*KS, *RECALL_KS})
    names = (("P", "precision"), ("PSP", "propensity-scored P"), ("nDCG", "nDCG"), ("PSnDCG", "propensity-scored nDCG"), ("R", "recall"))
    table = _table(f"{int(model.get('rows', 0)):,} texts, percent", [f"@{k}" for k in ks])
    for name, title in names:
        _add_rows(table, title, [f"{name}@{k}" for k in ks], model, baseline)
    console.print(table)
    bins = ["over 100" if name == "over_100" else name.replace("_", "-") for _, _, name in FREQUENCY_BINS]
    table = _table("recall@5 by the number of training texts of a label, percent", bins)
    _add_rows(table, "labels seen so often", [f"r_at_5_freq_{name}" for _, _, name in FREQUENCY_BINS], model, baseline)
    console.print(table)
    if baseline.get("P@1"):
        console.print(f"P@1 is {model['P@1'] / baseline['P@1']:.1f} times that of always answering the most frequent labels.")


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add_rows(table: Table, title: str, keys: list[str], model: Mapping[str, float], baseline: Mapping[str, float]) -> None:
    for name, values, style in ((title, model, "bold"), ("  most frequent labels", baseline, "dim")):
        if any(key in values for key in keys):
            table.add_row(name, *(f"{100 * values[key]:.2f}" if key in values else "" for key in keys), style=style)


def _array(part: Any) -> NDArray[Any]:
    """numpy from numpy or from a tensor on any device."""
    return np.asarray(part.cpu() if hasattr(part, "cpu") else part)
