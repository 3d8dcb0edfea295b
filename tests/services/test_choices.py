"""Typed choice, through real stages: the value of a choice is the sum of what the decoder says of its ids."""

from typing import Any

import numpy as np
import pytest

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve_services.coordinator import rows
from tests.conftest import load_golden
from tests.services.systems import System, ids_of, system, text_of

PROMPT, CHOICES = "He looked at the river and then", [" said", " sat down by the fire and said", " went"]
SEED: dict[str, Any] = {"seed": {"base_seed": 5}, "sampler": {"steps": 4}}


async def by_hand(served: System, choices: list[str]) -> list[float]:
    """From the blocks of a free run of the same seed, decoded behind the prompt."""
    free = await served.generate(prompt=PROMPT, max_new_tokens=30, with_latents=True, ignore_end=True, **SEED)
    encoded = await served.latents.EncodeText(pb.EncodeTextRequest(texts=[PROMPT]))
    [prompt], size = encoded.encodings, served.stages.shape.block_size
    known = rows.take(prompt.latents, 0, len(prompt.token_ids) // size * size)
    parts = [known, *(response.latents for response in free)]
    latents = rows.join(parts, served.stages.shape.latent_dim, "")
    found = await served.latents.Logprobs(pb.LogprobsRequest(latents=latents, all_logprobs=True))
    values = np.frombuffer(found.position_logprobs.data, "<f4").reshape(found.position_logprobs.shape)
    values = values[len(prompt.token_ids) :]
    ids = [served.tokenizer.encode(choice) for choice in choices]
    return [float(values[range(len(each)), each].sum()) for each in ids]


@pytest.mark.parametrize(("name", "split"), [("tiny_b4", True), ("tiny_b4_vae1", False), ("tiny_b16_scaled", False)])
async def test_a_choice_is_worth_the_sum_of_its_log_probabilities(name: str, split: bool) -> None:
    async with system(load_golden(name), split=split) as served:
        expected = await by_hand(served, CHOICES)
        responses = await served.generate(prompt=PROMPT, choices=CHOICES, **SEED)
        last = responses[-1]
        assert [each.text for each in last.choices] == CHOICES
        assert [each.token_count for each in last.choices] == [len(served.tokenizer.encode(each)) for each in CHOICES]
        np.testing.assert_allclose([each.logprob for each in last.choices], expected, atol=1e-3)
        best = int(np.argmax(expected))
        assert (text_of(responses), ids_of(responses)) == (CHOICES[best], served.tokenizer.encode(CHOICES[best]))
        assert last.finish_reason == types_pb2.FINISH_REASON_STOP
        assert (last.usage.completion_tokens, last.usage.wasted_blocks) == (len(ids_of(responses)), 0)
        redecoded = len(served.tokenizer.encode(PROMPT)) % served.stages.shape.block_size
        longest = redecoded + max(each.token_count for each in last.choices)
        assert last.usage.blocks == len(responses) == -(-longest // served.stages.shape.block_size)
        watched = await served.generate(
            prompt=PROMPT, choices=CHOICES, max_new_tokens=40, sampling={"temperature": 0}, preview_every=2, **SEED
        )
        np.testing.assert_allclose([each.logprob for each in watched[-1].choices], expected, atol=1e-3)
