"""Every replica of every role is drained with SIGTERM and started again, one at a time, while requests run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from colaserve_client import Retry
from tests.chaos.fleet import ROLES, Fleet, Replica
from tests.chaos.load import Job, Tally, endless, roads, undisturbed


@asynccontextmanager
async def asking(fleet: Fleet, some: list[Job], concurrency: int, tally: Tally) -> AsyncIterator[None]:
    """Ask for the jobs again and again meanwhile; callers ask nothing twice, the client library does before the first
    block as it does for everybody."""
    over = asyncio.Event()
    async with roads(fleet, retry=Retry()) as open_roads:

        async def one(job: Job) -> None:
            tally.outcomes.append(await open_roads.ask(job))

        balancing = asyncio.create_task(open_roads.balance())
        work = asyncio.create_task(endless(one, some, concurrency, over))
        try:
            yield
        finally:
            over.set()
            await work
            balancing.cancel()
            with suppress(asyncio.CancelledError):
                await balancing


async def roll_under_load(
    fleet: Fleet, some: list[Job], concurrency: int, roles: tuple[str, ...] = ROLES
) -> tuple[Tally, dict[str, int]]:
    """Restart each replica of these roles in turn while requests run. Also the exit codes, by name."""
    tally, codes = Tally(expected=await undisturbed(fleet, some)), dict[str, int]()
    async with asking(fleet, some, concurrency, tally):
        for replica in (replica for role in roles for replica in fleet.replicas[role]):
            codes[replica.name] = await restart(replica)
    return tally, codes


async def restart(replica: Replica, abruptly: bool = False) -> int:
    """Drain it, or kill it abruptly, start it again and wait until it serves; the exit code of one that was drained."""
    code = 0
    if abruptly:
        await replica.kill()
    else:
        code = await replica.terminate()
    await replica.start()
    await replica.until_serving()
    return code
