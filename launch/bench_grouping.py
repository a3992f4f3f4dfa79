"""``haste bench grouping``: how long labels take to be put into groups, how much memory, and how close the groups are.

The vectors are made up on the device, clusters of clusters, or read from a .npy file, such as real label embeddings. The result
is checked before a figure is shown: each label in one group, all groups whole.

Letters: L labels, D width, G group size.
"""

import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from haste_dist.bisection import cohesion
from haste_dist.errors import ConfigError
from haste_dist.packing import pack
from haste_dist.records import FOLDER, append_record
from haste_dist.world import all_devices

CHUNK = 2**18  # vectors made at once
CLUSTER = 100  # labels of a cluster on average, and clusters of a cluster
WRONG = 1  # exit status
REPORT_SECONDS = 2.0  # between progress lines where there is no terminal


def bench_grouping(args: Namespace) -> int:
    """Groups, checks, prints and records. Raises ConfigError for a file that cannot be used."""
    devices = all_devices("auto")
    device, cuda = devices[0], devices[0].type == "cuda"
    vectors_LD = read_vectors(args.vectors).to(device) if args.vectors else made_up(args.labels, args.width, device)
    labels, width = vectors_LD.shape
    if cuda:
        for one in devices:
            torch.cuda.synchronize(one)
            torch.cuda.reset_peak_memory_stats(one)
    began = time.perf_counter()
    with _progress(labels) as done:
        order = pack(vectors_LD, torch.arange(labels), args.group, search=args.search, devices=devices, done=done)
    seconds = time.perf_counter() - began  # the order is on the CPU, so the device has finished
    peak = max(map(torch.cuda.max_memory_allocated, devices)) if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not torch.equal(order.sort().values, torch.arange(labels)):
        print("wrong: the groups are no partition of the labels")
        return WRONG
    chance = torch.randperm(labels, generator=torch.Generator().manual_seed(0))
    figures = {
        "seconds": float(f"{seconds:.4g}"),
        "peak_gib": round(peak / 2**30, 3),
        "cohesion": round(cohesion(vectors_LD, order, args.group), 6),
        "cohesion_random": round(cohesion(vectors_LD, chance, args.group), 6),
        "search": args.search,
        "vectors": Path(args.vectors).stem if args.vectors else "made up",
        "threads": torch.get_num_threads(),
    }
    where = f"{len(devices)} x {torch.cuda.get_device_name()}" if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}: {labels:,} labels, width {width}, groups of {args.group}: {seconds:.2f} s, "
        f"peak {figures['peak_gib']:.2f} GiB{' a GPU' if cuda else ''}, "
        f"cohesion {figures['cohesion']:.4f} (random groups {figures['cohesion_random']:.4f})"
    )
    folder = Path(args.records) if args.records else FOLDER if cuda else None
    if folder and args.records != "none":
        append_record("grouping", "haste_dist", {"L": labels, "D": width, "G": args.group}, figures, folder, gpus=len(devices) * cuda)
    return 0


def made_up(labels: int, width: int, device: torch.device, seed: int = 0) -> Tensor:
    """(L, D) of length 1: around centres, which lie around centres themselves; float16 on a GPU."""
    generator = torch.Generator(device).manual_seed(seed)

    def around(centre: Tensor, count: int) -> Tensor:
        made = torch.empty(count, width, dtype=centre.dtype, device=device)
        for part in made.split(CHUNK):
            chosen = torch.randint(len(centre), (len(part),), generator=generator, device=device)
            noise = torch.randn(part.shape, generator=generator, device=device)
            part.copy_(torch.nn.functional.normalize(centre[chosen].float() + torch.nn.functional.normalize(noise)))
        return made

    root = torch.zeros(1, width, dtype=torch.float16 if device.type == "cuda" else torch.float32, device=device)
    return around(around(around(root, -(-labels // CLUSTER**2)), -(-labels // CLUSTER)), labels)


def read_vectors(file: str) -> Tensor:
    """(L, D) of length 1, from a .npy file. Raises ConfigError."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--vectors {file}: not a readable .npy file ({error})") from None
    if found.ndim != 2 or found.dtype not in (np.float16, np.float32) or not len(found):
        raise ConfigError(f"--vectors {file}: holds {found.dtype} of shape {found.shape}; wanted are float16 or float32 rows, one a label")
    length = np.linalg.norm(found[:1000].astype(np.float32), axis=1)
    if not np.allclose(length, 1, atol=1e-2):
        raise ConfigError(f"--vectors {file}: its rows must have length 1, one has {length[abs(length - 1).argmax()]:.3g}")
    return torch.from_numpy(found)


@contextmanager
def _progress(labels: int) -> Iterator[Callable[[int], None]]:
    """A function that takes how many more labels are packed: a bar on a terminal, else a line on stderr every few seconds."""
    console, began = Console(stderr=True), time.perf_counter()
    if console.is_terminal:
        columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task("", total=labels)
            yield lambda count: bars.advance(bar, count)
        return
    packed, told = 0, began

    def line(count: int) -> None:
        nonlocal packed, told
        packed, now = packed + count, time.perf_counter()
        if now - told >= REPORT_SECONDS or packed == labels:
            told = now
            print(f"packed {packed:,} of {labels:,} labels after {now - began:.1f} s", file=sys.stderr, flush=True)

    yield line
