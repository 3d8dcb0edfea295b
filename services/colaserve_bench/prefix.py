"""`bench prefix` and `bench fork`: what it saves that the system knows a beginning, to one text and to several."""

import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import product
from typing import Any

import click

from colaserve_bench.report import Column, Report, Row
from colaserve_bench.requests import connected, usable_ids
from colaserve_bench.system import TARGET_OPTIONS, running, systems_of
from colaserve_bench.verbs import benchmark, numbers, rounds, say
from colaserve_client import AsyncClient, ModelInfo

_END_TOKENS = 16  # of the prompt, which differ within a pair
COLUMNS = (
    Column("prefix_tokens", "prefix tokens"),
    Column("pairs", "pairs"),
    Column("cold_seconds", "cold s", "{:.3f}"),
    Column("warm_seconds", "warm s", "{:.3f}"),
    Column("ratio", "warm / cold", "{:.3f}"),
    Column("worst_ratio", "worst pair", "{:.3f}"),
)
NOTES = (
    "a pair: a prompt with a new random prefix (cold), then one with the same prefix and another end (warm), one block",
    "each; seconds from sending until the block is there; medians, the ratio's over the pairs' own ratios",
)
FORK_COLUMNS = (
    Column("prefix_latents", "prefix latents"),
    Column("branches", "branches"),
    Column("prefill_seconds", "one prefill s", "{:.3f}"),
    Column("together_seconds", "a block together s", "{:.3f}"),
    Column("fork_seconds", "fork s", "{:.3f}"),
    Column("ratio", "fork / (prefill + block)", "{:.3f}"),
)
FORK_NOTES = (
    "a round: a fork of a new random prefix, until its last branch has a block; again, now that the prefix is known (a",
    "block together); one text of another new prefix, less the same again (one prefill); medians, the ratio's own",
)
START = click.option("--start", type=click.Choice(["up", "split"]), help="A system of our own instead, on --model.")


@benchmark(
    "prefix",
    *TARGET_OPTIONS,
    START,
    numbers("--prefix-tokens", "2048", "Length of the beginning."),
    rounds(5, "--pairs"),
    quick={"pairs": 1},
)
async def prefix(prefix_tokens: Sequence[int], pairs: int, **options: Any) -> Report:
    """Time to first block of prompts whose beginning the system has not, and has, seen before."""
    found = await _measured(_pair, product(prefix_tokens), pairs, options)
    for row in found:
        ratios = [each["ratio"] for each in found if each["prefix_tokens"] == row["prefix_tokens"]]
        row |= {"pairs": pairs, "worst_ratio": max(ratios)}
    return Report(COLUMNS, found, ("prefix_tokens",), NOTES)


@benchmark(
    "fork",
    *TARGET_OPTIONS,
    START,
    numbers("--prefix-latents", "2048", "Length of the prefix."),
    numbers("--branches", "8", "Texts that continue it."),
    rounds(5),
    quick={"rounds": 1},
)
async def fork(prefix_latents: Sequence[int], branches: Sequence[int], rounds: int, **options: Any) -> Report:
    """Time until the last branch of a new prefix has its first block, beside one prefill and a block of all."""
    found = await _measured(_fork, product(prefix_latents, branches), rounds, options)
    return Report(FORK_COLUMNS, found, ("prefix_latents", "branches"), FORK_NOTES)


async def _measured(
    measure: Callable[..., Awaitable[Row]], cases: Iterable[tuple[int, ...]], rounds: int, options: dict[str, Any]
) -> list[Row]:
    """Each case so often on one system, which has nothing else to do; once before, to warm all up but the prefixes."""
    measured: list[Row] = []
    [system] = systems_of(options)
    async with running(system) as it, connected(it, options["key"], options["timeout"]) as client:
        info = await client.info()
        for case in cases:
            draw = random.Random(f"{options['seed']}/{case}")
            await measure(client, info, draw, *case)
            found = [await measure(client, info, draw, *case) | {"round": number} for number in range(rounds)]
            say(f"{', '.join(map(str, case))}: ratios {', '.join(format(each['ratio'], '.3f') for each in found)}")
            measured += found
    return measured


async def _pair(client: AsyncClient, info: ModelInfo, draw: random.Random, length: int) -> Row:
    """The same beginning twice, one after the other."""
    usable, seconds = usable_ids(info), list[float]()
    beginning = draw.choices(usable, k=length)
    for _ in ("cold", "warm"):
        prompt = [*beginning, *draw.choices(usable, k=_END_TOKENS)]
        seconds.append(await _seconds(client.generate(prompt, max_new_tokens=_block(info), ignore_end=True)))
    cold, warm = seconds
    return {"prefix_tokens": length, "cold_seconds": cold, "warm_seconds": warm, "ratio": warm / cold}


async def _fork(client: AsyncClient, info: ModelInfo, draw: random.Random, latents: int, branches: int) -> Row:
    usable, length = usable_ids(info), latents * info.model.patch_size
    prefix, other = draw.choices(usable, k=length), draw.choices(usable, k=length)

    async def seconds(ids: Sequence[int], count: int) -> float:
        return await _seconds(client.fork_all(ids, count, max_new_tokens=_block(info), ignore_end=True, seed=1))

    cold, together = await seconds(prefix, branches), await seconds(prefix, branches)
    prefill = await seconds(other, 1) - await seconds(other, 1)
    return {
        "prefix_latents": latents,
        "branches": branches,
        "prefill_seconds": prefill,
        "together_seconds": together,
        "fork_seconds": cold,
        "ratio": cold / (prefill + together),
    }


def _block(info: ModelInfo) -> int:
    """Tokens of a block."""
    return info.model.block_size * info.model.patch_size


async def _seconds(answer: Awaitable[object]) -> float:
    """How long it takes."""
    began = time.monotonic()
    await answer
    return time.monotonic() - began
