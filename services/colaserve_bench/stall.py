"""`bench stall`: the time between blocks of running sessions while a session with a long prompt joins them."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from colaserve_bench.engines import Engines, check_blocks, random_context, started
from colaserve_bench.report import Column, Report, Row
from colaserve_bench.verbs import (
    COMPUTE_OPTIONS,
    SAMPLER_OPTIONS,
    benchmark,
    compute_of,
    numbers,
    rounds,
    sampler_of,
    say,
)
from colaserve_services.errors import UsageError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.prior.sampling_run import SampleJob

_CONTEXT = 64  # latents, of a running session
_BEFORE = 3  # blocks of every running session before the other joins; the first is warm-up
_ENOUGH_BLOCKS = 40  # of a running session, which is left before

COLUMNS = (
    Column("sessions", "running sessions"),
    Column("prompt", "prompt that joins"),
    Column("before_seconds", "inter-block s before", "{:.3f}"),
    Column("during_seconds", "while it joins", "{:.3f}"),
    Column("ratio", "ratio", "{:.2f}"),
    Column("longest_ratio", "longest", "{:.2f}"),
    Column("first_block_seconds", "its first block s", "{:.2f}"),
)
NOTES = (
    "while it joins: inter-block times of the running sessions that overlap the time from its start to its first block",
    "ratio: of the medians; longest: the longest one over the median before",
)


@benchmark(
    "stall",
    *COMPUTE_OPTIONS,
    numbers("--sessions", "8", "Running sessions."),
    numbers("--prompt", "4096", "Latents of the one that joins."),
    *SAMPLER_OPTIONS,
    rounds(3),
    quick={"rounds": 1},
)
async def stall(sessions: Sequence[int], prompt: Sequence[int], rounds: int, **options: Any) -> Report:
    """How much running sessions wait while one with a long prompt joins them."""
    compute, sampler = compute_of(options), sampler_of(options)
    B = Checkpoint.open(compute.model).dit_config.block_size
    for length in (*prompt, _CONTEXT):
        check_blocks("--prompt", length, B)
    measured: list[Row] = []
    with started(compute, max(prompt) + _CONTEXT + _ENOUGH_BLOCKS * B, max(sessions) + 1) as engines:
        for number, count, length in itertools.product(range(rounds), sessions, prompt):
            row = describe(*await _joined(engines, sampler, count, length, seed=1000 * number))
            say(f"{count} sessions, prompt {length}, round {number}: {row['ratio']:.2f}")
            measured.append({"sessions": count, "prompt": length, "round": number} | row)
    return Report(COLUMNS, measured, ("sessions", "prompt"), NOTES)


async def _joined(
    engines: Engines, sampler: SamplerSettings, sessions: int, prompt: int, seed: int
) -> tuple[list[list[float]], float, float]:
    """When the blocks of running sessions came, when a long session joined, and when its first block came."""

    async def write(context: int, blocks: int, seed: int, arrivals: list[float]) -> None:
        job = SampleJob(random_context(engines, context, seed), blocks, sampler=sampler, base_seed=seed)
        async with engines.prior.session(job) as session:
            async for _ in session:
                arrivals.append(time.monotonic())

    async def until(arrived: Callable[[], bool]) -> None:
        while not arrived():
            await asyncio.sleep(0.005)
            for task in running:
                if task.done():
                    task.result()
                    raise UsageError(f"--prompt: too long; a running session wrote {_ENOUGH_BLOCKS} blocks meanwhile")

    arrivals: list[list[float]] = [[] for _ in range(sessions)]
    running = [asyncio.create_task(write(_CONTEXT, _ENOUGH_BLOCKS, seed, times)) for times in arrivals]
    try:
        await until(lambda: min(map(len, arrivals)) >= _BEFORE)
        joined, blocks = time.monotonic(), list[float]()
        await write(prompt, 1, seed + 1, blocks)
        await until(lambda: all(times[-1] >= blocks[0] for times in arrivals))  # the gaps that it was in are complete
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return arrivals, joined, blocks[0]


def describe(arrivals: list[list[float]], joined: float, ended: float) -> Row:
    """Gaps between blocks by when they were."""
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
