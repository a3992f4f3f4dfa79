"""Values of Arrow columns of any size. A string column's offsets are 32 bits, and Arrow's own ``take`` joins all chunks of a column first,
which fails from 2 GiB of text on: a hundred million labels of 22 bytes. Here every chunk is read where it lies.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PART_BYTES = 2**30  # of text in one array
ROWS_AT_ONCE = 2**24  # whose places are held


def take_rows(column: pa.ChunkedArray, rows: np.ndarray) -> pa.Array:
    """The values of ``rows`` (n,), in that order; null for -1. They must fit one array."""
    if column.num_chunks == 1:
        return column.chunk(0).take(pa.array(rows, mask=rows < 0))
    starts = np.cumsum([0, *map(len, column.chunks)])
    parts = [_take(column, starts, rows[at : at + ROWS_AT_ONCE]) for at in range(0, len(rows), ROWS_AT_ONCE)]
    return parts[0] if len(parts) == 1 else pa.concat_arrays([pa.nulls(0, column.type), *parts])


def text_parts(texts: pa.ChunkedArray, rows: np.ndarray) -> Iterator[tuple[slice, pa.Array]]:
    """The texts of ``rows`` (n,), "" for -1, in parts of about PART_BYTES; each with the places in ``rows`` that it covers."""
    part = np.cumsum(np.where(rows < 0, 0, pc.binary_length(texts).to_numpy()[rows]), dtype=np.int64)
    part //= PART_BYTES
    cuts = [0, *(np.flatnonzero(part[1:] != part[:-1]) + 1).tolist(), len(rows)]
    del part
    for start, stop in itertools.pairwise(cuts):
        yield slice(start, stop), take_rows(texts, rows[start:stop]).fill_null("")


def _take(column: pa.ChunkedArray, starts: np.ndarray, rows: np.ndarray) -> pa.Array:
    chunk = np.searchsorted(starts, rows, side="right") - 1
    order = np.argsort(chunk, kind="stable")
    used, first = np.unique(chunk[order], return_index=True)
    found = []
    for number, here in zip(used, np.split(order, first[1:]), strict=True):
        found.append(column.chunk(number).take(pa.array(rows[here] - starts[number])) if number >= 0 else pa.nulls(len(here), column.type))
    place = np.empty(len(rows), np.int64)
    place[order] = np.arange(len(rows))
    return pa.concat_arrays(found).take(pa.array(place))
