"""Sessions that score share passes with those that sample, and neither changes what the other gives."""

import asyncio
from functools import partial

import pytest
import torch
from torch import Tensor

from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import DeadlineExceeded, StepFailed
from colaserve_services.model.likelihood import log_density
from colaserve_services.prior.scoring_run import ScoredBlock, ScoreJob, ScoringSession, scoring_settings
from tests.conftest import load_golden
from tests.services.engines.conftest import Engines, engines
from tests.services.engines.faults import MARK_LATENT, Fault, Network, marked_job, not_finite, raises
from tests.services.engines.runs import freed, job, noise, patiently, sample
from tests.waiting import eventually

SETTINGS = scoring_settings(4, "heun")


def score_job(seed: int = 0, context: int = 2, start: int = 2, probes: int = 5) -> ScoreJob:
    """Two blocks after the context; the first one's leading positions and the last one's last are known."""
    latents, first = noise(4 * (context + 2), seed), 4 * context
    open_ = [(first + start, first + 7)]
    return ScoreJob(latents, max_blocks=2, open=open_, sampler=SETTINGS, base_seed=seed, probes=probes)


async def score(stages: Engines, wanted: ScoreJob, deadline: float | None = None) -> list[ScoredBlock]:
    async with stages.prior.held(ScoringSession, wanted, deadline) as session:
        return [block async for block in session]


def numbers(blocks: list[ScoredBlock]) -> Tensor:
    return torch.tensor([(block.log_density, block.standard_error) for block in blocks])


async def test_densities_are_those_of_the_network_run_without_pages() -> None:
    golden, wanted = load_golden("tiny_b4"), score_job()
    with engines(golden.directory) as stages:
        found = await score(stages, wanted)
        dit = stages.prior.model
        for block, scored in enumerate(found):
            start = 8 + 4 * block
            known = torch.tensor([block == 0, block == 0, False, block == 1])
            generator = torch.Generator().manual_seed(10_000_000 * block)
            run = log_density(wanted.latents[start : start + 4], known, SETTINGS, wanted.probes, generator)
            points = next(run)
            estimates = None
            while estimates is None:
                time = torch.cat((torch.zeros(start), torch.where(known, 0.0, points.t)))
                velocities = [whole(dit, torch.cat((wanted.latents[:start], z)), time)[start:] for z in points.latents]
                try:
                    points = run.send(torch.stack(velocities))
                except StopIteration as end:
                    estimates = end.value
            assert scored.log_density == pytest.approx(estimates.mean().item(), abs=0.02)
            assert scored.evaluations == 8 * 11


@torch.no_grad()
def whole(dit: torch.nn.Module, latents: Tensor, time: Tensor) -> Tensor:
    """Velocities of all positions, by a pass over the whole sequence with a mask."""
    block = torch.arange(len(latents)) // 4
    bias = torch.zeros(len(latents), len(latents)).masked_fill_(block[None] > block[:, None], -torch.inf)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(-2, -3) for x in (q * q.shape[-1] ** -0.5, k, v))
        return (torch.softmax(q @ k.mT + bias, dim=-1) @ v).transpose(-2, -3)

    return dit(latents, time, torch.arange(len(latents)), attend)  # type: ignore[no-any-return]


async def test_a_score_is_the_same_alone_beside_others_and_preempted() -> None:
    golden, wanted = load_golden("tiny_b4"), [score_job(seed, context) for seed, context in enumerate((0, 2, 5))]
    with engines(golden.directory) as stages:
        alone = [await score(stages, each) for each in wanted]
        written = await sample(stages, job(7, blocks=4))
        page = stages.prior.backend.page_bytes
    few = EngineLimits(max_context=64, kv_bytes=14 * page)  # the first score and the sampled run need more together
    for limits in (None, few):
        with engines(golden.directory, limits) as stages:
            works = [partial(sample, stages, job(7, blocks=4)), *(partial(score, stages, each) for each in wanted)]
            sampled, *beside = await asyncio.gather(*map(patiently, works))
            await freed(stages)
        for one, other in zip(alone, beside, strict=True):
            torch.testing.assert_close(numbers(other), numbers(one), rtol=0, atol=0.02)
        for block, same in zip(written, sampled, strict=True):
            torch.testing.assert_close(same.latents, block.latents, rtol=0, atol=1e-4)
    assert stages.prior.observer.preemptions > 0


@pytest.mark.parametrize("fault", [raises, not_finite])
async def test_a_score_that_fails_ends_alone(fault: Fault) -> None:
    golden, wanted = load_golden("tiny_b4"), score_job(1)
    with engines(golden.directory) as stages:
        alone = await score(stages, wanted)
    with engines(golden.directory, network=lambda network: Network(network, {MARK_LATENT: fault})) as stages:
        works = [score(stages, marked_job(score_job(2))), score(stages, wanted), sample(stages, job(7))]
        failed, scored, sampled = await asyncio.gather(*works, return_exceptions=True)
        assert isinstance(failed, StepFailed)
        assert isinstance(scored, list)
        assert len(sampled) == 2  # type: ignore[arg-type]
        torch.testing.assert_close(numbers(scored), numbers(alone), rtol=0, atol=0.02)
        await freed(stages)


async def test_leaving_and_a_deadline_free_what_a_score_holds() -> None:
    with engines(load_golden("tiny_b4").directory) as stages:
        long = ScoreJob(noise(8), 2, [(0, 8)], sampler=scoring_settings(1000, "heun"), base_seed=0, probes=256)
        with pytest.raises(DeadlineExceeded):
            await score(stages, long, deadline=0.0)
        task = asyncio.create_task(score(stages, long))
        await eventually(lambda: stages.prior.load().kv_bytes_used > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await freed(stages)
