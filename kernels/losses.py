"""The loss over a chunk's logits and its gradient, in place of the logits.

Every pair (row, batch row) is first treated as a negative; then the P positives are corrected, which touches only them:

    bce            z: softplus(z) - y z                gradient  sigmoid(z) - y
    squared_hinge  y = +-1: max(0, 1 - y z)^2          gradient  -2 y max(0, 1 - y z)

Letters: R rows of the chunk, N batch rows, P positives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from haste_kernels.state import Loss


def loss_and_gradient_(z_RN: Tensor, flat: Tensor, weight: Tensor | None, loss: Loss, want_loss: bool) -> Tensor | None:
    """Overwrites float32 logits with dloss/dz, unscaled. ``flat`` (P,) points at the positives in ``z_RN.view(-1)``; ``weight``
    (P,) of 0 and 1 silences pairs of other chunks. Returns the sum of the loss terms (float64 scalar) if wanted."""
    z = z_RN.view(-1)
    at = z[flat]
    if loss == "bce":
        total = F.softplus(z_RN).sum(dtype=torch.float64) if want_loss else None
        correction = -at
        z_RN.sigmoid_()
        change = -torch.ones_like(at)
    else:
        z_RN.add_(1).clamp_(min=0)  # max(0, 1 + z)
        total = z_RN.square().sum(dtype=torch.float64) if want_loss else None
        negative, positive = (1 + at).clamp_(min=0), (1 - at).clamp_(min=0)
        correction = positive.square() - negative.square()
        z_RN.mul_(2)
        change = -2 * (positive + negative)
    if weight is not None:
        correction, change = correction * weight, change * weight
    z.index_add_(0, flat, change)
    return None if total is None else total + correction.sum(dtype=torch.float64)
