"""`bench serve`: a running system under load, as its clients see it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from colaserve_bench.report import Column, Report, Row, medians, percentile
from colaserve_bench.requests import Mix, Record, closed_loop, connected, open_loop
from colaserve_client import AsyncClient

COLUMNS = (
    Column("loop", "loop"),
    Column("load", "load", "{:g}"),
    Column("blocks_per_second", "blocks/s", "{:.2f}"),
    Column("tokens_per_second", "tokens/s", "{:.1f}"),
    Column("requests_per_second", "requests/s", "{:.2f}"),
    Column("first_block_p50", "first block s p50", "{:.3f}"),
    Column("first_block_p95", "p95", "{:.3f}"),
    Column("first_block_p99", "p99", "{:.3f}"),
    Column("inter_block_p50", "inter-block s p50", "{:.3f}"),
    Column("inter_block_p95", "p95", "{:.3f}"),
    Column("inter_block_p99", "p99", "{:.3f}"),
    Column("goodput", "good requests/s", "{:.2f}"),
    Column("good_share", "good", "{:.2f}"),
    Column("errors", "errors"),
)
PANELS = (COLUMNS[3], COLUMNS[6], COLUMNS[9], COLUMNS[11])
NOTES = (
    "closed loop: `load` requests at all times; open loop: `load` Poisson arrivals a second",
    "throughput: of the answers that end inside the measured window, over the window; latencies run from when due",
    "good: without an error, and both time to first block and mean inter-block time within the objective",
)
_PERCENTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Objective:
    """What a user finds fast enough, in seconds."""

    first_block: float = 5.0
    inter_block: float = 1.0  # mean over a request

    def met(self, record: Record) -> bool:
        """Whether a finished request kept to it."""
        if record.error or record.first_block is None:
            return False
        return record.first_block <= self.first_block and record.mean_gap <= self.inter_block


@dataclass(frozen=True)
class ServeSettings:
    """What `bench serve` runs against a target."""

    mix: Mix
    concurrency: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = ()  # requests a second; none: no open loop
    warmup: float = 5.0  # seconds that do not count
    duration: float = 30.0  # seconds measured
    rounds: int = 1
    timeout: float = 300.0  # of one request
    objective: Objective = Objective()
    seed: int = 0  # of the prompts; a system that has seen them before may know them


async def serve(target: str, settings: ServeSettings, say: Callable[[str], None], key: str | None = None) -> Report:
    """Rounds over all loads, closed loops first."""
    rounds: list[Row] = []
    loads = [("closed", float(n)) for n in settings.concurrency] + [("open", rate) for rate in settings.rates]
    async with connected(target, key, settings.timeout) as connection:
        for number, (loop, load) in itertools.product(range(settings.rounds), loads):
            row = await measure(connection, settings, loop, load, seed=number)
            rounds.append(row | {"round": number})
            say(f"{loop} {load:g}, round {number}: {row['tokens_per_second']:.1f} tokens/s, errors: {row['errors']}")
    rows = medians(rounds, ("loop", "load"))
    return Report("serve", {"target": target, **asdict(settings)}, COLUMNS, rows, rounds, NOTES)


async def measure(connection: AsyncClient, settings: ServeSettings, loop: str, load: float, seed: int) -> Row:
    """One load: warm-up, then the window that counts."""
    requests = settings.mix.requests(await connection.info(), f"{settings.seed}/{seed}/{loop}/{load}")
    begin = time.monotonic() + settings.warmup
    end = begin + settings.duration
    if loop == "closed":
        records = await closed_loop(connection, requests, int(load), end)
        counted = [record for record in records if record.finished and begin <= record.finished <= end]
    else:
        records = await open_loop(connection, requests, load, end, seed)
        counted = [record for record in records if begin <= record.due]
    return {"loop": loop, "load": load} | summarise(records, counted, begin, end, settings.objective)


def summarise(
    records: Sequence[Record], counted: Sequence[Record], begin: float, end: float, objective: Objective
) -> Row:
    """Throughput of the answers among `records` that end inside the window, over the window; shares of `counted`."""
    seconds = end - begin
    ended = [r for r in records if r.finished and begin <= r.finished <= end and not r.error]
    good = sum(objective.met(record) for record in counted)
    errors = Counter(record.error for record in records if record.error)
    row: Row = {
        "blocks_per_second": sum(len(record.blocks) for record in ended) / seconds,
        "tokens_per_second": sum(sum(record.tokens) for record in ended) / seconds,
        "requests_per_second": len(ended) / seconds,
        "goodput": good / seconds,
        "good_share": good / len(counted) if counted else None,
        "requests": len(counted),
        "errors": ", ".join(f"{code} {count}" for code, count in sorted(errors.items())) or None,
    }
    firsts = [first for r in records if (first := r.first_block) is not None and begin <= r.blocks[0]]
    gaps = [after - before for r in records for before, after in itertools.pairwise(r.blocks) if after >= begin]
    for name, values in (("first_block", firsts), ("inter_block", gaps)):
        row |= {f"{name}_p{round(100 * share)}": percentile(values, share) for share in _PERCENTILES}
    return row
