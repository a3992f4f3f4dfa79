"""SGD in place, torch.optim.SGD's rule, on rows whose gradient was just made:

    g = scale * dW + weight_decay * w        m = momentum * m + g        w = w - lr * m

All in float32 (w moves by the unrounded m); what is stored in bfloat16 or float8 is rounded stochastically, w and m by streams of their
own, or to the nearest where that is asked for.

Letters: R rows, C columns.
"""

import torch
from torch import Tensor

from haste_kernels.rounding import FLOAT8, MOMENTUM, ROUNDED, WEIGHT, stochastic_round
from haste_kernels.state import StepArgs


def sgd_(weight: Tensor, momentum: Tensor | None, gradient: Tensor, args: StepArgs, first_row: int) -> None:
    """Updates (R, C) ``weight`` and ``momentum`` (float32, bfloat16, float8; None: plain SGD) from float32 dW, which is overwritten.

    ``first_row`` is the global row of ``weight[0]``: rounding depends on it, so not on how rows are sharded or chunked.
    """
    w = weight.float() if weight.dtype in ROUNDED else weight
    if momentum is None:
        m = gradient.mul_(args.scale)
    elif momentum.dtype in ROUNDED:
        held = momentum.float() if momentum.dtype == FLOAT8 else momentum  # torch adds no float8 to another type
        m = gradient.mul_(args.scale).add_(held, alpha=args.momentum)
    else:
        m = momentum.mul_(args.momentum).add_(gradient, alpha=args.scale)
    if args.weight_decay:
        m.add_(w, alpha=args.weight_decay)
    w.add_(m, alpha=-args.lr)
    for target, value, stream in ((weight, w, WEIGHT), (momentum, m, MOMENTUM)):
        if target is None or target.dtype not in ROUNDED:
            continue
        if args.rounding == "nearest":
            target.copy_(value)
        else:
            rows = torch.arange(first_row, first_row + len(target), device=target.device)
            target.copy_(stochastic_round(value, args.seed, args.step, rows, stream, target.dtype))


def sgd_bias_(bias: Tensor, momentum: Tensor | None, gradient: Tensor, args: StepArgs) -> None:
    """The same for (R,) float32 biases, without weight decay."""
    m = gradient.mul_(args.scale) if momentum is None else momentum.mul_(args.momentum).add_(gradient, alpha=args.scale)
    bias.add_(m, alpha=-args.lr)
