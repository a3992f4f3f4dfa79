"""What ranks tell each other on the host, in words: small pages that all of them see, so that all stop for the same reason."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from haste_dist.errors import HasteError
from haste_dist.world import World

PAGE_BYTES = 4096
BUSY_SECONDS = 0.25  # between the pages of ranks at work: launch.timeout is a second at least
T = TypeVar("T")


def exchange(page: dict[str, Any], world: World, group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
    """The pages of all ranks, in rank order. Every rank calls it; ``group`` is a gloo group (default: the control group)."""
    if world.size == 1:
        return [page]
    text = json.dumps(page).encode()
    if len(text) > PAGE_BYTES:
        raise ValueError(f"a page of {len(text)} bytes")
    mine = torch.frombuffer(bytearray(text.ljust(PAGE_BYTES)), dtype=torch.uint8)
    pages = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(pages, mine, group=group or world.control)
    return [json.loads(bytes(one.numpy())) for one in pages]


@contextmanager
def same_error(world: World) -> Iterator[None]:
    """A HasteError that any rank raises within is raised by all of them, so that none waits for one that has gone.

    What is done within must not communicate.
    """
    error: HasteError | None = None
    try:
        yield
    except HasteError as raised:
        error = raised
    told = [page["error"] for page in exchange({"error": str(error)[:500] if error else ""}, world)]
    if error is not None:
        raise error
    if any(told):
        raise HasteError(next(one for one in told if one))


def patiently(work: Callable[[], T], world: World) -> T:
    """What ``work`` returns, however long it takes: ranks tell each other meanwhile that they are at it, or else those that have less to do
    would count the others as lost after ``launch.timeout``. A rank that dies is noticed as ever.

    Every rank calls it; all raise its HasteError. ``work`` runs in a thread and must not communicate.
    """
    if world.size == 1:
        return work()
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # handed to the main thread
            done.set_exception(error)

    threading.Thread(target=run, name="work", daemon=True).start()  # no end of this process waits for it: its peers may be gone
    while any(page["busy"] for page in exchange({"busy": not done.done()}, world)):
        wait([done], BUSY_SECONDS)
    with same_error(world):
        return done.result()
