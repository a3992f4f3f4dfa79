"""Trackers: where a run's numbers are drawn, besides metrics.jsonl: TensorBoard, MLflow, Weights & Biases (run.loggers).

MLflow and Weights & Biases are reached as their own variables say (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME; WANDB_API_KEY,
WANDB_PROJECT, WANDB_MODE), which must be set where ranks run. A run that is resumed goes on in the same tracked run: its id is kept in
trackers.json in the run folder. Once training is under way, a tracker that fails costs a warning and its later numbers, never the run.
"""

import importlib.util
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from haste_dist.config import Config
from haste_dist.errors import ConfigError, HasteError

IDS = "trackers.json"
EXPERIMENT = "haste"  # where the environment names none


class Tracker(Protocol):
    """Takes numbers by name as they come."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """Raises ConfigError for a tracker whose package is missing."""
    for name in config.run.loggers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.loggers: the package of {name} is not installed; pip install 'haste-dist[{name}]'")


def open_trackers(config: Config, first_step: int) -> list[Tracker]:
    """The trackers of ``run.loggers``; ``first_step`` is where the run goes on. Raises HasteError for one that does not answer."""
    folder, opened = Path(config.run.folder), []
    for name in config.run.loggers:
        try:
            opened.append(OPENERS[name](config, folder, first_step))
        except HasteError:
            raise
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise HasteError(f"run.loggers: {name} does not take the run ({said[:300]}); mend its settings, or leave it out") from None
    return opened


class TensorBoard:
    """``folder/tensorboard``; of a resumed run hides what the earlier process drew at or after ``first_step``."""

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports TensorBoard: a second that `haste --help` need not wait

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (haste), with every setting as a parameter."""

    def __init__(self, config: Config, folder: Path) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        self._id = read_id(folder, "mlflow")
        if self._id:
            self._client.update_run(self._id, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        keep_id(folder, "mlflow", self._id)
        settings = [Param(key, str(value)) for key, value in flat(config).items()]
        for first in range(0, len(settings), 100):  # the most a request may hold
            self._client.log_batch(self._id, params=settings[first : first + 100])

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        batch = [self._metric(re.sub(r"[^\w\-. :/]", "_at_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=batch)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class WandB:
    """A run of the project WANDB_PROJECT (haste), with every setting in its config."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        run_id = read_id(folder, "wandb")
        settings = wandb.Settings(console="off", silent=True)
        project = os.environ.get("WANDB_PROJECT", EXPERIMENT)
        self._run = wandb.init(
            project=project, name=folder.name, id=run_id or None, resume="allow", dir=str(folder), config=flat(config), settings=settings
        )
        keep_id(folder, "wandb", self._run.id)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        # Its own step only counts up; ours repeats after a resume, so it is a number like the others.
        self._run.log({**values, "trainer/step": step})

    def close(self) -> None:
        self._run.finish()


class Guarded:
    """A tracker whose failures are told once and then cost its numbers only."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._broken = False

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.numbers(step, values))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:
            self._broken = True
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"{self._name} takes no more numbers of this run ({said[:300]}); metrics.jsonl has them all", stacklevel=3)


OPENERS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": lambda _, folder, first_step: TensorBoard(folder, first_step),
    "mlflow": lambda config, folder, _: Guarded("MLflow", MLflow(config, folder)),
    "wandb": lambda config, folder, _: Guarded("Weights & Biases", WandB(config, folder)),
}


def flat(config: Config) -> dict[str, Any]:
    """Settings by their whole names."""
    return {f"{part}.{name}": value for part, section in asdict(config).items() for name, value in section.items()}


def read_id(folder: Path, tracker: str) -> str:
    """The id under which a tracker knows this run, or nothing."""
    path = folder / IDS
    return str(json.loads(path.read_text(encoding="utf-8")).get(tracker, "")) if path.is_file() else ""


def keep_id(folder: Path, tracker: str, run_id: str) -> None:
    path = folder / IDS
    page = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**page, tracker: run_id}) + "\n", encoding="utf-8")
