"""A long time of requests, of which some are left early and some run out of time: python -m tests.chaos.soak"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from colaserve_client import AsyncClient, DeadlineExceeded
from tests.chaos.faults import kv_free
from tests.chaos.fleet import SMALL, STAGES, Fleet, FleetSettings, eventually
from tests.chaos.load import Job, jobs
from tests.chaos.watching import Watch
from tests.conftest import GOLDEN

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


@click.command()
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--concurrency", default=8, show_default=True)
@click.option("--tokens", default=48, show_default=True, help="Most tokens of a request.")
@click.option("--settle", default=120.0, show_default=True, help="Seconds until the memory's slope counts.")
@click.option("--model", default=GOLDEN / "tiny_b4", type=click.Path(path_type=Path, exists=True))
@click.option("--logs", default=None, type=click.Path(path_type=Path), help="Folder for the processes' logs.")
def main(minutes: float, concurrency: int, tokens: int, settle: float, model: Path, logs: Path | None) -> None:
    """A fifth of the requests is left early, a twentieth passes its deadline; memory, files and KV must not grow."""
    asyncio.run(_main(minutes, concurrency, tokens, settle, model, logs or Path(tempfile.mkdtemp())))


async def _main(minutes: float, concurrency: int, tokens: int, settle: float, model: Path, logs: Path) -> None:
    sizes = {**dict.fromkeys(SMALL, 1), "gateway": 0}
    async with Fleet(FleetSettings(logs, model, sizes)) as fleet:
        some = jobs(200, (tokens // 4, tokens // 2, tokens))
        ended, watch, free = await soak(fleet, some, concurrency, minutes * 60)
        held = await fleet.metric("colaserve_engine_kv_bytes", STAGES)
    print(f"requests                 {ended.total()} {dict(ended)}")
    print("\n".join(watch.lines(settle)))
    print(f"KV bytes at the end      {held}")
    raise SystemExit(not free)


if __name__ == "__main__":
    main()
