"""Whether a run fits the GPUs it is meant for, and which settings nearest to it do. Every answer is computed by the memory plan.

Letters: N texts of the global batch, W ranks, G labels a group.
"""

import dataclasses
from collections.abc import Iterator

from haste_dist.config import GROUP_SIZES, Config
from haste_dist.errors import ConfigError
from haste_dist.manifest import Manifest
from haste_dist.memory import GIB, Facts, MemoryPlan, memory_plan, room

MOST_RANKS = 4096
ONE_LENGTH = 0.95  # of the most tokens a text: where texts have more on average, few batches are shorter
Change = tuple[str, Config, Facts]


def facts_of(manifest: Manifest, ranks: int, device: str) -> Facts:
    tokenizer = manifest.tokenizer
    train = manifest.splits["train"]
    varied = train.tokens < ONE_LENGTH * train.rows * manifest.max_length
    return Facts(manifest.labels, max(1, train.max_labels), tokenizer.vocab_size, tokenizer.pad_id, ranks, device, varied)


def check_fits(config: Config, facts: Facts, gib: float, name: str) -> MemoryPlan:
    """The plan of a run on GPUs called ``name`` of ``gib`` GiB. Raises ConfigError, with what would fit, where it does not."""
    plan = memory_plan(config, facts)
    if plan.peak <= room(gib):
        return plan
    nearest = nearest_that_fit(config, facts, plan, gib)
    advice = f"fits with {', or '.join(nearest)}" if nearest else "no batch, momentum, group size or number of ranks makes it fit"
    raise ConfigError(
        f"each of {facts.ranks} GPU{'s' if facts.ranks > 1 else ''} would need {plan.peak / GIB:.1f} GiB ({plan.peak_phase}: "
        f"{plan.state / GIB:.1f} held always and {(plan.peak - plan.state) / GIB:.1f} more); {name} has {gib:.1f} GiB, of which "
        f"{room(gib) / GIB:.1f} can be planned; {advice} (haste plan shows all; launch.check_memory=false starts it all the same)"
    )


def nearest_that_fit(config: Config, facts: Facts, plan: MemoryPlan, gib: float) -> list[str]:
    """Settings, in the words of the command line, each of which fits: one change where one is enough, else several together."""

    def peak(change: Change) -> int:
        return memory_plan(change[1], change[2], plan.encoder).peak

    def fits(change: Change) -> bool:
        return peak(change) <= room(gib)

    found = []
    for changes in (_graphs, _batches, _momenta, _groups, _zero, _shards, _ranks):
        first = next(filter(fits, changes(config, facts)), None)
        if first is not None:
            found.append(first[0])
    if found:
        return found
    # No one change is enough: what costs no accuracy first, each kept while the next is tried.
    words: list[str] = []
    for changes in (_graphs, _zero, _shards, _momenta, _batches):
        now = ("", config, facts)
        *_, last = [now, *changes(config, facts)]
        if peak(last) < peak(now):
            words, config, facts = [*words, last[0]], last[1], last[2]
            if fits(last):
                return [" ".join(words)]
        for more in _ranks(config, facts):
            if fits(more):
                return [" ".join([*words, more[0]])]
    return []


def _graphs(config: Config, facts: Facts) -> Iterator[Change]:
    """Passes launched as ever hold no activations for good; a step may take longer."""
    if config.encoder.graphs:
        yield "encoder.graphs=false", _with(config, "encoder", graphs=False), facts


def _batches(config: Config, facts: Facts) -> Iterator[Change]:
    """Half of N, a quarter, ... while every rank has a text."""
    batch = config.train.batch_size // 2
    while batch >= max(1, facts.ranks):
        yield f"train.batch_size={batch}", _with(config, "train", batch_size=batch), facts
        batch //= 2


def _momenta(config: Config, facts: Facts) -> Iterator[Change]:
    output = config.output
    if output.momentum and "float32" in (output.momentum_dtype, output.weight_dtype if output.momentum_dtype == "auto" else ""):
        yield "output.momentum_dtype=bfloat16", _with(config, "output", momentum_dtype="bfloat16"), facts
    if output.momentum:
        yield "output.momentum=0", _with(config, "output", momentum=0.0), facts


def _groups(config: Config, facts: Facts) -> Iterator[Change]:
    """Larger groups share their indices."""
    for size in GROUP_SIZES:
        if size > config.output.group_size:
            yield f"output.group_size={size}", _with(config, "output", group_size=size), facts


def _zero(config: Config, facts: Facts) -> Iterator[Change]:
    if facts.ranks > 1 and config.encoder.zero == 0 and not config.encoder.frozen:
        yield "encoder.zero=1", _with(config, "encoder", zero=1), facts


def _shards(config: Config, facts: Facts) -> Iterator[Change]:
    """Fewer replicas of the labels, down to none."""
    for parts in range(config.launch.label_parallel + 1, facts.ranks + 1):
        if config.launch.label_parallel and facts.ranks % parts == 0:
            yield f"launch.label_parallel={parts}", _with(config, "launch", label_parallel=parts), facts


def _ranks(config: Config, facts: Facts) -> Iterator[Change]:
    """More GPUs, the fewest first, in steps of about an eighth."""

    def change(ranks: int) -> Change:
        return f"launch.ranks={ranks}", config, dataclasses.replace(facts, ranks=ranks)

    parts = config.launch.label_parallel or 1
    ranks = facts.ranks + parts
    while ranks <= min(MOST_RANKS, config.train.batch_size):
        yield change(ranks)
        ranks += max(1, ranks // 8 // parts) * parts


def _with(config: Config, part: str, **values: object) -> Config:
    section: object = dataclasses.replace(getattr(config, part), **values)
    return dataclasses.replace(config, **{part: section})  # type: ignore[arg-type]
