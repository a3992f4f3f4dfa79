"""Prediction files: every input kind, every bad input with its place, and what is written; the model is a fake."""

import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from haste_dist.errors import ConfigError, DataError
from haste_dist.manifest import LABEL_SCHEMA
from haste_dist.metrics import Ragged
from haste_dist.predict import (
    Input,
    LabelNames,
    Prediction,
    check_output,
    predict_all,
    print_predictions,
    read_inputs,
    scored_file,
    write_predictions,
)

NAMES = LabelNames(pa.table({"uid": ["a", "b", None], "text": ["river", "", ""], "frequency": [3, 2, 1]}, schema=LABEL_SCHEMA))


def fake(texts: list[str], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Label 2, then 0; the third place is empty."""
    ids, logits = torch.tensor([2, 0, -1][:k]), torch.tensor([2.0, 0.0, -torch.inf][:k])
    return ids.repeat(len(texts), 1), logits.repeat(len(texts), 1)


def texts_of(path: Path, batch: int = 2) -> list[tuple[str | None, str]]:
    return [(one.uid, one.text) for part in read_inputs(path, batch) for one in part]


def test_txt(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffdünn\r\n  two words \nlast".encode())
    assert texts_of(path) == [(None, "dünn"), (None, "two words"), (None, "last")]
    assert [len(part) for part in read_inputs(path, 2)] == [2, 1]


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    lines = [
        {"text": "one"},
        {"uid": 7, "title": "a", "content": "b"},
        {"uid": "x", "title": "", "content": "c"},
        {"title": "d", "content": None},
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts_of(tmp_path / name) == [(None, "one"), ("7", "a b"), ("x", "c"), (None, "d")]


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow"])
def test_columns(tmp_path: Path, name: str) -> None:
    table = pa.table({"other": [1, 2, 3], "text": pa.array(["a", "b ", "c"], pa.large_string()), "uid": [5, 6, None]})
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name, row_group_size=2)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert texts_of(tmp_path / name) == [("5", "a"), ("6", "b"), (None, "c")]


BAD: dict[str, tuple[str, bytes, str]] = {
    "invalid UTF-8": ("in.txt", b"good\nb\xff\n", r"in\.txt:2: not valid UTF-8 at byte 2"),
    "empty line": ("in.txt", b"a\n\nb\n", r"in\.txt:2: the text is empty"),
    "empty file": ("in.txt", b"", r"in\.txt: holds no text"),
    "broken JSON": ("in.jsonl", b'{"text": "a"}\n{"text"\n', r"in\.jsonl:2: not valid JSON"),
    "deep JSON": ("in.jsonl", b"[" * 100_000, r"in\.jsonl:1: not valid JSON"),
    "no object": ("in.jsonl", b"[1]\n", r"in\.jsonl:1: not a JSON object"),
    "no text field": ("in.jsonl", b'{"body": "a"}\n', r"in\.jsonl:1: has neither 'text' nor 'title'"),
    "text is a number": ("in.jsonl", b'{"text": 3}\n', r"in\.jsonl:1: text must be text"),
    "blank text": ("in.jsonl", b'{"text": "  "}\n', r"in\.jsonl:1: the text is empty"),
    "half a surrogate": ("in.jsonl", b'{"text": "\\ud800"}\n', r"in\.jsonl:1: half of a surrogate"),
    "truncated gzip": ("in.txt.gz", gzip.compress(bytes(range(97, 123)) * 1000)[:-20], r"in\.txt\.gz: cannot be read"),
    "no gzip": ("in.txt.gz", b"plain", r"in\.txt\.gz: cannot be read"),
    "no Parquet": ("in.parquet", b"PAR1 nothing", r"in\.parquet: cannot be read"),
    "no Arrow": ("in.arrow", b"nothing", r"in\.arrow: cannot be read"),
    "unknown kind": ("in.csv", b"a,b\n", r"in\.csv: unknown kind"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_with_its_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        texts_of(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_columns(tmp_path: Path) -> None:
    def told(table: pa.Table) -> str:
        pq.write_table(table, tmp_path / "in.parquet")
        with pytest.raises(DataError) as error:
            texts_of(tmp_path / "in.parquet")
        return str(error.value)

    assert "no column 'text'; its columns are title" in told(pa.table({"title": ["a"]}))
    assert "column 'text' is int64" in told(pa.table({"text": [1]}))
    assert "row 2: the text is empty" in told(pa.table({"text": ["a", None]}))
    broken = pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff"))
    assert "row 2: not valid UTF-8" in told(pa.table({"text": broken}))
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        texts_of(tmp_path / "none.txt")


def predictions(*texts: str) -> Iterator[list[Prediction]]:
    return predict_all(fake, [[Input(text, uid=f"u{i}") for i, text in enumerate(texts)]], NAMES, 3)


def test_predictions_carry_names_and_probabilities() -> None:
    ((first,),) = predictions("water")
    assert (first.input.text, first.labels, first.label_texts) == ("water", [2, 0], ["label 2", "river"])
    assert first.scores == pytest.approx([1 / (1 + np.exp(-2.0)), 0.5])
    assert NAMES.of(np.array([1])) == ["b"], "a label without text is shown by its uid"


def test_extreme_logits_stay_finite() -> None:
    def sure(texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[0, 1]]), np.array([[1e4, -1e4]], np.float32)

    assert next(predict_all(sure, [[Input("x")]], NAMES, 2))[0].scores == [1.0, 0.0]


def test_jsonl_output(tmp_path: Path) -> None:
    assert write_predictions(predictions("dünn", "b"), tmp_path / "new" / "out.jsonl") == 2
    lines = (tmp_path / "new" / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "uid": "u0",
        "text": "dünn",
        "labels": [2, 0],
        "label_texts": ["label 2", "river"],
        "scores": [0.880797, 0.5],
    }
    assert "dünn" in lines[0]
    assert len(lines) == 2


def test_parquet_output(tmp_path: Path) -> None:
    parts = [part for text in ("a", "b", "c") for part in predictions(text)]
    assert write_predictions(parts, tmp_path / "out.parquet") == 3
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column("text").to_pylist() == ["a", "b", "c"]
    assert table.column("labels").to_pylist() == [[2, 0]] * 3
    assert table.column("label_texts").to_pylist() == [["label 2", "river"]] * 3
    assert table.column("scores")[2].as_py() == pytest.approx([0.880797, 0.5])
    assert str(table.schema.field("labels").type).startswith("list<")
    assert table.schema.field("labels").type.value_type == pa.int64()


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_failure_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")

    def failing() -> Iterator[list[Prediction]]:
        yield from predictions("a")
        raise DataError("in.txt:7: the text is empty")

    with pytest.raises(DataError, match=r"in\.txt:7"):
        write_predictions(failing(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "old"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"(?i)out\.jsonl: .*no space left on device"):
        write_predictions(predictions("a"), tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


def test_bad_outputs_are_refused_early(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    (tmp_path / "folder.jsonl").mkdir()
    for path, message in (
        (tmp_path / "out.csv", "jsonl or .parquet"),
        (tmp_path / "folder.jsonl", "is a folder"),
        (source, "also the input"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_output(path, source)
    check_output(tmp_path / "out.jsonl", source)


def test_terminal_output() -> None:
    out = io.StringIO()
    print_predictions(predictions("a [bold]text[/bold]"), Console(file=out, width=40))
    assert out.getvalue().splitlines() == ["a [bold]text[/bold]", "   1  0.881  label 2", "   2  0.500  river", ""]


def test_scored_file(tmp_path: Path) -> None:
    with scored_file(tmp_path / "p.parquet") as keep:
        call: Callable[..., None] = keep
        call(np.array([4, 2]), Ragged.of([[1, 2], []]), np.array([[5, -1], [6, 7]]), np.array([[0.5, -np.inf], [3, 2]], np.float32))
        call(np.array([9]), Ragged.of([[3]]), np.array([[1, 2]]), np.array([[2, 1]], np.float32))
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == [
        {"row": 4, "labels": [5], "scores": [0.5], "true_labels": [1, 2]},
        {"row": 2, "labels": [6, 7], "scores": [3.0, 2.0], "true_labels": []},
        {"row": 9, "labels": [1, 2], "scores": [2.0, 1.0], "true_labels": [3]},
    ]
