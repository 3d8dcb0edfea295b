"""Reads a stream in a task of its own, so that its writer works on while the reader is busy elsewhere."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from types import TracebackType
from typing import Generic, TypeVar

from colaserve_services.errors import Cancelled
from colaserve_services.rpc import cancellation

T = TypeVar("T")
Patience = Callable[[asyncio.Future[None]], Awaitable[None]]


class ReadAhead(Generic[T]):
    """`async with ReadAhead(stream) as ahead: item = await ahead.next()`. Leaving closes the stream and waits for
    that. At most two items are queued; `received` counts those that came and are not passing.

    While the queue is full, `patience` is awaited with the future of the put; if it raises, the stream is closed.
    An unread `passing` item (a preview) is replaced by the next item, and is dropped if another item is queued."""

    def __init__(
        self,
        stream: AsyncGenerator[T, None],
        patience: Patience | None = None,
        passing: Callable[[T], bool] = lambda item: False,
    ):
        self._stream, self._patience, self._passing = stream, patience, passing
        self._queue: asyncio.Queue[tuple[T] | Exception] = asyncio.Queue(maxsize=1)
        self.received = 0

    async def __aenter__(self) -> "ReadAhead[T]":
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            if cancellation.is_mine():
                raise

    async def next(self) -> T:
        """The next item. Once, after the last one: raises what the stream raised, or EOFError when it just ended."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item[0]

    async def __aiter__(self) -> AsyncIterator[T]:
        with suppress(EOFError):
            while True:
                yield await self.next()

    async def _hand_over(self, item: tuple[T]) -> None:
        if self._patience is None or not self._queue.full():
            await self._queue.put(item)
            return
        putting = asyncio.ensure_future(self._queue.put(item))
        try:
            await self._patience(putting)
        finally:
            putting.cancel()

    async def _read(self) -> None:
        end: Exception = EOFError("the stream has ended")
        holds_passing = False  # where the queue holds anything
        try:
            async with aclosing(self._stream) as stream:
                async for item in stream:
                    passing = self._passing(item)
                    self.received += not passing
                    if holds_passing and self._queue.full():
                        self._queue.get_nowait()
                    if not (passing and self._queue.full()):
                        holds_passing = passing
                        await self._hand_over((item,))
        except Exception as error:
            end = error
        except asyncio.CancelledError:
            if cancellation.is_mine():
                raise
            end = Cancelled("the stream was cancelled by what it reads")
        await self._queue.put(end)


async def merged(
    streams: Sequence[AsyncGenerator[T, None]], most: int, passing: Callable[[T], bool]
) -> AsyncGenerator[tuple[int, T], None]:
    """The items of several streams as they come, each with its stream's number, of `most` streams at once, each read
    ahead. The first failure is raised; leaving closes those that have begun."""
    waiting, reading = deque(enumerate(streams)), dict[asyncio.Task[T], tuple[int, ReadAhead[T]]]()
    async with AsyncExitStack() as stack:
        try:
            while waiting or reading:
                while waiting and len(reading) < most:
                    index, stream = waiting.popleft()
                    ahead = await stack.enter_async_context(ReadAhead(stream, passing=passing))
                    reading[asyncio.create_task(ahead.next())] = index, ahead
                done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index, ahead = reading.pop(task)
                    with suppress(EOFError):
                        yield index, task.result()
                        reading[asyncio.create_task(ahead.next())] = index, ahead
        finally:
            for task in reading:
                task.cancel()
