"""`bench serve --start`: systems of our own take turns, and are compared to the engine alone."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from colaserve_bench.report import Column, Report, Row, medians
from colaserve_bench.requests import connected
from colaserve_bench.serve import COLUMNS, NOTES, ServeSettings, measure
from colaserve_bench.stages import ComputeSettings
from colaserve_bench.system import SystemSettings, running
from colaserve_services.errors import UsageError
from colaserve_services.model.checkpoint import Checkpoint

_ENGINE = "engine and decoder, no server"


@dataclass(frozen=True)
class CompareSettings:
    """Which systems take turns."""

    serve: ServeSettings
    systems: tuple[SystemSettings, ...]  # the first one is what the others are compared to
    with_engine: bool = True  # also run `bench engine --decoder` with the mean lengths


async def compare(settings: CompareSettings, say: Callable[[str], None]) -> Report:
    """Every round: the engine alone, then each system with every load. Ratios are of the same round."""
    rounds: list[Row] = []
    for number in range(settings.serve.rounds):
        rows: list[Row] = []
        if settings.with_engine:
            rows += await _engine(settings)
        for system in settings.systems:
            rows += await _system(settings.serve, system, number)
        rounds += [_with_ratios(row, rows, settings.systems[0].name) | {"round": number} for row in rows]
        for row in rounds[-len(rows) :]:
            say(f"round {number}, {row['system']}, load {row['load']:g}: {row['blocks_per_second']:.2f} blocks/s")
    columns = (Column("system", "system"), *COLUMNS, *_RATIOS)
    rows = [row | {"series": f"{row['system']}, {row['loop']}"} for row in medians(rounds, ("system", "loop", "load"))]
    return Report("serve", asdict(settings), columns, rows, rounds, (*NOTES, *_NOTES))


_RATIOS = (Column("of_engine", "of engine", "{:.3f}"), Column("of_first", "of first system", "{:.3f}"))
_NOTES = (
    "of engine: prior blocks/s over those of `bench engine --decoder` at as many sessions in the same round",
    "of first system: blocks/s over those of the first system under the same load in the same round",
    "systems, engine and load generator ran on the same cores, never two systems at once",
)


async def _system(serve: ServeSettings, system: SystemSettings, number: int) -> list[Row]:
    loads = [("closed", float(n)) for n in serve.concurrency] + [("open", rate) for rate in serve.rates]
    async with running(system) as target, connected(target, None, serve.timeout) as connection:
        return [{"system": system.name} | await measure(connection, serve, *load, seed=number) for load in loads]


def _with_ratios(row: Row, rows: list[Row], first: str) -> Row:
    def blocks(system: str) -> float | None:
        same = (r["blocks_per_second"] for r in rows if r["system"] == system and (r["loop"], r["load"]) == load)
        return next(same, None)

    load = (row["loop"], row["load"])
    others = {"of_engine": blocks(_ENGINE), "of_first": blocks(first)}
    own = row["blocks_per_second"]
    return row | {name: own / other if other else None for name, other in others.items()}


async def _engine(settings: CompareSettings) -> list[Row]:
    """`bench engine --decoder` in a process of its own, with as many sessions as the closed loops."""
    compute, serve = settings.systems[0].compute, settings.serve
    shape = await asyncio.to_thread(_block_shape, compute)
    context = round(_mean(serve.mix.prompt_tokens) / shape[1]) * shape[0]
    blocks = max(2, 1 + round(_mean(serve.mix.new_tokens) / shape[1]))
    with tempfile.TemporaryDirectory(prefix="colaserve-bench-") as folder:
        file = Path(folder) / "engine.json"
        arguments = _engine_arguments(compute, serve, context, blocks)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "colaserve_bench", "engine", *arguments, f"--json={file}",
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            code = await process.wait()
        except BaseException:
            process.kill()
            raise
        if code:
            raise UsageError(f"bench engine ended with exit code {code}; its message is above")
        found = json.loads(file.read_text(encoding="utf-8"))["rows"]
    keys = ("blocks_per_second", "tokens_per_second")
    return [
        {"system": _ENGINE, "loop": "closed", "load": float(row["sessions"])} | {key: row[key] for key in keys}
        for row in found
    ]


def _engine_arguments(compute: ComputeSettings, serve: ServeSettings, context: int, blocks: int) -> list[str]:
    sampler = serve.mix.sampler
    given = {
        "model": compute.model, "dtype": compute.dtype, "device": compute.device, "threads": compute.threads,
        "sessions": ",".join(map(str, serve.concurrency)), "context": context, "blocks": blocks, "rounds": 1,
        "steps": sampler.steps, "guidance": sampler.guidance_scale, "solver": sampler.solver,
    }  # fmt: skip
    return ["--decoder", *(f"--{name}={value}" for name, value in given.items() if value is not None)]


def _block_shape(compute: ComputeSettings) -> tuple[int, int]:
    """Latents and tokens of a block."""
    shape = Checkpoint.open(compute.model).shape
    return shape.block_size, shape.block_size * shape.patch_size


def _mean(values: tuple[int, ...]) -> float:
    return sum(values) / len(values)
