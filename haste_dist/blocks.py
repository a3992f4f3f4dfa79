"""A split cut into blocks of rows, without a look inside: the one part of reading that is sequential, so it must be fast.

A block is at most ``rows`` lines of a file, or of a pair of files, or rows of a table. Where it is cut is a pure function of the
file, ``rows`` and BLOCK_BYTES; block k becomes shard k, short of its bad rows. No more than a block of a file is in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from haste_dist.errors import DataError
from haste_dist.manifest import first_line
from haste_dist.storage import PACKED, Location

READ_BYTES = 2**16  # at once; a stream that breaks off loses what is left of one read
BLOCK_BYTES = 2**25  # a block ends with the line that reaches this size, so that long texts make shorter shards
LINE_BYTES = 2**27  # no line is longer
TABLE_ROWS = 4096  # of a Parquet or Arrow file in memory at once, while they are gathered into a block


class Truncated(Exception):
    """A packed file that ends too early, or is damaged: (last good line, detail, file name)."""


@dataclass(frozen=True)
class Part:
    """What one reader reads: a file, or a text file with its label file; where its rows and shards stand in the split."""

    split: str
    format: str
    files: tuple[Location, ...]
    first_row: int = 0
    first_block: int = 0
    rows: int | None = None  # read no more than these; None: all


@dataclass
class Block:
    """Rows as they are stored. ``data`` is one or two runs of whole lines, or an Arrow stream of a table."""

    number: int  # in the split
    first_row: int  # in the split, 0-based
    first_line: int  # in the file, 1-based
    data: list[bytes | pa.Buffer]


def make_parts(split: str, format: str, files: list[Location], rows: int, limit: int) -> list[Part]:
    """A split as parts that can be read at the same time. ``limit``: rows of the split to read (0: all)."""
    if format in ("jsonl", "text"):
        return [Part(split, format, tuple(files), rows=limit or None)]
    parts, row, block = [], 0, 0
    for file in files:
        count = _table_rows(file, format)
        take = min(count, limit - row) if limit else count
        if take > 0:
            parts.append(Part(split, format, (file,), row, block, take))
        row, block = row + count, block + -(-take // rows)
    return parts


def read_blocks(part: Part, rows: int) -> Iterator[Block]:
    """The blocks of a part in order. Raises Truncated behind the last whole line where a packed file breaks off, else DataError."""
    if part.format in ("parquet", "arrow"):
        return _table_blocks(part, rows)
    return _line_blocks(part, rows)


def _line_blocks(part: Part, rows: int) -> Iterator[Block]:
    readers = [LineReader(file) for file in part.files]
    number, line, left = part.first_block, 1, part.rows or 2**62
    while left:
        broken: Truncated | None = None
        data, count = readers[0].take(min(rows, left))
        if len(readers) == 2:
            labels, other = readers[1].take(count, LINE_BYTES * rows)
            if other < count or (count == 0 and readers[1].take(1)[1]):
                broken = readers[0].broken or readers[1].broken
                if broken is None:
                    raise _uneven(part)
                data, count = _first_lines(data, other), other
        if count:
            yield Block(number, part.first_row + line - 1, line, [data] if len(readers) == 1 else [data, labels])
        number, line, left = number + 1, line + count, left - count
        broken = broken or (readers[0].broken if count == 0 else None)
        if broken is not None:
            raise broken
        if count == 0:
            return


def _uneven(part: Part) -> DataError:
    counts = [sum(1 for _ in read_lines(file)) for file in part.files]
    texts, labels = part.files
    return DataError(f"{labels}: {counts[1]} lines, but {texts.name} has {counts[0]}; every text needs one line of labels")


def _first_lines(data: bytes, lines: int) -> bytes:
    at = 0
    for _ in range(lines):
        at = data.index(b"\n", at) + 1
    return data[:at]


class LineReader:
    """Takes whole lines off a file, packed or not. ``broken`` says why the lines ended, if not at the end of the file."""

    def __init__(self, file: Location):
        self.file = file
        self.broken: Truncated | None = None
        self._stream = file.open_unpacked()
        self._held = bytearray()
        self._from = 0  # bytes taken so far, and lines
        self._lines = 0
        self._to = 0  # bytes read so far
        self._ends: list[np.ndarray] = []  # where the lines held end, in bytes from the start of the file
        self._complete = 0  # how many they are
        self._last_end = 0
        self._done = False

    def take(self, lines: int, most: int = BLOCK_BYTES) -> tuple[bytes, int]:
        """The next ``lines`` lines and their number, fewer where they come to ``most`` bytes and at the end."""
        while not self._done and self._complete < lines and (len(self._held) < most or not self._complete):
            self._fill()
        ends = np.concatenate(self._ends) if self._ends else np.zeros(0, np.int64)
        count = min(lines, len(ends), int(np.searchsorted(ends, self._from + most)) + 1)
        if count == 0:
            return b"", 0
        size = int(ends[count - 1]) - self._from
        data = bytes(memoryview(self._held)[:size])
        del self._held[:size]
        self._ends = [ends[count:]]
        self._from, self._lines, self._complete = self._from + size, self._lines + count, self._complete - count
        return data, count

    def _fill(self) -> None:
        line = self._lines + self._complete
        try:
            piece = self._stream.read(READ_BYTES)
        except OSError as error:
            packing = PACKED.get(self.file.suffix)
            if packing is None or error.errno:
                raise DataError(f"{self.file}:{line + 1}: {error.strerror or first_line(error)}; check data.source") from None
            detail = f"the {packing} file breaks off or is damaged after line {line} ({first_line(error)})"
            self.broken, self._done = Truncated(line, detail, self.file.name), True
            return
        if not piece:
            self._done = True
            piece = b"\n" if self._to > self._last_end else b""  # the last line has no end
        ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == 10) + (self._to + 1)
        self._held += piece
        self._to += len(piece)
        if len(ends):
            self._ends.append(ends)
            self._complete += len(ends)
            self._last_end = int(ends[-1])
        elif self._to - self._last_end > LINE_BYTES:
            raise DataError(f"{self.file}:{line + 1}: a line of more than {LINE_BYTES >> 20} MiB; texts are expected one a line")


def read_lines(file: Location) -> Iterator[tuple[int, bytes]]:
    """(1-based line number, bytes without the line end). Raises Truncated where a packed file breaks off."""
    reader, line = LineReader(file), 1
    while True:
        data, count = reader.take(4096)
        yield from enumerate(split_lines(data, line), line)
        line += count
        if count == 0:
            if reader.broken is not None:
                raise reader.broken
            return


def split_lines(data: bytes, first_line: int) -> list[bytes]:
    """The lines of a run of whole lines, without line ends; a byte order mark at the start of the file is left out."""
    lines = data.split(b"\n")
    lines.pop()
    if b"\r" in data:
        lines = [line.rstrip(b"\r") for line in lines]
    if first_line == 1 and lines:
        lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    return lines


def _table_blocks(part: Part, rows: int) -> Iterator[Block]:
    file, at = part.files[0], 0
    left = part.rows if part.rows is not None else 2**62
    held = pa.table({})
    for batch in read_tables(file, part.format, ["text", "labels"], rows):
        table = pa.Table.from_batches([batch])
        held = pa.concat_tables([held, table]) if held.num_rows else table
        while held.num_rows >= min(rows, left) > 0:
            count = min(rows, left)
            yield _table_block(part, rows, at, held.slice(0, count))
            held, at, left = held.slice(count), at + count, left - count
        if left == 0:
            return
    if held.num_rows:
        yield _table_block(part, rows, at, held)


def _table_block(part: Part, rows: int, at: int, table: pa.Table) -> Block:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return Block(part.first_block + at // rows, part.first_row + at, at + 1, [sink.getvalue().to_pybytes()])


def read_tables(file: Location, format: str, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of at most ``rows`` rows of a Parquet or Arrow file, with ``columns`` and uid. Raises DataError."""
    start = 0
    try:
        if format == "parquet":
            reader = pq.ParquetFile(file.open())
            names = reader.schema_arrow.names
            batches = reader.iter_batches(min(rows, TABLE_ROWS), columns=[name for name in (*columns, "uid") if name in names])
        else:
            arrow = pa.ipc.open_file(file.open())
            names = arrow.schema.names
            wanted = [name for name in (*columns, "uid") if name in names]
            whole = (arrow.get_batch(i).select(wanted) for i in range(arrow.num_record_batches))
            batches = (b.slice(at, TABLE_ROWS) for b in whole for at in range(0, b.num_rows, TABLE_ROWS))
        for name in columns:
            if name not in names:
                raise DataError(f"{file}: no column '{name}'; it has {', '.join(names)}")
        for batch in batches:
            yield batch
            start += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise _not_whole(file, format, start, error) from None


def _table_rows(file: Location, format: str) -> int:
    """Rows that the file says it has. Raises DataError."""
    try:
        if format == "parquet":
            return int(pq.ParquetFile(file.open()).metadata.num_rows)
        arrow = pa.ipc.open_file(file.open())
        return sum(arrow.get_batch(i).num_rows for i in range(arrow.num_record_batches))
    except (OSError, pa.ArrowException) as error:
        raise _not_whole(file, format, 0, error) from None


def _not_whole(file: Location, format: str, row: int, error: Exception) -> DataError:
    return DataError(f"{file}: not a whole {format} file, after row {row} ({first_line(error)}); get a whole copy of the file")
