"""Requests for a running system, and what became of each."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from colaserve_bench.system import Running
from colaserve_client import AsyncClient, ColaserveError, ModelInfo, Retry, Sampler
from colaserve_services.errors import Unavailable

Request = dict[str, Any]  # what `client.stream` is called with


@dataclass(frozen=True)
class Mix:
    """Lengths that requests draw from, each with equal chance, in tokens."""

    prompt_tokens: Sequence[int]
    new_tokens: Sequence[int]
    sampler: Sampler = field(default_factory=Sampler)  # unset: the server's defaults
    watched: Mapping[str, Any] = field(default_factory=dict)  # previews or probes that are asked for

    def requests(self, info: ModelInfo, seed: str) -> Iterator[Request]:
        """Endless; random prompts, so that no prefix cache knows one. None of them ends before its budget."""
        draw, usable = random.Random(seed), usable_ids(info)
        while True:
            prompt = draw.choices(usable, k=draw.choice(self.prompt_tokens))
            budget = draw.choice(self.new_tokens)
            settings = {"sampler": self.sampler, "seed": draw.getrandbits(32), "ignore_end": True, **self.watched}
            yield {"prompt": prompt, "max_new_tokens": budget, **settings}


def usable_ids(info: ModelInfo) -> list[int]:
    """All but those that end or pad."""
    return [i for i in range(info.model.vocab_size) if i not in info.end_ids and i != info.pad_id]


@dataclass
class Record:
    """One request. Times are time.monotonic() seconds."""

    due: float  # when it should have been sent: waiting for the load generator counts too
    blocks: list[float] = field(default_factory=list)  # arrivals
    tokens: list[int] = field(default_factory=list)  # of each block
    finished: float | None = None
    error: str = ""  # the status code; empty while it runs and when all went well

    @property
    def first_block(self) -> float | None:
        """Seconds until the first block."""
        return self.blocks[0] - self.due if self.blocks else None

    def is_good(self, first: float, gap: float) -> bool:
        """No error, and both time to first block and mean time between blocks within these seconds."""
        if self.error or self.first_block is None:
            return False
        mean_gap = (self.blocks[-1] - self.blocks[0]) / max(1, len(self.blocks) - 1)
        return self.first_block <= first and mean_gap <= gap


@asynccontextmanager
async def connected(system: Running, key: str | None, seconds: float) -> AsyncIterator[AsyncClient]:
    """A client that retries nothing, so that every error is seen. What ends the benchmark is Unavailable."""
    try:
        async with AsyncClient(system.target, key=key, timeout=seconds, retry=Retry(attempts=1)) as client:
            yield client
    except ColaserveError as error:
        raise Unavailable(f"{system.target}: {type(error).__name__}: {error}") from error


async def send(client: AsyncClient, request: Request, record: Record) -> None:
    """Stream one request into its record; a failure becomes its `error`."""
    try:
        async with client.stream(**request) as stream:
            async for chunk in stream:
                if chunk.token_ids:
                    record.blocks.append(time.monotonic())
                    record.tokens.append(len(chunk.token_ids))
    except ColaserveError as error:
        code = getattr(error.__cause__, "code", None)
        record.error = str(code().name) if callable(code) else type(error).__name__
    record.finished = time.monotonic()


async def closed_loop(client: AsyncClient, requests: Iterator[Request], concurrency: int, until: float) -> list[Record]:
    """So many requests at all times until then; those that run at the end are left as they are and cancelled."""
    records: list[Record] = []

    async def work() -> None:
        while time.monotonic() < until:
            records.append(record := Record(time.monotonic()))
            await send(client, next(requests), record)
            if record.error:
                await asyncio.sleep(0.1)  # a refusal comes at once; a caller would not ask again at once either

    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
    except TimeoutError:
        pass
    return records


async def open_loop(
    client: AsyncClient, requests: Iterator[Request], rate: float, until: float, seed: int
) -> list[Record]:
    """Poisson arrivals, `rate` a second until then; all are awaited, however long they take."""
    draw, due, records = random.Random(seed), time.monotonic(), list[Record]()
    async with asyncio.TaskGroup() as group:
        while (due := due + draw.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            records.append(record := Record(due))
            group.create_task(send(client, next(requests), record))
    return records
