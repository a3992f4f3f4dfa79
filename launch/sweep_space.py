"""The words of ``haste sweep``: which settings vary, and over what."""

import argparse
from dataclasses import dataclass
from typing import Any

from haste_dist.errors import ConfigError

PREPARED_BY = (
    "data.",
    "groups.",
    "output.group_size",
    "output.head_fraction",
    *(f"encoder.{x}" for x in ("name", "tokenizer", "layers", "pooling")),
)


@dataclass(frozen=True)
class Varied:
    """One setting: some values, or all numbers from ``low`` to ``high``. Values are words, as on the command line."""

    name: str
    words: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @property
    def is_list(self) -> bool:
        return bool(self.words)

    def word(self, value: Any) -> str:
        return f"{self.name}={value if isinstance(value, str | int) else f'{value:.6g}'}"


def read_varied(words: list[str]) -> list[Varied]:
    """Reads ``name=a,b,c``, ``name=LOW..HIGH`` and ``name=LOW..HIGH:log``. Raises ConfigError."""
    found = [_read(word) for word in words]
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"--vary: {', '.join(sorted({name for name in names if names.count(name) > 1}))} is varied twice")
    if not found:
        raise ConfigError("nothing varies; say --vary output.lr=0.01..0.2:log, or --vary rewire.grow=random,gradient")
    return found


def _read(word: str) -> Varied:
    name, mark, values = word.partition("=")
    if not mark or not name or not values:
        raise ConfigError(f"--vary {word}: reads name=a,b,c or name=LOW..HIGH, with :log behind it for a logarithmic scale")
    if name.startswith(("run.", "launch.")) and name != "run.seed":
        raise ConfigError(f"--vary {name}: says where a run goes, not how good it is")
    if ".." not in values:
        return Varied(name, words=tuple(value.strip() for value in values.split(",")))
    span, _, scale = values.partition(":")
    ends = span.split("..")
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise ConfigError(f"--vary {word}: a range reads LOW..HIGH, both numbers") from None
    log = scale == "log"
    if scale not in ("", "log") or not low < high or (log and low <= 0):
        raise ConfigError(f"--vary {word}: LOW must be less than HIGH, and over 0 with :log")
    return Varied(name, low=low, high=high, log=log, whole=all(end.strip().lstrip("-").isdigit() for end in ends))


def combinations(varied: list[Varied]) -> int:
    """How many there are, 0 where a range is among them."""
    count = 1
    for one in varied:
        count *= len(one.words)
    return count


def needs_prepare(varied: list[Varied], dev_fraction: float) -> bool:
    """Whether a varied setting is one that the prepared folder depends on: then each trial prepares its own.

    With a ``dev_fraction`` that is so of the seed, too: it draws the texts that label embeddings leave out.
    """
    return any(one.name.startswith(PREPARED_BY) or (dev_fraction > 0 and one.name == "run.seed") for one in varied)


def add_sweep_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", config: str, overrides: str) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="search for better settings",
        description="Train again and again with other settings, chosen by Optuna from what the earlier trials reached (train.metric). "
        "Each trial is a run in OUT/; OUT/sweep.png and OUT/sweep.csv show them all. Finished trials are kept: the same command goes on.",
    )
    sweep.add_argument("config", metavar="CONFIG", help=config)
    sweep.add_argument("overrides", metavar="a.b=c", nargs="*", help=overrides)
    sweep.add_argument(
        "--vary", action="append", default=[], metavar="NAME=V", help="a,b,c or LOW..HIGH or LOW..HIGH:log; any setting; may be given again"
    )
    sweep.add_argument("--trials", type=int, default=0, metavar="N", help="in all (default 20; of lists alone, every combination once)")
    sweep.add_argument("--out", default="runs/sweep", metavar="DIR", help="folder of the sweep (default runs/sweep)")
