"""Columns of any size: what is read of their chunks, label texts of more than 2 GiB, an order whose texts are in several batches."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_prepared

from haste_dist import columns, dev_data, extension, predict_folder
from haste_dist.columns import take_rows, text_parts
from haste_dist.errors import DataError
from haste_dist.inspection import groups_page
from haste_dist.label_groups import LABELS_FILE, ORDER_SCHEMA, LabelOrder, load_label_order, write_order
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, read_arrow, write_arrow
from haste_dist.predict import LabelNames
from haste_dist.sealed import seal_data
from haste_dist.use_config import PredictConfig
from haste_dist.verify import verify

ROWS = 33 * 64
FAR = np.array([ROWS - 1, 0, 1000])


@pytest.fixture(scope="module")
def texts() -> pa.ChunkedArray:
    """2.1 GiB of texts, a MiB each, all chunks in the same memory; the first of a chunk tells itself from the others."""
    chunk = pa.array(["y" * 2**20] + ["x" * 2**20] * 63)
    return pa.chunked_array([chunk] * 33)


@given(
    sizes=st.lists(st.integers(0, 4), max_size=6),
    chosen=st.lists(st.integers(-1, 30), max_size=12),
    kind=st.sampled_from([pa.string(), pa.int64(), pa.list_(pa.int32())]),
)
@pytest.mark.parametrize("at_once", [3, 2**24])
def test_rows_of_any_chunks(at_once: int, sizes: list[int], chosen: list[int], kind: pa.DataType) -> None:
    values = [{pa.string(): f"t{i}" * (i % 3), pa.int64(): i}.get(kind, [i] * (i % 3)) for i in range(sum(sizes))]
    ends = np.cumsum([0, *sizes])
    column = pa.chunked_array([pa.array(values[a:b], kind) for a, b in itertools.pairwise(ends)], kind)
    rows = np.array([row for row in chosen if row < len(values)], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "ROWS_AT_ONCE", at_once)
        taken = take_rows(column, rows)
    assert taken.type == kind
    assert taken.to_pylist() == [None if row < 0 else values[row] for row in rows]


def test_parts_are_cut_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "PART_BYTES", 10)
    column = pa.chunked_array([["abcd", "", "efgh"], ["x" * 25, "ij"]])
    parts = list(text_parts(column, np.array([2, 0, 1, 4, -1, 3, 3, 1, 0])))
    assert [text.to_pylist() for _, text in parts] == [["efgh", "abcd", ""], ["ij", ""], ["x" * 25], ["x" * 25, "", "abcd"]]
    assert [(at.start, at.stop) for at, _ in parts] == [(0, 3), (3, 5), (5, 6), (6, 9)]


def few_labels() -> LabelOrder:
    """Three labels that stand in rows of the head; as labels they are rows of ``texts`` far from each other."""
    return LabelOrder(FAR, FAR, 3, 0, 16, np.zeros(3, np.int64))


def test_an_order_is_written_of_more_text_than_an_array_holds(texts: pa.ChunkedArray, tmp_path: Path) -> None:
    assert texts.nbytes > 2**31
    write_order(tmp_path, few_labels(), texts, None, {})
    assert [text[0] for text in read_arrow(tmp_path / LABELS_FILE, ORDER_SCHEMA)["text"].to_pylist()] == ["x", "y", "x"]


def test_old_labels_are_compared_of_more_text_than_an_array_holds(texts: pa.ChunkedArray, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"text": texts})
    monkeypatch.setattr(extension, "read_arrow", lambda *_: table)
    rows = np.array([64, 1, ROWS - 1])
    old = LabelOrder(np.arange(3), rows, 0, 1, 16, np.zeros(3, np.int64))
    extension._check_labels(Path("run"), old, Path("grown"), table)
    old.row_of_label[2] = 128
    with pytest.raises(DataError, match=r"its label 2 is 'x.*', that of run is 'y.*'; old labels must come first"):
        extension._check_labels(Path("run"), old, Path("grown"), table)


def test_labels_are_named_of_more_text_than_an_array_holds(texts: pa.ChunkedArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = LabelNames(pa.table({"uid": texts, "text": texts}))
    assert [name[0] for name in names.of(FAR)] == ["x", "y", "x"]
    table = pa.table({"label": np.arange(ROWS), "text": texts})
    monkeypatch.setattr(predict_folder, "read_arrow", lambda *_: table)
    part = pa.table({"text": [["a"]], "uid": [["u"]], "rows": [[*FAR.tolist(), -1]], "logits": [[3.0, 2.0, 1.0, -np.inf]]})
    job = SimpleNamespace(run="", settings=PredictConfig(), k=4, calibration=lambda logits: logits)
    predict_folder._write_part(tmp_path / "out.parquet", 0, part, job)  # type: ignore[arg-type]
    (line,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (line["labels"], [text[0] for text in line["label_texts"]]) == (FAR.tolist(), ["x", "y", "x"])


def test_an_order_in_several_batches_reads_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["groups.method=semantic"]
    one = Path(make_prepared(tmp_path / "one", overrides=overrides).data.prepared)
    monkeypatch.setattr(columns, "PART_BYTES", 50)
    many = Path(make_prepared(tmp_path / "many", overrides=overrides).data.prepared)
    batches = [pa.ipc.open_file(str(folder / LABELS_FILE)).num_record_batches for folder in (one, many)]
    assert batches[0] == 1
    assert batches[1] > 5
    assert read_arrow(one / LABELS_FILE, ORDER_SCHEMA).equals(read_arrow(many / LABELS_FILE, ORDER_SCHEMA))
    orders = [load_label_order(folder) for folder in (one, many)]
    assert orders[0].fingerprint == orders[1].fingerprint
    labels = np.arange(101)
    named = [LabelNames.of_run(folder, order).of(labels) for folder, order in zip((one, many), orders, strict=True)]
    assert named[0] == named[1] == LabelNames.read(one).of(labels)
    assert groups_page(one).lines[1:] == groups_page(many).lines[1:]
    seal_data(many)
    verify(many)


def test_label_texts_of_held_out_data_stay_in_batches(tmp_path: Path) -> None:
    rows = pa.table({"uid": list("abcde"), "text": list("vwxyz"), "frequency": range(5)}, schema=LABEL_SCHEMA)
    (tmp_path / "source").mkdir()
    write_arrow(tmp_path / "source" / LABEL_TEXTS, pa.concat_tables([rows[:2], rows[2:]]))
    dev_data._write_labels(tmp_path / "source", tmp_path / "held", np.arange(5) * 2)
    made = read_arrow(tmp_path / "held" / LABEL_TEXTS, LABEL_SCHEMA)
    assert [column.num_chunks for column in made.columns] == [2, 2, 2]
    assert made.to_pydict() == {**rows.to_pydict(), "frequency": [0, 2, 4, 6, 8]}
