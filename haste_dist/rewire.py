"""Dynamic sparse training: when and which connections of the tail are replaced (HASTE, arXiv 2606.01117, dynamic sparsity).

A connection is one feature of one group, shared by the group's labels; its score is the mean |w| over them. The kernels
score and replace; here the choice is made, for each group on its own or over the groups of all ranks.

With grow=gradient (RigL, arXiv 1911.11134, for groups) the last batches before a rewiring are kept: embeddings and label rows,
which every rank has. A checkpoint written among them holds them too, so that a resumed run chooses as an unbroken one does: the
embeddings cannot be computed again, for the encoder has moved on since.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from haste_dist.classifier import Classifier, counted_from, sort_positives
from haste_dist.collectives import sum_over_ranks
from haste_dist.config import RewireConfig
from haste_dist.schedule import rewire_fraction
from haste_dist.world import World
from haste_kernels import FeatureScores, connection_scores, gradient_scores, prune_and_regrow


@dataclass(frozen=True)
class Rewired:
    """What one rewiring did, over all ranks."""

    replaced: int
    connections: int
    fraction: float  # that was asked for


def rewire(classifier: Classifier, config: RewireConfig, fraction: float, step: int, world: World) -> Rewired:
    """Replaces the weakest connections of the tail. Every rank calls it at the same step; the outcome does not depend on W."""
    tail = classifier.tail
    scores_TF = connection_scores(tail)
    total = classifier.shard.all_groups * scores_TF.shape[1]
    if config.prune == "group":
        prune_TF = lowest_per_group(scores_TF, fraction)
    elif config.prune == "global":
        prune_TF = lowest_overall(scores_TF, round(fraction * total), world)
    else:
        prune_TF = scores_TF < config.threshold
    replaced = 0
    if tail.weight.shape[0]:
        wanted = gradients(classifier, config.batches) if config.grow == "gradient" else None
        replaced = prune_and_regrow(tail, prune_TF, classifier.tail_slice.width, classifier.seed, step, wanted)
    classifier.kept.clear()
    replaced = int(sum_over_ranks(torch.tensor([replaced], device=scores_TF.device), world))
    return Rewired(replaced, total, fraction)


def keeps_batch(config: RewireConfig, step: int, total: int) -> bool:
    """Whether the batch that completes ``step`` steps is among the last before a rewiring that wants gradients. Pure."""
    if config.grow != "gradient" or not config.interval:
        return False
    next_one = -(-step // config.interval) * config.interval
    due = rewire_fraction(next_one, total, config.interval, config.until, config.fraction) > 0
    return due and next_one - step < config.batches


def gradients(classifier: Classifier, batches: int) -> FeatureScores:
    """Scores of features: |dloss/dw| over the labels of a group, at the weights of now, summed over the last ``batches`` kept."""
    tail = classifier.tail
    kept = [(x, counted_from(sort_positives(rows), tail.first_row)) for x, rows in classifier.kept[-batches:]]
    if not kept:
        raise ValueError("grow=gradient: no batch was kept before this rewiring")

    def scores(first: int, last: int) -> Tensor:
        total = torch.zeros(last - first, classifier.tail_slice.width, device=tail.weight.device)
        for x_ND, positives in kept:
            total += gradient_scores(x_ND, positives, tail, classifier.config.loss, first, last)  # type: ignore[arg-type]
        return total

    return scores


def lowest_per_group(scores_TF: Tensor, fraction: float) -> Tensor:
    """(T, F) bool: the round(fraction * F) lowest scores of each group; of equal ones the lower slot."""
    count = round(fraction * scores_TF.shape[1])
    order = scores_TF.argsort(dim=1, stable=True)
    return torch.zeros_like(scores_TF, dtype=torch.bool).scatter_(1, order[:, :count], True)


def lowest_overall(scores_TF: Tensor, count: int, world: World) -> Tensor:
    """(T, F) bool: the ``count`` lowest scores of all ranks together, and those equal to the highest of them.

    Non-negative floats order as their bits do, so 31 rounds of bisection find the limit exactly without moving a score, and without
    the host looking at a sum.
    """
    bits_TF = scores_TF.float().contiguous().view(torch.int32)
    if count <= 0:
        return torch.zeros_like(scores_TF, dtype=torch.bool)
    low = torch.full((1,), -1, device=scores_TF.device)
    high = torch.full((1,), 2**31 - 1, device=scores_TF.device)  # the limit is in (low, high], 2^31 numbers at first
    for _ in range(31):
        middle = (low + high) // 2
        enough = sum_over_ranks((bits_TF <= middle).sum().reshape(1), world) >= count
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return bits_TF <= high
