"""Ten times more requests than the system can serve."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

from colaserve_bench.report import percentile
from colaserve_bench.requests import Record, Request, closed_loop
from colaserve_client import AsyncClient
from tests.chaos.fleet import STAGES, Fleet

SMALL_CACHE = "--kv-bytes=64000000"  # its prefix cache is full before the memory's slope counts


def answered(records: Sequence[Record], begin: float, until: float) -> float:
    """Whole answers a second that came between two times."""
    done = [record for record in records if not record.error and record.finished and begin <= record.finished < until]
    return len(done) / (until - begin)


async def closed_rate(client: AsyncClient, requests: Iterator[Request], callers: int, seconds: float) -> float:
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


def arguments(queue_seconds: float) -> dict[str, tuple[str, ...]]:
    """Of the processes."""
    return {**dict.fromkeys(STAGES, (SMALL_CACHE,)), "coordinator": (f"--queue-seconds={queue_seconds}",)}


async def refusals(fleet: Fleet) -> dict[float, float]:
    """How long refusals took: cumulative counts by upper bound."""
    return await fleet.buckets("coordinator", "colaserve_request_seconds", 'code="RESOURCE_EXHAUSTED"')
