"""`bench prefix` and `bench fork`: what it saves that the system knows a beginning, to one text and to several; and
`bench stable`: the steps that an early stop of blocks saves, and how often their tokens were final by then."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import click
import numpy as np

from colaserve_bench.report import Column, Report, Row
from colaserve_bench.system import TARGET_OPTIONS, connected, running, systems_of, usable_ids
from colaserve_bench.verbs import POSITIVE, benchmark, numbers, rounds, say
from colaserve_client import AsyncClient, LatentBlock, Latents, ModelInfo, NoiseSeed
from colaserve_eval.commands import spread
from colaserve_eval.demo import demo_tasks

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


STABLE_COLUMNS = (
    Column("stable_steps", "stable_steps"),
    Column("stable_distance", "stable_distance"),
    Column("blocks", "blocks"),
    Column("saved", "steps saved", "{:.1%}"),
    Column("final", "blocks with their final tokens", "{:.1%}"),
)
STABLE_NOTES = (
    "first blocks of answers to the demo's questions, with the server's sampler; tokens at temperature 0",
    "each block is written once, with a preview after each step: where it would have stopped, and what it read there",
)


@dataclass(frozen=True)
class Formed:
    """A block, step by step."""

    moves: Sequence[float]  # of each step from the second on, the most that it moved an open position
    ids: Sequence[tuple[int, ...]]  # the tokens after each step

    def stop(self, steps: int, distance: float) -> int:
        """How many steps would have been made."""
        still = 0
        for made, move in enumerate(self.moves, 2):
            still = still + 1 if move < distance else 0
            if still == steps:
                return made
        return len(self.ids)


@benchmark(
    "stable",
    *TARGET_OPTIONS,
    click.option("--start", type=click.Choice(["up"]), help="A system of our own instead, on --model."),
    numbers("--stable-steps", "1,2,3", "Steps in a row."),
    numbers("--stable-distance", "0.05,0.1,0.2,0.4", "What each may move at most.", click.FLOAT),
    click.option("--questions", type=POSITIVE, default=200, show_default=True, help="Evenly spread over the demo's."),
    quick={"questions": 4},
)
async def stable(
    stable_steps: Sequence[int], stable_distance: Sequence[float], questions: int, **options: Any
) -> Report:
    """What stopping blocks early saves, and how often their tokens were final by then."""
    prompts = spread([question.prompt for task in demo_tasks() for question in task.questions], questions)
    [system] = systems_of(options)
    async with running(system) as it, connected(it, options["key"], options["timeout"]) as client:
        blocks = [block async for block in _written(client, prompts, options["seed"])]
    say(f"{len(blocks)} blocks of {len(prompts)} with all previews")
    return Report(
        STABLE_COLUMNS, table(blocks, stable_steps, stable_distance), ("stable_distance", "stable_steps"), STABLE_NOTES
    )


def table(blocks: Sequence[Formed], steps: Sequence[int], distances: Sequence[float]) -> list[Row]:
    """Shares over blocks for each setting."""
    rows: list[Row] = []
    for count, distance in product(steps, distances):
        ends = [(block, block.stop(count, distance)) for block in blocks]
        saved = float(np.mean([1 - end / len(block.ids) for block, end in ends]))
        final = float(np.mean([block.ids[end - 1] == block.ids[-1] for block, end in ends]))
        rows.append({"stable_steps": count, "stable_distance": distance, "blocks": len(blocks)})
        rows[-1] |= {"saved": saved, "final": final}
    return rows


async def _written(client: AsyncClient, prompts: Sequence[str], seed: int) -> AsyncIterator[Formed]:
    """The first block of each answer, where no preview was left out."""
    info = await client.info()
    size, steps = info.model.block_size, info.default_sampler.steps
    for sample, prompt in enumerate(prompts):
        [encoding] = await client.encode_text([prompt])
        context, known = encoding.latents[: len(encoding.latents) // size * size], len(encoding.latents) % size
        noise = NoiseSeed(seed, sample % 10_000)
        async with client.sample_latents(encoding.latents, max_blocks=1, preview_every=1, seed=noise) as stream:
            found = [block async for block in stream]
        if len(found) == steps:
            ends = np.array([block.latents.values[known:] for block in found])
            moves = np.sqrt(np.square(np.diff(ends, axis=0)).mean(axis=2)).max(axis=1)
            yield Formed(moves.tolist(), await asyncio.gather(*(_ids(client, context, block) for block in found)))


async def _ids(client: AsyncClient, context: Latents, block: LatentBlock) -> tuple[int, ...]:
    whole = Latents.concat([context, block.latents])
    decoded = await client.decode_latents(whole, temperature=0, repetition_penalty=1)
    return decoded.token_ids[len(context) * len(decoded.token_ids) // len(whole) :]
