"""Unit vectors into groups of exactly G: seeds take their nearest free neighbours, many seeds at a time.

A group is a seed and the G - 1 nearest vectors that no group has yet. Searching for one seed after the other is bound by memory;
here a round searches for up to SEEDS of them in one matrix product. A vector that several seeds want goes to the nearest of
them, and a seed that is left with fewer than G waits. A set larger than ``search`` is first cut into halves of whole groups,
so that work grows with n * search, not n * n; a cut costs closeness, for neighbours across it cannot meet. The halves, and the parts
that are left in the end, have nothing to do with each other: each goes to a device that is free, one at a time to each.

At last the groups are put in an order in which neighbouring ones are close, for the kernels: close groups come to read
the same features. The result is the same for any number of threads and on any devices: similarities are exact (see
``bisection``), and equal ones go to the lower position. A finished part is kept on disk, so a killed run goes on from there.

Letters: n vectors, D width, G group size, T groups, m of a part not packed yet, S seeds of a round, C candidates of a seed.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from haste_dist.bisection import BLOCK_BYTES, halve, matmul, on_grid, seriate, stored, take, unit
from haste_dist.manifest import replacing

SEEDS = 512  # most seeds of a round: its similarities take SEEDS * m * 4 bytes
ROUNDS_LEFT = 8  # a round seeds at most one of this many groups that are left, so that seeds seldom want the same vectors
BLOCK = 32  # similarities are searched by the maxima of this many at a time
COMPACT = 0.75  # vectors that are still free are copied together once fewer than this share are
TAKEN = 4.0  # is taken off the similarity of vectors that have a group: they come behind all others
EXACT = 2.0**22  # similarities are multiples of its inverse
Item = TypeVar("Item")
Result = TypeVar("Result")


def pack(
    vectors_nD: Tensor,
    rows: Tensor,
    group_size: int,
    *,
    search: int = 2**20,
    iterations: int = 8,
    seed: int = 0,
    devices: Sequence[torch.device] = (),
    kept: Tensor | None = None,
    folder: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """``rows`` (int64, distinct, of ``vectors_nD``) in another order, on the CPU; runs of G are the groups.

    Vectors have length 1, are float16 or float32, and lie anywhere: in a mapped file, too. Only the last group can have fewer than G
    rows. ``kept`` (K, G) int64: groups of other rows that stay as they are, and are put among the new ones. ``folder``: where finished
    parts are kept, for these arguments alone; the caller removes it. ``done(k)`` is called as k more rows are packed. Computes on
    ``devices`` (default: where the vectors lie), on the first what is not in parts. Raises DataError where a part cannot be written.
    """
    devices = list(devices) or [vectors_nD.device]
    groups = [torch.zeros(0, group_size, dtype=torch.int64) if kept is None else kept]
    last = rows[:0]
    parts = _parts(vectors_nD, rows.sort().values, group_size, search, iterations, seed, devices)

    def packed(item: tuple[int, Tensor], device: torch.device) -> Tensor:
        number, part = item
        order = _finished(folder, number, part)
        if order is None:
            order = _pack_part(vectors_nD, part, group_size, seed + number, device)
            _keep(folder, number, order)
        return order

    for order in on_devices(packed, list(enumerate(parts)), devices):
        whole = len(order) // group_size * group_size
        groups.append(order[:whole].view(-1, group_size))
        last = torch.cat([last, order[whole:]])  # of the last part alone: all others are whole groups
        done(len(order))
    groups_TG = torch.cat(groups)
    by_closeness = seriate(_centroids(vectors_nD, groups_TG, devices[0]), iterations=iterations, seed=seed).cpu()
    return torch.cat([groups_TG[by_closeness].flatten(), last])


def on_devices(work: Callable[[Item, torch.device], Result], items: Sequence[Item], devices: Sequence[torch.device]) -> Iterator[Result]:
    """``work(item, device)`` of all items, in their order: a thread a device, each with one item at a time, whichever comes next."""
    if len(devices) == 1:
        yield from (work(item, devices[0]) for item in items)
        return
    free: SimpleQueue[torch.device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def on_a_free_one(item: Item) -> Result:
        device = free.get()
        try:
            return work(item, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices), thread_name_prefix="grouping") as pool:
        yield from pool.map(on_a_free_one, items)


def _parts(
    vectors_nD: Tensor, rows: Tensor, group_size: int, search: int, iterations: int, seed: int, devices: Sequence[torch.device]
) -> list[Tensor]:
    """``rows`` (ascending) in halves of halves of whole groups, ``search`` rows or one group at most; the last may end in part of one."""
    most, parts = max(search, group_size), [rows]

    def cut(part: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        if len(part) <= most:
            return (part,)
        left = -(-len(part) // (2 * group_size)) * group_size
        return halve(vectors_nD, part, left, iterations=iterations, seed=seed, device=device)

    while max(map(len, parts)) > most:
        parts = [half for halves in on_devices(cut, parts, devices) for half in halves]
    return parts


def _pack_part(vectors_nD: Tensor, rows: Tensor, group_size: int, seed: int, device: torch.device) -> Tensor:
    """``rows`` in another order: runs of G are groups, what is left over comes last."""
    position_m = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]  # seeds are tried in this order
    x_mD = take(vectors_nD, position_m, device)
    position_m = position_m.to(device)
    free_m = torch.ones(len(rows), dtype=torch.bool, device=device)
    left, found = len(rows), []
    while left >= group_size:
        if left < COMPACT * len(free_m):
            x_mD, position_m, free_m = x_mD[free_m], position_m[free_m], free_m[free_m]
        count = max(1, min(SEEDS, left // group_size // ROUNDS_LEFT))
        seeds_S = free_m.nonzero()[:count, 0]
        similar_Sm = matmul(x_mD[seeds_S][None], x_mD.T[None])[0].add_(free_m.float().sub_(1), alpha=TAKEN)
        groups_KG = _choose(similar_Sm, min(2 * group_size, left), group_size)
        found.append(position_m[groups_KG].cpu())
        free_m[groups_KG.flatten()] = False
        left -= groups_KG.numel()
    return torch.cat([*(groups.flatten() for groups in found), position_m[free_m].cpu()])


def _choose(similar_Sm: Tensor, candidates: int, group_size: int) -> Tensor:
    """(K, G) columns, 1 <= K <= S: the groups of those seeds that win G of their candidates, each column by the seed nearest to it."""
    seeds, m = similar_Sm.shape
    column_SC = nearest(similar_Sm, candidates)
    seed_S1 = torch.arange(seeds, device=similar_Sm.device)[:, None]
    claim_SC = _keys(similar_Sm.gather(1, column_SC), seed_S1)
    strongest_m = torch.full((m,), torch.iinfo(torch.int64).min, device=similar_Sm.device)
    strongest_m.scatter_reduce_(0, column_SC.flatten(), claim_SC.flatten(), "amax")
    won_SC = claim_SC == strongest_m[column_SC]
    won_SC &= won_SC.cumsum(1) <= group_size
    complete_S = won_SC.sum(1) == group_size
    if not bool(complete_S.any()):  # the first seed goes ahead, so that each round ends with a group more
        return column_SC[:1, :group_size]
    return column_SC[complete_S][won_SC[complete_S]].view(-1, group_size)


def nearest(similar_Sm: Tensor, count: int) -> Tensor:
    """(S, count) columns of the largest similarities, largest first, of equal ones the lower column; exact.

    They lie in the ``count`` blocks of the largest maxima, of equal ones the lower block; only those are looked at.
    """
    seeds, m = similar_Sm.shape
    blocks = m // BLOCK
    column_m = torch.arange(m, device=similar_Sm.device)
    if blocks <= 2 * count:
        return _keys(similar_Sm, column_m).topk(count, dim=1).indices
    best_Sb = similar_Sm[:, : BLOCK * blocks].view(seeds, blocks, BLOCK).amax(2)
    block_SC = _keys(best_Sb, column_m[:blocks]).topk(count, dim=1).indices
    column_SC = (block_SC[:, :, None] * BLOCK + column_m[:BLOCK]).view(seeds, -1)
    column_SC = torch.cat([column_SC, column_m[BLOCK * blocks :].expand(seeds, -1)], 1)
    return column_SC.gather(1, _keys(similar_Sm.gather(1, column_SC), column_SC).topk(count, dim=1).indices)


def _keys(similar: Tensor, position: Tensor) -> Tensor:
    """int64 that order similarities and, of equal ones, put the lower position first."""
    return ((similar * EXACT).long() << 32) - position


def _centroids(vectors_nD: Tensor, groups_TG: Tensor, device: torch.device) -> Tensor:
    """(T, D) of length 1; float16 on a GPU."""
    groups, group_size = groups_TG.shape
    width = vectors_nD.shape[1]
    made_TD = torch.empty(groups, width, dtype=stored(device), device=device)
    at_a_time = max(1, BLOCK_BYTES // (4 * group_size * width))
    for begin in range(0, groups, at_a_time):
        part = groups_TG[begin : begin + at_a_time]
        x_TGD = take(vectors_nD, part.flatten(), device).view(-1, group_size, width)
        # On the grid before it is stored: float16 would round once more, on a GPU only. In float64 a norm's last bit does not matter.
        made_TD[begin : begin + len(part)] = on_grid(unit(x_TGD.sum(1, dtype=torch.float32).double()), device)
    return made_TD


def _finished(folder: Path | None, number: int, rows: Tensor) -> Tensor | None:
    """The order of a part as an earlier run kept it, if it did."""
    path = folder / f"part-{number:05d}.npy" if folder else None
    if path is None or not path.is_file():
        return None
    order = torch.from_numpy(np.load(path, allow_pickle=False))
    return order if torch.equal(order.sort().values, rows) else None


def _keep(folder: Path | None, number: int, order: Tensor) -> None:
    if folder:
        with replacing(folder / f"part-{number:05d}.npy") as file:
            np.save(file, order.numpy(), allow_pickle=False)
