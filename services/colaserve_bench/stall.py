"""`bench stall`: how much the running sessions wait while a session with a long prompt joins them."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from colaserve_bench.report import Column, Report, Row, medians
from colaserve_bench.stages import ComputeSettings, Stages, started
from colaserve_services.errors import UsageError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.prior.sampling_run import SampleJob

_ENOUGH_BLOCKS = 40  # of a running session: it is left before

COLUMNS = (
    Column("sessions", "running sessions"),
    Column("prompt", "prompt that joins"),
    Column("before_seconds", "inter-block s before", "{:.3f}"),
    Column("during_seconds", "while it joins", "{:.3f}"),
    Column("ratio", "ratio", "{:.2f}"),
    Column("longest_ratio", "longest", "{:.2f}"),
    Column("first_block_seconds", "its first block s", "{:.2f}"),
)
PANELS = (COLUMNS[4], COLUMNS[6])
NOTES = (
    "while it joins: inter-block times of the running sessions that overlap the time from its start to its first block",
    "ratio: of the medians; longest: the longest one over the median before",
)


@dataclass(frozen=True)
class StallSettings:
    """What `bench stall` runs."""

    compute: ComputeSettings
    sessions: tuple[int, ...] = (8,)
    prompts: tuple[int, ...] = (4096,)  # latents of the session that joins
    context: int = 64  # of the running ones
    before: int = 3  # blocks of every running session before it joins; the first is warm-up
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    rounds: int = 3


async def stall(settings: StallSettings, say: Callable[[str], None]) -> Report:
    """Rounds over all loads."""
    B = Checkpoint.open(settings.compute.model).dit_config.block_size
    for length in (*settings.prompts, settings.context):
        if length % B:
            raise UsageError(f"--prompt, --context: got {length}, expected a multiple of the block size, {B}")
    room = max(settings.prompts) + settings.context + _ENOUGH_BLOCKS * B
    rounds: list[Row] = []
    with started(settings.compute, max_context=room, max_running=max(settings.sessions) + 1) as stages:
        for number, sessions, prompt in itertools.product(range(settings.rounds), settings.sessions, settings.prompts):
            row = await _round(stages, settings, sessions, prompt, seed=number)
            say(f"{sessions} sessions, prompt {prompt}, round {number}: {row['ratio']:.2f}")
            rounds.append(row | {"round": number})
    return Report("stall", asdict(settings), COLUMNS, medians(rounds, ("sessions", "prompt")), rounds, NOTES)


async def _round(stages: Stages, settings: StallSettings, sessions: int, prompt: int, seed: int) -> Row:
    """Running sessions get going, the long one joins and writes a block, all are left."""
    arrivals: list[list[float]] = [[] for _ in range(sessions)]
    job = _job(stages, settings, settings.context, _ENOUGH_BLOCKS, 1000 * seed)
    running = [asyncio.create_task(_run(stages, job, times)) for times in arrivals]
    try:
        while min(map(len, arrivals)) < settings.before:
            await asyncio.sleep(0.005)
            _check_running(running)
        joined, its_blocks = time.monotonic(), list[float]()
        await _run(stages, _job(stages, settings, prompt, 1, 1000 * seed + 1), its_blocks)
        while any(times[-1] < its_blocks[0] for times in arrivals):  # the gaps that it was in are complete
            await asyncio.sleep(0.005)
            _check_running(running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return {"sessions": sessions, "prompt": prompt} | _describe(arrivals, joined, its_blocks[0])


def _describe(arrivals: list[list[float]], joined: float, ended: float) -> Row:
    gaps = [pair for times in arrivals for pair in itertools.pairwise(times)]
    before = statistics.median(after - start for start, after in gaps if after <= joined)
    during = [after - start for start, after in gaps if after > joined and start < ended]
    middle = statistics.median(during)
    return {
        "before_seconds": before,
        "during_seconds": middle,
        "ratio": middle / before,
        "longest_ratio": max(during) / before,
        "first_block_seconds": ended - joined,
    }


def _job(stages: Stages, settings: StallSettings, context: int, blocks: int, seed: int) -> SampleJob:
    latents = torch.randn(context, stages.prior.shape.latent_dim, generator=torch.Generator().manual_seed(seed))
    return SampleJob(latents, blocks, sampler=settings.sampler, base_seed=seed)


async def _run(stages: Stages, job: SampleJob, arrivals: list[float]) -> None:
    async with stages.prior.session(job) as session:
        async for _ in session:
            arrivals.append(time.monotonic())


def _check_running(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
            raise UsageError(f"--prompt: too long; a running session wrote its {_ENOUGH_BLOCKS} blocks meanwhile")
