"""Several generations of one request, merged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from colaserve.v1.generation_pb2 import GenerateRequest, GenerateResponse
from colaserve_services.errors import Cancelled, Unavailable
from colaserve_services.gateway.side_by_side import SideBySide
from tests.waiting import eventually


class Call:
    """Says its prompt's number over and over; counts what was taken from it."""

    def __init__(self, request: GenerateRequest, messages: int, failure: Exception | None = None):
        self._request, self._messages, self._failure = request, messages, failure
        self.taken, self.cancelled = 0, False

    async def __aiter__(self) -> AsyncIterator[GenerateResponse]:
        for _ in range(self._messages):
            await asyncio.sleep(0)
            self.taken += 1
            yield GenerateResponse(text=self._request.prompt)
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> bool:
        self.cancelled = True
        return True


class Calls:
    def __init__(self, count: int, messages: int, parallel: int = 16, failure: Exception | None = None):
        self.open: list[Call] = []

        async def start(request: GenerateRequest) -> Call:
            self.open.append(Call(request, messages, failure))
            return self.open[-1]

        requests = [GenerateRequest(prompt=str(number)) for number in range(count)]
        self.merged = SideBySide(requests, start, parallel)


async def test_all_messages_come_with_the_number_of_their_call():
    calls = Calls(count=3, messages=40)
    async with calls.merged as messages:
        got = [(index, message.text) async for index, message in messages]
    assert sorted(got) == sorted((number, str(number)) for number in range(3) for _ in range(40))


async def test_what_nobody_reads_is_not_taken_from_the_calls():
    calls = Calls(count=2, messages=10_000)
    async with calls.merged:
        for _ in range(200):
            await asyncio.sleep(0)
        assert sum(call.taken for call in calls.open) <= 12


async def test_leaving_early_cancels_the_calls():
    calls = Calls(count=2, messages=10_000)
    async with calls.merged as messages:
        async for _ in messages:
            break
    assert [call.cancelled for call in calls.open] == [True, True]


async def test_calls_beyond_the_bound_are_opened_when_others_have_ended():
    calls = Calls(count=3, messages=10_000, parallel=2)
    async with calls.merged:
        await eventually(lambda: len(calls.open) == 2)
        await asyncio.sleep(0.02)
        assert len(calls.open) == 2


@pytest.mark.parametrize("failure", [Unavailable("gone"), asyncio.CancelledError()])
async def test_a_failure_is_raised_after_what_came_before_it(failure: Exception):
    calls = Calls(count=1, messages=3, failure=failure)
    got: list[str] = []
    with pytest.raises(Unavailable if isinstance(failure, Unavailable) else Cancelled):
        await read_all(calls, got)
    assert got == ["0"] * 3


async def read_all(calls: Calls, got: list[str]) -> None:
    async with asyncio.timeout(20), calls.merged as messages:
        async for _, message in messages:
            got.append(message.text)
