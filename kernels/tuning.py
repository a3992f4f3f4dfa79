"""Tile choices that were measured on this machine: a JSON file a GPU model and Triton version, read once, written by ``tune``.

A step never stops to measure: where nothing was tuned, the kernels' own tables serve. The file lies in $HASTE_CACHE, else in
$XDG_CACHE_HOME/haste_dist, else in ~/.cache/haste_dist. One that cannot be read, or names a tile that is no candidate any more,
is as none.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

Config = TypeVar("Config")


@functools.cache  # a step asks each time
def chosen(kernel: str, key: str, candidates: tuple[Config, ...]) -> Config | None:
    """The tuned candidate for ``kernel`` at ``key``, or None."""
    fields = _read(str(path())).get(f"{kernel} {key}")
    return next((c for c in candidates if asdict(c) == fields), None)  # type: ignore[call-overload]


def tune(kernel: str, key: str, candidates: Sequence[Config], milliseconds: Callable[[Config], float]) -> tuple[Config, float]:
    """Measures each candidate, remembers the fastest on disk and returns it with its time; one that fails to run is passed over."""
    times: list[tuple[float, int]] = []
    for number, config in enumerate(candidates):
        try:
            times.append((milliseconds(config), number))
        except Exception:  # whatever a tile that is too large raises in this version of Triton
            torch.cuda.synchronize()
    if not times:
        raise RuntimeError(f"{kernel} {key}: none of {len(candidates)} tiles runs here")
    best, number = min(times)
    remember(kernel, key, candidates[number])
    return candidates[number], best


def remember(kernel: str, key: str, config: Any) -> None:
    """Adds one choice to the file; the file is replaced whole, so a reader never sees half of it."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    choices = dict(_read(str(file)))
    choices[f"{kernel} {key}"] = asdict(config)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
        json.dump(choices, new, indent=1, sort_keys=True)
    os.replace(new.name, file)
    _read.cache_clear()
    chosen.cache_clear()


def path() -> Path:
    """The file of this GPU model and this Triton."""
    import triton

    base = os.environ.get("HASTE_CACHE")
    folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "haste_dist"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return folder / f"tiles-{re.sub('[^A-Za-z0-9]+', '-', device)}-triton-{triton.__version__}.json"


@functools.lru_cache(maxsize=4)
def _read(file: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(file).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
