"""A bounded number of things at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def work_through(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Do the work for every item, `concurrency` at a time, taken in order.

    The first failure, or being cancelled, cancels the rest and is raised once they have ended.
    """
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
