"""``haste sweep``: trials of one config, one after the other on the whole cluster, the best settings first in the table.

``OUT/trials.jsonl`` is the whole state: a line when a trial starts, one when it ends. Optuna is told the ended ones and asked for the
next; a trial that was interrupted is trained on from its checkpoint. The objective is the best ``train.metric`` of a run's evaluations.
"""

import csv
import json
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from haste_dist.config import Config, load_config
from haste_dist.errors import ConfigError, DataError, HasteError, Interrupted
from haste_dist.manifest import read_manifest, writable_folder
from haste_dist.mirror import local_copy
from haste_dist.runlog import read_events
from haste_dist.sources import find_source
from haste_launch.ray_session import ray_session
from haste_launch.ray_train import absolute_paths, run_ranks
from haste_launch.sweep_space import Varied, combinations, needs_prepare, read_varied

STATE, TABLE = "trials.jsonl", "sweep.csv"
TRIALS = 20
TABLE_WIDTH = 132  # where the output is no terminal
MOST_FAILURES = 3  # in a row at the start: then the sweep is wrong, not the trial


@dataclass
class Trial:
    """``value`` is None while it runs, and where it failed; ``note`` says why."""

    number: int
    settings: dict[str, Any]
    value: float | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def ended(self) -> bool:
        return self.value is not None or bool(self.note)


def sweep(args: Namespace) -> int:
    """Runs the trials that are missing, prints the table, draws the plot. Raises HasteError, and Interrupted after Ctrl-C."""
    varied, out = read_varied(args.vary), Path(args.out)
    for one in varied:  # names and values fail here, before anything starts
        for value in one.words or (int(one.low), int(one.high)) if one.whole else one.words or (one.low, one.high):
            load_config(args.config, [*args.overrides, one.word(value)])
    writable_folder(out, "choose another --out")
    same_sweep(out, varied)
    total = args.trials or combinations(varied) or TRIALS
    trials = read_trials(out / STATE)
    config = load_config(args.config, args.overrides)
    if needs_prepare(varied, config.data.dev_fraction) and all(one.name != "data.source" for one in varied):
        check_source(config)
    try:
        with ray_session(config):
            while (trial := next_trial(trials, varied, total, config.run.seed)) is not None:
                write_trial(out / STATE, trial)
                run_trial(args, varied, trial, out)
                write_trial(out / STATE, trial)
                said = trial.note or f"{config.train.metric} {100 * (trial.value or 0.0):.2f}"
                print(f"trial {trial.number + 1} of {total}: {words_of(varied, trial)}: {said} ({trial.seconds:.0f} s)", flush=True)
                if all(one.note for one in trials) and len(trials) >= MOST_FAILURES:
                    raise HasteError(f"the first {len(trials)} trials failed, the last one so: {trial.note}")
    finally:
        if any(trial.value is not None for trial in trials):
            report(trials, varied, out, config.train.metric)
    return 0


def check_source(config: Config) -> None:
    """Raises ConfigError where the prepared folder was made of other files than ``data.source`` names: trials would prepare those."""
    try:
        made_of = read_manifest(local_copy(config.data.prepared)).source.get("files", [])
    except (ConfigError, DataError):  # there is none, which no trial needs
        return
    if {(file["name"], file["bytes"]) for file in made_of} != {(file.name, file.size()) for file in find_source(config.data).files()}:
        raise ConfigError(
            f"data.source={config.data.source}: data.prepared={config.data.prepared} was made of other files; "
            "name its own, for with these settings each trial prepares data of its own"
        )


def next_trial(trials: list[Trial], varied: list[Varied], total: int, seed: int) -> Trial | None:
    """The interrupted trial, or a new one (appended to ``trials``), or None when there are enough."""
    if (open_one := next((trial for trial in trials if not trial.ended), None)) is not None:
        return open_one
    if len(trials) >= total:
        return None
    trial = Trial(len(trials), choose(trials, varied, total, seed))
    trials.append(trial)
    return trial


def choose(trials: list[Trial], varied: list[Varied], total: int, seed: int) -> dict[str, Any]:
    """Settings that Optuna wants to see next: of lists alone every combination once, if there are trials enough; else its tree-structured
    Parzen estimator, a pure function of the seed and the ended trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {one.name: _distribution(one) for one in varied}
    grid = {one.name: list(one.words) for one in varied}
    every = combinations(varied)
    if every and total >= every:
        done = [tuple(trial.settings[one.name] for one in varied) for trial in trials]
        missing = [cell for cell in _cells(list(grid.values())) if cell not in done]
        if missing:
            return dict(zip(grid, missing[0], strict=True))
    sampler = optuna.samplers.TPESampler(seed=seed + len(trials), multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        state = optuna.trial.TrialState.COMPLETE if trial.value is not None else optuna.trial.TrialState.FAIL
        study.add_trial(optuna.trial.create_trial(state=state, params=trial.settings, distributions=space, value=trial.value))
    return dict(study.ask(space).params)


def run_trial(args: Namespace, varied: list[Varied], trial: Trial, out: Path) -> None:
    """Trains it and fills in how it went. Raises Interrupted if somebody asked to stop: then it stays open."""
    started, folder = time.monotonic(), out / f"trial-{trial.number:04d}"
    words = [one.word(trial.settings[one.name]) for one in varied]
    try:
        config = load_config(args.config, [*args.overrides, *words, f"run.folder={folder}"])
        if needs_prepare(varied, config.data.dev_fraction):
            config.data.prepared = str(folder / "prepared")
            from haste_dist.prepare import prepare

            prepare(config)
        train_trial(absolute_paths(config))
        trial.value = value_of(folder)
    except Interrupted:
        raise
    except HasteError as error:
        trial.note = str(error)
    trial.seconds = round(time.monotonic() - started, 1)


def train_trial(config: Config) -> None:
    from haste_dist.preflight import check_run

    check_run(config)
    if run_ranks(config, "train", {}):
        raise Interrupted("the sweep stopped, everything is saved; the same command goes on from there")


def value_of(folder: Path) -> float:
    """The best metric that a finished run reached. Raises HasteError for a run without an evaluation."""
    ends = [event for event in read_events(folder) if event["event"] == "end"]
    if not ends or ends[-1]["best"] is None or ends[-1]["best"] < 0:
        raise HasteError(f"{folder}: no evaluation, so no {STATE} value")
    return float(ends[-1]["best"])


def same_sweep(out: Path, varied: list[Varied]) -> None:
    """Keeps what varies; a folder holds one sweep. Raises HasteError."""
    path = out / "sweep.json"
    page = [asdict(one) for one in varied]
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(page)):
        raise HasteError(f"{out}: holds a sweep over something else; name another folder by --out")
    path.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


def read_trials(path: Path) -> list[Trial]:
    """The trials as their last lines tell them; a torn last line is left out."""
    found: dict[int, Trial] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        if line.endswith("\n"):
            trial = Trial(**json.loads(line))
            found[trial.number] = trial
    return [found[number] for number in sorted(found)]


def write_trial(path: Path, trial: Trial) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(trial)) + "\n")


def report(trials: list[Trial], varied: list[Varied], out: Path, metric: str) -> None:
    """Best first, as a table on stdout, ``sweep.csv`` and ``sweep.png``."""
    import sys

    from rich.console import Console
    from rich.table import Table

    from haste_launch.sweep_plot import plot_sweep

    names = [one.name for one in varied]
    ranked = sorted(
        (trial for trial in trials if trial.ended), key=lambda trial: -1.0 if trial.value is None else trial.value, reverse=True
    )
    table = Table("trial", metric, *names, "seconds", "note", box=None, pad_edge=False)
    with (out / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", metric, *names, "seconds", "note"])
        for trial in ranked:
            value = "" if trial.value is None else f"{100 * trial.value:.2f}"
            settings = [one.word(trial.settings[one.name]).partition("=")[2] for one in varied]
            row = [f"trial-{trial.number:04d}", value, *settings, f"{trial.seconds:.0f}", trial.note]
            writer.writerow(row)
            table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False, markup=False).print(table)
    print(plot_sweep(out, trials, varied, metric))


def words_of(varied: list[Varied], trial: Trial) -> str:
    return " ".join(one.word(trial.settings[one.name]) for one in varied)


def _cells(lists: list[list[str]]) -> list[tuple[str, ...]]:
    from itertools import product

    return list(product(*lists))


def _distribution(one: Varied) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if one.is_list:
        return CategoricalDistribution(one.words)
    if one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)
