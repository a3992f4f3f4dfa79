"""Dynamic sparse training: which features a group of labels reads, at first and after each rewiring.

Random features are those with the smallest random keys, a key for each (seed, step, global group, feature): the choice is
uniform, distinct without retries, and the same for any sharding.

Regrown features are random ones too, or those that the loss asks for most (RigL's rule, for groups): the largest sum over the
group's labels of |dloss/dw|, as if the labels read all features.

Letters: N batch rows, D embedding width, T groups, G rows a group, R rows of a chunk, F fan-in.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from haste_kernels.chunks import chunks, spans
from haste_kernels.losses import loss_and_gradient_
from haste_kernels.products import bmm, mm, operand_dtype
from haste_kernels.rounding import FEATURES, FLOAT8, REGROW, random_words
from haste_kernels.state import Loss, Positives, TailState

_NEVER = 1 << 62

# Both are asked for groups first..last-1, as (first, last), a few at a time: with all groups' scores a rewiring would need gigabytes.
FeatureScores = Callable[[int, int], Tensor]  # scores (last - first, D) of the features
Prune = Callable[[int, int], Tensor]  # (last - first, F) bool: which connections go


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


def scoring_spans(tail: TailState) -> list[tuple[int, int]]:
    """Ranges of groups whose connections are scored, and the weakest found, in bounded memory."""
    _, size, fan_in = tail.weight.shape
    return spans(tail.weight.shape[0], fan_in * (16 * size + 32), tail.weight.device)


def connection_scores(tail: TailState, first: int = 0, last: int | None = None) -> Tensor:
    """(last - first, F) float32: mean |w| of each connection over its group's real labels, for groups first..last-1.

    Summed in float64, which hardly rounds: so a score does not depend on which groups are asked for together.
    """
    groups, size, _ = tail.weight.shape
    last = groups if last is None else last
    weight = tail.weight[first:last].double()
    sums = torch.linalg.vector_norm(weight, 1, dim=1)
    real = (tail.rows - size * torch.arange(first, last, device=weight.device)).clamp_(1, size)
    if tail.rows < last * size and last > first:
        sums[-1] = torch.linalg.vector_norm(weight[-1, : tail.rows - (last - 1) * size], 1, dim=0)
    return sums.div_(real[:, None]).float()


@torch.no_grad()
def gradient_scores(x_ND: Tensor, positives: Positives, tail: TailState, loss: Loss, first: int, last: int) -> Tensor:
    """(last - first, D) float32: for groups first..last-1 the sum over real labels of |dloss/dw| of each feature, read or not.

    At the weights of now, for the loss summed over the batch, unscaled. ``positives`` are those of the whole shard, rows relative
    to ``tail.first_row``. Costs what a dense layer's weight gradient does: 2 N D operations a label.
    """
    n, width = x_ND.shape
    _, size, fan_in = tail.weight.shape
    rows = min(tail.rows, last * size) - first * size
    each = 4 * (fan_in * n + 3 * size * n + size * width + width)  # bytes of temporaries a group
    x_ND = x_ND.to(operand_dtype(x_ND, tail.weight))
    x_DN = x_ND.T.contiguous()
    scores = torch.empty(last - first, width, dtype=torch.float32, device=x_ND.device)
    inside = Positives(positives.batch, positives.row - first * size)
    for start, stop, flat, weight in chunks(last - first, size, rows, each, inside, n):
        here = slice(first + start, first + stop)
        xg_TFN = x_DN.index_select(0, tail.index[here].reshape(-1).long()).view(-1, fan_in, n)
        z_TGN = bmm(tail.weight[here].to(x_ND.dtype), xg_TFN)
        if tail.bias is not None:
            z_TGN += tail.bias[here, :, None]
        z_RN = z_TGN.flatten(0, 1)
        real = min(rows - start * size, len(z_RN))
        loss_and_gradient_(z_RN[:real], flat, weight, loss, want_loss=False)
        z_RN[real:] = 0
        dw_RD = mm(z_RN.to(x_ND.dtype), x_ND)
        scores[start:stop] = dw_RD.abs_().view(-1, size, width).sum(1)
    return scores


@torch.no_grad()
def prune_and_regrow(tail: TailState, prune: Prune, width: int, seed: int, step: int, scores: FeatureScores | None = None) -> int:
    """Gives each connection that ``prune`` names a feature that its group did not have, weight 0 and momentum 0.

    The features of the largest ``scores``, of equal ones the lower, or random ones where there are no scores; one that is pruned
    now does not come back at once. In place; ``tail.index`` stays ascending, weights and momentum move along. A group has
    ``width`` - F free features: where more are pruned, those of the lowest connection score are replaced and the rest stay.
    ``prune`` and ``scores`` are asked for a range of groups just before that range changes: (T, F) and (T, D) values never exist.
    Returns the number replaced.
    """
    groups, size, fan_in = tail.weight.shape
    device = tail.weight.device
    free = width - fan_in
    replaced = 0
    for start, stop in spans(groups, 64 * width + fan_in * (16 * size + 32), device):
        cut, index = prune(start, stop), tail.index[start:stop].long()
        if free < fan_in:
            score = connection_scores(tail, start, stop).masked_fill_(~cut, torch.inf)
            rank = score.argsort(dim=1, stable=True).argsort(dim=1)
            cut = cut & (rank < free)
        each = cut.sum(1)
        most = int(each.max())
        if most == 0:
            continue
        replaced += int(each.sum())
        if scores is None:
            keys = _keys(tail.first_group + start, stop - start, width, seed, step, REGROW, device)
            fresh = keys.scatter_(1, index, _NEVER).topk(most, dim=1, largest=False, sorted=True).indices
        else:  # a stable sort: topk leaves open which of equal scores it takes
            wanted = scores(start, stop).scatter(1, index, -torch.inf)
            fresh = wanted.sort(dim=1, descending=True, stable=True).indices[:, :most]
        nth = cut.cumsum(1).sub_(1).clamp_(min=0)
        index, order = torch.where(cut, fresh.gather(1, nth), index).sort(dim=1)
        tail.index[start:stop] = index.to(tail.index.dtype)
        for value in (tail.weight, tail.momentum):
            if value is not None:
                value = value.view(torch.uint8) if value.dtype == FLOAT8 else value  # torch moves bytes, and 0 is 0
                kept = value[start:stop].masked_fill(cut[:, None], 0)
                value[start:stop] = kept.gather(2, order[:, None].expand_as(kept))
    return replaced


def _keys(first_group: int, count: int, width: int, seed: int, step: int, stream: int, device: torch.device) -> Tensor:
    """(count, width) int64: 32 random bits, then the feature itself, so that no two keys of a group are equal."""
    groups = torch.arange(first_group, first_group + count, device=device)
    words = random_words(seed, step, groups, -(-width // 4), stream).flatten(1)[:, :width]
    return words << 24 | torch.arange(width, device=device)
