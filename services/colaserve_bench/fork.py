"""`bench fork`: time until each branch of a prefix that the system has not seen before has its first block."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import click

from colaserve_bench.report import Column, Report, Row
from colaserve_bench.requests import connected, usable_ids
from colaserve_bench.system import TARGET_OPTIONS, running, systems_of
from colaserve_bench.verbs import benchmark, numbers, rounds, say
from colaserve_client import AsyncClient, ModelInfo

COLUMNS = (
    Column("prefix_latents", "prefix latents"),
    Column("branches", "branches"),
    Column("prefill_seconds", "one prefill s", "{:.3f}", drawn=True),
    Column("together_seconds", "a block together s", "{:.3f}", drawn=True),
    Column("fork_seconds", "fork s", "{:.3f}", drawn=True),
    Column("ratio", "fork / (prefill + block)", "{:.3f}", drawn=True),
)
NOTES = (
    "a round: a fork of a new random prefix, until its last branch has a block; again, now that the prefix is known (a",
    "block together); one text of another new prefix, less the same again (one prefill); medians, the ratio's own",
)


@benchmark(
    "fork",
    *TARGET_OPTIONS,
    click.option("--start", type=click.Choice(["up", "split"]), help="A system of our own instead, on --model."),
    numbers("--prefix-latents", "2048", "Length of the prefix."),
    numbers("--branches", "8", "Texts that continue it."),
    rounds(5, "--rounds"),
    quick={"rounds": 1},
)
async def fork(prefix_latents: Sequence[int], branches: Sequence[int], rounds: int, **options: Any) -> Report:
    """Time until the last branch of a new prefix has its first block, beside one prefill and a block of all."""
    measured: list[Row] = []
    [system] = systems_of(options)
    async with running(system) as target, connected(target, options["key"], options["timeout"]) as client:
        info = await client.info()
        for latents in prefix_latents:
            for count in branches:
                draw = random.Random(f"{options['seed']}/{latents}/{count}")
                await _round(client, info, latents, count, draw)  # warm-up
                found = [await _round(client, info, latents, count, draw) | {"round": n} for n in range(rounds)]
                measured += found
                say(f"{latents} latents, {count} branches: {', '.join(format(one['ratio'], '.3f') for one in found)}")
    return Report(COLUMNS, measured, ("prefix_latents", "branches"), NOTES)


async def _round(client: AsyncClient, info: ModelInfo, latents: int, branches: int, draw: random.Random) -> Row:
    usable, length = usable_ids(info), latents * info.model.patch_size
    prefix, other = draw.choices(usable, k=length), draw.choices(usable, k=length)
    cold, together = [await _seconds(client, info, prefix, branches) for _ in range(2)]
    first, again = [await _seconds(client, info, other, 1) for _ in range(2)]
    return {
        "prefix_latents": latents,
        "branches": branches,
        "prefill_seconds": first - again,
        "together_seconds": together,
        "fork_seconds": cold,
        "ratio": cold / (first - again + together),
    }


async def _seconds(client: AsyncClient, info: ModelInfo, prefix: Sequence[int], branches: int) -> float:
    """Until the last branch has its first block."""
    block, began = info.model.block_size * info.model.patch_size, time.monotonic()
    await client.fork_all(prefix, branches, max_new_tokens=block, ignore_end=True, seed=1)
    return time.monotonic() - began
