"""`bench solvers`: what the opt-in approximations save. What they cost in quality is for the evaluation to say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace

from colaserve_bench.driver import Load, run
from colaserve_bench.engine import EngineSettings, describe, open_stages
from colaserve_bench.report import Column, Report, Row, medians
from colaserve_bench.stages import Stages
from colaserve_services.model.flow import SamplerSettings

COLUMNS = (
    Column("variant", "variant"),
    Column("sessions", "sessions"),
    Column("context", "context"),
    Column("evaluations", "evaluations a block"),
    Column("guided", "of them guided"),
    Column("tokens_per_second", "tokens/s", "{:.1f}"),
    Column("ratio", "times the plain one", "{:.2f}"),
)
PANELS = (COLUMNS[5], COLUMNS[6])
NOTES = (
    "ratio: tokens/s over those of the plain sampler in the same round; medians over rounds",
    "half guidance: guidance is on in the first half of the steps, outside it the conditional rows run alone",
)


def variants(plain: SamplerSettings) -> dict[str, SamplerSettings]:
    """Name -> sampler; the plain one first."""
    half = max(1, plain.steps // 2)
    return {
        "plain": plain,
        "half guidance": replace(plain, guidance_end=0.5),
        "ab2, half the steps": replace(plain, solver="ab2", steps=half),
        "heun, half the steps": replace(plain, solver="heun", steps=half),
        "ab2, half the steps, half guidance": replace(plain, solver="ab2", steps=half, guidance_end=0.5),
    }


async def solvers(settings: EngineSettings, say: Callable[[str], None]) -> Report:
    """Every round runs all variants one after the other."""
    rounds: list[Row] = []
    with open_stages(settings, ("prior",)) as stages:
        for sessions, context, number in itertools.product(
            settings.sessions, settings.contexts, range(settings.rounds)
        ):
            rounds += await _round(stages, settings, sessions, context, number)
            say(
                f"{sessions} sessions, context {context}, round {number}: "
                + ", ".join(
                    f"{row['variant']} {row['ratio']:.2f}" for row in rounds[-len(variants(settings.sampler)) :]
                )
            )
    rows = medians(rounds, ("sessions", "context", "variant"))
    return Report("solvers", asdict(settings), COLUMNS, rows, rounds, NOTES)


async def _round(stages: Stages, settings: EngineSettings, sessions: int, context: int, number: int) -> list[Row]:
    rows: list[Row] = []
    for name, sampler in variants(settings.sampler).items():
        load = Load(sessions, context, settings.blocks, sampler)
        row = describe(stages, await run(stages, load, seed=100 * number + len(rows)))
        plain = rows[0]["tokens_per_second"] if rows else row["tokens_per_second"]
        row |= {"variant": name, "round": number, "ratio": row["tokens_per_second"] / plain}
        rows.append(row | {"evaluations": sampler.evaluations(), "guided": load.guided_evaluations})
    return rows
