"""The output layer of one rank: its share of the dense head and of the sparse tail, stepped and queried through the kernels.

Letters: N global batch rows, D embedding width, M most labels of a text, K top-k. Every rank sees all N embeddings and owns
some label rows; dx summed over ranks is the gradient of the whole layer (DESIGN of the step: see step.py). With replicas of the label
rows (replicas.py) N is the rows that this replica has of the global batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haste_dist.config import EncoderConfig, OutputConfig, check_fan_in
from haste_dist.errors import ConfigError
from haste_dist.meters import stage
from haste_dist.sharding import LabelShard, Rows, all_rows
from haste_kernels import STORED, HeadState, Positives, StepArgs, TailState, head_step, random_features, tail_step, topk, uniform

HEAD_DROPOUT, TAIL_DROPOUT = 11, 12  # streams of the dropout masks
HEAD_WEIGHT, TAIL_WEIGHT = 21, 22  # streams of the initial weights
INT16_WIDTH = 2**15
LEFT_OUT = -1e30  # the bias of rows that are not to be answered; real scores are far above


@dataclass(frozen=True)
class Slice:
    """The features [start, stop) of the embedding that a part of the layer reads."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


Step = Callable[..., tuple[Tensor, Tensor | None]]


class Steps(NamedTuple):
    """How head and tail are stepped: by the kernels, or, where other ranks hold the same rows, as replicas.py does."""

    head: Step
    tail: Step


KERNELS = Steps(head_step, tail_step)


class Classifier:
    """Head and tail rows of one rank, with their SGD state. Nothing here communicates; ``steps`` may."""

    def __init__(
        self,
        config: OutputConfig,
        shard: LabelShard,
        width: int,
        seed: int,
        device: torch.device,
        steps: Steps = KERNELS,
        basis: Tensor | None = None,
        drawn: bool = True,
    ):
        """``width``: D of the encoder. Initial values are keyed by global row, so that they do not depend on the sharding; not ``drawn``:
        all are zero, for whoever fills them from a checkpoint.

        ``basis``: what the tail's input is turned by, with ``output.basis=labels`` and only then (basis.py). Raises ConfigError.
        """
        self.config, self.shard, self.seed, self.device = config, shard, seed, device
        self.width, self.steps = width, steps
        self.head_slice = feature_slice(config.head_features, width)
        self.tail_slice = feature_slice(config.tail_features, width)
        for name, part in (("head_features", self.head_slice), ("tail_features", self.tail_slice)):
            check_slice(name, part, width)
        check_fan_in(config.fan_in, self.tail_slice.width)
        self.basis = None if config.basis == "embedding" else check_basis(basis, self.tail_slice.width).to(device)
        weight_dtype, momentum_dtype = stored_dtypes(config, device.type == "cuda")
        self.head = self._make_head(weight_dtype, momentum_dtype, drawn)
        self.tail = self._make_tail(weight_dtype, momentum_dtype, drawn)
        # What the next rewiring measures gradients on: x_ND as the tail saw it and label_rows_NM of a batch, the same on all ranks.
        self.kept: list[tuple[Tensor, Tensor]] = []

    def step(
        self, x_ND: Tensor, label_rows_NM: Tensor, lr: float, step: int, want_loss: bool = False, place: Rows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One SGD step on the rows of this rank; ``lr`` is the head's, and the tail's is in proportion where it has its own.

        ``x_ND`` in the working dtype, ``label_rows_NM`` global rows with -1 where there is none; ``place``: which rows of the global
        batch they are (default: all). Returns the float32 (N, D)
        gradient with respect to x from these rows, and their share of the loss if wanted (else None).
        """
        config = self.config
        place = all_rows(len(x_ND)) if place is None else place
        scale = 1.0 / place.total if config.reduction == "mean" else 1.0
        args = StepArgs(
            lr=lr,
            scale=scale,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            loss=config.loss,  # type: ignore[arg-type]
            seed=self.seed,
            step=step,
            half_sums=config.half_sums,
            rounding=config.rounding,  # type: ignore[arg-type]
            deterministic=config.deterministic,
        )
        dx_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        positives = sort_positives(label_rows_NM)
        losses = []
        if self.head.weight.shape[0]:
            x, mask = self._masked(x_ND, self.head_slice, config.head_dropout, step, HEAD_DROPOUT, place)
            dx, loss = stage("head")(self.steps.head)(x, counted_from(positives, self.head.first_row), self.head, args, want_loss)
            self._accumulate(dx_ND, dx, mask, self.head_slice)
            losses.append(loss)
        if self.tail.weight.shape[0]:
            x, mask = self._masked(x_ND, self.tail_slice, config.tail_dropout, step, TAIL_DROPOUT, place)
            x = self._turned(x)
            if config.tail_lr is not None:
                args = dataclasses.replace(args, lr=lr * config.tail_lr / config.lr if config.lr else 0.0)
            dx, loss = stage("tail")(self.steps.tail)(x, counted_from(positives, self.tail.first_row), self.tail, args, want_loss)
            self._accumulate(dx_ND, dx if self.basis is None else dx @ self.basis.float().T, mask, self.tail_slice)
            losses.append(loss)
        return dx_ND, torch.stack([x for x in losses if x is not None] or [dx_ND.new_zeros(())]).sum() if want_loss else None

    def keep(self, x_ND: Tensor, label_rows_NM: Tensor, step: int) -> None:
        """Keeps the whole batch of a step for the next rewiring, also without tail rows here: checkpoints are written by the first."""
        x, _ = self._masked(x_ND, self.tail_slice, self.config.tail_dropout, step, TAIL_DROPOUT)
        self.kept.append((self._turned(x), label_rows_NM))

    def topk(self, x_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores (N, K) float32 and global rows (N, K) int64 of the best real rows of this rank, best first, ties by lower row."""
        head = self.head if self.head.weight.shape[0] else None
        tail = self.tail if self.tail.rows else None
        return topk(self._sliced(x_ND, self.head_slice), self._turned(self._sliced(x_ND, self.tail_slice)), head, tail, k)

    @contextmanager
    def leaving_out(self, rows: Tensor) -> Iterator[None]:
        """While it is entered ``topk`` answers with these global ``rows`` (n,) int64 behind all others, and scores them about LEFT_OUT."""
        kept = [(state, state.bias) for state in (self.head, self.tail)] if len(rows) else []
        for state, bias in kept:
            masked = torch.zeros(state.weight.shape[:-1], device=self.device) if bias is None else bias.clone()
            here = rows.to(self.device) - state.first_row
            masked.view(-1)[here[(here >= 0) & (here < masked.numel())]] = LEFT_OUT
            state.bias = masked
        try:
            yield
        finally:
            for state, bias in kept:
                state.bias = bias

    def tensors(self) -> dict[str, tuple[Tensor, int]]:
        """Everything that the next step needs: name to (tensor, global position of its first entry along axis 0)."""
        found = {
            "head.weight": (self.head.weight, self.shard.head_start),
            "head.momentum": (self.head.momentum, self.shard.head_start),
            "head.bias": (self.head.bias, self.shard.head_start),
            "head.bias_momentum": (self.head.bias_momentum, self.shard.head_start),
            "tail.weight": (self.tail.weight, self.shard.group_start),
            "tail.index": (self.tail.index, self.shard.group_start),
            "tail.momentum": (self.tail.momentum, self.shard.group_start),
            "tail.bias": (self.tail.bias, self.shard.group_start),
            "tail.bias_momentum": (self.tail.bias_momentum, self.shard.group_start),
        }
        return {name: (tensor, start) for name, (tensor, start) in found.items() if tensor is not None}

    def bytes(self) -> int:
        """Memory of weights, momentum, biases, indices and basis on this rank."""
        return sum(t.nbytes for t, _ in self.tensors().values()) + (0 if self.basis is None else self.basis.nbytes)

    def _make_head(self, weight_dtype: torch.dtype, momentum_dtype: torch.dtype, drawn: bool) -> HeadState:
        shard, config = self.shard, self.config
        rows = shard.head_stop - shard.head_start
        width = self.head_slice.width
        bound = config.init_scale / width**0.5 if drawn else 0.0
        weight = uniform(shard.head_start, rows, width, bound, self.seed, HEAD_WEIGHT, self.device, weight_dtype)
        return HeadState(weight, *self._companions(weight, momentum_dtype), first_row=shard.head_start)

    def _make_tail(self, weight_dtype: torch.dtype, momentum_dtype: torch.dtype, drawn: bool) -> TailState:
        shard, config = self.shard, self.config
        fan_in = config.fan_in
        bound = config.init_scale / fan_in**0.5 if drawn else 0.0
        rows = shard.groups * shard.group_size
        weight = uniform(shard.tail_start, rows, fan_in, bound, self.seed, TAIL_WEIGHT, self.device, weight_dtype)
        weight = weight.view(shard.groups, shard.group_size, fan_in)
        dtype = torch.int16 if self.tail_slice.width <= INT16_WIDTH else torch.int32
        index = torch.zeros(shard.groups, fan_in, dtype=dtype, device=self.device)
        if drawn:
            index.copy_(random_features(shard.group_start, shard.groups, self.tail_slice.width, fan_in, self.seed, self.device))
        momentum, bias, bias_momentum = self._companions(weight, momentum_dtype)
        return TailState(weight, index, momentum, bias, bias_momentum, shard.tail_start, shard.tail_rows, shard.group_start)

    def _companions(self, weight: Tensor, momentum_dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        config = self.config
        momentum = torch.zeros_like(weight, dtype=momentum_dtype) if config.momentum else None
        if not config.bias:
            return momentum, None, None
        bias = torch.full(weight.shape[:-1], config.bias_init or 0.0, dtype=torch.float32, device=self.device)
        return momentum, bias, torch.zeros_like(bias) if config.momentum else None

    def _sliced(self, x_ND: Tensor, part: Slice) -> Tensor:
        return x_ND if part.width == x_ND.shape[1] else x_ND[:, part.start : part.stop].contiguous()

    def _turned(self, x: Tensor) -> Tensor:
        """What the tail reads, in its basis; by a product in float32, since a basis in bfloat16 would not be orthogonal."""
        return x if self.basis is None else (x.float() @ self.basis.float()).to(x.dtype)

    def _masked(
        self, x_ND: Tensor, part: Slice, dropout: float, step: int, stream: int, place: Rows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The slice with dropout. All ranks draw the mask of the global batch, from (seed, step), so no mask is communicated."""
        x = self._sliced(x_ND, part)
        if not dropout:
            return x, None
        generator = torch.Generator(device=x.device).manual_seed((self.seed * 1_000_003 + step) * 64 + stream)
        place = all_rows(len(x)) if place is None else place
        whole = x.new_empty(place.total, x.shape[1]).bernoulli_(1 - dropout, generator=generator)
        mask = whole[place.start : place.stop].div_(1 - dropout)
        return x * mask, mask

    def _accumulate(self, dx_ND: Tensor, dx: Tensor, mask: Tensor | None, part: Slice) -> None:
        dx_ND[:, part.start : part.stop] += dx if mask is None else dx * mask


def stored_dtypes(config: OutputConfig, cuda: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of weights and momentum. Float8 is too coarse for a sum of gradients, so momentum beside it is bfloat16 unless the config asks."""
    weight = config.weight_dtype if config.weight_dtype != "auto" else "bfloat16" if cuda else "float32"
    beside = "bfloat16" if weight == "float8" else weight
    return STORED[weight], STORED[beside if config.momentum_dtype == "auto" else config.momentum_dtype]


def embedding_width(encoder: EncoderConfig, hidden: int) -> int:
    """D, what the output layer can read, of an encoder whose token model is ``hidden`` wide."""
    return encoder.project or hidden


def feature_slice(span: list[int], width: int) -> Slice:
    """The configured [start, end), or all ``width`` features where it is empty."""
    return Slice(*(span or (0, width)))


def check_slice(name: str, part: Slice, width: int) -> None:
    """A slice must lie inside the embedding. Raises ConfigError."""
    if part.stop > width:
        raise ConfigError(f"output.{name}=[{part.start}, {part.stop}]: the embedding has only {width} features")


def check_basis(basis: Tensor | None, width: int) -> Tensor:
    """The basis of a tail that reads ``width`` features. Raises ConfigError."""
    if basis is None or basis.shape != (width, width):
        found = "nothing" if basis is None else " x ".join(map(str, basis.shape))
        raise ConfigError(
            f"output.basis=labels: prepared is {found}, these settings ask for {width} x {width}; run haste prepare with them"
        )
    return basis


def sort_positives(label_rows_NM: Tensor) -> Positives:
    """All N * M entries in row order, absent ones (-1) first, with global rows.

    Their number is known without looking at them, so the host does not wait for the GPU: it is the kernels that pass over entries
    outside their shard.
    """
    row, order = label_rows_NM.flatten().sort(stable=True)
    return Positives(order // label_rows_NM.shape[1], row)


def counted_from(positives: Positives, first_row: int) -> Positives:
    """The same with rows relative to ``first_row``."""
    return Positives(positives.batch, positives.row - first_row)
