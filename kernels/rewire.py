"""Dynamic sparse training: which features a group of labels reads, at first and after each rewiring.

Random features are those with the smallest random keys, a key for each (seed, step, global group, feature): the choice is
uniform, distinct without retries, and the same for any sharding.

Letters: T groups, G rows a group, F fan-in, D embedding width.
"""

import torch
from torch import Tensor

from haste_kernels.chunks import spans
from haste_kernels.rounding import FEATURES, REGROW, random_words
from haste_kernels.state import TailState

_NEVER = 1 << 62


def index_dtype(width: int) -> torch.dtype:
    """The smaller of int16 and int32 that holds every feature below ``width``."""
    return torch.int16 if width <= 1 << 15 else torch.int32


def random_features(first_group: int, count: int, width: int, fan_in: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """(count, fan_in) ascending distinct features below ``width`` for global groups ``first_group``...; int16 where it fits."""
    if not 0 < fan_in <= width:
        raise ValueError(f"fan_in={fan_in}: between 1 and the width {width}")
    device = torch.device(device)
    made = torch.empty(count, fan_in, dtype=index_dtype(width), device=device)
    for start, stop in spans(count, 64 * width, device):
        keys = _keys(first_group + start, stop - start, width, seed, 0, FEATURES, device)
        made[start:stop] = keys.topk(fan_in, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
    return made


def connection_scores(tail: TailState) -> Tensor:
    """(T, F) float32: mean |w| of each connection over its group's real labels."""
    groups, size, _ = tail.weight.shape
    real = (tail.rows - size * torch.arange(groups, device=tail.weight.device)).clamp_(1, size)
    scores = torch.linalg.vector_norm(tail.weight, 1, dim=1, dtype=torch.float32)
    if tail.rows < groups * size:
        last = tail.rows // size
        scores[last] = torch.linalg.vector_norm(tail.weight[last, : tail.rows - last * size], 1, dim=0, dtype=torch.float32)
    return scores.div_(real[:, None])


@torch.no_grad()
def prune_and_regrow(tail: TailState, prune: Tensor, width: int, seed: int, step: int) -> int:
    """Gives each connection of ``prune`` (T, F) bool a random feature that its group did not have, weight 0 and momentum 0.

    In place; ``tail.index`` stays ascending, weights and momentum move along. A group has ``width`` - F free features: where
    more are pruned, those of the lowest score are replaced and the rest stay. Returns the number replaced.
    """
    groups, _, fan_in = tail.weight.shape
    free = width - fan_in
    if free < fan_in:
        score = connection_scores(tail).masked_fill_(~prune, torch.inf)
        rank = score.argsort(dim=1, stable=True).argsort(dim=1)
        prune = prune & (rank < free)
    most = int(prune.sum(1).max()) if groups else 0
    if most == 0:
        return 0
    for start, stop in spans(groups, 64 * width + 16 * tail.weight[0].numel(), prune.device):
        cut, index = prune[start:stop], tail.index[start:stop].long()
        keys = _keys(tail.first_group + start, stop - start, width, seed, step, REGROW, prune.device)
        keys.scatter_(1, index, _NEVER)
        fresh = keys.topk(most, dim=1, largest=False, sorted=True).indices
        nth = cut.cumsum(1).sub_(1).clamp_(min=0)
        index, order = torch.where(cut, fresh.gather(1, nth), index).sort(dim=1)
        tail.index[start:stop] = index.to(tail.index.dtype)
        for value in (tail.weight, tail.momentum):
            if value is not None:
                kept = value[start:stop].masked_fill(cut[:, None], 0)
                value[start:stop] = kept.gather(2, order[:, None].expand_as(kept))
    return int(prune.sum())


def _keys(first_group: int, count: int, width: int, seed: int, step: int, stream: int, device: torch.device) -> Tensor:
    """(count, width) int64: 32 random bits, then the feature itself, so that no two keys of a group are equal."""
    groups = torch.arange(first_group, first_group + count, device=device)
    words = random_words(seed, step, groups, -(-width // 4), stream).flatten(1)[:, :width]
    return words << 24 | torch.arange(width, device=device)
