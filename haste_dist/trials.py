"""A study of accuracy: named cases of settings, each trained from several seeds, and what is kept of each run.

A study is a YAML page:

    config: wordnet                        what ``haste train`` takes
    settings: [train.epochs=12]            a.b=c of every case
    seeds: [0, 1, 2]
    split: test                            test, or dev: then data.dev_fraction says how much of the training texts is held out
    topic: wordnet-lemma                   the data set's name in records; by default the config's
    cases:                                 a.b=c of each; the first is what the others are compared with
      default: []
      dense: [output.head_fraction=1]
    average: 3                             so many seeds' weights of each case are averaged too (averaging.py), as CASE-average
    keep_weights: true                     checkpoints stay, so that runs can be evaluated, exported or served later

Dev texts are a data set of their own (dev_data.py): label orders and frequencies do not know them. They are the same for all seeds.
The last checkpoint of a run is scored, so that the split chooses nothing. Of a run stay its settings, its log, ``result.json`` and
``texts.parquet`` (what every text of the split adds to each metric's sums, so that intervals can be made by weighing texts anew), and its
checkpoints with ``keep_weights`` alone.

Letters: n texts of the split, M sums of ``Metrics`` and ``FrequencyRecall``.
"""

import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from haste_dist.config import Config, load_config
from haste_dist.dev_data import hold_out, link
from haste_dist.embedder import embedder_of
from haste_dist.errors import ConfigError, DataError
from haste_dist.held_out import leaves_out_dev
from haste_dist.label_groups import GROUPS_FILE, has_label_vectors, head_size, label_order_is_current, load_label_order
from haste_dist.manifest import first_line, read_manifest, replacing
from haste_dist.metrics import FrequencyRecall, Metrics, Propensity, Ragged
from haste_dist.mirror import ORDER_FILES
from haste_dist.page import first_line_of_yaml
from haste_dist.records import stamp
from haste_dist.runlog import read_events, seconds_trained
from haste_dist.sealed import CHECKSUMS

if TYPE_CHECKING:
    from haste_dist.label_embeddings import LabelEmbeddings
    from haste_dist.world import World

RESULT, TEXTS, RESULTS = "result.json", "texts.parquet", "results.parquet"
NAMES = ("config", "settings", "seeds", "split", "topic", "average", "keep_weights", "cases")
AVERAGE = "-average"  # behind the name of a case


@dataclass(frozen=True)
class Study:
    """A study page, checked."""

    config: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    split: str
    cases: dict[str, tuple[str, ...]]
    name: str  # the page's
    topic: str  # of its records
    average: int = 0
    keep_weights: bool = False

    @property
    def baseline(self) -> str:
        return next(iter(self.cases))

    @property
    def all_cases(self) -> dict[str, tuple[str, ...]]:
        """With those of averaged weights, each behind what it is the mean of."""
        if not self.average:
            return self.cases
        return {name: words for case, words in self.cases.items() for name in (case, case + AVERAGE)}


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    case: str
    seed: int  # of averaged weights the first
    config: Config
    members: tuple["Trial", ...] = ()  # whose weights are averaged; none: it is trained

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def has_weights(self) -> bool:
        """Whether the checkpoint that its result is of is still there."""
        from haste_dist import checkpoint

        result, found = read_result(self), checkpoint.newest(self.folder / checkpoint.CHECKPOINTS)
        # The result of a mean tells the steps of its members together.
        return result is not None and found is not None and (bool(self.members) or checkpoint.step_of(found) == result["step"])


def read_study_page(file: str | Path) -> Study:
    """Raises ConfigError, in one line, for a page that is no study."""
    try:
        page = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such study page; give the path of a YAML file with config and cases") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {getattr(error, 'strerror', None) or first_line_of_yaml(error)}") from None
    if not isinstance(page, dict) or set(page) - set(NAMES) or not {"config", "cases"} <= set(page):
        raise ConfigError(f"{file}: a study has config and cases, and may have {', '.join(NAMES[1:-1])}")
    cases, seeds, split = page["cases"], page.get("seeds", [0]), page.get("split", "test")
    lists = [page.get("settings", []), *(cases.values() if isinstance(cases, dict) else [None])]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists) or not cases:
        raise ConfigError(f"{file}: settings and each of the cases are lists of a.b=c, such as dense: [output.head_fraction=1]")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{file}: seeds={seeds}: a list of distinct whole numbers")
    if split not in ("test", "dev"):
        raise ConfigError(f"{file}: split={split}: test or dev")
    bad = [name for name in cases if not isinstance(name, str) or Path(name).name != name or name.startswith(".")]
    if bad:
        raise ConfigError(f"{file}: case '{bad[0]}': a name that can be a folder's")
    topic = page.get("topic", re.sub(r"[^a-z0-9_-]", "-", Path(str(page["config"])).stem.lower()))
    if not isinstance(topic, str) or not re.fullmatch("[a-z0-9][a-z0-9_-]*", topic):
        raise ConfigError(f"{file}: topic={topic}: only lower-case letters, digits, - and _")
    average = page.get("average", 0)
    if type(average) is not int or average < 0 or average == 1 or (average and len(seeds) % average):
        raise ConfigError(
            f"{file}: average={average}: how many seeds' weights are averaged, two or more; {len(seeds)} seeds are no multiple"
        )
    if average and (twice := [name for name in cases if name + AVERAGE in cases]):
        raise ConfigError(f"{file}: case '{twice[0]}{AVERAGE}': is what the mean of {twice[0]}'s seeds is called; choose another name")
    keep = page.get("keep_weights", False)
    if type(keep) is not bool:
        raise ConfigError(f"{file}: keep_weights={keep}: true or false")
    found = {name: tuple(words) for name, words in cases.items()}
    return Study(str(page["config"]), tuple(lists[0]), tuple(seeds), split, found, Path(file).stem, topic, average, keep)


def trials_of(study: Study, out: Path, overrides: list[str]) -> list[Trial]:
    """All runs, seed by seed, so that a study that is cut has whole seeds; averages behind their seeds. ``overrides`` come last.

    Raises ConfigError.
    """
    found: list[Trial] = []
    for place, seed in enumerate(study.seeds, start=1):
        for case, words in study.cases.items():
            config = load_config(study.config, [*study.settings, *words, *overrides])
            if study.average and config.encoder.name == "scratch":
                raise ConfigError(f"average={study.average}: case {case}: encoders from scratch have no mean; leave average out")
            config.run.seed, config.run.folder = seed, os.path.abspath(out / "runs" / f"{case}-{seed}")
            config.evaluate.split = study.split
            if (study.split == "dev") != (config.data.dev_fraction > 0):
                raise ConfigError(
                    f"split={study.split} with data.dev_fraction={config.data.dev_fraction}: dev needs one above 0, test is 0"
                )
            found.append(Trial(case, seed, config))
        if study.average and place % study.average == 0:
            seeds = study.seeds[place - study.average : place]
            for case in study.cases:
                members = tuple(trial for trial in found if trial.case == case and trial.seed in seeds)
                config = copy.deepcopy(members[0].config)
                config.run.folder = os.path.abspath(out / "runs" / f"{case}{AVERAGE}-{seeds[0]}")
                found.append(Trial(case + AVERAGE, seeds[0], config, members))
    return found


def with_label_order(config: Config, out: Path, seed: int, known: "dict[str, LabelEmbeddings] | None" = None) -> Config:
    """The config with a prepared folder whose label order is the one it asks for: the study's own if it will do, or one made under ``out``.

    With a ``data.dev_fraction`` it is one of ``dev_data.hold_out``. Random choices come from ``seed``, the study's first, so that seeds
    of a case share them. Texts are linked, not copied. ``known``: as ``make_label_order`` takes it.
    """
    source = Path(os.path.abspath(config.data.prepared))
    data = dataclasses.replace(config.data, dev_fraction=0.0)  # of a folder that knows no dev text, none is to be left out
    asking = dataclasses.replace(config, data=data, run=dataclasses.replace(config.run, seed=seed))
    if config.data.dev_fraction:
        key = json.dumps([read_manifest(source).fingerprint, str(source), config.data.dev_fraction, seed])
        source = out / "prepared" / f"dev-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        hold_out(Path(os.path.abspath(config.data.prepared)), source, config.data.dev_fraction, seed)
    elif _will_do(config, source):
        return _prepared(config, source)
    manifest = read_manifest(source)
    asked = [manifest.fingerprint, _head(config, manifest.labels), seed, dataclasses.asdict(config.groups), embedder_of(config)]
    if config.output.basis == "labels" and config.output.tail_features:  # whose basis another slice cannot use
        asked.append(config.output.tail_features)
    key = json.dumps(asked, sort_keys=True)
    folder = out / "prepared" / hashlib.sha256(key.encode()).hexdigest()[:12]
    if not label_order_is_current(asking, folder, manifest):
        from haste_dist.label_groups import make_label_order
        from haste_dist.sealed import seal_data

        ours = {*ORDER_FILES, CHECKSUMS}
        for path in source.rglob("*"):
            there = folder / path.relative_to(source)
            if path.is_file() and path.name not in ours and not there.exists():
                link(path, there)
        make_label_order(asking, folder, manifest, known)
        seal_data(folder)
    return _prepared(config, folder.absolute())


def _will_do(config: Config, folder: Path) -> bool:
    """Whether the label order in a prepared folder is the one that the config asks for, whatever its random choices."""
    order, manifest = load_label_order(folder), read_manifest(folder)
    page = json.loads((folder / GROUPS_FILE).read_text(encoding="utf-8"))
    same = all(page.get(name) == value for name, value in dataclasses.asdict(config.groups).items() if name in page and name != "encoder")
    same &= page.get("encoder") == embedder_of(config) and has_label_vectors(config, folder)
    same &= config.output.basis != "labels" or page.get("basis_features", []) == config.output.tail_features
    same &= leaves_out_dev(page, config)
    return same and _head(config, manifest.labels) == (order.group_size, order.head_rows)


def _head(config: Config, labels: int) -> tuple[int, int]:
    return config.output.group_size, head_size(labels, config.output.head_fraction, config.output.group_size)


def _prepared(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=str(folder)))


def run_trial(trial: Trial, study: Study, wants_stop: Callable[[], bool] = lambda: False) -> bool:
    """Trains (or goes on), or averages what its members have trained, and scores on this process's device; writes the result.

    Checkpoints are removed once nothing needs them, unless the ``study`` keeps them. False: it was stopped before its end, and saved.
    Raises HasteError.
    """
    import torch

    from haste_dist.averaging import average_runs
    from haste_dist.checkpoint import CHECKPOINTS
    from haste_dist.train import train
    from haste_dist.world import join_world, leave_world

    config, folder = trial.config, trial.folder
    if config.data.dev_fraction:  # its prepared folder has the dev texts for its test split
        data, evaluate = dataclasses.replace(config.data, dev_fraction=0.0), dataclasses.replace(config.evaluate, split="test")
        config = dataclasses.replace(config, data=data, evaluate=evaluate)
    world = join_world(config.launch.device, config.launch.timeout)
    if trial.members:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # of an attempt that was cut
        average_runs(folder, [member.folder for member in trial.members], "last")
    elif train(config, world, wants_stop).reason == "stopped":
        leave_world()
        return False
    result = {
        "case": trial.case,
        "seed": trial.seed,
        "split": trial.config.evaluate.split,
        "settings": settings_of(trial),
        **_scored(config, world),
        **(_costs_of_members(trial) if trial.members else _costs(folder)),
        "device": str(world.device.type),
        "gpu": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "",
        **stamp(),
    }
    with replacing(folder / RESULT) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    if not study.keep_weights and (trial.members or not study.average):
        for one in (trial, *trial.members):
            shutil.rmtree(one.folder / CHECKPOINTS)
    leave_world()
    return True


def _scored(config: Config, world: "World") -> dict[str, float]:
    """The metrics of the last checkpoint; what each text adds to them is written."""
    from haste_dist.evaluate import load_frequency
    from haste_dist.model import open_prepared
    from haste_dist.scoring import evaluate_run

    prepared = open_prepared(config)
    frequency, rows = load_frequency(prepared.folder), prepared.manifest.splits["train"].rows
    propensity = Propensity(frequency, rows, config.evaluate.propensity_a, config.evaluate.propensity_b)
    metrics, rare = Metrics(propensity), FrequencyRecall(frequency)
    positions: list[NDArray[np.int64]] = []
    sums: list[NDArray[np.float64]] = []

    def keep(texts: NDArray[np.int64], true: Ragged, labels: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        positions.append(texts)
        sums.append(np.concatenate([metrics.per_text(labels, true), rare.per_text(labels, true)], axis=1))

    measured = evaluate_run(config, world, "last", keep)
    at, values = np.concatenate(positions), np.concatenate(sums)
    by_position = np.argsort(at, kind="stable")
    columns = {"text": at[by_position], **{f"sum_{i}": values[by_position, i].astype(np.float32) for i in range(values.shape[1])}}
    with replacing(Path(config.run.folder) / TEXTS) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")
    return {name: value for name, value in measured.items() if name != "seconds"}


def _costs(folder: Path) -> dict[str, float]:
    """Steps, time and memory of a training run, by its log; of one that was trained again, of the last time."""
    events = read_events(folder)
    events = events[max(i for i, event in enumerate(events) if event["event"] == "start" and event["step"] == 0) :]
    steps = [event for event in events if event["event"] == "step"]
    return {
        "step": next(event["step"] for event in reversed(events) if event["event"] == "end"),
        "train_seconds": seconds_trained(events),
        "step_p50_ms": float(np.median([s["step_ms"] for s in steps if "step_ms" in s] or [0.0])),
        "output_bytes": next(event["output_bytes"] for event in events if event["event"] == "start"),
        "peak_gib": max(event.get("peak_gib", 0.0) for event in events if event["event"] == "end"),
    }


def _costs_of_members(trial: Trial) -> dict[str, float]:
    """Those of all members together, and the memory of one."""
    found = [_costs(member.folder) for member in trial.members]
    together = {name: sum(costs[name] for costs in found) for name in ("step", "train_seconds")}
    return {**found[0], "peak_gib": max(costs["peak_gib"] for costs in found), **together}


def settings_of(trial: Trial) -> str:
    """All settings of a run, where it lies and who starts it aside."""
    page = dataclasses.asdict(trial.config)
    for part, names in {"run": ("folder", "resume"), "data": ("source", "prepared", "workers")}.items():
        for name in names:
            del page[part][name]
    del page["launch"], page["checkpoint"]
    return json.dumps(page, sort_keys=True)


def read_result(trial: Trial) -> dict[str, Any] | None:
    """What the run gave, None if it is not finished. Raises DataError if its folder holds another run."""
    path = trial.folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = _completed(result["settings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({first_line(error)}); remove {trial.folder} and run the study again") from None
    if settings != json.loads(settings_of(trial)):
        raise DataError(f"{trial.folder}: holds a run with other settings; remove it or choose another --out")
    return result


def _completed(settings: str) -> dict[str, Any]:
    """A run's settings with those that have come since at their defaults: what it was made with."""
    page, known = json.loads(settings), json.loads(settings_of(Trial("", 0, Config())))
    return {part: {**known.get(part, {}), **values} for part, values in {**known, **page}.items()}


def read_texts(trial: Trial) -> NDArray[np.float64]:
    """(n, M): what every text adds to the sums, by position in the split. Raises DataError."""
    path = trial.folder / TEXTS
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); remove {trial.folder} and run the study again") from None
    return np.stack([table[name].to_numpy() for name in table.column_names if name != "text"], axis=1).astype(np.float64)


def write_results(out: Path, results: list[dict[str, Any]]) -> Path:
    """``results.parquet``: one row a finished run."""
    names = list(dict.fromkeys(name for result in results for name in result))
    with replacing(out / RESULTS) as file:
        pq.write_table(pa.Table.from_pylist([{name: result.get(name) for name in names} for result in results]), file)
    return out / RESULTS
