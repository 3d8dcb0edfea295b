"""Runs of the prior for tests of engines, and what they leave behind."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import torch

from colaserve_services.errors import Overloaded
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.prior.sampling_run import SampledBlock, SampleJob
from tests.services.engines.conftest import Engines
from tests.waiting import PATIENCE, eventually

T = TypeVar("T")

EMPTY = torch.zeros(0, 16)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def job(seed: int = 0, context: int = 6, blocks: int = 2, **sampler: object) -> SampleJob:
    settings = SamplerSettings(**({"steps": 3, "guidance_scale": 2.0} | sampler))  # type: ignore[arg-type]
    return SampleJob(latents=noise(context, seed), max_blocks=blocks, sampler=settings, base_seed=seed)


async def sample(stages: Engines, wanted: SampleJob) -> list[SampledBlock]:
    async with stages.prior.session(wanted) as session:
        return [block async for block in session]


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What it gives once the engine takes it, which it refuses while it is full."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return await ask()
        except Overloaded:
            assert time.monotonic() < end, "the engine stayed full"
            await asyncio.sleep(0.01)


async def freed(stages: Engines) -> None:
    for engine in (stages.encoder, stages.decoder, stages.prior):

        def holds_nothing(engine: Any = engine) -> bool:
            load = engine.load()
            return (load.running, load.kv_bytes_used) == (0, 0)

        await eventually(holds_nothing)
