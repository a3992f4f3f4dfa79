"""``haste plan``: before a run starts, what each GPU will hold and how long a step and an epoch will take.

Memory is counted from the settings; time comes from the cost model that ``haste scale`` fitted on such a device, and from nothing else.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from haste_dist.augmentation import SPLIT as LABEL_TEXTS_SPLIT
from haste_dist.classifier import feature_slice, stored_dtypes
from haste_dist.config import Config
from haste_dist.cost_model import CostModel, Load, Network, kept_path, load_model, load_of
from haste_dist.devices import SHORT, known_device
from haste_dist.errors import ConfigError, DataError
from haste_dist.fits import check_fits, facts_of
from haste_dist.label_groups import head_size
from haste_dist.manifest import Manifest, read_manifest
from haste_dist.memory import GIB, Facts, MemoryPlan, memory_plan, room
from haste_dist.mirror import local_copy
from haste_dist.schedule import pace
from haste_launch.scale_settings import number

TABLE_WIDTH = 132
VOCABULARY = 30_522  # of BERT; where there is no prepared data and the encoder is made from scratch


@dataclasses.dataclass(frozen=True)
class Words:
    """What was said on the command line; empty or 0 where nothing was."""

    gpus: int = 0
    gpu: str = ""
    memory: float = 0.0  # GiB
    labels: str = ""
    texts: str = ""
    most_labels: int = 0
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Where:
    """The GPUs that a plan is for: their name ("" for any of a stated memory, "cpu"), and their memory if it is known."""

    name: str
    gib: float | None

    @property
    def kind(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"


def plan(config: Config, words: Words) -> int:
    """Prints the plan; returns the exit status. Raises ConfigError, after the table, where the run does not fit."""
    where = choose_device(config, words)
    ranks = words.gpus or config.launch.ranks or (torch.cuda.device_count() if where.kind == "cuda" else 1) or 1
    manifest = _manifest(config, words)
    words_known = VOCABULARY if config.encoder.name == "scratch" else 0
    facts = facts_of(manifest, ranks, where.kind) if manifest else Facts(0, words.most_labels or 20, words_known, 0, ranks, where.kind)
    if words.labels:
        facts = dataclasses.replace(facts, labels=_count("--labels", words.labels))
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    made = memory_plan(config, facts)
    console.print(table(made, where, facts))
    tokens = _mean_tokens(config, manifest)
    load = load_of_run(config, facts, made, tokens)
    texts = _count("--texts", words.texts) if words.texts else _texts(config, manifest) if manifest else 0
    for line in times(load, where, texts, tokens, words):
        console.print(line, soft_wrap=True)
    if where.gib is not None:
        check_fits(config, facts, where.gib, where.name or "the GPU")
        console.print(f"fits: {made.peak / GIB:.2f} of the {room(where.gib) / GIB:.1f} GiB that can be planned")
    return 0


def choose_device(config: Config, words: Words) -> Where:
    """The GPU that was named, else this machine's, else its CPU. Raises ConfigError for a name that nobody knows the memory of."""
    if words.gpu:
        name = SHORT.get(words.gpu.lower(), words.gpu)
        known = known_device(name)
        if known is None and not words.memory:
            raise ConfigError(f"--gpu {words.gpu}: its memory is not known; say --memory GiB too, or one of {', '.join(SHORT)}")
        return Where(name, words.memory or known.gib)  # type: ignore[union-attr]
    if words.memory:
        return Where("", words.memory)
    if config.launch.device != "cpu" and torch.cuda.is_available():
        return Where(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / GIB)
    return Where("cpu", None)


def load_of_run(config: Config, facts: Facts, made: MemoryPlan, tokens: int) -> Load:
    """What a rank of this run does in a step, for texts of ``tokens`` tokens."""
    output, encoder, step = config.output, config.encoder, pace(config.train)
    n, size = step.texts, made.encoder
    work = size.work.flops(n, n * tokens, n * tokens**2)
    if size.trained:  # all forward passes but one run twice; backward goes to the inputs, which is as much, and to what is trained
        work *= 1 + (1 - 1 / step.passes) / (2 + size.trained / size.parameters)
    cuda = facts.device == "cuda"
    sizes = {"float32": 4, "bfloat16": 2, "auto": 2 if cuda else 4}
    weight, momentum = (dtype.itemsize for dtype in stored_dtypes(output, cuda))
    width = size.width
    return load_of(
        labels=facts.labels,
        ranks=facts.ranks,
        batch=n,
        tokens=tokens,
        width=width,
        head_rows=head_size(facts.labels, output.head_fraction, output.group_size),
        head_width=feature_slice(output.head_features, width).width,
        tail_width=feature_slice(output.tail_features, width).width,
        fan_in=output.fan_in,
        group=output.group_size,
        weight_bytes=weight,
        momentum_bytes=momentum if output.momentum else 0,
        x_bytes=sizes[encoder.precision],
        encoder_flops=work,
        parameters=size.trained,
        partitioned=encoder.zero > 0 or sizes[encoder.precision] == 2,
        label_parallel=config.launch.label_parallel,
        accumulation=step.accumulation,
    )


def times(load: Load, where: Where, texts: int, tokens: int, words: Words) -> list[str]:
    """A step and an epoch as the device's cost model predicts them, or that nobody measured it. Raises DataError for a damaged model."""
    model = _model(where, words)
    if model is None:
        return [f"time: not measured on {where.name or 'this GPU'}: run haste scale there"]
    found = model.predict(load, Network())
    parts = "  ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in found.parts.items() if seconds)
    lines = [f"a step: {1e3 * found.step:.4g} ms ({parts}  host {1e3 * model.host:.3g}), texts of {tokens} tokens"]
    if texts:
        steps = math.ceil(texts / load.batch)
        lines.append(f"an epoch: {_duration(steps * found.step)}, {steps:,} steps, without evaluation")
    worst = model.errors.get("left out", model.errors["fitted"])
    off = f"{100 * worst['median']:.1f}% (median), {100 * worst['most']:.1f}% (most)"
    lines.append(f"the model's error on points that it had not seen: {off}")
    lines += [f"note: {note}" for note in found.notes]
    return [*lines, *(f"assumed: {line}" for line in model.assumptions(Network()))]


def table(made: MemoryPlan, where: Where, facts: Facts) -> Table:
    """What is held, and what each phase adds; the peak is the largest phase on top of the state."""
    title = f"GiB on each of {facts.ranks} {where.name or 'GPU'}{'s' if facts.ranks > 1 else ''}, {facts.labels:,} labels"
    shown = Table(title=title, title_style="", title_justify="left", box=SIMPLE_HEAD)
    for name in ("when", "what", "GiB"):
        shown.add_column(name, justify="right" if name == "GiB" else "left")
    for name, size in made.held.items():
        shown.add_row("always", name, f"{size / GIB:.3f}")
    shown.add_row("always", "all of it", f"{made.state / GIB:.3f}", style="bold", end_section=True)
    for phase, parts in made.phases.items():
        what = ", ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items() if size >= GIB / 2000)
        shown.add_row(phase, what, f"{sum(parts.values()) / GIB:.3f}", style="bold" if phase == made.peak_phase else "")
    shown.add_section()
    shown.add_row("peak", made.peak_phase, f"{made.peak / GIB:.3f}", style="bold")
    return shown


def _manifest(config: Config, words: Words) -> Manifest | None:
    """Of the prepared data; it may be missing where ``--labels`` are said."""
    try:
        if not config.data.prepared:
            raise DataError("data.prepared is empty")
        return read_manifest(local_copy(config.data.prepared))
    except DataError as error:
        if words.labels:
            return None
        raise ConfigError(f"{error}; or plan without data: --labels L --texts T") from None


def _texts(config: Config, manifest: Manifest) -> int:
    own = manifest.splits.get(LABEL_TEXTS_SPLIT)
    return manifest.splits["train"].rows + (config.data.label_texts * own.rows if own else 0)


def _mean_tokens(config: Config, manifest: Manifest | None) -> int:
    if manifest is None:
        return config.data.max_length
    split = manifest.splits["train"]
    return max(1, min(config.data.max_length, round(split.tokens / max(1, split.rows))))


def _model(where: Where, words: Words) -> CostModel | None:
    path = Path(words.model) if words.model else kept_path(where.name)
    if not words.model and not path.exists():
        return None
    model = load_model(path)
    if where.name and model.device != where.name:
        raise ConfigError(f"{path}: is of {model.device}, the plan is for {where.name}")
    return model


def _count(flag: str, word: str) -> int:
    try:
        value = number(word)
    except (ValueError, OverflowError):
        raise ConfigError(f"{flag} {word}: a whole number such as 4096, 10k, 2.5M or 1B") from None
    if value < 1:
        raise ConfigError(f"{flag} {word}: at least 1")
    return value


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
