"""``haste study``: its page, its label orders, its intervals, and the whole command on a small made-up problem."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import FULL, make_prepared

from haste_dist.config import save_config
from haste_dist.errors import ConfigError, DataError
from haste_dist.intervals import metrics_of_sums, over_seeds, paired_bootstrap
from haste_dist.label_groups import load_label_order
from haste_dist.metrics import FrequencyRecall, Metrics, Propensity, Ragged
from haste_dist.runlog import read_events
from haste_dist.sealed import seal_data
from haste_dist.trials import Trial, read_result, read_study_page, read_texts, trials_of, with_label_order
from haste_dist.verify import check_data
from haste_launch import cli

FREQUENCY = np.array([1, 1, 3, 8, 30, 200])


def page(folder: Path, text: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config: [", "while parsing"),
        ("cases: {a: []}", "a study has config and cases"),
        ("config: demo\ncases: {a: []}\nrepeat: 3", "a study has config and cases"),
        ("config: demo\ncases: {}", "lists of a.b=c"),
        ("config: demo\ncases: {a: train.epochs=1}", "lists of a.b=c"),
        ("config: demo\ncases: {a: []}\nseeds: [1, 1]", "distinct whole numbers"),
        ("config: demo\ncases: {a: []}\nsplit: train", "test or dev"),
        ("config: demo\ncases: {a/b: []}", "a folder's"),
    ],
)
def test_a_page_that_is_no_study_is_told_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as told:
        read_study_page(page(tmp_path, text))
    assert str(told.value).count("\n") == 0


def test_the_dev_split_needs_a_fraction_and_the_test_split_none(tmp_path: Path) -> None:
    study = read_study_page(page(tmp_path, "config: demo\ncases: {a: []}\nsplit: dev"))
    with pytest.raises(ConfigError, match="dev needs one above 0"):
        trials_of(study, tmp_path, [])
    trial = trials_of(study, tmp_path, ["data.dev_fraction=0.1"])[0]
    assert (trial.config.evaluate.split, trial.config.run.seed, trial.folder.name) == ("dev", 0, "a-0")
    with pytest.raises(ConfigError, match="test is 0"):
        trials_of(read_study_page(page(tmp_path, "config: demo\ncases: {a: [data.dev_fraction=0.1]}")), tmp_path, [])


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


def test_the_bootstrap_tells_a_better_case_from_an_equal_one() -> None:
    ours = [some_texts(400, seed)[0] for seed in (1, 2)]
    worse = [texts.copy() for texts in ours]
    for texts in worse:
        texts[:100, 1] = 0  # P@1 of a quarter of the texts
    found = paired_bootstrap(ours, worse, samples=300)["P@1"]
    lost = np.mean([100 * texts[:100, 1].mean() / 400 for texts in ours])
    assert found.value == pytest.approx(lost, abs=1e-12)
    assert found.apart_from_zero
    assert found.low < found.value < found.high
    spread = np.std([100 * texts[:100, 1].mean() / 400 for texts in ours])
    assert found.half < 0.2 + spread
    same = paired_bootstrap(ours, ours, samples=50)["P@1"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.apart_from_zero
    with pytest.raises(ValueError, match="different texts"):
        paired_bootstrap(ours, [texts[:10] for texts in ours])


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


def test_a_study_from_its_page_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_prepared(tmp_path / "data")
    seal_data(Path(config.data.prepared))
    save_config(config, tmp_path / "config.yaml")
    file = page(
        tmp_path, f"config: {tmp_path}/config.yaml\nsettings: [train.epochs=1]\ncases:\n  plain: []\n  dense: [output.head_fraction=1]\n"
    )
    out = tmp_path / "study"
    words = ["study", str(file), "--out", str(out), "--side-by-side", "2"]
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
    assert (out / "report.png").stat().st_size > 10_000

    # A run that is there is kept; one that is missing is made; one with other settings is refused.
    kept = (trials[0].folder / "result.json").stat().st_mtime_ns
    shutil.rmtree(trials[1].folder)
    assert cli.main([*words, "--no-plot"]) == 0
    assert "1 of 2 runs are in" in capsys.readouterr().out
    assert (trials[0].folder / "result.json").stat().st_mtime_ns == kept
    assert json.loads((trials[1].folder / "result.json").read_text())["P@1"] == pytest.approx(table["P@1"].to_pylist()[1])  # the same seed
    assert cli.main([*words, "train.epochs=2"]) == 2
    assert "other settings" in capsys.readouterr().err
    (trials[0].folder / "result.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_result(trials[0])


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
