"""The prepared folder's table of contents: what `haste prepare` wrote, and how to open it.

manifest.json is written last and atomically, so a folder that has one is complete. Everything that reads prepared texts goes
through ``open_split``, which maps the shards into memory and holds their row counts against the manifest.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from haste_dist.errors import DataError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LABEL_TEXTS = "label_texts.arrow"
PREPARED = "check data.prepared and its permissions"  # advice where a file of the prepared folder cannot be written

SHARD_SCHEMA = pa.schema([("uid", pa.string()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
"""A shard: token ids with the special tokens, cut to max_length; global label ids, ascending and distinct."""

LABEL_SCHEMA = pa.schema([("uid", pa.string()), ("text", pa.string()), ("frequency", pa.int64())])
"""label_texts.arrow: row i is label id i; text may be ''; frequency counts training texts."""

FILTER_SCHEMA = pa.schema([("row", pa.int64()), ("label", pa.int32())])
"""filter_<split>.arrow: (row of the split as written, label id) pairs that scoring leaves out, ascending and distinct."""


@dataclass
class Shard:
    """One Arrow IPC file of a split; ``file`` is relative to the prepared folder, ``sha256`` is of its bytes."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass
class Split:
    """Sums over a split's shards: texts, (text, label) pairs, most labels of one text, tokens, texts without any label."""

    rows: int = 0
    positives: int = 0
    max_labels: int = 0
    tokens: int = 0
    unlabelled: int = 0
    shards: list[Shard] = field(default_factory=list)


@dataclass
class TokenizerRecord:
    """Which tokenizer made the ids; ``fingerprint`` is the sha256 of the fast tokenizer's serialised JSON."""

    name: str
    fingerprint: str
    pad_id: int
    vocab_size: int


@dataclass
class Manifest:
    """What a prepared folder holds. ``source`` names format and files; ``filters`` names the splits that have one;
    ``fingerprint`` covers source, tokenizer and settings."""

    source: dict[str, Any]
    labels: int
    max_length: int
    tokenizer: TokenizerRecord
    splits: dict[str, Split]
    unseen_test_labels: int = 0
    unseen_test_positives: int = 0
    labels_without_text: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    filters: list[str] = field(default_factory=list)
    fingerprint: str = ""
    schema_version: int = SCHEMA_VERSION


def read_manifest(folder: str | Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a prepared folder. Raises DataError where there is none, or it is damaged or of another version."""
    path = Path(folder) / name
    try:
        page = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run haste prepare (data.prepared={folder})") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run haste prepare again") from None
    version = page.get("schema_version") if isinstance(page, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; run haste prepare again")
    try:
        splits = {
            name: Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]}) for name, split in page["splits"].items()
        }
        return Manifest(**{**page, "splits": splits, "tokenizer": TokenizerRecord(**page["tokenizer"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); run haste prepare again") from None


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Publishes the manifest in one step: readers see the old one or the new one, never a part."""
    with replacing(Path(folder) / MANIFEST, PREPARED) as file:
        file.write((json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=False) + "\n").encode())


def open_split(folder: str | Path, manifest: Manifest, split: str) -> pa.Table:
    """A split's texts as one memory-mapped table of SHARD_SCHEMA, a chunk a shard, in shard order.

    Raises DataError naming the shard that is missing, damaged, or whose row count is not the manifest's.
    """
    if split not in manifest.splits:
        raise DataError(f"{Path(folder) / MANIFEST}: no split '{split}'; it has {', '.join(manifest.splits)}")
    batches = []
    for shard in manifest.splits[split].shards:
        path = Path(folder) / shard.file
        batch = read_arrow(path, SHARD_SCHEMA)
        if batch.num_rows != shard.rows:
            raise DataError(f"{path}: has {batch.num_rows} rows, the manifest says {shard.rows}; run haste prepare again")
        batches.extend(batch.to_batches())
    table = pa.Table.from_batches(batches, schema=SHARD_SCHEMA)
    if table.num_rows != manifest.splits[split].rows:
        raise DataError(f"{folder}: split '{split}' has {table.num_rows} rows, the manifest says {manifest.splits[split].rows}")
    return table


def read_arrow(path: Path, schema: pa.Schema) -> pa.Table:
    """An Arrow IPC file, memory-mapped. Raises DataError if it is missing, damaged, or of another schema."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run haste prepare again") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a complete Arrow file ({first_line(error)}); run haste prepare again") from None
    if not table.schema.equals(schema):
        raise DataError(f"{path}: columns are {table.schema.names}, expected {schema.names} of the current schema; run haste prepare again")
    return table


def write_arrow(path: Path, rows: pa.RecordBatch | pa.Table) -> None:
    """A record batch, or a table's chunks as one each, as an uncompressed Arrow IPC file, published in one step; nothing half-written
    stays. Raises DataError."""
    with replacing(path, PREPARED) as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write(rows)


@contextmanager
def replacing(path: Path, advice: str = "") -> Iterator[BinaryIO]:
    """``atomic_file`` whose failures are DataErrors as ``cannot_write`` makes them."""
    try:
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        raise cannot_write(path, error, advice) from None


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place once it is wholly on disk; on any error it is removed and ``path`` stays as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def writable_folder(folder: Path, advice: str) -> None:
    """Makes a folder where there is none. One that takes no file costs one line, and no work that could not be kept. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error, advice) from None


def cannot_write(path: Path, error: OSError, advice: str = "") -> DataError:
    """What to raise where a file cannot be written; ``advice`` says what to do. A full disk is told with its free space."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(
            f"{path}: cannot be written ({error.strerror or error}); {advice or 'check its permissions or choose another place'}"
        )
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free / 2**20
    return DataError(
        f"{path}: {(error.strerror or 'no space left').lower()} while writing ({free:.1f} MiB free on that disk); "
        "free some space and run the command again, it goes on from the files that are finished"
    )


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
