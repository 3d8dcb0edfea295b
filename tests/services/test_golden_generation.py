"""GenerationService with real engines, behind real sockets or in process: recorded tokens and texts come out,
prompts of every kind are continued, previews and probes change nothing."""

import asyncio
from typing import Any

import numpy as np
import pytest

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from tests.conftest import Golden, load_golden
from tests.services.systems import System, ids_of, recorded, system, text_of


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
async def test_every_recorded_text_is_written_again_eight_at_once_with_its_latents(golden, split: bool):
    async with system(golden, split) as served:
        for case in golden.meta["cases"]:
            wanted, latents = case["tokens"], f"gen{case['index']}.block_latents"
            work = [served.generate(**recorded(case, s, len(ids)), with_latents=True) for s, ids in enumerate(wanted)]
            answers = zip(await asyncio.gather(*work), wanted, case["texts"], strict=True)
            for s, (responses, ids, text) in enumerate(answers):
                assert ids_of(responses) == ids
                assert text_of(responses) == text
                assert responses[-1].usage.completion_tokens == len(ids)
                for block, response in enumerate(responses):
                    assert_close(response.latents, golden.tensors[f"{latents}.{block}"][s].numpy(), 2e-5)


def assert_close(message: types_pb2.Latents, expected: np.ndarray, bound: float) -> None:
    found = np.frombuffer(message.values.data, "<f4").reshape(message.values.shape)
    assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


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
        assert_close(block, np.frombuffer(response.latents.values.data, "<f4").reshape(-1, 16), 1e-4)


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


FOUR_THOUSAND = "he said " * 2000

PROMPTS = {
    "empty": "",
    "one token": "a",
    "emoji": "I 🙂 you 👩‍👩‍👧 and 🇫🇷",
    "CJK": "東京は日本の首都です。",
    "NUL byte": "before\x00after",
    "text of a special token": "a<|im_end|>b<|pad|><|endoftext|>",
    "only white space": " \n\t ",
    "right to left": "שלום עולם",
    "combining characters": "e\u0301 \u200b\ufeff",
}


async def write(served: System, prompt: str, **fields: object) -> list:
    sampler = {"steps": 2, "guidance_scale": 3}
    seed = {"base_seed": 1}
    return await served.generate(
        **{"prompt": prompt, "max_new_tokens": 6, "ignore_end": True, "sampler": sampler, "seed": seed} | fields
    )


async def test_a_prompt_of_any_kind_is_continued_by_exactly_what_was_asked(tiny: Golden) -> None:
    async with system(tiny, split=True) as served:
        for name, prompt in PROMPTS.items():
            responses, ids = await write(served, prompt), served.tokenizer.encode(prompt)
            assert len(ids_of(responses)) == 6, name
            assert responses[-1].usage.prompt_tokens == len(ids), name
            assert text_of(responses) == served.tokenizer.decode(ids_of(responses)), name
            as_ids = await write(served, "", prompt_ids=types_pb2.TokenIds(ids=ids)) if ids else responses
            assert ids_of(as_ids) == ids_of(responses), name


async def test_four_thousand_tokens_are_a_prompt_like_any_other(tiny: Golden) -> None:
    async with system(tiny, split=True, max_context=8192) as served:
        ids = served.tokenizer.encode(FOUR_THOUSAND)
        assert len(ids) >= 4000
        responses = await write(served, FOUR_THOUSAND)
        assert len(ids_of(responses)) == 6
        assert responses[-1].usage.prompt_tokens == len(ids)


STEPS = 6
LOOKS = {"preview_every": 2, "with_probes": True}
FIRST = {"norm", "drift", "entropy", "end_probability"}  # probes of a block with nothing before it


def request(sample_id: int = 0, budget: int = 15, **more: Any) -> dict[str, Any]:
    [case, *_] = load_golden("tiny_b4").meta["cases"]
    asked = recorded(case, sample_id, budget) | {"with_latents": True, **more}
    asked["sampler"] |= {"steps": STEPS, "guidance_scale": 3}
    return asked


def blocks(responses: list[Any]) -> list[Any]:
    return [response for response in responses if not response.HasField("preview")]


def written(responses: list[Any]) -> list[Any]:
    """What a generation is: text, ids, log-probabilities and latents of each block, and the end."""
    return [
        (each.text, list(each.token_ids), list(each.logprobs), each.latents, each.finish_reason, each.usage, each.seed)
        for each in blocks(responses)
    ]


@pytest.mark.parametrize("split", [False, True], ids=["in one process", "apart"])
async def test_what_is_written_is_the_same_to_the_byte_with_previews_and_probes(split: bool) -> None:
    async with system(load_golden("tiny_b4"), split) as served:
        asked = request(sampling={"temperature": 1.5, "top_k": 0, "top_p": 1.0}, top_logprobs=1)
        await served.generate(**asked)  # its prefix is cached from here on: equal passes, equal bytes
        plain, watched = await served.generate(**asked), await served.generate(**asked, **LOOKS)
        assert written(watched) == written(plain)
        looks = [each for each in watched if each.HasField("preview")]
        assert looks
        for look in looks:
            assert look.preview.step in (2, 4)
            assert look.preview.block_index < len(plain)
            assert list(look.preview.latents.values.shape) == [4, 16]
            assert {field.name for field, _ in look.probes.ListFields()} == {"entropy", "end_probability"}
        probes = [{field.name: value for field, value in each.probes.ListFields()} for each in blocks(watched)]
        assert probes[0].keys() >= FIRST
        assert all(each.keys() == FIRST | {"distance", "disagreement"} for each in probes[1:])
        assert all(0 <= each["end_probability"] <= 1 for each in probes)
        assert not any(each.HasField("probes") for each in plain)


async def sampled(served: System, **fields: Any) -> list[Any]:
    return [response async for response in served.latents.SampleLatents(pb.SampleLatentsRequest(**fields))]


async def test_steps_that_were_saved_are_counted() -> None:
    async with system(load_golden("tiny_b4"), split=False) as served:
        early = types_pb2.Sampler(steps=9, stable_steps=2, stable_distance=10_000)  # done after three steps
        *_, last = await served.generate(**request() | {"sampler": early})
        assert last.usage.steps_saved == 6 * last.usage.blocks
        found = await sampled(served, max_blocks=2, sampler=early)
        assert [(each.step, each.steps_saved) for each in found] == [(3, 6), (3, 6)]
        hole = [{"text": "He looked at the river"}, {"token_count": 12}]
        filled = await served.latents.Infill(pb.InfillRequest(segments=hole, sampler=early))
        assert filled.usage.steps_saved == 6 * filled.usage.blocks
