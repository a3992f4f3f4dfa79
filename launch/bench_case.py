"""What is measured: one operation at one shape, the bytes and floating-point operations it cannot avoid, the floor that follows.

Counted once: every weight and momentum read and written, index, biases, the embedding read, its gradient or the answer written. A
layer that reads more, or twice, is that much slower than the floor. The sigmoid, the update and the rounding count nothing.

Letters: L labels (of the head alone where only the head steps), N batch rows, D embedding width, F fan-in, G group size, K top-k.
"""

from dataclasses import dataclass
from typing import NamedTuple

TAIL, HEAD, LAYER, TOPK, FORWARD, BACKWARD = "tail_step", "head_step", "layer_step", "topk", "linear_forward", "linear_backward"
TOPICS_OF = {"tail": (TAIL,), "head": (HEAD,), "topk": (TOPK,), "layer": (LAYER,), "linear": (FORWARD, BACKWARD)}
PROVIDER_NAMES = ("haste_dist", "haste_authors", "per_label_ffi", "dense", "dense_width_f", "floor")  # as the table lists them
STEPS = (TAIL, HEAD, LAYER)
HEAD_SHARE = 10  # the head is one label in so many
BYTES = {"bfloat16": 2, "float32": 4, "float8": 1, "none": 0}
INT16_WIDTH = 2**15


class PartShape(NamedTuple):
    """The dense or the sparse rows of a case, and the features [start, stop) of the embedding that they read."""

    sparse: bool
    rows: int
    start: int
    stop: int


class Traffic(NamedTuple):
    bytes: int  # that must pass through memory
    flops: int
    held: int  # bytes that must lie in memory: states, inputs and results


class Ceilings(NamedTuple):
    """What the device was measured to reach."""

    copy_gb_s: float  # bytes read plus bytes written
    gemm_tflop_s: float


class Floor(NamedTuple):
    ms: float
    bound: str  # which of the two ceilings it is: "bytes" or "flops"


@dataclass(frozen=True)
class Case:
    topic: str
    labels: int
    batch: int
    width: int
    fan_in: int
    group: int
    k: int
    dtype: str = "bfloat16"  # of the weights
    momentum: str = "bfloat16"  # or float32, float8, none
    bias: bool = True

    @property
    def x_dtype(self) -> str:
        """Of the embedding, and of the products."""
        return "bfloat16" if self.dtype == "float8" else self.dtype

    @property
    def parts(self) -> list[PartShape]:
        """A layer: a tenth of the labels, in whole groups, dense on the first half of the features, the others sparse on the second."""
        if self.topic == LAYER:
            head = min(self.labels, -(-self.labels // HEAD_SHARE // self.group) * self.group)
            half = self.width // 2
            return [PartShape(False, head, 0, half), PartShape(True, self.labels - head, half, self.width)]
        return [PartShape(self.topic != HEAD, self.labels, 0, self.width)]

    def shape(self, letters: str = "LNDFGK") -> dict[str, int]:
        """The letters, of those given, that this topic has."""
        values = {"L": self.labels, "N": self.batch, "D": self.width, "F": self.fan_in, "G": self.group, "K": self.k}
        absent = "FGK" if self.topic == HEAD else "" if self.topic == TOPK else "K"
        return {letter: values[letter] for letter in letters if letter not in absent}

    def traffic(self) -> Traffic:
        """Of one call."""
        value, momentum, operand = BYTES[self.dtype], BYTES[self.momentum], BYTES[self.x_dtype]
        moved = flops = held = 0
        for part in self.parts:
            width = part.stop - part.start
            groups = -(-part.rows // self.group)
            weights = part.rows * (self.fan_in if part.sparse else width)
            index = groups * self.fan_in * (2 if width <= INT16_WIDTH else 4) if part.sparse else 0
            bias = 4 * part.rows * self.bias
            x, product = operand * self.batch * width, 2 * self.batch * weights
            logits = operand * self.batch * part.rows
            if self.topic in STEPS:
                biases = bias * (2 if momentum else 1)
                dx = 4 * self.batch * width
                moved += 2 * weights * (value + momentum) + index + 2 * biases + x + dx
                held += weights * (value + momentum) + index + biases + x + dx
                flops += 3 * product
            elif self.topic == TOPK:
                answer = 12 * self.batch * self.k
                moved += weights * value + index + bias + x + answer
                held += weights * value + index + bias + x + answer
                flops += product
            elif self.topic == FORWARD:
                moved += weights * value + index + bias + x + logits
                held += weights * value + index + bias + x + logits
                flops += product
            else:
                gradients = weights * value + bias + x
                moved += weights * value + index + x + logits + gradients
                held += weights * value + index + bias + x + logits + gradients
                flops += 2 * product
        return Traffic(moved, flops, held)

    def floor(self, ceilings: Ceilings) -> Floor:
        """The least time of one call: the larger of bytes over copy bandwidth and operations over the GEMM rate."""
        traffic = self.traffic()
        by_bytes, by_flops = traffic.bytes / ceilings.copy_gb_s / 1e6, traffic.flops / ceilings.gemm_tflop_s / 1e9
        return Floor(by_bytes, "bytes") if by_bytes >= by_flops else Floor(by_flops, "flops")
