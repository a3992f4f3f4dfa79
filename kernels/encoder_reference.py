"""The operations of a transformer's layer in plain torch: the definition that the kernels are held to. Gradients are autograd's.

Letters: M rows (tokens), H and C columns, B texts, S tokens of a text, A heads, d features of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from haste_kernels.rounding import DROPOUT, random_halves


def threshold_and_scale(p: float) -> tuple[int, float]:
    """Of 16 random bits: below the first an element is dropped; the second makes the mean of what is left exact."""
    dropped = round(p * 65536)
    return dropped, 65536 / max(1, 65536 - dropped)


def drop(x_MC: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of the bits that ``seed`` (one int64) gives each row and column; what stays is scaled."""
    if p == 0 or seed is None:
        return x_MC
    threshold, scale = threshold_and_scale(p)
    half_MC = random_halves(int(seed) & (1 << 64) - 1, 0, torch.arange(len(x_MC), device=x_MC.device), x_MC.shape[1], DROPOUT)
    return torch.where(half_MC >= threshold, x_MC * scale, 0.0)


def bias_gelu(z_MC: Tensor, b_C: Tensor) -> Tensor:
    return F.gelu(z_MC + b_C)


def dropout_add_norm(
    x_MH: Tensor, b_H: Tensor, r_MH: Tensor, w_H: Tensor, c_H: Tensor, p: float, eps: float, seed: Tensor | None
) -> Tensor:
    return F.layer_norm(r_MH + drop(x_MH + b_H, p, seed), w_H.shape, w_H, c_H, eps)


def embed(
    ids_BS: Tensor,
    word_VH: Tensor,
    place_SH: Tensor,
    kind_H: Tensor | None,
    w_H: Tensor,
    c_H: Tensor,
    padding: int | None,
    p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    h_BSH = F.embedding(ids_BS, word_VH, padding) + place_SH + (0 if kind_H is None else kind_H)
    y_BSH = F.layer_norm(h_BSH, w_H.shape, w_H, c_H, eps)
    return drop(y_BSH.flatten(0, 1), p, seed).view_as(y_BSH)


def attention(qkv_BSC: Tensor, seen_BS: Tensor | None, heads: int, p: float, seed: Tensor | None, pair_ASS: Tensor | None = None) -> Tensor:
    """(B, S, A d); C is 3 A d: q, k and v of all heads."""
    texts, tokens, _ = qkv_BSC.shape
    q_BASd, k_BASd, v_BASd = qkv_BSC.view(texts, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores_BASS = q_BASd @ k_BASd.transpose(-1, -2) / q_BASd.shape[-1] ** 0.5
    if pair_ASS is not None:
        scores_BASS = scores_BASS + pair_ASS
    if seen_BS is not None:
        scores_BASS = scores_BASS.masked_fill(~seen_BS[:, None, None, :], -1e30)
    p_BASS = scores_BASS.softmax(-1)
    if seen_BS is not None:
        p_BASS = p_BASS * seen_BS.any(1)[:, None, None, None]  # a text of padding alone answers 0, as torch's own attention has it
    if p and seed is not None:
        p_BASS = drop(_by_lanes(p_BASS.flatten(0, 2)), p, seed)
        p_BASS = _by_lanes(p_BASS)[:, :tokens].view_as(scores_BASS)
    return (p_BASS @ v_BASd).transpose(1, 2).flatten(2)


def _by_lanes(x_MS: Tensor) -> Tensor:
    """Columns padded to a multiple of 32, in the order in which threads of a GPU have them after a product: of each 32 the bits of the
    column, from the highest, are (i, t, h) for (t, i, h); twice the same order is the first."""
    padded_MC = F.pad(x_MS, (0, -x_MS.shape[1] % 32))
    return padded_MC.view(len(x_MS), -1, 4, 4, 2).transpose(2, 3).reshape(len(x_MS), -1)
