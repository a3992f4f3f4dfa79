"""Prepare and data.reader=ray without Ray, their tasks run in turn: what tests of many kinds share."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from haste_dist import pipeline, ray_reader
from haste_dist.config import Config, load_config
from haste_dist.ray_reader import RayBatches

LABELS = 40


def run_in_turn(plan: pipeline.Plan, rules: str, workers: int) -> Iterator[dict[str, Any]]:
    """What ``pipeline.run`` does, in this process; blocks come back in a shuffled order, as from many workers."""
    for part in random.Random(0).sample(range(len(plan.parts)), len(plan.parts)):
        items = list(pipeline._read_task(pa.table({"part": [part]}), plan))
        for item in random.Random(1).sample(items, len(items)):
            yield from pipeline._write_task(item, plan, rules).to_pylist()


def read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of data.reader=ray in this process, on slices of 10 rows."""

    def read(self: RayBatches, ranges: np.ndarray) -> Iterator[pa.Table]:
        for start in range(0, len(ranges), 3):
            part = ranges[start : start + 3]
            yield ray_reader._read_task(pa.table({"start": part[:, 0], "stop": part[:, 1]}), self._texts)

    monkeypatch.setattr(RayBatches, "_read", read)
    monkeypatch.setattr(RayBatches, "from_step", RayBatches._sequence)
    monkeypatch.setattr(ray_reader, "SLICE", 10)


def settings(source: Path | str, prepared: Path | str, wordpiece: Path, *overrides: str) -> Config:
    words = [f"data.source={source}", f"data.prepared={prepared}", "data.rows_per_shard=16", "data.max_length=8"]
    words += [f"encoder.tokenizer={wordpiece}", "groups.method=frequency", "output.group_size=16", "data.on_error=quarantine"]
    return load_config(None, [*words, *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
