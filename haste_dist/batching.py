"""Requests computed together: those that come while others are being computed wait for one another, and go together.

Ray Serve's own batching closes a batch whenever its timeout is over, also while the batch before is still being computed, so that under
load its batches stay small (of 64 requests that waited, 1.5 went together). One batch at a time: a second one ahead would take from the
next.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Called with an item, it answers with the item's result. All calls come from one event loop."""

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[list[Result]]],
        most: int,
        wait: float = 0.0,
        size_of: Callable[[Item], int] = lambda _: 1,
    ):
        """``run``: a batch's results, in order; what it raises, all of the batch get. ``most``: the sum of ``size_of`` over a batch (a
        larger item goes alone). ``wait``: seconds that an item waits for others where none is being computed."""
        self._run, self._most, self._wait, self._size_of = run, most, wait, size_of
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._working: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Batch after batch, until nobody waits."""
        await asyncio.sleep(self._wait)
        while batch := self._take():
            futures = [future for _, future in batch]
            try:
                results = await self._run([item for item, _ in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(results)} results for {len(batch)} requests")
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, result in zip(futures, results, strict=True):
                if not future.done():  # a client that has gone
                    future.set_result(result)

    def _take(self) -> list[tuple[Item, "asyncio.Future[Result]"]]:
        """The first ones that fit, without those whose clients have gone."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        size = 0
        while self._waiting:
            item, future = self._waiting[0]
            if not future.done():
                size += self._size_of(item)
                if batch and size > self._most:
                    break
                batch.append((item, future))
            self._waiting.popleft()
        return batch
