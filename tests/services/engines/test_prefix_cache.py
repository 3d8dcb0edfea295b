"""Leading blocks seen before are copied, not computed, and change nothing."""

import pytest
import torch

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.prefix_cache import PrefixCache, Prefixes, chain_keys
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
        assert watch.held == stages.prior.prefixes._cache.nbytes > 0
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
    with engines(tiny.directory, EngineLimits(max_context=512, prefix_cache_bytes=0)) as stages:
        torch.testing.assert_close(await encode(stages, IDS), longer, rtol=1e-4, atol=1e-5)


async def test_a_budget_of_zero_keeps_nothing(tiny: Golden) -> None:
    with engines(tiny.directory, EngineLimits(max_context=512, prefix_cache_bytes=0)) as stages:
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


def test_the_longest_known_beginning_is_found() -> None:
    cache: PrefixCache[str] = PrefixCache(100)
    cache.add(keys("abcd"), "abcd", 10)
    cache.add(keys("abx"), "abx", 10)
    assert cache.find(keys("abcdef")) == (4, "abcd")
    assert cache.find(keys("abxy")) == (3, "abx")
    assert cache.find(keys("ac"))[0] == 1
    assert cache.find(keys("b")) == (0, None)
    assert cache.find([]) == (0, None)


def test_a_beginning_that_two_chains_share_is_known_as_long_as_one_of_them() -> None:
    for first, second in (("abcd", "abx"), ("abx", "abcd")):
        cache: PrefixCache[str] = PrefixCache(20)
        cache.add(keys(first), first, 10)
        cache.add(keys(second), second, 10)
        cache.find(keys(first))
        cache.add(keys("z"), "z", 10)  # in place of the second
        assert cache.find(keys("ab")) == (2, first)
        assert cache.find(keys(second))[0] == 2


def test_a_chain_that_continues_another_replaces_it() -> None:
    cache: PrefixCache[str] = PrefixCache(100)
    cache.add(keys("ab"), "ab", 10)
    cache.add(keys("abcd"), "abcd", 20)
    assert cache.nbytes == 20
    assert cache.find(keys("ab")) == (2, "abcd")


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_holds_and_the_least_recently_used_go_first(seed: int) -> None:
    cache: PrefixCache[str] = PrefixCache(30)
    for text in ("a", "b", "c"):
        cache.add(keys(text), text, 10)
    cache.find(keys("a"))
    cache.add(keys("d"), "d", 10)
    assert cache.nbytes == 30
    assert cache.find(keys("b")) == (0, None)
    assert cache.find(keys("a")) == (1, "a")
    assert not cache.wants(keys("e"), 31)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        text = "".join("xyz"[int(i)] for i in torch.randint(0, 3, (4,), generator=generator))
        if cache.wants(keys(text), 7):
            cache.add(keys(text), text, 7)
        count, value = cache.find(keys(text))
        assert count == 4
        assert value == text
        assert cache.nbytes <= 30


def test_a_prefix_for_which_there_is_no_memory_is_not_kept_and_the_kept_ones_are_given_up() -> None:
    class Cache:
        def __init__(self, room: bool) -> None:
            self.room = room

        def nbytes_of(self, positions: int) -> int:
            return positions

        def copy_of(self, stop: int) -> str:
            if not self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return "kept"

        def fill_from(self, other: str, stop: int) -> None: ...

    prefixes = Prefixes(100, 4, EngineObserver())
    prefixes.remember(keys("ab"), Cache(room=True))
    assert prefixes.restore(keys("ab"), Cache(room=True))[0] == 2
    prefixes.remember(keys("cd"), Cache(room=False))
    assert [prefixes.restore(keys(each), Cache(room=True))[0] for each in ("ab", "cd")] == [0, 0]
    prefixes.remember(keys("cd"), Cache(room=True))
    assert prefixes.restore(keys("cd"), Cache(room=True))[0] == 2
