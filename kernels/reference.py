"""The definition of every operation, in plain torch: all logits at once, the tail as a masked dense layer, float64 inside.

Nothing here is fast or small. Each function takes and changes the same states as its fast counterpart, whose results are
compared with these. A tail group's weights are spread into D columns, zero where the group does not read a feature:

    z = x W^T + b      loss = scale * sum over real rows and batch rows of l(z, y)      y = 1 at the positives, else 0
    bce: l = log(1 + e^z) - y z         squared_hinge: l = max(0, 1 - s z)^2 with s = 2 y - 1
    g = dloss/dW + weight_decay W       m = momentum m + g       W = W - lr m       (biases: no weight decay)

Letters: N batch rows, D embedding width, R rows, T groups, G rows a group, F fan-in, K = k.
"""

import torch
from torch import Tensor
from torch.nn import functional

from haste_kernels.rewire import FeatureScores, index_dtype
from haste_kernels.rounding import FEATURES, MOMENTUM, REGROW, ROUNDED, WEIGHT, random_words, stochastic_round
from haste_kernels.state import HeadState, Loss, Positives, StepArgs, TailState

Step = tuple[Tensor, Tensor]


def dense_tail(values: Tensor, index: Tensor, width: int) -> Tensor:
    """(T, G, F) values of the connections ``index`` (T, F) as a (T * G, D) float64 matrix with zeros elsewhere."""
    groups, size, _ = values.shape
    dense = torch.zeros(groups, size, width, dtype=torch.float64, device=values.device)
    return dense.scatter_(2, index.long()[:, None].expand_as(values), values.double()).flatten(0, 1)


def logits(x_ND: Tensor, weight_RD: Tensor, bias_R: Tensor | None) -> Tensor:
    """(N, R) float64."""
    z = x_ND.double() @ weight_RD.double().T
    return z if bias_R is None else z + bias_R.double()


def targets(positives: Positives, n: int, rows: int) -> Tensor:
    """(N, R) float64 of 0 and 1."""
    y = torch.zeros(n, rows, dtype=torch.float64, device=positives.row.device)
    inside = (positives.row >= 0) & (positives.row < rows)
    y[positives.batch[inside], positives.row[inside]] = 1
    return y


def loss_sum(z_NR: Tensor, y_NR: Tensor, loss: Loss) -> Tensor:
    """Scalar: the sum of all loss terms; differentiable."""
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(z_NR, y_NR, reduction="sum")
    return functional.relu(1 - (2 * y_NR - 1) * z_NR).square().sum()


def loss_gradient(z_NR: Tensor, y_NR: Tensor, loss: Loss) -> Tensor:
    """(N, R): d loss_sum / dz, written out."""
    if loss == "bce":
        return z_NR.sigmoid() - y_NR
    sign = 2 * y_NR - 1
    return -2 * sign * functional.relu(1 - sign * z_NR)


def sgd(value: Tensor, momentum: Tensor | None, gradient: Tensor, args: StepArgs, rows: Tensor, weight_decay: float) -> None:
    """One SGD step in place on (R, C) ``value`` and ``momentum``; short types are rounded by global ``rows`` (R,), or to the nearest."""
    old = value.double()
    g = gradient + weight_decay * old
    m = g if momentum is None else args.momentum * momentum.double() + g
    _store(value, old - args.lr * m, args, rows, WEIGHT)
    if momentum is not None:
        _store(momentum, m, args, rows, MOMENTUM)


def head_step(x_ND: Tensor, positives: Positives, head: HeadState, args: StepArgs) -> Step:
    """Updates ``head``; returns dx (N, D) and the loss, float64."""
    x, w = x_ND.double(), head.weight.double()
    z, y = logits(x, w, head.bias), targets(positives, len(x), len(w))
    dz = args.scale * loss_gradient(z, y, args.loss)
    dx = dz @ w  # before the update: w may be head.weight itself
    rows = head.first_row + torch.arange(len(w), device=w.device)
    sgd(head.weight, head.momentum, dz.T @ x, args, rows, args.weight_decay)
    if head.bias is not None:
        _sgd_bias(head.bias, head.bias_momentum, dz.sum(0), args, rows)
    return dx, args.scale * loss_sum(z, y, args.loss)


def tail_step(x_ND: Tensor, positives: Positives, tail: TailState, args: StepArgs) -> Step:
    """Updates ``tail``; returns dx (N, D) and the loss of the real rows, float64."""
    groups, size, _ = tail.weight.shape
    x, w = x_ND.double(), dense_tail(tail.weight, tail.index, x_ND.shape[1])
    z, y = logits(x, w, None if tail.bias is None else tail.bias.view(-1)), targets(positives, len(x), len(w))
    dz = args.scale * loss_gradient(z, y, args.loss)
    dz[:, tail.rows :] = 0
    dx = dz @ w
    rows = tail.first_row + torch.arange(len(w), device=w.device)
    dw = (dz.T @ x).view(groups, size, x.shape[1]).gather(2, tail.index.long()[:, None].expand(-1, size, -1))
    momentum = None if tail.momentum is None else tail.momentum.view(-1, tail.weight.shape[2])
    sgd(tail.weight.view(-1, tail.weight.shape[2]), momentum, dw.flatten(0, 1), args, rows, args.weight_decay)
    if tail.bias is not None:
        bias_momentum = None if tail.bias_momentum is None else tail.bias_momentum.view(-1)
        _sgd_bias(tail.bias.view(-1), bias_momentum, dz.sum(0), args, rows)
    return dx, args.scale * loss_sum(z[:, : tail.rows], y[:, : tail.rows], args.loss)


def topk(z_NR: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of (N, R) scores whose global rows are ``rows`` (R,): score descending, then row ascending; -inf and -1 where
    fewer than k have a score above -inf (NaN counts as -inf)."""
    scores = torch.full((len(z_NR), k), -torch.inf, dtype=z_NR.dtype)
    best = torch.full((len(z_NR), k), -1, dtype=torch.int64)
    for n, line in enumerate(z_NR.tolist()):
        ranked = sorted((-score, row) for score, row in zip(line, rows.tolist(), strict=True) if score > -torch.inf)[:k]
        for place, (negative, row) in enumerate(ranked):
            scores[n, place], best[n, place] = -negative, row
    return scores, best


def connection_scores(tail: TailState) -> Tensor:
    """(T, F) float64: mean |w| over the real labels of each group."""
    groups, size, fan_in = tail.weight.shape
    scores = torch.zeros(groups, fan_in, dtype=torch.float64)
    for t in range(groups):
        scores[t] = tail.weight[t, : tail.rows - t * size].double().abs().mean(0)
    return scores


def gradient_scores(x_ND: Tensor, positives: Positives, tail: TailState, loss: Loss, first: int, last: int) -> Tensor:
    """(last - first, D) float64: sum over the real labels of each group of |dz^T x|, the gradient of a layer that reads all."""
    groups, size, _ = tail.weight.shape
    x, w = x_ND.double(), dense_tail(tail.weight, tail.index, x_ND.shape[1])
    z, y = logits(x, w, None if tail.bias is None else tail.bias.view(-1)), targets(positives, len(x), len(w))
    dz = loss_gradient(z, y, loss)
    dz[:, tail.rows :] = 0
    return (dz.T @ x).abs().view(groups, size, x.shape[1]).sum(1)[first:last]


def random_features(first_group: int, count: int, width: int, fan_in: int, seed: int) -> Tensor:
    """(count, fan_in): the features of the ``fan_in`` smallest random keys, ascending; of equal keys the lower feature wins."""
    chosen = [sorted(_by_key(group, width, seed, 0, FEATURES)[:fan_in]) for group in range(first_group, first_group + count)]
    return torch.tensor(chosen, dtype=index_dtype(width)).view(count, fan_in)


def prune_and_regrow(tail: TailState, prune: Tensor, width: int, seed: int, step: int, scores: FeatureScores | None = None) -> int:
    """Group by group: the pruned features, weakest first, make way for the free ones of the smallest keys or the largest scores."""
    replaced = 0
    strength = connection_scores(tail)
    for t, old in enumerate(tail.index.tolist()):
        ranked = _by_key(tail.first_group + t, width, seed, step, REGROW) if scores is None else _by_score(scores(t, t + 1)[0])
        fresh = [feature for feature in ranked if feature not in old]
        weakest = sorted(prune[t].nonzero().view(-1).tolist(), key=lambda slot: float(strength[t, slot]))[: len(fresh)]
        columns = {feature: slot for slot, feature in enumerate(old) if slot not in weakest}
        columns.update(dict.fromkeys(fresh[: len(weakest)], -1))
        tail.index[t] = torch.tensor(sorted(columns), dtype=tail.index.dtype)
        for value in (tail.weight, tail.momentum):
            if value is not None:
                padded = torch.cat([value[t], torch.zeros_like(value[t, :, :1])], dim=1)  # slot -1: a new connection, zero
                value[t] = padded[:, [columns[feature] for feature in sorted(columns)]]
        replaced += len(weakest)
    return replaced


def _by_key(group: int, width: int, seed: int, step: int, stream: int) -> list[int]:
    """All features below ``width``, by ascending random key of the group."""
    words = random_words(seed, step, torch.tensor([group]), -(-width // 4), stream).view(-1).tolist()
    return sorted(range(width), key=lambda feature: (words[feature], feature))


def _by_score(scores_D: Tensor) -> list[int]:
    """All features, the largest score first; of equal scores the lower feature."""
    values = scores_D.tolist()
    return sorted(range(len(values)), key=lambda feature: (-values[feature], feature))


def _sgd_bias(bias: Tensor, momentum: Tensor | None, gradient: Tensor, args: StepArgs, rows: Tensor) -> None:
    column = None if momentum is None else momentum[:, None]
    sgd(bias[:, None], column, gradient[:, None], args, rows, 0.0)


def _store(target: Tensor, exact: Tensor, args: StepArgs, rows: Tensor, stream: int) -> None:
    if target.dtype in ROUNDED and args.rounding == "stochastic":
        target.copy_(stochastic_round(exact.float(), args.seed, args.step, rows, stream, target.dtype))
    else:
        target.copy_(exact.float() if target.dtype in ROUNDED else exact)
