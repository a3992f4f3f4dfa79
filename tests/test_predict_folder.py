"""haste predict into a folder: the same as one process says, whatever the parts; a killed or failed start goes on; filters; mistakes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import FULL, make_prepared

from haste_dist.config import Config
from haste_dist.errors import ConfigError, DataError
from haste_dist.predict_folder import PAGE, Ranker, find_inputs, plan, read_task, tokens_task, write_task
from haste_dist.predictor import ModelFiles, Predictor
from haste_dist.train import train
from haste_dist.use_config import PredictConfig
from haste_dist.world import join_world
from haste_launch import cli

SECONDS = 120


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_prepared(tmp_path_factory.mktemp("run"), labels=101, texts=256, overrides=["train.max_steps=24"])
    train(config, join_world("cpu"))
    return config


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(0, 200, rng.integers(1, 12))) for _ in range(count)]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Three files of different kinds, of which one has uids."""
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts(50, 1), "uid": [f"u{i}" for i in range(50)]}), folder / "a.parquet", row_group_size=7)
    with pa.ipc.new_file(str(folder / "b.arrow"), pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": texts(20, 2)}))
    (folder / "c.jsonl").write_text("".join(json.dumps({"title": text}) + "\n" for text in texts(33, 3)))
    (folder / "_SUCCESS").touch()
    return folder


def run_stages(job: Any, parts: int = 1) -> list[dict[str, Any]]:
    """The pipeline's tasks one after another, without Ray."""
    ranker = Ranker(job, "cpu", 1)
    told = []
    for i in range(len(job.inputs)):
        for batch in read_task(pa.table({"file": [i]}), job):
            told += write_task(ranker(tokens_task(batch, job)), job).to_pylist()
    return told


def read_out(out: Path, file: int) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob(f"part-{file:05d}-*.parquet"))])


def check_against_predictor(trained: Config, out: Path, file: int, given: list[str], k: int) -> None:
    expected = Predictor(trained.run.folder, device="cpu").predict(given, k)
    found = read_out(out, file)
    assert found["text"].to_pylist() == given
    assert found["labels"].to_pylist() == [[one.label for one in ranked] for ranked in expected]
    assert found["label_texts"].to_pylist() == [[one.text for one in ranked] for ranked in expected]
    for ours, theirs in zip(found["scores"].to_pylist(), expected, strict=True):
        assert ours == pytest.approx([one.score for one in theirs], rel=1e-5)


def test_every_kind_of_input_in_parts(trained: Config, inputs: Path, tmp_path: Path) -> None:
    job = plan(ModelFiles(trained.run.folder), inputs, tmp_path / "out", 4, PredictConfig(rows=16, batch_size=5))
    told = run_stages(job)
    assert {one["error"] for one in told} == {""}
    assert [one["texts"] for one in told] == [16, 16, 16, 2, 16, 4, 16, 16, 1]
    for file, (count, seed) in enumerate(((50, 1), (20, 2), (33, 3))):
        check_against_predictor(trained, tmp_path / "out", file, texts(count, seed), 4)
    assert read_out(tmp_path / "out", 0)["uid"].to_pylist() == [f"u{i}" for i in range(50)]
    assert read_out(tmp_path / "out", 1)["uid"].to_pylist() == [None] * 20


def test_finished_parts_are_kept_and_others_made(trained: Config, inputs: Path, tmp_path: Path) -> None:
    job = plan(ModelFiles(trained.run.folder), inputs, tmp_path / "out", 4, PredictConfig(rows=16))
    run_stages(job)
    kept, lost = job.part(0, 0), job.part(0, 2)
    before, expected = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    told = run_stages(plan(ModelFiles(trained.run.folder), inputs, tmp_path / "out", 4, PredictConfig(rows=16)))
    assert [one["fresh"] for one in told] == [False, False, True, False, False, False, False, False, False]
    assert sum(one["texts"] for one in told) == 103
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == expected
    job.part(1, 0).write_bytes(b"PAR1 damaged")
    assert "part-00001-00000.parquet: cannot be read" in run_stages(job)[4]["error"]


def test_a_bad_text_is_named_and_what_came_before_it_is_kept(trained: Config, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(20)) + "{}\n")
    job = plan(ModelFiles(trained.run.folder), file, tmp_path / "out", 4, PredictConfig(rows=8))
    told = run_stages(job)
    assert [one["texts"] for one in told] == [8, 8, 0]
    assert "in.jsonl:21: has neither 'text' nor 'title'" in told[-1]["error"]


def test_filtered_labels_make_room_for_the_next(trained: Config, tmp_path: Path) -> None:
    given, k = texts(20), 4
    (tmp_path / "in.txt").write_text("\n".join(given))
    plain = Predictor(trained.run.folder, device="cpu").topk(given, k + 2)[0]
    pairs = {(3, int(plain[3, 0])), (3, int(plain[3, 2])), (17, int(plain[17, 1])), (5, 100)}
    (tmp_path / "filter.txt").write_text("".join(f"{row} {label}\n" for row, label in pairs))
    settings = PredictConfig(rows=8, filter=str(tmp_path / "filter.txt"))
    run_stages(plan(ModelFiles(trained.run.folder), tmp_path / "in.txt", tmp_path / "out", k, settings))
    found = read_out(tmp_path / "out", 0)["labels"].to_pylist()
    for row, labels in enumerate(plain.tolist()):
        assert found[row] == [label for label in labels if (row, label) not in pairs][:k]


def test_label_texts_and_calibration_by_setting(trained: Config, tmp_path: Path) -> None:
    from haste_dist.calibration import FILE, Calibration
    from haste_dist.sealed import seal

    files = ModelFiles(trained.run.folder)
    (tmp_path / "in.txt").write_text("\n".join(texts(5)))
    page = Path(trained.run.folder) / FILE
    page.write_bytes(seal({"checkpoint": files.version, "scale": 0.5, "offset": -1.0}))
    try:
        scores = {}
        for calibrated in (True, False):
            out = tmp_path / f"out-{calibrated}"
            settings = PredictConfig(label_texts=False, calibrated=calibrated)
            run_stages(plan(ModelFiles(trained.run.folder), tmp_path / "in.txt", out, 3, settings))
            found = read_out(out, 0)
            assert found.column_names == ["uid", "text", "labels", "scores"]
            scores[calibrated] = np.array(found["scores"].to_pylist())
    finally:
        page.unlink()
    logits = np.log(scores[False] / (1 - scores[False]))
    np.testing.assert_allclose(scores[True], Calibration(0.5, -1.0)(logits), rtol=1e-4)


def test_mistakes_are_told_before_anything_starts(trained: Config, inputs: Path, tmp_path: Path) -> None:
    files = ModelFiles(trained.run.folder)
    with pytest.raises(DataError, match="no such file or folder"):
        find_inputs(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no texts in it"):
        find_inputs(tmp_path / "empty")
    with pytest.raises(ConfigError, match="count the texts of one file"):
        plan(files, inputs, tmp_path / "out", 4, PredictConfig(filter="x"))
    with pytest.raises(ConfigError, match=r"is not empty and holds no _predictions\.json"):
        plan(files, inputs, inputs, 4, PredictConfig())
    plan(files, inputs, tmp_path / "out", 4, PredictConfig())
    (tmp_path / "out" / PAGE).rename(tmp_path / "out" / "predictions.json")  # as it was called
    with pytest.raises(ConfigError, match="of another question"):
        plan(files, inputs, tmp_path / "out", 5, PredictConfig())
    assert (tmp_path / "out" / "predictions.json").exists()  # somebody else's stays as it is
    plan(files, inputs, tmp_path / "out", 4, PredictConfig())
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PAGE]
    with pytest.raises(ConfigError, match=r"of another question \(k, rows differ\)"):
        plan(files, inputs, tmp_path / "out", 5, PredictConfig(rows=3))


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_with_labels_shared_by_two(
    trained: Config, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there already comes from the stages without Ray, or, in the long form, from a command that is killed."""
    many = texts(4000 if FULL else 300, 4)
    (inputs / "a.parquet").unlink()
    pq.write_table(pa.table({"text": many}), inputs / "a.parquet")
    out = tmp_path / "out"
    words = ["predict", trained.run.folder, "--input", str(inputs), "--output", str(out), "-k", "4", "predict.rows=100"]
    words += ["predict.parts=2", "launch.ranks=2"]
    if FULL:
        first = subprocess.Popen([sys.executable, "-m", "haste_launch.cli", *words], start_new_session=True, stderr=subprocess.DEVNULL)
        end = time.monotonic() + SECONDS
        while len(list(out.glob("part-*.parquet"))) < 2:
            assert time.monotonic() < end
            assert first.poll() is None
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    else:
        job = plan(ModelFiles(trained.run.folder), inputs, out, 4, PredictConfig(rows=100, parts=2))
        for batch in read_task(pa.table({"file": [2]}), job):
            write_task(Ranker(dataclasses.replace(job, settings=PredictConfig(rows=100)), "cpu", 1)(tokens_task(batch, job)), job)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert kept
    capsys.readouterr()
    assert cli.main(words) == 0
    assert f"{out}: {len(many) // 100 + 2} parts; " in capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    check_against_predictor(trained, out, 0, many, 4)
    check_against_predictor(trained, out, 2, texts(33, 3), 4)
    assert json.loads((out / PAGE).read_text())["texts"] == len(many) + 53
