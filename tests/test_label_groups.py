"""Label order: a partition of the labels into rows and groups, pure in seed and data, that finds groups which are there."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_prepared

from haste_dist import label_embeddings, packing
from haste_dist.config import Config
from haste_dist.errors import DataError
from haste_dist.label_groups import (
    GROUPS_FILE,
    LABELS_FILE,
    ORDER_SCHEMA,
    WORK,
    earlier_groups,
    head_size,
    label_order_is_current,
    load_label_order,
    make_label_order,
    order_labels,
)
from haste_dist.manifest import read_arrow, read_manifest

OVERRIDES = ["groups.method=semantic", "run.seed=3"]


def unit_vectors(n: int, width: int = 12, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.integers(1, 300),
    group_size=st.sampled_from([1, 16, 32, 64, 128]),
    head_fraction=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99, 1.0]),
    method=st.sampled_from(["semantic", "random", "frequency"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_label_has_one_row(labels: int, group_size: int, head_fraction: float, method: str, seed: int) -> None:
    frequency = np.random.default_rng(seed).integers(0, 9, labels)
    order, closeness = order_labels(
        frequency, lambda: unit_vectors(labels), head_fraction=head_fraction, group_size=group_size, method=method, seed=seed, iterations=2
    )
    head = order.head_rows
    assert order.rows == head + order.groups * group_size == len(order.frequency_of_row)
    assert order.labels == labels
    real = order.label_of_row >= 0
    assert np.array_equal(np.sort(order.label_of_row[real]), np.arange(labels))
    assert np.array_equal(order.label_of_row[order.row_of_label], np.arange(labels))
    assert np.array_equal(order.frequency_of_row[real], frequency[order.label_of_row[real]])
    assert order.frequency_of_row[~real].sum() == 0
    assert real.argmin() == labels or real.all()  # padding stands at the end ...
    assert order.rows - labels < group_size  # ... and in the last group only
    assert head >= head_fraction * labels - 1e-6
    assert head == labels or head % group_size == 0
    assert head - group_size < head_fraction * labels
    rank = list(zip(-frequency, range(labels), strict=True))
    assert sorted(rank[i] for i in order.label_of_row[:head]) == sorted(rank)[:head]  # the most frequent, ties by label id
    assert (closeness is not None) == (method == "semantic" and group_size > 1 and head < labels)


def test_head_size_of_decimal_fractions() -> None:
    assert head_size(30, 0.1, 1) == 3  # 30 * 0.1 is a little over 3 in binary
    assert head_size(1000, 0.07, 1) == 70
    assert head_size(10, 0.01, 1) == 1
    assert head_size(100, 0.1, 16) == 16


def test_frequency_order_and_random_order() -> None:
    frequency = np.array([1, 5, 5, 0, 9, 2])
    order, _ = order_labels(frequency, unit_vectors, head_fraction=0.0, group_size=1, method="frequency")  # type: ignore[arg-type]
    assert order.label_of_row.tolist() == [4, 1, 2, 5, 0, 3]
    many = np.zeros(200, np.int64)
    shuffled = [order_labels(many, unit_vectors, head_fraction=0.0, group_size=16, method="random", seed=s)[0] for s in (1, 1, 2)]  # type: ignore[arg-type]
    assert shuffled[0].fingerprint == shuffled[1].fingerprint != shuffled[2].fingerprint


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_prepared(tmp_path_factory.mktemp("groups"), labels=101, overrides=OVERRIDES)


def test_files_round_trip(prepared: Config) -> None:
    folder = Path(prepared.data.prepared)
    manifest = read_manifest(folder)
    order = load_label_order(folder)
    assert (order.labels, order.head_rows, order.groups, order.group_size, order.rows) == (101, 16, 6, 16, 112)
    table = read_arrow(folder / LABELS_FILE, ORDER_SCHEMA).to_pylist()
    for row, line in enumerate(table):
        label = line["label"]
        assert line["row"] == row
        assert line["group"] == (-1 if row < 16 else (row - 16) // 16)
        assert line["text"] == (f"w{7 * label % 200}" if label >= 0 else "")
        assert line["frequency"] == order.frequency_of_row[row]
    page = json.loads((folder / GROUPS_FILE).read_text())
    assert page["fingerprint"] == order.fingerprint
    assert page["cohesion"] > page["cohesion_random"]
    assert label_order_is_current(prepared, folder, manifest)


def test_groups_of_an_earlier_order_stay_together(prepared: Config, tmp_path: Path) -> None:
    """Ten labels more, at the front, so that every id changes: whole groups stay, and the rest is a partition still."""
    before = load_label_order(prepared.data.prepared)
    start = earlier_groups(prepared.data.prepared, pa.chunked_array([[f"n{i}" for i in range(10)] + [f"l{i}" for i in range(101)]]))
    assert start.shape == (6, 16)
    assert np.array_equal(start[0], before.label_of_row[16:32] + 10)
    frequency = np.concatenate([np.zeros(10, np.int64), before.frequency_of_row[before.row_of_label]])
    order, _ = order_labels(frequency, lambda: unit_vectors(111), head_fraction=0.1, group_size=16, method="semantic", earlier=start)
    assert np.array_equal(np.sort(order.label_of_row[order.label_of_row >= 0]), np.arange(111))
    groups = {frozenset(group) for group in order.label_of_row[16:].reshape(-1, 16).tolist()}
    assert {frozenset(group) for group in start.tolist() if min(group) >= 0} <= groups
    assert (start[-1] < 0).any()  # the last group was padded, so it was no whole one


def test_uids_that_come_twice_carry_no_groups_over(prepared: Config) -> None:
    with pytest.raises(DataError, match=r"groups.start: labels have the same uid here"):
        earlier_groups(prepared.data.prepared, pa.chunked_array([["l1", "l2", "l1"]]))


def test_only_some_uids_are_still_there(prepared: Config) -> None:
    start = earlier_groups(prepared.data.prepared, pa.chunked_array([["l100", "other"]]))
    assert sorted(start[start >= 0].tolist()) == [0]
    config = make_prepared(
        Path(prepared.run.folder).parent / "more", labels=130, overrides=[*OVERRIDES, f"groups.start={prepared.data.prepared}"]
    )
    page = json.loads((Path(config.data.prepared) / GROUPS_FILE).read_text())
    assert page["start"] == load_label_order(prepared.data.prepared).fingerprint


def test_rerun_writes_the_same_bytes(prepared: Config) -> None:
    folder = Path(prepared.data.prepared)
    before = [(folder / name).read_bytes() for name in (LABELS_FILE, GROUPS_FILE)]
    page = make_label_order(prepared, folder, read_manifest(folder))
    assert set(page["seconds"]) == {"embedding", "grouping"}
    assert before == [(folder / name).read_bytes() for name in (LABELS_FILE, GROUPS_FILE)]
    assert not [path for path in folder.iterdir() if path.suffix == ".part" or path.name == WORK]


def test_a_killed_grouping_goes_on(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is embedded and packed is not done again, and the files are the same in the end."""
    folder = Path(prepared.data.prepared)
    before = [(folder / name).read_bytes() for name in (LABELS_FILE, GROUPS_FILE)]

    def killed(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "seriate", killed)
    with pytest.raises(KeyboardInterrupt):
        make_label_order(prepared, folder, read_manifest(folder))
    monkeypatch.undo()
    monkeypatch.setattr(packing, "_pack_part", killed)
    monkeypatch.setattr(label_embeddings, "_do", killed)
    (folder / WORK / "of other settings").mkdir()
    make_label_order(prepared, folder, read_manifest(folder))
    assert before == [(folder / name).read_bytes() for name in (LABELS_FILE, GROUPS_FILE)]
    assert not (folder / WORK).exists()


@pytest.mark.parametrize(
    "change",
    [
        "output.group_size=32",
        "output.head_fraction=0.3",
        "groups.method=random",
        "run.seed=4",
        "data.dev_fraction=0.1",
        "groups.iterations=2",
        "groups.search=2048",
    ],
)
def test_other_settings_make_the_order_stale(tmp_path: Path, change: str) -> None:
    config = make_prepared(tmp_path)
    folder = Path(config.data.prepared)
    manifest = read_manifest(folder)
    part, name = change.split("=")[0].split(".")
    other = make_prepared(tmp_path / "other", overrides=[change])
    assert label_order_is_current(config, folder, manifest)
    assert getattr(getattr(other, part), name) != getattr(getattr(config, part), name)
    assert not label_order_is_current(other, folder, manifest)
    manifest.fingerprint = "of other data"
    assert not label_order_is_current(config, folder, manifest)


def test_damage_is_named_in_one_line(tmp_path: Path) -> None:
    config = make_prepared(tmp_path)
    folder = Path(config.data.prepared)
    manifest = read_manifest(folder)
    page, table = (folder / GROUPS_FILE).read_text(), (folder / LABELS_FILE).read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            load_label_order(folder)
        assert "\n" not in str(caught.value)
        assert not label_order_is_current(config, folder, manifest)

    (folder / GROUPS_FILE).unlink()
    refused(r"groups\.json: no such file; run haste prepare")
    (folder / GROUPS_FILE).write_text(page[:50])
    refused(r"groups\.json: damaged")
    (folder / GROUPS_FILE).write_text(page.replace('"schema_version": 1', '"schema_version": 99'))
    refused("schema version 99")
    (folder / GROUPS_FILE).write_text(page.replace('"head_rows": 16', '"head_rows": 32'))
    refused(r"labels\.arrow: does not give each of the 101 labels one row")
    (folder / GROUPS_FILE).write_text(page)
    (folder / LABELS_FILE).write_bytes(table[:-100])
    refused(r"labels\.arrow: not a complete Arrow file")
    (folder / LABELS_FILE).unlink()
    refused(r"labels\.arrow: no such file")
    other = make_prepared(tmp_path / "other", overrides=["groups.method=random"])
    (folder / LABELS_FILE).write_bytes((Path(other.data.prepared) / LABELS_FILE).read_bytes())
    refused("is not the order that groups.json tells of")
