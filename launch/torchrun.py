"""The training loop under torchrun, on hosts without Ray.

torchrun --nproc-per-node 2 -m haste_launch.torchrun wordnet data.prepared=... run.folder=...
"""

import signal
import sys
import threading
from pathlib import Path

from haste_dist.config import Config, load_config
from haste_dist.errors import HasteError


def main(argv: list[str]) -> int:
    """Runs one rank; argv is a config and ``a.b=c`` words. SIGINT and SIGTERM save and stop; returns the exit status."""
    if not argv:
        print("haste: error: usage: torchrun ... -m haste_launch.torchrun CONFIG [a.b=c ...]", file=sys.stderr)
        return 2
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: received.append(number))
    try:
        config = load_config(argv[0], argv[1:])
        from haste_dist.train import train
        from haste_dist.world import join_world, leave_world
        from haste_launch.progress import Progress

        world = join_world(config.launch.device)
        if config.launch.check_memory and world.device.type == "cuda":
            _check_memory(config, world)
        watching, done = None, threading.Event()
        if world.is_first:
            watching = threading.Thread(target=_show, args=(Progress(Path(config.run.folder), "train"), done), daemon=True)
            watching.start()
        train(config, world, lambda: bool(received))
        done.set()
        if watching is not None:
            watching.join()
        leave_world()
    except HasteError as error:
        print(f"haste: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 130 if signal.SIGINT in received else 0


def _check_memory(config: Config, world: "World") -> None:  # type: ignore[name-defined]  # noqa: F821
    import torch

    from haste_dist.fits import check_fits, facts_of
    from haste_dist.model import open_prepared

    gib = torch.cuda.get_device_properties(world.device).total_memory / 2**30
    check_fits(config, facts_of(open_prepared(config).manifest, world.size, "cuda"), gib, torch.cuda.get_device_name(world.device))


def _show(progress: "Progress", done: threading.Event) -> None:  # type: ignore[name-defined]  # noqa: F821
    with progress:
        while not done.wait(0.5):
            progress.update()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
