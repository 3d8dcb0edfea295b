"""Which sessions run, which are refused, evicted or preempted: readers that stay away and full engines."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial

import pytest
import torch

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, UsageError
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.sampling import SamplingSettings
from colaserve_services.prior.sampling_run import SampledBlock, SampleJob
from tests.conftest import Golden
from tests.services.engines.conftest import Engines, engines
from tests.services.engines.runs import freed, job, noise, patiently, sample
from tests.waiting import PATIENCE, eventually


async def test_a_passed_deadline_ends_a_run_and_frees_it(tiny: Golden) -> None:
    async def sample_until(stages: Engines, wanted: SampleJob, seconds: float) -> None:
        async with stages.prior.session(wanted, deadline=time.monotonic() + seconds) as session:
            async for _ in session:
                await asyncio.sleep(seconds)

    with engines(tiny.directory, EngineLimits(max_context=512, run_ahead=2)) as stages:
        with pytest.raises(DeadlineExceeded):  # while it computes
            await sample_until(stages, job(blocks=100, steps=1000), 0.2)
        await freed(stages)
        with pytest.raises(DeadlineExceeded):  # while it is paused
            await sample_until(stages, job(blocks=20), 0.2)
        await freed(stages)


def holding(stages: Engines, stage: str, pages: int) -> int:
    """Bytes of KV for so many pages."""
    return pages * getattr(stages, stage).backend.page_bytes


async def test_a_session_for_which_there_is_no_kv_is_refused_until_there_is(tiny: Golden) -> None:
    with engines(tiny.directory) as probe:
        room = holding(probe, "prior", 5)
    with engines(tiny.directory, EngineLimits(max_context=512, kv_bytes=room, run_ahead=1)) as stages:
        async with stages.prior.session(job(1)), stages.prior.session(job(2)):
            await eventually(lambda: stages.prior.load().kv_bytes_used == holding(stages, "prior", 4))
            with pytest.raises(Overloaded, match="no KV memory"):
                await sample(stages, job(3))
        wanted = [job(seed) for seed in range(6)]
        results = await asyncio.gather(*(patiently(partial(sample, stages, each)) for each in wanted))
        assert [len(blocks) for blocks in results] == [2] * 6
        await freed(stages)


async def test_contexts_are_as_long_as_fits_the_kv_budget(tiny: Golden, caplog: pytest.LogCaptureFixture) -> None:
    with engines(tiny.directory) as probe:
        B, room = probe.prior.shape.block_size, holding(probe, "prior", 12)
    with engines(tiny.directory, EngineLimits(max_context=512, kv_bytes=room)) as stages:
        assert stages.prior.limits.max_context == 12 * B
        assert f"--kv-bytes fits contexts of {12 * B} latents, not 512" in caplog.messages
        assert len(await sample(stages, job(blocks=11))) == 11  # behind a block of context
        with pytest.raises(InvalidRequest, match="max_context is 48"):
            async with stages.prior.session(job(blocks=12)):
                pass
    with pytest.raises(UsageError, match="--kv-bytes: got 1, one block of latents needs 4096"):
        EngineLimits(kv_bytes=1).fitting(B, 0, 4096)


async def test_who_does_not_read_keeps_others_waiting_only_so_long(tiny: Golden) -> None:
    with engines(tiny.directory, EngineLimits(max_context=512, max_running=1, idle_seconds=0.3)) as stages:
        async with stages.prior.session(job(blocks=6)) as unread:
            await eventually(lambda: unread.outbox.unread == 2)
            await asyncio.sleep(0.5)  # while nobody waits
            assert stages.prior.load().running == 1
            assert len(await patiently(lambda: sample(stages, job(1)))) == 2
            got = aiter(unread)
            assert [(await anext(got)).index for _ in range(2)] == [0, 1]  # what was written is not lost
            with pytest.raises(Unavailable, match=r"nothing to compute for 0\.3 s while others wait"):
                await anext(got)
        await freed(stages)


async def decode_one(stages: Engines, wanted: DecodeJob) -> None:
    async with stages.decoder.session(wanted) as session:
        await session.decode(noise(4))


async def test_time_in_which_a_reader_is_away_is_not_counted_as_computing(tiny: Golden) -> None:
    with engines(tiny.directory, EngineLimits(max_context=512, run_ahead=1)) as stages:
        async with stages.prior.session(job(blocks=3)) as session:
            blocks = aiter(session)
            await eventually(lambda: session.outbox.unread == 1 and session.idle_since < math.inf)
            await asyncio.sleep(1)
            await anext(blocks)
            late = await anext(blocks)
        assert late.timings.compute_us < 900_000


def assert_same(got: list[SampledBlock], expected: list[SampledBlock]) -> None:
    assert [block.index for block in got] == [block.index for block in expected]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-4)


async def test_a_run_that_holds_most_of_the_kv_is_paused_for_others_and_ends_undisturbed(tiny: Golden) -> None:
    long, short = job(1, context=40, blocks=60, steps=2), job(2, context=8, blocks=2)
    with engines(tiny.directory) as stages:
        alone, of_short = await sample(stages, long), await sample(stages, short)
        room = holding(stages, "prior", 70)
    limits = EngineLimits(max_context=512, kv_bytes=room, run_ahead=4)
    with engines(tiny.directory, limits) as stages:
        async with stages.prior.session(long) as session:
            blocks = aiter(session)
            got = [await anext(blocks) for _ in range(45)]
            others = [stages.prior.session(job(seed, context=40, blocks=1, steps=100)) for seed in range(3)]
            async with AsyncExitStack() as held:  # with which there are no pages left
                for other in others:
                    with suppress(Overloaded):
                        await held.enter_async_context(other)
                for _ in range(2):
                    assert_same(await patiently(lambda: sample(stages, short)), of_short)
                assert not session.finished
            got += [block async for block in blocks]
        assert_same(got, alone)
        assert stages.prior.observer.preemptions > 0
        await freed(stages)


async def test_runs_that_outgrow_the_kv_together_end_as_they_do_alone(tiny: Golden) -> None:
    """The youngest pauses, is written again from its latents, and goes on."""
    wanted = [job(seed, context=8 + 4 * seed, blocks=30, steps=2) for seed in range(3)]
    with engines(tiny.directory) as stages:
        alone = [await sample(stages, each) for each in wanted]
        room = holding(stages, "prior", 40)
    limits = EngineLimits(max_context=512, kv_bytes=room, run_ahead=100)
    with engines(tiny.directory, limits) as stages:
        for got, expected in zip(await asyncio.gather(*(sample(stages, x) for x in wanted)), alone, strict=True):
            assert_same(got, expected)
        assert 2 <= stages.prior.observer.preemptions <= 6
        await freed(stages)


async def test_a_decode_stream_that_holds_most_of_the_kv_is_paused_too(tiny: Golden) -> None:
    sampling = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, seed=3)
    latents, wanted = noise(40), DecodeJob(noise(16), sampling=sampling, max_latents=56)

    async def decode(stages: Engines, interruption: Callable[[], Awaitable[None]]) -> list[int]:
        ids: list[int] = []
        async with stages.decoder.session(wanted) as session:
            for start in range(0, 40, 4):
                ids += (await session.decode(latents[start : start + 4])).token_ids
                if start in (24, 32):
                    await interruption()
        return ids

    async def nothing() -> None: ...

    with engines(tiny.directory) as stages:
        alone = await decode(stages, nothing)
        room = holding(stages, "decoder", 14)
    with engines(tiny.directory, EngineLimits(max_context=512, kv_bytes=room)) as stages:

        async def other() -> None:
            await patiently(lambda: decode_one(stages, DecodeJob(noise(12, 2), max_latents=16)))

        assert await decode(stages, other) == alone
        assert stages.decoder.observer.preemptions == 2
        await freed(stages)


async def test_newcomers_take_the_kv_of_a_preempted_session_only_so_often(tiny: Golden) -> None:
    with engines(tiny.directory) as probe:
        room = holding(probe, "prior", 34)
    limits = EngineLimits(max_context=512, kv_bytes=room, max_running=4, run_ahead=1)
    with engines(tiny.directory, limits) as stages:
        async with stages.prior.session(job(1, context=120, blocks=4)) as session:
            await anext(aiter(session))
            taken = 0
            async with AsyncExitStack() as held:
                newcomer = job(0, context=16, blocks=3)
                await patiently(lambda: held.enter_async_context(stages.prior.session(newcomer)))
                with suppress(Overloaded):
                    while taken <= 17:
                        async with stages.prior.session(job(taken, context=4, blocks=1)):
                            taken += 1
            assert taken == 16
            assert len([block async for block in session]) == 3
        await freed(stages)


@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_a_short_context_does_not_wait_for_long_ones(tiny: Golden, stage: str) -> None:
    """Eight others take a hundred passes; it is taken in with the next ones after its arrival."""
    long, short = noise(400, 1), noise(8, 2)
    limits = EngineLimits(max_context=512, prefill_chunk=32, share_prefixes=False)

    async def ask(latents: torch.Tensor) -> None:
        if stage == "encoder":
            await stages.encoder.encode([[3] * len(latents)])
        elif stage == "prior":
            await sample(stages, SampleJob(latents, 1, sampler=SamplerSettings(steps=4), base_seed=1))
        else:
            async with stages.decoder.session(DecodeJob(latents)) as session:
                await session.decode(latents[:4])

    with engines(tiny.directory, limits) as stages:
        passes = getattr(stages, stage).observer.rows
        others = [asyncio.ensure_future(ask(long)) for _ in range(8)]
        await eventually(lambda: len(passes) >= 2)
        before = len(passes)
        await ask(short)
        assert len(passes) <= before + 20  # the device's thread may be some ahead of this one
        assert not any(other.done() for other in others)
        await asyncio.gather(*others)
        await freed(stages)


async def test_texts_whose_kv_does_not_fit_at_once_are_encoded_one_after_the_other(tiny: Golden) -> None:
    texts = [[first + number % 90 for number in range(120)] for first in (5, 100, 200)]
    with engines(tiny.directory) as stages:
        expected = [(await stages.encoder.encode([ids]))[0][0].latents for ids in texts]
        room = 40 * stages.encoder.backend.page_bytes
    with engines(tiny.directory, EngineLimits(max_context=512, kv_bytes=room, prefill_chunk=16)) as stages:
        async with asyncio.timeout(PATIENCE):
            found = await asyncio.gather(*(stages.encoder.encode([ids]) for ids in texts))
        await freed(stages)
    for (encoded, _), latents in zip(found, expected, strict=True):
        torch.testing.assert_close(encoded[0].latents, latents, rtol=1e-4, atol=1e-4)


async def test_runs_that_attend_to_much_have_half_of_the_time_beside_one_that_attends_to_little(tiny: Golden) -> None:
    settings, sessions = SamplerSettings(steps=50), list[int]()
    with engines(tiny.directory, EngineLimits(max_context=1024, run_ahead=100)) as stages:
        stages.prior.observer.stepped = lambda seconds, rows, count: sessions.append(count)  # type: ignore[method-assign]
        long = [SampleJob(noise(960, 1), 8, sampler=settings, base_seed=seed) for seed in range(6)]
        others = [asyncio.ensure_future(sample(stages, each)) for each in long]
        await eventually(lambda: sessions[-3:] == [6] * 3)  # among themselves they share each pass
        before = len(sessions)
        await sample(stages, job(context=8, blocks=1, steps=50))
        beside = sessions[before:]
        assert sum(count == 1 for count in beside) >= 25, "those take less time than the others"
        assert not any(other.done() for other in others)
        await asyncio.gather(*others)
        await freed(stages)
