"""``haste scale``: its words, the law of its labels, what a study keeps, and the whole command on gloo ranks."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import run_ranks

from haste_dist.config import Config, load_config
from haste_dist.cost_model import FREE, RANGED, CostModel, load_model
from haste_dist.errors import ConfigError, DataError, OutOfMemory
from haste_dist.measure import Effort, measure_points
from haste_dist.runlog import read_events
from haste_dist.study import FILE, KEYS, SCHEMA, Point, add_row, missing, of_page, read_study, strong_scaling, weak_scaling
from haste_dist.synthetic import LabelLaw, spread, synthetic_batch
from haste_dist.world import World, join_world
from haste_launch import cli, scale
from haste_launch.progress import short
from haste_launch.scale_plot import draw_study
from haste_launch.scale_settings import Words, choose_ranks, filled, number, points_of, read_words

SMALL = [
    "encoder.name=scratch",
    "encoder.width=32",
    "encoder.layers=1",
    "encoder.heads=2",
    "encoder.dropout=0",
    "data.max_length=8",
    "output.fan_in=8",
    "output.group_size=16",
    "launch.device=cpu",
]
LAW = LabelLaw()


def words(line: str = "") -> Words:
    """As a GPU fills them."""
    return filled(said(line), Config(), [1], True)


def said(line: str = "") -> Words:
    return read_words(cli.parse(["scale", "bert-base", *line.split()]))


def small(*more: str) -> Config:
    return load_config(None, [*SMALL, *more])


# Words


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--labels many", "--labels many: whole numbers such as 4096, 10k, 2.5M or 1B"),
        ("--labels 2.0000005M", "--labels 2.0000005M: whole numbers"),
        ("--labels 3B", "--labels 3000000000: at most 2,147,483,647"),
        ("--ranks 0", "--ranks 0: at least 1"),
        ("--group 24", "--group 24: one of 1, 16, 32, 64, 128"),
        ("--sweep rank=1", "--sweep rank=1: reads name=value"),
        ("--sweep batch=", "names no value"),
        ("--exponent steep", "--exponent steep: not a number"),
        ("--positives 0.5", "--positives 0.5: between 1 and 1000"),
    ],
)
def test_wrong_words_are_told_in_one_line(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", "bert-base", *line.split()]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_a_study_with_a_file_in_its_way_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["scale", "bert-base", "--ranks", "1", "--labels", "1k", "--out", str(tmp_path / "file/out")]) == 2
    said = capsys.readouterr().err
    assert said == f"haste: error: {tmp_path / 'file/out'}: cannot be written (Not a directory); choose another --out\n"


@pytest.mark.parametrize(("word", "value"), [("10", 10), ("10k", 10_000), ("2.5M", 2_500_000), ("1B", 10**9), ("1e6", 10**6)])
def test_numbers_read_as_people_write_them(word: str, value: int) -> None:
    assert number(word) == value
    assert number(short(value)) == value


def test_labels_stay_and_labels_a_rank_grow_with_the_ranks() -> None:
    points = points_of(words("--labels 1M --labels-a-rank 2M --batch 64,128 --sweep group=16,64"), Config(), [1, 4], True)
    assert {(p.ranks, p.labels) for p in points if p.group == 32} == {(1, 10**6), (1, 2 * 10**6), (4, 10**6), (4, 8 * 10**6)}
    assert {p.batch for p in points} == {64, 128}
    assert {(p.group, p.labels, p.batch) for p in points if p.group != 32} == {(16, 10**6, 64), (64, 10**6, 64)}
    assert [p.ranks for p in points] == sorted(p.ranks for p in points)
    assert len(points) == len(set(points))


def test_the_ranks_of_a_page_are_no_bound_for_those_asked_for() -> None:
    page = Config()
    assert scale._most_ranks(page, {"CPU": 3.0}) == (3, False)
    page.launch.ranks = 1
    assert scale._most_ranks(page, {"CPU": 3.0}) == (3, False)
    page.launch.ranks = 5
    assert scale._most_ranks(page, {"CPU": 3.0}) == (5, False)


def test_ranks_are_powers_of_two_and_all_there_are() -> None:
    assert choose_ranks(words(), 6, 6) == [1, 2, 4, 6]
    assert choose_ranks(words(), 64, 4) == [1, 2, 4]
    assert choose_ranks(words("--ranks 8,1"), 64, 4) == [1, 8]
    with pytest.raises(ConfigError, match="--ranks 8: there are 4"):
        choose_ranks(words("--ranks 8"), 4, 4)
    with pytest.raises(ConfigError, match="at least two groups a rank, 128 labels on 2 ranks"):
        points_of(words("--labels 127"), Config(), [2], True)


def test_a_cpu_gets_a_study_that_ends() -> None:
    config = load_config("bert-base")
    alone = filled(said(), config, [1, 2], False)
    assert (alone.batch, alone.warmup, alone.steps) == ([4], 1, 3)
    assert max(point.labels for point in points_of(alone, config, [1, 2], False)) == 80_000
    assert filled(said(), load_config("bert-base", ["train.batch_size=2"]), [1, 2], False).batch == [2]
    asked = filled(said("--batch 512 --warmup 3 --steps 7"), config, [1], False)
    assert (asked.batch, asked.warmup, asked.steps) == ([512], 3, 7)
    assert filled(said("--ranks 8"), config, [8], False).batch == [8], "a text a rank"
    on_gpus = filled(said(), config, [1], True)
    assert (on_gpus.batch, on_gpus.warmup, on_gpus.steps) == ([512], 5, 20)


# Labels by a law


@given(st.integers(1, 10**10), st.integers(0, 1000))
def test_the_spread_of_the_tail_is_a_bijection(count: int, start: int) -> None:
    near = np.arange(start, min(count, start + 500), dtype=np.int64)
    far = spread(near, count)
    assert len(set(far.tolist())) == len(near)
    assert not len(far) or (far.min() >= 0 and far.max() < count)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.4])
def test_labels_are_as_frequent_as_the_law_says(exponent: float) -> None:
    labels, law = 1000, LabelLaw(exponent=exponent, shift=3.0)
    drawn = law.frequency_ranks(np.random.default_rng(0).random(400_000), labels)
    edges = np.arange(labels + 1) + law.shift
    integral = np.log(edges) if exponent == 1 else edges ** (1 - exponent) / (1 - exponent)
    expected = np.diff(integral) / (integral[-1] - integral[0])
    for first, last in ((0, 1), (1, 10), (10, 100), (100, 1000)):
        assert np.isclose(((drawn >= first) & (drawn < last)).mean(), expected[first:last].sum(), rtol=0.03)


def test_a_billion_labels_need_no_table() -> None:
    drawn = LAW.frequency_ranks(np.random.default_rng(0).random(1000), 10**9)
    assert drawn.max() > 10**8
    assert drawn.min() >= 0


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 3000), st.integers(0, 3))
def test_ranks_share_one_batch_of_distinct_labels(rows: int, ranks: int, labels: int, step: int) -> None:
    head = labels // 3
    whole = synthetic_batch(LAW, labels, head, rows, 4, 50, 1, step, 1, 0)
    parts = [synthetic_batch(LAW, labels, head, rows, 4, 50, 1, step, ranks, rank) for rank in range(ranks)]
    real = [(part.input_ids[: len(part.texts)], part.label_rows[: len(part.texts)]) for part in parts]
    assert torch.equal(torch.cat([ids for ids, _ in real]), whole.input_ids)
    assert torch.equal(torch.cat([rows for _, rows in real]), whole.label_rows)
    for part in parts:
        assert part.label_rows.shape == (-(-rows // ranks), LAW.most)
        assert (part.label_rows[len(part.texts) :] == -1).all()
    for row in whole.label_rows.tolist():
        chosen = [label for label in row if label >= 0]
        assert 1 <= len(chosen) == len(set(chosen))
        assert max(chosen) < labels


# A study


def row_of(point: Point, config: Config, **more: float) -> dict:
    figures = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "tail_p50_ms": 1.0, "gather_p50_ms": 0.5}
    return {**dict.fromkeys(SCHEMA.names), **point.key(config, LAW), "device": "cpu", "note": "", **figures, **more}


def test_a_study_keeps_its_rows_and_knows_what_is_missing(tmp_path: Path) -> None:
    config = small()
    points = [Point(1000, ranks, 8, 8, 16) for ranks in (1, 2)]
    assert read_study(tmp_path) == []
    add_row(tmp_path, row_of(points[0], config))
    assert missing(points, read_study(tmp_path), config, LAW, "cpu") == points[1:]
    assert missing(points, read_study(tmp_path), config, LAW, "NVIDIA H200") == points
    assert missing(points, read_study(tmp_path), small("output.momentum=0"), LAW, "cpu") == points
    assert missing(points, read_study(tmp_path), config, LabelLaw(exponent=1.1), "cpu") == points
    (tmp_path / FILE).write_bytes(b"not a table")
    with pytest.raises(DataError, match="no study that this version can read"):
        read_study(tmp_path)


def test_scaling_compares_with_one_rank_of_the_same_shape() -> None:
    config = small()
    rows = [
        row_of(Point(1000, 1, 8, 8, 16), config, p50_ms=8.0, tail_p50_ms=4.0),
        row_of(Point(1000, 4, 8, 8, 16), config, p50_ms=4.0, tail_p50_ms=1.5),
        row_of(Point(4000, 4, 8, 8, 16), config, p50_ms=10.0, tail_p50_ms=4.5),
        row_of(Point(1000, 4, 16, 8, 16), config),
    ]
    (strong,), (weak,) = strong_scaling(rows), weak_scaling(rows)
    assert (strong.row["labels"], weak.row["labels"]) == (1000, 4000)
    assert strong.step == 8 / (4 * 4)
    assert strong.layer == 4.5 / (4 * 2)
    assert weak.step == 8 / 10
    assert weak.layer == 4.5 / 5


@pytest.mark.parametrize(
    "word", ["encoder.pooling=cls", "encoder.fused=false", "encoder.layers=3", "output.momentum=0", "data.max_length=6"]
)
def test_what_changes_a_figure_is_measured_anew(word: str) -> None:
    point, config = Point(700, 1, 6, 8, 16), small()
    row = row_of(point, config)
    assert missing([point], [row], config, LAW, "cpu") == []
    assert missing([point], [row], small(word), LAW, "cpu") == [point]
    other = row_of(Point(900, 2, 8, 16, 32), small(word))
    assert of_page([row, other], config, LAW) == [row]
    assert of_page([row, other], small(word), LAW) == [other]


def measure_all(world: World, config: Config, points: list[Point], folder: Path) -> None:
    measure_points(config, world, points, LAW, folder, Effort(1, 3), folder / "records")


def test_points_are_measured_on_the_real_step(tmp_path: Path) -> None:
    config = small()
    one, two = Point(700, 1, 6, 8, 16), Point(700, 2, 6, 8, 16)
    measure_all(join_world("cpu"), config, [one], tmp_path)
    run_ranks(2, measure_all, config, [two], tmp_path)
    first, second = read_study(tmp_path)
    assert [tuple(row[name] for name in KEYS) for row in (first, second)] == [
        tuple({**p.key(config, LAW), "device": "cpu"}[name] for name in KEYS) for p in (one, two)
    ]
    for row in (first, second):
        assert row["note"] == ""
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert all(row[f"{part}_p50_ms"] > 0 for part in ("forward", "head", "tail", "backward", "optimizer", "gather", "scatter"))
        assert row["peak_gib"] > row["state_gib"] > 0
        assert row["encoder_only_ms"] > 0
        assert row["encoder_mfu"] is None  # nobody knows a CPU's rate
    # The same batches, weights and features on any number of ranks: so the same losses.
    assert math.isclose(first["loss_first"], second["loss_first"], rel_tol=1e-5)
    assert math.isclose(first["loss_last"], second["loss_last"], rel_tol=1e-5)
    assert second["state_gib"] < 0.7 * first["state_gib"]
    lines = {file.stem: file.read_text().splitlines() for file in (tmp_path / "records").glob("*.jsonl")}
    assert {topic: len(found) for topic, found in lines.items()} == {"train_step": 2, "strong_scaling": 1}
    assert json.loads(lines["strong_scaling"][0])["shape"]["W"] == 2
    # A second time nothing is left to measure.
    measure_all(join_world("cpu"), config, [one], tmp_path)
    assert len(read_study(tmp_path)) == 2


def test_a_full_device_ends_the_point_with_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr("haste_dist.measure.train_step", full)
    with pytest.raises(OutOfMemory, match="out of memory"):
        measure_all(join_world("cpu"), small(), [Point(700, 1, 6, 8, 16)], tmp_path)
    assert read_study(tmp_path) == []


def test_after_a_full_device_the_study_goes_on_with_the_next_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = scale.study_config(small(), words(f"--out {tmp_path}"))
    points = [Point(700 * i, 1, 6, 8, 16) for i in (1, 2, 3)]
    asked = []

    def ranks(on: Config, task: str, arguments: dict) -> int:
        asked.append([point["labels"] for point in arguments["points"]])
        if len(asked) == 1:
            add_row(tmp_path, row_of(points[0], on))
            raise OutOfMemory("full")
        return 0

    monkeypatch.setattr(scale, "run_ranks", ranks)
    assert not scale._measure(config, points, LAW, words(), False, "cpu")
    assert asked == [[700, 1400, 2100], [2100]]
    assert [row["note"] for row in read_study(tmp_path)] == ["", "out of memory"]


def test_a_small_study_leaves_the_model_of_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path))

    def model(times: int) -> CostModel:
        ranges = {name: [1.0, float(times if name in FREE else 1)] for name in RANGED}
        return CostModel("cpu", {}, 0.1 * times, 4, ranges, {})

    here, kept = tmp_path / "study" / "cost_model.json", tmp_path / "cost_model-cpu.json"
    for times, stays in ((2, 2), (1, 2), (2, 2), (3, 3)):
        said = scale._keep(model(times), here)
        assert said == f"{kept}: the cost model that haste plan reads" if times == stays else f"haste plan --model {here}" in said
        assert load_model(kept) == model(stays)
    kept.write_text("{}")
    scale._keep(model(1), here)
    assert load_model(kept) == model(1)


@pytest.mark.slow
def test_the_command_measures_draws_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    line = ["scale", "bert-base", *SMALL, "launch.ranks=2", "--out", str(out), "--batch", "8", "--steps", "3", "--warmup", "1"]
    more = ["--labels", "1k,4k", "--labels-a-rank", "2k"]
    assert cli.main([*line, "--ranks", "1", *more]) == 0
    assert "3 points; a cost model needs 4" in capsys.readouterr().out
    assert cli.main([*line, *more]) == 0
    said = capsys.readouterr()
    assert "3 of 5 points are in" in said.err
    assert "weak scaling: 4000 labels on 2 ranks beside 2000 on 1" in said.out
    assert "strong scaling: 4000 labels on 2 ranks" in said.out
    assert "left out" in said.out
    assert re.search(r"note, of 10B labels on 8: labels a rank 1\.25e\+09: .* \(measured: ", said.out)
    assert pq.read_table(out / FILE).num_rows == 5
    assert (out / "study.png").stat().st_size > 10_000
    model = load_model(out / "cost_model.json")
    assert (model.device, model.points) == ("cpu", 5)
    assert load_model(tmp_path / "cache" / "cost_model-cpu.json") == model
    assert [event["ranks"] for event in read_events(out) if event["event"] == "study"] == [1, 2]


def test_the_plot_shows_what_is_measured_and_what_is_not() -> None:
    config = small()
    more = {"planned_gib": 0.5, "peak_gib": 0.6, "encoder_parameters": 1000}
    alone = draw_study([row_of(Point(1000, 1, 8, 8, 16), config, **more)], None)
    assert [text.get_text() for text in alone.axes[0].texts] == ["no two points that differ so"]
    both = draw_study([row_of(Point(1000 * w, w, 8, 8, 16), config, **more) for w in (1, 2)], None)
    assert [axis.get_title()[:6] for axis in both.axes] == ["Strong", "Weak s", "Memory", "Time a"]
    assert not both.axes[1].texts
