"""Drives engines like clients would, without any server: a number of sessions at once, each for some blocks."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import torch

from colaserve_bench.recorder import Step
from colaserve_bench.report import percentile
from colaserve_bench.shares import TimeShares, time_shares
from colaserve_bench.stages import Stages
from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import UsageError
from colaserve_services.model.flow import SamplerSettings, schedule
from colaserve_services.prior.sampling_run import SampleJob

AHEAD = EngineLimits().run_ahead  # blocks that a session writes while others are still at their contexts


@dataclass(frozen=True)
class Load:
    """Sessions that start together, each with its own random context, and go on together once all have a block."""

    sessions: int
    context: int  # latents; whole blocks
    blocks: int  # to write, at least 2: the first one is warm-up; each session writes AHEAD more
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    decode: bool = False  # every block also goes through the decoder

    @property
    def written(self) -> int:
        """Blocks of each session."""
        return self.blocks + AHEAD

    @property
    def guided_evaluations(self) -> int:
        """Of a block's evaluations, those that need the unconditional branch; for solvers of one evaluation a step."""
        times = schedule(self.sampler.steps)[:-1]
        return round(self.sampler.evaluations() * sum(map(self.sampler.guided, times)) / len(times))


@dataclass(frozen=True)
class Result:
    """What a run of a load took."""

    load: Load
    steady: list[Step]
    first_block: list[float]  # seconds from the start, of each session
    seconds: float  # from the start to the last block
    shares: TimeShares | None = None  # of `profiled`
    profiled: int = 0  # steps

    @property
    def wall(self) -> float:
        """Seconds of the steady part: the prior's steps and what ran between them."""
        return self.steady[-1].ended - self.steady[0].began

    @property
    def blocks_per_second(self) -> float:
        """Each step brings each session on by one evaluation of a block."""
        done = sum(step.sessions for step in self.steady) / self.load.sampler.evaluations()
        return done / self.wall

    @property
    def step_seconds(self) -> float:
        return sum(step.seconds for step in self.steady)

    def step_percentile(self, share: float) -> float | None:
        """Seconds."""
        return percentile([step.seconds for step in self.steady], share)


async def run(stages: Stages, load: Load, seed: int, profile: bool = False) -> Result:
    """Run a load to its end. Contexts differ with `seed`, so that no cache knows them.

    With `profile` the second block's steps run under the profiler; `blocks` must then be 3 or more.
    """
    _check(stages, load, profile)
    recorder = stages.steps
    recorder.begin(load.sessions, load.sampler.evaluations() if profile else 0)
    started = time.monotonic()
    together = asyncio.Barrier(load.sessions)
    first = await asyncio.gather(*(_session(stages, load, seed * 1000 + i, together) for i in range(load.sessions)))
    seconds = time.monotonic() - started
    await stages.errands.run(lambda: None)  # the last step's record is in
    assert recorder.steady or profile, "every load has steady steps"
    shares = None
    if profile:
        shares = time_shares(recorder.profile, sum(step.seconds for step in recorder.profiled))
    profiled = len(recorder.profiled)
    return Result(load, recorder.steady, [at - started for at in first], seconds, shares, profiled)


def _check(stages: Stages, load: Load, profile: bool) -> None:
    B = stages.prior.shape.block_size
    if load.context % B:
        raise UsageError(f"--context: got {load.context}, expected a multiple of the block size, {B}")
    least = 3 if profile else 2
    if load.blocks < least:
        raise UsageError(f"--blocks: got {load.blocks}, expected {least} or more: the first is warm-up")


async def _session(stages: Stages, load: Load, seed: int, together: asyncio.Barrier) -> float:
    """Time of the first block. The engine pauses a session that nobody reads, so none is done before all have begun."""
    context = torch.randn(load.context, stages.prior.shape.latent_dim, generator=torch.Generator().manual_seed(seed))
    job = SampleJob(context, load.written, sampler=load.sampler, base_seed=seed)
    if load.decode:
        return await _decoded(stages, job, together)
    first = None
    async with stages.prior.session(job) as session:
        async for _ in session:
            first = first or await _begun(together)
    assert first is not None
    return first


async def _begun(together: asyncio.Barrier) -> float:
    """The time; returns when all sessions have begun."""
    now = time.monotonic()
    await together.wait()
    return now


async def _decoded(stages: Stages, job: SampleJob, together: asyncio.Barrier) -> float:
    """As `_session`, each block decoded as it comes."""
    assert stages.decoder is not None
    positions = len(job.latents) + job.max_blocks * stages.prior.shape.block_size
    first = None
    prefix = DecodeJob(job.latents, max_latents=positions)
    async with stages.prior.session(job) as prior, stages.decoder.session(prefix) as decoder:
        async for block in prior:
            await decoder.decode(block.latents)
            first = first or await _begun(together)
    assert first is not None
    return first
