"""Every layout gives the same rows; every kind of bad input is named by file and line."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from raw_sources import json_lines, label_lines, make_texts, write_lines, write_source, write_table

from haste_dist import row_checks
from haste_dist.blocks import Truncated, make_parts, read_blocks
from haste_dist.config import DataConfig
from haste_dist.errors import ConfigError, DataError
from haste_dist.rows import Problem, Row
from haste_dist.shards import good_rows
from haste_dist.sources import Source, count_labels, find_source, read_filter, read_labels
from haste_dist.storage import Location

LAYOUTS = ("jsonl", "jsonl.gz", "text", "text.gz", "parquet", "arrow")
TRAIN, TEST = make_texts(30, 12), make_texts(8, 12, "s")


def found(folder: Path, **settings: object) -> Source:
    return find_source(DataConfig(source=str(folder), **settings))  # type: ignore[arg-type]


def read_split(source: Source, split: str, rows: int = 1000, limit: int = 0, stop: bool = True) -> tuple[list[list[Row]], list[Problem]]:
    """A split as blocks of rows, and all problems in the order in which they were met."""
    labels = count_labels(source, stop)
    blocks, problems = [], []
    for part in make_parts(split, source.format, source.splits[split], rows, limit):
        try:
            for block in read_blocks(part, rows):
                good, bad = good_rows(part, block, labels)
                blocks.append(good)
                problems += bad
        except Truncated as error:
            problems.append(Problem(error.args[2], error.args[0] + 1, "truncated file", error.args[1]))
    if stop and problems:
        raise problems[0].error()
    return blocks, problems


def chunks(folder: Path, rows: int = 1000, limit: int = 0, stop: bool = True) -> tuple[list[list[Row]], list[Problem]]:
    return read_split(found(folder), "train", rows, limit, stop)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(tmp_path: Path, layout: str) -> None:
    source = found(write_source(tmp_path, layout, TRAIN, TEST, 12))
    assert source.format == layout.partition(".")[0]
    assert count_labels(source, stop=True) == 12
    assert [item[1] for item in read_labels(source) if not isinstance(item, Problem)] == [f"label {i}" for i in range(12)]
    for split, texts in (("train", TRAIN), ("test", TEST)):
        rows = [row for block in read_split(source, split)[0] for row in block]
        assert [(row.text, row.labels) for row in rows] == [(text, labels) for _, text, labels in texts]
        assert [row.number for row in rows] == list(range(len(texts)))
        assert [row.uid for row in rows] == (
            [str(i) for i in range(len(texts))] if source.format == "text" else [uid for uid, _, _ in texts]
        )


def test_title_and_content_are_joined_and_labels_sorted(tmp_path: Path) -> None:
    line = {"uid": 7, "title": "a river", "content": "at night", "target_ind": [5, 2, 5], "target_rel": [1.0, 1.0, 1.0]}
    write_source(tmp_path, "jsonl", TRAIN, TEST, 12)
    write_lines(tmp_path / "trn.json", [b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\r"])
    assert chunks(tmp_path)[0] == [[Row(0, "7", "a river at night", [2, 5])]]


def test_several_parquet_files_are_one_split(tmp_path: Path) -> None:
    write_source(tmp_path, "parquet", TRAIN, TEST, None)
    (tmp_path / "train.parquet").unlink()
    for number, part in enumerate((TRAIN[:11], TRAIN[11:])):
        write_table(tmp_path / f"train-{number:05d}.parquet", {"text": [t[1] for t in part], "labels": [t[2] for t in part]})
    blocks = chunks(tmp_path, rows=7)[0]
    assert [len(block) for block in blocks] == [7, 4, 7, 7, 5]  # a block is of one file
    rows = [row for block in blocks for row in block]
    assert [row.text for row in rows] == [text for _, text, _ in TRAIN]
    assert [row.uid for row in rows] == [str(i) for i in range(30)]
    assert [row.number for row in rows] == list(range(30))
    numbers = [b.number for part in make_parts("train", "parquet", found(tmp_path).splits["train"], 7, 0) for b in read_blocks(part, 7)]
    assert numbers == [0, 1, 2, 3, 4]
    assert sum(len(block) for block in chunks(tmp_path, rows=7, limit=13)[0]) == 13


def bad_json(**changes: object) -> bytes:
    return json.dumps({"uid": "x", "title": "red", "content": "", "target_ind": [1], **changes}).encode()


BAD_LINES = [
    ("label out of range", bad_json(target_ind=[3, 12]), "label 12 is out of range (the label file has 12 labels)"),
    ("label out of range", bad_json(target_ind=[-1]), "label -1 is out of range"),
    ("label not an integer", bad_json(target_ind=[1.0]), "label 1.0 is not an integer"),
    ("label not an integer", bad_json(target_ind=[True]), "label true is not an integer"),
    ("label not an integer", bad_json(target_ind="3"), "the labels are str, not a list"),
    ("invalid UTF-8", b'{"uid": "x", "title": "caf\xe9"}', "not valid UTF-8 at byte 27 of the line"),
    ("invalid UTF-8", b'{"uid": "x", "title": "\\ud800", "target_ind": [1]}', "'title' holds half of a surrogate pair"),
    ("invalid JSON", bad_json()[:-1], "not valid JSON (Expecting ',' delimiter"),
    ("invalid JSON", b"[" * 100_000, "not valid JSON"),
    ("invalid JSON", b"7", "not a JSON object"),
    ("invalid JSON", b"", "not valid JSON"),
    ("missing field", b'{"uid": "x", "title": "red"}', "no field 'target_ind'"),
    ("missing field", b'{"title": "red", "target_ind": [1]}', "no field 'uid'"),
    ("wrong type", bad_json(title=["red"]), "'title' is list, not text"),
    ("empty text", bad_json(title=" ", content="\t"), "the text is empty"),
    ("duplicate uid", bad_json(uid="t2"), "uid 't2' stands on an earlier line already"),
]


@pytest.mark.parametrize(("reason", "line", "detail"), BAD_LINES)
def test_a_bad_json_line_stops_or_is_quarantined(tmp_path: Path, reason: str, line: bytes, detail: str) -> None:
    write_source(tmp_path, "jsonl.gz", TRAIN, TEST, 12)
    lines = json_lines(TRAIN)
    write_lines(tmp_path / "trn.json.gz", [*lines[:20], line, *lines[20:]])
    with pytest.raises(DataError) as error:
        chunks(tmp_path)
    assert str(error.value).startswith(f"trn.json.gz:21: {detail}")
    assert str(error.value).endswith("; fix the line or set data.on_error=quarantine")
    assert "\n" not in str(error.value)
    rows, problems = chunks(tmp_path, stop=False)
    assert [row.uid for row in rows[0]] == [uid for uid, _, _ in TRAIN]
    assert [(p.file, p.line, p.reason, p.number) for p in problems] == [("trn.json.gz", 21, reason, 20)]


def test_the_first_bad_line_is_the_one_that_stops(tmp_path: Path) -> None:
    write_source(tmp_path, "jsonl", TRAIN, TEST, 12)
    lines = json_lines(TRAIN)
    write_lines(tmp_path / "trn.json", [*lines[:10], lines[4], b"{", *lines[10:]])
    with pytest.raises(DataError, match=r"trn.json:11: uid 't4' stands on an earlier line"):
        chunks(tmp_path)


@pytest.mark.parametrize(
    ("file", "line", "detail"),
    [
        ("train_raw_texts.txt", b"caf\xe9", "not valid UTF-8 at byte 4 of the line"),
        ("train_raw_texts.txt", b"  ", "the text is empty"),
        ("train_labels.txt", b"3 x", "label 'x' is not an integer"),
        ("train_labels.txt", b"3:y", "label '3:y' is not 'id' or 'id:value'"),
        ("train_labels.txt", b"1_0", "label '1_0' is not an integer"),
        ("train_labels.txt", b"-3", "label -3 is out of range"),
        ("train_labels.txt", b"3 40", "label 40 is out of range (the label file has 12 labels)"),
    ],
)
def test_a_bad_text_or_label_line(tmp_path: Path, file: str, line: bytes, detail: str) -> None:
    write_source(tmp_path, "text", TRAIN, TEST, 12)
    lines = (tmp_path / file).read_bytes().splitlines()
    lines[4] = line
    write_lines(tmp_path / file, lines)
    with pytest.raises(DataError) as error:
        chunks(tmp_path)
    assert str(error.value).startswith(f"{file}:5: {detail}")
    rows, problems = chunks(tmp_path, stop=False)
    assert [row.number for row in rows[0]] == [i for i in range(30) if i != 4]
    assert [(p.file, p.line) for p in problems] == [(file, 5)]


def test_label_words() -> None:
    assert row_checks.label_words("3 17") == row_checks.label_words("3,17") == row_checks.label_words("3:1.0, 17:0.5 4:0") == [3, 17]
    assert row_checks.label_words("") == []


@pytest.mark.parametrize("stop", [True, False])
def test_texts_and_label_lines_that_differ_in_number(tmp_path: Path, stop: bool) -> None:
    write_source(tmp_path, "text", TRAIN, TEST, 12)
    write_lines(tmp_path / "train_labels.txt", [b"1"] * 28)
    with pytest.raises(DataError, match=r"train_labels.txt: 28 lines, but train_raw_texts.txt has 30; every text needs one line"):
        chunks(tmp_path, stop=stop)


def test_a_bad_cell_of_a_table(tmp_path: Path) -> None:
    write_source(tmp_path, "arrow", TRAIN, TEST, 12)
    broken = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 3, 7, 11], np.int32)), pa.py_buffer(b"redcaf\xe9blue"))
    write_table(tmp_path / "train.arrow", {"text": broken, "labels": [[1], [2], None]})
    with pytest.raises(DataError, match=r"train.arrow:2: column 'text' is not valid UTF-8 at byte 4"):
        chunks(tmp_path)
    rows, problems = chunks(tmp_path, stop=False)
    assert [row.text for row in rows[0]] == ["red"]
    assert [(p.line, p.reason) for p in problems] == [(2, "invalid UTF-8"), (3, "missing field")]


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_table_without_the_columns_or_cut_off(tmp_path: Path, format: str) -> None:
    write_source(tmp_path, format, TRAIN, TEST, None)
    path = write_table(tmp_path / f"train.{format}", {"text": ["red"]})
    with pytest.raises(DataError, match=f"train.{format}: no column 'labels'; it has text"):
        chunks(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"train.{format}: not a whole {format} file, after row 0 \(.*\); get a whole copy"):
        chunks(tmp_path)


@pytest.mark.parametrize("layout", ["jsonl.gz", "text.gz"])
def test_a_gzip_file_that_breaks_off(tmp_path: Path, layout: str) -> None:
    many = make_texts(20_000, 12)
    write_source(tmp_path, layout, many, TEST, 12)
    name = "trn.json.gz" if layout == "jsonl.gz" else "train_raw_texts.txt.gz"
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"^{name}:\d+: the gzip file breaks off or is damaged after line \d+"):
        chunks(tmp_path)
    rows, problems = chunks(tmp_path, rows=10**6, stop=False)
    assert 1000 < len(rows[0]) < 20_000
    assert [row.text for row in rows[0]] == [text for _, text, _ in many[: len(rows[0])]]
    assert [(p.reason, p.line, p.number) for p in problems] == [("truncated file", len(rows[0]) + 1, -1)]


def test_a_label_file_that_breaks_off_is_never_passed_over(tmp_path: Path) -> None:
    write_source(tmp_path, "jsonl.gz", TRAIN, TEST, 2000)
    path = tmp_path / "lbl.json.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"lbl.json.gz:\d+: the gzip file breaks off"):
        count_labels(found(tmp_path), stop=False)


def test_a_bad_label_line_stops_or_stays_without_text(tmp_path: Path) -> None:
    write_source(tmp_path, "jsonl", TRAIN, TEST, 12)
    write_lines(tmp_path / "lbl.json", [*label_lines(5), b"{", *label_lines(6)])
    source = found(tmp_path)
    with pytest.raises(DataError, match=r"lbl.json:6: not valid JSON .*quarantine"):
        count_labels(source, stop=True)
    assert count_labels(source, stop=False) == 12
    assert [isinstance(item, Problem) for item in read_labels(source)] == [i == 5 for i in range(12)]


def test_without_a_label_file_any_id_goes(tmp_path: Path) -> None:
    source = found(write_source(tmp_path, "jsonl", TRAIN, TEST, None))
    assert count_labels(source, stop=True) is None
    write_lines(tmp_path / "trn.json", [bad_json(target_ind=[2**31 - 2])])
    assert chunks(tmp_path)[0][0][0].labels == [2**31 - 2]
    write_lines(tmp_path / "trn.json", [bad_json(target_ind=[2**31 - 1])])
    with pytest.raises(DataError, match="ids run from 0 to 2147483646"):
        chunks(tmp_path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.source is empty"):
        find_source(DataConfig())
    with pytest.raises(DataError, match=r"nowhere: no such folder; set data.source"):
        found(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no training texts; expected trn.json"):
        found(tmp_path)
    write_source(tmp_path, "text", TRAIN, TEST, None)
    with pytest.raises(DataError, match=r"trn.json: no such file, which data.format=jsonl needs; add it$"):
        found(tmp_path, format="jsonl")
    (tmp_path / "test_labels.txt").unlink()
    with pytest.raises(DataError, match=r"test_labels.txt: no such file, .*, or set data.dev_fraction"):
        found(tmp_path, dev_fraction=0.1)  # half of a pair is an accident
    (tmp_path / "test_raw_texts.txt").unlink()
    with pytest.raises(DataError, match=r"test_raw_texts.txt: no such file, .*, or set data.dev_fraction"):
        found(tmp_path)
    assert list(found(tmp_path, dev_fraction=0.1).splits) == ["train"]
    (tmp_path / "train_labels.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"train_labels.txt: the file is empty"):
        found(tmp_path, dev_fraction=0.1)


def test_filter_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "filter_labels_test.txt.gz", [b"0 1", b"7 11", b"8 1", b"1 12", b"1", b"a 1"])
    items = list(read_filter(Location(str(path)), 8, 12))
    assert [item for item in items if not isinstance(item, Problem)] == [(0, 1), (7, 11)]
    assert [item.line for item in items if isinstance(item, Problem)] == [3, 4, 5, 6]
    path.write_bytes(gzip.compress(b"0 1\n" * 9000)[:-12])
    assert isinstance(list(read_filter(Location(str(path)), 8, 12))[-1], Problem)


def test_source_lists_each_of_its_files_once(tmp_path: Path) -> None:
    write_source(tmp_path, "text", TRAIN, TEST, 12)
    write_lines(tmp_path / "filter_labels_test.txt", [b"0 1"])
    source = found(tmp_path)
    assert [file.name for file in source.files()] == [
        "filter_labels_test.txt",
        "label_raw_texts.txt",
        "test_labels.txt",
        "test_raw_texts.txt",
        "train_labels.txt",
        "train_raw_texts.txt",
    ]
    assert dataclasses.asdict(source)["format"] == "text"
