"""What the output layer's operations work on: the rows that one rank owns, and the arguments of one step.

Letters: N batch rows, D embedding width (of the slice that the head or the tail reads), H head rows here, T tail groups
here, G rows a group, F fan-in, P positives. A *row* is a label's place in the label order; rows are global, a shard holds a
contiguous range of them. Everything is in place and holds no process group: results do not depend on how rows are sharded.
"""

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from haste_kernels.rounding import FLOAT8

Loss = Literal["bce", "squared_hinge"]
STORED: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": FLOAT8}  # what weights and momentum may be kept in
Rounding = Literal["stochastic", "nearest"]


class Positives(NamedTuple):
    """The true labels of a batch: distinct pairs, ascending in ``row``, then in ``batch``.

    Rows outside the shard, negative ones too, are passed over and may repeat: whoever makes the pairs on a GPU need not count them.
    """

    batch: Tensor  # (P,) int64, batch row of each pair, 0..N-1
    row: Tensor  # (P,) int64, label row relative to the shard's first row


@dataclass(frozen=True)
class StepArgs:
    """One SGD step: g = dW + weight_decay * w; m = momentum * m + g; w = w - lr * m (torch.optim.SGD's rule)."""

    lr: float
    scale: float  # the loss gradient is multiplied by this: 1/N for a mean over rows, 1 for their sum
    momentum: float = 0.9
    weight_decay: float = 0.0
    loss: Loss = "bce"
    seed: int = 0  # with step, row and column the key of stochastic rounding
    step: int = 0
    half_sums: bool = (
        True  # Triton, bfloat16: the tail's dx may be summed in float16 runs (kernels/triton_tail.py); off: float32 throughout
    )
    rounding: Rounding = "stochastic"  # of what is stored in bfloat16; nearest loses updates below half of the last bit
    deterministic: bool = False  # Triton: dx is summed in a fixed order, so two runs give the same bits; slower


@dataclass
class HeadState:
    """Dense rows. ``momentum`` and the biases may be None; weight and momentum are float32, bfloat16 or float8 (e4m3), biases float32."""

    weight: Tensor  # (H, D)
    momentum: Tensor | None  # (H, D)
    bias: Tensor | None  # (H,)
    bias_momentum: Tensor | None  # (H,)
    first_row: int  # global row of weight[0]


@dataclass
class TailState:
    """Groups of G rows; all rows of a group read the same F features of x."""

    weight: Tensor  # (T, G, F)
    index: Tensor  # (T, F) int16 or int32: distinct and ascending within a group, values below D
    momentum: Tensor | None  # (T, G, F)
    bias: Tensor | None  # (T, G)
    bias_momentum: Tensor | None  # (T, G)
    first_row: int  # global row of weight[0, 0]
    rows: int  # real rows here; the last T * G - rows are padding: no loss, no gradient, never predicted
    first_group: int  # global number of weight[0]'s group
