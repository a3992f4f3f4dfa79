"""``haste study``: its page, its label orders, its intervals, and the whole command on a small made-up problem."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import FULL, make_prepared, run_ranks

from haste_dist import label_embeddings
from haste_dist.config import save_config
from haste_dist.errors import ConfigError, DataError
from haste_dist.held_out import dev_rows
from haste_dist.intervals import Interval, mean_of, metrics_of_sums, over_seeds, resample
from haste_dist.label_groups import load_label_order
from haste_dist.manifest import open_split, read_manifest
from haste_dist.metrics import FrequencyRecall, Metrics, Propensity, Ragged
from haste_dist.runlog import read_events
from haste_dist.sealed import seal_data
from haste_dist.trials import Study, Trial, read_result, read_study_page, read_texts, run_trial, trials_of, with_label_order
from haste_dist.verify import check_data
from haste_dist.world import World
from haste_launch import cli
from haste_launch.study_plot import Seen, draw_memory, pareto

ROOT = Path(__file__).resolve().parents[1]
FREQUENCY = np.array([1, 1, 3, 8, 30, 200])


def page(folder: Path, text: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config: [", "line 1"),
        ("cases: {a: []}", "a study has config and cases"),
        ("config: demo\ncases: {a: []}\nrepeat: 3", "a study has config and cases"),
        ("config: demo\ncases: {}", "lists of a.b=c"),
        ("config: demo\ncases: {a: train.epochs=1}", "lists of a.b=c"),
        ("config: demo\ncases: {a: []}\nseeds: [1, 1]", "distinct whole numbers"),
        ("config: demo\ncases: {a: []}\nsplit: train", "test or dev"),
        ("config: demo\ncases: {a/b: []}", "a folder's"),
        ("config: demo\ncases: {a: []}\nseeds: [0, 1, 2]\naverage: 2", "average=2: .* 3 seeds are no multiple"),
        ("config: demo\ncases: {a: []}\naverage: 1", "average=1: .* two or more"),
        ("config: demo\ncases: {a: []}\nseeds: [0, 1]\naverage: true", "average=True"),
        ("config: demo\ncases: {a: [], a-average: []}\nseeds: [0, 1]\naverage: 2", "choose another name"),
        ("config: demo\ntopic: ../x\ncases: {a: []}", "topic=../x"),
        ("config: demo\nkeep_weights: 1\ncases: {a: []}", "keep_weights=1: true or false"),
        ("config: demo\ncases: [", "line 2"),
    ],
)
def test_a_page_that_is_no_study_is_told_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as told:
        read_study_page(page(tmp_path, text))
    assert str(told.value).count("\n") == 0


@pytest.mark.parametrize(("name", "says"), [("missing.yaml", "^missing.yaml: no such study page; "), (".", r"^\.: Is a directory$")])
def test_a_page_that_cannot_be_read_is_told_in_words(name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        read_study_page(name)


def test_the_dev_split_needs_a_fraction_and_the_test_split_none(tmp_path: Path) -> None:
    study = read_study_page(page(tmp_path, "config: demo\ncases: {a: []}\nsplit: dev"))
    with pytest.raises(ConfigError, match="dev needs one above 0"):
        trials_of(study, tmp_path, [])
    trial = trials_of(study, tmp_path, ["data.dev_fraction=0.1"])[0]
    assert (trial.config.evaluate.split, trial.config.run.seed, trial.folder.name) == ("dev", 0, "a-0")
    with pytest.raises(ConfigError, match="test is 0"):
        trials_of(read_study_page(page(tmp_path, "config: demo\ncases: {a: [data.dev_fraction=0.1]}")), tmp_path, [])


def test_a_mean_of_encoders_from_scratch_is_refused_before_any_run(tmp_path: Path) -> None:
    study = read_study_page(page(tmp_path, "config: demo\ncases: {a: []}\nseeds: [0, 1]\naverage: 2"))
    with pytest.raises(ConfigError, match="average=2: case a: encoders from scratch have no mean"):
        trials_of(study, tmp_path, [])


def some_texts(n: int, seed: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """(n, M) sums, and the predictions and true labels behind them."""
    rng = np.random.default_rng(seed)
    predicted = np.stack([rng.permutation(len(FREQUENCY))[:5] for _ in range(n)])
    true = [rng.permutation(len(FREQUENCY))[: rng.integers(1, 4)] for _ in range(n)]
    kept = [Metrics(Propensity(FREQUENCY, 300)).per_text(predicted, true), FrequencyRecall(FREQUENCY).per_text(predicted, true)]
    return np.concatenate(kept, axis=1), true, predicted


def measured(predicted: np.ndarray, true: list[np.ndarray]) -> dict[str, float]:
    metrics, rare = Metrics(Propensity(FREQUENCY, 300)), FrequencyRecall(FREQUENCY)
    metrics.add(predicted, Ragged.of(true))
    rare.add(predicted, Ragged.of(true))
    return {**metrics.result(), **rare.result()}


def test_weighing_texts_is_repeating_them() -> None:
    sums, true, predicted = some_texts(12, 0)
    weights = np.array([[3, 0, 1, 0, 2, 1, 0, 1, 1, 1, 2, 0], np.ones(12)])
    found = metrics_of_sums(weights @ sums)
    for line, weight in enumerate(weights):
        again = np.repeat(np.arange(12), weight.astype(int))
        for name, value in measured(predicted[again], [true[i] for i in again]).items():
            assert found[name][line] == pytest.approx(value, abs=1e-12), name


def paired(ours: list[np.ndarray], theirs: list[np.ndarray], samples: int, seed: int = 0) -> dict[str, Interval]:
    found = resample([*ours, *theirs], samples, seed)
    return mean_of(found[: len(ours)], found[len(ours) :])


def test_the_bootstrap_tells_a_better_case_from_an_equal_one() -> None:
    ours = [some_texts(400, seed)[0] for seed in (1, 2)]
    worse = [texts.copy() for texts in ours]
    for texts in worse:
        texts[:100, 1] = 0  # P@1 of a quarter of the texts
    found = paired(ours, worse, samples=300)["P@1"]
    lost = np.mean([100 * texts[:100, 1].mean() / 400 for texts in ours])
    assert found.value == pytest.approx(lost, abs=1e-12)
    assert found.apart_from_zero
    assert found.low < found.value < found.high
    spread = np.std([100 * texts[:100, 1].mean() / 400 for texts in ours])
    assert found.half < 0.2 + spread
    same = paired(ours, ours, samples=50)["P@1"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.apart_from_zero
    with pytest.raises(ValueError, match="different texts"):
        paired(ours, [texts[:10] for texts in ours], 9)


def test_the_bootstrap_is_what_a_slow_one_gives() -> None:
    """Texts drawn and scored anew, one sample after the other: the same texts for both cases and all seeds."""
    n, samples = 30, 40
    ours, theirs = ([some_texts(n, seed) for seed in seeds] for seeds in ((1, 2), (3, 4)))
    found = paired([run[0] for run in ours], [run[0] for run in theirs], samples, seed=7)
    drawn: dict[str, list[float]] = {}
    for counts in np.random.default_rng(7).multinomial(n, np.full(n, 1 / n), size=samples):
        texts = np.repeat(np.arange(n), counts)
        assert len(texts) == n
        scores = [[measured(predicted[texts], [true[i] for i in texts]) for _, true, predicted in side] for side in (ours, theirs)]
        for name in {key for side in scores for run in side for key in run}:
            pairs = [(a.get(name, np.nan), b.get(name, np.nan)) for a, b in zip(*scores, strict=True)]
            drawn.setdefault(name, []).append(float(np.mean([a - b for a, b in pairs])))
    whole = [[measured(predicted, true) for _, true, predicted in side] for side in (ours, theirs)]
    assert set(drawn) == set(found)
    for name, values in drawn.items():
        low, high = np.nanpercentile(values, [2.5, 97.5])
        difference = np.mean([a[name] - b[name] for a, b in zip(*whole, strict=True)])
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx((difference, low, high), abs=1e-12), name
    alone = mean_of(resample([run[0] for run in ours], samples, seed=7))["PSP@5"]
    assert alone.value == pytest.approx(np.mean([side["PSP@5"] for side in whole[0]]))
    assert alone.low < alone.value < alone.high


def test_the_interval_over_seeds_is_students() -> None:
    one = over_seeds([1.0, 2.0, 3.0])
    assert one.value == 2
    assert one.half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)  # t of 2 degrees of freedom, standard deviation 1
    assert np.isnan(over_seeds([1.0]).half)


def test_label_orders_are_made_once_and_shared(tmp_path: Path) -> None:
    config = make_prepared(tmp_path / "data")
    seal_data(Path(config.data.prepared))
    assert with_label_order(config, tmp_path, 0).data.prepared == config.data.prepared
    config.output.head_fraction = 1.0
    other = with_label_order(config, tmp_path, 0)
    order = load_label_order(other.data.prepared)
    assert (order.groups, order.head_rows) == (0, 101)
    check_data(Path(other.data.prepared))
    made = (Path(other.data.prepared) / "groups.json").stat().st_mtime_ns
    again = with_label_order(config, tmp_path, 0)
    assert again.data.prepared == other.data.prepared
    assert (Path(again.data.prepared) / "groups.json").stat().st_mtime_ns == made
    config.groups.method, config.output.head_fraction = "random", 0.1
    assert (
        load_label_order(with_label_order(config, tmp_path, 0).data.prepared).fingerprint
        != load_label_order(tmp_path / "data/prepared").fingerprint
    )
    assert load_label_order(config.data.prepared).groups > 0  # the source is as it was


def test_orders_of_the_same_data_share_their_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_prepared(tmp_path / "data", overrides=["groups.method=semantic"])
    seal_data(Path(config.data.prepared))
    made: list[str] = []

    def counted(*arguments: Any) -> label_embeddings.LabelEmbeddings:
        made.append(str(arguments[1]))
        return embed_labels(*arguments)

    embed_labels = label_embeddings.embed_labels
    monkeypatch.setattr(label_embeddings, "embed_labels", counted)
    known: dict[str, label_embeddings.LabelEmbeddings] = {}
    orders = {}
    for words in ({"group_size": 32}, {"group_size": 64}, {"head_fraction": 0.5}):
        asking = dataclasses.replace(config, output=dataclasses.replace(config.output, **words))
        orders[str(words)] = Path(with_label_order(asking, tmp_path, 0, known).data.prepared)
        alone = Path(with_label_order(asking, tmp_path / "alone", 0).data.prepared)
        assert (orders[str(words)] / "labels.arrow").read_bytes() == (alone / "labels.arrow").read_bytes()
    assert len(set(orders.values())) == 3
    assert (len(known), len(made)) == (1, 4)  # once for all, and once for each that knows of none
    config.groups.label_text = False
    with_label_order(config, tmp_path, 0, known)
    assert (len(known), len(made)) == (2, 5)


def test_a_study_from_its_page_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_prepared(tmp_path / "data")
    seal_data(Path(config.data.prepared))
    save_config(config, tmp_path / "config.yaml")
    file = page(
        tmp_path, f"config: {tmp_path}/config.yaml\nsettings: [train.epochs=1]\ncases:\n  plain: []\n  dense: [output.head_fraction=1]\n"
    )
    out, records = tmp_path / "study", tmp_path / "records"
    words = ["study", str(file), "--out", str(out), "--side-by-side", "2"]
    assert cli.main([*words, "--report"]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert cli.main(words) == 0, (capsys.readouterr(), *(log.read_text() for log in out.rglob("output.log")))
    said = capsys.readouterr().out
    assert "plain-0: epoch 1.0 test  P@1 " in said
    trials = [Trial(t.case, t.seed, with_label_order(t.config, out, 0)) for t in trials_of(read_study_page(file), out, [])]
    for trial in trials:
        result = read_result(trial)
        assert result is not None
        last = [event for event in read_events(trial.folder) if event["event"] == "eval"][-1]
        again = metrics_of_sums(read_texts(trial).sum(axis=0)[None])
        for name in ("P@1", "PSP@5", "nDCG@5", "r_at_5_freq_2_5"):
            assert result[name] == pytest.approx(last[name], abs=1e-9)  # the last checkpoint, as training saw it
            assert again[name][0] == pytest.approx(result[name], abs=1e-6)
        assert not (trial.folder / "checkpoints").exists()
    table = pq.read_table(out / "results.parquet")
    assert table["case"].to_pylist() == ["plain", "dense"]
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "| plain | 1 | " in report
    assert "Difference to plain" in report
    plots = {name: (out / name).stat().st_size for name in ("metrics.png", "recall.png", "memory.png")}
    assert min(plots.values()) > 10_000
    assert all(f"]({name})" in report for name in plots)

    # A run that is there is kept and gets its record; one that is missing is made.
    kept = (trials[0].folder / "result.json").stat().st_mtime_ns
    away = trials[1].folder.rename(tmp_path / "away")
    assert cli.main([*words, "--report", "--no-plot", "--records", str(records)]) == 0
    assert "1 of 2 runs are finished" in capsys.readouterr().out
    assert [line["case"] for line in lines_of(records)] == ["plain"]
    assert cli.main([*words, "--no-plot", "--records", str(records)]) == 0
    assert "1 of 2 runs are in" in capsys.readouterr().out
    assert (trials[0].folder / "result.json").stat().st_mtime_ns == kept
    assert json.loads((trials[1].folder / "result.json").read_text())["P@1"] == pytest.approx(table["P@1"].to_pylist()[1])  # the same seed
    plain, dense = lines_of(records)
    assert (plain["provider"], dense["provider"]) == ("haste_dist", "dense")
    assert plain["shape"] == {"L": 101, "N": 16, "D": 32, "F": 8, "G": 16, "W": 1}
    assert dense["shape"] == {"L": 101, "N": 16, "D": 32, "W": 1}
    result = read_result(trials[0])
    assert result is not None
    assert (plain["topic"], plain["p_at_1"], plain["seed"], plain["gpus"]) == ("config", round(result["P@1"], 5), 0, 0)
    assert all(plain[name] == result[name] for name in ("torch", "triton", "commit", "date", "output_bytes"))

    # The report needs nothing but the study's folder, and writes no record again.
    shutil.rmtree(trials[1].folder)
    away.rename(trials[1].folder)
    os.rename(config.data.prepared, tmp_path / "gone")
    before = sum(line["case"] == "plain" for line in lines_of(records))
    assert cli.main([*words, "--report", "--records", str(records)]) == 0
    assert (out / "report.md").read_text(encoding="utf-8") == report
    assert sum(line["case"] == "plain" for line in lines_of(records)) == before == 1
    os.rename(tmp_path / "gone", config.data.prepared)

    # One with other settings is refused; a setting that has come since is at its default.
    assert cli.main([*words, "train.epochs=2"]) == 2
    assert "other settings" in capsys.readouterr().err
    settings = json.loads(result["settings"])
    del settings["encoder"]["compile"], settings["rewire"]["grow"]
    (trials[0].folder / "result.json").write_text(json.dumps({**result, "settings": json.dumps(settings)}))
    assert read_result(trials[0]) is not None
    (trials[0].folder / "result.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_result(trials[0])


def test_dev_texts_are_unknown_to_what_a_run_reads(tmp_path: Path) -> None:
    """They are its test split, and the same for all seeds; frequencies and label order are made without them."""
    config = make_prepared(tmp_path / "data", overrides=["train.max_steps=2"])
    seal_data(Path(config.data.prepared))
    save_config(config, tmp_path / "config.yaml")
    cases = "cases:\n  plain: []\n  dense: [output.head_fraction=1]\n"
    words = f"config: {tmp_path}/config.yaml\nsettings: [data.dev_fraction=0.25]\nseeds: [3, 4]\nsplit: dev\n{cases}"
    study = read_study_page(page(tmp_path, words))
    trials = [Trial(t.case, t.seed, with_label_order(t.config, tmp_path, 3)) for t in trials_of(study, tmp_path, [])]
    assert [t.config.data.prepared for t in trials[:2]] == [t.config.data.prepared for t in trials[2:]]
    folder, texts = Path(trials[0].config.data.prepared), read_manifest(config.data.prepared).splits["train"].rows
    assert read_manifest(folder).splits["test"].rows == texts // 4
    kept = np.delete(np.arange(texts), dev_rows(texts, 0.25, 3))
    rows = open_split(config.data.prepared, read_manifest(config.data.prepared), "train").take(kept)
    frequency = np.bincount(rows["labels"].combine_chunks().flatten().to_numpy(), minlength=101)
    order = load_label_order(folder)
    assert np.array_equal(order.frequency_of_row[order.row_of_label], frequency)
    run_ranks(1, finish, trials[0], study)  # a process of its own: it leaves its process group
    result = read_result(trials[0])
    assert result is not None
    assert (result["split"], result["rows"], len(read_texts(trials[0]))) == ("dev", texts // 4, texts // 4)


def finish(_world: World, trial: Trial, study: Study) -> None:
    assert run_trial(trial, study)


def lines_of(records: Path) -> list[dict]:
    (file,) = records.iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_pareto_line_joins_what_nothing_beats() -> None:
    assert pareto([(3, 5), (1, 2), (2, 1), (1, 1), (4, 5), (5, 6)]) == [(1, 2), (3, 5), (5, 6)]


def test_labels_of_points_lie_apart() -> None:
    """Ten cases at nearly one place, and a name as long as they come."""
    cases = {f"case {i}": Seen({name: Interval(0.5 + i / 1000, 0.49, 0.51) for name in ("P@1", "PSP@5")}, {}, 1e6 + i) for i in range(9)}
    cases["momentum in float32, nearest"] = Seen({name: Interval(0.5, np.nan, np.nan) for name in ("P@1", "PSP@5")}, {}, 9e6)
    for axis in draw_memory(cases).axes:
        boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
        assert len(boxes) == 10
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(box.x0 >= axis.figure.bbox.x0 and box.x1 <= axis.figure.bbox.x1 for box in boxes)


def test_a_name_lies_nearest_to_its_own_point() -> None:
    """Where the place at its right is taken: one above another, and a third in the way of the longer name."""
    at = {"small": (10.8, 76.75), "small-average": (10.8, 76.92), "recipe": (15.4, 76.90), "recipe-average": (15.4, 77.02)}
    at |= {"dense": (73.8, 76.77), "dense-average": (73.8, 77.71)}
    seen = {case: Interval(y / 100, y / 100 - 0.011, y / 100 + 0.011) for case, (_, y) in at.items()}
    axis = draw_memory({case: Seen({"P@1": seen[case]}, {}, round(x * 1e6)) for case, (x, _) in at.items()}).axes[0]
    points = dict(zip(at, axis.transData.transform(list(at.values())), strict=True))
    for text in (text for text in axis.texts if text.get_text()):
        box = text.get_window_extent()
        off = {case: np.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1)) for case, (x, y) in points.items()}
        assert min(off, key=off.__getitem__) == text.get_text()


def test_a_run_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_prepared(tmp_path / "data")
    config.output.fan_in = 64  # more than the encoder is wide: told by the run, not by the page
    save_config(config, tmp_path / "config.yaml")
    file = page(tmp_path, f"config: {tmp_path}/config.yaml\ncases: {{plain: []}}\n")
    assert cli.main(["study", str(file), "--out", str(tmp_path / "study")]) == 2
    assert "1 of 1 runs failed" in capsys.readouterr().err
    assert "output.fan_in=64 is larger" in (tmp_path / "study/runs/plain-0/output.log").read_text()
    assert os.listdir(tmp_path / "study/runs") == ["plain-0"]


@pytest.mark.skipif(not FULL, reason="the long form: HASTE_FULL=1")
def test_a_study_that_is_stopped_goes_on(tmp_path: Path) -> None:
    config = make_prepared(tmp_path / "data")
    seal_data(Path(config.data.prepared))
    save_config(config, tmp_path / "config.yaml")
    file = page(tmp_path, f"config: {tmp_path}/config.yaml\nsettings: [train.epochs=12]\ncases: {{plain: []}}\n")
    out = tmp_path / "study"
    words = [sys.executable, "-m", "haste_launch.cli", "study", str(file), "--out", str(out), "--no-plot"]
    log = out / "runs/plain-0/metrics.jsonl"
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.exists() and '"event": "eval"' in log.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "goes on from there" in process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert read_events(log.parent)[-1]["reason"] == "stopped"
    assert subprocess.run(words, check=False, timeout=600).returncode == 0
    starts = [event["step"] for event in read_events(log.parent) if event["event"] == "start"]
    assert starts[0] == 0 < starts[1]
