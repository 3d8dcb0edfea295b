"""What waits is seen by those who watch, also while nothing starts or ends."""

import torch

from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.prior.sampling_run import SampleJob
from tests.conftest import Golden
from tests.services.engines.conftest import engines
from tests.waiting import eventually


class Watch(EngineObserver):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def queued(self, waiting: int, running: int) -> None:
        self.seen.append((waiting, running))


async def test_sessions_that_wait_behind_a_full_engine_are_counted_while_it_computes(tiny: Golden) -> None:
    watch, limits = Watch(), EngineLimits(max_context=512, max_running=1)
    with engines(tiny.directory, limits) as stages:
        stages.prior.observer = watch
        latents = torch.zeros(0, stages.prior.shape.latent_dim)
        job = SampleJob(latents, max_blocks=30, sampler=SamplerSettings(steps=16), base_seed=0)
        async with stages.prior.session(job) as first:
            await anext(aiter(first))
            async with stages.prior.session(job), stages.prior.session(job):
                await anext(aiter(first))
                await anext(aiter(first))
                await eventually(lambda: watch.seen[-1] == (2, 1))
        await eventually(lambda: watch.seen[-1] == (0, 0))
    assert max(watch.seen) == (2, 1)
