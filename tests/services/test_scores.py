"""The likelihood of a text, through real stages: its terms are those that the stages give one by one."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from colaserve.v1 import encoder_pb2, prior_pb2, types_pb2
from colaserve.v1 import latent_service_pb2 as pb
from colaserve_services.coordinator import CoordinatorLimits
from colaserve_services.rpc import arrays
from tests.conftest import load_golden
from tests.services.systems import System, system
from tests.waiting import eventually

PREFIX, TEXT = "He looked at the river and", " then he said"
QUICK: dict[str, Any] = {"probes": 3, "steps": 4, "seed": {"base_seed": 5, "sample_id": 2}}


async def score(served: System, **fields: Any) -> pb.LatentServiceScoreResponse:
    request = pb.LatentServiceScoreRequest(**{"prefix": PREFIX, "text": TEXT, **QUICK, **fields})
    return await served.latents.Score(request)


@pytest.mark.parametrize(
    ("name", "steps"), [("tiny_b4_vae1", 100), ("tiny_b16_scaled", 4)], ids=["in parts", "at once"]
)
async def test_the_terms_are_what_each_stage_says(name: str, steps: int) -> None:
    golden = load_golden(name)
    async with system(golden, split=True) as served:
        size, pad = served.stages.shape.block_size, served.tokenizer.special.pad
        prefix, text = served.tokenizer.encode(PREFIX), served.tokenizer.encode(TEXT)
        ids = [*prefix, *text, *[pad] * (-len(prefix + text) % size)]
        found = await score(served, samples=0, steps=steps)
        assert (list(found.token_ids), found.positions) == (text, len(ids) - len(prefix))

        sequences = [types_pb2.TokenIds(ids=each) for each in (ids, prefix)]
        request = encoder_pb2.EncodeRequest(sequences=sequences, with_variance=True)
        both = [array(each.latents.values) for each in (await served.stages.encoder.Encode(request)).encodings]
        variance = array((await served.stages.encoder.Encode(request)).encodings[0].log_variance)[len(prefix) :]
        scale = 1.7 if name == "tiny_b16_scaled" else 1.0
        entropy = (0.5 * (math.log(2 * math.pi * math.e) + variance.astype(np.float64)) + math.log(scale)).sum()
        assert found.posterior_entropy == pytest.approx(entropy, rel=1e-5)

        latents = arrays.latents_to_message(np.concatenate((both[1], both[0][len(prefix) :])), "")
        canvas = types_pb2.Canvas(latents=latents, open=[types_pb2.Span(start=len(prefix), end=len(ids))])
        asked = prior_pb2.PriorServiceScoreRequest(canvas=canvas, **QUICK | {"steps": steps})
        density = await served.stages.prior.Score(asked)
        assert found.prior_log_density == pytest.approx(sum(density.log_densities), abs=0.1)
        assert found.standard_error == pytest.approx(math.hypot(*density.standard_errors), rel=0.01)
        assert found.evaluations == density.evaluations == len(density.log_densities) * 2 * steps * 7

        decoded = await served.latents.DecodeLatents(pb.DecodeLatentsRequest(latents=latents, target_ids=ids))
        expected = sum(decoded.target_logprobs[len(prefix) : len(prefix) + len(text)])
        assert found.decoder_term == pytest.approx(expected, abs=1e-3)
        terms = found.decoder_term + found.posterior_entropy + found.prior_log_density
        assert found.log_likelihood == pytest.approx(terms, rel=1e-9)


def array(tensor: types_pb2.Tensor) -> np.ndarray:
    return arrays.from_message(tensor, "tensor", (None, None))


async def test_a_much_smaller_call_gets_the_slot_of_a_score_which_then_goes_on() -> None:
    limits = CoordinatorLimits(max_context=256, max_running=1, slice_seconds=0.0)
    async with system(load_golden("tiny_b4"), split=False, limits=limits) as served:
        asked = {"text": TEXT * 4, "steps": 130, "probes": 1, "solver": types_pb2.SOLVER_EULER, "samples": 0}
        scored = asyncio.create_task(score(served, **asked))
        await eventually(lambda: served.coordinator.services.admission.running == 1)
        assert await served.generate(max_new_tokens=4)
        assert not scored.done()
        found = await scored
        assert found.evaluations == -(-found.positions // 4) * 130 * 3


async def test_several_draws_are_their_mean_with_its_error() -> None:
    async with system(load_golden("tiny_b4"), split=False) as served:
        alone = [await score(served, seed={"base_seed": 5, "sample_id": 2 + i}) for i in range(3)]
        together = await score(served, samples=3)
        totals = [each.log_likelihood for each in alone]
        assert len({round(total) for total in totals}) > 1
        assert together.log_likelihood == pytest.approx(sum(totals) / 3, abs=0.1)
        assert together.standard_error == pytest.approx(np.std(totals, ddof=1) / math.sqrt(3), rel=0.01)
        without = await score(served, prefix="", samples=0)
        assert without.positions == -(-len(without.token_ids) // 4) * 4
