"""Safetensors files written and hashed in one pass, from a thread, without a copy.

The format: eight bytes with the header's length, a JSON header, then the tensors' bytes. safetensors.torch.save_file writes the same but
tells no checksum, and a file of a hundred gigabytes should not be read again for one. Reading is safetensors' own.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PIECE = 2**24  # bytes written and hashed at once; Python lets other threads run during both
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class FileRecord:
    """What vouches for a file."""

    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> FileRecord:
    """Writes contiguous CPU ``tensors`` and waits until they are on the disk. Raises OSError."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each starts at a multiple of its element
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in (len(text).to_bytes(8, "little"), text, *(_bytes(tensors[name]) for name in order)):
            view = memoryview(part)  # type: ignore[arg-type]
            for at in range(0, len(view), PIECE):
                piece = view[at : at + PIECE]
                digest.update(piece)
                while piece:  # the system may take less than it is given
                    piece = piece[file.write(piece) :]
        size = file.tell()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
