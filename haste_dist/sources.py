"""Where texts and labels come from: four layouts of a source folder, on this machine or in an object store.

    jsonl           trn.json  tst.json  [lbl.json]: a line holds uid, title, content, target_ind
    text            train_raw_texts.txt + train_labels.txt, test_*, [label_raw_texts.txt | Y.txt]: a line a text, a line of label ids
    parquet, arrow  train.parquet | train-*.parquet, test, [labels]: columns text, labels, [uid]
    any of them     [filter_labels_train.txt, filter_labels_test.txt]: a line is "row label"

Names of files of lines may end in .gz or .zst. Here files are found, and labels and filters read; texts are cut into blocks by
``blocks`` and parsed by ``rows``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from haste_dist import row_checks as checks
from haste_dist.blocks import TABLE_ROWS, Truncated, read_lines, read_tables
from haste_dist.config import DataConfig
from haste_dist.errors import ConfigError, DataError
from haste_dist.row_checks import MAX_LABELS, BadValue
from haste_dist.rows import Problem, cell, table_cells
from haste_dist.storage import PACKED, Location, whole_address

SPLITS = ("train", "test")


@dataclass
class Source:
    """The files of a source folder. ``splits`` and ``labels`` hold a list of files each; text layouts pair (texts, labels)."""

    folder: Location
    format: str
    splits: dict[str, list[Location]]
    labels: list[Location]
    filters: dict[str, Location] = field(default_factory=dict)

    def files(self) -> list[Location]:
        return sorted({*self.labels, *self.filters.values(), *(file for files in self.splits.values() for file in files)})


def find_source(config: DataConfig) -> Source:
    """The files that ``config.source`` holds, by ``config.format`` or by their names. Raises ConfigError or DataError."""
    if not config.source:
        raise ConfigError("data.source is empty; set it to the folder with the raw texts and labels")
    folder = whole_address(config.source)  # workers may run elsewhere
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
    filters = {split: file for split in splits for file in _lines_file(folder, f"filter_labels_{split}.txt")}
    source = Source(folder, format, splits, labels, filters)
    for file in source.files():
        if file.size() == 0 and file not in filters.values():
            raise DataError(f"{file}: the file is empty; put the data there or remove it from data.source")
    return source


def detect_format(folder: Location) -> str | None:
    """The layout whose training texts lie in ``folder``, or None."""
    return next((format for format in ("jsonl", "text", "parquet", "arrow") if any(_split_files(folder, format, "train").values())), None)


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
            batches = read_tables(file, source.format, ["text"], TABLE_ROWS)
            for line, row in enumerate((row for batch in batches for row in table_cells(batch, ["uid", "text"])), 1):
                try:
                    yield checks.uid(row.get("uid", line - 1)), checks.text(cell(row, "text"), "text")
                except BadValue as error:
                    yield Problem(file.name, line, error.reason, error.detail)
        return
    try:
        for line, raw in read_lines(source.labels[0]):
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


def read_filter(path: Location, rows: int | None, labels: int) -> Iterator[tuple[int, int] | Problem]:
    """The (row of the source, label) pairs of a filter file; rows must be below ``rows`` (None: any), labels below ``labels``."""
    try:
        for line, raw in read_lines(path):
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


def _split_files(folder: Location, format: str, split: str) -> dict[str, list[Location]]:
    """The files of a split by the name that each should have; a missing one has none."""
    if format in ("parquet", "arrow"):
        return {f"{split}.{format}": _columnar(folder, split, format)}
    if format == "jsonl":
        return {name: _lines_file(folder, name) for name in ["trn.json" if split == "train" else "tst.json"]}
    return {name: _lines_file(folder, name) for name in (f"{split}_raw_texts.txt", f"{split}_labels.txt")}


def _label_files(folder: Location, format: str) -> list[Location]:
    if format in ("parquet", "arrow"):
        return _columnar(folder, "labels", format)
    if format == "jsonl":
        return _lines_file(folder, "lbl.json")
    return _lines_file(folder, "label_raw_texts.txt") or _lines_file(folder, "Y.txt")


def _lines_file(folder: Location, name: str) -> list[Location]:
    places = (folder / f"{name}{end}" for end in ("", *PACKED))
    return [place for place in places if place.is_file()][:1]


def _columnar(folder: Location, stem: str, format: str) -> list[Location]:
    whole = folder / f"{stem}.{format}"
    if whole.is_file():
        return [whole]
    return [file for file in folder.files() if file.name.startswith(f"{stem}-") and file.suffix == f".{format}"]
