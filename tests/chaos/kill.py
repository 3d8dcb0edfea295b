"""Replicas are killed with SIGKILL again and again, while requests run: python -m tests.chaos.kill"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import click

from tests.chaos.fleet import ROLES, SIZES, Fleet, FleetSettings
from tests.chaos.load import Job, Roads, Tally, endless, jobs, roads, undisturbed
from tests.conftest import GOLDEN


@dataclass
class Killer:
    """Kills one random replica whose role has another serving one, each `period` seconds, and starts it again."""

    fleet: Fleet
    period: float
    seed: int = 0
    killed: Counter[str] = field(default_factory=Counter)

    async def run(self, open_roads: Roads, over: asyncio.Event) -> None:
        """Until it is over; a replica that was killed is started again before."""
        draw = random.Random(self.seed)
        while not await _within(over, self.period):
            victims = [replica for role in ROLES for replica in await self._victims(role)]
            if victims:
                victim = draw.choice(victims)
                if victim.role == "coordinator":
                    open_roads.coordinator_died = time.monotonic()
                await victim.kill()
                if victim.role == "coordinator":
                    open_roads.coordinator_died = time.monotonic()
                await victim.start()
                self.killed[victim.role] += 1

    async def _victims(self, role: str) -> list:  # type: ignore[type-arg]
        serving = await self.fleet.serving(role)
        return serving if len(serving) > 1 else []


async def kill_under_load(
    fleet: Fleet, some: list[Job], concurrency: int, period: float, requests: int = 0, kills: int = 0
) -> tuple[Tally, Killer]:
    """Ask for the jobs over and over while replicas die, until there were so many requests and kills."""
    tally, killer = Tally(expected=await undisturbed(fleet, some)), Killer(fleet, period)
    enough = asyncio.Event()
    async with roads(fleet) as open_roads:

        async def one(job: Job) -> None:
            tally.outcomes.append(await open_roads.ask(job))
            if len(tally.outcomes) >= requests and killer.killed.total() >= kills:
                enough.set()

        async with asyncio.TaskGroup() as together:
            together.create_task(killer.run(open_roads, enough))
            together.create_task(endless(one, some, concurrency, enough))
    return tally, killer


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether it is set within the seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


@click.command()
@click.option("--requests", default=300, show_default=True)
@click.option("--concurrency", default=12, show_default=True)
@click.option("--period", default=3.0, show_default=True, help="Seconds between two kills.")
@click.option("--distinct", default=60, show_default=True, help="Different requests among them.")
@click.option("--tokens", default=192, show_default=True, help="Most tokens of a request.")
@click.option("--model", default=GOLDEN / "tiny_b4", type=click.Path(path_type=Path, exists=True))
@click.option("--logs", default=None, type=click.Path(path_type=Path), help="Folder for the processes' logs.")
def main(
    requests: int, concurrency: int, period: float, distinct: int, tokens: int, model: Path, logs: Path | None
) -> None:
    """SIGKILL of random replicas under load: 0 failed requests, every answer as undisturbed."""
    asyncio.run(_main(requests, concurrency, period, distinct, tokens, model, logs or Path(tempfile.mkdtemp())))


async def _main(
    requests: int, concurrency: int, period: float, distinct: int, tokens: int, model: Path, logs: Path
) -> None:
    some = jobs(distinct, (tokens // 4, tokens // 2, tokens))
    async with Fleet(FleetSettings(logs, model, SIZES)) as fleet:
        started = time.monotonic()
        tally, killer = await kill_under_load(fleet, some, concurrency, period, requests)
        seconds = time.monotonic() - started
        resumed = await fleet.metric("colaserve_failovers_total", ("coordinator",), 'outcome="resumed"')
    print(f"killed                   {killer.killed.total()} {dict(killer.killed)} in {seconds:.0f} s, logs in {logs}")
    print("\n".join(tally.lines()))
    print(f"failovers of those left  {sum(resumed.values()):.0f}")
    raise SystemExit(bool(tally.failed or tally.wrong))


if __name__ == "__main__":
    main()
