"""Several generations of one request, side by side, their messages merged as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, Self

from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_services.errors import Cancelled
from colaserve_services.gateway.backend import GenerateCall
from colaserve_services.rpc import cancellation

_UNREAD: Final = 8  # messages that wait for a slow reader before the calls are no longer read

Open = Callable[[Any], Awaitable[GenerateCall]]
Message = tuple[int, GenerateResponse]


class SideBySide:
    """`async for index, message`, in the order of their coming; the first failure is raised.

    Entering starts the calls, at most `parallel` at a time, each with what `requests` has for it then. Leaving, however
    that happens, cancels those that run.
    """

    def __init__(self, requests: Sequence[Any], open_call: Open, parallel: int):
        self._requests = requests
        self._open = open_call
        self._places = asyncio.Semaphore(parallel)
        self._queue: asyncio.Queue[Message | Exception | None] = asyncio.Queue(_UNREAD)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(index)) for index in range(len(self._requests))]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aiter__(self) -> AsyncIterator[Message]:
        running = len(self._tasks)
        while running:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item

    async def _run(self, index: int) -> None:
        async with self._places:
            try:
                await self._forward(index, self._requests[index])
            except asyncio.CancelledError:
                if cancellation.is_mine():
                    raise
                await self._queue.put(Cancelled("the call was cancelled by the other side"))
            except Exception as error:
                await self._queue.put(error)
            else:
                await self._queue.put(None)

    async def _forward(self, index: int, request: Any) -> None:
        call = await self._open(request)
        try:
            async for message in call:
                await self._queue.put((index, message))
        finally:
            call.cancel()
