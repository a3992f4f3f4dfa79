"""One training step across ranks.

x_BD = encoder(tokens)                       data parallel
x_ND, labels_NM = gather(x_BD), gather(...)  every rank has the whole batch
dx_ND = classifier.step(x_ND, labels_NM)     every rank steps its own labels
dx_BD = scatter(dx_ND)                       summed over label shards
encoder.backward(x_BD, dx_BD); encoder.step()
"""

import torch
from torch import Tensor

from haste_dist.classifier import Classifier
from haste_dist.collectives import gather_rows, scatter_rows, sum_over_ranks
from haste_dist.engine import EncoderEngine
from haste_dist.errors import HasteError
from haste_dist.guards import ADVICE, Guard
from haste_dist.loader import Batch
from haste_dist.world import World
from haste_kernels import merge_topk


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
    want_loss: bool = False,
    keep: bool = False,
    guard: Guard | None = None,
) -> Tensor | None:
    """Steps the output layer, and the encoder where an accumulation ends. Returns the loss of the global batch if wanted.

    ``keep``: the output layer keeps the batch for the next rewiring; ``guard`` looks at the embeddings and their gradient.
    Raises HasteError for a gradient that is not finite.
    """
    device = world.device
    # Dropout inside the encoder is a function of (seed, step, rank): a resumed run draws what an unbroken one would.
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + world.rank)
    x_BD = engine.forward(batch.input_ids.to(device, non_blocking=True), batch.attention_mask.to(device, non_blocking=True))
    x_ND = gather_rows(x_BD.detach(), batch.rows, world)
    labels_NM = gather_rows(batch.label_rows.to(device, non_blocking=True), batch.rows, world)
    dx_ND, loss = classifier.step(x_ND, labels_NM, lr_output, step, want_loss)
    if guard is not None:
        guard.watch(step + 1, batch, **{"x (embeddings)": x_BD, "dx (their gradient)": dx_ND})
    if keep:
        classifier.keep(x_ND, labels_NM, step)
    dx_BD = scatter_rows(dx_ND, x_BD.shape[0], world)
    engine.backward(x_BD, dx_BD)
    if not engine.step(lr_encoder):
        problem = f"the gradient of the encoder was not finite at step {step + 1}"
        if guard is not None:
            guard.settle(problem)  # raises with what it saw
        raise HasteError(f"{problem}; {ADVICE}")
    return sum_over_ranks(loss, world) if loss is not None else None


def predict_batch(engine: EncoderEngine, classifier: Classifier, batch: Batch, world: World, k: int) -> tuple[Tensor, Tensor]:
    """Scores (N, K) and global label rows (N, K) of a batch, over the labels of all ranks; the same on each rank."""
    device = world.device
    x_BD = engine.embed(batch.input_ids.to(device), batch.attention_mask.to(device))
    x_ND = gather_rows(x_BD, batch.rows, world)
    scores_NK, rows_NK = classifier.topk(x_ND, k)
    if world.size == 1:
        return scores_NK, rows_NK
    # Concatenated along K: gather wants one leading axis, so K candidates a rank travel transposed.
    scores = gather_rows(scores_NK.T.contiguous(), world.size * k, world).T
    rows = gather_rows(rows_NK.T.contiguous(), world.size * k, world).T
    return merge_topk(scores.contiguous(), rows.contiguous(), k)
