"""`haste predict` into a folder: many texts through Ray Data, in parts that a later start keeps.

    reader tasks (a file each) -> tokens (all CPUs) -> rankers (a GPU each, or more that share the labels) -> writers (all CPUs)

OUT/
  _predictions.json        what was asked for: model, inputs, settings; and how many texts there are, once all is done
  part-00000-00002.parquet rows 2 * predict.rows and on of the first input, in order: uid, text, labels, label_texts, scores

A part is written in one step. The next start with the same settings reads the inputs again but predicts the missing parts only.
"""

import json
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from haste_dist import predict
from haste_dist.calibration import Calibration
from haste_dist.columns import take_rows
from haste_dist.config import encoder_settings_of
from haste_dist.errors import ConfigError, DataError, HasteError
from haste_dist.evaluate import Filters
from haste_dist.label_groups import LABELS_FILE, ORDER_SCHEMA
from haste_dist.live_model import LabelPart, merged
from haste_dist.manifest import read_arrow, replacing
from haste_dist.pipeline import quiet, unwrap
from haste_dist.predictor import ModelFiles
from haste_dist.rows import Problem
from haste_dist.sources import read_filter
from haste_dist.storage import whole_address
from haste_dist.tokens import tokenise
from haste_dist.use_config import PredictConfig

PAGE = "_predictions.json"  # readers of Parquet pass over names that begin so
OLD_PAGE = "predictions.json"  # what it was called before
SUFFIXES = (".parquet", ".arrow", ".feather", ".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz")
TEXTS = [("file", pa.int64()), ("part", pa.int64()), ("uid", pa.list_(pa.string())), ("text", pa.list_(pa.large_string()))]
ERROR = ("error", pa.string())  # one line that ends the run, or empty
READ = pa.schema([*TEXTS, ERROR])
TOKENISED = pa.schema([*TEXTS, ("tokens", pa.list_(pa.list_(pa.int32()))), ERROR])
RANKED = pa.schema([*TEXTS, ("rows", pa.list_(pa.int64())), ("logits", pa.list_(pa.float32())), ERROR])
"""What travels: a part a row. rows and logits are (n, k) flat: rows of the output layer, -1 for none."""


@dataclass(frozen=True)
class Job:
    """What every task must know. Paths are absolute; all nodes can read them."""

    run: str
    version: str
    inputs: tuple[str, ...]
    out: str
    k: int
    rules: str  # of the tokenizer
    calibration: Calibration
    settings: PredictConfig

    def part(self, file: int, part: int) -> Path:
        return Path(self.out) / f"part-{file:05d}-{part:05d}.parquet"


def find_inputs(source: str | Path) -> list[Path]:
    """A file, or the files of a folder that texts are read from, by name. Raises DataError."""
    source = Path(source)
    if not source.is_dir():
        if not source.is_file():
            raise DataError(f"{source}: no such file or folder")
        return [source]
    found = sorted(path for path in source.iterdir() if path.is_file() and path.name.endswith(SUFFIXES) and path.name[0] not in "._")
    if not found:
        raise DataError(f"{source}: no texts in it; they are read from {', '.join(SUFFIXES)}")
    return found


def plan(files: ModelFiles, source: str | Path, out: str | Path, k: int, settings: PredictConfig) -> Job:
    """Makes ``out``, or finds it made for the same question. Raises ConfigError or DataError."""
    from haste_dist.encoder import load_tokenizer
    from haste_dist.tokens import tokenizer_rules

    inputs, out = find_inputs(source), Path(out)
    if settings.filter and len(inputs) > 1:
        raise ConfigError("predict.filter: its lines count the texts of one file; give that file as --input")
    tokenizer = load_tokenizer(encoder_settings_of(files.config, files.folder))
    rules = tokenizer_rules(tokenizer.backend_tokenizer, files.config.data.max_length, str(tokenizer.truncation_side))
    job = Job(
        run=str(files.folder.resolve()),
        version=files.version,
        inputs=tuple(str(path.resolve()) for path in inputs),
        out=str(out.resolve()),
        k=k,
        rules=rules,
        calibration=files.calibration if settings.calibrated else Calibration(),
        settings=settings,
    )
    about = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in inputs]
    asked = {"model": files.version, "labels": files.order.fingerprint, "inputs": about, "k": k, "calibration": asdict(job.calibration)}
    asked |= {name: getattr(settings, name) for name in ("rows", "label_texts", "filter")}
    page = out / PAGE
    try:
        there = page if page.exists() else out / OLD_PAGE
        if there.exists():
            known = json.loads(there.read_text(encoding="utf-8"))
            different = [name for name, value in asked.items() if known.get(name) != value]
            if different:
                raise ConfigError(f"{out}: holds predictions of another question ({', '.join(different)} differ); name another folder")
            if there != page:
                there.rename(page)
            return job
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out}: is not empty and holds no {PAGE}; name a folder that does not exist")
    except (OSError, ValueError) as error:
        raise DataError(f"{page}: cannot be read ({error}); delete the folder") from None
    _write_page(page, asked)
    return job


def predict_folder(job: Job, rankers: int, on_gpu: bool, threads: int) -> Generator[int, None, None]:
    """Runs until every part is there, yielding the texts of each new part as it is written. Ray must be running. Raises HasteError."""
    import ray.data
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # an item is a whole part already: never join two into one
    each: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    with DataContext.current(context), quiet():
        inputs = ray.data.from_items([{"file": i} for i in range(len(job.inputs))])
        parts = inputs.map_batches(partial(read_task, job=job), num_cpus=0, **each)
        tokens = parts.map_batches(partial(tokens_task, job=job), num_cpus=1, **each)
        resources: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 0}
        about = {"job": replace(job, rules=""), "device": "cuda" if on_gpu else "cpu", "threads": threads}
        pool = ray.data.ActorPoolStrategy(size=rankers)
        ranked = tokens.map_batches(Ranker, fn_constructor_kwargs=about, compute=pool, **resources, **each)
        written = ranked.map_batches(partial(write_task, job=job), num_cpus=1, **each)
        texts = 0
        try:
            for batch in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for record in pa.table(batch).to_pylist():
                    if record["error"]:
                        raise DataError(record["error"])
                    texts += record["texts"]
                    if record["fresh"]:
                        yield record["texts"]
        except Exception as error:
            raise unwrap(error, "predict", "predict.rows or predict.batch_size") from None
    page = Path(job.out) / PAGE
    _write_page(page, {**json.loads(page.read_text(encoding="utf-8")), "texts": texts})


def read_task(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    """The parts of a file; one that is written already comes without its texts."""
    for number in batch["file"].to_pylist():
        row = {"file": number, "part": -1, "uid": None, "text": [], "error": ""}
        try:
            for part, inputs in enumerate(predict.read_inputs(job.inputs[number], job.settings.rows)):
                row["part"] = part
                if job.part(number, part).exists():
                    yield _table({**row, "text": None}, READ)
                else:
                    yield _table({**row, "uid": [one.uid for one in inputs], "text": [one.text for one in inputs]}, READ)
        except HasteError as error:
            yield _table({**row, "part": -1, "text": None, "error": str(error)}, READ)


def tokens_task(batch: pa.Table, job: Job) -> pa.Table:
    """Adds the token ids of each text."""

    def add(row: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": tokenise(row["text"], job.rules)}

    return _each(batch, add, TOKENISED)


class Ranker:
    """A GPU with the encoder and the first share of the labels, and, where they are shared, a GPU for each other share."""

    def __init__(self, job: Job, device: str, threads: int):
        torch.set_num_threads(threads)
        files = ModelFiles(job.run, job.version)
        parts = job.settings.parts
        self.job, self.version, self.embedder = job, files.version, files.embedder(device)
        self.labels = files.labels(device, 0, parts)
        self.most = _filters(job.settings.filter, files.order.labels).most if job.settings.filter else 0
        self.others: list[Any] = []
        if parts > 1:
            import ray

            remote = ray.remote(num_gpus=1 if device == "cuda" else 0, num_cpus=0)(LabelPart)
            self.others = [remote.remote(job.run, part, parts, device) for part in range(1, parts)]
            ray.get([other.hold.remote([self.version]) for other in self.others])

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _each(batch, self._rank, RANKED)

    @torch.no_grad()
    def _rank(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        size, k = self.job.settings.batch_size, self.job.k + self.most
        x_ND = self.embedder.embed(row["tokens"], size)
        asked = []
        if self.others:
            sent = ray.put(x_ND.float().cpu().numpy())
            asked = [other.topk.remote(self.version, sent, k) for other in self.others]
        found = [self.labels.topk(x, k) for x in x_ND.split(size)]  # the host waits for none of them
        mine = (torch.cat([s for s, _ in found]).float().cpu().numpy(), torch.cat([r for _, r in found]).cpu().numpy())
        logits, rows = merged([mine, *ray.get(asked)], k) if asked else mine
        return {"rows": rows.ravel(), "logits": logits.ravel()}


def write_task(batch: pa.Table, job: Job) -> pa.Table:
    """Writes each part, and tells how many texts it has and whether it was written now."""
    told = []
    for i in range(batch.num_rows):
        row = {name: batch[name][i].as_py() for name in ("file", "part", "error")}
        about = {"texts": 0, "fresh": False, "error": row["error"]}
        path = job.part(row["file"], row["part"])
        if not row["error"] and row["part"] >= 0:
            try:
                if batch["text"][i].is_valid:
                    _write_part(path, row["part"] * job.settings.rows, batch.slice(i, 1), job)
                    about["fresh"] = True
                about["texts"] = pq.read_metadata(path).num_rows
            except HasteError as error:
                about["error"] = str(error)
            except (OSError, pa.ArrowException) as error:
                about["error"] = f"{path}: cannot be read ({error}); delete it and start again"
        told.append(about)
    return pa.Table.from_pylist(told, pa.schema([("texts", pa.int64()), ("fresh", pa.bool_()), ERROR]))


def _write_part(path: Path, first: int, part: pa.Table, job: Job) -> None:
    """``part``: a row of RANKED; ``first``: the place of its first text in its file."""
    texts, uids = part["text"][0].values, part["uid"][0].values
    rows, logits = (part[name][0].values.to_numpy(zero_copy_only=False).reshape(len(texts), -1) for name in ("rows", "logits"))
    names = read_arrow(Path(job.run) / LABELS_FILE, ORDER_SCHEMA)
    if job.settings.filter:
        labels = np.where(rows < 0, -1, names["label"].to_numpy()[np.maximum(rows, 0)])
        filters = _filters(job.settings.filter, int(names["label"].to_numpy().max()) + 1)
        kept, logits = filters.apply(np.arange(first, first + len(texts)), labels, logits)
        row_of = dict(zip(labels.ravel().tolist(), rows.ravel().tolist(), strict=True))
        rows = np.array([[row_of[label] if label >= 0 else -1 for label in line] for line in kept[:, : job.k].tolist()], np.int64)
        rows, logits = rows.reshape(len(texts), -1), logits[:, : job.k]
    real = rows >= 0
    label, text = (take_rows(names[name], rows[real]) for name in ("label", "text"))
    ends = pa.array(np.concatenate([[0], np.cumsum(real.sum(1))]), pa.int32())
    columns = {
        "uid": uids,
        "text": texts.cast(pa.string()),
        "labels": pa.ListArray.from_arrays(ends, label),
        "label_texts": pa.ListArray.from_arrays(ends, _named(text, label)),
        "scores": pa.ListArray.from_arrays(ends, pa.array(job.calibration(logits[real]), pa.float32())),
    }
    if not job.settings.label_texts:
        del columns["label_texts"]
    with replacing(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")


def _named(text: pa.Array, label: pa.Array) -> pa.Array:
    """Names of labels; one without a text is shown by its number."""
    import pyarrow.compute as pc

    number = pc.binary_join_element_wise("label", label.cast(pa.string()), " ")
    return pc.if_else(pc.equal(pc.fill_null(text, ""), ""), number, text)


@lru_cache(maxsize=1)
def _filters(path: str, labels: int) -> Filters:
    """The pairs of a filter file. Raises DataError for a bad line."""
    pairs = []
    for item in read_filter(whole_address(path), None, labels):
        if isinstance(item, Problem):
            raise item.error()
        pairs.append(item)
    row, label = np.array(pairs, np.int64).reshape(-1, 2).T
    return Filters(row, label)


def _each(batch: pa.Table, make: Any, schema: pa.Schema) -> pa.Table:
    """``make`` on each row that has texts; what it returns joins the row. A HasteError becomes the row's error."""
    made = []
    for i in range(batch.num_rows):
        row: dict[str, Any] = {name: batch[name][i] for name in batch.column_names}
        found: dict[str, Any] = {}
        if row["text"].is_valid:
            try:
                given = {"text": row["text"].values.to_pylist()} if "tokens" not in row else {"tokens": row["tokens"].values}
                found = make(given)
            except HasteError as error:
                found = {"error": str(error)}
        made.append(_table({name: found.get(name, row.get(name)) for name in schema.names}, schema))
    return pa.concat_tables(made)


def _table(values: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """One row. A value is a Python one, an Arrow scalar, or an array that becomes a list."""
    columns = []
    for field in schema:
        value = values[field.name]
        if isinstance(value, pa.Array | np.ndarray):
            array = pa.array(value) if isinstance(value, np.ndarray) else value
            columns.append(pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), array).cast(field.type))
        else:
            columns.append(pa.array([value.as_py() if isinstance(value, pa.Scalar) else value], field.type))
    return pa.table(columns, schema=schema)


def _write_page(page: Path, values: dict[str, Any]) -> None:
    with replacing(page) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())
