"""Layers of BERT's kind (arXiv 1810.04805; RoBERTa, XLM-RoBERTa, ELECTRA, MiniLM, DistilBERT and others have the same, MPNet but for its
attention) with kernels of their own for what is no matrix product.

torch.compile, which needs half a minute at the start, leaves several passes over the activations where one is enough, and has no attention
for short texts. Parameters and their names stay: checkpoints, exports and other devices do not know the difference.

Letters: B texts, S tokens, M = B S, H width of the layer, A heads, d features of a head, C columns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haste_kernels.encoder_ops import attend, attend_first, dropout_add_norm, embed, random_seeds, takes_heads, widen

EMBEDDINGS = ("BertEmbeddings", "ElectraEmbeddings", "Embeddings")  # whose places are counted from a text's first token; of DistilBERT
NO_DROPOUT = nn.Dropout(0.0)
Ends = tuple[nn.Linear, nn.LayerNorm, nn.Dropout]  # a product back to the layer's width, and what joins it to the residual

_mixed: dict[tuple[type, type], Any] = {}  # one class for all layers of a kind


class Fused:
    """What the layers below share; mixed into a layer's own class, whose ``forward`` theirs replace."""

    first_only = False  # whether the answer is that of each text's first token alone
    joined: tuple[str, ...] = ()  # parts whose products of one input are made as one; see flat.py

    def _joined(self: Any) -> tuple[Tensor, Tensor]:
        """Their weights and biases, end to end."""
        weight, bias = self.__dict__.get("joined_weight"), self.__dict__.get("joined_bias")
        if weight is None or bias is None:
            parts = [self.get_submodule(name) for name in self.joined]
            weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        return weight, bias

    def _seeds(self: Any, count: int, device: torch.device) -> tuple[Tensor | None, ...]:
        return random_seeds(count, device) if self.training else (None,) * count

    def _join(self: Any, down: nn.Linear, norm: nn.LayerNorm, drop: nn.Dropout, x_MC: Tensor, r_MH: Tensor, seed: Tensor | None) -> Tensor:
        """Back to the layer's width, and to the residual."""
        p = drop.p if self.training else 0.0
        return dropout_add_norm(x_MC @ down.weight.T, down.bias, r_MH, norm.weight, norm.bias, p, norm.eps, seed)


class FusedBert(Fused):
    joined = ("attention.self.query", "attention.self.key", "attention.self.value")

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """The mask is (B, 1, S, S), bool, and hides the same keys from every token. (B, S, H), or (B, 1, H) of the first token."""
        x_BSH, (heads, size, drop) = hidden_states, self._heads()
        weight, bias = self._joined()
        p = drop.p if self.training else 0.0
        seeds = self._seeds(3, x_BSH.device)
        if self.first_only:
            c_BSH = attend_first(x_BSH, weight, bias, _seen(attention_mask), heads, p)
            x_BSH = x_BSH[:, :1]
        elif takes_heads(x_BSH, size):
            c_BSH, x_BSH = attend(x_BSH, weight, bias, _seen(attention_mask), heads, p, seeds[0])
        else:
            q, k, v = F.linear(x_BSH, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            c_BASd = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=p)
            c_BSH = c_BASd.transpose(1, 2).flatten(2)
        first, up, second = self._ends()
        x_MH = self._join(*first, c_BSH.flatten(0, 1), x_BSH.flatten(0, 1), seeds[1])
        y_MC, x_MH = widen(x_MH, up.weight, up.bias)
        return self._join(*second, y_MC, x_MH, seeds[2]).view_as(x_BSH)  # type: ignore[no-any-return]

    def _heads(self: Any) -> tuple[int, int, nn.Dropout]:
        """How many, how wide, and the dropout of their probabilities."""
        own = self.attention.self
        return own.num_attention_heads, own.attention_head_size, own.dropout

    def _ends(self: Any) -> tuple[Ends, nn.Linear, Ends]:
        """What follows attention, the wide product, and what follows that."""
        return _ends(self.attention.output), self.intermediate.dense, _ends(self.output)


class FusedDistilBert(FusedBert):
    """DistilBERT's (arXiv 1910.01108): the same but for names, and a dropout less."""

    joined = ("attention.q_lin", "attention.k_lin", "attention.v_lin")

    def _heads(self: Any) -> tuple[int, int, nn.Dropout]:
        return self.attention.n_heads, self.attention.attention_head_size, self.attention.dropout

    def _ends(self: Any) -> tuple[Ends, nn.Linear, Ends]:
        ffn = self.ffn
        return (self.attention.out_lin, self.sa_layer_norm, NO_DROPOUT), ffn.lin1, (ffn.lin2, self.output_layer_norm, ffn.dropout)


class FusedMPNet(Fused):
    joined = ("attention.attn.q", "attention.attn.k", "attention.attn.v")

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor]:
        """Of a model whose attention is that of mpnet.py. The bias is of all texts, (1, A, S, S), and the mask (B, 1, S, S), bool; or the
        bias hides padding itself."""
        x_BSH, own, seeds = hidden_states, self.attention.attn, self._seeds(3, hidden_states.device)
        if position_bias is not None and len(position_bias) == 1 and hides_padding(self, x_BSH):
            weight, bias = self._joined()
            heads, p = own.num_attention_heads, own.dropout.p if self.training else 0.0
            c_BSH, x_BSH = attend(x_BSH, weight, bias, _seen(attention_mask), heads, p, seeds[0], position_bias[0].contiguous())
        else:
            c_BSH = own.context(x_BSH, position_bias)
        attention, up = self.attention, self.intermediate.dense
        x_MH = self._join(own.o, attention.LayerNorm, attention.dropout, c_BSH.flatten(0, 1), x_BSH.flatten(0, 1), seeds[1])
        y_MC, x_MH = widen(x_MH, up.weight, up.bias)
        return (self._join(*_ends(self.output), y_MC, x_MH, seeds[2]).view_as(hidden_states),)


def _ends(part: Any) -> Ends:
    return part.dense, part.LayerNorm, part.dropout


def _seen(mask: Tensor | None) -> Tensor | None:
    """(B, 1, S, S) that is the same for all queries, as (B, S)."""
    return None if mask is None else mask[:, 0, 0].contiguous()


class FusedEmbeddings:
    """BERT's: dropout of the norm of the sum of three tables' rows. All tokens are of one type, whose row is the same to all; DistilBERT
    has no types."""

    def forward(self: Any, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        word, norm, p = self.word_embeddings, self.LayerNorm, self.dropout.p if self.training else 0.0
        types = getattr(self, "token_type_embeddings", None)
        place_SH, kind_H = self.position_embeddings.weight[: input_ids.shape[1]], None if types is None else types.weight[0]
        [seed] = random_seeds(1, input_ids.device) if self.training else (None,)
        return embed(input_ids, word.weight, place_SH, kind_H, norm.weight, norm.bias, word.padding_idx, p, norm.eps, seed)


def fuse_layers(model: nn.Module) -> int:
    """Gives the layers that have these parts, and no others with weights (adapters, say), those kernels, in place, and so the embeddings
    before them. Returns how many layers they are; those that are fused already do not count."""
    found = [(layer, kind) for layer in model.modules() if (kind := _kind(layer))]
    for layer, kind in found:
        _mix_in(kind, layer)
    for part in model.modules() if found else ():
        if type(part).__name__ in EMBEDDINGS and type(getattr(part, "word_embeddings", None)) is nn.Embedding:
            _mix_in(FusedEmbeddings, part)
    return len(found)


def spare_last_layer(model: Any) -> bool:
    """For a pooling that reads the first token of the last layer alone: the only one that is then worked out there. Whether the model ends
    in a layer that can do so."""
    layers = getattr(getattr(model, "encoder", None) or getattr(model, "transformer", None), "layer", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    if not isinstance(last, FusedBert):
        return False
    last.first_only = True
    return True


def _mix_in(kind: type, part: nn.Module) -> None:
    own = type(part)
    part.__class__ = _mixed.setdefault((kind, own), type(f"Fused{own.__name__}", (kind, own), {}))


def is_fused(layer: nn.Module) -> bool:
    return isinstance(layer, Fused)


def hides_padding(layer: Any, x_BSH: Tensor) -> bool:
    """Whether an MPNet layer takes padding for (B, S) texts of this length apart from what is added to the scores of all texts."""
    fused: Any = layer if isinstance(layer, FusedMPNet) else None
    return fused is not None and takes_heads(x_BSH, fused.attention.attn.attention_head_size, paired=True)


def _kind(layer: Any) -> type[Fused] | None:
    """What can take this layer's place, or None. Its parts must be those that are known, and no others with weights."""
    kind: type[Fused] = FusedBert
    try:
        attention = own = layer.attention
        if hasattr(layer, "ffn"):
            kind, gelu = FusedDistilBert, layer.ffn.activation
            first, up, second = FusedDistilBert._ends(layer)
        else:
            gelu, up, second = layer.intermediate.intermediate_act_fn, layer.intermediate.dense, _ends(layer.output)
            if hasattr(attention, "attn"):
                kind, own, first = FusedMPNet, attention.attn, (attention.attn.o, attention.LayerNorm, attention.dropout)
            else:
                own, first = attention.self, _ends(attention.output)
        asked = [layer.get_submodule(name) for name in kind.joined]
        linear, norms, drops = (*asked, first[0], up, second[0]), (first[1], second[1]), (own.dropout, first[2], second[2])
        more = [part for part in own.children() if part not in linear and any(True for _ in part.parameters())]
    except AttributeError:
        return None
    plain = all(type(one) is nn.Linear and one.bias is not None for one in linear) and all(type(one) is nn.Dropout for one in drops)
    alone = not getattr(layer, "is_decoder", False) and not hasattr(layer, "crossattention") and not is_fused(layer)
    exact = type(gelu).__name__ in ("GELU", "GELUActivation") and getattr(gelu, "approximate", "none") == "none"
    known = kind is not FusedMPNet or hasattr(own, "context")  # attention as in mpnet.py
    return kind if plain and alone and exact and known and all(type(one) is nn.LayerNorm for one in norms) and not more else None
