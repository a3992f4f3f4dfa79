"""Label order: which row of the output layer a label gets, and which labels share one set of input features.

Rows 0..H-1 are the head: the most frequent labels (ties by label id), H = head_fraction * L rounded up to whole groups, in an
order that gives every rank's range of them a like share of frequent ones (``sharding.spread``).
The other labels, the tail, stand in T groups of exactly G rows; only the last group may hold padding, at its end. Groups
are semantic (close label embeddings, neighbouring groups close: see ``packing``), random, or neighbours in frequency.

A label order of earlier data can be the start: groups whose labels are all still there stay together (``groups.start``).

Written into the prepared folder, each file atomically, with bytes that depend on the settings and the data alone:
    labels.arrow   a row per output row: label (-1: padding), text, frequency, row, group (-1: head)
    groups.json    H, T, G, the settings behind the order, its fingerprint, and the cohesion report
    cohesion.arrow how close each group's labels are, and those of random groups; only where labels were embedded
    label_vectors.npy   (L, D) float16, each label's embedding; only for output.start=centroids
    label_basis.safetensors   what the tail's input is turned by; only for output.basis=labels

Letters: L labels, R = H + T*G rows, D embedding width.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from haste_dist.basis import BASIS_FILE, principal_basis, read_basis, write_basis
from haste_dist.bisection import group_cohesion
from haste_dist.columns import text_parts
from haste_dist.config import Config
from haste_dist.embedder import embedder_of
from haste_dist.errors import DataError
from haste_dist.held_out import dev_split
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, PREPARED, Manifest, read_arrow, replacing, write_arrow
from haste_dist.packing import pack
from haste_dist.sharding import spread
from haste_dist.world import all_devices

if TYPE_CHECKING:
    from haste_dist.label_embeddings import LabelEmbeddings

SCHEMA_VERSION = 1
LABELS_FILE, GROUPS_FILE = "labels.arrow", "groups.json"
COHESION_FILE = "cohesion.arrow"
VECTORS_FILE = "label_vectors.npy"
COHESION_SCHEMA = pa.schema([("group", pa.int64()), ("cohesion", pa.float32()), ("random", pa.float32()), ("next", pa.float32())])
"""A row a group: mean cosine of its labels to its centroid, that of a random group, the centroid's cosine to the next one (0: last)."""
WORK = "grouping"  # folder of what a killed run has finished
ORDER_SCHEMA = pa.schema(
    [("label", pa.int64()), ("text", pa.string()), ("frequency", pa.int64()), ("row", pa.int64()), ("group", pa.int64())]
)
OF_GROUPS = ("group_size", "head_fraction", "method", "iterations", "search", "start")  # settings of an order that no embedding depends on
RANDOM_STREAM, BASELINE_STREAM = 1, 2  # keep the random streams of one seed apart


@dataclass(frozen=True)
class LabelOrder:
    """The bijection between labels and real rows.

    label_of_row (R,) int64, -1 on padding; row_of_label (L,) int64; head_rows H; groups T; group_size G;
    frequency_of_row (R,) int64: training texts of the row's label, 0 on padding. ``base``: how many labels the order had before others
    were added behind them (0: none were); the head was chosen from those. ``basis``: of the tail (basis.py), where one was made.
    """

    label_of_row: np.ndarray
    row_of_label: np.ndarray
    head_rows: int
    groups: int
    group_size: int
    frequency_of_row: np.ndarray
    base: int = 0
    basis: torch.Tensor | None = None

    @property
    def labels(self) -> int:
        return len(self.row_of_label)

    @property
    def rows(self) -> int:
        return len(self.label_of_row)

    def label_at(self, rows: np.ndarray) -> np.ndarray:
        """Labels of output rows, of any shape; -1 stays -1."""
        return np.where(rows < 0, -1, self.label_of_row[np.maximum(rows, 0)])

    def neighbours(self, label: int) -> np.ndarray:
        """The other labels of a label's group; none for a label of the head."""
        row = int(self.row_of_label[label])
        if row < self.head_rows:
            return np.empty(0, np.int64)
        first = row - (row - self.head_rows) % self.group_size
        group = self.label_of_row[first : first + self.group_size]
        return group[(group >= 0) & (group != label)]

    @property
    def fingerprint(self) -> str:
        """sha256 that is equal for two orders which give every label the same row and group, in the same basis."""
        digest = hashlib.sha256(f"{self.head_rows} {self.groups} {self.group_size} ".encode())
        digest.update(np.ascontiguousarray(self.label_of_row, dtype="<i8").tobytes())
        if self.basis is not None:
            digest.update(self.basis.numpy().astype("<f4").tobytes())
        return digest.hexdigest()


def head_size(labels: int, head_fraction: float, group_size: int) -> int:
    """H: ``head_fraction`` of the labels rounded up to whole groups, at most all labels."""
    wanted = math.ceil(round(labels * head_fraction, 6))  # 0.1 * 30 is 3, not 3.0000000000000004
    return min(labels, -(-wanted // group_size) * group_size)


def order_labels(
    frequency: np.ndarray,
    embed: Callable[[], np.ndarray],
    *,
    head_fraction: float,
    group_size: int,
    method: str,
    iterations: int = 8,
    search: int = 2**20,
    seed: int = 0,
    devices: Sequence[torch.device] = (),
    earlier: np.ndarray | None = None,
    work: Path | None = None,
) -> tuple[LabelOrder, pa.RecordBatch | None]:
    """The order of L labels from their (L,) int64 training frequencies; a pure function of its arguments but ``devices`` and ``work``.

    ``embed()`` gives (L, D) float16 or float32 label embeddings of length 1; it is called only where groups of several labels are to be
    semantic. ``earlier`` (K, G): groups of labels that stay together if they are all in the tail, -1 for a label that is no more.
    ``work``: where finished parts of the grouping are kept. Returns the order and COHESION_SCHEMA's rows, None
    where nothing was embedded.
    """
    by_frequency = np.lexsort((np.arange(len(frequency)), -frequency))
    head, tail = np.split(by_frequency, [head_size(len(frequency), head_fraction, group_size)])
    head = head[spread(len(head))]
    closeness = None
    if method == "random":
        tail = np.random.default_rng([seed, RANDOM_STREAM]).permutation(tail)
    elif method == "semantic" and group_size > 1 and len(tail):
        vectors = torch.from_numpy(embed())
        devices = list(devices) or [vectors.device]
        device = devices[0]
        if device.type == "cuda" and vectors.nbytes < torch.cuda.mem_get_info(device)[0] // 3:  # else blocks go there as they are needed
            vectors = vectors.to(device)
        baseline = torch.from_numpy(np.random.default_rng([seed, BASELINE_STREAM]).permutation(tail))
        kept = np.zeros((0, group_size), np.int64)
        if earlier is not None and earlier.shape[1:] == kept.shape[1:]:
            kept = earlier[np.isin(earlier, tail).all(axis=1)]
        rows = torch.from_numpy(np.setdiff1d(tail, kept))
        order = pack(
            vectors,
            rows,
            group_size,
            search=search,
            iterations=iterations,
            seed=seed,
            devices=devices,
            kept=torch.from_numpy(kept),
            folder=work,
        )
        closeness = measure_closeness(vectors, order, baseline, group_size, device)
        tail = order.numpy()
    return _assemble(frequency, head, tail, group_size), closeness


def measure_closeness(
    vectors: torch.Tensor, order: torch.Tensor, baseline: torch.Tensor, group_size: int, device: torch.device
) -> pa.RecordBatch:
    """COHESION_SCHEMA's rows of the groups that ``order`` (labels of the tail, by row) makes; ``baseline``: the same labels at random."""
    here, after = group_cohesion(vectors, order, group_size, device)
    chance, _ = group_cohesion(vectors, baseline, group_size, device)
    columns = [np.arange(len(here)), *(part.numpy().astype(np.float32) for part in (here, chance, after))]
    return pa.record_batch([pa.array(x, f.type) for x, f in zip(columns, COHESION_SCHEMA, strict=True)], schema=COHESION_SCHEMA)


def make_label_order(
    config: Config, folder: str | Path, manifest: Manifest, known: "dict[str, LabelEmbeddings] | None" = None
) -> dict[str, Any]:
    """Writes labels.arrow and groups.json into the prepared ``folder``; returns what groups.json says, and "seconds".

    Reads label_texts.arrow, and for semantic groups the training shards that ``manifest`` lists (never a test or dev text).
    ``known``: embeddings of earlier calls, by what they depend on, where several orders of the same data are made; new ones are added.
    Raises ConfigError where the embeddings cannot be made, DataError where a file is missing, damaged or cannot be written.
    """
    from haste_dist.label_embeddings import embed_labels, remove_work  # transformers and scipy: slow to import

    began = time.perf_counter()
    folder = Path(folder)
    table = read_arrow(folder / LABEL_TEXTS, LABEL_SCHEMA)
    devices = all_devices(config.launch.device)
    settings = order_settings(config, manifest)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    work = folder / WORK / key
    remove_work(folder / WORK, but=key)
    known = {} if known is None else known
    source = json.dumps({name: value for name, value in settings.items() if name not in OF_GROUPS}, sort_keys=True)
    made: LabelEmbeddings | None = None
    embed_seconds = 0.0

    def embed() -> np.ndarray:
        nonlocal made, embed_seconds
        started = time.perf_counter()
        made = known.get(source) or embed_labels(config, folder, manifest, devices[0], work)
        known[source] = made
        embed_seconds = time.perf_counter() - started
        return made.vectors

    order, closeness = order_labels(
        table["frequency"].to_numpy(),
        embed,
        head_fraction=config.output.head_fraction,
        group_size=config.output.group_size,
        method=config.groups.method,
        iterations=config.groups.iterations,
        search=config.groups.search,
        seed=config.run.seed,
        devices=devices,
        earlier=earlier_groups(config.groups.start, table["uid"]) if config.groups.start else None,
        work=work,
    )
    (folder / VECTORS_FILE).unlink(missing_ok=True)
    if config.output.start == "centroids" or config.output.basis == "labels":
        vectors = made.vectors if made else embed()
    if config.output.start == "centroids":
        with replacing(folder / VECTORS_FILE, PREPARED) as file:
            np.save(file, vectors, allow_pickle=False)
    if config.output.basis == "labels":
        span = slice(*config.output.tail_features) if config.output.tail_features else slice(None)
        order = dataclasses.replace(order, basis=principal_basis(vectors[:, span]))
    about = {
        **settings,
        "labels_with_text": made.with_text if made else None,
        "labels_without_training_text": made.untrained if made else None,
        "labels_without_embedding": made.missing if made else None,
    }
    page = write_order(folder, order, table["text"], closeness, about)
    remove_work(folder / WORK)
    seconds = time.perf_counter() - began
    return {**page, "seconds": {"embedding": round(embed_seconds, 3), "grouping": round(seconds - embed_seconds, 3)}}


def write_order(
    folder: Path, order: LabelOrder, texts: pa.ChunkedArray, closeness: pa.RecordBatch | None, about: dict[str, Any]
) -> dict[str, Any]:
    """Writes an order into a prepared folder, groups.json last; returns what that says: ``about``, and what the order is.

    ``texts`` are the label texts in label order. Raises DataError where a file cannot be written.
    """
    row = np.arange(order.rows)
    group = np.where(row < order.head_rows, -1, (row - order.head_rows) // order.group_size)
    with replacing(folder / LABELS_FILE, PREPARED) as file, pa.ipc.new_file(file, ORDER_SCHEMA) as writer:
        for at, text in text_parts(texts, order.label_of_row):
            label, *others = (pa.array(column[at]) for column in (order.label_of_row, order.frequency_of_row, row, group))
            writer.write_batch(pa.RecordBatch.from_arrays([label, text, *others], schema=ORDER_SCHEMA))
    (folder / BASIS_FILE).unlink(missing_ok=True)
    if order.basis is not None:
        write_basis(folder, order.basis)
    (folder / COHESION_FILE).unlink(missing_ok=True)
    if closeness is not None:
        write_arrow(folder / COHESION_FILE, closeness)
    page = {
        **about,
        "labels": order.labels,
        "rows": order.rows,
        "head_rows": order.head_rows,
        "groups": order.groups,
        **({"base": order.base} if order.base else {}),
        **cohesion_report(order, closeness),
        "fingerprint": order.fingerprint,
    }
    with replacing(folder / GROUPS_FILE, PREPARED) as file:
        file.write((json.dumps(page, indent=1) + "\n").encode())
    return page


def label_order_is_current(config: Config, folder: str | Path, manifest: Manifest) -> bool:
    """Whether ``folder`` holds a whole label order made from its data with these settings, so that a rerun can keep it."""
    try:
        page = json.loads((Path(folder) / GROUPS_FILE).read_text(encoding="utf-8"))
        if not has_label_vectors(config, Path(folder)):
            return False
        page = {"dev": None, "basis_features": [], **page}  # orders that do not say are of all training texts and all features
        return page.items() >= order_settings(config, manifest).items() and load_label_order(folder).labels == manifest.labels
    except (OSError, ValueError, AttributeError, DataError):
        return False


def has_label_vectors(config: Config, folder: Path) -> bool:
    """Whether a prepared folder keeps what the start of the tail and its basis are made of, as far as the config asks for them."""
    output = config.output
    there = output.start != "centroids" or (folder / VECTORS_FILE).is_file()
    return there and (output.basis != "labels" or (folder / BASIS_FILE).is_file())


def load_label_order(prepared: str | Path) -> LabelOrder:
    """The order that ``haste prepare`` wrote. Raises DataError, in one line, where it is missing or damaged."""
    prepared = Path(prepared)
    groups_file, labels_file = prepared / GROUPS_FILE, prepared / LABELS_FILE
    try:
        page = json.loads(groups_file.read_text(encoding="utf-8"))
        if page["schema_version"] != SCHEMA_VERSION:
            raise DataError(
                f"{groups_file}: schema version {page['schema_version']}, this program reads {SCHEMA_VERSION}; run haste prepare again"
            )
        head_rows, groups, group_size, labels = (int(page[name]) for name in ("head_rows", "groups", "group_size", "labels"))
        fingerprint, base = page["fingerprint"], int(page.get("base", 0))
    except FileNotFoundError:
        raise DataError(f"{groups_file}: no such file; run haste prepare (data.prepared={prepared})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{groups_file}: damaged ({type(error).__name__}: {error}); run haste prepare again") from None
    table = read_arrow(labels_file, ORDER_SCHEMA)
    label_of_row = table["label"].to_numpy()
    rows = np.flatnonzero(label_of_row >= 0)
    if len(label_of_row) != head_rows + groups * group_size or not np.array_equal(np.sort(label_of_row[rows]), np.arange(labels)):
        raise DataError(f"{labels_file}: does not give each of the {labels} labels one row; run haste prepare again")
    row_of_label = np.empty(labels, np.int64)
    row_of_label[label_of_row[rows]] = rows
    order = LabelOrder(label_of_row, row_of_label, head_rows, groups, group_size, table["frequency"].to_numpy(), base, read_basis(prepared))
    if order.fingerprint != fingerprint:
        raise DataError(f"{labels_file}: is not the order that {GROUPS_FILE} tells of; run haste prepare again")
    return order


def copy_order(source: Path, folder: Path) -> None:
    """The files of a label order that a trained layer is read with. Raises OSError."""
    for name in (LABELS_FILE, GROUPS_FILE, BASIS_FILE):
        if name != BASIS_FILE or (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _assemble(frequency: np.ndarray, head: np.ndarray, tail: np.ndarray, group_size: int) -> LabelOrder:
    """The order with the labels ``head`` first, then the labels ``tail`` in groups, padded at the end."""
    groups = -(-len(tail) // group_size)
    padding = np.full(groups * group_size - len(tail), -1, np.int64)
    label_of_row = np.concatenate([head, tail, padding]).astype(np.int64)
    real = len(head) + len(tail)
    row_of_label = np.empty(real, np.int64)
    row_of_label[label_of_row[:real]] = np.arange(real)
    frequency_of_row = np.concatenate([frequency[label_of_row[:real]], np.zeros_like(padding)])
    return LabelOrder(label_of_row, row_of_label, len(head), groups, group_size, frequency_of_row)


def cohesion_report(order: LabelOrder, closeness: pa.RecordBatch | None) -> dict[str, float | None]:
    """Mean cosine of a tail label to its group's centroid, and the same for random groups; None where nothing was embedded."""
    if closeness is None:
        return {"cohesion": None, "cohesion_random": None}
    members = (order.label_of_row[order.head_rows :] >= 0).reshape(order.groups, -1).sum(1)
    return {
        name: round(float(np.average(closeness[column], weights=members)), 6)
        for name, column in (("cohesion", "cohesion"), ("cohesion_random", "random"))
    }


def earlier_groups(start: str | Path, uids: pa.ChunkedArray) -> np.ndarray:
    """(K, G) int64: the tail groups of the prepared folder ``start``, as labels that have the same uid in ``uids`` now, -1 for none.

    Raises DataError where ``start`` is no prepared folder, and where uids come twice.
    """
    order = load_label_order(start)
    then = read_arrow(Path(start) / LABEL_TEXTS, LABEL_SCHEMA)["uid"]
    wide = pa.large_string()  # all uids in one table may be more than a string array holds
    if pc.count_distinct(uids).as_py() < len(uids):
        raise DataError(
            "groups.start: labels have the same uid here, so groups cannot be carried over by uid; make uids distinct, or leave it out"
        )
    now = pc.index_in(then.cast(wide), value_set=uids.cast(wide)).fill_null(-1).to_numpy().astype(np.int64)
    tail = order.label_of_row[order.head_rows :]
    return np.where(tail >= 0, now[tail], -1).reshape(-1, order.group_size)


def order_settings(config: Config, manifest: Manifest) -> dict[str, Any]:
    """All that the order depends on: the data's fingerprint and the settings. groups.json begins with it; a rerun compares it."""
    groups = dataclasses.asdict(config.groups)
    for name in ("batch_size", "encoder"):
        del groups[name]
    if config.groups.start:
        groups["start"] = load_label_order(config.groups.start).fingerprint
    return {
        "schema_version": SCHEMA_VERSION,
        "prepared": manifest.fingerprint,
        "group_size": config.output.group_size,
        "head_fraction": config.output.head_fraction,
        "seed": config.run.seed,
        "dev": dev_split(config),
        **groups,
        "encoder": embedder_of(config),
        **({"basis_features": list(config.output.tail_features)} if config.output.basis == "labels" else {}),
    }
