"""The recorded tokens and texts come out of GenerationService, with real engines behind real sockets or in process."""

import asyncio

import numpy as np
import pytest

from colaserve.v1 import latent_service_pb2, types_pb2
from tests.services.systems import ids_of, recorded, system, text_of

pb = latent_service_pb2


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
async def test_every_recorded_text_is_written_again_eight_at_once(golden, split: bool):
    async with system(golden, split) as served:
        for case in golden.meta["cases"]:
            wanted = case["tokens"]
            work = [served.generate(**recorded(case, s, len(ids))) for s, ids in enumerate(wanted)]
            for responses, ids, text in zip(await asyncio.gather(*work), wanted, case["texts"], strict=True):
                assert ids_of(responses) == ids
                assert text_of(responses) == text
                assert responses[-1].usage.completion_tokens == len(ids)


async def test_the_latent_calls_work_on_a_real_model(golden):
    async with system(golden, split=False) as served:
        texts = golden.meta["cases"][0]["prompts"]
        encoded = await served.latents.EncodeText(pb.EncodeTextRequest(texts=texts, with_variance=True))
        rebuilt = await served.latents.Reconstruct(pb.ReconstructRequest(texts=texts))
        for encoding, one in zip(encoded.encodings, rebuilt.reconstructions, strict=True):
            decoded = await served.latents.DecodeLatents(
                pb.DecodeLatentsRequest(
                    latents=encoding.latents, token_count=len(encoding.token_ids), target_ids=encoding.token_ids
                )
            )
            assert list(decoded.token_ids) == list(one.token_ids)
            bits = -np.mean(decoded.target_logprobs) / np.log(2)
            assert bits == pytest.approx(one.bits_per_token, rel=1e-5)
            ids = {"ids": list(encoding.token_ids)}
            scored = await served.latents.Logprobs(pb.LogprobsRequest(ids=ids, top_logprobs=3))
            assert list(scored.logprobs) == list(decoded.target_logprobs)
            assert [top.token_ids[0] for top in scored.top_logprobs] == list(one.token_ids)
        ends = {"start": {"text": texts[0]}, "end": {"text": texts[3]}, "points": 3}
        points = (await served.latents.Interpolate(pb.InterpolateRequest(**ends))).points
        assert points[-1].token_ids == served.tokenizer.before_end(rebuilt.reconstructions[3].token_ids)
        assert points[0].latents.values.shape == points[2].latents.values.shape


async def test_sampled_latents_are_those_of_a_generation(tiny):
    case = tiny.meta["cases"][0]
    request = recorded(case, 1, 13)
    async with system(tiny, split=False) as served:
        generated = await served.generate(**request, with_latents=True)
        encoded = await served.latents.EncodeText(pb.EncodeTextRequest(texts=[request["prompt"]]))
        sampling = pb.SampleLatentsRequest(
            prefix=encoded.encodings[0].latents, max_blocks=4, sampler=request["sampler"], seed=request["seed"]
        )
        sampled = [block.latents async for block in served.latents.SampleLatents(sampling)]
    assert len(sampled) == len(generated)
    for block, response in zip(sampled, generated, strict=True):  # its context was cached: other passes, other rounding
        one, other = (np.frombuffer(latents.values.data, "<f4") for latents in (block, response.latents))
        assert np.linalg.norm(one - other) < 1e-4 * np.linalg.norm(other)


@pytest.mark.parametrize("resamples", [1, 3])
async def test_infilling_a_real_model_keeps_the_kept_text(golden, resamples: int):
    kept = ["A guardian ", " walked in", " 😀.\0"]
    segments = [{"text": kept[0]}, {"token_count": 5}, {"text": kept[1]}, {"token_count": 2}, {"text": kept[2]}]
    request = pb.InfillRequest(
        segments=[pb.InfillSegment(**segment) for segment in segments],
        sampler=types_pb2.Sampler(steps=4, resamples=resamples),
        seed=types_pb2.NoiseSeed(base_seed=4),
    )
    async with system(golden, split=False) as served:
        response = await served.latents.Infill(request)
        again = await served.latents.Infill(request)
    assert [response.segments[i] for i in (0, 2, 4)] == kept
    assert response == again or response.token_ids == again.token_ids
