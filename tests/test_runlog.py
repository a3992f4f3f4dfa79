"""The run log: what is written can be read, torn lines do no harm, TensorBoard gets the numbers; and measured records."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from haste_dist.errors import DataError
from haste_dist.records import append_record
from haste_dist.runlog import RunLog, read_events, seconds_trained
from haste_dist.trackers import TensorBoard


def test_events_come_back_in_order(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as log:
        log.event("start", step=0, device=torch.device("cpu").type, folder=tmp_path)
        log.step(step=1, loss=torch.tensor(2.5), step_ms=np.float32(4), bad=float("nan"))
        assert read_events(tmp_path / "run")[-1]["loss"] == 2.5, "a line is on disk as soon as it is logged"
        log.event("eval", step=1, split="test", **{"P@1": 0.5})
    start, step, evaluation = read_events(tmp_path / "run" / "metrics.jsonl")
    assert (start["event"], start["device"], start["folder"]) == ("start", "cpu", str(tmp_path))
    assert step["event"] == "step"
    assert (step["step"], step["loss"], step["step_ms"], step["bad"]) == (1, 2.5, 4.0, None)
    assert evaluation["P@1"] == 0.5
    assert start["time"] <= evaluation["time"]


def test_a_resumed_run_appends_behind_a_torn_line(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.step(step=1, loss=3.0)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"event": "step", "st')
    assert [event["step"] for event in read_events(tmp_path)] == [1]
    seen = (tmp_path / "metrics.jsonl").stat().st_size
    with RunLog(tmp_path) as log:
        log.step(step=2, loss=2.0)
    behind = (tmp_path / "metrics.jsonl").read_bytes()[seen:]
    assert [json.loads(line)["step"] for line in behind.split(b"\n") if line] == [2], "a reader that follows the file gets whole lines"
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2]


def test_the_seconds_of_all_starts_are_added() -> None:
    times = [("start", 10.0), ("step", 12.0), ("end", 15.5), ("start", 1000.0), ("step", 1003.0), ("start", 2000.0), ("end", 2000.25)]
    assert seconds_trained([{"event": name, "time": at} for name, at in times]) == 5.5 + 3 + 0.25
    assert seconds_trained([]) == 0


def test_disabled_log_leaves_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", enabled=False) as log:
        log.step(step=1, loss=3.0)
        log.event("end")
    assert not (tmp_path / "run").exists()


def test_a_closed_log_ignores_events(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.close()
    log.step(step=1)
    log.close()
    assert read_events(tmp_path) == []


@pytest.mark.parametrize("line", [b"{broken}\n", b"3\n", b"\xff\n"])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"event": "start"}\n' + line + b'{"event": "end"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_events(tmp_path)


def test_a_missing_log_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_events(tmp_path)


def test_numbers_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, trackers=[TensorBoard(tmp_path, 0)]) as log:
        for step in (1, 2, 3):
            log.step(step=step, epoch=0.5, loss=10.0 / step, note="text")
        log.event("eval", step=2, split="test", **{"P@1": 0.25})
    time.sleep(1.1)  # files are read in order of their names, in which a second comes first and then a count: 10 before 9
    with RunLog(tmp_path, trackers=[TensorBoard(tmp_path, 2)]) as log:
        log.step(step=2, loss=7.0)
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(scalars.Tags()["scalars"]) == ["eval-test/P@1", "step/loss"]
    assert [(point.step, point.value) for point in scalars.Scalars("step/loss")] == [(1, 10.0), (2, 7.0)]


def test_records_are_appended(tmp_path: Path) -> None:
    first = append_record("tail_step", "haste_dist", {"L": 10, "N": 2}, {"p50_ms": np.float64(1.5)}, folder=tmp_path)
    append_record("tail_step", "floor", {"L": 10}, {"p50_ms": 0.5, "seed": 3}, folder=tmp_path, gpus=2)
    lines = [json.loads(line) for line in (tmp_path / "tail_step.jsonl").read_text().splitlines()]
    assert lines[0] == first
    assert [(line["provider"], line["p50_ms"]) for line in lines] == [("haste_dist", 1.5), ("floor", 0.5)]
    assert set(lines[0]) == {"topic", "provider", "shape", "p50_ms", "gpu", "gpus", "torch", "triton", "commit", "date"}
    assert lines[0]["torch"] == torch.__version__
    assert lines[1]["gpus"] == 2


def test_a_record_without_git_takes_the_commit_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("HASTE_COMMIT", "abc123")
    assert append_record("topk", "dense", {}, {"p50_ms": 1.0})["commit"] == "abc123"
    assert (tmp_path / "benchmarks/records/topk.jsonl").exists()


@pytest.mark.parametrize(("topic", "figures"), [("../x", {}), ("Tail", {}), ("topk", {"gpu": 1}), ("topk", {"p50_ms": float("inf")})])
def test_a_bad_record_is_refused(tmp_path: Path, topic: str, figures: dict) -> None:
    with pytest.raises(ValueError, match=r"topic|figures|p50_ms"):
        append_record(topic, "dense", {}, figures, folder=tmp_path)
    assert not list(tmp_path.iterdir())
