"""One step of the dense head: logits, loss gradient, update in place, gradient to the embedding; a chunk of rows at a time.

    z_RN = W_RD x_DN + b     dz = dloss/dz     dx_ND += dz^T W     dW = dz x_ND     W, m, b <- SGD

The scale of the loss is applied to dx and in the update, not to dz. Every chunk sees its old weights for all N batch rows.

Letters: N batch rows, D embedding width, H rows of the head here, R rows of a chunk, P positives.
"""

import torch
from torch import Tensor

from haste_kernels.backend import takes_types, use_triton
from haste_kernels.chunks import chunks
from haste_kernels.losses import loss_and_gradient_
from haste_kernels.products import mm, operand_dtype
from haste_kernels.state import HeadState, Positives, StepArgs
from haste_kernels.update import sgd_, sgd_bias_


def head_step(x_ND: Tensor, positives: Positives, head: HeadState, args: StepArgs, want_loss: bool = False) -> tuple[Tensor, Tensor | None]:
    """Updates ``head`` in place; returns dx (N, D) float32 and, if wanted, the loss of these rows (float32 scalar), both scaled.

    ``x_ND`` float32 or bfloat16; ``positives`` rows are relative to ``head.first_row``. On a GPU Triton kernels do it.
    """
    if use_triton(x_ND) and takes_types(x_ND, head.weight):
        from haste_kernels import triton_head

        return triton_head.head_step(x_ND, positives, head, args, want_loss)
    return plain_head_step(x_ND, positives, head, args, want_loss)


@torch.no_grad()
def plain_head_step(
    x_ND: Tensor, positives: Positives, head: HeadState, args: StepArgs, want_loss: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch, on any device."""
    n, width = x_ND.shape
    rows = len(head.weight)
    dtype = operand_dtype(x_ND, head.weight)
    x_ND = x_ND.to(dtype).contiguous()
    dx_ND = torch.zeros(n, width, dtype=torch.promote_types(dtype, torch.float32), device=x_ND.device)
    total = torch.zeros((), dtype=torch.float64, device=x_ND.device) if want_loss else None
    for start, stop, flat, weight in chunks(rows, 1, rows, 4 * (3 * n + 8 * width), positives, n):
        w_RD = head.weight[start:stop].to(dtype)
        z_RN = mm(w_RD, x_ND.T)
        if head.bias is not None:
            z_RN += head.bias[start:stop, None]
        loss = loss_and_gradient_(z_RN, flat, weight, args.loss, want_loss)
        if total is not None and loss is not None:
            total += loss
        dz_RN = z_RN.to(dtype)
        dx_ND += mm(dz_RN.T, w_RD)
        momentum = None if head.momentum is None else head.momentum[start:stop]
        sgd_(head.weight[start:stop], momentum, mm(dz_RN, x_ND), args, head.first_row + start)
        if head.bias is not None:
            bias_momentum = None if head.bias_momentum is None else head.bias_momentum[start:stop]
            sgd_bias_(head.bias[start:stop], bias_momentum, z_RN.sum(1), args)
    return dx_ND.mul_(args.scale), None if total is None else total.mul_(args.scale).float()
