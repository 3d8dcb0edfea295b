"""`bench prefix`: time to first block of a prompt whose beginning the system has not, and has, seen before."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from colaserve_bench.report import Column, Report, Row
from colaserve_bench.requests import Record, connected, send, usable_ids
from colaserve_client import AsyncClient, GenerationRequest, ModelInfo
from colaserve_services.errors import Unavailable

COLUMNS = (
    Column("prefix_tokens", "prefix tokens"),
    Column("pairs", "pairs"),
    Column("cold_seconds", "cold s", "{:.3f}"),
    Column("warm_seconds", "warm s", "{:.3f}"),
    Column("ratio", "warm / cold", "{:.3f}"),
    Column("worst_ratio", "worst pair", "{:.3f}"),
)
PANELS = (COLUMNS[2], COLUMNS[3], COLUMNS[4])
NOTES = (
    "a pair: a prompt with a new random prefix (cold), then one with the same prefix and another end (warm), one block",
    "each; seconds from sending to the first block; medians, the ratio's over the pairs' own ratios",
)


@dataclass(frozen=True)
class PrefixSettings:
    """What `bench prefix` runs."""

    prefix_tokens: tuple[int, ...] = (2048,)
    tail_tokens: int = 16  # the end of the prompt, which differs within a pair
    pairs: int = 5
    timeout: float = 300.0  # seconds, of one request
    seed: int = 0


async def prefix(target: str, settings: PrefixSettings, say: Callable[[str], None], key: str | None = None) -> Report:
    """Pairs one after the other on an otherwise idle system."""
    rounds, rows = list[Row](), list[Row]()
    async with connected(target, key, settings.timeout) as client:
        info = await client.info()
        for length in settings.prefix_tokens:
            draw = random.Random(f"{settings.seed}/{length}")
            await _pair(client, info, settings, length, draw)  # warm-up: of everything but the prefixes to come
            pairs = [await _pair(client, info, settings, length, draw) for _ in range(settings.pairs)]
            rounds += [{"round": number} | pair for number, pair in enumerate(pairs)]
            rows.append(_summary(length, pairs))
            say(f"{length} tokens: warm {rows[-1]['ratio']:.3f} of cold")
    return Report("prefix", {"target": target, **asdict(settings)}, COLUMNS, rows, rounds, NOTES)


async def _pair(
    client: AsyncClient, info: ModelInfo, settings: PrefixSettings, length: int, draw: random.Random
) -> Row:
    usable = usable_ids(info)
    beginning = draw.choices(usable, k=length)
    cold = await _first_block(client, info, [*beginning, *draw.choices(usable, k=settings.tail_tokens)])
    warm = await _first_block(client, info, [*beginning, *draw.choices(usable, k=settings.tail_tokens)])
    return {"prefix_tokens": length, "cold_seconds": cold, "warm_seconds": warm, "ratio": warm / cold}


async def _first_block(client: AsyncClient, info: ModelInfo, ids: list[int]) -> float:
    record = Record(time.monotonic())
    await send(client, GenerationRequest(ids, info.model.block_size * info.model.patch_size, ignore_end=True), record)
    if record.first_block is None:
        raise Unavailable(f"a request of {len(ids)} prompt tokens failed: {record.error or 'no block came'}")
    return record.first_block


def _summary(length: int, pairs: list[Row]) -> Row:
    keys = ("cold_seconds", "warm_seconds", "ratio")
    medians = {key: statistics.median(pair[key] for pair in pairs) for key in keys}
    worst = max(pair["ratio"] for pair in pairs)
    return {"prefix_tokens": length, "pairs": len(pairs), "worst_ratio": worst} | medians
