"""`bench stable`: the steps that an early stop of blocks saves, and how often their tokens were final by then."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from colaserve_bench.report import Column, Report, Row
from colaserve_bench.requests import connected
from colaserve_bench.system import TARGET_OPTIONS, running, systems_of
from colaserve_bench.verbs import POSITIVE, benchmark, numbers, say
from colaserve_client import AsyncClient, LatentBlock, Latents, NoiseSeed
from colaserve_eval.commands import spread
from colaserve_eval.demo import demo_tasks

COLUMNS = (
    Column("stable_steps", "stable_steps"),
    Column("stable_distance", "stable_distance"),
    Column("blocks", "blocks"),
    Column("saved", "steps saved", "{:.1%}"),
    Column("final", "blocks with their final tokens", "{:.1%}"),
)
NOTES = (
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
    return Report(COLUMNS, table(blocks, stable_steps, stable_distance), ("stable_distance", "stable_steps"), NOTES)


def table(blocks: Sequence[Formed], steps: Sequence[int], distances: Sequence[float]) -> list[Row]:
    """Shares over blocks for each setting."""
    rows: list[Row] = []
    for count, distance in itertools.product(steps, distances):
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
