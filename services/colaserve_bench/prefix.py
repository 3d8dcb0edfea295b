"""`bench prefix`: time to first block of a prompt whose beginning the system has not, and has, seen before."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import click

from colaserve_bench.report import Column, Report, Row
from colaserve_bench.requests import Record, connected, send, usable_ids
from colaserve_bench.system import TARGET_OPTIONS, running, systems_of
from colaserve_bench.verbs import benchmark, numbers, rounds, say
from colaserve_client import AsyncClient, ModelInfo
from colaserve_services.errors import Unavailable

_END_TOKENS = 16  # of the prompt, which differ within a pair
COLUMNS = (
    Column("prefix_tokens", "prefix tokens"),
    Column("pairs", "pairs"),
    Column("cold_seconds", "cold s", "{:.3f}", drawn=True),
    Column("warm_seconds", "warm s", "{:.3f}", drawn=True),
    Column("ratio", "warm / cold", "{:.3f}", drawn=True),
    Column("worst_ratio", "worst pair", "{:.3f}"),
)
NOTES = (
    "a pair: a prompt with a new random prefix (cold), then one with the same prefix and another end (warm), one block",
    "each; seconds from sending to the first block; medians, the ratio's over the pairs' own ratios",
)


@benchmark(
    "prefix",
    *TARGET_OPTIONS,
    click.option("--start", type=click.Choice(["up", "split"]), help="A system of our own instead, on --model."),
    numbers("--prefix-tokens", "2048", "Length of the beginning."),
    rounds(5, "--pairs"),
    quick={"pairs": 1},
)
async def prefix(prefix_tokens: Sequence[int], pairs: int, **options: Any) -> Report:
    """Time to first block of prompts whose beginning the system has not, and has, seen before."""
    measured: list[Row] = []
    [system] = systems_of(options)
    async with running(system) as target, connected(target, options["key"], options["timeout"]) as client:
        info = await client.info()
        for length in prefix_tokens:
            draw = random.Random(f"{options['seed']}/{length}")
            await _pair(client, info, length, draw)  # warm-up: of everything but the prefixes to come
            found = [await _pair(client, info, length, draw) | {"round": number} for number in range(pairs)]
            worst = {"pairs": pairs, "worst_ratio": max(pair["ratio"] for pair in found)}
            measured += [pair | worst for pair in found]
            say(f"{length} tokens: warm {', '.join(format(pair['ratio'], '.3f') for pair in found)} of cold")
    return Report(COLUMNS, measured, ("prefix_tokens",), NOTES)


async def _pair(client: AsyncClient, info: ModelInfo, length: int, draw: random.Random) -> Row:
    """The same beginning twice, one after the other, on an otherwise idle system."""
    usable, seconds = usable_ids(info), list[float]()
    beginning = draw.choices(usable, k=length)
    for _ in ("cold", "warm"):
        prompt, record = [*beginning, *draw.choices(usable, k=_END_TOKENS)], Record(time.monotonic())
        block = info.model.block_size * info.model.patch_size
        await send(client, {"prompt": prompt, "max_new_tokens": block, "ignore_end": True}, record)
        if record.first_block is None:
            problem = record.error or "no block came"
            raise Unavailable(f"a request of {len(prompt)} prompt tokens failed: {problem}")
        seconds.append(record.first_block)
    cold, warm = seconds
    return {"prefix_tokens": length, "cold_seconds": cold, "warm_seconds": warm, "ratio": warm / cold}
