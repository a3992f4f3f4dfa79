"""What an encoder holds during a step, found by running it on the meta device: real operations, real shapes, no memory, no numbers.

Two operations keep other things for the backward pass on a GPU than on the meta device, and are replaced by stand-ins: attention
(fused kernels keep q, k, v, the answer, one number a query and the mask, not the probabilities) and dropout (a byte an element).

Letters: B texts of one rank, S tokens, P parameters.
"""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from haste_dist.config import EncoderConfig
from haste_dist.encoder import build_encoder, fuse_blocks
from haste_dist.graphs import most_tokens, padded_length, pads
from haste_dist.live_bytes import LiveBytes
from haste_dist.meters import EncoderWork, encoder_work


@dataclass(frozen=True)
class EncoderNeeds:
    """Bytes beside the weights, and the encoder's size and work. ``backward`` counts the gradients of the weights."""

    parameters: int  # P
    trained: int  # of them
    width: int
    forward: int  # most that lives during the forward pass
    kept: int  # what lives between the passes
    backward: int  # most that lives during the backward pass
    scoring: int  # most that lives during a forward pass without graph
    work: EncoderWork
    rows: int  # B
    tokens: int  # S, as a training step pads it
    weight_bytes: int  # of one weight
    recorded_tokens: int  # of the largest batches whose passes are CUDA graphs on a GPU; 0: none are

    def of_rows(self, rows: int) -> "EncoderNeeds":
        """With another batch: what lives grows with it, but the gradients are there in the end."""
        times, gradients = rows / self.rows, self.weight_bytes * self.trained
        grown = {name: round(getattr(self, name) * times) for name in ("forward", "kept", "scoring")}
        backward = max(round(self.backward * times), gradients * (self.backward > 0))
        return dataclasses.replace(self, **grown, backward=backward, rows=rows)


@functools.lru_cache(maxsize=64)
def _dry_run(key: tuple[Any, ...], vocabulary: int, pad_id: int, rows: int, tokens: int, dtype: torch.dtype, cuda: bool) -> EncoderNeeds:
    config = EncoderConfig(**dict(key))
    with torch.device("meta"):
        encoder = build_encoder(config, vocabulary, pad_id, tokens, pretrained=False).to(dtype)
        if cuda and config.fused and dtype == torch.bfloat16:
            fuse_blocks(encoder)
        recorded = 0 if config.frozen else most_tokens(config, encoder)
        padded = tokens
        if cuda and pads(config, recorded):
            padded = padded_length(tokens, getattr(encoder.model.config, "max_position_embeddings", 0))
        ids, mask = (torch.ones(rows, tokens, dtype=torch.int64) for _ in range(2))
        ids_padded, mask_padded = (torch.ones(rows, padded, dtype=torch.int64) for _ in range(2))
        if config.frozen:
            encoder.requires_grad_(False)
        held = [*encoder.parameters(), *encoder.buffers(), ids, mask, ids_padded, mask_padded]
        with _as_on_a_gpu(), LiveBytes(held) as live:
            base = live.now
            with torch.no_grad():
                encoder.eval()(ids, mask)
            scoring, kept, forward, backward = live.peak - base, 0, live.peak - base, 0
            if not config.frozen:
                live.restart()
                x_BD = encoder.train()(ids_padded, mask_padded)
                forward, kept = live.peak - base, live.now - base
                live.restart()
                x_BD.backward(torch.ones_like(x_BD))
                backward = live.peak - base
    work = encoder_work(encoder)
    total = sum(p.numel() for p in encoder.parameters())
    trained = [p.numel() for p in encoder.parameters() if p.requires_grad]
    return EncoderNeeds(total, sum(trained), encoder.width, forward, kept, backward, scoring, work, rows, padded, dtype.itemsize, recorded)


def dry_run(
    config: EncoderConfig, vocabulary: int, pad_id: int, rows: int, tokens: int, dtype: torch.dtype, cuda: bool = True
) -> EncoderNeeds:
    """An encoder stepped on ``rows`` texts of ``tokens`` tokens, its weights in ``dtype``. Raises ConfigError."""
    return _dry_run(tuple(vars(config).items()), vocabulary, pad_id, rows, tokens, dtype, cuda)


class _Attention(torch.autograd.Function):
    """Keeps for the backward pass what fused attention keeps, and makes what it makes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        mask = mask if mask is None or mask.dtype == q.dtype else mask.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, _, _, *mask = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(*mask) if ctx.needs_input_grad[3] else None


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Puts the stand-ins in place. A mode of torch's would not be seen where checkpointing runs a layer again in the backward pass."""
    attention, dropout, hides_nothing = F.scaled_dot_product_attention, F.dropout, Tensor.all

    def stand_in(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Any:
        return _Attention.apply(q, k, v, attn_mask)

    def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if p and training else x

    F.scaled_dot_product_attention, F.dropout = stand_in, drop  # type: ignore[assignment]
    Tensor.all = lambda *_, **__: False  # type: ignore  # transformers asks whether the mask hides nothing; mixed lengths do hide
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout, Tensor.all = attention, dropout, hides_nothing  # type: ignore[method-assign]
