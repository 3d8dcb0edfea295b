"""A step that fails ends the session that made it fail, and nobody else; an engine at fault says so."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.failures import out_of_memory
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import ColaserveError, Overloaded, StepFailed, Unavailable
from tests.conftest import Golden
from tests.services.engines import faults
from tests.services.engines.conftest import Engines, engines
from tests.services.engines.faults import MARK_LATENT, MARK_TOKEN, Network, marked_ids, marked_job, marked_latents
from tests.services.engines.runs import freed, job, noise, sample
from tests.stress import stress
from tests.waiting import eventually

STAGES = ("encoder", "prior", "decoder")
HALF_TIME = 500.0  # of an even number of steps
SOONER = EngineLimits(max_context=512, look_again_seconds=0.05)


async def encode(stages: Engines, seed: int, mark: int | None) -> list[float]:
    ids = list(range(3 + seed, 40 + seed))
    (encoded,), _ = await stages.encoder.encode([ids if mark is None else marked_ids(ids)])
    return encoded.latents.flatten().tolist()


async def decode(stages: Engines, seed: int, mark: int | None) -> list[int]:
    """Three blocks, of which the second may be marked."""
    ids: list[int] = []
    async with stages.decoder.session(DecodeJob(noise(8, seed), max_latents=24)) as session:
        for number in range(3):
            block = noise(4, 100 + seed + number)
            marked = mark is not None and number == 1
            ids += (await session.decode(marked_latents(block) if marked else block)).token_ids
    return ids


async def write(stages: Engines, seed: int, mark: int | None) -> list[float]:
    wanted = job(seed, context=9, blocks=3, resamples=2, solver="heun")
    blocks = await sample(stages, wanted if mark is None else marked_job(wanted))
    return [x for block in blocks for x in block.latents.flatten().tolist()]


ASK: dict[str, Callable[[Engines, int, int | None], Any]] = {"encoder": encode, "prior": write, "decoder": decode}


def close(got: list[Any], expected: list[Any]) -> bool:
    return torch.allclose(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", [faults.raises, faults.raises_late, faults.not_finite, faults.lacks_memory])
async def test_the_session_that_fails_is_ended_and_the_others_end_undisturbed(tiny, stage, fault):
    marks: dict[float | None, faults.Fault] = {MARK_LATENT: fault, MARK_TOKEN: fault}
    with engines(tiny.directory, network=lambda network: Network(network, marks)) as stages:
        engine, ask = getattr(stages, stage), ASK[stage]
        alone = [await ask(stages, seed, None) for seed in range(6)]
        runs = [ask(stages, seed, None) for seed in range(6)]
        runs[2:2] = [ask(stages, 6, 1), ask(stages, 7, 1)]
        *ended, last = await asyncio.gather(*runs, return_exceptions=True)
        guilty, innocent = ended[2:4], [*ended[:2], *ended[4:], last]
        expected = Overloaded if fault is faults.lacks_memory else StepFailed
        assert [type(error) for error in guilty] == [expected] * 2
        for got, undisturbed in zip(innocent, alone, strict=True):
            assert not isinstance(got, BaseException)
            assert close(got, undisturbed)
        assert (engine.observer.alone, engine.observer.reported) == (0 if expected is Overloaded else 2, [])
        await freed(stages)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", [faults.raises, faults.not_finite])
async def test_an_engine_that_fails_at_its_warm_up_row_too_is_at_fault_until_it_computes_again(tiny, stage, fault):
    everything: dict[float | None, faults.Fault] = {None: fault}
    with engines(tiny.directory, SOONER, network=lambda x: Network(x, everything)) as stages:
        engine, ask = getattr(stages, stage), ASK[stage]
        ended = await asyncio.gather(*(ask(stages, seed, None) for seed in range(4)), return_exceptions=True)
        assert [type(error) for error in ended] == [Unavailable] * 4
        assert engine.observer.reported == [True]
        with pytest.raises(Unavailable, match="at fault"):  # at once
            await ask(stages, 0, None)
        await freed(stages)
        everything.clear()
        await eventually(lambda: engine.observer.reported == [True, False])
        assert len(await ask(stages, 0, None)) > 0
        await freed(stages)


async def test_a_caller_that_left_leaves_no_traceback(tiny: Golden, caplog: pytest.LogCaptureFixture) -> None:
    slow = faults.hangs(0.3)

    def late(rows: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
        slow(rows, marked)
        raise faults.Broken

    with engines(tiny.directory, network=lambda x: Network(x, {MARK_LATENT: late})) as stages:
        async with stages.prior.session(marked_job(job())):
            await eventually(lambda: stages.prior.load().running == 1)
        await freed(stages)
    assert [record for record in caplog.records if record.exc_info] == []


async def test_a_failed_step_is_in_the_log_once_with_its_traceback(tiny, caplog):
    with engines(tiny.directory, network=lambda x: Network(x, {MARK_LATENT: faults.raises})) as stages:
        with pytest.raises(StepFailed, match="Broken"):
            await write(stages, 0, 1)
        await freed(stages)
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]


@pytest.mark.parametrize("fault", [faults.raises, faults.lacks_memory])
async def test_a_session_that_cannot_start_is_ended_alone(tiny: Golden, fault: faults.Fault) -> None:
    """The prior computes the tables of a run's times when the run starts."""
    with engines(tiny.directory, network=lambda network: Network(network, {HALF_TIME: fault})) as stages:
        alone = await write(stages, 1, None)
        results = await asyncio.gather(
            write(stages, 1, None), sample(stages, job(2, steps=2)), write(stages, 1, None), return_exceptions=True
        )
        assert isinstance(results[1], Overloaded if fault is faults.lacks_memory else StepFailed)
        for got in (results[0], results[2]):
            assert isinstance(got, list)
            assert close(got, alone)
        await freed(stages)


class Far(Network):
    """A network whose latents are finite, and so large that no stage would take them."""

    def velocity(self, h: torch.Tensor) -> torch.Tensor:
        return super().velocity(h) * 1e6

    def normalise(self, mean: torch.Tensor) -> torch.Tensor:
        """Of the encoder."""
        return self.__getattr__("normalise")(mean) * 1e6


@pytest.mark.parametrize("stage", ["encoder", "prior"])
async def test_latents_that_no_stage_would_take_end_their_session_alone(tiny: Golden, stage: str) -> None:
    with engines(tiny.directory, network=lambda network: Far(network, {})) as stages:
        engine = getattr(stages, stage)
        with pytest.raises(StepFailed, match=r"the latents.*beyond -10000 to 10000"):
            await ASK[stage](stages, 0, None)
        assert (engine.observer.alone, engine.observer.reported) == (1, [])
        await freed(stages)


async def test_a_pass_without_memory_gives_up_what_is_only_kept(tiny: Golden) -> None:
    marks: dict[float | None, faults.Fault] = {MARK_LATENT: faults.lacks_memory}
    with engines(tiny.directory, network=lambda network: Network(network, marks)) as stages:
        await sample(stages, job(context=16))
        await freed(stages)
        assert stages.prior.backend.pages.known > 0
        with pytest.raises(Overloaded, match="no memory left"):
            await sample(stages, marked_job(job(1)))
        await freed(stages)
        assert stages.prior.backend.pages.known == 0


def test_memory_that_ran_out_is_distinguished_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 50)
    for error in (real.value, MemoryError(), torch.OutOfMemoryError(), OSError(12, "Cannot allocate memory")):
        assert out_of_memory(error)
    for other in (RuntimeError("shapes do not fit"), OSError(2, "no such file"), ColaserveError("x")):
        assert not out_of_memory(other)


async def test_requests_that_make_networks_fail_harm_no_others() -> None:
    outcome = await stress(seconds=3, seed=1, hang=0.3)
    assert outcome.wrong == []
    innocent = sum(count for name, count in outcome.counts.items() if "as undisturbed" in name)
    guilty = sum(count for name, count in outcome.counts.items() if "StepFailed" in name or "Overloaded" in name)
    assert min(innocent, guilty) > 0
