"""Dynamic sparse training: when and which connections of the tail are replaced (HASTE, arXiv 2606.01117, dynamic sparsity).

A connection is one feature of one group, shared by the group's labels; its score is the mean |w| over them. The kernels
score and replace; here the choice is made, for each group on its own or over the groups of all ranks.

With grow=gradient (RigL, arXiv 1911.11134, for groups) the last batches before a rewiring are kept: embeddings and label rows,
which every rank has. A checkpoint written among them holds them too, so that a resumed run chooses as an unbroken one does: the
embeddings cannot be computed again, for the encoder has moved on since.

Replicas of the same groups (``launch.label_parallel``) choose the same: they score equal weights, and the sum of the gradients' scores, of
which each makes those of some batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from haste_dist.classifier import Classifier, counted_from, sort_positives
from haste_dist.collectives import sum_over_ranks
from haste_dist.config import RewireConfig
from haste_dist.schedule import rewire_fraction
from haste_dist.world import Ranks, World
from haste_kernels import FeatureScores, Prune, TailState, connection_scores, gradient_scores, prune_and_regrow, scoring_spans

ALONE = Ranks(0, 1)


@dataclass(frozen=True)
class Rewired:
    """What one rewiring did, over all ranks."""

    replaced: int
    connections: int
    fraction: float  # that was asked for


def share_due(config: RewireConfig, step: int, total: int) -> float:
    """What of the tail is replaced after ``step`` of ``total`` steps; 0 when no rewiring is due. Pure."""
    share = rewire_fraction(step, total, config.interval, config.until, config.fraction)
    return config.fraction if share and config.grow == "embeddings" else share


def rewire(classifier: Classifier, config: RewireConfig, fraction: float, step: int, world: World) -> Rewired:
    """Replaces the weakest connections of the tail. Every rank calls it at the same step; the outcome does not depend on W.

    Nothing is replaced where gradients are wanted and every batch was passed over for its numbers. Not for grow=embeddings, which is
    reembedding.py's.
    """
    tail = classifier.tail
    total = classifier.shard.all_groups * tail.weight.shape[2]
    if config.grow == "gradient" and not classifier.kept:  # so on all ranks
        return Rewired(0, total, fraction)
    prune = weakest(tail, config, fraction, total, world.shards)
    wanted = gradients(classifier, config.batches, world.copies) if config.grow == "gradient" and len(tail.weight) else None
    replaced = prune_and_regrow(tail, prune, classifier.tail_slice.width, classifier.seed, step, wanted)
    classifier.kept.clear()
    replaced = int(sum_over_ranks(torch.tensor([replaced], device=tail.weight.device), world.shards))
    return Rewired(replaced, total, fraction)


def weakest(tail: TailState, config: RewireConfig, fraction: float, total: int, shards: Ranks) -> Prune:
    """Which connections go. ``total`` of all shards; every rank calls it."""
    if config.prune == "group":
        return lambda first, last: lowest_per_group(connection_scores(tail, first, last), fraction)
    if config.prune == "global":
        limit = limit_of_lowest(tail, round(fraction * total), shards)
        return lambda first, last: _bits(connection_scores(tail, first, last)) <= limit
    return lambda first, last: connection_scores(tail, first, last) < config.threshold


def keeps_batch(config: RewireConfig, step: int, total: int) -> bool:
    """Whether the batch that completes ``step`` steps is among the last before a rewiring that wants gradients. Pure."""
    if config.grow != "gradient" or not config.interval:
        return False
    next_one = -(-step // config.interval) * config.interval
    due = rewire_fraction(next_one, total, config.interval, config.until, config.fraction) > 0
    return due and next_one - step < config.batches


def gradients(classifier: Classifier, batches: int, copies: Ranks = ALONE) -> FeatureScores:
    """Scores of features: |dloss/dw| over the labels of a group, at the weights of now, summed over the last ``batches`` kept.

    The scores are the same on the ranks of ``copies``, all of which ask for the same groups in turn.
    """
    tail = classifier.tail
    kept = [(x, counted_from(sort_positives(rows), tail.first_row)) for x, rows in classifier.kept[-batches:]]
    if not kept:
        raise ValueError("grow=gradient: no batch was kept before this rewiring")

    def scores(first: int, last: int) -> Tensor:
        total = torch.zeros(last - first, classifier.tail_slice.width, device=tail.weight.device)
        for x_ND, positives in kept[copies.rank :: copies.size]:
            total += gradient_scores(x_ND, positives, tail, classifier.config.loss, first, last)  # type: ignore[arg-type]
        return sum_over_ranks(total, copies)

    return scores


def lowest_per_group(scores_TF: Tensor, fraction: float) -> Tensor:
    """(T, F) bool: the round(fraction * F) lowest scores of each group; of equal ones the lower slot."""
    count = round(fraction * scores_TF.shape[1])
    order = scores_TF.argsort(dim=1, stable=True)
    return torch.zeros_like(scores_TF, dtype=torch.bool).scatter_(1, order[:, :count], True)


def limit_of_lowest(tail: TailState, count: int, shards: Ranks) -> int:
    """The bits of the ``count``-th lowest score of all shards; -1, below all, where ``count`` is 0, and the highest where it is too many.

    Non-negative floats order as their bits do: counting the scores by one byte after another finds the limit without moving or
    keeping any. Every rank calls it.
    """
    if count <= 0:
        return -1
    known = 0  # the limit's higher bytes
    for shift in (24, 16, 8, 0):
        counts = torch.zeros(256, dtype=torch.int64, device=tail.weight.device)
        for first, last in scoring_spans(tail):
            byte = (_bits(connection_scores(tail, first, last)) >> shift) - (known << 8)
            counts += torch.bincount(byte[(byte >= 0) & (byte < 256)], minlength=256)
        up_to = sum_over_ranks(counts, shards).cumsum(0).tolist()
        count = min(count, up_to[-1])
        byte_of_limit = next(i for i, so_far in enumerate(up_to) if so_far >= count)
        count -= up_to[byte_of_limit - 1] if byte_of_limit else 0
        known = known << 8 | byte_of_limit
    return known


def _bits(scores_TF: Tensor) -> Tensor:
    return scores_TF.view(torch.int32)
