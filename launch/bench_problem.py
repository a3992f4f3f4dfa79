"""Made-up states and batches to measure on: normal weights, random features, about five labels a text by a Zipf law.

Letters: N batch rows, D embedding width, R rows (labels), T groups, G rows a group, F fan-in, P positives.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haste_kernels import STORED, HeadState, Positives, StepArgs, TailState, index_dtype, random_features
from haste_launch.bench_case import Case, PartShape

LABELS_A_TEXT = 5
DRAWN = 1 << 24  # float8 values drawn at once
# A rate so small that a thousand steps on one batch leave the states as they are, and one at which a step shows.
TIMED = StepArgs(lr=1e-6, scale=1.0, momentum=0.9, weight_decay=1e-4, seed=1, step=2)
CHECKED = StepArgs(lr=0.01, scale=1.0, momentum=0.9, weight_decay=1e-4, seed=1, step=2)


class Part(NamedTuple):
    """Dense or sparse rows with the features and the positives that a step of them takes."""

    x_ND: Tensor
    positives: Positives
    state: HeadState | TailState


@dataclass
class Work:
    """What a provider made for a case. ``run`` is one call; of a step it returns dx of each part.

    A backward alone keeps the logits that it starts from and their gradient.
    """

    parts: list[Part]
    run: Callable[[], Any]
    z_NL: Tensor | None = None
    dz_NL: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All inputs and states."""
        found = [tensor for part in self.parts for tensor in (part.x_ND, *part.positives, *state_tensors(part.state).values())]
        return found + [tensor for tensor in (self.z_NL, self.dz_NL) if tensor is not None]


def state_tensors(state: HeadState | TailState) -> dict[str, Tensor]:
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def make_parts(case: Case, device: torch.device, integers: int = 0, padded: int = 0, seed: int = 0) -> list[Part]:
    """The parts of ``case``. ``integers``: all values are whole numbers up to this, so that scores are exact and often tie.
    ``padded``: rows of the last sparse group that are no labels. On the meta device there are shapes and no values."""
    dtype = getattr(torch, case.x_dtype)
    random = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    x_ND = _values((case.batch, case.width), dtype, 1.0, random, integers)
    positives = zipf_positives(case.labels - padded, case.batch, seed)
    parts, first = [], 0
    for shape in case.parts:
        rows = shape.rows - (padded if shape.sparse else 0)
        inside = (positives.row >= first) & (positives.row < first + rows)
        own = Positives(positives.batch[inside].to(device), (positives.row[inside] - first).to(device))
        x = x_ND if shape.stop - shape.start == case.width else x_ND[:, shape.start : shape.stop].contiguous()
        parts.append(Part(x, own, _state(case, shape, first, rows, random, integers)))
        first += shape.rows
    return parts


def zipf_positives(labels: int, batch: int, seed: int) -> Positives:
    """Pairs of ``batch`` texts and their labels, label r about as often as 1 / (r + 1); distinct, ascending by row, then by text."""
    random = torch.Generator().manual_seed(seed)
    uniform = torch.rand(batch, LABELS_A_TEXT, generator=random, dtype=torch.float64)
    row = (float(labels + 1) ** uniform).long().sub_(1).clamp_(0, labels - 1)
    pairs = torch.unique(row * batch + torch.arange(batch)[:, None])
    return Positives(pairs % batch, pairs // batch)


def _state(case: Case, shape: PartShape, first_row: int, rows: int, random: torch.Generator | None, integers: int) -> HeadState | TailState:
    dtype = STORED[case.dtype]
    width = shape.stop - shape.start
    groups = -(-shape.rows // case.group)
    size: tuple[int, ...] = (groups, case.group, case.fan_in) if shape.sparse else (shape.rows, width)
    weight = _values(size, dtype, size[-1] ** -0.5, random, integers)
    momentum = None if case.momentum == "none" else _values(size, STORED[case.momentum], 0.1, random)
    bias = bias_momentum = None
    if case.bias:
        bias = _values(size[:-1], torch.float32, 1.0, random, integers)
        if not integers:
            bias.sub_(2)  # most labels are none of a text's
        bias_momentum = None if momentum is None else _values(size[:-1], torch.float32, 0.1, random)
    if not shape.sparse:
        return HeadState(weight, momentum, bias, bias_momentum, first_row)
    first_group = first_row // case.group
    if random is None:
        index = torch.empty(groups, case.fan_in, dtype=index_dtype(width), device="meta")
    else:
        index = random_features(first_group, groups, width, case.fan_in, 0, random.device).to(index_dtype(width))
    return TailState(weight, index, momentum, bias, bias_momentum, first_row, rows, first_group)


def _values(size: tuple[int, ...], dtype: torch.dtype, scale: float, random: torch.Generator | None, integers: int = 0) -> Tensor:
    """Made in place, so that no temporary outgrows the state."""
    if random is None:
        return torch.empty(size, dtype=dtype, device="meta")
    made = torch.empty(size, dtype=dtype, device=random.device)
    if integers:
        return made.copy_(torch.randint(-integers, integers + 1, size, generator=random, device=random.device))
    if dtype == STORED["float8"]:  # has no normal_ of its own
        for part in made.flatten().split(DRAWN):
            part.copy_(torch.randn(len(part), generator=random, device=random.device).mul_(scale))
        return made
    return made.normal_(0.0, scale, generator=random)
