"""Measured figures, one JSON line each under ``benchmarks/records/<topic>.jsonl``; lines are appended and never edited."""

import json
import math
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path("benchmarks/records")
RESERVED = ("topic", "provider", "shape", "gpu", "gpus", "torch", "triton", "commit", "date")


def append_record(
    topic: str,
    provider: str,
    shape: Mapping[str, int],
    figures: Mapping[str, Any],
    folder: str | Path = FOLDER,
    gpus: int | None = None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Appends one record and returns it.

    ``topic`` names the file (lower-case letters, digits, - and _). ``shape`` holds any of L, N, D, F, G, K, W; ``figures`` are
    finite numbers, strings, or lists of them. ``gpus`` is how many GPUs took part (default: all that torch sees, 0 on a CPU). The commit is
    that of the working directory, or ``HASTE_COMMIT`` where there is no git; ``-dirty`` is added if tracked files differ.
    ``measured`` holds gpu, gpus, torch, triton, commit and date of a figure that was measured elsewhere or earlier, in place of these.
    Raises ValueError for a bad topic, a figure under a reserved name, or a number that is not finite.
    """
    import torch

    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", topic):
        raise ValueError(f"topic '{topic}': only lower-case letters, digits, - and _")
    taken = sorted(set(RESERVED) & set(figures))
    if taken:
        raise ValueError(f"figures may not be called {', '.join(taken)}")
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{topic}: {name} is {value}")
    if measured is None:
        cuda = torch.cuda.is_available()
        gpus = (torch.cuda.device_count() if cuda else 0) if gpus is None else gpus
        measured = {"gpu": torch.cuda.get_device_name() if cuda else "", "gpus": gpus, **stamp()}
    where_and_when = {name: measured[name] for name in RESERVED[3:]}
    record = {"topic": topic, "provider": provider, "shape": dict(shape), **figures, **where_and_when}
    line = json.dumps(record, allow_nan=False, default=_scalar).encode() + b"\n"
    path = Path(folder) / f"{topic}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)  # one write in append mode: lines of processes that write at once do not mix
    finally:
        os.close(file)
    return json.loads(line)


def stamp() -> dict[str, str]:
    """What a figure was measured with, and when."""
    import torch

    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"torch": torch.__version__, "triton": package_version("triton"), "commit": _commit(), "date": date}


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    try:
        described = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        # Records written a moment ago do not change what was measured.
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){FOLDER}"], capture_output=True, text=True
        )
    except OSError:
        return os.environ.get("HASTE_COMMIT", "")
    commit = described.stdout.strip() if described.returncode == 0 else ""
    return commit + ("-dirty" if changed.stdout.strip() else "") if commit else os.environ.get("HASTE_COMMIT", "")


def _scalar(value: Any) -> Any:
    """Scalars of numpy and torch."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")
