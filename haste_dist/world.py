"""The ranks of a run and the device of this one. Knows torch.distributed only: Ray, torchrun or nobody may have started us."""

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from haste_dist.errors import ConfigError
from haste_dist.sharding import label_parts


@dataclass(frozen=True)
class Ranks:
    """Some ranks that exchange tensors with each other, and the place of this one among them."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = field(default=None, kw_only=True)  # None: the default one, of all ranks


@dataclass(frozen=True)
class World(Ranks):
    """All ranks: W = P label shards x R replicas of them. Rank r owns shard r mod P in replica r // P; R is 1 unless split."""

    device: torch.device
    control: dist.ProcessGroup  # gloo, for small host-side messages that must not touch the GPU's stream
    replica: Ranks | None = field(default=None, kw_only=True)
    copies: Ranks = field(default=Ranks(0, 1), kw_only=True)  # the R ranks that own this rank's shard; place: the replica's number

    @property
    def shards(self) -> Ranks:
        """The P ranks that share all labels among them and see the same rows of a batch: those of this replica, or all."""
        return self.replica or self

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


def split_world(world: World, label_parallel: int, timeout: float = 600.0) -> World:
    """The world as replicas of ``label_parallel`` label shards; 0: as it is. Every rank calls it. Raises ConfigError."""
    parts = label_parts(label_parallel, world.size)
    copies = world.size // parts
    if copies == 1:
        return world
    grid = torch.arange(world.size).view(copies, parts)
    limit = timedelta(seconds=timeout)
    within, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=limit)
    across, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=limit)
    number, shard = divmod(world.rank, parts)
    return replace(world, replica=Ranks(shard, parts, group=within), copies=Ranks(number, copies, group=across))


def alone(device: str) -> World:
    """This process by itself, without a process group, on the device chosen as by ``choose_device``: for prediction."""
    return World(0, 1, choose_device(device), None)  # type: ignore[arg-type]  # nothing that it is given to communicates


def leave_world() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
