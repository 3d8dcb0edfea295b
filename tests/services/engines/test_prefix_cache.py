"""Leading blocks seen before are copied, not computed, and change nothing."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import torch

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.model.backend.pages import Pages, chain_keys
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.prior.sampling_run import SampleJob
from tests.conftest import Golden
from tests.services.engines.conftest import Engines, engines
from tests.waiting import eventually

IDS = [int(x) for x in torch.randint(3, 500, (70,), generator=torch.Generator().manual_seed(1))]
LATENTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))


async def write(stages: Engines, latents: torch.Tensor, salt: str = "", seed: int = 1) -> torch.Tensor:
    sampler = SamplerSettings(steps=2, guidance_scale=1.0)
    async with stages.prior.session(SampleJob(latents, 2, sampler=sampler, base_seed=seed, cache_salt=salt)) as session:
        return torch.cat([block.latents async for block in session])


async def decode(stages: Engines, prefix: torch.Tensor, salt: str = "", seed: int = 1) -> torch.Tensor:
    async with stages.decoder.session(DecodeJob(prefix, with_logits=True, cache_salt=salt)) as session:
        return (await session.decode(LATENTS[4 * seed : 4 * seed + 4])).logits


async def encode(stages: Engines, ids: list[int], salt: str = "") -> torch.Tensor:
    (result,), _ = await stages.encoder.encode([ids], cache_salt=salt)
    return result.latents


ASK: dict[str, Callable[..., Awaitable[torch.Tensor]]] = {"prior": write, "decoder": decode, "encoder": encode}
HALF = torch.cat((LATENTS[:32], -LATENTS[32:]))
KNOWN = {  # what is asked first and again, another, the rows computed for these three, and the blocks found and not
    "prior": (LATENTS, HALF, [84, 20, 52], [(0, 16), (16, 0), (8, 8)]),
    "decoder": (LATENTS, HALF, [68, 4, 36], [(0, 16), (16, 0), (8, 8)]),
    "encoder": (IDS, IDS[:40], [72, 0, 0], [(0, 18), (18, 0), (10, 0)]),
}


async def settled(stages: Engines) -> None:
    """The observer hears of it after the result is out, and before the session is let go."""
    engines_ = (stages.encoder, stages.decoder, stages.prior)
    await eventually(lambda: all(engine.load().running == 0 for engine in engines_))


@pytest.mark.parametrize("stage", KNOWN)
async def test_a_known_beginning_is_computed_once_for_equal_salts_and_changes_nothing(tiny: Golden, stage: str) -> None:
    first, other, rows, found = KNOWN[stage]
    asked = [(first, ""), (first, ""), (other, ""), (first, "salt")]
    for shared in (True, False):
        with engines(tiny.directory, EngineLimits(max_context=512, share_prefixes=shared)) as stages:
            engine, answers, computed = getattr(stages, stage), [], []
            for given, salt in asked:
                answers.append(await ASK[stage](stages, given, salt))
                await settled(stages)
                computed.append(sum(engine.observer.rows) - sum(computed))
        if shared:
            assert (computed, engine.observer.hits) == ([*rows, rows[0]], [*found, found[0]])
            assert (
                engine.observer.cached_bytes == sum(new for _, new in engine.observer.hits) * engine.backend.page_bytes
            )
            expected = answers
        else:
            assert (computed[:2], engine.observer.hits) == ([rows[0]] * 2, [])
        for got, wanted in zip(answers, [expected[0], expected[0], expected[2], expected[0]], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        if stage == "encoder" and shared:
            assert torch.equal(answers[1], answers[0])
            assert torch.equal(answers[2], answers[0][:40])


@pytest.mark.parametrize(("stage", "rows", "pages"), [("prior", 20, 32), ("decoder", 4, 24)])
async def test_sessions_that_begin_alike_at_once_compute_and_hold_their_prefix_once(tiny, stage, rows, pages):
    """16 blocks that are known to all; each of eight computes `rows` more, and holds as many pages as these take."""
    with engines(tiny.directory) as stages:
        alone = [await ASK[stage](stages, LATENTS, seed=seed) for seed in range(8)]
    with engines(tiny.directory, EngineLimits(max_context=512, prefill_chunk=16)) as stages:
        together = await asyncio.gather(*(ASK[stage](stages, LATENTS, seed=seed) for seed in range(8)))
        await settled(stages)
        engine = getattr(stages, stage)
        assert sum(engine.observer.rows) == 64 + 8 * rows
        assert engine.observer.most_kv_bytes <= pages * engine.backend.page_bytes
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


async def test_texts_that_begin_alike_at_once_are_encoded_once(tiny: Golden) -> None:
    with engines(tiny.directory, EngineLimits(max_context=512, prefill_chunk=16)) as stages:
        found = await asyncio.gather(*(encode(stages, ids) for ids in (IDS, IDS, IDS[:40], IDS)))
        await settled(stages)
        assert sum(stages.encoder.observer.rows) == 72
        assert all(torch.equal(each, found[0][: len(each)]) for each in found)


async def test_who_waits_for_the_context_of_another_goes_on_when_that_one_leaves(tiny: Golden) -> None:
    limits = EngineLimits(max_context=512, prefill_chunk=4)
    with engines(tiny.directory, limits) as stages:
        alone = await write(stages, LATENTS)
    with engines(tiny.directory, limits) as stages:
        leaving = asyncio.create_task(write(stages, LATENTS, seed=0))
        await eventually(lambda: stages.prior.observer.rows)
        following = asyncio.create_task(write(stages, LATENTS))
        leaving.cancel()
        torch.testing.assert_close(await following, alone, rtol=1e-4, atol=1e-4)


def keys(text: str) -> list[bytes]:
    return chain_keys(np.frombuffer(text.encode(), np.uint8), len(text))


def remembered(pages: Pages, *texts: str) -> None:
    """One sequence after the other, a page a letter, that uses them no longer."""
    for text in texts:
        found, _ = pages.find(keys(text))
        others = pages.reserve(len(text) - len(found))
        pages.remember(keys(text), found + others)
        pages.free(found + others)


def known(pages: Pages, text: str) -> int:
    found, _ = pages.find(keys(text))
    pages.free(found)
    return len(found)


def test_known_blocks_go_when_pages_are_needed_the_least_recently_found_first_and_ends_before_beginnings() -> None:
    pages = Pages(8)
    remembered(pages, "abcd", "xyz")
    assert known(pages, "ab") == 2
    taken = pages.reserve(3)  # one was free
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
