"""The dev split: training texts that a run holds out to be evaluated on (``data.dev_fraction``, drawn by ``run.seed``).

Label embeddings leave them out, and so do groups, ``output.start=centroids`` and ``output.basis=labels``: otherwise dev scores would be too
good. groups.json says under "dev" for which dev split an order was made; a run with another one is refused.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from haste_dist.config import Config
from haste_dist.errors import ConfigError
from haste_dist.manifest import Manifest

DEV_STREAM = 1  # keeps the random streams of one seed apart


def dev_rows(rows: int, dev_fraction: float, seed: int) -> np.ndarray:
    """(n,) int64, ascending: which of the ``rows`` training texts are held out. Pure."""
    if not dev_fraction:
        return np.zeros(0, np.int64)
    return np.sort(np.random.default_rng([seed, DEV_STREAM]).permutation(rows)[: dev_count(rows, dev_fraction)])


def dev_count(rows: int, dev_fraction: float) -> int:
    """How many of the ``rows`` training texts are held out; none where they are too few."""
    return round(dev_fraction * rows)


def trained_split(config: Config) -> str:
    """The split that a run is evaluated on while it trains."""
    return "dev" if config.data.dev_fraction else "test"


def check_split(config: Config, folder: Path, manifest: Manifest, split: str) -> None:
    """Raises ConfigError where ``split``, train, dev or test, has no text to be evaluated on. ``folder`` is the prepared one."""
    stored, fraction = manifest.splits.get("test" if split == "test" else "train"), config.data.dev_fraction
    rows = stored.rows if stored else 0
    if dev_count(rows, fraction) if split == "dev" else rows:
        return
    if split != "dev":
        raise ConfigError(f"{folder}: has no {split} texts to evaluate on; prepare it with some, or with a data.dev_fraction above 0")
    if not fraction:
        raise ConfigError("evaluate.split=dev: this run holds out no text (data.dev_fraction=0); set evaluate.split=test")
    raise ConfigError(
        f"data.dev_fraction={fraction}: holds out none of the {rows} training texts in {folder}, so there is nothing to evaluate on; "
        f"set {1 / max(2, rows):.2g} or more, or 0 to evaluate on the test split"
    )


def dev_split(config: Config) -> dict[str, Any] | None:
    """What the dev split of these data depends on; None where no text is held out.

    Raises ConfigError with ``groups.start``: which texts the earlier groups were made of cannot be told.
    """
    if config.data.dev_fraction and config.groups.start:
        raise ConfigError(
            f"groups.start={config.groups.start}: groups of earlier data may have seen the dev texts; set data.dev_fraction=0 or no start"
        )
    return {"fraction": config.data.dev_fraction, "seed": config.run.seed} if config.data.dev_fraction else None


def leaves_out_dev(page: dict[str, Any], config: Config) -> bool:
    """Whether the order that groups.json, ``page``, tells of was made without the dev texts of ``config``, or without any text."""
    embedded = page.get("cohesion") is not None or config.output.start == "centroids" or config.output.basis == "labels"
    return not embedded or page.get("dev") == dev_split(config)  # without "dev": made of all texts


def check_held_out(config: Config, groups_file: Path) -> None:
    """Raises ConfigError where the label embeddings behind an order were made for another dev split than that of ``config``."""
    page = json.loads(groups_file.read_text(encoding="utf-8"))
    if not leaves_out_dev(page, config):
        raise ConfigError(
            f"{groups_file}: label embeddings leave out {_told(page.get('dev'))}, this run holds out {_told(dev_split(config))}; "
            "run haste prepare with these settings"
        )


def _told(dev: dict[str, Any] | None) -> str:
    return "no text" if dev is None else f"the dev texts of data.dev_fraction={dev['fraction']} run.seed={dev['seed']}"
