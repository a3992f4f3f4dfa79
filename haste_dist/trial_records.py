"""A study's runs as records: a line a finished run in ``<topic>.jsonl``, whenever it finished, and never two."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haste_dist.classifier import embedding_width
from haste_dist.config import ENCODER_FOLDER
from haste_dist.errors import DataError
from haste_dist.manifest import first_line
from haste_dist.metrics import FREQUENCY_BINS
from haste_dist.records import append_record
from haste_dist.runlog import read_events
from haste_dist.trials import Study, Trial, read_result

METRICS = {f"{name}@{k}": f"{name.lower()}_at_{k}" for name in ("P", "PSP", "nDCG") for k in (1, 3, 5)}
METRICS |= {name: name for name in (f"r_at_5_freq_{bin}" for _, _, bin in FREQUENCY_BINS)}
SAME = ("study", "case", "seed", "split", "commit", "date")  # lines that have these in common are of one run


def append_trials(study: Study, trials: Sequence[Trial], folder: str | Path) -> int:
    """Appends a line for each finished one of ``trials`` that has none in ``folder`` yet; returns how many. Raises DataError."""
    there = {_key(line) for line in _lines(Path(folder) / f"{study.topic}.jsonl")}
    count = 0
    for trial in trials:
        result = read_result(trial)
        if result is None:
            continue
        figures = _figures(study, trial, result)
        if _key({**figures, **result}) in there:
            continue
        measured = {"gpu": "", "gpus": int(result["device"] == "cuda"), **result}  # results of earlier versions do not name the GPU
        provider, shape = _provider(trial), _shape(trial)
        try:
            append_record(study.topic, provider, shape, figures, folder, measured=measured)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
        count += 1
    return count


def _figures(study: Study, trial: Trial, result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {ours: round(result[name], 5) for name, ours in METRICS.items() if name in result}
    return {
        **{name: value for name, value in found.items() if math.isfinite(value)},
        "output_bytes": result["output_bytes"],
        "step_p50_ms": round(result["step_p50_ms"], 2),
        "train_seconds": round(result["train_seconds"], 1),
        "steps": result["step"],
        "epochs": trial.config.train.epochs,
        "peak_gib": round(result["peak_gib"], 3),
        "seed": trial.seed,
        "study": study.name,
        "case": trial.case,
        "split": result["split"],
        "note": f"haste study, {_what(trial)}; {' '.join([*study.settings, *study.all_cases[trial.case]]) or 'no settings of its own'}",
    }


def _what(trial: Trial) -> str:
    if not trial.members:
        return "last checkpoint"
    return f"mean of the weights of seeds {', '.join(str(member.seed) for member in trial.members)}"


def _provider(trial: Trial) -> str:
    output = trial.config.output
    if output.head_fraction == 1:
        return "dense_width_f" if trial.config.encoder.project else "dense"
    return "per_label_ffi" if output.group_size == 1 else "haste_dist"


def _shape(trial: Trial) -> dict[str, int]:
    """L, N, D, of a sparse tail F and G, and W: a study's run is of one rank."""
    config = trial.config
    trained = trial.members[0] if trial.members else trial
    start = next(event for event in read_events(trained.folder) if event["event"] == "start")
    try:
        hidden = int(json.loads((trial.folder / ENCODER_FOLDER / "config.json").read_text(encoding="utf-8"))["hidden_size"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{trial.folder / ENCODER_FOLDER}: cannot be read ({first_line(error)})") from None
    tail = {} if config.output.head_fraction == 1 else {"F": config.output.fan_in, "G": config.output.group_size}
    return {"L": int(start["labels"]), "N": config.train.batch_size, "D": embedding_width(config.encoder, hidden), **tail, "W": 1}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in SAME)
