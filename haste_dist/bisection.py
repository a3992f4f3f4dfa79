"""Vectors into halves of fixed size by spherical 2-means, and, halved again and again, into an order in which neighbours are close.

The nodes of a level of the recursion have one of two sizes, so a level is at most two batched computations: no loop over
vectors. Each vector is left out of the mean that it is compared with; otherwise a small half holds on to whatever it began with.

Exactness: vectors and cutting directions are rounded to multiples of 2^-11. A product is then a multiple of 2^-22, and
partial sums of a similarity stay under about 1, so float32 holds each of them exactly: the order of summation cannot
matter, and the result is the same for any number of threads and on any device. float16 holds the vectors exactly, too.

Letters: n vectors, D width, K nodes of a level, B of them at a time, s rows of a node.
"""

import torch
from torch import Tensor

BLOCK_BYTES = 2**28  # vectors are taken together up to this much, and one node at least
EXACT_ROWS = 4096  # that many multiples of 2^-11, each at most 1, have an exact float32 sum: 2^12 * 2^11 < 2^24
SAMPLE = 65536  # vectors that decide how a large set is halved
GRID = 2.0**11


def seriate(vectors_nD: Tensor, *, iterations: int = 8, seed: int = 0) -> Tensor:
    """Order (n,) int64 of the rows of ``vectors_nD`` (unit length, float), on its device, in which close ones stand together.

    ``iterations`` of 2-means a node, from a random cut drawn by ``seed``; of two halves, the one nearer to the node before comes first.
    """
    n, width = vectors_nD.shape
    device = vectors_nD.device
    x_nD = on_grid(vectors_nD, device)
    order_n = torch.arange(n, device=device)
    counts_K = torch.tensor([n])  # rows of each node, left to right; on the CPU, so that shapes need no sync
    generator = torch.Generator().manual_seed(seed)
    while n and int(counts_K.max()) > 1:
        toss_n = torch.rand(n, generator=generator).to(device)
        first_K = counts_K.cumsum(0) - counts_K
        total_KD = _node_totals(x_nD, counts_K)
        back_KD = _way_back(total_KD)
        moved_n = torch.arange(n, device=device)
        for s in counts_K[counts_K > 1].unique().tolist():
            nodes = (counts_K == s).nonzero()[:, 0]
            for node_B in nodes.split(max(1, BLOCK_BYTES // (s * width * x_nD.element_size()))):
                rows_Bs = (first_K[node_B, None] + torch.arange(s)).to(device)
                x_BsD = x_nD.unsqueeze(0) if len(counts_K) == 1 else x_nD[rows_Bs]
                at = node_B.to(device)
                direction_BD = _direction(x_BsD, toss_n[rows_Bs], total_KD[at], -(-s // 2), iterations)
                # The left half is to be the one nearer to the node before, so that neighbours are close.
                direction_BD = torch.where((direction_BD * back_KD[at]).sum(1, keepdim=True) < 0, -direction_BD, direction_BD)
                moved_n[rows_Bs] = rows_Bs.gather(1, _descending(_scores(x_BsD, direction_BD)))
        x_nD, order_n = x_nD[moved_n], order_n[moved_n]
        halves = torch.stack([(counts_K + 1) // 2, counts_K // 2], 1).view(-1)
        counts_K = halves[halves > 0]
    return order_n


def halve(vectors_nD: Tensor, rows: Tensor, left: int, *, iterations: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``rows`` (int64, of ``vectors_nD``, on any device) in two: the ``left`` of them nearest to one of two means, and the others.

    The means are those of a sample; nothing of the size of the vectors is made. Rows come and go on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:SAMPLE].sort().values
    x_1sD = take(vectors_nD, rows[chosen], device)[None]
    toss_1s = torch.rand(1, len(chosen), generator=generator).to(device)
    everything = torch.ones_like(toss_1s)
    share = round(left / len(rows) * len(chosen))
    direction_1D = _direction(x_1sD, toss_1s, _exact_sum(everything, x_1sD), share, iterations)
    at_a_time = max(1, BLOCK_BYTES // (vectors_nD.shape[1] * 4))
    score_1n = torch.cat([_scores(take(vectors_nD, part, device)[None], direction_1D) for part in rows.split(at_a_time)], 1)
    order = _descending(score_1n)[0].cpu()
    return rows[order[:left]].sort().values, rows[order[left:]].sort().values


def cohesion(vectors_nD: Tensor, order_n: Tensor, group_size: int, device: torch.device | None = None) -> float:
    """Mean cosine of a vector (unit length) to the centroid of its group, where runs of G of ``order_n`` are the groups."""
    here_T, _ = group_cohesion(vectors_nD, order_n, group_size, device or vectors_nD.device)
    members_T = torch.full((len(here_T),), group_size, dtype=torch.float64)
    members_T[-1:] -= -len(order_n) % group_size
    return float((here_T.double() @ members_T) / max(len(order_n), 1))


def group_cohesion(vectors_nD: Tensor, order_n: Tensor, group_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two (T,) float64 on the CPU: the mean cosine of a group's vectors to its centroid; the centroid's to the next one (0: last)."""
    width = vectors_nD.shape[1]
    here, after, last_1D = [], [], torch.zeros(0, width, dtype=torch.float64, device=device)
    at_a_time = max(1, BLOCK_BYTES // (width * 8 * group_size)) * group_size
    for part in order_n.split(at_a_time):
        x_gGD = torch.nn.functional.pad(_take(vectors_nD, part, device).double(), (0, 0, 0, -len(part) % group_size))
        sum_gD = x_gGD.view(-1, group_size, width).sum(1)
        here.append(sum_gD.norm(dim=1).cpu())  # the cosines of a group to its centroid add up to the length of its sum
        centre_gD = torch.cat([last_1D, unit(sum_gD)])
        after.append((centre_gD[:-1] * centre_gD[1:]).sum(1).cpu())
        last_1D = centre_gD[-1:]
    if not here:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    members_T = torch.full((-(-len(order_n) // group_size),), group_size, dtype=torch.float64)
    members_T[-1] -= -len(order_n) % group_size
    return torch.cat(here) / members_T, torch.cat([*after, torch.zeros(1, dtype=torch.float64)])


def take(vectors_nD: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Some of the vectors on ``device``, rounded to the grid; they may lie elsewhere, in a mapped file or on another GPU for instance.

    Besides the result, BLOCK_BYTES at a time are made where they lie and on ``device``.
    """
    width = vectors_nD.shape[1]
    taken = torch.empty(len(rows), width, dtype=stored(device), device=device)
    at_a_time = max(1, BLOCK_BYTES // (4 * width))
    for begin in range(0, len(rows), at_a_time):
        part = rows[begin : begin + at_a_time]
        taken[begin : begin + len(part)] = on_grid(_take(vectors_nD, part, device), device)
    return taken


def on_grid(x: Tensor, device: torch.device) -> Tensor:
    """Rounded to multiples of 2^-11."""
    return x.to(torch.float32, copy=True).mul_(GRID).round_().div_(GRID).to(stored(device))


def stored(device: torch.device) -> torch.dtype:
    """What vectors are kept in: float16 on a GPU, float32 on a CPU, which multiplies in that."""
    return torch.float16 if device.type == "cuda" else torch.float32


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched product, accumulated and returned in float32 whatever the storage."""
    return torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)


def _take(vectors_nD: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    return vectors_nD.index_select(0, rows.to(vectors_nD.device)).to(device)


def _direction(x_BsD: Tensor, toss_Bs: Tensor, total_BD: Tensor, left: int, iterations: int) -> Tensor:
    """(B, D) float64 on the grid: the larger a row's product with it, the nearer it is to the left mean."""
    score_Bs = toss_Bs
    for i in range(iterations):
        left_Bs = torch.zeros_like(score_Bs).scatter_(1, _descending(score_Bs)[:, :left], 1.0)
        left_BD = _exact_sum(left_Bs, x_BsD)
        right_BD = total_BD - left_BD
        gap_BD = unit(left_BD) - unit(right_BD)
        direction_BD = on_grid(unit(gap_BD), x_BsD.device)
        if i < iterations - 1:
            score_Bs = _scores(x_BsD, direction_BD) - _own_share(left_Bs, left_BD, right_BD, gap_BD)
    return direction_BD.double()


def _own_share(left_Bs: Tensor, left_BD: Tensor, right_BD: Tensor, gap_BD: Tensor) -> Tensor:
    """(B, s): what the score of a row, of length 1, owes to the row itself standing in its half's mean."""
    gap_B1 = gap_BD.norm(dim=1, keepdim=True).clamp(min=1e-6)
    left_B1, right_B1 = (1 / (part.norm(dim=1, keepdim=True).clamp(min=1e-6) * gap_B1) for part in (left_BD, right_BD))
    return torch.where(left_Bs > 0, left_B1.float(), -right_B1.float())


def _scores(x_BsD: Tensor, direction_BD: Tensor) -> Tensor:
    return matmul(x_BsD, direction_BD.to(x_BsD.dtype).unsqueeze(2)).squeeze(2)


def _node_totals(x_nD: Tensor, counts_K: Tensor) -> Tensor:
    """(K, D) float64 sum of each node's rows: exact, so a difference of running sums is."""
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts_K.cumsum(0)]).to(x_nD.device)
    running = torch.cat([torch.zeros_like(x_nD[:1], dtype=torch.float64), x_nD.cumsum(0, dtype=torch.float64)])
    return running[ends[1:]] - running[ends[:-1]]


def _way_back(total_KD: Tensor) -> Tensor:
    """(K, D) from the centroid of the node after to that of the node before; an end of the row has none, which is zero."""
    centre_KD = torch.nn.functional.pad(unit(total_KD), (0, 0, 1, 1))
    return centre_KD[:-2] - centre_KD[2:]


def _exact_sum(weight_Bs: Tensor, x_BsD: Tensor) -> Tensor:
    """(B, D) float64 sum of the rows of weight 1 (the others have 0): float32 holds each part exactly, float64 the whole."""
    total_BD = torch.zeros(x_BsD.shape[0], x_BsD.shape[2], dtype=torch.float64, device=x_BsD.device)
    for begin in range(0, x_BsD.shape[1], EXACT_ROWS):
        part = slice(begin, begin + EXACT_ROWS)
        total_BD += matmul(weight_Bs[:, None, part].to(x_BsD.dtype), x_BsD[:, part]).squeeze(1)
    return total_BD


def _descending(score_Bs: Tensor) -> Tensor:
    return torch.sort(score_Bs, dim=1, descending=True, stable=True).indices  # stable: ties fall the same way everywhere
