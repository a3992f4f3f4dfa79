"""MPNet (arXiv 2004.09297) with attention through torch's fused kernels. transformers has it written out and keeps the scores of all pairs
of tokens for the backward pass: of all-mpnet-base-v2, 256 texts of 256 tokens and bfloat16 31.1 GiB of activations in place of 19.9, as
dry_run.py counts them.

Letters: B texts, S tokens, L the most tokens, H heads, K buckets of distances between tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from haste_dist.fused_layers import hides_padding


class FusedAttention(MPNetSelfAttention):  # type: ignore[misc]
    """``position_bias`` (B or 1, H, S, S) is all that is added to the scores, what hides padding as well."""

    def forward(self, hidden_states: Tensor, attention_mask: None = None, position_bias: Tensor | None = None, **_: Any) -> tuple[Tensor]:
        return (self.o(self.context(hidden_states, position_bias)),)

    def context(self, hidden_states: Tensor, position_bias: Tensor | None) -> Tensor:
        """(B, S, H d): what the last product of attention takes."""
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (part(hidden_states).unflatten(-1, heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        dropout = self.dropout.p if self.training else 0.0
        c_BHSd = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias, dropout_p=dropout)
        return c_BHSd.transpose(1, 2).flatten(2)


class FusedEncoder(MPNetEncoder):  # type: ignore[misc]
    """Adds the mask to the distances' biases once, not in every layer, unless layers hide padding themselves. No step waits for the host.
    ``checkpointing``: layers keep their input alone, and run again in the backward pass."""

    checkpointing = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """``attention_mask``: None, or what broadcasts to (B, H, S, S): bool, true where a token is seen, or numbers to add."""
        tokens, table_KH = hidden_states.shape[1], self.relative_attention_bias.weight
        # A product in place of a lookup: its gradient sums millions of pairs of tokens into K rows, always in the same order.
        bias = (self.bucket_LLK[:tokens, :tokens].to(table_KH.dtype) @ table_KH).permute(2, 0, 1)[None]
        apart = None
        if attention_mask is not None and attention_mask.dtype == torch.bool and hides_padding(self.layer[0], hidden_states):
            apart = attention_mask
        elif attention_mask is not None and attention_mask.dtype == torch.bool:
            bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        elif attention_mask is not None:
            bias = bias + attention_mask.to(bias.dtype)
        for layer in self.layer:
            if self.checkpointing and self.training:
                (hidden_states,) = checkpoint(layer, hidden_states, apart, bias, use_reentrant=False)
            else:
                (hidden_states,) = layer(hidden_states, apart, bias)
        return BaseModelOutput(last_hidden_state=hidden_states)


def fuse_attention(model: nn.Module, checkpointing: bool = False) -> None:
    """Makes an MPNetModel's encoder and attention those above, in place; parameters and their names stay."""
    part: Any
    for part in model.modules():
        if type(part) is MPNetSelfAttention:
            part.__class__ = FusedAttention
        elif type(part) is MPNetEncoder:
            part.__class__, part.checkpointing = FusedEncoder, checkpointing
            longest, buckets = part.config.max_position_embeddings, part.config.relative_attention_num_buckets
            # Made once, where the model is made: the CPU. Logarithms of another device may put a distance into the next bucket.
            distance_LL = torch.arange(longest)[None, :] - torch.arange(longest)[:, None]
            bucket_LLK = F.one_hot(part.relative_position_bucket(distance_LL, num_buckets=buckets), buckets).bool()
            part.register_buffer("bucket_LLK", bucket_LLK.to(part.relative_attention_bias.weight.device), persistent=False)
