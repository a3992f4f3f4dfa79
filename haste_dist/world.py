"""The ranks of a run and the device of this one. Knows torch.distributed only: Ray, torchrun or nobody may have started us."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from haste_dist.errors import ConfigError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup  # gloo, for small host-side messages that must not touch the GPU's stream

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device of this host. Raises ConfigError where there is no GPU to be had."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launch.device=cuda: torch sees no GPU on this host; set launch.device=cpu or install a CUDA build of torch")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def all_devices(wanted: str) -> list[torch.device]:
    """As ``choose_device``, but all GPUs that this process sees; one CPU. Raises ConfigError where there is no GPU to be had."""
    first = choose_device(wanted)
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if first.type == "cuda" else [first]


def join_world(device: str | torch.device = "auto", timeout: float = 600.0) -> World:
    """Joins the process group that the launcher prepared (or makes one of a single rank) on the device given or chosen.

    A collective that takes longer than ``timeout`` seconds fails: a peer is lost.
    """
    limit = timedelta(seconds=timeout)
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0"))) if isinstance(device, str) else device
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=limit)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, even for one rank
    return World(dist.get_rank(), dist.get_world_size(), chosen, dist.new_group(backend="gloo", timeout=limit))


def alone(device: str) -> World:
    """This process by itself, without a process group, on the device chosen as by ``choose_device``: for prediction."""
    return World(0, 1, choose_device(device), None)  # type: ignore[arg-type]  # nothing that it is given to communicates


def leave_world() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
