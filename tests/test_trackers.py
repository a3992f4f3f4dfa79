"""Trackers: the same numbers everywhere, a resumed run in the same tracked run, and no run that a tracker can stop."""

import importlib.util
import json
from pathlib import Path

import pytest
from ray_nodes import wait_for

from haste_dist import trackers
from haste_dist.config import Config, load_config
from haste_dist.errors import ConfigError, HasteError
from haste_dist.runlog import RunLog
from haste_dist.trackers import Guarded, check_trackers, open_trackers


class Recorder:
    """Keeps what it is told; fails from the ``fails_at``-th call on."""

    def __init__(self, fails_at: int = 99):
        self.seen: list[tuple[int, dict]] = []
        self.closed, self._left = False, fails_at

    def numbers(self, step: int, values: dict) -> None:
        self._left -= 1
        if self._left <= 0:
            raise ConnectionError("the server is gone\nfor good")
        self.seen.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def config_for(folder: Path, *loggers: str) -> Config:
    folder.mkdir(exist_ok=True)
    return load_config(None, [f"run.folder={folder}", f"run.loggers=[{','.join(loggers)}]"])


def test_numbers_of_steps_reach_every_tracker(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    with RunLog(tmp_path, trackers=[first, second]) as log:
        log.step(step=3, epoch=0.5, loss=1.5, note="words", ok=True)
        log.event("eval", step=3, split="test", **{"P@1": 0.25})
        log.event("failure", reason="no step")
    assert first.seen == second.seen == [(3, {"step/loss": 1.5}), (3, {"eval-test/P@1": 0.25})]
    assert first.closed
    assert second.closed


def test_a_tracker_that_fails_costs_a_warning(tmp_path: Path) -> None:
    broken = Recorder(fails_at=2)
    log = RunLog(tmp_path, trackers=[Guarded("MLflow", broken)])
    log.step(step=0, loss=1.0)
    with pytest.warns(UserWarning, match=r"MLflow takes no more numbers of this run \(the server is gone\)") as said:
        [log.step(step=step, loss=1.0) for step in range(1, 5)]
    log.close()
    assert len(said) == 1
    assert [step for step, _ in broken.seen] == [0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_names_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(None, []).run.loggers == ["tensorboard"]
    assert open_trackers(config_for(tmp_path), 0) == []
    for words in ("[tensorbord]", "[wandb,wandb]"):
        with pytest.raises(ConfigError, match="each once, of tensorboard, mlflow, wandb"):
            load_config(None, [f"run.loggers={words}"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"of mlflow is not installed; pip install 'haste-dist\[mlflow\]'"):
        check_trackers(config_for(tmp_path, "mlflow"))


def test_a_tracker_that_does_not_open_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_server(*_: object) -> Recorder:
        raise ConnectionError("no server\nmore words")

    monkeypatch.setitem(trackers.OPENERS, "mlflow", no_server)
    with pytest.raises(HasteError, match=r"mlflow does not take the run \(no server\); mend its settings, or leave it out"):
        open_trackers(config_for(tmp_path, "mlflow"), 0)


def test_mlflow_keeps_the_run_across_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install 'haste-dist[mlflow]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    config = config_for(tmp_path / "run", "mlflow")
    for step in (1, 2):
        with RunLog(tmp_path / "run", trackers=open_trackers(config, step)) as log:
            log.event("eval", step=step, split="test", **{"P@1": step / 4})
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    client = MlflowClient()
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["output.group_size"] == "32"
    assert [(one.step, one.value) for one in client.get_metric_history(run_id, "eval-test/P_at_1")] == [(1, 0.25), (2, 0.5)]
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_wandb_keeps_the_run_across_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'haste-dist[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_for(tmp_path / "run", "wandb")
    for step in (1, 2):
        with RunLog(tmp_path / "run", trackers=open_trackers(config, step)) as log:
            log.step(step=step, loss=0.5)
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    kept = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert kept
    wait_for(lambda: all(b"step/loss" in file.read_bytes() for file in kept), 30)  # its own process writes
