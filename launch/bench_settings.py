"""The words of ``haste bench kernels``, checked, and the cases that they ask for. Wrong words are told before torch loads.

Lists multiply: two widths and three groups are six shapes. A sweep varies one number alone, the others at their first value.
"""

import os
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from haste_dist.errors import ConfigError
from haste_launch.bench_case import BYTES, HEAD, HEAD_SHARE, LAYER, PROVIDER_NAMES, TOPICS_OF, TOPK, Case

NUMBERS = ("labels", "batch", "width", "fan_in", "group", "k")
GROUPS = (16, 32, 64, 128)
MOST_K = 128

# The figures of the README, and what runs on a laptop in well under a minute; a quick look at each.
GPU = {"labels": [655_360], "batch": [512], "width": [768], "fan_in": [64], "group": [16, 32, 64], "k": [100]}
CPU = {"labels": [4096], "batch": [64], "width": [128], "fan_in": [32], "group": [16, 32], "k": [10]}
QUICK_GPU = GPU | {"labels": [65_536], "group": [32]}
QUICK_CPU = CPU | {"labels": [1024], "batch": [32], "width": [64], "fan_in": [16], "group": [16]}
SECONDS = {(True, False): 0.5, (True, True): 0.1, (False, False): 0.1, (False, True): 0.02}  # (GPU, quick)
RECORDS = Path("benchmarks/records")


@dataclass(frozen=True)
class Words:
    """What was said; an empty list, None or "" where nothing was."""

    whats: list[str]
    numbers: dict[str, list[int]]
    sweeps: dict[str, list[int]]
    providers: list[str]
    plot: Path | None
    records: str
    dtype: str
    momentum: str
    bias: bool
    seconds: float
    quick: bool
    tune: bool = False


@dataclass(frozen=True)
class Settings:
    """All that a benchmark needs to know."""

    cases: list[Case]
    providers: list[str]
    plot: Path | None
    records: Path | None
    seconds: float


def read_words(args: Namespace) -> Words:
    """Raises ConfigError for a word that means nothing, a number out of range, a file that cannot be written."""
    whats = _names("--what", args.what, tuple(TOPICS_OF))
    numbers = {name: _numbers(name, getattr(args, name)) for name in NUMBERS}
    sweeps: dict[str, list[int]] = {}
    for word in args.sweep:
        name, equals, values = word.partition("=")
        key = name.strip().replace("-", "_")
        if not equals or key not in NUMBERS:
            raise ConfigError(f"--sweep {word}: reads name=value,value,... with one of {', '.join(map(_flag, NUMBERS))}")
        sweeps[key] = sorted({*_numbers(key, values), *sweeps.get(key, [])})
        if not sweeps[key]:
            raise ConfigError(f"--sweep {word}: names no value")
    providers = _names("--providers", args.providers, PROVIDER_NAMES)
    plot = Path(args.plot) if args.plot else None
    if plot is not None and plot.suffix != ".png":
        raise ConfigError(f"--plot {plot}: a plot is written as .png")
    if args.records not in ("", "none"):
        place = Path(args.records)
        if place.exists() and not (place.is_dir() and os.access(place, os.W_OK)):
            raise ConfigError(f"--records {place}: no folder that can be written to")
    dtype = _one("--dtype", args.dtype, ("bfloat16", "float32", "float8"))
    momentum = _one("--momentum", args.momentum, tuple(BYTES))
    try:
        seconds = float(args.seconds or 0)
    except ValueError:
        raise ConfigError(f"--seconds {args.seconds}: not a number") from None
    if not 0 <= seconds <= 3600:
        raise ConfigError(f"--seconds {args.seconds}: between 0 and 3600")
    bias = not args.no_bias
    return Words(whats, numbers, sweeps, providers, plot, args.records, dtype, momentum, bias, seconds, args.quick, args.tune)


def settle(words: Words, cuda: bool) -> Settings:
    """Fills in what was not said, by the device. Raises ConfigError for a shape that cannot be."""
    defaults = (QUICK_GPU if words.quick else GPU) if cuda else (QUICK_CPU if words.quick else CPU)
    numbers = {name: words.numbers[name] or defaults[name] for name in NUMBERS}
    dtype = words.dtype or ("bfloat16" if cuda else "float32")
    momentum = words.momentum or ("bfloat16" if dtype == "float8" else dtype)
    topics = [topic for what in words.whats or TOPICS_OF for topic in TOPICS_OF[what]]
    base = {name: values[0] for name, values in numbers.items()}
    shapes = [dict(zip(NUMBERS, values, strict=True)) for values in product(*numbers.values())]
    sweeps = words.sweeps
    if words.plot is not None and not sweeps and all(len(values) < 2 for values in words.numbers.values()):
        sweeps = _usual_sweeps(base, halved=LAYER in topics)
        shapes = [base]
    shapes += [base | {name: value} for name, values in sweeps.items() for value in values]
    cases = [Case(topic, **shape, dtype=dtype, momentum=momentum, bias=words.bias) for topic in topics for shape in shapes]
    for case in cases:
        _check(case)
    records = Path(words.records) if words.records else RECORDS if cuda else None
    return Settings(
        list(dict.fromkeys(map(_sized, cases))),
        words.providers or list(PROVIDER_NAMES),
        words.plot,
        None if words.records == "none" else records,
        words.seconds or SECONDS[cuda, words.quick],
    )


def _sized(case: Case) -> Case:
    """The dense head alone has a tenth of the labels, in whole groups; numbers that a topic does not have are all the same."""
    if case.topic == HEAD:
        return replace(case, labels=-(-case.labels // HEAD_SHARE // case.group) * case.group, fan_in=0, group=1, k=0)
    return case if case.topic == TOPK else replace(case, k=0)


def _check(case: Case) -> None:
    features = case.width // 2 if case.topic == LAYER else case.width
    if case.group not in GROUPS:
        raise ConfigError(f"--group {case.group}: one of {', '.join(map(str, GROUPS))}")
    if case.labels < 2 * case.group:
        raise ConfigError(f"--labels {case.labels}: at least two groups, {2 * case.group} labels")
    if case.fan_in > features:
        half = " (a layer's tail reads half of the width)" if case.topic == LAYER else ""
        raise ConfigError(f"--fan-in {case.fan_in}: more than the {features} features there are{half}")
    if case.k > min(MOST_K, case.labels):
        raise ConfigError(f"-k {case.k}: at most {min(MOST_K, case.labels)}")
    if case.topic == LAYER and case.width % 2:
        raise ConfigError(f"--width {case.width}: a layer reads it in two halves, so it must be even")


def _usual_sweeps(base: dict[str, int], halved: bool) -> dict[str, list[int]]:
    features = base["width"] // 2 if halved else base["width"]
    around = {name: [max(1, base[name] * 2**power // 4) for power in range(5)] for name in ("labels", "batch")}
    around["labels"] = [max(2 * base["group"], labels) for labels in around["labels"]]
    fan_ins = [fan_in for fan_in in (16, 32, 64, 128, 256) if fan_in <= features] or [base["fan_in"]]
    groups = [group for group in GROUPS if 2 * group <= base["labels"]] or [base["group"]]
    return {**around, "fan_in": fan_ins, "group": groups}


def _numbers(name: str, words: str) -> list[int]:
    try:
        values = [int(word) for word in words.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{_flag(name)} {words}: whole numbers, with commas between them") from None
    if any(value < 1 for value in values):
        raise ConfigError(f"{_flag(name)} {words}: at least 1")
    return list(dict.fromkeys(values))


def _names(flag: str, words: str, choices: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(_one(flag, word.strip(), choices) for word in words.split(",") if word.strip()))


def _one(flag: str, word: str, choices: tuple[str, ...]) -> str:
    if word and word not in choices:
        raise ConfigError(f"{flag} {word}: one of {', '.join(choices)}")
    return word


def _flag(name: str) -> str:
    return "-k" if name == "k" else f"--{name.replace('_', '-')}"
