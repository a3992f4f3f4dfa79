"""Who is measured: this project, its baselines, and the method's authors where their package is installed.

A provider builds its states for a case and returns one call. All build from the same made-up values, so that each can be compared
with the float64 definition.

    haste_dist     the public functions of haste_kernels, which choose their own implementation
    per_label_ffi  fixed fan-in a label, its own features each: what sparsity costs without groups
    dense          every label reads every feature, in plain torch
    dense_width_f  three GEMMs of width F alone, no loss, no update: as many operations as the sparse layer
    haste_authors  shared_ffi of github.com/xmc-aalto/haste: its kernels and its optimizer, around torch's loss

Letters: N batch rows, D embedding width, L labels, F fan-in, G group size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

import haste_kernels
from haste_kernels import HeadState, StepArgs, TailState, linear
from haste_launch import bench_plain
from haste_launch.bench_case import BACKWARD, FORWARD, HEAD, LAYER, STEPS, TAIL, TOPK, Case
from haste_launch.bench_problem import Part, Work, make_parts


class Unsupported(Exception):
    """A provider has nothing for this shape; the message says why."""


def _real_weights(case: Case) -> None:
    """Raises Unsupported for weights that are only stored: nothing multiplies them as they are."""
    if case.dtype == "float8":
        raise Unsupported("float8 weights are of this project's steps and top-k alone")


class Build(Protocol):
    def __call__(self, case: Case, device: torch.device, args: StepArgs, **made: int) -> Work: ...


@dataclass(frozen=True)
class Provider:
    build: dict[str, Build]  # by topic
    letters: str  # of the shape that its time depends on
    group: int | None = None  # fixed, whatever the case says
    exact_ties: bool = False  # equal scores come in the order of their rows
    pads: bool = False  # the last group may hold rows that are no labels
    slack: float = 1.5  # its error may be this many times plain torch's
    unchecked: tuple[str, ...] = ()  # topics that are timed only
    missing: Callable[[], str] = lambda: ""  # why it cannot run here

    def case(self, case: Case) -> Case:
        return case if self.group is None else replace(case, group=self.group)


def _step(part: Part, args: StepArgs) -> Tensor:
    if isinstance(part.state, TailState):
        return haste_kernels.tail_step(part.x_ND, part.positives, part.state, args)[0]
    return haste_kernels.head_step(part.x_ND, part.positives, part.state, args)[0]


def _ours_step(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    parts = make_parts(case, device, **made)
    return Work(parts, lambda: [_step(part, args) for part in parts])


def _ours_topk(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    (part,) = parts = make_parts(case, device, **made)
    assert isinstance(part.state, TailState)
    tail = part.state
    return Work(parts, lambda: haste_kernels.topk(None, part.x_ND, None, tail, case.k))


def _ours_linear(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    """The operation under GroupSharedLinear; under FixedFanInLinear where groups are of one label."""
    _real_weights(case)
    (part,) = parts = make_parts(case, device, **made)
    state = part.state
    assert isinstance(state, TailState)
    index, rows = state.index, state.rows

    def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear.group_shared_linear(x, weight, index, None if bias is None else bias.view(-1)[:rows], rows)

    return _linear(case, parts, function)


def _per_label_step(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    _real_weights(case)
    parts = make_parts(case, device, **made)
    steps = [(bench_plain.PerLabelStep if isinstance(part.state, TailState) else bench_plain.DenseStep)(part, args) for part in parts]
    return Work(parts, lambda: [step() for step in steps])


def _per_label_topk(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    _real_weights(case)
    (part,) = parts = make_parts(case, device, **made)
    cut = list(bench_plain.per_label_spans(part))
    return Work(parts, lambda: bench_plain.topk(((a, bench_plain.per_label_logits(part, a, b)) for a, b in cut), case.k))


def _dense_parts(case: Case, device: torch.device, made: dict[str, int]) -> list[Part]:
    _real_weights(case)
    return make_parts(replace(case, topic=HEAD), device, **made)


def _dense_step(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    (part,) = parts = _dense_parts(case, device, made)
    step = bench_plain.DenseStep(part, args)
    return Work(parts, lambda: [step()])


def _dense_topk(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    (part,) = parts = _dense_parts(case, device, made)
    return Work(parts, lambda: bench_plain.topk(bench_plain.dense_scores(part), case.k))


def _dense_linear(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    parts = _dense_parts(case, device, made)
    return _linear(case, parts, lambda x, weight, bias: functional.linear(x, weight, bias))


def _narrow(build: Build) -> Build:
    """The same with as many features as the fan-in."""

    def narrowed(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
        return build(replace(case, width=case.fan_in), device, args, **made)

    return narrowed


def _narrow_products(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    case = replace(case, width=case.fan_in, momentum="none", bias=False)
    (part,) = parts = _dense_parts(case, device, made)
    return Work(parts, lambda: bench_plain.three_products(part))


def _linear(case: Case, parts: list[Part], function: Callable[..., Tensor]) -> Work:
    """Forward, or backward alone, of ``function(x, weight, bias)``; the bias has the working type, as autocast would have it."""
    (part,) = parts
    weight, bias = part.state.weight, part.state.bias
    part.state.momentum = part.state.bias_momentum = None
    if bias is not None:
        bias = part.state.bias = bias.to(weight.dtype)
    if case.topic == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(part.x_ND, weight, bias)

        return Work(parts, forward)
    leaves = [value.requires_grad_() for value in (part.x_ND, weight, bias) if value is not None]
    z_NL = function(part.x_ND, weight, bias)
    dz_NL = torch.randn(z_NL.shape, generator=torch.Generator(z_NL.device).manual_seed(3), dtype=z_NL.dtype, device=z_NL.device)
    return Work(parts, lambda: torch.autograd.grad(z_NL, leaves, dz_NL, retain_graph=True), z_NL, dz_NL)


def _authors_missing() -> str:
    if not torch.cuda.is_available():
        return "shared_ffi needs a GPU"
    return "" if find_spec("shared_ffi") else "shared_ffi is not installed"


def _authors_product(part: Part, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (N, L) of sparse or dense rows; ``weight`` (T, G, F) or (L, D)."""
    from shared_ffi import ops

    state = part.state
    if isinstance(state, HeadState):
        return functional.linear(part.x_ND, weight, bias)
    _, size, fan_in = state.weight.shape
    flat = None if bias is None else bias.view(-1)
    return ops.group_ffi_mul(part.x_ND, weight.view(-1, fan_in), state.index, flat, gsize=size)


def _authors_parts(case: Case, device: torch.device, made: dict[str, int]) -> list[Part]:
    _real_weights(case)
    if case.group not in (16, 32, 64) or case.fan_in % 16 or case.fan_in > 128:
        raise Unsupported("its kernels take groups of 16, 32 or 64 and a fan-in of 16 to 128 in steps of 16")
    parts = make_parts(replace(case, momentum="none" if case.momentum == "none" else "float32"), device, **made)
    for part in parts:
        if part.state.bias is not None:
            part.state.bias = part.state.bias.to(part.x_ND.dtype)
        if isinstance(part.state, TailState):
            part.state.index = part.state.index.int()
    return parts


def _authors_step(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    """Their forward, backward and optimizer; momentum in float32, as theirs is. The loss is theirs, written with fewer temporaries."""
    from shared_ffi.optim_sr import SRSgd

    parts = _authors_parts(case, device, made)
    groups: list[dict[str, Any]] = []
    momenta = []
    for part in parts:
        part.x_ND.requires_grad_()
        state = part.state
        for value, momentum, decay in (
            (state.weight, state.momentum, args.weight_decay),
            (state.bias, state.bias_momentum, 0.0),
        ):
            if value is not None:
                groups.append({"params": [value.requires_grad_()], "weight_decay": decay})
                momenta.append(momentum)
    optimizer = SRSgd(groups, lr=args.lr, momentum=args.momentum, use_momentum=case.momentum != "none", seed=args.seed)
    for group, momentum in zip(groups, momenta, strict=True):
        if momentum is not None:
            optimizer.state[group["params"][0]]["momentum_buf"] = momentum
    batch = torch.cat([part.positives.batch for part in parts])
    row = torch.cat([part.positives.row + first for part, first in zip(parts, _first_rows(parts), strict=True)])

    def run() -> list[Tensor | None]:
        z = [_authors_product(part, part.state.weight, part.state.bias) for part in parts]
        z_NL = z[0] if len(z) == 1 else torch.cat(z, 1)
        loss = functional.softplus(z_NL).sum(dtype=torch.float32) - z_NL[batch, row].sum(dtype=torch.float32)
        del z, z_NL
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        dx = [part.x_ND.grad for part in parts]
        for part in parts:
            part.x_ND.grad = None
        return dx

    return Work(parts, run)


def _first_rows(parts: list[Part]) -> list[int]:
    return [part.state.first_row for part in parts]


def _authors_topk(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    (part,) = parts = _authors_parts(case, device, made)

    def run() -> Any:
        with torch.no_grad():
            return _authors_product(part, part.state.weight, part.state.bias).topk(case.k, dim=1)

    return Work(parts, run)


def _authors_linear(case: Case, device: torch.device, args: StepArgs, **made: int) -> Work:
    parts = _authors_parts(case, device, made)
    return _linear(case, parts, lambda x, weight, bias: _authors_product(parts[0], weight, bias))


PROVIDERS = {
    "haste_dist": Provider(
        {**dict.fromkeys(STEPS, _ours_step), TOPK: _ours_topk, FORWARD: _ours_linear, BACKWARD: _ours_linear},
        "LNDFGK",
        exact_ties=True,
        pads=True,
    ),
    "per_label_ffi": Provider(
        {TAIL: _per_label_step, LAYER: _per_label_step, TOPK: _per_label_topk, FORWARD: _ours_linear, BACKWARD: _ours_linear},
        "LNDFGK",
        group=1,
    ),
    "dense": Provider(
        {**dict.fromkeys(STEPS, _dense_step), TOPK: _dense_topk, FORWARD: _dense_linear, BACKWARD: _dense_linear},
        "LNDK",
    ),
    "dense_width_f": Provider(
        {TAIL: _narrow_products, TOPK: _narrow(_dense_topk), FORWARD: _narrow(_dense_linear), BACKWARD: _narrow(_dense_linear)},
        "LNFK",
        unchecked=(TAIL,),
    ),
    "haste_authors": Provider(
        {TAIL: _authors_step, LAYER: _authors_step, TOPK: _authors_topk, FORWARD: _authors_linear, BACKWARD: _authors_linear},
        "LNDFGK",
        slack=3.0,  # it rounds dx, which plain torch rounds to the nearest, stochastically
        missing=_authors_missing,
    ),
}
