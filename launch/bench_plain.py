"""What one would write in plain torch, as a baseline: a chunk of labels at a time, results rounded to the nearest.

The same around the operations of FixedFanInLinear, in place of the GEMMs, is the step of a layer whose labels read F features each.

Not the slowest way: operands and logits stay in the working type, biases are added by the GEMM, the gradient takes the place of the
logits, and the update reads each value as often as torch's own in-place operations do.

Letters: N batch rows, D embedding width (F where the width of the fan-in is meant), R rows, K top-k, P positives.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from haste_kernels import Positives, StepArgs, TailState, linear
from haste_launch.bench_problem import Part

CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 8 << 20}


def spans(rows: int, bytes_each: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of ``rows`` whose temporaries fit the budget."""
    length = max(1, CHUNK_BYTES[device.type] // bytes_each)
    return ((start, min(start + length, rows)) for start in range(0, rows, length))


class Targets:
    """The positives of each chunk, found once: where they lie in its logits (R, N)."""

    def __init__(self, positives: Positives, cut: list[tuple[int, int]]):
        edges = torch.tensor([start for start, _ in cut] + [cut[-1][1] if cut else 0])
        at = torch.searchsorted(positives.row.cpu(), edges).tolist()
        self.of = {start: (positives.row[p:q] - start, positives.batch[p:q]) for (start, _), p, q in zip(cut, at, at[1:], strict=False)}


def logits(x_ND: Tensor, weight_RD: Tensor, bias_R: Tensor | None) -> Tensor:
    """(R, N) in the working type."""
    if bias_R is None:
        return weight_RD @ x_ND.T
    return torch.addmm(bias_R.to(x_ND.dtype)[:, None], weight_RD, x_ND.T)


def bce_gradient_(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Sigmoid minus target, in place of the logits; the targets that are 1 are at ``z[first, second]``."""
    z.sigmoid_()
    z[first, second] -= 1
    return z


def sgd_(value: Tensor, momentum: Tensor | None, gradient: Tensor, args: StepArgs, decay: float) -> None:
    if decay:
        gradient = gradient.add_(value, alpha=decay)
    if momentum is not None and momentum.itemsize < gradient.itemsize:
        momentum.copy_(gradient.add_(momentum, alpha=args.momentum))  # weights move by what was not rounded
    elif momentum is not None:
        gradient = momentum.mul_(args.momentum).add_(gradient)
    value.add_(gradient, alpha=-args.lr)


class DenseStep:
    """The whole step of a dense layer of ``part``'s rows."""

    def __init__(self, part: Part, args: StepArgs):
        x, state = part.x_ND, part.state
        self.part, self.args = part, args
        each = x.element_size() * (len(x) + state.weight.shape[1])
        self.cut = list(spans(len(state.weight), each, x.device))
        self.targets = Targets(part.positives, self.cut)

    def __call__(self) -> Tensor:
        """Updates the state; returns dx (N, D) float32. The loss is a sum: ``args.scale`` is 1."""
        (x, _, state), args = self.part, self.args
        dx_ND = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for start, stop in self.cut:
            weight, momentum, bias, bias_momentum = (
                None if value is None else value[start:stop] for value in (state.weight, state.momentum, state.bias, state.bias_momentum)
            )
            assert weight is not None
            dz_RN = bce_gradient_(logits(x, weight, bias), *self.targets.of[start])
            dx_ND += dz_RN.T @ weight
            sgd_(weight, momentum, dz_RN @ x, args, args.weight_decay)
            if bias is not None:
                sgd_(bias, bias_momentum, dz_RN.sum(1, dtype=torch.float32), args, 0.0)
        return dx_ND


class PerLabelStep:
    """The whole step of labels that read ``part``'s features one by one (G = 1)."""

    def __init__(self, part: Part, args: StepArgs):
        self.part, self.args = part, args
        self.cut = list(per_label_spans(part))
        self.targets = Targets(part.positives, self.cut)

    def __call__(self) -> Tensor:
        """Updates the state; returns dx (N, D) float32. The loss is a sum: ``args.scale`` is 1."""
        (x, _, state), args = self.part, self.args
        assert isinstance(state, TailState)
        dx_ND = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for start, stop in self.cut:
            weight, index = state.weight[start:stop], state.index[start:stop]
            row, batch = self.targets.of[start]
            dz_NR = bce_gradient_(per_label_logits(self.part, start, stop), batch, row)
            dx_ND += linear.grad_x(dz_NR, weight, index, x.shape[1])
            dw, db = linear.grad_weight(dz_NR, x, index, 1, weight.dtype)
            sgd_(weight, None if state.momentum is None else state.momentum[start:stop], dw, args, args.weight_decay)
            if state.bias is not None:
                bias_momentum = None if state.bias_momentum is None else state.bias_momentum[start:stop]
                sgd_(state.bias[start:stop], bias_momentum, db[:, None], args, 0.0)
        return dx_ND


def per_label_spans(part: Part) -> Iterator[tuple[int, int]]:
    weight = part.state.weight
    return spans(len(weight), part.x_ND.element_size() * (len(part.x_ND) + weight.shape[2]), part.x_ND.device)


def per_label_logits(part: Part, start: int, stop: int) -> Tensor:
    """(N, R) of the labels ``start`` to ``stop``."""
    state = part.state
    assert isinstance(state, TailState)
    bias = None if state.bias is None else state.bias[start:stop].view(-1)
    return linear.group_shared_linear(part.x_ND, state.weight[start:stop], state.index[start:stop], bias, stop - start)


def three_products(part: Part) -> None:
    """The GEMMs of a step alone: logits, dx and dW."""
    x, weight = part.x_ND, part.state.weight
    for start, stop in spans(len(weight), x.element_size() * (len(x) + weight.shape[1]), x.device):
        z_RN = weight[start:stop] @ x.T
        torch.mm(z_RN.T, weight[start:stop])
        torch.mm(z_RN, x)


def topk(scores: Iterator[tuple[int, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of chunks of logits (N, R), each with its first row: scores and rows (N, K), ties in any order."""
    best: tuple[Tensor, Tensor] | None = None
    for first, z_NR in scores:
        values, rows = z_NR.topk(min(k, z_NR.shape[1]), dim=1)
        rows = rows + first
        if best is not None:
            values, rows = torch.cat([best[0], values], 1), torch.cat([best[1], rows], 1)
            values, at = values.topk(min(k, values.shape[1]), dim=1)
            rows = rows.gather(1, at)
        best = values, rows
    assert best is not None
    return best


def dense_scores(part: Part) -> Iterator[tuple[int, Tensor]]:
    """Chunks of logits (N, R)."""
    x, weight, bias = part.x_ND, part.state.weight, part.state.bias
    for start, stop in spans(len(weight), 2 * x.element_size() * len(x), x.device):
        w_DR = weight[start:stop].T
        yield start, x @ w_DR if bias is None else torch.addmm(bias[start:stop].to(x.dtype), x, w_DR)
