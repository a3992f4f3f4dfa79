"""Prediction over files: texts in, ranked labels out. The model is a function, so this room is about reading and writing.

Inputs are streamed and outputs written batch by batch, so memory does not grow with the file. A file is published by a
rename when it is complete.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text as Styled

from haste_dist.calibration import Calibration
from haste_dist.columns import take_rows
from haste_dist.errors import ConfigError, DataError
from haste_dist.label_groups import LABELS_FILE, ORDER_SCHEMA, LabelOrder
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, first_line, read_arrow, replacing
from haste_dist.metrics import Ragged

BATCH = 1024  # texts read, predicted and written at once

Predict = Callable[[list[str], int], tuple[Any, Any]]
"""(n texts, k) -> label ids and logits, (n, k) arrays or tensors: best first, -1 where there is none."""

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("text", pa.string()),
        ("labels", pa.list_(pa.int64())),
        ("label_texts", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)
"""A prediction: labels best first; scores are sigmoid probabilities; uid is null where the input has none."""

SCORED_SCHEMA = pa.schema(
    [("row", pa.int64()), ("labels", pa.list_(pa.int64())), ("scores", pa.list_(pa.float32())), ("true_labels", pa.list_(pa.int64()))]
)
"""A scored text of an evaluation: its position in the split, predictions best first with their logits, and the truth."""


@dataclass(frozen=True)
class Input:
    """One text to predict for."""

    text: str
    uid: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The ranked labels of one text."""

    input: Input
    labels: list[int]
    label_texts: list[str]
    scores: list[float]  # sigmoid probabilities


class LabelNames:
    """What to show for a label: its text, else its uid, else its number."""

    def __init__(self, table: pa.Table, place: NDArray[np.int64] | None = None) -> None:
        """``table`` with columns uid and text, row ``place[i]`` (default: row i) being label i; may be memory-mapped."""
        self._text, self._uid = table.column("text"), table.column("uid")
        self._place = place

    @classmethod
    def read(cls, prepared: str | Path) -> "LabelNames":
        """Of a prepared folder. Raises DataError."""
        return cls(read_arrow(Path(prepared) / LABEL_TEXTS, LABEL_SCHEMA))

    @classmethod
    def of_run(cls, folder: str | Path, order: LabelOrder) -> "LabelNames":
        """The label texts that a run or exported folder keeps, so that prediction needs no prepared folder. Raises DataError."""
        text = read_arrow(Path(folder) / LABELS_FILE, ORDER_SCHEMA)["text"]
        return cls(pa.table({"uid": pa.nulls(len(text), pa.string()), "text": text}), order.row_of_label)

    def of(self, labels: NDArray[np.int64]) -> list[str]:
        """Names of label ids (n,)."""
        at = labels if self._place is None else self._place[labels]
        text, uid = (take_rows(column, at).to_pylist() for column in (self._text, self._uid))
        return [a or b or f"label {i}" for a, b, i in zip(text, uid, labels.tolist(), strict=True)]

    def rows(self, labels: NDArray[np.int64]) -> list[list[str]]:
        """Names of label ids (n, K), row by row, without those of -1."""
        names = iter(self.of(labels[labels >= 0]))
        return [list(islice(names, int(count))) for count in (labels >= 0).sum(1)]


def read_inputs(path: str | Path, batch: int = BATCH) -> Iterator[list[Input]]:
    """The texts of a file, ``batch`` at a time.

    .txt: a text a line. .jsonl or .json: an object a line with ``text``, or ``title`` and perhaps ``content``, and perhaps ``uid``; both
    also with .gz behind. .parquet, .arrow, .feather: a column ``text``, perhaps ``uid``.
    Raises DataError, with file and line (for columns: row), for the first bad input; nothing is skipped.
    """
    path = Path(path)
    kind = _kind(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    inputs = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_columns, "arrow": _read_columns}[kind](path)
    empty = True
    while part := list(islice(inputs, batch)):
        empty = False
        yield part
    if empty:
        raise DataError(f"{path}: holds no text")


def check_output(output: str | Path, source: str | Path | None = None) -> None:
    """Fails early, before a model is loaded: raises ConfigError if ``output`` cannot be written or is ``source``."""
    output = Path(output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{output}: predictions are written as .jsonl or .parquet")
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder; name a file in it")
    if source is not None and output.exists() and Path(source).exists() and output.samefile(source):
        raise ConfigError(f"{output}: is also the input; choose another output file")


def predict_all(
    predict: Predict, inputs: Iterable[list[Input]], names: LabelNames, k: int, calibration: Calibration | None = None
) -> Iterator[list[Prediction]]:
    """The ``k`` best labels of each input, batch by batch; fewer where the model has fewer."""
    calibration = calibration or Calibration()
    for part in inputs:
        ids, logits = (np.asarray(x.cpu() if hasattr(x, "cpu") else x) for x in predict([one.text for one in part], k))
        ranked = zip(part, ids, names.rows(ids), calibration(logits), strict=True)
        yield [Prediction(one, labels[labels >= 0].tolist(), texts, p[labels >= 0].tolist()) for one, labels, texts, p in ranked]


def write_predictions(batches: Iterable[list[Prediction]], output: str | Path) -> int:
    """Writes .jsonl or .parquet (SCHEMA), published when complete; returns how many. Raises ConfigError or DataError."""
    output = Path(output)
    check_output(output)
    count = 0
    try:
        with replacing(output) as file:
            if output.suffix == ".jsonl":
                for part in batches:
                    file.write("".join(_json_line(one) for one in part).encode())
                    count += len(part)
            else:
                with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                    for part in batches:
                        writer.write_batch(_columns(part))
                        count += len(part)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or first_line(error)})") from None
    return count


def print_predictions(batches: Iterable[list[Prediction]], console: Console | None = None) -> None:
    """Each text, then its labels, best first, with their probability."""
    console = console or Console()
    for part in batches:
        for one in part:
            console.print(Styled(one.input.text, style="bold"))
            for rank, (label, score) in enumerate(zip(one.label_texts, one.scores, strict=True), start=1):
                line = Styled.assemble((f"  {rank:>2}  ", "dim"), (f"{score:.3f}  ", "cyan"), label)
                console.print(line, overflow="ellipsis", no_wrap=True)
            console.print()


@contextmanager
def scored_file(path: str | Path) -> Iterator[Callable[[NDArray[np.int64], Ragged, NDArray[np.int64], NDArray[np.float32]], None]]:
    """A Parquet file of SCORED_SCHEMA; gives the ``keep`` function that ``evaluate_split`` calls with each batch."""
    with replacing(Path(path)) as file, pq.ParquetWriter(file, SCORED_SCHEMA, compression="zstd") as writer:

        def keep(rows: NDArray[np.int64], true: Ragged, labels: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
            real = labels >= 0
            offsets = pa.array(np.concatenate([[0], np.cumsum(real.sum(axis=1))]), pa.int32())
            columns = [
                pa.array(rows, pa.int64()),
                pa.ListArray.from_arrays(offsets, pa.array(labels[real], pa.int64())),
                pa.ListArray.from_arrays(offsets, pa.array(scores[real], pa.float32())),
                pa.ListArray.from_arrays(pa.array(true.offsets, pa.int32()), pa.array(true.values, pa.int64())),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCORED_SCHEMA))

        yield keep


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    for suffix, kind in ((".txt", "txt"), (".jsonl", "jsonl"), (".json", "jsonl")):
        if name.endswith(suffix):
            return kind
    for suffix, kind in ((".parquet", "parquet"), (".arrow", "arrow"), (".feather", "arrow")):
        if path.name.endswith(suffix):
            return kind
    raise DataError(f"{path}: unknown kind of file; texts are read from .txt, .jsonl (both also .gz), .parquet or .arrow")


def _read_txt(path: Path) -> Iterator[Input]:
    for number, line in _lines(path):
        yield Input(_filled(line, f"{path}:{number}"))


def _read_jsonl(path: Path) -> Iterator[Input]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            page = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({first_line(error)})") from None
        if not isinstance(page, dict):
            raise DataError(f"{where}: not a JSON object with 'text' or 'title'")
        names = ["text"] if page.get("text") is not None else ["title", "content"]
        parts = [page[name] for name in names if page.get(name) is not None]
        if not parts:
            raise DataError(f"{where}: has neither 'text' nor 'title'")
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"{where}: {' and '.join(names)} must be text")
        text, uid = _filled(" ".join(parts), where), page.get("uid")  # joined as prepare joins them
        try:
            f"{text}{uid}".encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise DataError(f"{where}: half of a surrogate pair, which UTF-8 cannot hold") from None
        yield Input(text, None if uid is None else str(uid))


def _read_columns(path: Path) -> Iterator[Input]:
    row = 0
    with _readable(path):
        for batch in _record_batches(path):
            if "text" not in batch.schema.names:
                raise DataError(f"{path}: has no column 'text'; its columns are {', '.join(batch.schema.names)}")
            kind = batch.schema.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise DataError(f"{path}: column 'text' is {kind}, not string")
            uids = batch.column("uid") if "uid" in batch.schema.names else None
            for i, value in enumerate(batch.column("text")):
                row += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    raise DataError(f"{path}: row {row}: not valid UTF-8") from None
                uid = uids[i].as_py() if uids is not None else None
                yield Input(_filled(text or "", f"{path}: row {row}"), None if uid is None else str(uid))


def _record_batches(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            present = set(file.schema_arrow.names)
            yield from file.iter_batches(BATCH, columns=[name for name in ("text", "uid") if name in present] or None)
        return
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line, without its end. Raises DataError for what is not UTF-8 or not a whole file."""
    with _readable(path), _open(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not valid UTF-8 at byte {error.start + 1} of the line") from None
            yield number, line.rstrip("\r\n")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None


def _filled(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: the text is empty")
    return text.strip()


def _json_line(one: Prediction) -> str:
    page: dict[str, Any] = {"uid": one.input.uid} if one.input.uid is not None else {}
    page |= {"text": one.input.text, "labels": one.labels, "label_texts": one.label_texts, "scores": [round(s, 6) for s in one.scores]}
    return json.dumps(page, ensure_ascii=False) + "\n"


def _columns(part: list[Prediction]) -> pa.RecordBatch:
    rows = [(one.input.uid, one.input.text, one.labels, one.label_texts, one.scores) for one in part]
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)], schema=SCHEMA
    )
