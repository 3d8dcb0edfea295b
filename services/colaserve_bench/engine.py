"""`bench engine`: the prior alone, driven on its device thread, against the speed of its own matrix products."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace

from colaserve_bench.driver import AHEAD, Load, Result, run
from colaserve_bench.flops import attention_of_block, product_flops
from colaserve_bench.peak import Peak
from colaserve_bench.recorder import new_profile
from colaserve_bench.report import Column, Report, Row, medians
from colaserve_bench.stages import ComputeSettings, Stages, started
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.flow import SamplerSettings

Say = Callable[[str], None]

COLUMNS = (
    Column("sessions", "sessions"),
    Column("context", "context"),
    Column("blocks_per_second", "blocks/s", "{:.2f}"),
    Column("tokens_per_second", "tokens/s", "{:.1f}"),
    Column("tokens_per_second_with_prefill", "with prefill", "{:.1f}"),
    Column("step_ms_p50", "step ms p50", "{:.2f}"),
    Column("step_ms_p95", "p95", "{:.2f}"),
    Column("gflops", "GFLOP/s", "{:.1f}"),
    Column("peak_gflops", "peak", "{:.1f}"),
    Column("roofline_fraction", "of peak", "{:.3f}"),
    Column("outside_share", "outside", "{:.3f}"),
    Column("attention_gflops", "attn GFLOP/s", "{:.1f}"),
    Column("attention_kv_gb_per_second", "KV GB/s", "{:.2f}"),
)
PANELS = (COLUMNS[3], COLUMNS[9], COLUMNS[5])
NOTES = (
    "GFLOP/s: 2 x rows x weights of the layers' matrices over the time of the steps; attention is not counted",
    "peak: products over the same matrices in layer order by the fastest call, measured before and after each run",
    "outside: share of the steps' time outside matrix products and attention, under torch.profiler (an upper bound)",
    "the first block of every session is warm-up and not in steps, blocks/s or GFLOP/s; 'with prefill' counts it all",
)


@dataclass(frozen=True)
class EngineSettings:
    """What `bench engine` runs."""

    compute: ComputeSettings
    sessions: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (64,)  # latents
    blocks: int = 3  # of each session; the first is warm-up
    rounds: int = 3
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    decode: bool = False
    profile: bool = True
    peak_seconds: float = 0.5  # of each measurement of the peak

    @property
    def profiles(self) -> bool:
        """With the decoder on, the thread's profile would not be the prior's."""
        return self.profile and not self.decode


async def engine(settings: EngineSettings, say: Say) -> Report:
    """Rounds over all loads; in each, the peak is measured before and after the load."""
    roles = ("decoder", "prior") if settings.decode else ("prior",)
    if settings.profiles:
        with new_profile():
            pass
    say(f"reading {settings.compute.model}")
    with open_stages(settings, roles) as stages:
        device = stages.prior.model.device
        peak = await stages.errands.run(lambda: Peak(stages.checkpoint, device, stages.dtype))
        rounds = [
            await _round(stages, peak, settings, _load(settings, sessions, context), number, say)
            for number in range(settings.rounds)
            for sessions in settings.sessions
            for context in settings.contexts
        ]
    return Report("engine", asdict(settings), COLUMNS, medians(rounds, ("sessions", "context")), rounds, NOTES)


def open_stages(settings: EngineSettings, roles: tuple[str, ...]) -> AbstractContextManager[Stages]:
    """Engines with room for the largest load."""
    B = Checkpoint.open(settings.compute.model).dit_config.block_size
    longest = max(settings.contexts) + B * (settings.blocks + AHEAD)
    return started(settings.compute, max_context=-(-longest // B) * B, max_running=max(settings.sessions), roles=roles)


def _load(settings: EngineSettings, sessions: int, context: int) -> Load:
    return Load(sessions, context, settings.blocks, settings.sampler, settings.decode)


async def _round(stages: Stages, peak: Peak, settings: EngineSettings, load: Load, number: int, say: Say) -> Row:
    """One load between two measurements of the peak, then under the profiler."""
    rows = _usual_rows(stages, load)
    before = await stages.errands.run(lambda: peak.measure(rows, settings.peak_seconds))
    result = await run(stages, load, seed=number)
    after = await stages.errands.run(lambda: peak.measure(rows, settings.peak_seconds))
    row = describe(stages, result) | {"round": number, "peak_gflops": (before.gflops + after.gflops) / 2}
    row |= {"roofline_fraction": row["gflops"] / row["peak_gflops"], "peak_call": after.call}
    if settings.profiles:
        watched = replace(load, blocks=max(3, load.blocks))
        row |= _profile_row(stages, await run(stages, watched, seed=settings.rounds + number, profile=True))
    say(
        f"{load.sessions} sessions, context {load.context}, round {number}: {row['tokens_per_second']:.1f} tokens/s, "
        f"{row['roofline_fraction']:.3f} of {row['peak_gflops']:.0f} GFLOP/s"
    )
    return row


def _usual_rows(stages: Stages, load: Load) -> int:
    """Rows of most steps: each session's block in both branches."""
    branches = 2 if 2 * load.guided_evaluations > load.sampler.evaluations() else 1
    return load.sessions * stages.prior.shape.block_size * branches


def describe(stages: Stages, result: Result) -> Row:
    """The numbers of a run. Times in milliseconds where the name says so."""
    load, config = result.load, stages.prior.model.config
    flops = sum(product_flops(config, step.rows) for step in result.steady)
    busy = result.wall if stages.prior.model.device.type == "cuda" else result.step_seconds
    return {
        "sessions": load.sessions,
        "context": load.context,
        "blocks_per_second": result.blocks_per_second,
        "tokens_per_second": result.blocks_per_second * stages.block_tokens,
        "tokens_per_second_with_prefill": load.sessions * load.written * stages.block_tokens / result.seconds,
        "first_block_seconds": statistics.median(result.first_block),
        "step_ms_p50": 1e3 * statistics.median(step.seconds for step in result.steady),
        "step_ms_p95": 1e3 * (result.step_percentile(0.95) or 0.0),
        "steps": len(result.steady),
        "gflops": flops / busy / 1e9,
        "gflops_with_gaps": flops / result.wall / 1e9,
    }


def _profile_row(stages: Stages, result: Result) -> Row:
    """Shares of the time, and attention's speed, in the profiled steps: the second block of each session."""
    shares, load, config = result.shares, result.load, stages.prior.model.config
    assert shares is not None
    past, evaluations = load.context + config.block_size, load.sampler.evaluations()
    work = attention_of_block(config, past, evaluations, load.guided_evaluations, stages.dtype.itemsize)
    work = work.times(load.sessions)
    total = shares.products + shares.attention + shares.other
    return {
        "outside_share": shares.outside,
        "products_share": shares.products / total,
        "attention_share": shares.attention / total,
        "attention_gflops": work.flops / shares.attention / 1e9 if shares.attention else None,
        "attention_kv_gb_per_second": work.kv_bytes / shares.attention / 1e9 if shares.attention else None,
        "operators": shares.operators,
    }
