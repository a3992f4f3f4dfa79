"""A module whose trained parameters lie end to end in one tensor, and AdamW on a part of it.

The optimizer's side of a step costs the host a fixed time a parameter: hooks, copies into buckets, norms, launches. With one flat
parameter there is one of each. The module reads views of it, and autograd joins their gradients into the flat one.

A part of the module may take parameters of several of its own parts as one: ``joined`` names those parts. Where what they call ``weight``
(or ``bias``) is of one shape and lies end to end, ``joined_weight`` of that part is a view of all of it, (their number x rows, ...).

Letters: P numbers in the flat tensor: those of matrices first, which weight decay applies to, then those of biases and norms.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Places = list[tuple[nn.Module, str]]  # modules, and what they call a tensor; more than one where weights are shared


@dataclass
class _Piece:
    """A parameter, or several of one shape that are bound together as well."""

    size: int  # of all of them
    shape: torch.Size  # of each
    places: list[Places]  # of each
    whole: Places


class FlatModule(nn.Module):
    """``module`` with one parameter ``flat`` (P,) in place of all that require a gradient; others stay where they are."""

    def __init__(self, module: nn.Module):
        super().__init__()
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        named.sort(key=lambda pair: pair[1].ndim <= 1)  # stable
        self.names = [name for name, _ in named]
        self.shapes = [p.shape for _, p in named]
        self.sizes = [p.numel() for _, p in named]
        self.decayed = sum(p.numel() for _, p in named if p.ndim > 1)
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for _, p in named]))
        index = {id(p): i for i, (_, p) in enumerate(named)}
        joins = _joins(module, index)
        places: list[Places] = [[] for _ in named]
        for part in module.modules():
            for name, p in list(part._parameters.items()):
                if p is not None and id(p) in index:
                    del part._parameters[name]
                    places[index[id(p)]].append((part, name))
        self._pieces: list[_Piece] = []
        i = 0
        while i < len(named):
            count, whole = joins.get(i, (1, []))
            self._pieces.append(_Piece(count * self.sizes[i], self.shapes[i], places[i : i + count], whole))
            i += count
        self.module = module
        self.bind()

    def bind(self, flat_P: Tensor | None = None) -> None:
        """Points the module at views of ``flat`` (or of another tensor of its shape) as it is now; with grad enabled, gradients flow
        back through them."""
        flat_P = self.flat if flat_P is None else flat_P
        for view, piece in zip(flat_P.split([piece.size for piece in self._pieces]), self._pieces, strict=True):
            stacked = view.view(-1, *piece.shape) if piece.whole else None
            for part, name in piece.whole:
                part.__dict__[name] = view.view(-1, *piece.shape[1:])
            each = [view.view(piece.shape)] if stacked is None else stacked.unbind()
            for one, places in zip(each, piece.places, strict=True):
                for part, name in places:
                    part.__dict__[name] = one

    def forward(self, *arguments: Any) -> Any:
        self.bind()
        return self.module(*arguments)

    def unflatten(self, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view of its shape) of each trained parameter in ``flat_P``, which may be longer than P."""
        views = flat_P[: sum(self.sizes)].split(self.sizes)
        return ((name, view.view(shape)) for name, view, shape in zip(self.names, views, self.shapes, strict=True))


@torch.no_grad()
def join_parameters(module: nn.Module) -> None:
    """The same for a module that is not trained: its parameters stay, but those that a part takes as one become views of one tensor. What
    is copied into them later is seen in it; a copy of the module must be joined again."""
    for part, kind, parameters in _taken_as_one(module):
        whole = torch.cat(tuple(parameters))
        for p, view in zip(parameters, whole.chunk(len(parameters)), strict=True):
            p.data = view
        part.__dict__[f"joined_{kind}"] = whole


def _joins(module: nn.Module, index: dict[int, int]) -> dict[int, tuple[int, Places]]:
    """Of the first of parameters that a part takes as one, by its ``index`` in the flat tensor: how many they are, and where they go."""
    found: dict[int, tuple[int, Places]] = {}
    for part, kind, parameters in _taken_as_one(module):
        first = index.get(id(parameters[0]), -1)
        if first >= 0 and [index.get(id(p)) for p in parameters] == list(range(first, first + len(parameters))):
            found.setdefault(first, (len(parameters), []))[1].append((part, f"joined_{kind}"))
    return found


def _taken_as_one(module: nn.Module) -> Iterator[tuple[nn.Module, str, list[nn.Parameter]]]:
    """Parts that take parameters of one shape as one, ``weight`` or ``bias``, and these."""
    for part in module.modules():
        names: tuple[str, ...] = getattr(part, "joined", ())
        for kind in ("weight", "bias") if names else ():
            found = [part.get_submodule(name)._parameters.get(kind) for name in names]
            parameters = [p for p in found if p is not None]
            if len(parameters) == len(names) and len({p.shape for p in parameters}) == 1:
                yield part, kind, parameters


class ClippedAdamW(torch.optim.AdamW):
    """AdamW on a flat tensor, or on this rank's part of one, after clipping by the norm of the whole gradient.

    Nothing here makes the host wait: DeepSpeed's own clipping asks the GPU twice a step whether the norm is finite.
    """

    def __init__(self, flat: nn.Parameter, decayed: int, clip: float, weight_decay: float, **options: Any):
        """``decayed``: weight decay applies to the first this many numbers; ``clip`` 0: never."""
        super().__init__([flat], weight_decay=0.0, **options)
        self.decayed, self.clip, self.decay = decayed, clip, weight_decay
        self.first, self.partitioned = 0, False  # where the part begins in the whole; set where ZeRO has cut it
        self.norm = torch.zeros((), device=flat.device)  # of the last gradient, before clipping

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        [part] = group["params"]
        squares = torch.linalg.vector_norm(part.grad, dtype=torch.float32).square()
        if self.partitioned:
            dist.all_reduce(squares)
        self.norm = squares.sqrt()
        if self.clip:
            part.grad.mul_((self.clip / (self.norm + 1e-6)).clamp(max=1.0))
        part[: max(0, self.decayed - self.first)].mul_(1 - group["lr"] * self.decay)
        super().step(closure)
