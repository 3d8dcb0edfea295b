"""The engines give the recorded numbers, whatever they batch, chunk or cache; whole, tests of the stages show it."""

import asyncio
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.model.backend import cuda
from colaserve_services.model.backend.pick import Picked, plain
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.sampling import SamplingSettings
from colaserve_services.prior.sampling_run import SampleJob
from tests.conftest import Golden
from tests.services.engines.conftest import Engines, engines
from tests.services.engines.runs import sample
from tests.services.fake_gpus import Replayed
from tests.services.kernel_references import on_cpu


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(params=[lambda: None, lambda: plain(""), on_cpu], ids=["fastest", "reference", "cuda"])
def picked(request: pytest.FixtureRequest) -> Picked | None:
    """What the engines compute with."""
    backend: Picked | None = request.param()
    return backend


def tokenize(golden: Golden, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(golden.directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids


async def test_encoder_gives_the_recorded_latents(golden: Golden, picked: Picked | None) -> None:
    ids = [golden.tensors[f"encode.ids.{i}"] for i in range(3)]
    with engines(golden.directory, EngineLimits(max_context=512, prefill_chunk=32), picked=picked) as stages:
        results, _ = await stages.encoder.encode([x.tolist() for x in ids], with_variance=True)
        normalise = stages.encoder.model.normalise
        for i, result in enumerate(results):
            assert relative(result.latents, normalise(golden.tensors[f"encode.mean.{i}"])) < 3e-6
            assert relative(result.log_variance, golden.tensors[f"encode.logvar.{i}"]) < 3e-6


async def test_decoder_gives_the_recorded_logits_block_by_block_and_after_a_prefix(golden, picked):
    with engines(golden.directory, EngineLimits(max_context=512, prefill_chunk=16), picked=picked) as stages:
        B, P = stages.decoder.shape.block_size, stages.decoder.shape.patch_size
        lengths = golden.tensors["decode.lengths"].tolist()
        latents = golden.tensors["decode.latents"].split(lengths)
        logits = golden.tensors["decode.logits"].split([n * P for n in lengths])

        async def decode(i: int, prefix: int) -> None:
            job = DecodeJob(prefix=latents[i][:prefix], with_logits=True)
            async with stages.decoder.session(job) as session:
                for start in range(prefix, lengths[i], B):
                    block = await session.decode(latents[i][start : start + B])
                    assert relative(block.logits, logits[i][start * P : (start + B) * P]) < 3e-6

        await asyncio.gather(*(decode(i, prefix) for i in range(len(lengths)) for prefix in (0, lengths[i] - B)))


async def test_generation_gives_the_recorded_blocks_and_tokens(golden: Golden, picked: Picked | None) -> None:
    sources = ("seed", "noise") if picked is None else ("seed",)  # what computes sees no difference
    with engines(golden.directory, EngineLimits(max_context=512, prefill_chunk=16), picked=picked) as stages:
        for case in golden.meta["cases"]:
            samples = range(len(case["prompts"]))
            await asyncio.gather(*(check_generation(stages, golden, case, s, sources) for s in samples))


async def test_kernels_for_gpus_interpreted_give_the_recorded_blocks_and_tokens(tiny: Golden) -> None:
    """Once they are captured, as a CUDA graph: Python's part of a pass does not run again."""
    pytest.importorskip("triton")
    from colaserve_services.model import kernels

    stream = Replayed()
    kinds = [partial(kind, kernels=kernels, on=stream) for kind in (cuda.Prior, cuda.Decoder, cuda.Encoder)]
    limits, picked = EngineLimits(max_context=64, max_running=1), Picked("cuda", "", 32, *kinds)
    with engines(tiny.directory, limits, picked=picked) as stages:
        await check_generation(stages, tiny, tiny.meta["cases"][1] | {"n_blocks": 1}, 0, ("seed",))
    assert stream.events == 2 * stream.replays + len(kinds)


async def check_generation(stages: Engines, golden: Golden, case: dict, sample_id: int, sources: Sequence[str]) -> None:
    B, P = stages.prior.shape.block_size, stages.prior.shape.patch_size
    params, name = case["params"], f"gen{case['index']}"
    ids = tokenize(golden, case["prompts"][sample_id])
    assert ids == case["prompt_ids"][sample_id]  # for scripts/check-gpu, which has no tokenizer
    (encoded,), _ = await stages.encoder.encode([ids])
    m = len(encoded.latents)
    sampler = SamplerSettings(steps=params["timestep_num"], guidance_scale=params["guidance_scale"])
    noise = torch.stack([golden.tensors[f"{name}.noise.{b}"][sample_id] for b in range(case["n_blocks"])])
    given = {"seed": {"base_seed": case["noise_base_seed"], "sample_id": sample_id}, "noise": {"noise": noise}}
    tokens: list[int] = []
    for source in sources:
        job = SampleJob(latents=encoded.latents, max_blocks=case["n_blocks"], sampler=sampler, **given[source])
        blocks = await sample(stages, job)
        for b, block in enumerate(blocks):
            assert block.index == b
            assert relative(block.latents, golden.tensors[f"{name}.block_latents.{b}"][sample_id]) < 2e-5
    sampling = SamplingSettings(repetition_penalty=params.get("repetition_penalty", 1.1))
    prefix = m // B * B
    async with stages.decoder.session(DecodeJob(prefix=encoded.latents[:prefix], sampling=sampling)) as decoder:
        for block in blocks:
            tokens += (await decoder.decode(block.latents)).token_ids
    dropped = len(ids) - prefix * P if m % B else 0
    assert tokens[dropped:] == case["tokens"][sample_id][: len(tokens) - dropped]
