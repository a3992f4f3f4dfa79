"""What ranks exchange in a step; each collective stands beside its adjoint.

They run over all ranks, or those of a replica (world.py). Letters: W such ranks, B padded batch rows of one, n real rows of theirs
(n <= W * B), D width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from haste_dist.meters import stage
from haste_dist.world import Ranks, World

# torch 2.13 renamed these two; the old names still work on older versions.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Gathering:
    """Rows on their way to every rank."""

    full: Tensor  # (W * B, ...)
    rows: int
    work: dist.Work | None

    def wait(self) -> Tensor:
        """(n, ...) in rank order. On a GPU later work waits for the rows, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.full[: self.rows]


def start_gather(part_B: Tensor, rows: int, ranks: Ranks) -> Gathering:
    """Starts to send (B, ...) of each rank to every rank; the padding behind row n is cut off when they have come."""
    if ranks.size == 1:
        return Gathering(part_B, rows, None)
    full = part_B.new_empty((ranks.size * part_B.shape[0], *part_B.shape[1:]))
    return Gathering(full, rows, _all_gather(full, part_B.contiguous(), group=ranks.group, async_op=True))


@stage("gather")
def gather_rows(part_B: Tensor, rows: int, ranks: Ranks) -> Tensor:
    """(B, ...) of each rank to (n, ...) on every rank, in rank order; the padding behind row n is cut off."""
    return start_gather(part_B, rows, ranks).wait()


@stage("scatter")
def scatter_rows(full_ND: Tensor, padded: int, ranks: Ranks) -> Tensor:
    """The adjoint of ``gather_rows``: (n, D) partial sums to the (B, D) rows of this rank, summed over ranks; padding gets 0."""
    missing = ranks.size * padded - full_ND.shape[0]
    if missing:
        full_ND = torch.cat([full_ND, full_ND.new_zeros(missing, full_ND.shape[1])])
    if ranks.size == 1:
        return full_ND
    part = full_ND.new_empty(padded, full_ND.shape[1])
    _reduce_scatter(part, full_ND.contiguous(), group=ranks.group)
    return part


def sum_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    """Sum of ``value`` over ranks, in place."""
    if ranks.size > 1:
        dist.all_reduce(value, group=ranks.group)
    return value


def start_sum(value: Tensor, ranks: Ranks) -> dist.Work:
    """The same, of two ranks or more, begun: ``value`` is the sum when the work returned has been waited for."""
    return dist.all_reduce(value, group=ranks.group, async_op=True)


def barrier(world: World) -> None:
    """All ranks wait for each other, on the host."""
    dist.barrier(group=world.control)


class StopVote:
    """Agreement on stopping: any rank asks, all stop at the same step.

    Each step sends this rank's wish and reads the sum that was sent one step before, so that nobody waits for the network.
    """

    def __init__(self, world: World):
        self.world = world
        self._pending: tuple[dist.Work, Tensor] | None = None

    def exchange(self, wish: bool) -> bool:
        """Sends ``wish``; True if any rank wished to stop when this was last called."""
        decided = False
        if self._pending is not None:
            work, votes = self._pending
            work.wait()
            decided = bool(votes.item())
        votes = torch.tensor([int(wish)])
        self._pending = (dist.all_reduce(votes, group=self.world.control, async_op=True), votes)
        return decided

    def close(self) -> None:
        """Waits for the message in flight. Every rank calls it, after the same number of exchanges."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
