"""Leading blocks seen before are copied, not computed, and change nothing."""

import asyncio
import random

import pytest
import torch

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.model.backend.pages import Pages, chain_keys
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.prior.sampling_run import SampleJob
from tests.conftest import Golden
from tests.services.engines.conftest import Engines, engines
from tests.waiting import eventually

IDS = [int(x) for x in torch.randint(3, 500, (70,), generator=torch.Generator().manual_seed(1))]
LATENTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))


class Watch:
    """Counts the rows an engine computes."""

    def __init__(self, engine: object):
        self.rows = self.held = 0
        self.hits: list[tuple[int, int]] = []
        engine.observer.stepped = lambda seconds, rows, sessions: self.count(rows)  # type: ignore[attr-defined]
        engine.observer.prefix_cache = self.looked  # type: ignore[attr-defined]

    def looked(self, hits: int, misses: int, held: int) -> None:
        self.held = held
        if hits or misses:
            self.hits.append((hits, misses))

    def count(self, rows: int) -> None:
        self.rows += rows

    def take(self) -> int:
        rows, self.rows = self.rows, 0
        return rows


async def sample(stages: Engines, latents: torch.Tensor) -> torch.Tensor:
    job = SampleJob(latents, max_blocks=2, sampler=SamplerSettings(steps=2, guidance_scale=3.0), base_seed=1)
    async with stages.prior.session(job) as session:
        return torch.cat([block.latents async for block in session])


async def decode(stages: Engines, prefix: torch.Tensor) -> torch.Tensor:
    async with stages.decoder.session(DecodeJob(prefix, with_logits=True)) as session:
        logits = (await session.decode(LATENTS[:4])).logits
    assert logits is not None
    return logits


async def encode(stages: Engines, ids: list[int]) -> torch.Tensor:
    (result,), _ = await stages.encoder.encode([ids])
    return result.latents


async def settled(stages: Engines) -> None:
    """The observer hears of it after the result is out, and before the session is let go."""
    engines_ = (stages.encoder, stages.decoder, stages.prior)
    await eventually(lambda: all(engine.load().running == 0 for engine in engines_))


async def test_prior_computes_a_known_context_once(tiny: Golden) -> None:
    with engines(tiny.directory) as stages:
        watch = Watch(stages.prior)
        cold = await sample(stages, LATENTS)
        await settled(stages)
        cost = watch.take()
        warm = await sample(stages, LATENTS)
        await settled(stages)
        torch.testing.assert_close(cold, warm, rtol=1e-4, atol=1e-4)
        assert watch.take() == cost - 64
        assert watch.held == 16 * stages.prior.backend.page_bytes
        await sample(stages, torch.cat((LATENTS[:32], -LATENTS[32:])))
        assert watch.hits == [(0, 16), (16, 0), (8, 8)]


async def test_decoder_computes_a_known_prefix_once(tiny: Golden) -> None:
    with engines(tiny.directory) as stages:
        watch = Watch(stages.decoder)
        cold = await decode(stages, LATENTS)
        await settled(stages)
        assert watch.take() == 68
        warm = await decode(stages, LATENTS)
        await settled(stages)
        assert watch.take() == 4
        torch.testing.assert_close(cold, warm, rtol=1e-4, atol=1e-5)


async def test_encoder_gives_the_same_bytes_for_a_known_beginning(tiny: Golden) -> None:
    with engines(tiny.directory) as stages:
        watch = Watch(stages.encoder)
        first = await encode(stages, IDS[:40])
        await settled(stages)
        assert watch.take() == 40
        longer = await encode(stages, IDS)
        await settled(stages)
        assert watch.take() == 32  # 72 rows with padding, 40 known
        assert torch.equal(longer[:40], first)
        assert torch.equal(await encode(stages, IDS), longer)
        await settled(stages)
        assert watch.take() == 0
    with engines(tiny.directory, EngineLimits(max_context=512, share_prefixes=False)) as stages:
        torch.testing.assert_close(await encode(stages, IDS), longer, rtol=1e-4, atol=1e-5)


class Peak(EngineObserver):
    """Rows computed, and the most KV that was held at once."""

    def __init__(self) -> None:
        self.rows = self.kv_bytes = 0

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        self.rows += rows

    def load(self, running: int, kv_bytes: int, kv_budget: int) -> None:
        self.kv_bytes = max(self.kv_bytes, kv_bytes)


def branch(seed: int) -> SampleJob:
    return SampleJob(LATENTS, 2, sampler=SamplerSettings(steps=2, guidance_scale=1.0), base_seed=seed)


async def written(stages: Engines, job: SampleJob) -> torch.Tensor:
    async with stages.prior.session(job) as session:
        return torch.cat([block.latents async for block in session])


async def test_runs_that_begin_alike_at_once_compute_and_hold_their_context_once(tiny: Golden) -> None:
    """16 blocks of context, 8 runs of 2 more each: a pool of 32 pages holds them all."""
    with engines(tiny.directory) as stages:
        alone = [await written(stages, branch(seed)) for seed in range(8)]
        room = 32 * stages.prior.backend.page_bytes
    limits = EngineLimits(max_context=512, kv_bytes=room, prefill_chunk=16)
    with engines(tiny.directory, limits, observer=Peak) as stages:
        together = await asyncio.gather(*(written(stages, branch(seed)) for seed in range(8)))
        await settled(stages)
        for got, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        peak = stages.prior.observer
        assert isinstance(peak, Peak)
        assert peak.kv_bytes <= room
        assert peak.rows == 64 + 8 * (2 * 2 + 1) * 4  # the context once; of each run two points a block, and a commit


async def test_decoders_that_begin_alike_at_once_compute_and_hold_their_prefix_once(tiny: Golden) -> None:
    limits = EngineLimits(max_context=512, prefill_chunk=16)
    with engines(tiny.directory, limits, observer=Peak) as stages:
        await asyncio.gather(*(decode(stages, LATENTS) for _ in range(8)))
        await settled(stages)
        peak = stages.decoder.observer
        assert isinstance(peak, Peak)
        assert peak.rows == 64 + 8 * 4
        assert peak.kv_bytes <= (16 + 8) * stages.decoder.backend.page_bytes


async def test_who_waits_for_the_context_of_another_goes_on_when_that_one_leaves(tiny: Golden) -> None:
    with engines(tiny.directory, EngineLimits(max_context=512, prefill_chunk=4)) as stages:
        alone = await written(stages, branch(1))
    with engines(tiny.directory, EngineLimits(max_context=512, prefill_chunk=4)) as stages:
        watch = Watch(stages.prior)
        leaving = asyncio.create_task(written(stages, branch(0)))
        await eventually(lambda: watch.rows > 0)
        following = asyncio.create_task(written(stages, branch(1)))
        leaving.cancel()
        torch.testing.assert_close(await following, alone, rtol=1e-4, atol=1e-4)


async def test_prefixes_that_are_not_to_be_shared_are_not_kept(tiny: Golden) -> None:
    with engines(tiny.directory, EngineLimits(max_context=512, share_prefixes=False)) as stages:
        watch = Watch(stages.prior)
        await sample(stages, LATENTS)
        await settled(stages)
        cost = watch.take()
        await sample(stages, LATENTS)
        await settled(stages)
        assert watch.take() == cost
        assert watch.hits == []


async def test_leading_blocks_are_shared_only_among_equal_salts(tiny: Golden) -> None:
    hits: list[int] = []

    class Hits(EngineObserver):
        def prefix_cache(self, hits_: int, misses: int, bytes_held: int) -> None:
            if hits_ or misses:
                hits.append(hits_)

    async def encode(salt: str) -> None:
        await stages.encoder.encode([IDS], cache_salt=salt)

    async def write(salt: str) -> None:
        async with stages.prior.session(SampleJob(LATENTS, 1, base_seed=1, cache_salt=salt)) as session:
            assert len([block async for block in session]) == 1

    async def decode(salt: str) -> None:
        async with stages.decoder.session(DecodeJob(LATENTS, cache_salt=salt)) as session:
            await session.decode(LATENTS[:4])

    with engines(tiny.directory, observer=Hits) as stages:
        for ask, blocks in ((encode, 18), (write, 16), (decode, 16)):
            for salt in ("a", "b", "a"):
                await ask(salt)
                await settled(stages)
            assert hits == [0, 0, blocks]
            hits.clear()


def keys(text: str) -> list[bytes]:
    return chain_keys(letter.encode() for letter in text)


def remembered(pages: Pages, *texts: str) -> None:
    """One sequence after the other, a page a letter, that uses them no longer."""
    for text in texts:
        found, _ = pages.find(keys(text))
        others = pages.reserve(len(text) - len(found))
        assert others is not None
        pages.remember(keys(text), found + others)
        pages.free(found + others)


def known(pages: Pages, text: str) -> int:
    found, _ = pages.find(keys(text))
    pages.free(found)
    return len(found)


def test_the_longest_known_beginning_is_found_and_its_pages_are_those_of_the_first() -> None:
    pages = Pages(20)
    remembered(pages, "abcd", "abx")
    assert (pages.known, pages.held, pages.available) == (5, 0, 20)
    assert [known(pages, text) for text in ("abcdef", "abxy", "ac", "b", "")] == [4, 3, 1, 0, 0]
    (first, _), (second, _) = pages.find(keys("abcd")), pages.find(keys("abx"))
    assert first[:2] == second[:2]
    assert pages.held == 5


def test_known_blocks_go_when_pages_are_needed_the_least_recently_found_first_and_ends_before_beginnings() -> None:
    pages = Pages(8)
    remembered(pages, "abcd", "xyz")
    assert known(pages, "ab") == 2
    taken = pages.reserve(3)  # one was free
    assert taken is not None
    assert (known(pages, "abcd"), known(pages, "xyz")) == (2, 3)
    used, _ = pages.find(keys("ab"))
    assert pages.reserve(4) is None  # what a sequence uses is not taken from it
    assert pages.reserve(3) is not None
    assert (known(pages, "ab"), known(pages, "x")) == (2, 0)
    assert pages.held == 8
    pages.free(used + taken)
    assert pages.held == 3


@pytest.mark.parametrize("seed", range(3))
def test_no_page_is_lost_or_given_twice_whatever_happens(seed: int) -> None:
    draw, pages, running = random.Random(seed), Pages(30), list[list[int]]()
    for _ in range(500):
        text = "".join(draw.choice("xyz") for _ in range(draw.randint(0, 6)))
        found, _ = pages.find(keys(text))
        others = pages.reserve(len(text) - len(found))
        if others is None:
            pages.free(found)
        else:
            assert not set(others) & {page for each in [*running, found] for page in each}
            running.append(found + others)
            if draw.random() < 0.5:
                pages.remember(keys(text), running[-1])
        while running and draw.random() < 0.5:
            pages.free(running.pop(draw.randrange(len(running))))
        if draw.random() < 0.02:
            pages.forget()
        assert pages.held == len({page for each in running for page in each})
    for each in running:
        pages.free(each)
    assert pages.reserve(30) is not None
