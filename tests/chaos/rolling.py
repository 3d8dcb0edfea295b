"""Every replica of every role is drained with SIGTERM and started again, one at a time, while requests run:
python -m tests.chaos.rolling"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import click

from colaserve_client import Retry
from tests.chaos.fleet import ROLES, SIZES, Fleet, FleetSettings, Replica
from tests.chaos.load import Job, Tally, endless, jobs, roads, undisturbed
from tests.conftest import GOLDEN


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


@click.command()
@click.option("--concurrency", default=12, show_default=True)
@click.option("--rounds", default=1, show_default=True, help="Times that every replica is restarted.")
@click.option("--distinct", default=60, show_default=True, help="Different requests.")
@click.option("--tokens", default=96, show_default=True, help="Most tokens of a request.")
@click.option("--model", default=GOLDEN / "tiny_b4", type=click.Path(path_type=Path, exists=True))
@click.option("--logs", default=None, type=click.Path(path_type=Path), help="Folder for the processes' logs.")
def main(concurrency: int, rounds: int, distinct: int, tokens: int, model: Path, logs: Path | None) -> None:
    """SIGTERM restarts of every role under load: 0 failed requests though nobody asks twice, exit codes 0."""
    asyncio.run(_main(concurrency, rounds, distinct, tokens, model, logs or Path(tempfile.mkdtemp())))


async def _main(concurrency: int, rounds: int, distinct: int, tokens: int, model: Path, logs: Path) -> None:
    sizes = {**SIZES, "gateway": 2}  # of a single gateway nobody could take over
    bad = False
    async with Fleet(FleetSettings(logs, model, sizes)) as fleet:
        for _ in range(rounds):
            started = time.monotonic()
            tally, codes = await roll_under_load(fleet, jobs(distinct, (tokens // 4, tokens // 2, tokens)), concurrency)
            print(f"restarted                {len(codes)} in {time.monotonic() - started:.0f} s, logs in {logs}")
            print(f"exit codes not 0         { {name: code for name, code in codes.items() if code} or 0 }")
            print("\n".join(tally.lines()))
            bad |= bool(tally.failed or tally.wrong or any(codes.values()))
    raise SystemExit(bad)


if __name__ == "__main__":
    main()
