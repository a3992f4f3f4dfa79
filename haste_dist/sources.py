"""Where texts and labels come from: four layouts of a source folder, read as a stream of checked rows.

    jsonl           trn.json[.gz]  tst.json[.gz]  [lbl.json[.gz]]: a line holds uid, title, content, target_ind
    text            train_raw_texts.txt + train_labels.txt, test_*, [label_raw_texts.txt | Y.txt]: a line a text, a line of label ids
    parquet, arrow  train.parquet | train-*.parquet, test, [labels]: columns text, labels, [uid]
    any of them     [filter_labels_train.txt, filter_labels_test.txt]: a line is "row label"

Every layout comes out as ``Row`` or ``Problem`` items in file order; a file is never held in memory as a whole. A file is
opened in ``open_binary`` alone, so another kind of storage has one place to go.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from haste_dist import row_checks as checks
from haste_dist.config import DataConfig
from haste_dist.errors import ConfigError, DataError
from haste_dist.row_checks import MAX_LABELS, BadValue

COLUMNAR_BATCH = 4096  # rows of a Parquet or Arrow file in memory at once
SPLITS = ("train", "test")
UTF8_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One checked text: its number in the split (0-based), its place, and its labels, ascending and distinct."""

    number: int
    file: str
    line: int
    uid: str
    text: str
    labels: list[int]


class Problem(NamedTuple):
    """One piece of bad input. ``reason`` is one of a few fixed words to count by; ``number`` is the row it cost, or -1."""

    file: str
    line: int
    reason: str
    detail: str
    number: int = -1

    def error(self) -> DataError:
        return DataError(f"{self.file}:{self.line}: {self.detail}; fix the line or set data.on_error=quarantine")


class Truncated(Exception):
    """A compressed file that ends too early, or is damaged: (last good line, detail, path)."""


@dataclass
class Source:
    """The files of a source folder. ``splits`` and ``labels`` hold a list of files each; text layouts pair (texts, labels)."""

    folder: Path
    format: str
    splits: dict[str, list[Path]]
    labels: list[Path]
    filters: dict[str, Path] = field(default_factory=dict)

    def files(self) -> list[Path]:
        return sorted({*self.labels, *self.filters.values(), *(file for files in self.splits.values() for file in files)})


def find_source(config: DataConfig) -> Source:
    """The files that ``config.source`` holds, by ``config.format`` or by their names. Raises ConfigError or DataError."""
    if not config.source:
        raise ConfigError("data.source is empty; set it to the folder with the raw texts and labels")
    folder = Path(config.source).absolute()  # workers may run elsewhere
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set data.source to the folder with the raw texts and labels")
    format = config.format if config.format != "auto" else detect_format(folder)
    if format is None:
        raise DataError(f"{folder}: no training texts; expected trn.json[.gz], train_raw_texts.txt[.gz], train.parquet or train.arrow")
    splits = {}
    for split in SPLITS:
        found = _split_files(folder, format, split)
        if split == "test" and not any(found.values()) and config.dev_fraction > 0:
            continue  # evaluation will use held-out training texts
        if missing := [name for name, files in found.items() if not files]:
            hint = ", or set data.dev_fraction to evaluate on held-out training texts" if split == "test" else ""
            raise DataError(f"{folder / missing[0]}: no such file, which data.format={format} needs; add it{hint}")
        splits[split] = [file for files in found.values() for file in files]
    labels = _label_files(folder, format)
    filters = {split: file for split in splits for file in _plain_or_gz(folder, f"filter_labels_{split}.txt")}
    source = Source(folder, format, splits, labels, filters)
    for file in source.files():
        if file.stat().st_size == 0 and file not in filters.values():
            raise DataError(f"{file}: the file is empty; put the data there or remove it from data.source")
    return source


def detect_format(folder: Path) -> str | None:
    """The layout whose training texts lie in ``folder``, or None."""
    return next((format for format in ("jsonl", "text", "parquet", "arrow") if any(_split_files(folder, format, "train").values())), None)


def read_rows(source: Source, split: str, labels: int | None) -> Iterator[Row | Problem]:
    """The rows of a split in file order, each checked on its own; label ids must be below ``labels`` (None: below 2^31).

    Raises DataError for what is not one line's fault: unreadable files, columns or line counts that do not fit.
    """
    files = source.splits[split]
    if source.format == "jsonl":
        return _read_jsonl(files[0], labels)
    if source.format == "text":
        return _read_pair(files[0], files[1], labels)
    return _read_columns(files, source.format, labels)


def count_labels(source: Source, stop: bool) -> int | None:
    """How many labels the label file names, or None where there is none. With ``stop`` its first bad line is raised."""
    if not source.labels:
        return None
    count = 0
    for item in read_labels(source):
        count += 1
        if stop and isinstance(item, Problem):
            raise item.error()
    if not 0 < count <= MAX_LABELS:
        raise DataError(f"{source.labels[0]}: names {count} labels; between 1 and {MAX_LABELS} are possible")
    return count


def read_labels(source: Source) -> Iterator[tuple[str, str] | Problem]:
    """(uid, text) of each label id in turn. A bad line is a Problem that stands for its label id: it has no text then."""
    if source.format in ("parquet", "arrow"):
        for file in source.labels:
            for batch, start in _columnar_batches(file, source.format, ["text"]):
                for line, row in _cells(batch, start, ["uid", "text"]):
                    try:
                        yield checks.uid(row.get("uid", line - 1)), checks.text(_cell(row, "text"), "text")
                    except BadValue as error:
                        yield Problem(file.name, line, error.reason, error.detail)
        return
    try:
        for line, raw in _lines(source.labels[0]):
            try:
                if source.format == "jsonl":
                    page = checks.json_object(raw)
                    yield checks.uid(page.get("uid", line - 1)), checks.text(checks.required(page, "title"), "title")
                else:
                    yield str(line - 1), checks.utf8(raw).strip()
            except BadValue as error:
                yield Problem(source.labels[0].name, line, error.reason, error.detail)
    except Truncated as error:  # never left out: the labels behind it would be unknown
        raise DataError(f"{source.labels[0].name}:{error.args[0] + 1}: {error.args[1]}; get a whole copy of the file") from None


def read_filter(path: Path, rows: int | None, labels: int) -> Iterator[tuple[int, int] | Problem]:
    """The (row of the source, label) pairs of a filter file; rows must be below ``rows`` (None: any), labels below ``labels``."""
    try:
        for line, raw in _lines(path):
            try:
                words = checks.utf8(raw).split()
                if len(words) != 2:
                    raise BadValue("filter line", f"expected 'row label', found {len(words)} words")
                row = checks.integer(words[0], "row")
                if row < 0 or (rows is not None and row >= rows):
                    raise BadValue("filter line", f"row {row} is out of range (the split has {rows} rows)")
                yield row, checks.label_ids([checks.integer(words[1], "label")], labels)[0]
            except BadValue as error:
                yield Problem(path.name, line, error.reason, error.detail)
    except Truncated as error:
        yield Problem(path.name, error.args[0] + 1, "truncated file", error.args[1])


def open_binary(path: Path) -> BinaryIO:
    """A file's bytes, unpacked if its name ends in .gz. Raises DataError."""
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check data.source") from None


def _read_jsonl(path: Path, labels: int | None) -> Iterator[Row | Problem]:
    line = 0
    try:
        for line, raw in _lines(path):
            try:
                page = checks.json_object(raw)
                title = checks.text(checks.required(page, "title"), "title")
                content = checks.text(page.get("content") or "", "content")
                text = checks.filled(f"{title} {content}".strip())
                uid = checks.uid(checks.required(page, "uid"))
                row = Row(line - 1, path.name, line, uid, text, checks.label_ids(checks.required(page, "target_ind"), labels))
            except BadValue as error:
                yield Problem(path.name, line, error.reason, error.detail, line - 1)
            else:
                yield row
    except Truncated as error:
        yield Problem(path.name, error.args[0] + 1, "truncated file", error.args[1])


def _read_pair(text_file: Path, label_file: Path, labels: int | None) -> Iterator[Row | Problem]:
    counts = {text_file: 0, label_file: 0}
    try:
        for text_line, label_line in zip_longest(_lines(text_file), _lines(label_file)):
            counts[text_file] += text_line is not None
            counts[label_file] += label_line is not None
            if text_line is None or label_line is None:
                continue  # only the counts matter now: no row can be trusted to stand beside its own labels
            line, file = text_line[0], text_file
            try:
                text = checks.filled(checks.utf8(text_line[1]).strip())
                file = label_file
                ids = checks.label_ids(checks.label_words(checks.utf8(label_line[1])), labels)
                row = Row(line - 1, text_file.name, line, str(line - 1), text, ids)
            except BadValue as error:
                yield Problem(file.name, line, error.reason, error.detail, line - 1)
            else:
                yield row
    except Truncated as error:
        file = text_file if error.args[2] == text_file else label_file
        yield Problem(file.name, error.args[0] + 1, "truncated file", error.args[1])
        return
    if counts[text_file] != counts[label_file]:
        raise DataError(
            f"{label_file}: {counts[label_file]} lines, but {text_file.name} has {counts[text_file]}; every text needs one line of labels"
        )


def _read_columns(files: list[Path], format: str, labels: int | None) -> Iterator[Row | Problem]:
    index = -1
    for file in files:
        for batch, start in _columnar_batches(file, format, ["text", "labels"]):
            for line, cells in _cells(batch, start, ["uid", "text", "labels"]):
                index += 1
                try:
                    uid = checks.uid(_cell(cells, "uid")) if "uid" in cells else str(index)
                    text = checks.filled(checks.text(_cell(cells, "text"), "text").strip())
                    row = Row(index, file.name, line, uid, text, checks.label_ids(_cell(cells, "labels"), labels))
                except BadValue as error:
                    yield Problem(file.name, line, error.reason, error.detail, index)
                else:
                    yield row


def _columnar_batches(path: Path, format: str, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches of a Parquet or Arrow file with ``columns`` and uid, and the number of rows before each."""
    start = 0
    try:
        if format == "parquet":
            reader = pq.ParquetFile(path)
            names = reader.schema_arrow.names
            batches = reader.iter_batches(COLUMNAR_BATCH, columns=[name for name in (*columns, "uid") if name in names])
        else:
            arrow = pa.ipc.open_file(pa.memory_map(str(path)))
            names = arrow.schema.names
            whole = (arrow.get_batch(i) for i in range(arrow.num_record_batches))
            batches = (b.slice(at, COLUMNAR_BATCH) for b in whole for at in range(0, b.num_rows, COLUMNAR_BATCH))
        for name in columns:
            if name not in names:
                raise DataError(f"{path}: no column '{name}'; it has {', '.join(names)}")
        for batch in batches:
            yield batch, start
            start += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a whole {format} file, after row {start} ({detail}); get a whole copy of the file") from None


def _cells(batch: pa.RecordBatch, start: int, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based row number, values by column) of a batch; a value that is no UTF-8 stands there as a BadValue."""
    columns = {name: _values(batch.column(name), name) for name in names if name in batch.schema.names}
    for i in range(batch.num_rows):
        yield start + i + 1, {name: values[i] for name, values in columns.items()}


def _values(column: pa.Array, name: str) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # find out which
        values: list[Any] = []
        for item in column:
            try:
                values.append(item.as_py())
            except UnicodeDecodeError as error:
                values.append(BadValue("invalid UTF-8", f"column '{name}' is not valid UTF-8 at byte {error.start + 1}"))
        return values


def _cell(row: dict[str, Any], name: str) -> Any:
    value = row[name]
    if isinstance(value, BadValue):
        raise value
    if value is None:
        raise BadValue("missing field", f"no value in column '{name}'")
    return value


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based line number, bytes without the line end). Raises Truncated where a compressed file breaks off."""
    line = 0
    with open_binary(path) as file:
        try:
            for line, raw in enumerate(file, 1):
                yield line, (raw.removeprefix(UTF8_BOM) if line == 1 else raw).rstrip(b"\r\n")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Truncated(line, f"the gzip file breaks off or is damaged after line {line} ({error})", path) from None
        except OSError as error:
            raise DataError(f"{path}:{line + 1}: {error.strerror or error}; check data.source") from None


def _split_files(folder: Path, format: str, split: str) -> dict[str, list[Path]]:
    """The files of a split by the name that each should have; a missing one has none."""
    if format in ("parquet", "arrow"):
        return {f"{split}.{format}": _columnar(folder, split, format)}
    if format == "jsonl":
        return {name: _plain_or_gz(folder, name) for name in ["trn.json" if split == "train" else "tst.json"]}
    return {name: _plain_or_gz(folder, name) for name in (f"{split}_raw_texts.txt", f"{split}_labels.txt")}


def _label_files(folder: Path, format: str) -> list[Path]:
    if format in ("parquet", "arrow"):
        return _columnar(folder, "labels", format)
    if format == "jsonl":
        return _plain_or_gz(folder, "lbl.json")
    return _plain_or_gz(folder, "label_raw_texts.txt") or _plain_or_gz(folder, "Y.txt")


def _plain_or_gz(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()][:1]


def _columnar(folder: Path, stem: str, format: str) -> list[Path]:
    whole = folder / f"{stem}.{format}"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*.{format}"))
