"""`bench engine` and `bench solvers`: the prior alone, driven on its device thread, in rounds over all loads."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import click

from colaserve_bench.engines import AHEAD, Engines, Load, run, started
from colaserve_bench.peak import Peak
from colaserve_bench.report import Column, Report, Row
from colaserve_bench.verbs import (
    COMPUTE_OPTIONS,
    POSITIVE,
    SAMPLER_OPTIONS,
    benchmark,
    compute_of,
    numbers,
    rounds,
    sampler_of,
    say,
)
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import dtype_beside

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
    *COMPUTE_OPTIONS,
    numbers("--sessions", "1,4,16", "Sessions at once."),
    numbers("--context", "64", "Latents before each.", click.IntRange(min=0)),
    *SAMPLER_OPTIONS,
    click.option("--blocks", type=POSITIVE, default=3, show_default=True, help="Of each session; one is warm-up."),
    rounds(3),
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
            measure = partial(peak.measure, _usual_rows(engines, load), peak_seconds)
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


def _usual_rows(engines: Engines, load: Load) -> int:
    """Rows of most steps: each session's block in both branches."""
    branches = 2 if 2 * load.guided_evaluations > load.sampler.evaluations() else 1
    return load.sessions * engines.prior.shape.block_size * branches


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
