"""The output layer's operations: dense head, group-shared sparse tail, top-k and rewiring, on the rows that one rank owns."""

from haste_kernels.head_step import head_step
from haste_kernels.initial import uniform
from haste_kernels.linear import FixedFanInLinear, GroupSharedLinear, group_shared_linear
from haste_kernels.rewire import (
    FeatureScores,
    Prune,
    connection_scores,
    gradient_scores,
    index_dtype,
    prune_and_regrow,
    random_features,
    scoring_spans,
)
from haste_kernels.rounding import stochastic_round
from haste_kernels.state import STORED, HeadState, Loss, Positives, StepArgs, TailState
from haste_kernels.tail_step import tail_step
from haste_kernels.topk import merge_topk, topk

__all__ = [
    "STORED",
    "FeatureScores",
    "FixedFanInLinear",
    "GroupSharedLinear",
    "HeadState",
    "Loss",
    "Positives",
    "Prune",
    "StepArgs",
    "TailState",
    "connection_scores",
    "gradient_scores",
    "group_shared_linear",
    "head_step",
    "index_dtype",
    "merge_topk",
    "prune_and_regrow",
    "random_features",
    "scoring_spans",
    "stochastic_round",
    "tail_step",
    "topk",
    "uniform",
]
