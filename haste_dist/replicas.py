"""A step of label rows that several ranks hold, each of which sees its own rows of the batch (``launch.label_parallel``).

    rank              0    1    2    3          P = 2 shards x R = 2 replicas
    labels            A    B    A    B
    rows of the batch 0..n/2    n/2..n          x and dx travel within a replica, the gradient of A between ranks 0 and 2

The kernels update rows as they make their gradient. Here they make the gradient alone: without learning rate and decay, and with zeros
for momentum, m = 0 m + scale dW is the gradient and w stays as it is. That is summed over the ranks that hold the rows, and each of
them makes the same update: the sum has the same bits on all, and rounding is keyed by the row. So replicas stay equal without being
compared. It is done for a few rows at a time, so that no layer's gradient is ever whole, and while one chunk is summed the next is made.

Letters: N batch rows of this replica, D width of what is read, H head rows, T groups, G rows a group, F fan-in.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from haste_dist.classifier import KERNELS, Step, Steps
from haste_dist.collectives import start_sum
from haste_dist.world import Ranks
from haste_kernels import HeadState, Positives, StepArgs, TailState
from haste_kernels.update import sgd_, sgd_bias_

ELEMENTS = 2**22  # weights of a chunk: large enough for a network, two float32 gradients of 16 MiB at most

StateT = TypeVar("StateT", HeadState, TailState)


def summed_over(copies: Ranks) -> Steps:
    """Steps of head and tail whose gradients are summed over the ranks of ``copies``: the kernels' arguments and results."""

    def made(kernel: Step, cut: Callable[[StateT], Iterator[StateT]]) -> Step:
        def step(
            x_ND: Tensor, positives: Positives, state: StateT, args: StepArgs, want_loss: bool = False
        ) -> tuple[Tensor, Tensor | None]:
            return _step(kernel, cut(state), x_ND, positives, state.first_row, args, want_loss, copies)

        return step

    return Steps(made(KERNELS.head, head_chunks), made(KERNELS.tail, tail_chunks))


def head_chunks(head: HeadState) -> Iterator[HeadState]:
    """Views of some rows each."""
    length = max(1, ELEMENTS // head.weight.shape[1])
    for first in range(0, len(head.weight), length):
        here = slice(first, first + length)
        yield HeadState(
            head.weight[here], _cut(head.momentum, here), _cut(head.bias, here), _cut(head.bias_momentum, here), head.first_row + first
        )


def tail_chunks(tail: TailState) -> Iterator[TailState]:
    """Views of some groups each."""
    groups, size, fan_in = tail.weight.shape
    length = max(1, ELEMENTS // (size * fan_in))
    for first in range(0, groups, length):
        here = slice(first, first + length)
        weight = tail.weight[here]
        yield TailState(
            weight, tail.index[here], _cut(tail.momentum, here), _cut(tail.bias, here), _cut(tail.bias_momentum, here),
            tail.first_row + first * size, min(tail.rows - first * size, len(weight) * size), tail.first_group + first,
        )  # fmt: skip


@dataclass
class Summing:
    """A chunk whose gradient is on its way over the replicas."""

    state: HeadState | TailState
    weight: Tensor  # the gradient: of ``state.weight``, float32
    bias: Tensor | None
    work: dist.Work

    def update(self, args: StepArgs) -> None:
        """The update by the sum; ``args`` as of the step, but that the gradient is scaled already. On a GPU the host does not wait."""
        self.work.wait()
        state, args = self.state, dataclasses.replace(args, scale=1.0)
        columns = state.weight.shape[-1]
        momentum = None if state.momentum is None else state.momentum.view(-1, columns)
        sgd_(state.weight.view(-1, columns), momentum, self.weight.view(-1, columns), args, state.first_row)
        if state.bias is not None and self.bias is not None:
            bias_momentum = None if state.bias_momentum is None else state.bias_momentum.view(-1)
            sgd_bias_(state.bias.view(-1), bias_momentum, self.bias.view(-1), args)


@torch.no_grad()
def _step(
    kernel: Step,
    chunks: Iterator[StateT],
    x_ND: Tensor,
    positives: Positives,
    first_row: int,
    args: StepArgs,
    want_loss: bool,
    copies: Ranks,
) -> tuple[Tensor, Tensor | None]:
    """As a kernel: dx (N, D) float32 and the loss, of this replica's rows. ``positives`` are relative to ``first_row``."""
    alone = dataclasses.replace(args, lr=0.0, momentum=0.0, weight_decay=0.0)
    dx_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
    total = torch.zeros((), device=x_ND.device) if want_loss else None
    before: Summing | None = None
    for chunk in chunks:
        weights = chunk.weight.numel()
        gradient = torch.zeros(weights + (0 if chunk.bias is None else chunk.bias.numel()), dtype=torch.float32, device=x_ND.device)
        dw = gradient[:weights].view(chunk.weight.shape)
        db = None if chunk.bias is None else gradient[weights:].view(chunk.bias.shape)
        if len(x_ND):  # a batch of few rows leaves the last replicas without any
            inside = Positives(positives.batch, positives.row - (chunk.first_row - first_row))
            dx, loss = kernel(x_ND, inside, dataclasses.replace(chunk, momentum=dw, bias_momentum=db), alone, want_loss)
            dx_ND += dx
            total = loss if total is None or loss is None else total + loss
        work = start_sum(gradient, copies)
        if before is not None:
            before.update(args)
        before = Summing(chunk, dw, db, work)
    if before is not None:
        before.update(args)
    return dx_ND, total


def _cut(tensor: Tensor | None, here: slice) -> Tensor | None:
    return None if tensor is None else tensor[here]
