"""``haste bench checkpoint``: how long a checkpoint of many labels stops the steps, and how long it takes to write and to load.

One rank, the tail alone, no encoder: what grows with the labels. Steps run before and while the checkpoint is written, so that their times
show what the writing takes from them. Letters: L labels, N batch rows, D width, F fan-in, G group size.
"""

import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from haste_dist.checkpoint import RunState, load
from haste_dist.classifier import Classifier
from haste_dist.config import GROUP_SIZES, CheckpointConfig, Config, check
from haste_dist.engine import EncoderEngine
from haste_dist.errors import ConfigError
from haste_dist.records import append_record
from haste_dist.saver import Saved, Saver
from haste_dist.sharding import label_shard
from haste_dist.world import join_world, leave_world

WIDTH, ROWS, CPU_ROWS, POSITIVES = 768, 512, 4, 5
WARM, TIMED = 3, 10
FINGERPRINT = "bench"


class NoEncoder(EncoderEngine):
    """Nothing to save."""

    def __init__(self) -> None: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {}, {}


def bench_checkpoint(words: Namespace) -> int:
    """Measures, prints a table, appends a record where ``words.records`` names a folder. Raises HasteError."""
    folder = Path(tempfile.mkdtemp(prefix="haste-checkpoint-", dir=_folder(words.out)))
    try:
        figures = _measure(words, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        leave_world()
    console = Console()
    for name, value in figures.items():
        console.print(f"{name:>24}  {value:,.4g}" if isinstance(value, float) else f"{name:>24}  {value:,}", highlight=False)
    if words.records != "none":
        shape = {
            "L": words.labels,
            "N": ROWS if torch.cuda.is_available() else CPU_ROWS,
            "D": WIDTH,
            "F": words.fan_in,
            "G": words.group,
            "W": 1,
        }
        append_record("checkpoint", "haste_dist", shape, figures, words.records, gpus=int(torch.cuda.is_available()))
    return 0


def _measure(words: Namespace, folder: Path) -> dict[str, float]:
    world = join_world(words.device)
    layer = _layer(words, world.device)
    generator = torch.Generator(device=world.device).manual_seed(0)
    rows = ROWS if world.device.type == "cuda" else CPU_ROWS
    x_ND = torch.randn(rows, WIDTH, device=world.device, generator=generator).to(layer.tail.weight.dtype)
    labels_NM = torch.randint(words.labels, (rows, POSITIVES), device=world.device, generator=generator)
    number = 0

    def step() -> float:
        nonlocal number
        began, number = time.perf_counter(), number + 1
        layer.step(x_ND, labels_NM, 0.01, number)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        return 1e3 * (time.perf_counter() - began)

    before = [step() for _ in range(WARM + TIMED)][WARM:]
    done: list[Saved] = []
    with Saver(folder, CheckpointConfig(), world, FINGERPRINT, done.append) as saver:
        reserve_s = _seconds(lambda: saver.reserve(layer))
        saver.save(RunState(number), NoEncoder(), layer)
        expected = {name: _ends(tensor).clone() for name, (tensor, _) in layer.tensors().items()}
        during = []
        while not saver.failed() and not done:
            during.append(step())
        saver.wait()
    for tensor, _ in layer.tensors().values():
        tensor.zero_()
    load_s = _seconds(lambda: load(folder / done[0].folder, None, layer, FINGERPRINT))
    for name, (tensor, _) in layer.tensors().items():
        if not torch.equal(_ends(tensor), expected[name]):
            raise ConfigError(f"{name}: what was loaded is not what was saved; do not trust this build")
    own = sum(layer.tensors()[name][0].nbytes for name in ("tail.weight", "tail.index"))
    return {
        "stall_s": done[0].stall_s,
        "write_s": done[0].write_s,
        "stall_of_write": done[0].stall_s / done[0].write_s,
        "load_s": load_s,
        "reserve_s": reserve_s,
        "bytes": done[0].bytes,
        "bytes_of_weights": done[0].bytes / own,
        "bytes_of_state": done[0].bytes / layer.bytes(),
        "step_ms": statistics.median(before),
        "step_ms_during_save": statistics.median(during) if during else 0.0,
    }


def _layer(words: Namespace, device: torch.device) -> Classifier:
    if words.group not in GROUP_SIZES:
        raise ConfigError(f"--group {words.group}: must be one of {', '.join(map(str, GROUP_SIZES))}")
    config = Config()
    config.output.group_size, config.output.fan_in = words.group, words.fan_in
    check(config)
    groups = -(-words.labels // words.group)
    return Classifier(config.output, label_shard(0, groups, words.group, words.labels, 1, 0), WIDTH, 0, device)


def _ends(tensor: Tensor) -> Tensor:
    """The first and the last rows."""
    return torch.cat([tensor[:1000], tensor[-1000:]]) if tensor.shape[0] else tensor


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _folder(name: str) -> str:
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {name}: cannot be made ({error.strerror}); name another folder") from None
    return name
