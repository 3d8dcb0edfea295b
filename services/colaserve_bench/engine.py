"""`bench engine`, `bench solvers` and `bench stall`: the prior alone, driven on its device thread, in rounds over all
loads; the last one looks at the time between blocks of running sessions while one with a long prompt joins them."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import click

from colaserve_bench import verbs
from colaserve_bench.engines import AHEAD, Engines, Load, Peak, check_blocks, random_context, run, started
from colaserve_bench.report import Column, Report, Row
from colaserve_bench.verbs import benchmark, compute_of, numbers, sampler_of, say
from colaserve_services.errors import UsageError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.loading import dtype_beside
from colaserve_services.prior.sampling_run import SampleJob

SESSIONS, CONTEXT = Column("sessions", "sessions"), Column("context", "context")
TOKENS = Column("tokens_per_second", "tokens/s", "{:.1f}")
COLUMNS = (
    SESSIONS,
    CONTEXT,
    Column("blocks_per_second", "blocks/s", "{:.2f}"),
    TOKENS,
    Column("tokens_per_second_with_prefill", "with prefill", "{:.1f}"),
    Column("step_ms_p50", "step ms p50", "{:.2f}"),
    Column("step_ms_p95", "p95", "{:.2f}"),
    Column("gflops", "GFLOP/s", "{:.1f}"),
    Column("peak_gflops", "peak", "{:.1f}"),
    Column("roofline_fraction", "of peak", "{:.3f}"),
)
NOTES = (
    "GFLOP/s: 2 x rows x weights of the layers' matrices over the time of the steps; attention is not counted",
    "peak: products over the same matrices in layer order by the fastest call, measured before and after each run",
    "the first block of every session is warm-up and not in steps, blocks/s or GFLOP/s; 'with prefill' counts it all",
)
SOLVERS_COLUMNS = (
    Column("variant", "variant"),
    SESSIONS,
    CONTEXT,
    Column("evaluations", "evaluations a block"),
    Column("guided", "of them guided"),
    TOKENS,
    Column("ratio", "times the plain one", "{:.2f}"),
)
SOLVERS_NOTES = (
    "ratio: tokens/s over those of the plain sampler in the same round; medians over rounds",
    "half guidance: guidance is on in the first half of the steps, outside it the conditional rows run alone",
)
OPTIONS = (
    *verbs.COMPUTE_OPTIONS,
    numbers("--sessions", "1,4,16", "Sessions at once."),
    numbers("--context", "64", "Latents before each.", click.IntRange(min=0)),
    *verbs.SAMPLER_OPTIONS,
    click.option(
        "--blocks", type=verbs.POSITIVE, default=3, show_default=True, help="Of each session; one is warm-up."
    ),
    verbs.rounds(3),
)


@benchmark(
    "engine",
    *OPTIONS,
    click.option("--decoder", is_flag=True, help="Every block also goes through the decoder."),
    quick={"rounds": 1, "peak_seconds": 0.05},
)
async def engine(**options: Any) -> Report:
    """The prior alone: blocks and tokens a second, and the share of the speed of its matrix products alone."""
    return await measure_engine(**options)


async def measure_engine(
    sessions: Sequence[int], context: Sequence[int], blocks: int, rounds: int, decoder: bool,
    peak_seconds: float = 0.5, **options: Any,
) -> Report:  # fmt: skip
    """What `bench engine` does."""
    measured: list[Row] = []
    with _started(options, sessions, context, blocks, decoder) as engines:
        device = engines.prior.model.device
        dtype = dtype_beside(engines.dtype)  # int8's and float8's own peak is not asked for
        peak = await engines.device_calls.run(lambda: Peak(engines.checkpoint, device, dtype))
        for number, count, length in itertools.product(range(rounds), sessions, context):
            load = Load(count, length, blocks, sampler_of(options))
            branches = 2 if 2 * load.guided_evaluations > load.sampler.evaluations() else 1
            usual_rows = count * engines.prior.shape.block_size * branches  # of most steps
            measure = partial(peak.measure, usual_rows, peak_seconds)
            before, _ = await engines.device_calls.run(measure)
            row = await run(engines, load, seed=number)
            after, call = await engines.device_calls.run(measure)
            row |= {"round": number, "peak_gflops": (before + after) / 2, "peak_call": call}
            row["roofline_fraction"] = row["gflops"] / row["peak_gflops"]
            measured.append(row)
            say(
                f"{count} sessions, context {length}, round {number}: {row['tokens_per_second']:.1f} tokens/s, "
                f"{row['roofline_fraction']:.3f} of {row['peak_gflops']:.0f} GFLOP/s"
            )
    return Report(COLUMNS, measured, ("sessions", "context"), NOTES)


@benchmark("solvers", *OPTIONS, quick={"rounds": 1})
async def solvers(sessions: Sequence[int], context: Sequence[int], blocks: int, rounds: int, **options: Any) -> Report:
    """What fewer steps with a higher-order solver and a guidance interval save, and what previews, probes and given
    positions of a block cost."""
    measured: list[Row] = []
    with _started(options, sessions, context, blocks) as engines:
        for number, count, length in itertools.product(range(rounds), sessions, context):
            rows: list[Row] = []
            plain = Load(count, length, blocks, sampler_of(options))
            for name, load in _variants(plain, engines.prior.shape.block_size).items():
                rows.append(await run(engines, load, seed=100 * number + len(rows)))
                rows[-1] |= {
                    "variant": name,
                    "round": number,
                    "ratio": rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"],
                    "evaluations": load.sampler.evaluations(),
                    "guided": load.guided_evaluations,
                }
            ratios = ", ".join(f"{row['variant']} {row['ratio']:.2f}" for row in rows)
            say(f"{count} sessions, context {length}, round {number}: {ratios}")
            measured += rows
    return Report(SOLVERS_COLUMNS, measured, ("sessions", "context", "variant"), SOLVERS_NOTES)


def _started(
    options: dict[str, Any], sessions: Sequence[int], context: Sequence[int], blocks: int, decode: bool = False
) -> AbstractContextManager[Engines]:
    """Engines that can hold the largest load."""
    compute = compute_of(options)
    say(f"reading {compute.model}")
    B = Checkpoint.open(compute.model).dit_config.block_size
    longest = max(context) + B * (blocks + AHEAD)
    return started(compute, -(-longest // B) * B, max(sessions), decode)


def _variants(plain: Load, block_size: int) -> dict[str, Load]:
    """Name -> load; the plain one first."""
    sampler = plain.sampler
    half = max(1, sampler.steps // 2)
    samplers = {
        "half guidance": replace(sampler, guidance_end=0.5),
        "ab2, half the steps": replace(sampler, solver="ab2", steps=half),
        "heun, half the steps": replace(sampler, solver="heun", steps=half),
        "ab2, half the steps, half guidance": replace(sampler, solver="ab2", steps=half, guidance_end=0.5),
    }
    watched = {
        "previews every 4 steps": replace(plain, preview_every=4),
        "probes": replace(plain, with_probes=True),
        "half of each block given": replace(plain, given=block_size // 2),
    }
    return {"plain": plain, **watched, **{name: replace(plain, sampler=each) for name, each in samplers.items()}}


# What running sessions wait while another one joins

_CONTEXT = 64  # latents, of a running session
_BEFORE = 3  # blocks of every running session before the other joins; the first is warm-up
_ENOUGH_BLOCKS = 40  # of a running session, which is left before

STALL_COLUMNS = (
    Column("sessions", "running sessions"),
    Column("prompt", "prompt that joins"),
    Column("before_seconds", "inter-block s before", "{:.3f}"),
    Column("during_seconds", "while it joins", "{:.3f}"),
    Column("ratio", "ratio", "{:.2f}"),
    Column("longest_ratio", "longest", "{:.2f}"),
    Column("first_block_seconds", "its first block s", "{:.2f}"),
)
STALL_NOTES = (
    "while it joins: inter-block times of the running sessions that overlap the time from its start to its first block",
    "ratio: of the medians; longest: the longest one over the median before",
)


@benchmark(
    "stall",
    *verbs.COMPUTE_OPTIONS,
    numbers("--sessions", "8", "Running sessions."),
    numbers("--prompt", "4096", "Latents of the one that joins."),
    *verbs.SAMPLER_OPTIONS,
    verbs.rounds(3),
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
    return Report(STALL_COLUMNS, measured, ("sessions", "prompt"), STALL_NOTES)


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
