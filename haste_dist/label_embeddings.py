"""Label embeddings for grouping: the normalised mean of the embeddings of a label's training texts, joined with that of its own text.

Two steps. First every text is embedded, a shard of texts at a time, each into a float16 file of its own: by Ray Data on all GPUs (or
CPUs) where Ray runs, else here. A killed run goes on from the files that are finished. Then Y^T E is summed for a range of labels at
a time, in the order of the shards, so neither the number of workers nor the size of a range changes a bit of the result. Memory: PIECE
texts a worker, and at most a quarter of the machine's for the float32 sums (of 10 million labels of width 768 they are 29 GiB, in each
worker if workers summed). Disk: 2 D bytes a text and a label while it lasts. Only training texts are embedded, never a test text; the dev
texts of the config's run count as having no label, and not for TF-IDF. A label text with the tokens of a test or dev text is left out.

Letters: n texts of a piece, L labels, R labels of a range, D embedding width.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from haste_dist.augmentation import held_out_keys, text_keys
from haste_dist.config import Config
from haste_dist.held_out import dev_rows
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, SHARD_SCHEMA, Manifest, open_split, read_arrow, replacing
from haste_dist.pipeline import quiet
from haste_dist.text_embedders import (
    PIECE,
    Embedder,
    Ragged,
    encoder_embedder,
    inverse_document_frequency,
    pieces,
    tfidf_embedder,
    tokenize,
)

OWN_TEXTS = 65536  # labels whose own texts make one file
SUM_BYTES = max(2**30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)  # of the float32 sums of a range of labels
MISSING_STREAM = 4  # keeps the random streams of one seed apart
FEW = {"tfidf": 2**20, "encoder": 2**13}  # so many texts are embedded here: starting workers would take longer
IDF, VECTORS, HELD_OUT = "idf.npy", "labels.npy", "held_out.npy"


@dataclass(frozen=True)
class LabelEmbeddings:
    """``vectors`` (L, D) float16, each of length 1, mapped from a file.

    ``with_text``: labels whose own text was joined in. ``untrained``: labels without a training text. ``missing``: labels with neither
    (or with texts that embed to zero); their vectors are random.
    """

    vectors: np.ndarray
    with_text: int
    untrained: int
    missing: int


@dataclass(frozen=True)
class Task:
    """One file of embeddings to make: of a training shard, or of the own texts of labels ``start`` to ``stop``."""

    name: str
    texts: int
    shard: str = ""
    start: int = 0
    stop: int = 0


def embed_labels(config: Config, folder: Path, manifest: Manifest, device: torch.device, work: Path) -> LabelEmbeddings:
    """Embeddings of the L labels of a prepared folder. ``work``: a folder for these settings and data alone, which the caller removes.

    Raises ConfigError where the encoder has learnt nothing yet, and for an encoder or tokenizer that cannot be loaded; DataError
    where a file cannot be read or written.
    """
    own = np.zeros(manifest.labels, bool)
    if config.groups.label_text:
        own = pc.not_equal(read_arrow(folder / LABEL_TEXTS, LABEL_SCHEMA)["text"], "").to_numpy()
    rows = manifest.splits["train"].rows
    counts = np.ones(rows, bool)
    counts[dev_rows(rows, config.data.dev_fraction, config.run.seed)] = False
    tasks = [Task(f"train-{i:05d}.npy", shard.rows, shard=shard.file) for i, shard in enumerate(manifest.splits["train"].shards)]
    for start in range(0, manifest.labels, OWN_TEXTS):
        stop = min(start + OWN_TEXTS, manifest.labels)
        if own[start:stop].any():
            tasks.append(Task(f"own-{start // OWN_TEXTS:05d}.npy", int(own[start:stop].sum()), start=start, stop=stop))
    work.mkdir(parents=True, exist_ok=True)
    if own.any() and not (work / HELD_OUT).is_file():
        with replacing(work / HELD_OUT) as file:
            np.save(file, held_out_keys(folder, manifest, counts), allow_pickle=False)
    if config.groups.features == "tfidf" and not (work / IDF).is_file():
        with replacing(work / IDF) as file:
            train = open_split(folder, manifest, "train")
            np.save(file, inverse_document_frequency(train, manifest.tokenizer.vocab_size, counts), allow_pickle=False)
    with progress() as bars:
        bar = bars.add_task("embedding texts", total=sum(task.texts for task in tasks))
        todo = [task for task in tasks if not (work / task.name).is_file()]
        bars.advance(bar, sum(task.texts for task in tasks) - sum(task.texts for task in todo))
        _embed_all(config, folder, manifest, device, work, todo, lambda texts: bars.advance(bar, texts))
    with_text, untrained, missing = _sum_labels(config, folder, manifest, work, tasks, own, counts)
    return LabelEmbeddings(np.load(work / VECTORS, mmap_mode="c", allow_pickle=False), with_text, untrained, missing)


def add_label_sums(sums_LD: np.ndarray, embeddings_nD: np.ndarray, labels: Ragged) -> None:
    """Adds each text's embedding to the row of each of its labels, in place: Y^T E over the labels that occur."""
    seen, column = np.unique(labels.values, return_inverse=True)
    y_nu = sp.csr_matrix((np.ones(len(column), np.float32), column.ravel(), labels.offsets), shape=(len(labels), len(seen)))
    sums_LD[seen] += y_nu.T.tocsr() @ embeddings_nD


def _embed_all(
    config: Config, folder: Path, manifest: Manifest, device: torch.device, work: Path, tasks: list[Task], done: Callable[[int], None]
) -> None:
    """Does all ``tasks``, through Ray Data where Ray runs and it is worth starting workers."""
    if not tasks:
        return
    embed = make_embedder(config, manifest, device, work)  # what cannot be loaded fails here, before Ray starts workers
    import ray

    few = sum(task.texts for task in tasks) < FEW[config.groups.features]
    on_gpu = device.type == "cuda"
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    workers = int(resources.get("GPU", 1)) if on_gpu else config.data.workers or int(resources.get("CPU", 1))
    workers = min(workers, len(tasks))
    if few or workers <= 1 or not resources:  # one worker would do what this process does, once it has started
        for task in tasks:
            _do(task, embed, config, folder, manifest, work)
            done(task.texts)
        return
    del embed
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    with DataContext.current(context), quiet():
        results = ray.data.from_items([dataclasses.asdict(task) for task in tasks], override_num_blocks=len(tasks)).map_batches(
            _Worker,
            fn_constructor_args=(config, str(folder.absolute()), manifest, device.type, str(work.absolute())),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if on_gpu else 0,
            num_cpus=0 if on_gpu else 1,
        )
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            done(sum(pa.table(batch)["texts"].to_pylist()))


class _Worker:
    """An actor that embeds the texts of one task after the other."""

    def __init__(self, config: Config, folder: str, manifest: Manifest, device: str, work: str):
        self.arguments = config, Path(folder), manifest, Path(work)
        self.embed = make_embedder(config, manifest, torch.device(device), Path(work))

    def __call__(self, batch: pa.Table) -> pa.Table:
        for item in batch.to_pylist():
            _do(Task(**item), self.embed, *self.arguments)
        return batch.select(["texts"])


def make_embedder(config: Config, manifest: Manifest, device: torch.device, work: Path) -> Embedder:
    if config.groups.features == "tfidf":
        return tfidf_embedder(np.load(work / IDF, allow_pickle=False), config.run.seed)
    return encoder_embedder(config, manifest, device)


def _do(task: Task, embed: Embedder, config: Config, folder: Path, manifest: Manifest, work: Path) -> None:
    """Writes the file of ``task``: (texts, D) float16, rows of length 1; zero for a label's own text that is held out."""
    held_out = np.load(work / HELD_OUT, allow_pickle=False) if not task.shard else None
    with replacing(work / task.name) as file:
        for i, texts in enumerate(_texts(task, config, folder, manifest)):
            x_nD = normalise(embed(texts)).astype("<f2")
            if held_out is not None:
                x_nD[np.isin(text_keys(texts.values, texts.offsets), held_out)] = 0
            if i == 0:
                _write_header(file, (task.texts, x_nD.shape[1]))
            file.write(x_nD.tobytes())


def _texts(task: Task, config: Config, folder: Path, manifest: Manifest) -> Iterator[Ragged]:
    if task.shard:
        yield from (texts for texts, _ in pieces(read_arrow(folder / task.shard, SHARD_SCHEMA)))
        return
    own = read_arrow(folder / LABEL_TEXTS, LABEL_SCHEMA)["text"][task.start : task.stop].to_pylist()
    texts = [text for text in own if text]
    for begin in range(0, len(texts), PIECE):
        yield tokenize(config.encoder, texts[begin : begin + PIECE], manifest.max_length)


def _sum_labels(
    config: Config, folder: Path, manifest: Manifest, work: Path, tasks: list[Task], own: np.ndarray, counts: np.ndarray
) -> tuple[int, int, int]:
    """Writes the label vectors, a range of labels at a time; returns how many have a text of their own, no training text, and neither.

    ``own`` (L,) bool: labels with a text of their own; ``counts`` (rows,) bool: training texts that count, which those held out do not.
    """
    width = np.load(work / tasks[0].name, mmap_mode="r", allow_pickle=False).shape[1]
    size = max(1, SUM_BYTES // (4 * width))
    untrained, random = 0, np.random.default_rng([config.run.seed, MISSING_STREAM])
    with_text = missing = 0
    with replacing(work / VECTORS) as file:
        _write_header(file, (manifest.labels, width))
        for start in range(0, manifest.labels, size):
            stop = min(start + size, manifest.labels)
            sums_RD = np.zeros((stop - start, width), np.float32)
            first = 0
            for task in (task for task in tasks if task.shard):
                x_nD = np.load(work / task.name, mmap_mode="r", allow_pickle=False)
                _add_shard(sums_RD, x_nD, folder / task.shard, start, counts[first : first + task.texts])
                first += task.texts
            untrained += int((~sums_RD.any(axis=1)).sum())
            normalise(sums_RD)
            for task in tasks:
                if not task.shard and task.start < stop and start < task.stop:
                    labels = task.start + np.flatnonzero(own[task.start : task.stop])
                    here = (labels >= start) & (labels < stop)
                    x_nD = np.load(work / task.name, mmap_mode="r", allow_pickle=False)[here]
                    sums_RD[labels[here] - start] += x_nD
                    with_text += int(x_nD.any(axis=1).sum())
            normalise(sums_RD)
            absent = np.flatnonzero(~sums_RD.any(axis=1))
            sums_RD[absent] = normalise(random.standard_normal((len(absent), width), np.float32))
            missing += len(absent)
            file.write(sums_RD.astype("<f2").tobytes())
    return with_text, untrained, missing


def _add_shard(sums_RD: np.ndarray, embeddings: np.ndarray, shard: Path, start: int, counts: np.ndarray) -> None:
    """Adds the texts of a shard that count to the sums of labels ``start``, ``start`` + 1, ..."""
    first = 0
    for _, labels in pieces(read_arrow(shard, SHARD_SCHEMA)):
        here = (labels.values >= start) & (labels.values < start + len(sums_RD))
        here &= np.repeat(counts[first : first + len(labels)], labels.lengths())
        if here.any():
            offsets = np.concatenate([[0], np.cumsum(here)])[labels.offsets]
            x_nD = embeddings[first : first + len(labels)].astype(np.float32)
            add_label_sums(sums_RD, x_nD, Ragged(labels.values[here] - start, offsets))
        first += len(labels)


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})


def normalise(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, in place; a zero row stays zero."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    np.divide(x, length, out=x, where=length > 0)
    return x


def remove_work(work: Path, but: str = "") -> None:
    """Removes what earlier runs left under ``work``, except the folder called ``but``."""
    for path in work.glob("*"):
        if path.name != but:
            shutil.rmtree(path, ignore_errors=True)
    if not but:
        shutil.rmtree(work, ignore_errors=True)


def progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
