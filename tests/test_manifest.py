"""The manifest comes back as it was written, and a prepared folder that does not fit it is refused by name."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from haste_dist.errors import DataError
from haste_dist.manifest import (
    SHARD_SCHEMA,
    Manifest,
    Shard,
    Split,
    TokenizerRecord,
    file_sha256,
    open_split,
    read_arrow,
    read_manifest,
    replacing,
    write_arrow,
    write_manifest,
)


def batch(start: int, rows: int) -> pa.RecordBatch:
    numbers = range(start, start + rows)
    columns = [[f"t{i}" for i in numbers], [[1] * (1 + i % 3) for i in numbers], [[i] if i % 2 else [] for i in numbers]]
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, SHARD_SCHEMA, strict=True)], schema=SHARD_SCHEMA)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    shards = []
    for number, rows in enumerate((5, 3)):
        file = f"train/{number:05d}.arrow"
        write_arrow(tmp_path / file, batch(5 * number, rows))
        shards.append(Shard(file, rows, (tmp_path / file).stat().st_size, file_sha256(tmp_path / file)))
    tokenizer = TokenizerRecord("some/name", "f" * 64, 0, 30522)
    splits = {"train": Split(8, 4, 1, 15, 4, shards)}
    write_manifest(
        tmp_path, Manifest({"format": "jsonl", "files": []}, 9, 32, tokenizer, splits, 1, 2, 3, {"empty text": 2}, ["train"], "p")
    )
    return tmp_path


def test_a_manifest_comes_back_as_it_was(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    assert manifest.splits["train"].shards[1].rows == 3
    assert manifest.tokenizer.vocab_size == 30522
    assert manifest.quarantined == {"empty text": 2}
    before = (prepared / "manifest.json").read_bytes()
    write_manifest(prepared, manifest)
    assert (prepared / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in prepared.iterdir()) == ["manifest.json", "train"]


def test_a_split_opens_as_one_table_in_shard_order(prepared: Path) -> None:
    table = open_split(prepared, read_manifest(prepared), "train")
    assert table.schema == SHARD_SCHEMA
    assert table["uid"].to_pylist() == [f"t{i}" for i in range(8)]
    assert table["labels"].num_chunks == 2
    assert pa.total_allocated_bytes() < 10**6  # mapped, not read


def test_a_folder_without_a_manifest_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json: no such file; run haste prepare"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: "[]", "schema version None, this program reads 1"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema version 2, this program reads 1"),
        (lambda text: text.replace('"sha256"', '"md5"'), "damaged"),
        (lambda text: text.replace('"splits"', '"parts"'), "damaged"),
        (lambda text: text.replace('"pad_id"', '"pad"'), "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(prepared: Path, change: object, message: str) -> None:
    path = prepared / "manifest.json"
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as error:
        read_manifest(prepared)
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith("run haste prepare again")


def test_shards_that_do_not_fit_the_manifest_are_named(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    shard = prepared / "train/00001.arrow"
    with pytest.raises(DataError, match=r"no split 'test'; it has train"):
        open_split(prepared, manifest, "test")
    write_arrow(shard, batch(5, 2))
    with pytest.raises(DataError, match=r"train/00001.arrow: has 2 rows, the manifest says 3"):
        open_split(prepared, manifest, "train")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train/00001.arrow: not a complete Arrow file"):
        open_split(prepared, manifest, "train")
    write_arrow(shard, batch(5, 3).select(["uid", "labels"]))
    with pytest.raises(DataError, match=r"train/00001.arrow: columns are \['uid', 'labels'\], expected"):
        open_split(prepared, manifest, "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"train/00001.arrow: no such file"):
        open_split(prepared, manifest, "train")


def test_a_repeated_shard_is_no_split(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    manifest.splits["train"].shards *= 2
    with pytest.raises(DataError, match=r"split 'train' has 16 rows, the manifest says 8"):
        open_split(prepared, manifest, "train")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def overwrite() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overwrite()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "no space left on device"), (errno.EDQUOT, "disk quota exceeded")])
def test_a_full_disk_is_one_line_with_the_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    def fsync(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "train" / "00000.arrow"
    with pytest.raises(DataError, match=rf"{path}: {message} while writing \([0-9.]+ MiB free on that disk\); free some space"):
        write_arrow(path, batch(0, 5))
    assert list(path.parent.iterdir()) == []


def test_a_file_that_may_not_grow_is_not_left_half_written(tmp_path: Path) -> None:
    """A real failure of write(2), inside the Arrow writer: the process may not make files over 4 KiB."""
    program = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from haste_dist.manifest import write_arrow, read_arrow
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for name, rows in (("small", 10), ("large", 100_000)):
    write_arrow(Path(sys.argv[1]) / name, pa.record_batch([pa.array(range(rows))], ["n"]))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"DataError: {tmp_path}/large: file too large while writing" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert read_arrow(tmp_path / "small", pa.schema([("n", pa.int64())])).num_rows == 10


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(DataError, match=r"file: cannot be written \(Is a directory\); check data.prepared"):
        write_arrow(tmp_path / "file", batch(0, 1))
    other = pytest.raises(DataError, match=r"file: cannot be written \(Is a directory\); check its permissions or choose")
    with other, replacing(tmp_path / "file"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_manifest_is_plain_json_with_its_documented_names(prepared: Path) -> None:
    page = json.loads((prepared / "manifest.json").read_text())
    assert page["schema_version"] == 1
    assert {"source", "labels", "max_length", "tokenizer", "splits", "unseen_test_labels", "quarantined"} <= set(page)
    assert set(page["splits"]["train"]["shards"][0]) == {"file", "rows", "bytes", "sha256"}
