"""The log of a run: one JSON line an event in ``metrics.jsonl``, the numbers mirrored to trackers (TensorBoard and others).

Each line is flushed as it is written, so a killed run loses at most the line it was writing. A resumed run appends to the
same file; where it repeats steps, readers let the later line win.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from haste_dist.errors import DataError

if TYPE_CHECKING:
    from haste_dist.trackers import Tracker

FILE = "metrics.jsonl"


class RunLog:
    """Writes ``folder/metrics.jsonl`` and passes numbers to ``trackers``, which it closes; with ``enabled`` False (ranks other than 0)
    every call does nothing.

    Values are numbers, strings, booleans, None, or scalars of numpy or torch; a number that is not finite is written as null.
    """

    def __init__(self, folder: str | Path, enabled: bool = True, trackers: Sequence["Tracker"] = ()) -> None:
        self._file: BinaryIO | None = None
        self._trackers = trackers
        if not enabled:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / FILE, "ab")  # noqa: SIM115  closed by close()
        _blank_torn_line(folder / FILE)

    def step(self, **values: Any) -> None:
        """One training step: ``step`` (int) and any numbers."""
        self.event("step", **values)

    def event(self, name: str, **values: Any) -> None:
        """One line ``{"event": name, ..., "time": seconds since 1970}``; with a ``step``, numbers go to trackers as ``name/key``."""
        if self._file is None:
            return
        plain = {key: _plain(value) for key, value in values.items()}
        line = json.dumps({"event": name, **plain, "time": round(time.time(), 3)}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._trackers and isinstance(plain.get("step"), int):
            prefix = f"{name}-{plain['split']}" if "split" in plain else name
            numbers = {
                f"{prefix}/{key}": value
                for key, value in plain.items()
                if key not in ("step", "epoch") and isinstance(value, int | float) and not isinstance(value, bool)
            }
            for tracker in self._trackers:
                tracker.numbers(plain["step"], numbers)

    def close(self) -> None:
        """Closes the file and the trackers; the log ignores later events."""
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()
        self._file, self._trackers = None, ()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a ``metrics.jsonl`` (or of the run folder that holds one), in the order written.

    A torn last line (the process was killed while writing it) is left out. Raises DataError for a missing file or any other bad line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; has this run been trained?") from None
    events = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict):
                raise ValueError("not an object")
        except ValueError:
            if number == len(lines):  # no newline behind it
                break
            raise DataError(f"{path}:{number}: not a JSON object") from None
        events.append(event)
    return events


def _blank_torn_line(path: Path) -> None:
    """A line without its newline would run into the next one; it becomes blank, so that the file never shrinks under a follower."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.seek(end)
            file.write(b" " * (len(data) - end) + b"\n")


def _plain(value: Any) -> Any:
    """A JSON value; ``.item()`` turns scalars of numpy and torch into Python's."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return value


def seconds_trained(events: Sequence[dict[str, Any]]) -> float:
    """How long a run was at work, over all its starts, from each one's first line to its last; loading is not counted."""
    total, began, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == "start":
            total += 0.0 if began is None else last - began
            began = event["time"]
        last = event["time"]
    return total + (0.0 if began is None else last - began)
