"""A long time of requests, of which some are left early and some run out of time."""

import asyncio
import random
import time
from collections import Counter

from colaserve_client import AsyncClient, DeadlineExceeded
from tests.chaos.faults import kv_free
from tests.chaos.fleet import Fleet, eventually
from tests.chaos.load import Job
from tests.chaos.watching import Watch

CANCELLED, TIMED = 0.20, 0.05  # shares of the requests


async def ask(client: AsyncClient, job: Job, draw: random.Random) -> str:
    """One request, and what was done to it: "left" after a block, "deadline" that passed, or "whole"."""
    fate, timeout = draw.random(), 60.0
    if CANCELLED <= fate < CANCELLED + TIMED:
        timeout = draw.uniform(0.02, 0.3)
    try:
        async with client.stream(
            job.prompt, max_new_tokens=job.tokens, seed=job.seed, ignore_end=True, timeout=timeout
        ) as stream:
            async for _ in stream:
                if fate < CANCELLED:
                    return "left"
    except DeadlineExceeded:
        return "deadline"
    return "whole"


async def soak(
    fleet: Fleet, some: list[Job], concurrency: int, seconds: float, seed: int = 0
) -> tuple[Counter[str], Watch, bool]:
    """What became of the requests, what was seen meanwhile, and whether all KV is free at the end."""
    ended, until, draw = Counter[str](), time.monotonic() + seconds, random.Random(seed)
    async with AsyncClient(fleet.target) as client, Watch(fleet) as watch:

        async def caller(number: int) -> None:
            index = number
            while time.monotonic() < until:
                ended[await ask(client, some[index % len(some)], draw)] += 1
                index += concurrency

        await asyncio.gather(*(caller(number) for number in range(concurrency)))
        free = await eventually(lambda: kv_free(fleet), 60)
        await asyncio.sleep(2)  # the last look, at rest
    return ended, watch, free
