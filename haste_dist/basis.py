"""A basis of the embedding for the tail: the directions in which label embeddings differ most (output.basis=labels).

A pretrained encoder spreads what it knows evenly over its features, so a group that reads F of D of them sees little more than F/D of what
tells its labels apart. Turned to the principal directions of the label embeddings, few features hold most of it, and F can be smaller. The
basis is made by prepare, is never trained, and stays with the label order; in half precision, in which it is orthogonal to 1e-4 (768
features; bfloat16 would leave 7e-4). Dropout comes before it: a mask then hides features that are all alike, as it does without a basis.

Letters: L labels, D features of the embedding that the tail reads.
"""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from haste_dist.config import Config
from haste_dist.errors import ConfigError, DataError
from haste_dist.manifest import PREPARED, cannot_write, first_line
from haste_dist.tensor_file import write_tensors

BASIS_FILE = "label_basis.safetensors"
LABELS = 2**20  # that are looked at: more say nothing new
CHUNK = 65536  # labels at once


def principal_basis(vectors_LD: NDArray[np.float16]) -> Tensor:
    """(D, D) float16: the principal directions, as what the tail reads is turned by."""
    return torch.from_numpy(principal_directions(vectors_LD).astype(np.float16))


def principal_directions(vectors_LD: NDArray[np.float16]) -> NDArray[np.float64]:
    """(D, D), orthogonal: the first feature of x @ directions is that of the direction in which the rows vary most.

    From rows at even distances where there are more than LABELS.
    """
    step = max(1, -(-len(vectors_LD) // LABELS))
    width = vectors_LD.shape[1]
    total_D, scatter_DD = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(vectors_LD), CHUNK * step):
        v_RD = vectors_LD[start : start + CHUNK * step : step].astype(np.float64)
        total_D += v_RD.sum(axis=0)
        scatter_DD += v_RD.T @ v_RD
    count = -(-len(vectors_LD) // step)
    scatter_DD -= np.outer(total_D, total_D) / max(1, count)
    columns_DD = np.linalg.eigh(scatter_DD).eigenvectors[:, ::-1]
    largest_D = np.take_along_axis(columns_DD, np.abs(columns_DD).argmax(axis=0)[None], axis=0)  # its sign is open: it is made positive
    return columns_DD * np.sign(largest_D)


def label_mean(vectors_LD: NDArray[np.float16]) -> NDArray[np.float32]:
    """(D,) float32, summed in float64 in the order of the labels."""
    total_D = np.zeros(vectors_LD.shape[1])
    for start in range(0, len(vectors_LD), CHUNK):
        total_D += vectors_LD[start : start + CHUNK].sum(axis=0, dtype=np.float64)
    return (total_D / max(1, len(vectors_LD))).astype(np.float32)


def write_basis(folder: Path, basis_DD: Tensor) -> None:
    """Raises DataError."""
    path = folder / BASIS_FILE
    part = path.with_name(f".{BASIS_FILE}.part")
    try:
        write_tensors(part, {"basis": basis_DD.contiguous()})
        part.replace(path)
    except OSError as error:
        raise cannot_write(path, error, PREPARED) from None


def read_basis(folder: Path) -> Tensor | None:
    """(D, D), what prepare wrote there (earlier programs in float32), None if nothing. Raises DataError for a damaged file."""
    path = folder / BASIS_FILE
    if not path.is_file():
        return None
    try:
        basis = load_file(path)["basis"]
        return basis.view(basis.shape[-1:] * 2)  # (1, D, D) in some files
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({first_line(error)}); run haste prepare again") from None


def check_basis_features(config: Config, groups_file: Path) -> None:
    """The basis of ``groups_file``'s order must be of the features that the tail reads, not of others as many. Raises ConfigError."""
    wanted = list(config.output.tail_features)
    found = json.loads(groups_file.read_text(encoding="utf-8")).get("basis_features", [])
    if found != wanted:
        was, asked = (str(span) if span else "all" for span in (found, wanted))
        raise ConfigError(
            f"{groups_file.parent}: its basis is of the features {was}, output.tail_features asks for {asked}; run haste prepare with it"
        )
