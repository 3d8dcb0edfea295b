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
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, UsageError
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.sampling import SamplingSettings
from colaserve_services.prior.sampling_run import SampleJob
from tests.conftest import Golden
from tests.services.engines.conftest import Engines, engines
from tests.services.engines.runs import freed, job, noise, patiently, sample
from tests.waiting import eventually


async def test_an_unread_run_pauses_and_continues_when_read(tiny: Golden) -> None:
    with engines(tiny.directory, EngineLimits(max_context=512, run_ahead=2)) as stages:
        async with stages.prior.session(job(blocks=6)) as session:
            await eventually(lambda: session.outbox.unread == 2)
            await asyncio.sleep(0.1)  # in which it would go on
            assert session.run.block == 2
            assert [block.index async for block in session] == list(range(6))


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


async def test_a_full_engine_refuses_at_once_and_harms_nobody(tiny: Golden) -> None:
    limits = EngineLimits(max_context=512, max_running=2, run_ahead=1)
    with engines(tiny.directory, limits) as stages:
        async with stages.prior.session(job(1)) as first, stages.prior.session(job(2)) as second:
            with pytest.raises(Overloaded, match="2 sessions run, and there is no slot") as refused:
                async with stages.prior.session(job(3)):
                    pass
            assert 0 < refused.value.retry_after <= 60
            assert len([block async for block in first]) == 2
            assert len([block async for block in second]) == 2
        await freed(stages)


async def test_a_session_for_which_there_is_no_kv_is_refused_until_there_is(tiny: Golden) -> None:
    with engines(tiny.directory) as probe:
        need = probe.prior.kv_bytes(4 + 2 * 4)
    limits = EngineLimits(max_context=512, kv_bytes=2 * need, run_ahead=1)
    with engines(tiny.directory, limits) as stages:
        async with stages.prior.session(job(1)), stages.prior.session(job(2)):
            with pytest.raises(Overloaded, match="no KV memory"):
                await sample(stages, job(3))
        wanted = [job(seed) for seed in range(6)]
        results = await asyncio.gather(*(patiently(partial(sample, stages, each)) for each in wanted))
        assert [len(blocks) for blocks in results] == [2] * 6
        await freed(stages)


async def test_contexts_are_as_long_as_fits_the_kv_budget(tiny: Golden, caplog: pytest.LogCaptureFixture) -> None:
    with engines(tiny.directory) as probe:
        B, room = probe.prior.shape.block_size, probe.prior.kv_bytes(12 * 4)
    with engines(tiny.directory, EngineLimits(max_context=512, kv_bytes=room)) as stages:
        assert stages.prior.limits.max_context == 12 * B
        assert f"--kv-bytes fits contexts of {12 * B} latents, not 512" in caplog.messages
        assert len(await sample(stages, job(blocks=11))) == 11  # behind a block of context
        with pytest.raises(InvalidRequest, match="max_context is 48"):
            async with stages.prior.session(job(blocks=12)):
                pass
    with pytest.raises(UsageError, match="--kv-bytes: got 1, one block of latents needs"):
        EngineLimits(kv_bytes=1).fitting(B, lambda positions: positions)


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


async def test_who_sends_nothing_keeps_others_waiting_only_so_long(tiny: Golden) -> None:
    wanted = DecodeJob(noise(4), max_latents=16)
    with engines(tiny.directory, EngineLimits(max_context=512, max_running=1, idle_seconds=0.3)) as stages:
        async with stages.decoder.session(wanted) as silent:
            await silent.decode(noise(4))
            await patiently(lambda: decode_one(stages, wanted))
            with pytest.raises(Unavailable, match="nothing to compute"):
                await silent.decode(noise(4))
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


class Counts(EngineObserver):
    """Rows of each pass."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        self.rows.append(rows)


async def test_a_run_that_holds_most_of_the_kv_is_paused_for_others_and_ends_undisturbed(tiny: Golden) -> None:
    long, short = job(1, context=40, blocks=60, steps=8), job(2, context=8, blocks=2)
    with engines(tiny.directory) as stages:
        alone, of_short = await sample(stages, long), await sample(stages, short)
        need = stages.prior.kv_bytes(40 + 4 * 60)
    with engines(tiny.directory, EngineLimits(max_context=512, kv_bytes=need + need // 50)) as stages:
        async with stages.prior.session(long) as session:
            blocks = aiter(session)
            got = [await anext(blocks)]
            for _ in range(2):
                other = await patiently(lambda: sample(stages, short))
                assert [(a.latents - b.latents).abs().max() < 1e-4 for a, b in zip(other, of_short, strict=True)] == [
                    True
                ] * 2
                assert not session.finished
            got += [block async for block in blocks]
        assert [block.index for block in got] == list(range(60))
        for ours, theirs in zip(got, alone, strict=True):
            torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-4)
        await freed(stages)


async def test_a_decode_stream_that_holds_most_of_the_kv_is_paused_too(tiny: Golden) -> None:
    sampling = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, seed=3)
    latents, wanted = noise(40), DecodeJob(noise(16), sampling=sampling, max_latents=256)

    async def decode(stages: Engines, interruption: Callable[[], Awaitable[None]]) -> list[int]:
        ids: list[int] = []
        async with stages.decoder.session(wanted) as session:
            for start in range(0, 40, 4):
                ids += (await session.decode(latents[start : start + 4])).token_ids
                if start in (8, 24):
                    await interruption()
        return ids

    async def nothing() -> None: ...

    with engines(tiny.directory) as stages:
        alone = await decode(stages, nothing)
        need = stages.decoder.kv_shape.nbytes(256)
    with engines(tiny.directory, EngineLimits(max_context=512, kv_bytes=need)) as stages:

        async def other() -> None:
            await patiently(lambda: decode_one(stages, DecodeJob(noise(4), max_latents=16)))

        assert await decode(stages, other) == alone
        await freed(stages)


async def test_newcomers_take_the_kv_of_a_preempted_session_only_so_often(tiny: Golden) -> None:
    with engines(tiny.directory) as probe:
        small, large = probe.prior.kv_bytes(4 + 4 * 3), probe.prior.kv_bytes(8 + 4 * 60)
    limits = EngineLimits(max_context=512, kv_bytes=large + small - 1, max_running=4)
    with engines(tiny.directory, limits) as stages:
        async with stages.prior.session(job(1, context=8, blocks=60)) as session:
            await anext(aiter(session))
            taken = 0
            async with AsyncExitStack() as held:
                newcomer = job(0, context=4, blocks=3)
                await patiently(lambda: held.enter_async_context(stages.prior.session(newcomer)))
                with suppress(Overloaded):
                    while taken <= 17:
                        async with stages.prior.session(job(taken, context=4, blocks=1)):
                            taken += 1
            assert taken == 16
            assert len([block async for block in session]) == 59
        await freed(stages)


@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_a_short_context_does_not_wait_for_long_ones(tiny: Golden, stage: str) -> None:
    """However long eight others are, it is taken in with the second pass after its arrival."""
    long, short = noise(400, 1), noise(8, 2)
    limits = EngineLimits(max_context=512, prefill_chunk=32, prefix_cache_bytes=0)

    async def ask(latents: torch.Tensor) -> None:
        if stage == "encoder":
            await stages.encoder.encode([[3] * len(latents)])
        elif stage == "prior":
            await sample(stages, SampleJob(latents, 1, sampler=SamplerSettings(steps=4), base_seed=1))
        else:
            async with stages.decoder.session(DecodeJob(latents)) as session:
                await session.decode(latents[:4])

    with engines(tiny.directory, limits, observer=Counts) as stages:
        passes = getattr(stages, stage).observer.rows
        others = [asyncio.ensure_future(ask(long)) for _ in range(8)]
        await eventually(lambda: len(passes) >= 2)
        before = len(passes)
        await ask(short)
        steps = 4 if stage == "prior" else 1
        assert len(passes) <= before + 2 + steps
        assert not any(other.done() for other in others)
        await asyncio.gather(*others)
        await freed(stages)
