"""What a transformer's layer does around its matrix products, as operations with gradients of their own.

Each takes one kernel forward and one backward beside its products, and one that sums what the programs of the backward kernel left. They
read and write activations once, sum the gradients of biases and norms on the way, and keep nothing of their dropout. Where there are no
kernels the same is plain torch (encoder_reference.py). On the meta device the tensors that the kernels fill are made, for whoever counts
them. ``seed``: one int64 on the device of x; None where nothing is dropped.

``attend`` and ``widen`` return x too, for the residual of ``dropout_add_norm`` and for nothing else: its gradient is overwritten with its
sum with that of the product, as that is made.

Letters: M rows (B texts of S tokens), H the layer's width, C columns, A heads.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from haste_kernels import encoder_reference as reference
from haste_kernels.backend import SWITCH, use_triton

TILES = (32, 64, 128)  # tokens that ``attend``'s kernels are made for; a text takes the first that holds it
LONGEST = TILES[-1]
LONGEST_PAIRED = 64  # with ``pair_ASS``, whose gradient takes as many registers as the scores
HEAD_WIDTHS = (16, 32, 64, 128)
SHARED_BYTES = 163 << 10  # of a program, where the GPU does not say: an A100's


def has_kernels(x: Tensor) -> bool:
    """Whether operations on ``x`` are kernels, or on the meta device their tensors."""
    return (x.is_meta and os.environ.get(SWITCH) != "torch") or use_triton(x)


def takes_heads(x_BSH: Tensor, width: int, paired: bool = False) -> bool:
    """Whether ``attend`` has kernels for texts of S tokens and heads of ``width`` features, or needs none; with ``pair_ASS``, if asked."""
    if not has_kernels(x_BSH):
        return True
    tile, longest = tile_tokens(x_BSH.shape[1]), LONGEST_PAIRED if paired else LONGEST
    known = torch.cuda.get_device_properties(x_BSH.device) if x_BSH.is_cuda else None
    room = getattr(known, "shared_memory_per_block_optin", SHARED_BYTES)
    return tile <= longest and width in HEAD_WIDTHS and tile * (tile + 4 * width) * x_BSH.element_size() <= room


def tile_tokens(tokens: int) -> int:
    """T, a power of 2."""
    return max(TILES[0], 1 << (tokens - 1).bit_length())


def random_seeds(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Drawn from torch's generator of ``device``, without a wait: part of a recorded pass, and of one that is run again."""
    return torch.randint(2**62, (count, 1), device=device).unbind()


def attend(
    x_BSH: Tensor,
    w_CH: Tensor,
    b_C: Tensor,
    seen_BS: Tensor | None,
    heads: int,
    p: float,
    seed: Tensor | None,
    pair_ASS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention among the tokens of each text, with q, k and v = x w^T + b (C = 3 H) and dropout of its probabilities, and x.

    ``seen_BS``: bool, keys that are no padding. ``pair_ASS``: what is added to the scores of two places, of every text.
    """
    if not has_kernels(x_BSH):
        return reference.attention(x_BSH @ w_CH.T + b_C, seen_BS, heads, p, seed, pair_ASS), x_BSH
    return _Attend.apply(x_BSH, w_CH, b_C, seen_BS, heads, p, seed, pair_ASS)  # type: ignore[no-any-return]


def attend_first(x_BSH: Tensor, w_CH: Tensor, b_C: Tensor, seen_BS: Tensor | None, heads: int, p: float) -> Tensor:
    """(B, 1, H): ``attend`` of each text's first token alone, without keys and values of any, for there is one query to all of them:

        q . (W_k x + b_k) = (W_k^T q) . x + what all scores share        sum p (W_v x + b_v) = W_v sum p x + b_v sum p

    Plain torch on every device, whose generator drops probabilities.
    """
    (q_HH, k_HH, v_HH), (q_H, _, v_H) = w_CH.chunk(3), b_C.chunk(3)
    k_AdH, v_AdH = (one.unflatten(0, (heads, -1)) for one in (k_HH, v_HH))
    q_BAd = torch.nn.functional.linear(x_BSH[:, 0], q_HH, q_H).unflatten(-1, (heads, -1))
    t_BAH = (q_BAd.transpose(0, 1) @ k_AdH).transpose(0, 1)
    s_BAS = _Scores.apply(t_BAH, x_BSH) * q_BAd.shape[-1] ** -0.5
    if seen_BS is not None:
        s_BAS = s_BAS.masked_fill(~seen_BS[:, None], torch.finfo(s_BAS.dtype).min)
    p_BAS = torch.nn.functional.dropout(s_BAS.softmax(-1), p).to(x_BSH.dtype)
    if seen_BS is not None:
        p_BAS = p_BAS.masked_fill(~seen_BS[:, None], 0.0)  # of a text of padding alone, too
    c_ABH = (p_BAS @ x_BSH).transpose(0, 1)
    o_BAd = (c_ABH @ v_AdH.transpose(1, 2)).transpose(0, 1) + p_BAS.sum(-1, keepdim=True) * v_H.unflatten(0, (heads, -1))
    return o_BAd.flatten(1)[:, None]


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
    """(B, S, H): dropout of the layer norm, with weight w and bias c, of word[ids] + place + kind (of all
    tokens, or None). The row ``padding`` has no gradient. Raises ValueError for texts longer than ``place_SH``."""
    if len(place_SH) != ids_BS.shape[1]:
        raise ValueError(f"texts of {ids_BS.shape[1]} tokens, places of {len(place_SH)}")
    if not has_kernels(word_VH):
        return reference.embed(ids_BS, word_VH, place_SH, kind_H, w_H, c_H, padding, p, eps, seed)
    return _Embed.apply(ids_BS, word_VH, place_SH, kind_H, w_H, c_H, padding, p, eps, seed)  # type: ignore[no-any-return]


def widen(x_MH: Tensor, w_CH: Tensor, b_C: Tensor) -> tuple[Tensor, Tensor]:
    """(GELU(x w^T + b), x)."""
    if not has_kernels(x_MH):
        return reference.bias_gelu(x_MH @ w_CH.T, b_C), x_MH
    return _Widen.apply(x_MH, w_CH, b_C)  # type: ignore[no-any-return]


def dropout_add_norm(
    x_MH: Tensor, b_H: Tensor, r_MH: Tensor, w_H: Tensor, c_H: Tensor, p: float, eps: float, seed: Tensor | None
) -> Tensor:
    """Layer norm, with weight w and bias c, of r + dropout(x + b)."""
    if not has_kernels(x_MH):
        return reference.dropout_add_norm(x_MH, b_H, r_MH, w_H, c_H, p, eps, seed)
    return _DropoutAddNorm.apply(x_MH, b_H, r_MH, w_H, c_H, p, eps, seed)  # type: ignore[no-any-return]


def _product_gradients(dr_MH: Tensor, dy_MC: Tensor, x_MH: Tensor, w_CH: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = x w^T to x, added to ``dr_MH``, which it overwrites, and to w."""
    return dr_MH.contiguous().addmm_(dy_MC, w_CH), dy_MC.T @ x_MH


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_BSH: Tensor,
        w_CH: Tensor,
        b_C: Tensor,
        seen_BS: Tensor | None,
        heads: int,
        p: float,
        seed: Tensor | None,
        pair_ASS: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x_BSH = x_BSH.contiguous()
        seen_BS, pair_ASS = (None if one is None else one.contiguous() for one in (seen_BS, pair_ASS))
        qkv_BSC = torch.nn.functional.linear(x_BSH, w_CH, b_C)
        out_BSH = torch.empty_like(x_BSH)
        lse_BAS = x_BSH.new_empty(len(x_BSH), heads, x_BSH.shape[1], dtype=torch.float32)
        if not x_BSH.is_meta:
            from haste_kernels.triton_attention import attention_forward

            attention_forward(qkv_BSC, pair_ASS, seen_BS, heads, p, seed, out_BSH, lse_BAS)
        ctx.save_for_backward(x_BSH, w_CH, qkv_BSC, lse_BAS, seed, seen_BS, pair_ASS)
        ctx.heads, ctx.p = heads, p
        return out_BSH, x_BSH.view_as(x_BSH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BSH: Tensor, dr_BSH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_BSH, w_CH, qkv_BSC, lse_BAS, seed, seen_BS, pair_ASS = ctx.saved_tensors
        dqkv_BSC = torch.empty_like(qkv_BSC)
        db_C, dpair_ASS = w_CH.new_empty(len(w_CH)), pair_ASS
        if not x_BSH.is_meta:
            from haste_kernels.triton_attention import attention_backward

            do_BSH = do_BSH.contiguous()
            db_C, dpair_ASS = attention_backward(do_BSH, qkv_BSC, pair_ASS, seen_BS, lse_BAS, ctx.heads, ctx.p, seed, dqkv_BSC)
        dx_MH, dw_CH = _product_gradients(dr_BSH.flatten(0, 1), dqkv_BSC.flatten(0, 1), x_BSH.flatten(0, 1), w_CH)
        return dx_MH.view_as(x_BSH), dw_CH, db_C, None, None, None, None, dpair_ASS


class _Scores(torch.autograd.Function):
    """t x^T of (B, A, H) and (B, S, H), in float32 at least: rounded to bfloat16, large ones would be too far off."""

    @staticmethod
    def forward(ctx: Any, t_BAH: Tensor, x_BSH: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(t_BAH, x_BSH)
        if t_BAH.is_meta:
            return t_BAH.new_empty(*t_BAH.shape[:2], x_BSH.shape[1], dtype=torch.promote_types(t_BAH.dtype, torch.float32))
        if not t_BAH.is_cuda or t_BAH.dtype == torch.float32:
            return torch.bmm(*(one if one.itemsize > 2 else one.float() for one in (t_BAH, x_BSH.transpose(1, 2))))
        return torch.bmm(t_BAH, x_BSH.transpose(1, 2), out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds_BAS: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        t_BAH, x_BSH = ctx.saved_tensors
        ds_BAS = ds_BAS.to(x_BSH.dtype)
        return ds_BAS @ x_BSH, ds_BAS.transpose(1, 2) @ t_BAH


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
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
        ids_BS = ids_BS.contiguous()
        word_VH, place_SH, kind_H = word_VH.contiguous(), place_SH.contiguous(), None if kind_H is None else kind_H.contiguous()
        y_BSH = word_VH.new_empty(*ids_BS.shape, word_VH.shape[1])
        mean_M, rstd_M = (word_VH.new_empty(ids_BS.numel(), dtype=torch.float32) for _ in range(2))
        if not y_BSH.is_meta:
            from haste_kernels.triton_embed import embed_forward

            embed_forward(ids_BS, word_VH, place_SH, kind_H, w_H, c_H, p, eps, seed, y_BSH, mean_M, rstd_M)
        ctx.save_for_backward(ids_BS, word_VH, place_SH, kind_H, w_H, mean_M, rstd_M, seed)
        ctx.padding, ctx.p = padding, p
        return y_BSH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ids_BS, word_VH, place_SH, kind_H, w_H, mean_M, rstd_M, seed = ctx.saved_tensors
        dh_BSH, dword_VH = torch.empty_like(dy_BSH, memory_format=torch.contiguous_format), torch.zeros_like(word_VH)
        sums_3H = w_H.new_empty(3, len(w_H))
        if not dy_BSH.is_meta:
            from haste_kernels.triton_embed import embed_backward, table_gradient

            sums_3H = embed_backward(dy_BSH.contiguous(), ids_BS, word_VH, place_SH, kind_H, w_H, mean_M, rstd_M, ctx.p, seed, dh_BSH)
            table_gradient(dh_BSH, ids_BS, dword_VH, ctx.padding)
        dkind_H, dw_H, dc_H = sums_3H
        return None, dword_VH, dh_BSH.sum(0), dkind_H if kind_H is not None else None, dw_H, dc_H, None, None, None, None


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, w_CH: Tensor, b_C: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_MH = x_MH.contiguous()
        z_MC = x_MH @ w_CH.T
        y_MC = torch.empty_like(z_MC)
        if not z_MC.is_meta:
            from haste_kernels.triton_gelu import gelu_forward

            gelu_forward(z_MC, b_C, y_MC)
        ctx.save_for_backward(x_MH, w_CH, b_C, z_MC)
        return y_MC, x_MH.view_as(x_MH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MC: Tensor, dr_MH: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x_MH, w_CH, b_C, z_MC = ctx.saved_tensors
        dz_MC, db_C = torch.empty_like(z_MC), torch.empty_like(b_C)
        if not z_MC.is_meta:
            from haste_kernels.triton_gelu import gelu_backward

            db_C = gelu_backward(dy_MC.contiguous(), z_MC, b_C, dz_MC)
        return *_product_gradients(dr_MH, dz_MC, x_MH, w_CH), db_C


class _DropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_MH: Tensor, b_H: Tensor, r_MH: Tensor, w_H: Tensor, c_H: Tensor, p: float, eps: float, seed: Tensor | None
    ) -> Tensor:
        x_MH, r_MH = x_MH.contiguous(), r_MH.contiguous()
        h_MH, y_MH = torch.empty_like(x_MH), torch.empty_like(x_MH)
        mean_M, rstd_M = (x_MH.new_empty(len(x_MH), dtype=torch.float32) for _ in range(2))
        if not x_MH.is_meta:
            from haste_kernels.triton_norm import norm_forward

            norm_forward(x_MH, b_H, r_MH, w_H, c_H, p, eps, seed, h_MH, y_MH, mean_M, rstd_M)
        ctx.save_for_backward(h_MH, w_H, mean_M, rstd_M, seed)
        ctx.p = p
        return y_MH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h_MH, w_H, mean_M, rstd_M, seed = ctx.saved_tensors
        dr_MH = torch.empty_like(h_MH)
        dx_MH = torch.empty_like(h_MH) if ctx.p else dr_MH
        sums_3H = w_H.new_empty(3, len(w_H))
        if not h_MH.is_meta:
            from haste_kernels.triton_norm import norm_backward

            sums_3H = norm_backward(dy_MH.contiguous(), h_MH, w_H, mean_M, rstd_M, ctx.p, seed, dr_MH, dx_MH)
        db_H, dw_H, dc_H = sums_3H
        return dx_MH, db_H, dr_MH, dw_H, dc_H, None, None, None
