"""Layers of BERT's kind (arXiv 1810.04805; RoBERTa, XLM-RoBERTa, ELECTRA, MiniLM and others have the same, MPNet but for its attention)
with kernels of their own for what is no matrix product.

torch.compile, which needs half a minute at the start, leaves several passes over the activations where one is enough, and has no attention
for short texts. Parameters and their names stay: checkpoints, exports and other devices do not know the difference.

Letters: B texts, S tokens, M = B S, H width of the layer, A heads, d features of a head, C columns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haste_kernels.encoder_ops import attend, dropout_add_norm, random_seed, takes_heads, widen


class FusedLayer:
    """What the layers below share; mixed into a layer's own class, whose ``forward`` theirs replace."""

    def _widen_and_join(self: Any, x_MH: Tensor) -> Tensor:
        up = self.intermediate.dense
        y_MC, x_MH = widen(x_MH, up.weight, up.bias)
        return self._join(self.output.dense, self.output, y_MC, x_MH)

    def _join(self: Any, down: nn.Linear, part: Any, x_MC: Tensor, r_MH: Tensor) -> Tensor:
        """Back to the layer's width, and to the residual; ``part`` has the norm and the dropout."""
        p, norm = part.dropout.p if self.training else 0.0, part.LayerNorm
        y_MH = x_MC @ down.weight.T
        return dropout_add_norm(y_MH, down.bias, r_MH, norm.weight, norm.bias, p, norm.eps, random_seed(x_MC.device))


class FusedBertLayer(FusedLayer):
    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """The mask is (B, 1, S, S), bool, and hides the same keys from every token."""
        x_BSH, own = hidden_states, self.attention.self
        parts = (own.query, own.key, own.value)
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        heads, p = own.num_attention_heads, own.dropout.p if self.training else 0.0
        if takes_heads(x_BSH, own.attention_head_size):
            seen_BS = None if attention_mask is None else attention_mask[:, 0, 0].contiguous()
            c_BSH, x_BSH = attend(x_BSH, weight, bias, seen_BS, heads, p, random_seed(x_BSH.device))
        else:
            q, k, v = F.linear(x_BSH, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            c_BASd = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=p)
            c_BSH = c_BASd.transpose(1, 2).flatten(2)
        output = self.attention.output
        x_MH = self._join(output.dense, output, c_BSH.flatten(0, 1), x_BSH.flatten(0, 1))
        return self._widen_and_join(x_MH).view_as(hidden_states)  # type: ignore[no-any-return]


class FusedMPNetLayer(FusedLayer):
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor]:
        """Of a model whose attention is that of mpnet.py."""
        attention = self.attention
        c_MH = attention.attn.context(hidden_states, position_bias).flatten(0, 1)
        x_MH = self._join(attention.attn.o, attention, c_MH, hidden_states.flatten(0, 1))
        return (self._widen_and_join(x_MH).view_as(hidden_states),)


class FusedEmbeddings:
    """BERT's: the norm of the sum of three tables' rows, with dropout. All tokens are of one type, whose row is the same to all: a bias."""

    def forward(self: Any, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        texts, tokens = input_ids.shape
        word_BSH, norm = self.word_embeddings(input_ids), self.LayerNorm
        place_MH = self.position_embeddings.weight[:tokens].expand(texts, -1, -1).flatten(0, 1)
        kind_H, nothing = self.token_type_embeddings.weight[0], input_ids.new_zeros(1)
        y_MH = dropout_add_norm(word_BSH.flatten(0, 1), kind_H, place_MH, norm.weight, norm.bias, 0.0, norm.eps, nothing)
        return self.dropout(y_MH).view_as(word_BSH)  # type: ignore[no-any-return]


def fuse_layers(model: nn.Module) -> int:
    """Gives the layers that have these parts, and no others (adapters, say), those kernels, in place. Returns how many they are."""
    count = 0
    for layer in list(model.modules()):
        if kind := _kind(layer):
            layer.__class__ = type(f"Fused{type(layer).__name__}", (kind, type(layer)), {})
            count += 1
        elif type(layer).__name__ in ("BertEmbeddings", "ElectraEmbeddings") and type(layer.word_embeddings) is nn.Embedding:
            layer.__class__ = type(f"Fused{type(layer).__name__}", (FusedEmbeddings, type(layer)), {})
    return count


def is_fused(layer: nn.Module) -> bool:
    return isinstance(layer, FusedLayer)


def _kind(layer: Any) -> type[FusedLayer] | None:
    try:
        up, output, attention = layer.intermediate, layer.output, layer.attention
        mpnet = hasattr(attention, "attn")
        joined = attention if mpnet else attention.output
        linear = [up.dense, output.dense, *((attention.attn.o,) if mpnet else (joined.dense,))]
        norms, drops = (joined.LayerNorm, output.LayerNorm), [joined.dropout, output.dropout]
        if not mpnet:
            own = attention.self
            linear += [own.query, own.key, own.value]
            drops.append(own.dropout)
        gelu = type(up.intermediate_act_fn)
    except AttributeError:
        return None
    plain = all(type(one) is nn.Linear and one.bias is not None for one in linear) and all(type(one) is nn.Dropout for one in drops)
    alone = not getattr(layer, "is_decoder", False) and not hasattr(layer, "crossattention") and not is_fused(layer)
    if not (plain and alone and all(type(one) is nn.LayerNorm for one in norms) and gelu.__name__ in ("GELU", "GELUActivation")):
        return None
    if mpnet:
        return FusedMPNetLayer if hasattr(attention.attn, "context") else None
    return FusedBertLayer
