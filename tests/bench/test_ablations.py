"""A variant does the engine's work without one of its savings: the same numbers, by another way."""

import asyncio
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colaserve_services.bench import ablate
from colaserve_services.bench.ablations import VARIANTS, Calls
from colaserve_services.bench.driver import Load
from colaserve_services.bench.stages import ComputeSettings, Stages, started
from colaserve_services.errors import UsageError
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.prior.sampling_run import SampleJob

SAMPLER = SamplerSettings(steps=3, guidance_scale=3.0)


async def blocks(stages: Stages, context: int, seed: int) -> Tensor:
    latents = torch.randn(context, 16, generator=torch.Generator().manual_seed(seed))
    job = SampleJob(latents, 3, sampler=SAMPLER, base_seed=seed)
    async with stages.prior.session(job) as session:
        return torch.cat([block.latents async for block in session])


async def sampled(stages: Stages) -> Tensor:
    """Sessions of different lengths, one with a pinned position, one without a context."""
    return torch.cat(await asyncio.gather(*(blocks(stages, context, seed=context) for context in (8, 6, 0, 12))))


@pytest.mark.parametrize("name", VARIANTS)
async def test_a_variant_gives_the_engines_numbers_and_runs(stages: Stages, name: str) -> None:
    expected = await sampled(stages)
    with VARIANTS[name](stages) as calls:
        got = await sampled(stages)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5
    assert all(call.count for call in calls)


@pytest.mark.parametrize("name", ["keys concatenated and turned anew", "one dense mask over the batch", "all of these"])
async def test_a_variant_of_attention_follows_sequences_whose_caches_move(tiny_model: Path, name: str) -> None:
    compute = ComputeSettings(tiny_model, "bfloat16", threads=1)
    with started(compute, max_context=128, max_running=4) as stages:
        moved = stages.prior.kv_pool.room(56) < 56 + 2 * stages.prior.shape.block_size  # of three, two are committed
        expected = await blocks(stages, 56, seed=0)
        with VARIANTS[name](stages):
            got = await blocks(stages, 56, seed=0)
    assert moved
    assert ((got - expected).norm() / expected.norm()).item() < 5e-2


@pytest.mark.parametrize("name", VARIANTS)
async def test_the_engine_is_as_before_after_a_variant(stages: Stages, name: str) -> None:
    before = await sampled(stages)
    with VARIANTS[name](stages) as calls:
        pass
    assert not any(call.count for call in calls)
    assert torch.equal(await sampled(stages), before)
    assert not any(call.count for call in calls)


async def test_a_variant_that_the_engine_does_not_go_through_is_told(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "none", lambda stages: nullcontext([Calls()]))
    with pytest.raises(UsageError, match="nothing measured"):
        await ablate._pair(stages, Load(1, 0, 2, SAMPLER), "none", 0)
