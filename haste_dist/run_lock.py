"""One group of ranks at a time in a run folder: what a lost driver left running must not write beside the run that goes on from it."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from haste_dist.agreement import same_error
from haste_dist.errors import HasteError
from haste_dist.world import World

LOCK = ".lock"
PAUSE = 0.1


@contextmanager
def alone(run: Path, world: World, seconds: float) -> Iterator[None]:
    """Holds ``run`` for the ranks of ``world``, after waiting up to ``seconds`` for others. Every rank calls it; all raise the HasteError.

    The system lets go of it when the first rank ends, however it ends.
    """
    descriptor = -1
    try:
        with same_error(world):
            if world.is_first:
                descriptor = lock(run, seconds)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def lock(run: Path, seconds: float) -> int:
    """The open, locked file; closing it unlocks. Raises HasteError where others keep it for longer than ``seconds``."""
    path, end = run / LOCK, time.monotonic() + seconds
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise HasteError(f"{path}: cannot be written ({error.strerror}); choose another run.folder") from None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise HasteError(f"{run}: another process trains here ({holder}); stop it, or choose another run.folder") from None
            time.sleep(PAUSE)
        except OSError:  # a file system without locks
            break
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor
