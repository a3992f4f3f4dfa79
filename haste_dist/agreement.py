"""What ranks tell each other on the host, in words: small pages that all of them see, so that all stop for the same reason."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from haste_dist.errors import HasteError
from haste_dist.world import World

PAGE_BYTES = 4096


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
