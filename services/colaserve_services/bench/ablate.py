"""`bench ablate`: what each exact saving is worth, by switching it off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from colaserve_services.bench.ablations import VARIANTS
from colaserve_services.bench.driver import Load, run
from colaserve_services.bench.engine import EngineSettings, describe, open_stages
from colaserve_services.bench.report import Column, Report, Row, medians
from colaserve_services.bench.stages import Stages
from colaserve_services.errors import UsageError

COLUMNS = (
    Column("variant", "switched off"),
    Column("sessions", "sessions"),
    Column("context", "context"),
    Column("engine_tokens_per_second", "engine tokens/s", "{:.1f}"),
    Column("tokens_per_second", "without tokens/s", "{:.1f}"),
    Column("worth", "engine / without", "{:.2f}"),
)
PANELS = (COLUMNS[4], COLUMNS[5])
NOTES = (
    "engine / without: the engine's tokens/s, run right before, over those with the saving off; medians over rounds",
)


async def ablate(settings: EngineSettings, names: tuple[str, ...], say: Callable[[str], None]) -> Report:
    """For each variant and load: rounds of the engine as it is, then without the saving."""
    rounds: list[Row] = []
    with open_stages(settings, ("prior",)) as stages:
        for name in names:
            rounds += await _variant(stages, settings, name, say)
    rows = medians(rounds, ("variant", "sessions", "context"))
    return Report("ablate", {**asdict(settings), "variants": names}, COLUMNS, rows, rounds, NOTES)


async def _variant(stages: Stages, settings: EngineSettings, name: str, say: Callable[[str], None]) -> list[Row]:
    rows = []
    for sessions in settings.sessions:
        for context in settings.contexts:
            for number in range(settings.rounds):
                load = Load(sessions, context, settings.blocks, settings.sampler)
                rows.append({"variant": name, "round": number} | await _pair(stages, load, name, number))
            say(f"{name}, {sessions} sessions, context {context}: {rows[-1]['worth']:.2f}")
    return rows


async def _pair(stages: Stages, load: Load, name: str, seed: int) -> Row:
    engine = describe(stages, await run(stages, load, seed))
    with VARIANTS[name](stages) as calls:
        without = describe(stages, await run(stages, load, seed))
        if not all(call.count for call in calls):
            raise UsageError(f"{name}: the engine no longer goes through what this variant replaces; nothing measured")
    ratio = engine["tokens_per_second"] / without["tokens_per_second"]
    return without | {"engine_tokens_per_second": engine["tokens_per_second"], "worth": ratio}
