"""The rows of a block: parsed and checked one by one, each a ``Row`` or the ``Problem`` that it is."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from haste_dist import row_checks as checks
from haste_dist.blocks import Block, Part, split_lines
from haste_dist.errors import DataError
from haste_dist.row_checks import BadValue


class Row(NamedTuple):
    """One checked text: its number in the split (0-based), its uid, and its labels, ascending and distinct."""

    number: int
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


def parse_block(part: Part, block: Block, labels: int | None) -> Iterator[Row | Problem]:
    """The rows of a block in order, each checked on its own; label ids must be below ``labels`` (None: below 2^31 - 1)."""
    if part.format == "jsonl":
        return _parse_json(part, block, labels)
    if part.format == "text":
        return _parse_pair(part, block, labels)
    return _parse_table(part, block, labels)


def _parse_json(part: Part, block: Block, labels: int | None) -> Iterator[Row | Problem]:
    for i, raw in enumerate(split_lines(bytes(block.data[0]), block.first_line)):
        try:
            page = checks.json_object(raw)
            title = checks.text(checks.required(page, "title"), "title")
            content = checks.text(page.get("content") or "", "content")
            text = checks.filled(f"{title} {content}".strip())
            uid = checks.uid(checks.required(page, "uid"))
            row = Row(block.first_row + i, uid, text, checks.label_ids(checks.required(page, "target_ind"), labels))
        except BadValue as error:
            yield Problem(part.files[0].name, block.first_line + i, error.reason, error.detail, block.first_row + i)
        else:
            yield row


def _parse_pair(part: Part, block: Block, labels: int | None) -> Iterator[Row | Problem]:
    texts, label_lines = (split_lines(bytes(data), block.first_line) for data in block.data)
    for i, (text_line, label_line) in enumerate(zip(texts, label_lines, strict=True)):
        number = block.first_row + i
        file = part.files[0]
        try:
            text = checks.filled(checks.utf8(text_line).strip())
            file = part.files[1]
            row = Row(number, str(number), text, checks.label_ids(checks.label_words(checks.utf8(label_line)), labels))
        except BadValue as error:
            yield Problem(file.name, block.first_line + i, error.reason, error.detail, number)
        else:
            yield row


def _parse_table(part: Part, block: Block, labels: int | None) -> Iterator[Row | Problem]:
    with pa.ipc.open_stream(block.data[0]) as reader:
        table = reader.read_all()
    for i, cells in enumerate(table_cells(table, ["uid", "text", "labels"])):
        number = block.first_row + i
        try:
            uid = checks.uid(cell(cells, "uid")) if "uid" in cells else str(number)
            text = checks.filled(checks.text(cell(cells, "text"), "text").strip())
            row = Row(number, uid, text, checks.label_ids(cell(cells, "labels"), labels))
        except BadValue as error:
            yield Problem(part.files[0].name, block.first_line + i, error.reason, error.detail, number)
        else:
            yield row


def table_cells(table: pa.Table | pa.RecordBatch, names: list[str]) -> Iterator[dict[str, Any]]:
    """Each row's values by column; a value that is no UTF-8 stands there as a BadValue."""
    columns = {name: _values(table.column(name), name) for name in names if name in table.schema.names}
    for i in range(table.num_rows):
        yield {name: values[i] for name, values in columns.items()}


def cell(row: dict[str, Any], name: str) -> Any:
    """A value of a row. Raises BadValue where it is missing or no UTF-8."""
    value = row[name]
    if isinstance(value, BadValue):
        raise value
    if value is None:
        raise BadValue("missing field", f"no value in column '{name}'")
    return value


def _values(column: pa.Array | pa.ChunkedArray, name: str) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # find out which
        values: list[Any] = []
        for item in column:
            try:
                values.append(item.as_py())
            except UnicodeDecodeError as error:
                values.append(BadValue("invalid UTF-8", f"column '{name}' is not valid UTF-8 at byte {error.start + 1}"))
        return values
