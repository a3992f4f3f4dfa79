"""The output layer as one dense matrix, and a whole model as ONNX: for few labels, where another runtime is to use them.

L labels in the order of their ids, D features of the embedding.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haste_dist.encoder import Encoder
from haste_dist.errors import ConfigError, DataError
from haste_dist.label_groups import LabelOrder

LARGEST = 1.8e9  # bytes: an ONNX file holds less than 2 GiB
ROWS = 16384  # turned back from a basis at once
SAMPLE = (2, 8)  # texts and tokens that the model is traced with; any others will do


def dense_layer(tensors: dict[str, Tensor], page: dict[str, Any], order: LabelOrder) -> tuple[Tensor, Tensor]:
    """Weights (L, D) and biases (L) in float32 of exported head and tail; what a label does not read has weight 0. Raises DataError."""
    labels, width, head = page["labels"], page["width"], page["head_rows"]
    if 4.0 * labels * width > LARGEST:
        raise DataError(
            f"a dense layer of {labels:,} labels and {width} features is larger than 1.8 GB; export it as it is (--format sparse)"
        )
    weight_RD = torch.zeros(head + page["groups"] * page["group_size"], width)
    weight_RD[:head, slice(*page["head_features"])] = tensors["head.weight"].float()
    tail_RF = tensors["tail.weight"].float().flatten(0, 1)
    features_RF = tensors["tail.index"].long().repeat_interleave(page["group_size"], 0)
    read_RD = weight_RD[head:, slice(*page["tail_features"])].scatter_(1, features_RF, tail_RF)
    if order.basis is not None and page["basis"] == "labels":
        for rows_RD in read_RD.split(ROWS):
            rows_RD.copy_(rows_RD @ order.basis.float().T)
    bias_R = torch.zeros(len(weight_RD))
    if "tail.bias" in tensors:
        bias_R = torch.cat([tensors["head.bias"].float(), tensors["tail.bias"].float().flatten()])
    row_L = torch.from_numpy(order.row_of_label)
    return weight_RD[row_L], bias_R[row_L]


class Whole(nn.Module):
    """Tokens (B, S) and their mask in, logits (B, L) out."""

    def __init__(self, encoder: Encoder, weight_LD: Tensor, bias_L: Tensor):
        super().__init__()
        self.encoder, self.weight, self.bias = encoder, nn.Parameter(weight_LD), nn.Parameter(bias_L)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return nn.functional.linear(self.encoder(input_ids, attention_mask), self.weight, self.bias)


def write_onnx(path: Path, encoder: Encoder, weight_LD: Tensor, bias_L: Tensor) -> None:
    """``Whole`` as one ONNX file: int64 ``input_ids`` and ``attention_mask`` of any (B, S), float32 ``logits``. Raises HasteError."""
    if not find_spec("onnxscript"):
        raise ConfigError("--format onnx needs the package onnxscript; pip install 'haste-dist[onnx]'")
    whole = Whole(encoder, weight_LD, bias_L).eval()
    if sum(4.0 * p.numel() for p in whole.parameters()) > LARGEST:
        raise DataError("encoder and dense layer together are larger than 1.8 GB, more than an ONNX file holds; use --format sparse")
    tokens, some = torch.ones(SAMPLE, dtype=torch.int64), {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        whole,
        (tokens, tokens.clone()),  # one tensor given twice would be traced as one input
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": some, "attention_mask": some},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
