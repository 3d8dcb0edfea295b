"""`bench serve`: systems under load, as their clients see them, and the engine alone to compare with."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import click

from colaserve_bench.engine import measure_engine
from colaserve_bench.report import Column, Report, Row, percentile
from colaserve_bench.system import (
    TARGET_OPTIONS,
    Mix,
    Record,
    Running,
    closed_loop,
    connected,
    open_loop,
    running,
    systems_of,
)
from colaserve_bench.verbs import SAMPLER_OPTIONS, benchmark, in_own_process, numbers, rounds, say
from colaserve_client import AsyncClient, Sampler
from colaserve_services.model.checkpoint import Checkpoint

ENGINE = "engine and decoder, no server"
COLUMNS = (
    Column("system", "system"),
    Column("loop", "loop"),
    Column("load", "load", "{:g}"),
    Column("watched", "watched"),
    Column("blocks_per_second", "blocks/s", "{:.2f}"),
    Column("tokens_per_second", "tokens/s", "{:.1f}"),
    Column("requests_per_second", "requests/s", "{:.2f}"),
    Column("first_block_p50", "first block s p50", "{:.3f}"),
    Column("first_block_p95", "p95", "{:.3f}"),
    Column("first_block_p99", "p99", "{:.3f}"),
    Column("inter_block_p50", "inter-block s p50", "{:.3f}"),
    Column("inter_block_p95", "p95", "{:.3f}"),
    Column("inter_block_p99", "p99", "{:.3f}"),
    Column("goodput", "good requests/s", "{:.2f}"),
    Column("good_share", "good", "{:.2f}"),
    Column("errors", "errors"),
    Column("of_engine", "of engine", "{:.3f}"),
    Column("of_first", "of first system", "{:.3f}"),
    Column("cpu_ms_per_block", "CPU ms a block", "{:.2f}"),
    Column("cpu_of_unwatched", "of unwatched", "{:.3f}"),
)
WATCHED: Mapping[str, Mapping[str, Any]] = {
    "no": {},
    "previews every 4 steps": {"preview_every": 4},
    "probes": {"with_probes": True},
}
NOTES = (
    "closed loop: `load` requests at all times; open loop: `load` Poisson arrivals a second",
    "throughput: of the answers that end inside the measured window, over the window; latencies run from when due",
    "good: without an error, and both time to first block and mean inter-block time within the objective",
    "of engine: prior blocks/s over those of `bench engine --decoder` at as many sessions in the same round",
    "of first system: blocks/s over those of the first system under the same load in the same round",
    "CPU ms a block: time of all processes of a started system in the window, over the blocks sent in it (Linux)",
    "of unwatched: CPU ms a block over that of the same load without previews and probes in the same round",
    "systems, engine and load generator run on the same cores with --start, never two systems at once",
)


@benchmark(
    "serve",
    *TARGET_OPTIONS,
    click.option("--start", type=click.Choice(["up", "split", "both"]), help="Systems of our own instead, on --model."),
    click.option("--engine/--no-engine", default=True, help="With --start: also run `bench engine --decoder`."),
    numbers("--concurrency", "1,4,16", "Closed loops."),
    numbers("--rate", None, "Open loops: requests a second.", click.FloatRange(min=0.001)),
    numbers("--prompt-tokens", "64", "Drawn for each request."),
    numbers("--new-tokens", "64,128,192", "Drawn for each request."),
    *SAMPLER_OPTIONS,
    click.option("--watched", is_flag=True, help="Each load also with previews every 4 steps, and with probes."),
    click.option("--warmup", type=float, default=5.0, show_default=True, help="Seconds that do not count."),
    click.option("--duration", type=float, default=30.0, show_default=True, help="Seconds measured, each load."),
    rounds(1),
    click.option("--slo-first", type=float, default=5.0, show_default=True, help="Objective: seconds to first block."),
    click.option(
        "--slo-next", type=float, default=1.0, show_default=True, help="Objective: mean seconds between blocks."
    ),
    quick={"rounds": 1, "warmup": 0.25, "duration": 1.0},
)
async def serve(concurrency: Sequence[int], rate: Sequence[float] | None, rounds: int, **options: Any) -> Report:
    """A running system under load, as its clients see it; or systems of our own, compared.

    Every round: the engine alone, then each system with every load, closed loops first.
    """
    systems, sampler = systems_of(options), Sampler(options["steps"], options["guidance"], options["solver"])
    ways = [("closed", float(count)) for count in concurrency] + [("open", each) for each in rate or ()]
    loads = [(*way, watched) for way in ways for watched in (WATCHED if options["watched"] else ["no"])]
    measured: list[Row] = []
    for number in range(rounds):
        rows: list[Row] = []
        if options["engine"] and options["start"]:
            rows += _engine(options, concurrency)
        for system in systems:
            async with running(system) as it, connected(it, options["key"], options["timeout"]) as client:
                for loop, load, watched in loads:
                    mix = Mix(options["prompt_tokens"], options["new_tokens"], sampler, WATCHED[watched])
                    row = await _measure(client, it, mix, loop, load, number, options)
                    rows.append({"system": system.name, "watched": watched} | row)
        rows = [with_ratios(row, rows, systems[0].name) | {"round": number} for row in rows]
        for row in rows:
            where = f"{row['system']}, {row['loop']} {row['load']:g}, watched: {row['watched']}"
            say(f"round {number}, {where}: {row['blocks_per_second']:.2f} blocks/s")
        measured += rows
    return Report(COLUMNS, measured, ("load", "system", "loop", "watched"), NOTES)


async def _measure(
    client: AsyncClient, system: Running, mix: Mix, loop: str, load: float, number: int, options: dict[str, Any]
) -> Row:
    """One load: warm-up, then the window that counts."""
    requests = mix.requests(await client.info(), f"{options['seed']}/{number}/{loop}/{load}")
    begin = time.monotonic() + options["warmup"]
    end = begin + options["duration"]
    warm = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(options["warmup"], lambda: warm.set_result(system.cpu_seconds()))
    if loop == "closed":
        records = await closed_loop(client, requests, int(load), end)
        counted = [record for record in records if record.finished and begin <= record.finished <= end]
    else:
        records = await open_loop(client, requests, load, end, number)
        counted = [record for record in records if begin <= record.due]
    cpu = system.cpu_seconds() - await warm
    sent = sum(begin <= arrived for record in records for arrived in record.blocks)
    good = sum(record.is_good(options["slo_first"], options["slo_next"]) for record in counted)
    return {
        "loop": loop,
        "load": load,
        "requests": len(counted),
        "goodput": good / options["duration"],
        "good_share": good / len(counted) if counted else None,
        "cpu_ms_per_block": 1e3 * cpu / sent if cpu and sent else None,
        **summarise(records, begin, end),
    }


def summarise(records: Sequence[Record], begin: float, end: float) -> Row:
    """Throughput of the answers that end inside the window, over the window; times of what comes after its begin."""
    seconds, errors = end - begin, Counter(record.error for record in records if record.error)
    ended = [r for r in records if r.finished and begin <= r.finished <= end and not r.error]
    row: Row = {
        "blocks_per_second": sum(len(record.blocks) for record in ended) / seconds,
        "tokens_per_second": sum(sum(record.tokens) for record in ended) / seconds,
        "requests_per_second": len(ended) / seconds,
        "errors": ", ".join(f"{code} {count}" for code, count in sorted(errors.items())) or None,
    }
    firsts = [first for r in records if (first := r.first_block) is not None and begin <= r.blocks[0]]
    gaps = [after - before for r in records for before, after in itertools.pairwise(r.blocks) if after >= begin]
    for name, values in (("first_block", firsts), ("inter_block", gaps)):
        row |= {f"{name}_p{round(100 * share)}": percentile(values, share) for share in (0.5, 0.95, 0.99)}
    return row


def with_ratios(row: Row, rows: Sequence[Row], first: str) -> Row:
    """The row, and what its numbers are of those of others under the same load."""

    def ratio(number: str, system: str, watched: str) -> float | None:
        alike = {"system": system, "loop": row["loop"], "load": row["load"], "watched": watched}
        other = next((each.get(number) for each in rows if alike.items() <= each.items()), None)
        return row[number] / other if other else None

    return row | {
        "of_engine": ratio("blocks_per_second", ENGINE, "no"),
        "of_first": ratio("blocks_per_second", first, row["watched"]),
        "cpu_of_unwatched": ratio("cpu_ms_per_block", row["system"], "no"),
    }


def _engine(options: Mapping[str, Any], concurrency: Sequence[int]) -> list[Row]:
    """`bench engine --decoder` in a process of its own, with as many sessions as the closed loops and mean lengths."""
    shape = Checkpoint.open(options["model"]).shape
    block_tokens = shape.block_size * shape.patch_size
    context = round(fmean(options["prompt_tokens"]) / block_tokens) * shape.block_size
    blocks = max(2, 1 + round(fmean(options["new_tokens"]) / block_tokens))
    load = {"sessions": concurrency, "context": [context], "blocks": blocks, "rounds": 1, "decoder": True}
    rows = in_own_process(_engine_rows, {**options, **load})
    keys = ("blocks_per_second", "tokens_per_second")
    alike = {"system": ENGINE, "loop": "closed", "watched": "no"}
    return [{**alike, "load": float(row["sessions"]), **{key: row[key] for key in keys}} for row in rows]


def _engine_rows(options: Mapping[str, Any]) -> list[Row]:
    return asyncio.run(measure_engine(**options)).rows
