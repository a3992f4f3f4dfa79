"""The words of ``haste scale``, checked, and the points that they ask for. Wrong words are told before torch loads.

Labels, batch, fan-in and group are lists that multiply, at every number of ranks. ``--labels`` stay the same as ranks are added (strong
scaling), ``--labels-a-rank`` grow with them (weak scaling). A sweep varies one number alone, the others at their first value.
"""

import math
import os
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from haste_dist.config import GROUP_SIZES, Config
from haste_dist.errors import ConfigError

if TYPE_CHECKING:
    from haste_dist.study import Point

SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}
SWEPT = ("labels", "batch", "fan_in", "group")
# Labels in all, and a rank, where none are said.
GPU = {"labels": [1_000_000, 10_000_000, 40_000_000], "labels_a_rank": [10_000_000]}
CPU = {"labels": [20_000, 80_000], "labels_a_rank": [40_000]}
GPU_STEPS, CPU_STEPS = (5, 20), (1, 3)  # warm-up and timed
# At most, where none are said: 512 texts of BERT-base are minutes a step and more than 20 GB there, and each rank has its own weights.
CPU_BATCH = CPU_RANKS = 4
MOST_LABELS = 2**31 - 1  # label rows of prepared texts are int32


@dataclass(frozen=True)
class Words:
    """What was said; empty where nothing was."""

    labels: list[int]
    labels_a_rank: list[int]
    ranks: list[int]
    batch: list[int]
    fan_in: list[int]
    group: list[int]
    sweeps: dict[str, list[int]]
    exponent: float
    shift: float
    positives: float
    warmup: int
    steps: int
    out: Path
    records: str
    plot: bool
    between_gb_s: float
    gpus_a_host: int


def read_words(args: Namespace) -> Words:
    """Raises ConfigError for a word that means nothing or a number out of range."""
    sweeps: dict[str, list[int]] = {}
    for word in args.sweep:
        name, equals, values = word.partition("=")
        key = name.strip().replace("-", "_")
        if not equals or key not in SWEPT:
            raise ConfigError(f"--sweep {word}: reads name=value,value,... with one of {', '.join(map(_flag, SWEPT))}")
        sweeps[key] = sorted({*_numbers(key, values), *sweeps.get(key, [])})
        if not sweeps[key]:
            raise ConfigError(f"--sweep {word}: names no value")
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
        raise ConfigError(f"--out {out}: no folder that can be written to")
    group = _numbers("group", args.group)
    for value in [*group, *sweeps.get("group", [])]:
        if value not in GROUP_SIZES:
            raise ConfigError(f"--group {value}: one of {', '.join(map(str, GROUP_SIZES))}")
    labels = _numbers("labels", args.labels)
    for value in [*labels, *sweeps.get("labels", [])]:
        if value > MOST_LABELS:
            raise ConfigError(f"--labels {value}: at most {MOST_LABELS:,}, since label rows of texts are 32-bit numbers")
    return Words(
        labels=labels,
        labels_a_rank=_numbers("labels_a_rank", args.labels_a_rank),
        ranks=_numbers("ranks", args.ranks),
        batch=_numbers("batch", args.batch),
        fan_in=_numbers("fan_in", args.fan_in),
        group=group,
        sweeps=sweeps,
        exponent=_real("--exponent", args.exponent, 0.0, 10.0),
        shift=_real("--shift", args.shift, 1e-3, 1e9),
        positives=_real("--positives", args.positives, 1.0, 1000.0),
        warmup=args.warmup or 0,
        steps=args.steps or 0,
        out=out,
        records=args.records,
        plot=not args.no_plot,
        between_gb_s=_real("--between-hosts", args.between_hosts, 1e-3, 1e6),
        gpus_a_host=args.gpus_a_host,
    )


def filled(words: Words, config: Config, ranks: list[int], cuda: bool) -> Words:
    """With batch, warm-up and steps where none were said: a CPU gets what it ends within minutes, and a text a rank at least."""
    warmup, steps = GPU_STEPS if cuda else CPU_STEPS
    batch = config.train.batch_size if cuda else min(max(CPU_BATCH, *ranks), config.train.batch_size)
    return replace(words, batch=words.batch or [batch], warmup=words.warmup or warmup, steps=words.steps or steps)


def choose_ranks(words: Words, most: int, usual: int) -> list[int]:
    """Those asked for, else powers of two up to ``usual`` and ``usual`` itself. ConfigError for more than ``most``, all there are."""
    if words.ranks:
        if max(words.ranks) > most:
            raise ConfigError(f"--ranks {max(words.ranks)}: there are {most} to be had here")
        return sorted(words.ranks)
    return sorted({*(2**i for i in range(int(math.log2(usual)) + 1)), usual})


def points_of(words: Words, config: Config, ranks: list[int], cuda: bool) -> list["Point"]:
    """Every point of ``filled`` words, fewest ranks first, then by batch, then by size. Raises ConfigError for a shape that cannot be."""
    from haste_dist.study import Point  # with it comes torch

    said = bool(words.labels or words.labels_a_rank or "labels" in words.sweeps)
    usual = {} if said else GPU if cuda else CPU
    labels = words.labels or usual.get("labels", [])
    each = words.labels_a_rank or usual.get("labels_a_rank", [])
    lists = {"batch": words.batch, "fan_in": words.fan_in or [config.output.fan_in]}
    lists["group"] = words.group or [config.output.group_size]
    found: list[Point] = []
    for w in ranks:
        sizes = [*labels, *(w * value for value in each)]
        base = {"labels": (sizes or words.sweeps["labels"])[0], **{name: values[0] for name, values in lists.items()}}
        found += [Point(size, w, n, f, g) for n, f, g in product(*lists.values()) for size in sizes]
        found += [Point(**{**base, "ranks": w, name: value}) for name, values in words.sweeps.items() for value in values]
    for one in found:
        if one.labels < 2 * one.group * one.ranks:
            raise ConfigError(f"--labels {one.labels}: at least two groups a rank, {2 * one.group * one.ranks} labels on {one.ranks} ranks")
        if one.batch < one.ranks:
            raise ConfigError(f"--batch {one.batch}: at least one text a rank, {one.ranks} of them")
    return sorted(dict.fromkeys(found), key=lambda one: (one.ranks, one.batch, one.labels, one.group, one.fan_in))


def number(word: str) -> int:
    """10, 10k, 2.5M or 1B. Raises ValueError."""
    word = word.strip().lower().replace("_", "")
    size = SUFFIXES.get(word[-1:], 1)
    value = float(word[:-1] if size > 1 else word) * size
    if value != int(value):
        raise ValueError(word)
    return int(value)


def _numbers(name: str, words: str) -> list[int]:
    try:
        values = [number(word) for word in words.split(",") if word.strip()]
    except (ValueError, OverflowError):
        raise ConfigError(f"{_flag(name)} {words}: whole numbers such as 4096, 10k, 2.5M or 1B, with commas between them") from None
    if any(value < 1 for value in values):
        raise ConfigError(f"{_flag(name)} {words}: at least 1")
    return list(dict.fromkeys(values))


def _real(flag: str, word: str, low: float, high: float) -> float:
    try:
        value = float(word)
    except ValueError:
        raise ConfigError(f"{flag} {word}: not a number") from None
    if not low <= value <= high:
        raise ConfigError(f"{flag} {word}: between {low:g} and {high:g}")
    return value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
