"""The training loop under torchrun, on hosts without Ray.

torchrun --nproc-per-node 2 -m haste_launch.torchrun wordnet data.prepared=... run.folder=...
torchrun --nproc-per-node 2 -m haste_launch.torchrun scale bert-base --labels 10M     # the study's points of 2 ranks
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from haste_dist.config import Config, load_config
from haste_dist.errors import HasteError
from haste_dist.imports import no_collection


def main(argv: list[str]) -> int:
    """Runs one rank; argv is a config and ``a.b=c`` words. SIGINT and SIGTERM save and stop; returns the exit status."""
    if not argv:
        print("haste: error: usage: torchrun ... -m haste_launch.torchrun CONFIG [a.b=c ...]", file=sys.stderr)
        return 2
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: received.append(number))
    try:
        if argv[0] == "scale":
            return _scale(argv, lambda: bool(received))
        config = load_config(argv[0], argv[1:])
        with no_collection():
            from haste_dist.train import train
        from haste_dist.world import join_world, leave_world
        from haste_launch.progress import Progress

        world = join_world(config.launch.device, config.launch.timeout)
        if config.launch.check_memory and world.device.type == "cuda":
            _check_memory(config, world)
        watching, done = None, threading.Event()
        if world.is_first:
            watching = threading.Thread(target=_show, args=(Progress(Path(config.run.folder), "train"), done), daemon=True)
            watching.start()
        parent = os.getppid()
        train(config, world, lambda: bool(received) or is_orphan(parent))
        done.set()
        if watching is not None:
            watching.join()
        leave_world()
    except HasteError as error:
        print(f"haste: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 130 if signal.SIGINT in received else 0


def is_orphan(parent: int) -> bool:
    """Whether the process that started this one is gone. torchrun's ranks outlive it; they should save and end."""
    return os.getppid() != parent


def _scale(argv: list[str], wants_stop: Callable[[], bool]) -> int:
    """Measures the points of as many ranks as there are; the first prints the study so far. A point that fills a GPU ends it all."""
    from haste_launch.cli import parse
    from haste_launch.scale_settings import read_words

    args = parse(argv)
    words = read_words(args)
    from haste_dist.world import join_world, leave_world
    from haste_launch.ray_train import measure_rank
    from haste_launch.scale import law_of, report, study_config, task_arguments
    from haste_launch.scale_settings import points_of

    config = study_config(load_config(args.config, args.overrides), words)
    world = join_world(config.launch.device)
    cuda = world.device.type == "cuda"
    points = points_of(words, config, [world.size], cuda)
    measure_rank(config, world, task_arguments(points, law_of(words), words, cuda), wants_stop)
    if world.is_first:
        report(config, words)
    leave_world()
    return 130 if wants_stop() else 0


def _check_memory(config: Config, world: "World") -> None:  # type: ignore[name-defined]  # noqa: F821
    import torch

    from haste_dist.agreement import patiently
    from haste_dist.fits import check_fits, facts_of
    from haste_dist.model import open_prepared

    manifest = patiently(lambda: open_prepared(config), world).manifest  # where it lies in a store, some machines have a copy
    gib = torch.cuda.get_device_properties(world.device).total_memory / 2**30
    check_fits(config, facts_of(manifest, world.size, "cuda"), gib, torch.cuda.get_device_name(world.device))


def _show(progress: "Progress", done: threading.Event) -> None:  # type: ignore[name-defined]  # noqa: F821
    with progress:
        while not done.wait(0.5):
            progress.update()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
