"""New features for the tail, and new weights for it and the head, from label embeddings of now (rewire.grow=embeddings).

A tail that starts from label embeddings (centroids.py) starts from those of the pretrained encoder; while that is trained, they age. Here
all training texts are embedded anew, and each group reads the features in which its labels' embeddings of now are largest. A part of each
label's weights starts anew: its embedding there, as long as they were. The rest is what it has learnt, so far as its group reads the same
features still. The basis of the tail and its groups stay. With ``rewire.head`` rows of the dense head start anew likewise.

Every rank embeds its share of the texts and keeps all of the embeddings, in half precision on the host: 2 D bytes a text. Label embeddings
are made a range of rows at a time, twice: their mean comes first.

Letters: n texts, D embedding width, T groups of a range, R = T * G rows of theirs, F fan-in, M features that the tail reads.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from haste_dist.augmentation import has_label_texts
from haste_dist.centroids import largest_features
from haste_dist.classifier import Classifier, Slice
from haste_dist.collectives import gather_rows, sum_over_ranks
from haste_dist.config import Config
from haste_dist.engine import EncoderEngine
from haste_dist.loader import BatchMaker, Texts, open_texts, scoring_batches
from haste_dist.model import Prepared
from haste_dist.rewire import Rewired
from haste_dist.world import World

NUMBERS = 2**22  # of a range: R * M; of embeddings on the device before they are copied to the host
LEAST = 2.0**-24  # above 0 in float16


@dataclass(frozen=True)
class Range:
    """Some rows of this rank's tail or head, and the embeddings of their labels."""

    first: int
    last: int
    v_RD: Tensor  # float32 on the CPU, rows of length 1, or zero where ``told`` is not
    told_R1: Tensor  # bool: rows with a label that has a text


def reembed(config: Config, prepared: Prepared, engine: EncoderEngine, classifier: Classifier, world: World, share: float) -> Rewired:
    """Sets features and weights of the tail, and with ``rewire.head`` weights of the head; ``share`` of each label's weights starts anew.
    Every rank calls it, after the same step; the outcome depends on their number no more than a training step does. Labels without a text
    keep their weights."""
    shard = classifier.shard
    total = shard.all_groups * classifier.config.fan_in
    with_head = config.rewire.head and prepared.order.head_rows > 0
    if not total and not with_head:
        return Rewired(0, 0, share)
    texts = _texts(config, prepared)
    order = np.argsort(texts.lengths(), kind="stable")
    embedded_nD = _embed(config, prepared, engine, texts, world)
    labels, counts = texts.labels(order)
    rows, which = prepared.order.row_of_label[labels], np.repeat(np.arange(len(order)), counts)

    def texts_of(start: int, stop: int) -> sp.csr_matrix:
        """Which texts rows ``start`` to ``stop`` have, (R, n)."""
        here = (rows >= start) & (rows < stop)
        return sp.csr_matrix((np.ones(int(here.sum()), bool), (rows[here] - start, which[here])), (stop - start, len(order)))

    groups, size, _ = classifier.tail.weight.shape
    tail_Rn = texts_of(shard.tail_start, shard.tail_start + groups * size)
    head_Rn = texts_of(shard.head_start, shard.head_start + len(classifier.head.weight) if with_head else shard.head_start)
    step = max(1, NUMBERS // (size * classifier.tail_slice.width)) * size
    mean_D = torch.zeros(embedded_nD.shape[1] + 1, dtype=torch.float64)
    for part in itertools.chain(_ranges(tail_Rn, embedded_nD, step), _ranges(head_Rn, embedded_nD, step)):
        mean_D[:-1] += part.v_RD.sum(dim=0, dtype=torch.float64)
        mean_D[-1] += part.told_R1.sum()
    mean_D = sum_over_ranks(mean_D.to(world.device), world.shards)
    mean_D = (mean_D[:-1] / mean_D[-1].clamp(min=1)).float()
    replaced = torch.zeros((), dtype=torch.int64, device=world.device)
    for part in _ranges(tail_Rn, embedded_nD, step):
        replaced += _renew_tail(classifier, part, mean_D, share)
    for part in _ranges(head_Rn, embedded_nD, step):
        _renew_head(classifier, part, mean_D, share)
    return Rewired(int(sum_over_ranks(replaced, world.shards)), total, share)


def _texts(config: Config, prepared: Prepared) -> Texts:
    """Those that are trained on, and where labels have texts of their own each of these once."""
    own = config.groups.label_text and has_label_texts(prepared.folder, prepared.manifest)
    return open_texts(prepared.folder, prepared.manifest, "train", config.data.dev_fraction, config.run.seed, int(own))


def _embed(config: Config, prepared: Prepared, engine: EncoderEngine, texts: Texts, world: World) -> Tensor:
    """(n, D) float16 on the CPU, rows of length 1, from the shortest text to the longest: the order of ``scoring_batches``."""
    pin, most = world.device.type == "cuda", prepared.manifest.splits["train"].max_labels
    maker = BatchMaker(texts, prepared.order.row_of_label, most, prepared.manifest.tokenizer.pad_id, world.size, world.rank, pin)
    embedded_nD = torch.empty((len(texts), engine.width), dtype=torch.float16)
    held: list[Tensor] = []
    at = 0
    for batch in scoring_batches(maker, config.evaluate.batch_size):
        mask = None if batch.is_full else batch.attention_mask.to(world.device, non_blocking=True)
        x_BD = engine.embed(batch.input_ids.to(world.device, non_blocking=True), mask)
        x_ND = gather_rows(x_BD, batch.rows, world)
        held.append(torch.nn.functional.normalize(x_ND.float(), dim=1).half())
        rows = sum(map(len, held))
        if rows * engine.width >= NUMBERS or at + rows == len(texts):
            embedded_nD[at : at + rows] = torch.cat(held)  # waits for the GPU
            held, at = [], at + rows
    return embedded_nD


def _ranges(y_Rn: sp.csr_matrix, embedded_nD: Tensor, step: int) -> Iterator[Range]:
    """All rows of ``y_Rn``, ``step`` at a time. A label's embedding is the mean of its texts', brought to length 1."""
    for first in range(0, y_Rn.shape[0], step):
        of_R = y_Rn[first : first + step]
        texts, starts = torch.from_numpy(of_R.indices), torch.from_numpy(of_R.indptr)
        counts_R = starts.diff()
        # A weighted sum adds in float32; mode="mean" adds in float16, which stands still after some thousand texts.
        each_R = counts_R.clamp(min=1).reciprocal().clamp(min=LEAST).half()
        weights = each_R.repeat_interleave(counts_R)
        v_RD = torch.nn.functional.embedding_bag(texts, embedded_nD, starts[:-1], mode="sum", per_sample_weights=weights)
        yield Range(first, first + of_R.shape[0], torch.nn.functional.normalize(v_RD.float(), dim=1), counts_R[:, None] > 0)


def _centred(part: Range, mean_D: Tensor, span: Slice) -> tuple[Tensor, Tensor]:
    """The rows' embeddings beside the mean, in the features of ``span``, zero where a label has no text; and (R, 1) where it has one."""
    told_R1 = part.told_R1.to(mean_D.device)
    v_RD = (part.v_RD.to(mean_D.device) - mean_D) * told_R1
    return v_RD[:, span.start : span.stop], told_R1


def _renew_tail(classifier: Classifier, part: Range, mean_D: Tensor, share: float) -> Tensor:
    """Sets the range's groups; returns how many connections are new, on the device."""
    tail, span = classifier.tail, classifier.tail_slice
    v_RM, told_R1 = _centred(part, mean_D, span)
    if classifier.basis is not None:
        v_RM = v_RM @ classifier.basis.float()
    size = tail.weight.shape[1]
    groups = slice(part.first // size, part.last // size)
    told_TG1 = told_R1.view(-1, size, 1)
    old_TF = tail.index[groups].long()
    index_TF, direction_TGF = largest_features(v_RM.reshape(*told_TG1.shape[:2], -1), old_TF.shape[1])
    index_TF = torch.where(told_TG1.any(1), index_TF, old_TF)  # of no text there is no largest: all the group's weights are kept

    def moved(values_TGF: Tensor) -> Tensor:
        """Values of the old features at the new ones; what is at none of them is lost."""
        whole_TGM = values_TGF.new_zeros(*values_TGF.shape[:2], span.width, dtype=torch.float32)
        whole_TGM.scatter_(2, old_TF[:, None].expand_as(values_TGF), values_TGF.float())
        return whole_TGM.gather(2, index_TF[:, None].expand_as(values_TGF))

    length_TG1 = tail.weight[groups].float().norm(dim=2, keepdim=True)
    kept_TG1 = torch.where(told_TG1, 1 - share, 1.0)
    tail.weight[groups] = (kept_TG1 * moved(tail.weight[groups]) + share * length_TG1 * direction_TGF).to(tail.weight)
    if tail.momentum is not None:
        tail.momentum[groups] = (kept_TG1 * moved(tail.momentum[groups])).to(tail.momentum)
    tail.index[groups] = index_TF.to(tail.index)
    read_TM = torch.zeros(len(old_TF), span.width, dtype=torch.bool, device=old_TF.device).scatter_(1, old_TF, True)
    return (~read_TM.gather(1, index_TF)).sum()


def _renew_head(classifier: Classifier, part: Range, mean_D: Tensor, share: float) -> None:
    """Sets the range's rows, which read all features of the head's slice."""
    head, rows = classifier.head, slice(part.first, part.last)
    v_RD, told_R1 = _centred(part, mean_D, classifier.head_slice)
    kept_R1 = torch.where(told_R1, 1 - share, 1.0)
    weight_RD = head.weight[rows].float()
    direction_RD = torch.nn.functional.normalize(v_RD, dim=1)
    head.weight[rows] = (kept_R1 * weight_RD + share * weight_RD.norm(dim=1, keepdim=True) * direction_RD).to(head.weight)
    if head.momentum is not None:
        head.momentum[rows] = (kept_R1 * head.momentum[rows].float()).to(head.momentum)
