"""A preview is answered as the block would be, and leaves no trace; probes are what the logits say."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from colaserve_services.decoder.engine import DecodedBlock, DecodeJob, DecoderEngine, DecoderSession
from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import load
from colaserve_services.model.sampling import SamplingSettings
from tests.conftest import Golden
from tests.services.engines.conftest import CPU, Engines, engines
from tests.services.engines.runs import freed, noise

DRAWN = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, seed=3, repetition_penalty=3.0)


async def decoded(stages: Engines, looks: Sequence[torch.Tensor], seed: int = 0) -> list[DecodedBlock]:
    """Five blocks after a prefix, before each of them previews: `looks`, and the block itself. Targets end in the
    second block; how many likely ids are listed depends on the seed."""
    latents, answers = noise(28, seed), []
    wanted = DecodeJob(
        latents[:8], sampling=DRAWN, with_logits=True, with_probes=True, max_latents=28,
        top_logprobs=seed, target_ids=range(3, 3 + 6 * seed),
    )  # fmt: skip
    async with stages.decoder.session(wanted) as session:
        for start in range(8, 28, 4):
            block = latents[start : start + 4]
            last = (await session.preview(torch.cat([*looks, block])))[-1:] if looks else []
            answers.append(await session.decode(block))
            for preview in last:
                assert preview.provisional
                assert not answers[-1].provisional
                assert same(preview, answers[-1])
    return answers


def same(a: DecodedBlock, b: DecodedBlock) -> bool:
    everything = [
        (each.index, each.token_ids, each.logprobs, each.top, each.target_logprobs, each.probes) for each in (a, b)
    ]
    return everything[0] == everything[1] and torch.equal(a.logits, b.logits)


async def test_previews_get_the_draws_of_their_block_and_change_no_bit_of_what_follows(tiny: Golden) -> None:
    with engines(tiny.directory) as stages:
        alone = await decoded(stages, [])
        looked_at = await decoded(stages, [noise(4, 90), 100 * noise(4, 91)])
        assert all(map(same, alone, looked_at))
        many = await asyncio.gather(*(decoded(stages, [noise(4, 90)] * (seed % 2), seed) for seed in range(4)))
        assert [block.token_ids for block in many[0]] == [block.token_ids for block in alone]
        assert [block.index for block in many[1]] == [0, 1, 2, 3, 4]
        for seed, blocks in enumerate(many):
            listed = [ids for block in blocks for ids, _ in block.top]
            assert all(len(ids) == seed for ids in listed)
            logprobs = torch.cat([block.logits for block in blocks]).log_softmax(-1)
            targets = [value for block in blocks for value in block.target_logprobs]
            torch.testing.assert_close(targets, [logprobs[i, 3 + i].item() for i in range(6 * seed)])
            assert [ids[0] for ids in listed] == (logprobs.argmax(-1).tolist() if seed else [])
        await freed(stages)


@pytest.mark.parametrize("reserved", [12, 64])
async def test_several_previews_of_a_block_are_what_each_is_alone(tiny: Golden, reserved: int) -> None:
    with engines(tiny.directory) as stages:
        shown, prefix = [noise(4, 90 + i) for i in range(3)], noise(8)
        wanted = DecodeJob(prefix, sampling=DRAWN, with_logits=True, max_latents=reserved)
        async with stages.decoder.session(wanted) as session:  # 12: there is a page for one at a time
            together = await session.preview(torch.cat(shown))
            for look, preview in zip(shown, together, strict=True):
                [alone] = await session.preview(look)
                assert (preview.token_ids, preview.index) == (alone.token_ids, 0)
                torch.testing.assert_close(preview.logits, alone.logits)
            block = await session.decode(shown[1])
            assert block.token_ids == together[1].token_ids
        assert len({tuple(preview.token_ids) for preview in together}) == 3
        await freed(stages)


class Passes(EngineObserver):
    def __init__(self) -> None:
        self.sessions: list[int] = []  # of each pass

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        self.sessions.append(sessions)


async def test_previews_of_several_sessions_wait_some_looks_for_each_other(tiny: Golden) -> None:
    checkpoint, passes, asked = Checkpoint.open(tiny.directory), Passes(), list[asyncio.Task[Any]]()
    model = load(checkpoint, "decoder", CPU, torch.float32)
    decoder = DecoderEngine(model, checkpoint.shape, DeviceThread(), EngineLimits(max_context=64), passes)

    async def look(*wanted: tuple[DecoderSession, bool]) -> bool:
        """Ask for previews, or blocks, then look once."""
        asked.extend(
            asyncio.create_task(session.preview(noise(4)) if preview else session.decode(noise(4)))
            for session, preview in wanted
        )
        await asyncio.sleep(0)
        with torch.inference_mode():
            return decoder.step(heavy=True)

    async with decoder.session(DecodeJob(noise(4))) as one, decoder.session(DecodeJob(noise(4, 1))) as other:
        assert await look()  # the prefixes
        assert await look((one, True)), "nobody else has asked for any"
        assert await look((one, True), (other, True))
        assert not await look((one, True))
        assert decoder.next_deadline() is not None, "it looks again, also where nobody else has work"
        assert await look((other, True))
        assert [await look((one, True)), *[await look() for _ in range(3)]] == [False, False, False, True]
        assert await look((one, True), (other, False)), "blocks do not wait"
        assert passes.sessions == [2, 1, 2, 2, 1, 2]
        assert len(await asyncio.gather(*asked)) == 8


async def test_a_preview_after_the_last_block_is_refused_by_name(tiny: Golden) -> None:
    with engines(tiny.directory) as stages:
        async with stages.decoder.session(DecodeJob(noise(4), max_latents=8)) as session:
            await session.decode(noise(4))
            with pytest.raises(InvalidRequest, match=r"^preview: position 8 is beyond the 8 latents reserved"):
                await session.preview(noise(4))
            with pytest.raises(InvalidRequest, match=r"^preview: got shape \[3, 16\], expected \[4, 16\]"):
                await session.preview(noise(3))


async def test_probes_are_those_of_the_raw_logits(tiny: Golden) -> None:
    with engines(tiny.directory, end_ids=[7, 2, 9]) as stages:
        blocks = await decoded(stages, [])
        async with stages.decoder.session(DecodeJob(noise(4))) as session:
            assert (await session.decode(noise(4))).probes is None
    for block in blocks:
        likely = block.logits.double().softmax(-1)
        assert block.probes.entropy == pytest.approx(torch.special.entr(likely).sum(-1).mean().item(), rel=1e-5)
        assert block.probes.end_probability == pytest.approx(likely[:, [2, 7, 9]].sum(-1).max().item(), rel=1e-5)
