"""A basis of the embedding for the tail: the directions in which label embeddings differ most (output.basis=labels).

A pretrained encoder spreads what it knows evenly over its features, so a group that reads F of D of them sees little more than F/D of what
tells its labels apart. Turned to the principal directions of the label embeddings, few features hold most of it, and F can be smaller. The
basis is made by prepare, is never trained, and stays with the label order. Dropout comes before it: a mask then hides features that are
all alike, as it does without a basis.

Close labels vary in fewer directions than all of them. So the tail can have K bases (output.bases): one for each part of it, a range of
neighbouring groups, of whose M directions (output.directions) its groups choose their own. What the tail reads is then K M wide.

Letters: L labels, D features of the embedding that the tail reads, K bases of M directions, T groups.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from haste_dist.errors import DataError
from haste_dist.manifest import cannot_write, first_line
from haste_dist.tensor_file import write_tensors

BASIS_FILE = "label_basis.safetensors"
LABELS = 2**20  # that are looked at: more say nothing new
CHUNK = 65536  # labels at once


def make_basis(vectors_LD: NDArray[np.float16], tail_TG: NDArray[np.int64], bases: int, directions: int) -> Tensor:
    """(K, D, M) float32 of a tail whose groups hold the labels ``tail_TG`` (-1: padding): one basis of all labels, or one for each part."""
    directions = directions or vectors_LD.shape[1]
    if bases == 1:
        return principal_basis(vectors_LD)[None, :, :directions]
    part_T = part_of(np.arange(len(tail_TG)), len(tail_TG), bases)
    return part_bases(vectors_LD, (labels[labels >= 0] for labels in (tail_TG[part_T == k].ravel() for k in range(bases))), directions)


def principal_basis(vectors_LD: NDArray[np.float16]) -> Tensor:
    """(D, D) float32, orthogonal: the first feature of x @ basis is that of the direction in which the rows vary most.

    From rows at even distances where there are more than LABELS.
    """
    total_D, scatter_DD, count = _sums(vectors_LD, None, np.zeros(vectors_LD.shape[1]))
    return _directions(scatter_DD - np.outer(total_D, total_D) / max(1, count))


def part_bases(vectors_LD: NDArray[np.float16], parts: Iterable[NDArray[np.int64]], directions: int) -> Tensor:
    """(K, D, M) float32: for each of K ``parts``, labels in any order, the M ``directions`` in which its vectors, seen from the mean of all
    labels, are longest; the first is the one that holds most."""
    mean_D = label_mean(vectors_LD).astype(np.float64)
    return torch.stack([_directions(_sums(vectors_LD, labels, mean_D)[1])[:, :directions] for labels in parts])


def label_mean(vectors_LD: NDArray[np.float16]) -> NDArray[np.float32]:
    """(D,) float32, summed in float64 in the order of the labels."""
    total_D = np.zeros(vectors_LD.shape[1])
    for start in range(0, len(vectors_LD), CHUNK):
        total_D += vectors_LD[start : start + CHUNK].sum(axis=0, dtype=np.float64)
    return (total_D / max(1, len(vectors_LD))).astype(np.float32)


def part_of(groups: NDArray[np.int64], total: int, bases: int) -> NDArray[np.int64]:
    """Which part of the tail each of ``groups`` belongs to, of ``total`` groups cut into ``bases`` near-equal ranges. Pure."""
    return groups * bases // max(1, total)


def _sums(
    vectors_LD: NDArray[np.float16], labels: NDArray[np.int64] | None, seen_from_D: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Of all rows, or those of ``labels``, at even distances if more than LABELS, less ``seen_from_D``: their sum, that of their outer
    products, their number."""
    rows = len(vectors_LD) if labels is None else len(labels)
    step = max(1, -(-rows // LABELS))
    width = vectors_LD.shape[1]
    total_D, scatter_DD = np.zeros(width), np.zeros((width, width))
    for start in range(0, rows, CHUNK * step):
        part = slice(start, start + CHUNK * step, step)
        v_RD = (vectors_LD[part] if labels is None else vectors_LD[labels[part]]).astype(np.float64) - seen_from_D
        total_D += v_RD.sum(axis=0)
        scatter_DD += v_RD.T @ v_RD
    return total_D, scatter_DD, -(-rows // step)


def _directions(scatter_DD: NDArray[np.float64]) -> Tensor:
    columns_DD = np.linalg.eigh(scatter_DD).eigenvectors[:, ::-1]
    largest_D = np.take_along_axis(columns_DD, np.abs(columns_DD).argmax(axis=0)[None], axis=0)  # its sign is open: it is made positive
    return torch.from_numpy((columns_DD * np.sign(largest_D)).astype(np.float32))


def side_by_side(basis_KDM: Tensor) -> Tensor:
    """(D, K M): what the tail's input is multiplied by."""
    return basis_KDM.transpose(0, 1).flatten(1).contiguous()


def write_basis(folder: Path, basis_KDM: Tensor) -> None:
    """Raises DataError."""
    path = folder / BASIS_FILE
    part = path.with_name(f".{BASIS_FILE}.part")
    try:
        write_tensors(part, {"basis": basis_KDM.contiguous()})
        part.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None


def read_basis(folder: Path) -> Tensor | None:
    """(K, D, M): what prepare wrote there, None if nothing. Raises DataError for a damaged file."""
    path = folder / BASIS_FILE
    if not path.is_file():
        return None
    try:
        basis = load_file(path)["basis"]
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({first_line(error)}); run haste prepare again") from None
    return basis[None] if basis.ndim == 2 else basis  # of before there could be several
