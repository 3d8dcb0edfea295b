"""Previews and probes through real stages: on or off, alone or among others, what is written is the same."""

from typing import Any

import pytest

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from tests.conftest import load_golden
from tests.services.systems import System, recorded, system

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
