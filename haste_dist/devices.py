"""What their makers' data sheets say of a few GPUs: dense bfloat16 rate, memory rate, memory. Nothing is guessed of others.

Memory is what torch can see of it, which is a little less than the name says.
"""

from typing import NamedTuple


class Device(NamedTuple):
    flop_s: float  # dense bfloat16
    byte_s: float  # of its memory
    gib: float


# As torch names them; the first that the name begins with.
KNOWN = {
    "NVIDIA H200 NVL": Device(835e12, 4.8e12, 139),
    "NVIDIA H200": Device(989e12, 4.8e12, 139),
    "NVIDIA H100 NVL": Device(835e12, 3.9e12, 93),
    "NVIDIA H100 PCIe": Device(756e12, 2.0e12, 79),
    "NVIDIA H100 80GB HBM3": Device(989e12, 3.35e12, 79),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 2.04e12, 79),
    "NVIDIA A100 80GB PCIe": Device(312e12, 1.94e12, 79),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 1.56e12, 39),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 1.56e12, 39),
}
SHORT = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "a100": "NVIDIA A100-SXM4-80GB", "a100-40": "NVIDIA A100-SXM4-40GB"}


def known_device(name: str) -> Device | None:
    """The data sheet of the GPU that torch calls ``name``; None where it is not known, and for a CPU."""
    return next((device for prefix, device in KNOWN.items() if name.startswith(prefix)), None)
