"""Requests computed together: who goes with whom, and who hears of what."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haste_dist.batching import Batcher

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(work, 20)

    return asyncio.run(limited())


class Busy:
    """A model that is busy until it is told that it is free, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = asyncio.Event()

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await self.free.wait()
        return items


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), max_size=6), st.integers(1, 12))
def test_each_gets_its_own_result_and_batches_fit(waves: list[list[int]], most: int) -> None:
    """Waves of requests, each while the one before is being computed."""
    batches: list[list[int]] = []

    async def work() -> list[tuple[int, int]]:
        async def compute(items: list[tuple[int, int]]) -> list[tuple[int, int]]:
            batches.append([size for _, size in items])
            await asyncio.sleep(0)
            return items

        batcher = Batcher(compute, most, size_of=lambda item: item[1])
        tasks = []
        for number, wave in enumerate(waves):
            tasks += [asyncio.create_task(batcher((100 * number + i, size))) for i, size in enumerate(wave)]
            await asyncio.sleep(0)
        return [await task for task in tasks]

    sent = [(100 * number + i, size) for number, wave in enumerate(waves) for i, size in enumerate(wave)]
    assert run(work()) == sent
    assert [size for batch in batches for size in batch] == [size for _, size in sent]  # first come, first served, each once
    assert all(len(batch) == 1 or sum(batch) <= most for batch in batches)


def test_those_that_come_meanwhile_go_together() -> None:
    """Ray Serve's batching fails this: it closes a batch of what came within its timeout, whether or not the one before is done."""

    async def work() -> list[list[int]]:
        model = Busy()
        batcher = Batcher(model, 64)
        tasks = [asyncio.create_task(batcher(0))]
        for i in range(1, 9):
            await asyncio.sleep(0.005)
            tasks.append(asyncio.create_task(batcher(i)))
        await asyncio.sleep(0.005)
        model.free.set()
        await asyncio.gather(*tasks)
        return model.batches

    assert run(work()) == [[0], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_the_first_waits_for_others() -> None:
    batches: list[list[int]] = []

    async def work() -> None:
        async def compute(items: list[int]) -> list[int]:
            batches.append(items)
            return items

        batcher = Batcher(compute, 64, wait=0.2)
        first = asyncio.create_task(batcher(1))
        await asyncio.sleep(0.02)
        assert await asyncio.gather(first, batcher(2)) == [1, 2]

    run(work())
    assert batches == [[1, 2]]


def test_an_error_is_each_ones_and_the_next_batch_goes_on() -> None:
    async def work() -> None:
        async def compute(items: list[int]) -> list[int]:
            await asyncio.sleep(0.01)
            if 2 in items:
                raise OSError("no model")
            return items if 4 not in items else []

        batcher = Batcher(compute, 2)
        told = await asyncio.gather(*(batcher(i) for i in range(1, 7)), return_exceptions=True)
        assert [str(one) for one in told] == ["no model", "no model", "0 results for 2 requests", "0 results for 2 requests", "5", "6"]
        assert await batcher(7) == 7

    run(work())


def test_a_client_that_has_gone_is_not_computed_and_harms_none() -> None:
    async def work() -> list[list[int]]:
        model = Busy()
        batcher = Batcher(model, 8)
        tasks = [asyncio.create_task(batcher(0))]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(batcher(i)) for i in (1, 2, 3)]
        await asyncio.sleep(0.01)
        for gone in (tasks[0], tasks[2]):  # one that is being computed, and one that waits
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
        model.free.set()
        assert await asyncio.gather(tasks[1], tasks[3]) == [1, 3]
        return model.batches

    assert run(work()) == [[0], [1, 3]]


def test_an_error_after_a_client_has_gone_reaches_the_others() -> None:
    async def work() -> None:
        free = asyncio.Event()

        async def compute(items: list[int]) -> list[int]:
            await free.wait()
            if 1 in items:
                raise OSError("no model")
            return items

        batcher = Batcher(compute, 8, wait=0.01)
        gone, stays = (asyncio.create_task(batcher(i)) for i in (1, 2))
        await asyncio.sleep(0.03)
        later = asyncio.create_task(batcher(3))
        gone.cancel()
        await asyncio.sleep(0)
        free.set()
        with pytest.raises(OSError, match="no model"):
            await stays
        assert await later == 3

    run(work())
