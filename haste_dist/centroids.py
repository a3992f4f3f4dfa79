"""A tail that starts from what its labels mean (output.start=centroids).

A group reads the features in which its labels' embeddings, seen from the mean of all labels, are largest (in the mean square, so that most
of them is kept), and each label's weights start as its own embedding there, of length ``init_scale``: before its first training text, a
label already answers to texts like its own. With ``output.basis=labels`` the features are those of that basis.

Letters: L labels, D embedding width (of the slice that the tail reads), T groups, G labels of a group, F fan-in.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from haste_dist.basis import label_mean
from haste_dist.classifier import Classifier
from haste_dist.errors import DataError
from haste_dist.label_groups import VECTORS_FILE
from haste_dist.model import Prepared

CHUNK = 2048  # groups at once


def check_centroids(prepared: Prepared, width: int) -> None:
    """Raises DataError where prepare kept no embeddings of its labels, or those of an encoder of another ``width``."""
    shape = _vectors(prepared.folder).shape
    if shape != (prepared.order.labels, width):
        raise DataError(f"{prepared.folder / VECTORS_FILE}: is {shape}, not {(prepared.order.labels, width)}; run haste prepare again")


def start_from_centroids(classifier: Classifier, prepared: Prepared) -> None:
    """Sets features and weights of this rank's groups; the same for any number of ranks, for a group depends on its labels alone."""
    tail, shard, span = classifier.tail, classifier.shard, classifier.tail_slice
    vectors_LD = _vectors(prepared.folder)
    mean_D = torch.from_numpy(label_mean(vectors_LD)[span.start : span.stop])
    size, fan_in = shard.group_size, classifier.config.fan_in
    basis_DD = None if classifier.basis is None else classifier.basis.cpu().float()
    for start in range(0, shard.groups, CHUNK):
        stop = min(start + CHUNK, shard.groups)
        rows = shard.tail_start + np.arange(start * size, stop * size)
        labels = prepared.order.label_of_row[rows]
        v_RD = torch.from_numpy(vectors_LD[np.maximum(labels, 0), span.start : span.stop].astype(np.float32)) - mean_D
        v_RD[torch.from_numpy(labels < 0)] = 0
        index_TF, direction_TGF = largest_features((v_RD if basis_DD is None else v_RD @ basis_DD).view(stop - start, size, -1), fan_in)
        tail.index[start:stop] = index_TF.to(tail.index)
        tail.weight[start:stop] = (classifier.config.init_scale * direction_TGF).to(tail.weight)


def largest_features(v_TGD: Tensor, fan_in: int) -> tuple[Tensor, Tensor]:
    """Of groups of vectors: the F features in which each group's are largest in the mean square, ascending (T, F) int64, and each vector on
    them alone, of length 1 (T, G, F); a zero vector stays zero."""
    # A stable sort: topk leaves open which of equal features it takes.
    order = v_TGD.square().sum(1).sort(dim=1, descending=True, stable=True).indices
    index_TF = order[:, :fan_in].sort(dim=1).values
    at_TGF = v_TGD.gather(2, index_TF[:, None].expand(-1, v_TGD.shape[1], -1))
    return index_TF, torch.nn.functional.normalize(at_TGF, dim=2)


def _vectors(folder: Path) -> np.ndarray:
    try:
        return np.load(folder / VECTORS_FILE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise DataError(f"{folder / VECTORS_FILE}: missing or damaged; run haste prepare again with output.start=centroids") from None
