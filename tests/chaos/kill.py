"""Replicas are killed with SIGKILL again and again, while requests run."""

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from tests.chaos.fleet import ROLES, Fleet
from tests.chaos.load import Job, Roads, Tally, endless, roads, undisturbed


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
