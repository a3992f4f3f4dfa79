"""Tile choices that were measured on this machine: a JSON file a GPU model and Triton version, read once, written by ``tune``.

``haste bench kernels --tune`` measures. A step never stops to: where nothing was tuned, the kernels' own tables serve. The file lies in
$HASTE_CACHE, else in $XDG_CACHE_HOME/haste_dist, else in ~/.cache/haste_dist. One that cannot be read, or names a tile that is no
candidate any more, is as none.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

Config = TypeVar("Config")


_chosen: dict[tuple[str, str], Any] = {}


@dataclass(frozen=True)
class Tuned(Generic[Config]):
    """What was measured: the fastest, and the milliseconds of all that ran."""

    best: Config
    times: dict[Config, float]


def chosen(kernel: str, key: str, candidates: tuple[Config, ...]) -> Config | None:
    """The tuned candidate for ``kernel`` at ``key``, or None."""
    try:
        return _chosen[kernel, key]  # a step asks each time; to hash the candidates too would take longer than all the rest
    except KeyError:
        fields = _read(str(path())).get(f"{kernel} {key}")
        found = next((c for c in candidates if asdict(c) == fields), None)  # type: ignore[call-overload]
        return _chosen.setdefault((kernel, key), found)


def tune(kernel: str, key: str, candidates: Sequence[Config], milliseconds: Callable[[Config], float]) -> Tuned[Config]:
    """Measures each candidate and remembers the fastest on disk, of equal ones the first. One that fails to run is passed over.

    The table's own choice may be among them though ``chosen`` knows it not: if it wins, the file names no candidate, and the table serves.
    """
    times: dict[Config, float] = {}
    failure: Exception | None = None
    for config in candidates:
        try:
            times[config] = milliseconds(config)
        except Exception as error:  # whatever a tile that is too large raises in this version of Triton
            failure = error
            torch.cuda.synchronize()
    if not times:
        why = f": {type(failure).__name__}: {failure}" if failure else ""
        raise RuntimeError(f"{kernel} {key}: none of {len(candidates)} tiles runs here{why}") from failure
    best = min(times, key=times.__getitem__)
    remember(kernel, key, best)
    return Tuned(best, times)


def remember(kernel: str, key: str, config: Any) -> None:
    """Adds one choice to the file."""
    forget()  # another process may have added choices meanwhile
    keep({**kept(), f"{kernel} {key}": asdict(config)})


def kept() -> dict[str, Any]:
    """All choices in the file, by kernel and key."""
    return dict(_read(str(path())))


def keep(choices: dict[str, Any]) -> None:
    """Makes ``choices`` the file; it is replaced whole, so a reader never sees half of it."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
        json.dump(choices, new, indent=1, sort_keys=True)
    os.replace(new.name, file)
    forget()


def forget() -> None:
    """The file is read again when next asked for."""
    _read.cache_clear()
    _chosen.clear()


@contextmanager
def compile_only() -> Iterator[None]:
    """Within, a launch compiles the kernel into Triton's cache on disk and runs nothing: tensors may lie on the meta device.

    Sizes, strides and types are the real ones, so what is compiled is what a launch with real tensors takes from the cache.
    """
    import triton

    run = triton.JITFunction.run

    def compile_(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **{**kwargs, "warmup": True})

    triton.JITFunction.run = compile_  # type: ignore[method-assign]
    try:
        yield
    finally:
        triton.JITFunction.run = run  # type: ignore[method-assign]


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
