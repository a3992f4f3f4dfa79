"""One step of the sparse tail: gather, logits, loss gradient, update in place, gradient to the embedding; groups by chunk.

    z_TGN = W_TGF xg_TFN + b    xg = x_DN[idx_TF]    dz = dloss/dz    dx_DN[idx_TF] += W^T dz    dW = dz xg^T    W, m, b <- SGD

On a CPU (2 cores of a Zen 5 EPYC, torch 2.13, 123,000 labels, D = 384, F = 64, N = 256, float32) this takes 163 ms at G = 16 and
87 ms at G = 64; the three products are 97 ms of it at G = 16, gather and scatter 12 each. Spreading W into D columns for plain
GEMMs was the alternative: its products alone take 380 ms, for they multiply D features instead of F.

A GPU does spread the weights of small groups (``_spreads``): gathered features are F N values a group, for G labels only.

x is transposed once, so that a gathered feature is one contiguous run of N values. The scale of the loss is applied to dx and
in the update, not to dz. Every chunk sees its old weights for all N batch rows. Padded rows have no gradient.

Letters: N batch rows, D embedding width, T groups (here or in a chunk), G rows a group, F fan-in, P positives.
"""

import torch
from torch import Tensor

from haste_kernels.backend import use_triton
from haste_kernels.chunks import chunks
from haste_kernels.losses import loss_and_gradient_
from haste_kernels.products import bmm, mm, operand_dtype
from haste_kernels.state import Positives, StepArgs, TailState
from haste_kernels.update import sgd_, sgd_bias_


def tail_step(x_ND: Tensor, positives: Positives, tail: TailState, args: StepArgs, want_loss: bool = False) -> tuple[Tensor, Tensor | None]:
    """Updates ``tail`` in place; returns dx (N, D) float32 and, if wanted, the loss of the real rows (float32 scalar), both scaled.

    ``x_ND`` float32 or bfloat16; ``positives`` rows are relative to ``tail.first_row``. On a GPU the Triton kernel does it.
    """
    if use_triton(x_ND):
        from haste_kernels import triton_tail

        if triton_tail.takes(x_ND, tail):
            return triton_tail.tail_step(x_ND, positives, tail, args, want_loss)
    return plain_tail_step(x_ND, positives, tail, args, want_loss)


def _spreads(tail: TailState, width: int) -> bool:
    """Whether plain torch computes with (T * G, D) weights, zero where a group does not read a feature.

    Counted in values that move: gathering takes F N of them a group, several times; products of D features in place of F take
    2 N G (D - F) operations more, taken as a sixteenth as dear a piece on a GPU (not tuned). Per-label fan-in (G = 1) is the case.
    """
    _, size, fan_in = tail.weight.shape
    return tail.weight.device.type != "cpu" and size < 16 and size * width <= 16 * fan_in


@torch.no_grad()
def plain_tail_step(
    x_ND: Tensor, positives: Positives, tail: TailState, args: StepArgs, want_loss: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch, on any device, for any G and F."""
    n, width = x_ND.shape
    groups, size, fan_in = tail.weight.shape
    if groups and not 0 <= groups * size - tail.rows < size:
        raise ValueError(f"rows={tail.rows}: only the last of {groups} groups of {size} may hold padding")
    wide = _spreads(tail, width)
    each = 4 * ((3 * size * width if wide else 2 * fan_in * n) + 3 * size * n + 8 * size * fan_in)  # bytes of temporaries a group
    dtype = operand_dtype(x_ND, tail.weight)
    x_DN = x_ND.to(dtype).T.contiguous()
    dx_DN = torch.zeros(width, n, dtype=torch.promote_types(dtype, torch.float32), device=x_ND.device)
    total = torch.zeros((), dtype=torch.float64, device=x_ND.device) if want_loss else None
    for start, stop, flat, weight in chunks(groups, size, tail.rows, each, positives, n):
        index = tail.index[start:stop].reshape(-1).long()  # int64: index_add_ is 4 times slower with int32 on a CPU
        w_TGF = tail.weight[start:stop].to(dtype)
        if wide:
            columns = index.view(-1, 1, fan_in).expand_as(w_TGF)
            w_RD = w_TGF.new_zeros(*w_TGF.shape[:2], width).scatter_(2, columns, w_TGF).flatten(0, 1)
            z_TGN = mm(w_RD, x_DN).view(-1, size, n)
        else:
            xg_TFN = x_DN.index_select(0, index).view(-1, fan_in, n)
            z_TGN = bmm(w_TGF, xg_TFN)
        if tail.bias is not None:
            z_TGN += tail.bias[start:stop, :, None]
        z_RN = z_TGN.flatten(0, 1)
        real = min(tail.rows - start * size, len(z_RN))
        loss = loss_and_gradient_(z_RN[:real], flat, weight, args.loss, want_loss)
        if total is not None and loss is not None:
            total += loss
        z_RN[real:] = 0
        dz_TGN = z_TGN.to(dtype)
        if wide:
            dz_RN = dz_TGN.flatten(0, 1)
            dx_DN += mm(w_RD.mT, dz_RN)
            dw_RF = mm(dz_RN, x_DN.mT).view(-1, size, width).gather(2, columns).flatten(0, 1)
        else:
            dx_DN.index_add_(0, index, bmm(w_TGF.mT, dz_TGN).flatten(0, 1))
            dw_RF = bmm(dz_TGN, xg_TFN.mT).flatten(0, 1)
        momentum = None if tail.momentum is None else tail.momentum[start:stop].view(-1, fan_in)
        sgd_(tail.weight[start:stop].view(-1, fan_in), momentum, dw_RF, args, tail.first_row + start * size)
        if tail.bias is not None:
            bias_momentum = None if tail.bias_momentum is None else tail.bias_momentum[start:stop].view(-1)
            sgd_bias_(tail.bias[start:stop].view(-1), bias_momentum, z_RN.sum(1), args)
    return dx_DN.T.contiguous().mul_(args.scale), None if total is None else total.mul_(args.scale).float()
