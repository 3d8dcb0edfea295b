"""Sessions: what they batch with changes nothing, what they hold is freed, and bounds hold."""

import asyncio
import gc
from pathlib import Path

import pytest
import torch

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.session import Session
from colaserve_services.errors import InvalidRequest
from colaserve_services.model import modulation
from colaserve_services.model.cpu_features import packs
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.layers import padded_rows
from colaserve_services.model.sampling import SamplingSettings
from colaserve_services.prior.sampling_run import SampleJob
from tests.conftest import Golden
from tests.services.engines.conftest import Engines, engines
from tests.services.engines.runs import freed, job, noise, sample
from tests.services.model.checkpoints import write_checkpoint

MIXED = [
    job(0), job(1, steps=7, solver="ab2"), job(2, context=0), job(3, guidance_scale=1.0), job(4, solver="heun"),
    job(5, context=21, blocks=3), job(6, guidance_start=0.8, guidance_end=0.2), job(7, resamples=2),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
async def test_any_mix_of_runs_in_one_batch_gives_what_each_gives_alone(tiny, dtype, bound):
    with engines(tiny.directory, dtype=dtype) as stages:
        alone = [await sample(stages, wanted) for wanted in MIXED]
        together = await asyncio.gather(*(sample(stages, wanted) for wanted in MIXED))
        for ours, theirs in zip(together, alone, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert (a.latents - b.latents).norm() < bound * b.latents.norm()
        await freed(stages)


async def test_known_positions_come_back_unchanged_and_given_blocks_are_passed_through(tiny: Golden) -> None:
    latents = noise(16)
    canvas = SampleJob(latents=latents, open=((5, 7),), max_blocks=4, sampler=SamplerSettings(steps=2), base_seed=1)
    with engines(tiny.directory) as stages:
        blocks = await sample(stages, canvas)
    written = torch.cat([latents[:4], *(block.latents for block in blocks)])
    assert [block.index for block in blocks] == [0, 1, 2, 3]
    assert torch.equal(written[:5], latents[:5])
    assert torch.equal(written[7:16], latents[7:])
    assert not torch.isclose(written[5:7], latents[5:7]).all(dim=1).any()


async def test_what_an_open_position_holds_is_ignored(tiny: Golden) -> None:
    latents = noise(8)
    other = latents.clone()
    other[4:6] = 100.0
    with engines(tiny.directory) as stages:
        runs = [
            await sample(stages, SampleJob(latents=x, open=((4, 6),), max_blocks=1, base_seed=1))
            for x in (latents, other)
        ]
    torch.testing.assert_close(runs[0][0].latents, runs[1][0].latents, rtol=1e-4, atol=1e-4)


async def test_leaving_a_run_frees_its_cache_before_the_second_step(tiny: Golden) -> None:
    limits = EngineLimits(max_context=512, run_ahead=100)
    with engines(tiny.directory, limits) as stages:
        async with stages.prior.session(job(blocks=60, steps=100)) as session:
            await anext(aiter(session))
            assert 0 < stages.prior.load().kv_bytes_used <= 3 * stages.prior.backend.page_bytes  # of 61 in the end
            steps = len(stages.prior.observer.rows)
        await freed(stages)
        assert len(stages.prior.observer.rows) <= steps + 2


async def test_what_a_session_held_goes_with_it_and_waits_for_no_collector_of_cycles(tiny: Golden) -> None:
    """The collector counts objects: the few of a session may keep many bytes alive for minutes."""
    with engines(tiny.directory, EngineLimits(max_context=64, prefill_chunk=8)) as stages:
        await use_all(stages)  # what is made once
        gc.collect()
        gc.disable()
        try:
            before = kept_alive()
            for _ in range(3):
                await use_all(stages)
            await freed(stages)
            for _ in range(50):  # the device thread may hold what it worked on last
                if kept_alive() <= before:
                    break
                await asyncio.sleep(0.05)
            assert kept_alive() <= before
        finally:
            gc.enable()


async def use_all(stages: Engines) -> None:
    await stages.encoder.encode([list(range(3, 43))])  # in chunks, so with a cache
    await sample(stages, job())
    async with stages.decoder.session(DecodeJob(prefix=noise(4), max_latents=8)) as session:
        await session.decode(noise(4))


def kept_alive() -> int:
    """Sessions and tensors that exist."""
    return sum(issubclass(type(thing), Session | torch.Tensor) for thing in gc.get_objects())


async def test_decoding_resumes_with_the_same_draws_from_prefix_and_history(tiny: Golden) -> None:
    sampling = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, seed=3)
    latents = noise(24)
    with engines(tiny.directory) as stages:

        async def decode(prefix: int, history: list[int]) -> list[int]:
            ids = list(history)
            wanted = DecodeJob(latents[:prefix], sampling=sampling, history_ids=tuple(history), max_latents=32)
            async with stages.decoder.session(wanted) as session:
                for start in range(prefix, 24, 4):
                    block = await session.decode(latents[start : start + 4])
                    assert block.index * len(block.token_ids) == len(ids)
                    ids += block.token_ids
            return ids

        whole = await decode(8, [])
        assert await decode(16, whole[:8]) == whole
        assert await decode(16, []) != whole[8:]
        await freed(stages)


async def test_arrays_of_other_shapes_are_refused_by_field_also_from_who_calls_an_engine_itself(tiny: Golden) -> None:
    with engines(tiny.directory) as stages:
        for wanted, field in (
            (SampleJob(torch.zeros(2, 3), max_blocks=1, base_seed=0), "canvas.latents"),
            (SampleJob(noise(0), max_blocks=2, noise=torch.zeros(1, 4, 16)), "noise"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                stages.prior.session(wanted)
            assert refused.value.field == field


async def test_a_call_of_many_sequences_takes_one_slot(tiny: Golden) -> None:
    limits = EngineLimits(max_context=512, max_running=1)
    with engines(tiny.directory, limits) as stages:
        for _ in range(5):
            results, _ = await stages.encoder.encode([[i] for i in range(40)])
            assert len(results) == 40
        await freed(stages)


@pytest.mark.parametrize("chunk", [5, 16, 31])
async def test_chunks_do_not_cut_blocks(tmp_path: Path, chunk: int) -> None:
    """Positions of a block see each other, whatever size a pass would like to have."""
    folder = write_checkpoint(tmp_path, vae={"block_size": 12}, dit={"block_size": 12})
    ids, block = list(range(3, 63)), torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    prefix, results = torch.randn(48, 8, generator=torch.Generator().manual_seed(0)), []
    for limits in (EngineLimits(max_context=120, prefill_chunk=chunk), EngineLimits(max_context=120)):
        with engines(folder, limits) as stages:
            (encoded,), _ = await stages.encoder.encode([ids])
            async with stages.decoder.session(DecodeJob(prefix, with_logits=True)) as session:
                results.append((encoded.latents, (await session.decode(block)).logits))
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


async def test_chunks_far_in_a_long_text_have_fewer_rows(tiny: Golden) -> None:
    """They attend to more, so with as many rows they would keep others waiting longer."""
    ids, (block, *_) = [5 + number % 90 for number in range(508)], torch.randn(1, 4, 16).unbind()
    prefix, results = torch.randn(508, 16, generator=torch.Generator().manual_seed(0)), []
    for chunk in (64, 512):
        with engines(tiny.directory, EngineLimits(max_context=512, prefill_chunk=chunk)) as stages:
            (encoded,), _ = await stages.encoder.encode([ids])
            async with stages.decoder.session(DecodeJob(prefix, with_logits=True)) as session:
                results.append((encoded.latents, (await session.decode(block)).logits))
            for engine in (stages.encoder, stages.decoder) if chunk == 64 else ():
                *chunks, _ = engine.observer.rows
                assert chunks == sorted(chunks, reverse=True)
                assert 64 == chunks[0] > 1.2 * chunks[-1]
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "padded", "steps"),
    [(1, 16, ()), (100, 112, ()), (130, 160, ()), (640, 640, ()), (16, 16, (1, 16)), (17, 18, (1, 16))],
)
def test_few_numbers_of_rows_reach_the_products_of_onednn(rows: int, padded: int, steps: tuple[int, ...]) -> None:
    assert padded_rows(rows, torch.bfloat16, torch.device("cpu"), *steps) == padded
    assert padded_rows(rows, torch.float32, torch.device("cpu"), *steps) == (padded if packs(torch.float32) else rows)
    assert padded_rows(rows, torch.bfloat16, torch.device("cuda"), *steps) == rows


async def test_bfloat16_stays_near_float32(tiny: Golden) -> None:
    """See docs/decisions.md for the prior's distance, which must not explode here."""
    sequences = [[5] * 3, list(range(3, 60)), [7], list(range(100, 180))]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        with engines(tiny.directory, EngineLimits(max_context=512, prefill_chunk=40), dtype=dtype) as stages:
            encoded, _ = await stages.encoder.encode(sequences)
            async with stages.decoder.session(DecodeJob(noise(8), with_logits=True)) as session:
                block = await session.decode(noise(4, seed=1))
            (written,) = await sample(stages, job(blocks=1, steps=16, guidance_scale=7.0))
            await freed(stages)
        found.append([*(result.latents for result in encoded), block.logits, written.latents])
    for got, expected, bound in zip(*found, [2e-2] * 5 + [0.1], strict=True):
        assert got.shape == expected.shape
        assert (got - expected).norm() < bound * expected.norm()


async def test_as_many_runs_as_fit_may_each_have_times_of_their_own(tiny: Golden, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modulation, "_BUDGET_BYTES", 0)
    jobs = [job(seed, context=0, blocks=1, steps=3 + seed) for seed in range(40)]
    with engines(tiny.directory, EngineLimits(max_running=40, max_context=256)) as stages:
        together = await asyncio.gather(*(sample(stages, each) for each in jobs))
    assert [len(blocks) for blocks in together] == [1] * 40
