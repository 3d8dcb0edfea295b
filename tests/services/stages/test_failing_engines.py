"""Steps that fail: a session's fault harms its own pass; an engine that cannot compute says so, until it can again."""

import asyncio

import grpc
import pytest

from colaserve_services.errors import Overloaded
from colaserve_services.launch import stages as launched
from colaserve_services.runtime.observer import EngineObserver
from tests.services.stages.serving import serving
from tests.waiting import eventually


class Watch(EngineObserver):
    def __init__(self) -> None:
        self.told = 0

    def failing(self) -> None:
        self.told += 1


class Broken(Exception):
    """What a lost device raises."""


def broken(*_: object) -> None:
    raise Broken


async def ask(served) -> grpc.StatusCode:
    """The code that a whole run ends with."""
    call = served.prior.Sample(served.run())
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_three_failed_steps_in_a_row_are_told_and_three_more_and_a_good_one_starts_anew(tiny, monkeypatch):
    async with serving(tiny) as served:
        prior, watch = served.stages.engines["prior"], Watch()
        monkeypatch.setattr(prior, "observer", watch)
        forward = prior._forward
        steps = [broken, forward, broken, broken, broken, broken, broken, broken]
        for forwards, expected in zip(steps, [0, 0, 0, 0, 1, 1, 1, 2], strict=True):
            monkeypatch.setattr(prior, "_forward", forwards)
            code = grpc.StatusCode.OK if forwards is forward else grpc.StatusCode.UNAVAILABLE
            assert await ask(served) == code
            assert watch.told == expected
        await eventually(lambda: prior.load().kv_bytes_used == 0)


@pytest.fixture
def told(monkeypatch):
    """What health was told, in order."""
    monkeypatch.setattr(launched, "_TRY_AGAIN", 0.02)
    return []


async def watched(served, told):
    """The watch of a process over its engines, suspected at once."""
    suspected = asyncio.Event()
    suspected.set()

    async def tell(failing: bool) -> None:
        told.append(failing)

    return asyncio.create_task(served.stages.watch(suspected, tell))


async def test_engines_that_fail_at_their_warm_up_too_are_told_until_they_manage_it(tiny, told, monkeypatch):
    async with serving(tiny) as served:
        decoder = served.stages.engines["decoder"]
        with monkeypatch.context() as while_broken:
            while_broken.setattr(decoder, "_forward", broken)
            task = await watched(served, told)
            await eventually(lambda: len(told) >= 2)
            assert all(told)
        await eventually(lambda: told[-1] is False)
        task.cancel()


async def test_a_busy_engine_does_not_vouch_for_another(tiny, told, monkeypatch):
    async def busy(engine: object) -> None:
        raise Overloaded("full", 1.0)

    monkeypatch.setitem(launched._WARM_UPS, "decoder", busy)
    async with serving(tiny) as served:
        monkeypatch.setattr(served.stages.engines["prior"], "_forward", broken)
        task = await watched(served, told)
        await eventually(lambda: told)
        assert told[0] is True
        task.cancel()


async def test_engines_that_manage_their_warm_up_are_let_be(tiny, told):
    async with serving(tiny) as served:
        task = await watched(served, told)
        await eventually(lambda: told)
        assert told == [False]
        task.cancel()


async def test_engines_that_are_busy_beyond_their_time_are_not_failing(tiny, told, monkeypatch):
    monkeypatch.setattr(launched, "_WARM_UP_SECONDS", 0.0)
    async with serving(tiny) as served:
        task = await watched(served, told)
        await eventually(lambda: told)
        assert told == [False]
        task.cancel()
