"""A pass that takes its time leaves the thread to others, and what it gives or fails with is the same in the end."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.watchdog import Watchdog
from colaserve_services.errors import StepFailed
from colaserve_services.model.backend import Pass, Row
from colaserve_services.model.backend.pick import Picked, plain
from tests.conftest import Golden
from tests.services.engines import faults
from tests.services.engines.conftest import Engines, engines
from tests.services.engines.faults import MARK_LATENT, Network, marked_job
from tests.services.engines.runs import freed, job, noise, sample
from tests.waiting import eventually


class Later:
    """A pass that computes when its results are taken, as late as a device that fails says so."""

    seconds = None

    def __init__(self, run: Callable[[], Pass], done: Callable[[], bool]):
        self._run, self.done = run, done

    def results(self) -> Sequence[Any]:
        return self._run().results()


class Slow:
    """Stands for a backend."""

    def __init__(self, backend: Any, under_way: Callable[[], Callable[[], bool]]):
        self._backend, self._under_way = backend, under_way
        self._running, self.most = 0, 0  # passes whose results are not taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def plan(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows

    def run(self, rows: Sequence[Row], *then: Any) -> Later:
        self._running += 1
        self.most = max(self.most, self._running)
        return Later(partial(self._taken, rows, *then), self._under_way())

    def _taken(self, rows: Sequence[Row], *then: Any) -> Pass:
        self._running -= 1
        passed: Pass = self._backend.run(self._backend.plan(rows), *then)
        return passed


def slow(prior: Callable[[], Callable[[], bool]], others: Callable[[], Callable[[], bool]]) -> Picked:
    """Backends whose passes are done when what these give says so."""
    picked = plain("")
    makers = zip((picked.prior, picked.decoder, picked.encoder), (prior, others, others), strict=True)
    return Picked("slow", "", 32, *(lambda *of, m=make, u=until: Slow(m(*of), u) for make, until in makers))


def looks(count: int = 3) -> Callable[[], bool]:
    left = iter(range(count))
    return lambda: next(left, None) is None


async def decode(stages: Engines) -> list[int]:
    async with stages.decoder.session(DecodeJob(noise(8), max_latents=16)) as session:
        return (await session.decode(noise(4, 1))).token_ids + (await session.decode(noise(4, 2))).token_ids


async def ask(stages: Engines) -> list[Any]:
    encoded, ids, *written = await asyncio.gather(
        stages.encoder.encode([range(3, 40), range(60)]), decode(stages), *(sample(stages, job(i)) for i in range(4))
    )
    return [[x.latents.tolist() for x in encoded[0]], ids, [[x.latents.tolist() for x in run] for run in written]]


async def test_passes_that_are_looked_at_give_what_they_give_at_once(tiny: Golden) -> None:
    found = []
    for picked in (plain(""), slow(looks, looks)):
        with engines(tiny.directory, picked=picked) as stages:
            found.append(await ask(stages))
            await freed(stages)
    assert found[0] == found[1]


async def test_a_second_pass_is_queued_for_sessions_that_need_no_results(tiny: Golden) -> None:
    runs = [job(i, blocks=2) for i in range(3)]
    for watched, most in ((False, 2), (True, 1)):
        some = [replace(run, with_probes=watched) for run in runs]
        with engines(tiny.directory, picked=slow(looks, looks)) as stages:
            together = await asyncio.gather(*(sample(stages, run) for run in some))
            backend: Any = stages.prior.backend
            assert backend.most == most
            alone = [await sample(stages, run) for run in runs]
            assert backend.most == 2
            await freed(stages)
        found = [[[block.latents for block in run] for run in each] for each in (together, alone)]
        torch.testing.assert_close(*found)


async def test_while_the_priors_pass_runs_the_decoder_answers(tiny: Golden) -> None:
    answered = threading.Event()
    with engines(tiny.directory, picked=slow(lambda: answered.is_set, looks)) as stages:
        writing = asyncio.create_task(sample(stages, job(blocks=1)))
        await eventually(lambda: stages.prior.load().running == 1)
        assert len(await decode(stages)) == 8
        assert not writing.done()
        answered.set()
        stages.prior.wake()
        assert len(await writing) == 1


async def test_a_caller_that_leaves_during_a_pass_gives_its_pages_back_after_it(tiny: Golden) -> None:
    begun, done = threading.Event(), threading.Event()

    def held() -> Callable[[], bool]:
        begun.set()
        return done.is_set

    with engines(tiny.directory, picked=slow(held, looks)) as stages:
        writing = asyncio.create_task(sample(stages, job()))
        await eventually(begun.is_set)
        writing.cancel()
        await decode(stages)  # the thread has looked at everything
        assert stages.prior.load().running == 1
        done.set()
        await freed(stages)


async def test_a_pass_that_fails_when_it_is_done_ends_the_session_that_made_it_fail(tiny: Golden) -> None:
    def network(network: Any) -> Network:
        return Network(network, {MARK_LATENT: faults.raises})

    with engines(tiny.directory, network=network, picked=slow(looks, looks)) as stages:
        (alone,) = await sample(stages, job(blocks=1))
        runs = (job(blocks=1), marked_job(job(1, blocks=1)), job(blocks=1))
        first, guilty, last = await asyncio.gather(*(sample(stages, run) for run in runs), return_exceptions=True)
        assert isinstance(guilty, StepFailed)
        for run in (first, last):
            torch.testing.assert_close(run[0].latents, alone.latents)
        await freed(stages)


async def test_a_lost_device_ends_the_process(tiny: Golden) -> None:
    def lost(rows: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    said: list[str] = []
    watchdog = Watchdog(end=said.append, interval=0.01)
    with engines(tiny.directory, network=lambda x: Network(x, {MARK_LATENT: lost}), watchdog=watchdog) as stages:
        writing = asyncio.create_task(sample(stages, marked_job(job())))
        await eventually(lambda: said)
        writing.cancel()
    assert said == ["the device thread is gone"]
