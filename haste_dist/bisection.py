"""Balanced recursive bisection: unit vectors into groups of exactly G, close ones together, neighbouring groups close.

The tree's root holds all groups; a node of c groups is cut into ceil(c/2) and floor(c/2) by spherical 2-means with halves
of fixed size. The nodes of a level have one of two sizes, so a level is at most two batched computations: no loop over
vectors or groups.

Exactness: vectors and cutting directions are rounded to multiples of 2^-11. A product is then a multiple of 2^-22, and
partial sums of a similarity stay under about 1, so float32 holds each of them exactly: the order of summation cannot
matter, and the result is the same for any number of threads and on any device. float16 holds the vectors exactly, too.

Letters: n vectors, D width, G group size, T groups, R = T*G, K nodes of a level, B of them at a time, s rows of a node.
"""

import torch
from torch import Tensor

BLOCK_BYTES = 2**30  # vectors of equal nodes are taken together up to this much, and one node at least
EXACT_ROWS = 4096  # that many multiples of 2^-11, each at most 1, have an exact float32 sum: 2^12 * 2^11 < 2^24
GRID = 2.0**11


def bisect(vectors_nD: Tensor, group_size: int, *, iterations: int = 8, seed: int = 0) -> Tensor:
    """Order (n,) int64 of the rows of ``vectors_nD`` (unit length, float), on its device; runs of G rows are the groups.

    ``iterations`` of 2-means a node, from a random cut drawn by ``seed``. Only the last group can have fewer than G rows.
    """
    n, width = vectors_nD.shape
    device = vectors_nD.device
    groups = -(-n // group_size)
    # Rows that the last group lacks are zero vectors, numbered n and up, that always sort last.
    x_RD = torch.zeros(groups * group_size, width, dtype=torch.float16 if device.type == "cuda" else torch.float32, device=device)
    x_RD[:n] = _on_grid(vectors_nD)
    order_R = torch.arange(len(x_RD), device=device)
    counts_K = torch.tensor([groups])  # groups in each node, left to right; on the CPU, so that shapes need no sync
    generator = torch.Generator().manual_seed(seed)
    while groups and int(counts_K.max()) > 1:
        toss_R = torch.rand(len(order_R), generator=generator).to(device)
        total_KD = _node_totals(x_RD, counts_K, group_size)
        back_KD = _way_back(total_KD)
        first_K = (counts_K.cumsum(0) - counts_K) * group_size
        moved_R = torch.arange(len(order_R), device=device)
        for count in counts_K[counts_K > 1].unique().tolist():
            nodes = (counts_K == count).nonzero()[:, 0]
            s = count * group_size
            at_a_time = max(1, BLOCK_BYTES // (s * width * x_RD.element_size()))
            for node_B in nodes.split(at_a_time):
                rows_Bs = (first_K[node_B, None] + torch.arange(s)).to(device)
                x_BsD = x_RD.unsqueeze(0) if len(counts_K) == 1 else x_RD[rows_Bs]
                on_device = node_B.to(device)
                left = -(-count // 2) * group_size
                cut_Bs = _cut(x_BsD, order_R[rows_Bs] >= n, toss_R[rows_Bs], total_KD[on_device], back_KD[on_device], left, iterations)
                moved_R[rows_Bs] = rows_Bs.gather(1, cut_Bs)
        x_RD, order_R = x_RD[moved_R], order_R[moved_R]
        halves = torch.stack([(counts_K + 1) // 2, counts_K // 2], 1).view(-1)
        counts_K = halves[halves > 0]
    return order_R[order_R < n]


def cohesion(vectors_nD: Tensor, order_n: Tensor, group_size: int) -> float:
    """Mean cosine of a vector (unit length) to the centroid of its group, where runs of G of ``order_n`` are the groups."""
    n, width = vectors_nD.shape
    summed = torch.zeros((), dtype=torch.float64, device=vectors_nD.device)
    at_a_time = max(1, BLOCK_BYTES // (width * 4 * group_size)) * group_size
    for part in order_n.split(at_a_time):
        missing = -len(part) % group_size
        x_gGD = torch.nn.functional.pad(vectors_nD[part], (0, 0, 0, missing)).view(-1, group_size, width)
        summed += x_gGD.double().sum(1).norm(dim=1).sum()  # the cosines of a group to its centroid add up to the length of its sum
    return float(summed) / max(n, 1)


def _cut(x_BsD: Tensor, padding_Bs: Tensor, toss_Bs: Tensor, total_BD: Tensor, back_BD: Tensor, left: int, iterations: int) -> Tensor:
    """Order (B, s) int64 of the rows of B nodes: the first ``left`` of each make its left half."""
    score_Bs = toss_Bs.masked_fill(padding_Bs, -torch.inf)
    for i in range(iterations):
        left_Bs = torch.zeros_like(score_Bs).scatter_(1, _descending(score_Bs)[:, :left], 1.0)
        left_BD = _exact_sum(left_Bs, x_BsD)
        direction_BD = _unit(_unit(left_BD) - _unit(total_BD - left_BD))  # the larger the product, the nearer to the left centroid
        if i == iterations - 1:  # the left half is to be the one nearer to the node before, so that neighbouring groups are close
            direction_BD = torch.where((direction_BD * back_BD).sum(1, keepdim=True) < 0, -direction_BD, direction_BD)
        score_Bs = _matmul(x_BsD, _on_grid(direction_BD).to(x_BsD.dtype).unsqueeze(2)).squeeze(2).masked_fill(padding_Bs, -torch.inf)
    return _descending(score_Bs)


def _node_totals(x_RD: Tensor, counts_K: Tensor, group_size: int) -> Tensor:
    """(K, D) float64 sum of each node's rows: exact, so a difference of running sums is."""
    sum_TD = x_RD.view(-1, group_size, x_RD.shape[1]).sum(1, dtype=torch.float32)
    running = torch.cat([torch.zeros_like(sum_TD[:1], dtype=torch.float64), sum_TD.cumsum(0, dtype=torch.float64)])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts_K.cumsum(0)]).to(x_RD.device)
    return running[ends[1:]] - running[ends[:-1]]


def _way_back(total_KD: Tensor) -> Tensor:
    """(K, D) from the centroid of the node after to that of the node before; an end of the row has none, which is zero."""
    centre_KD = torch.nn.functional.pad(_unit(total_KD), (0, 0, 1, 1))
    return centre_KD[:-2] - centre_KD[2:]


def _exact_sum(weight_Bs: Tensor, x_BsD: Tensor) -> Tensor:
    """(B, D) float64 sum of the rows of weight 1 (the others have 0): float32 holds each part exactly, float64 the whole."""
    total_BD = torch.zeros(x_BsD.shape[0], x_BsD.shape[2], dtype=torch.float64, device=x_BsD.device)
    for begin in range(0, x_BsD.shape[1], EXACT_ROWS):
        part = slice(begin, begin + EXACT_ROWS)
        total_BD += _matmul(weight_Bs[:, None, part].to(x_BsD.dtype), x_BsD[:, part]).squeeze(1)
    return total_BD


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched product, accumulated and returned in float32 whatever the storage."""
    return torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)


def _descending(score_Bs: Tensor) -> Tensor:
    return torch.sort(score_Bs, dim=1, descending=True, stable=True).indices  # stable: ties fall the same way everywhere


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _on_grid(x: Tensor) -> Tensor:
    return (x * GRID).round_().div_(GRID)
