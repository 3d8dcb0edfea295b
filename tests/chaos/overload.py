"""Ten times more requests than the system can serve: python -m tests.chaos.overload --model DIR

DIR: `colaserve bench make-checkpoint DIR --preset medium`."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from colaserve_bench.report import percentile
from colaserve_bench.requests import Mix, Record, closed_loop, connected, open_loop
from colaserve_client import AsyncClient, GenerationRequest
from tests.chaos.fleet import SMALL, STAGES, Fleet, FleetSettings
from tests.chaos.watching import Watch, quantile

ONE_EACH = dict.fromkeys(SMALL, 1)
SMALL_CACHE = "--prefix-cache-bytes=8000000"  # full before the memory's slope counts


def answered(records: Sequence[Record], begin: float, until: float) -> float:
    """Whole answers a second that came between two times."""
    done = [record for record in records if not record.error and record.finished and begin <= record.finished < until]
    return len(done) / (until - begin)


async def closed_rate(
    client: AsyncClient, requests: itertools.chain[GenerationRequest], callers: int, seconds: float
) -> float:
    """Answers a second that so many callers get, each asking again when it has its answer, once that runs."""
    begin = time.monotonic() + seconds / 4
    return answered(await closed_loop(client, requests, callers, begin + seconds), begin, begin + seconds)


def report(records: Sequence[Record], begin: float, until: float, best: float) -> list[str]:
    """The figures of the callers. What is answered after the overload counts for the times, not for the goodput."""
    seconds, goodput = until - begin, answered(records, begin + (until - begin) / 4, until)
    took = sorted(record.finished - record.due for record in records if not record.error and record.finished)
    refused = sorted(r.finished - r.due for r in records if r.error == "RESOURCE_EXHAUSTED" and r.finished)
    return [
        f"best closed loop         {best:.2f} requests/s",
        f"asked for                {len(records) / seconds:.2f} requests/s",
        f"goodput                  {goodput:.2f} requests/s, {goodput / best:.2f} of the best closed loop",
        f"accepted, s p50, p99     {percentile(took, 0.5) or 0:.2f}, {percentile(took, 0.99) or 0:.2f}",
        f"refused, s p99 at caller {percentile(refused, 0.99) or 0:.3f}",
        f"errors                   {dict(Counter(record.error for record in records if record.error))}",
    ]


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--factor", default=10.0, show_default=True, help="Times the capacity.")
@click.option("--seconds", default=60.0, show_default=True, help="Of the overload.")
@click.option("--closed", default=30.0, show_default=True, help="Seconds of each closed loop.")
@click.option("--callers", default="8,16,32", show_default=True, help="Of the closed loops.")
@click.option("--tokens", default=32, show_default=True, help="Of each answer.")
@click.option("--queue-seconds", default=30.0, show_default=True, help="As the coordinator's.")
@click.option("--settle", default=120.0, show_default=True, help="Seconds until the memory's slope counts.")
@click.option("--logs", default=None, type=click.Path(path_type=Path), help="Folder for the processes' logs.")
def main(logs: Path | None, **options: object) -> None:
    """Refusals at once, goodput kept, no request later than the queue allows, no memory growing."""
    asyncio.run(_main(logs=logs or Path(tempfile.mkdtemp()), **options))  # type: ignore[arg-type]


async def _main(
    model: Path, factor: float, seconds: float, closed: float, callers: str, tokens: int, queue_seconds: float,
    settle: float, logs: Path,
) -> None:  # fmt: skip
    patience = f"--queue-seconds={queue_seconds}"
    settings = {**dict.fromkeys(STAGES, (SMALL_CACHE,)), "coordinator": (patience, "--log-level=debug")}
    async with (
        Fleet(FleetSettings(logs, model, ONE_EACH, settings)) as fleet,
        connected(fleet.target, None, 300) as client,
    ):
        requests = Mix((16,), (tokens,)).requests(await client.info(), "overload")
        rates = [await closed_rate(client, requests, int(n), closed) for n in callers.split(",")]
        if not (best := max(rates)):
            raise click.ClickException(f"--closed: got {closed:g} s, in which no call was answered; give more")
        before = await _refusals(fleet)
        async with Watch(fleet) as watch:
            begin = time.monotonic()
            until = begin + seconds
            records = await open_loop(client, requests, factor * best, until, seed=1)
        late = quantile(await _refusals(fleet), before, 0.99)
    print("\n".join(report(records, begin, until, best)))
    print(f"refused, s p99 at server {late}")
    print("\n".join(watch.lines(settle)))


async def _refusals(fleet: Fleet) -> dict[float, float]:
    return await fleet.buckets("coordinator", "colaserve_request_seconds", 'code="RESOURCE_EXHAUSTED"')


if __name__ == "__main__":
    main()
