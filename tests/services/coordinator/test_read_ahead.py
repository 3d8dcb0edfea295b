import asyncio
from collections.abc import AsyncGenerator

import pytest

from colaserve_services.coordinator.read_ahead import ReadAhead
from colaserve_services.errors import Cancelled
from tests.waiting import eventually


class Counting:
    def __init__(self, count: int, error: Exception | None = None):
        self.count, self.error, self.closed, self.made = count, error, False, 0

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            for item in range(self.count):
                self.made += 1
                yield item
                await asyncio.sleep(0)
            if self.error:
                raise self.error
        finally:
            self.closed = True


async def test_items_come_in_order_and_then_the_end():
    source = Counting(5)
    async with ReadAhead(source.stream()) as ahead:
        assert [await ahead.next() for _ in range(5)] == list(range(5))
        with pytest.raises(EOFError):
            await ahead.next()
    assert source.closed


async def test_an_error_comes_after_the_items_before_it():
    async with ReadAhead(Counting(2, ValueError("broke")).stream()) as ahead:
        assert [await ahead.next(), await ahead.next()] == [0, 1]
        with pytest.raises(ValueError, match="broke"):
            await ahead.next()


async def test_a_cancellation_that_nobody_asked_for_is_an_error_too():
    async def stream() -> AsyncGenerator[int, None]:
        yield 0
        raise asyncio.CancelledError  # as grpc.aio does when a call is cancelled on this side

    async with ReadAhead(stream()) as ahead:
        assert await ahead.next() == 0
        with pytest.raises(Cancelled):
            await asyncio.wait_for(ahead.next(), 5)


async def test_it_reads_ahead_but_not_without_end():
    source = Counting(100)
    async with ReadAhead(source.stream()) as ahead:
        await asyncio.sleep(0.02)
        assert source.made == ahead.received == 2


async def test_leaving_closes_the_stream_at_once_wherever_it_is():
    for count in (0, 1, 2, 100):
        source = Counting(count)
        async with ReadAhead(source.stream()):
            await asyncio.sleep(0.01)
        assert source.closed


async def test_who_is_cancelled_while_the_stream_closes_hears_of_it():
    closing = asyncio.Event()

    async def stream() -> AsyncGenerator[int, None]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            closing.set()
            await asyncio.Event().wait()

    async def leave() -> None:
        async with ReadAhead(stream()) as ahead:
            await ahead.next()

    leaving = asyncio.create_task(leave())
    await closing.wait()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_passing_items_give_way_to_the_next_and_are_left_out_where_another_waits():
    sent = []

    async def stream():
        for item in ("p1", "p2", "A", "p3", "B"):
            sent.append(item)
            yield item

    async with ReadAhead(stream(), passing=lambda item: item.startswith("p")) as ahead:
        await eventually(lambda: len(sent) == 5)
        assert [await ahead.next(), await ahead.next(), ahead.received] == ["A", "B", 2]
