"""Is it right? Asked before how fast it is, of every provider, against the definition in float64 on the same inputs.

Three values each: the truth, plain torch in the working type (the sparse layer as a masked dense one, the same stochastic rounding), and
the provider's. Its error, ||value - truth|| / ||truth||, may be 1.5 times plain torch's, that of its worst row 3 times. Top-k gets whole
numbers, whose scores are exact and often tie: there nothing may differ.

At a small ragged shape everything is compared; at the measured one the states of the first, middle and last few groups.

Letters: N batch rows, D embedding width, R rows, T groups, G rows a group, F fan-in, K top-k.
"""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haste_kernels import HeadState, Positives, StepArgs, TailState, reference
from haste_launch.bench_case import FORWARD, HEAD, STEPS, TOPK, Case
from haste_launch.bench_problem import CHECKED, Part, Work, state_tensors
from haste_launch.bench_providers import Provider

ROWS, TOPK_ROWS, BATCH, PADDED = 1500, 10_000, 300, 3
WINDOW = 4  # groups, or rows of the head
ROW_SLACK = 3.0
FLOAT32_ERROR = 4e-6  # under which errors are not compared: sums of another order differ by as much


class Check(NamedTuple):
    """One comparison. Red where ``error`` is above ``allowed``, or no number."""

    what: str
    error: float
    allowed: float

    @property
    def red(self) -> bool:
        return not self.error <= self.allowed


def check_small(name: str, provider: Provider, case: Case, device: torch.device) -> list[Check]:
    """Compares everything that ``provider`` computes, at a small shape like ``case``'s. A topic it only times gives no checks."""
    if case.topic in provider.unchecked:
        return []
    small = provider.case(small_case(case))
    padded = PADDED if provider.pads and small.topic != HEAD and small.group > PADDED else 0
    integers = 0 if small.topic != TOPK else 3 if provider.exact_ties else 1  # up to 1, bfloat16 holds every score
    work = provider.build[case.topic](small, device, CHECKED, integers=integers, padded=padded)
    where = f"{name} {case.topic} F={case.fan_in} G={small.group}"
    if case.topic in STEPS:
        return _check_step(where, provider, work, [[(0, len(part.state.weight))] for part in work.parts], CHECKED, with_dx=True)
    if case.topic == TOPK:
        return [_check_topk(where, work.parts[0], work.run(), provider.exact_ties)]
    return _check_linear(where, provider, work, case.topic)


def check_full(name: str, provider: Provider, case: Case, work: Work, args: StepArgs) -> list[Check]:
    """Takes one step at the measured shape and compares the states of its first, middle and last groups."""
    if case.topic in provider.unchecked or case.topic not in STEPS:
        return []
    windows = []
    for part in work.parts:
        count = len(part.state.weight)
        starts = sorted({0, max(0, count // 2 - WINDOW), max(0, count - WINDOW)})
        windows.append([(start, min(count, start + WINDOW)) for start in starts])
    return _check_step(f"{name} {case.topic} at full size", provider, work, windows, args, with_dx=False)


def window(part: Part, start: int, stop: int) -> Part:
    """A copy of the groups (or the head's rows) ``start`` to ``stop``, as a shard of its own."""
    state = part.state
    size = state.weight.shape[1] if isinstance(state, TailState) else 1
    own: dict[str, Any] = {key: value[start:stop].detach().clone() for key, value in state_tensors(state).items()}
    own["first_row"] = state.first_row + start * size
    rows = (stop - start) * size
    if isinstance(state, TailState):
        rows = own["rows"] = min(stop * size, state.rows) - start * size
        own["first_group"] = state.first_group + start
    inside = (part.positives.row >= start * size) & (part.positives.row < start * size + rows)
    positives = Positives(part.positives.batch[inside], part.positives.row[inside] - start * size)
    return Part(part.x_ND.detach(), positives, replace(state, **own))


def dense_weight(state: HeadState | TailState, width: int) -> Tensor:
    """(R, D) float64, padded rows included."""
    return reference.dense_tail(state.weight, state.index, width) if isinstance(state, TailState) else state.weight.double()


def small_case(case: Case) -> Case:
    rows = min(case.labels, TOPK_ROWS if case.topic == TOPK else ROWS)
    labels = max(2, -(-rows // case.group)) * case.group
    return replace(case, labels=labels, batch=min(case.batch, BATCH), k=min(case.k, labels - PADDED))


def _check_step(
    where: str, provider: Provider, work: Work, windows: list[list[tuple[int, int]]], args: StepArgs, with_dx: bool
) -> list[Check]:
    before = [[window(part, *span) for span in spans] for part, spans in zip(work.parts, windows, strict=True)]
    dx = work.run()
    checks = []
    for part, spans, starts, got_dx in zip(work.parts, windows, before, dx, strict=True):
        for span, start in zip(spans, starts, strict=True):
            got = window(part, *span).state
            truth, plain = _doubled(start), copy.deepcopy(start)
            step = reference.tail_step if isinstance(truth.state, TailState) else reference.head_step
            true_dx = step(truth.x_ND, truth.positives, truth.state, args)[0]  # type: ignore[arg-type]
            plain_dx = plain_step(plain, args)
            kind = "tail" if isinstance(got, TailState) else "head"
            if with_dx:
                checks += _compare(f"{where} {kind} dx", provider, got_dx, plain_dx, true_dx)
            real = got.rows if isinstance(got, TailState) else len(got.weight)
            for key in ("weight", "momentum", "bias", "bias_momentum"):
                values = [getattr(state, key) for state in (got, plain.state, truth.state)]
                if values[0] is not None:
                    ends = 2 if isinstance(got, TailState) else 1
                    values = [value.flatten(0, ends - 1)[:real] for value in values]
                    checks += _compare(f"{where} {kind} {key}", provider, *values)
    return checks


def plain_step(part: Part, args: StepArgs) -> Tensor:
    """A step in plain torch, each result in the working type; updates the state, returns dx."""
    x, state = part.x_ND, part.state
    weight_RD = dense_weight(state, x.shape[1]).to(x.dtype)
    rows = len(weight_RD)
    real = state.rows if isinstance(state, TailState) else rows
    z_NR = x @ weight_RD.T
    if state.bias is not None:
        z_NR = z_NR + state.bias.view(-1).to(x.dtype)
    dz_NR = args.scale * reference.loss_gradient(z_NR, reference.targets(part.positives, len(x), rows).to(x.dtype), args.loss)
    dz_NR[:, real:] = 0
    dx, dw = dz_NR @ weight_RD, _of_connections(dz_NR.T @ x, state)
    ids = state.first_row + torch.arange(rows, device=x.device)
    columns = state.weight.shape[-1]
    momentum = None if state.momentum is None else state.momentum.view(-1, columns)
    reference.sgd(state.weight.view(-1, columns), momentum, dw.double(), args, ids, args.weight_decay)
    if state.bias is not None:
        bias_momentum = None if state.bias_momentum is None else state.bias_momentum.view(-1, 1)
        reference.sgd(state.bias.view(-1, 1), bias_momentum, dz_NR.sum(0).double()[:, None], args, ids, 0.0)
    return dx


def _of_connections(dw_RD: Tensor, state: HeadState | TailState) -> Tensor:
    """(R, D), or of a tail the (R, F) that its groups read."""
    if isinstance(state, HeadState):
        return dw_RD
    groups, size, _ = state.weight.shape
    index = state.index.long()[:, None].expand(-1, size, -1)
    return dw_RD.view(groups, size, -1).gather(2, index).flatten(0, 1)


def _doubled(part: Part) -> Part:
    values = {key: value.double() for key, value in state_tensors(part.state).items() if value.is_floating_point()}
    return part._replace(state=replace(part.state, **values))  # type: ignore[arg-type]


def _check_topk(where: str, part: Part, got: tuple[Tensor, Tensor], exact_ties: bool) -> Check:
    """The share of places that are wrong. Scores and rows are whole numbers, so one integer a row orders them, lower rows first."""
    (scores, rows), state = got, part.state
    bias = None if state.bias is None else state.bias.view(-1)
    z_NR = reference.logits(part.x_ND, dense_weight(state, part.x_ND.shape[1]), bias)
    z_NR = z_NR[:, : state.rows] if isinstance(state, TailState) else z_NR
    ids = torch.arange(z_NR.shape[1], device=z_NR.device)
    best_rows = (z_NR.long() * len(ids) - ids).topk(scores.shape[1]).indices
    scores, rows = scores.double(), rows - state.first_row
    wrong = scores != z_NR.gather(1, best_rows)
    if exact_ties:
        wrong |= rows != best_rows
    else:
        wrong |= z_NR.gather(1, rows.clamp(0, len(ids) - 1)) != scores
        ordered = rows.sort(dim=1).values
        wrong[:, 1:] |= ordered[:, 1:] == ordered[:, :-1]
    return Check(f"{where} places that differ", float(wrong.double().mean()), 0.0)


def _check_linear(where: str, provider: Provider, work: Work, topic: str) -> list[Check]:
    (part,) = work.parts
    state, x = part.state, part.x_ND.detach()
    truth_RD = dense_weight(state, x.shape[1]).detach()
    real = state.rows if isinstance(state, TailState) else len(truth_RD)
    truth_RD = truth_RD[:real]
    weight_RD = truth_RD.to(x.dtype)
    bias = None if state.bias is None else state.bias.detach().view(-1)[:real]
    got = work.run()
    if topic == FORWARD:
        plain = x @ weight_RD.T
        plain = plain if bias is None else plain + bias.to(x.dtype)
        return _compare(f"{where} logits", provider, got, plain, reference.logits(x, truth_RD, bias))
    dz = work.dz_NL
    assert dz is not None
    checks = _compare(f"{where} dx", provider, got[0], dz @ weight_RD, dz.double() @ truth_RD)
    dw = [_of_connections(_padded(value, state), state)[:real] for value in (dz.T @ x, dz.double().T @ x.double())]
    checks += _compare(f"{where} dW", provider, got[1].view(-1, got[1].shape[-1])[:real], *dw)
    if bias is not None:
        checks += _compare(f"{where} db", provider, got[2].view(-1)[:real], dz.sum(0), dz.double().sum(0))
    return checks


def _padded(dw_RD: Tensor, state: HeadState | TailState) -> Tensor:
    """With zero rows up to a whole number of groups."""
    missing = state.weight.shape[:-1].numel() - len(dw_RD)
    return torch.cat([dw_RD, dw_RD.new_zeros(missing, dw_RD.shape[1])]) if missing else dw_RD


def _compare(where: str, provider: Provider, got: Tensor, plain: Tensor, truth: Tensor) -> list[Check]:
    """Relative errors of the whole and of the worst row."""
    off, plain_off, truth = (value.detach().double() for value in (got.double() - truth, plain.double() - truth, truth))
    whole = float(truth.norm()) or 1.0
    allowed = max(FLOAT32_ERROR, provider.slack * float(plain_off.norm()) / whole)
    checks = [Check(where, float(off.norm()) / whole, allowed)]
    if truth.ndim == 2:
        row = whole / len(truth) ** 0.5
        worst, plain_worst = float(off.norm(dim=1).max()) / row, float(plain_off.norm(dim=1).max()) / row
        slack = max(ROW_SLACK, provider.slack)
        checks.append(Check(f"{where}, worst row", worst, max(ROW_SLACK * FLOAT32_ERROR, slack * plain_worst)))
    return checks
