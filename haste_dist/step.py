"""One training step across ranks.

labels_NM = gather(labels_BM)                started first: it travels during the forward pass
x_BD = encoder(tokens)                       data parallel
x_ND = gather(x_BD)                          every rank has the whole batch, in the encoder's precision
dx_ND = classifier.step(x_ND, labels_NM)     every rank steps its own labels
dx_BD = scatter(dx_ND)                       summed over label shards, in float32
encoder.backward(x_BD, dx_BD); encoder.step()

With replicas of the label shards (``launch.label_parallel``) "the whole batch" is the replica's rows of it, and the classifier sums its
gradients over the replicas.

A batch too large for the encoder goes through it in several passes (gradient caching, arXiv 2101.06983): all embeddings first, without
a graph but for the last; after the classifier's one step each pass is run again with a graph, with the dropout it had, and
backward. So the memory is that of one pass and the update that of one large batch.

Nothing here waits for the GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from haste_dist.classifier import Classifier
from haste_dist.collectives import gather_rows, scatter_rows, start_gather, sum_over_ranks
from haste_dist.engine import EncoderEngine
from haste_dist.guards import Guard
from haste_dist.loader import Batch
from haste_dist.sharding import replica_rows
from haste_dist.world import World
from haste_kernels import merge_topk

GRADIENT = "the gradient of the encoder"


def train_step(
    engine: EncoderEngine,
    classifier: Classifier,
    batch: Batch,
    world: World,
    *,
    lr_encoder: float,
    lr_output: float,
    step: int,
    seed: int,
    passes: int = 1,
    accumulation: int = 1,
    want_loss: bool = False,
    keep: bool = False,
    guard: Guard | None = None,
) -> Tensor | None:
    """Steps the output layer, and the encoder where an accumulation ends. Returns the loss of the global batch if wanted, None where the
    guard passes the batch over: then nothing has changed by it.

    ``passes``: encoder passes that this batch is cut into; ``accumulation``: steps an encoder update, whose gradient is their mean.
    ``keep``: the output layer keeps the batch for the next rewiring; ``guard`` looks at the numbers of the step.
    """
    device = world.device
    place = replica_rows(batch.rows, len(batch.input_ids), world.shards.size, world.copies.rank)
    labels_BM = batch.label_rows.to(device, non_blocking=True)
    gathering = start_gather(labels_BM, len(place), world.shards)
    passes = min(passes, len(batch.input_ids))
    ids_bS = batch.input_ids.to(device, non_blocking=True).tensor_split(passes)
    mask_bS: Sequence[Tensor | None] = [None] * passes
    if not batch.is_full:
        mask_bS = batch.attention_mask.to(device, non_blocking=True).tensor_split(passes)

    def forward(i: int, graph: bool) -> Tensor:
        seed_generators(dropout_seed(seed, step, world.rank, i), device)
        return engine.forward(ids_bS[i], mask_bS[i], graph)

    x_bD = [forward(i, graph=i == passes - 1) for i in range(passes)]
    x_BD = torch.cat([x.detach() for x in x_bD])
    x_ND = gather_rows(x_BD, len(place), world.shards)
    labels_NM = gathering.wait()
    updates = engine.trains and (step + 1) % accumulation == 0
    if guard is not None and guard.skips(step + 1, batch, x_ND):
        others = guard.skipped_since(step + 1 - accumulation) < accumulation  # batches of this update that were sound
        if updates and others and (norm := engine.step(lr_encoder)) is not None:
            guard.watch(step + 1, batch, **{GRADIENT: norm})
        return None
    dx_ND, loss = classifier.step(x_ND, labels_NM, lr_output, step, want_loss, place)
    if keep and world.copies.size == 1:
        classifier.keep(x_ND, labels_NM, step)
    elif keep:  # what features gain is known from the whole batch only
        classifier.keep(gather_rows(x_BD, batch.rows, world), gather_rows(labels_BM, batch.rows, world), step)
    norm = None
    if engine.trains:
        dx_BD = scatter_rows(dx_ND, len(batch.input_ids), world.shards) / accumulation
        dx_bD = dx_BD.tensor_split(passes)
        for i in reversed(range(passes)):
            engine.backward(x_bD[i] if i == passes - 1 else forward(i, graph=True), dx_bD[i])
        if updates:
            norm = engine.step(lr_encoder)
    if guard is not None:
        seen = {"x (embeddings)": x_BD, "dx (their gradient)": dx_ND}
        guard.watch(step + 1, batch, **seen, **({} if norm is None else {GRADIENT: norm}))
    return sum_over_ranks(loss, world) if loss is not None else None


def dropout_seed(seed: int, step: int, rank: int, number: int) -> int:
    """Of dropout inside the encoder: a function of place, so that a resumed run and a repeated pass draw what was drawn before."""
    return (((number * 2**31 + seed) * 1_000_003 + step) * 65_537 + rank) % 2**63


def seed_generators(seed: int, device: torch.device) -> None:
    """Of the host and of ``device``. ``torch.manual_seed`` asks all kinds of devices that torch knows, and notes its caller for each that
    is not there: 80 us and more each time, where this takes 1.5."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index].manual_seed(seed)


def predict_batch(engine: EncoderEngine, classifier: Classifier, batch: Batch, world: World, k: int) -> tuple[Tensor, Tensor]:
    """Scores (N, K) and global label rows (N, K) of a batch, over the labels of all ranks; the same on each rank.

    Replicas each score the whole batch: a product's last bits may depend on its number of rows, and scores are the same on any ranks.
    """
    device = world.device
    x_BD = engine.embed(batch.input_ids.to(device), None if batch.is_full else batch.attention_mask.to(device))
    x_ND = gather_rows(x_BD, batch.rows, world)
    scores_NK, rows_NK = classifier.topk(x_ND, k)
    shards = world.shards
    if shards.size == 1:
        return scores_NK, rows_NK
    # Concatenated along K: gather wants one leading axis, so K candidates a rank travel transposed.
    scores = gather_rows(scores_NK.T.contiguous(), shards.size * k, shards).T
    rows = gather_rows(rows_NK.T.contiguous(), shards.size * k, shards).T
    return merge_topk(scores.contiguous(), rows.contiguous(), k)
