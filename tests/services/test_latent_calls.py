"""Scores, forks, vectors, log-probabilities and choices through real stages are what the stages give one by one."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from colaserve.v1 import decoder_pb2, encoder_pb2, prior_pb2, types_pb2
from colaserve.v1 import latent_service_pb2 as pb
from colaserve_client.arrays import array_from_tensor, tensor_from_array
from colaserve_client.settings import NoiseSeed
from colaserve_services.coordinator import CoordinatorLimits, rows
from colaserve_services.rpc import arrays
from tests.conftest import load_golden
from tests.services.systems import System, ids_of, system, text_of
from tests.waiting import eventually

PREFIX, ENDING = "He looked at the river and", " then he said"
QUICK: dict[str, Any] = {"probes": 3, "steps": 4, "seed": {"base_seed": 5, "sample_id": 2}}


async def score(served: System, **fields: Any) -> pb.LatentServiceScoreResponse:
    request = pb.LatentServiceScoreRequest(**{"prefix": PREFIX, "text": ENDING, **QUICK, **fields})
    return await served.latents.Score(request)


@pytest.mark.parametrize(
    ("name", "steps"), [("tiny_b4_vae1", 100), ("tiny_b16_scaled", 4)], ids=["in parts", "at once"]
)
async def test_the_terms_are_what_each_stage_says(name: str, steps: int) -> None:
    golden = load_golden(name)
    async with system(golden, split=True) as served:
        size, pad = served.stages.shape.block_size, served.tokenizer.special.pad
        prefix, text = served.tokenizer.encode(PREFIX), served.tokenizer.encode(ENDING)
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
        asked = {"text": ENDING * 4, "steps": 130, "probes": 1, "solver": types_pb2.SOLVER_EULER, "samples": 0}
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


SAID = "He looked at the river and then he said"
SHARED: dict[str, Any] = {
    "sampler": {"steps": 4, "guidance_scale": 2}, "sampling": {"temperature": 0}, "seed": {"base_seed": 5},
    "max_new_tokens": 21, "ignore_end": True,
}  # fmt: skip


@pytest.fixture
async def served() -> AsyncIterator[System]:
    async with system(load_golden("tiny_b4"), split=True) as found:
        yield found


async def forked(stub: Any, **fields: Any) -> list[list[pb.ForkResponse]]:
    request = pb.ForkRequest(**{"text": SAID} | SHARED | fields)
    found: list[list[pb.ForkResponse]] = [[] for _ in request.branches]
    async for response in stub.Fork(request):
        found[response.branch].append(response)
    return found


def joined(responses: list[pb.ForkResponse]) -> types_pb2.Latents:
    rows = np.concatenate([array_from_tensor(each.latents.values) for each in responses])
    return types_pb2.Latents(values=tensor_from_array(rows), space=responses[0].latents.space)


def assert_same(found: list[list[pb.ForkResponse]], expected: list[list[pb.ForkResponse]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ids_of(ours) == ids_of(theirs)
        np.testing.assert_allclose(*(array_from_tensor(joined(each).values) for each in (ours, theirs)), atol=1e-4)


async def test_a_branch_is_replayed_from_its_noise_and_from_each_of_its_blocks(served: System) -> None:
    sampling = {"temperature": 1.5, "repetition_penalty": 3}
    [whole] = await forked(served.latents, branches=[{"sampling": sampling}])
    noise = NoiseSeed(5).noise(len(whole), served.stages.shape.block_size, served.stages.shape.latent_dim)
    assert_same(
        await forked(served.latents, branches=[{"sampling": sampling, "noise": tensor_from_array(noise)}]), [whole]
    )
    for blocks in range(1, len(whole) + 1):
        branches = [{"sampling": sampling, "written": joined(whole[:blocks])}]
        [again] = await forked(served.latents, branches=branches)
        assert_same([again], [whole])
        assert (again[-1].usage.completion_tokens, again[-1].usage.blocks) == (21, len(whole) - blocks)


async def test_embeddings_are_means_of_the_latents(served: System) -> None:
    texts = [SAID, "a", "He looked"]
    encoded = (await served.latents.EncodeText(pb.EncodeTextRequest(texts=texts))).encodings
    latents = [array_from_tensor(each.latents.values) for each in encoded]
    size = served.stages.shape.block_size

    async def embedded(**fields: Any) -> list[np.ndarray]:
        found = (await served.latents.Embed(pb.EmbedRequest(**{"texts": texts} | fields))).embeddings
        assert [each.token_count for each in found] == [len(each.token_ids) for each in encoded]
        return [array_from_tensor(each.values) for each in found]

    blocks = [[rows[start : start + size] for start in range(0, len(rows), size)] for rows in latents]
    for got, every, own in zip(await embedded(), latents, await embedded(pooling=pb.POOLING_PER_BLOCK), strict=True):
        np.testing.assert_allclose(got, every.mean(axis=0), rtol=1e-5, atol=1e-6)
        assert own.shape == (-(-len(every) // size), every.shape[1])
    for got, parts in zip(await embedded(pooling=pb.POOLING_LAST_BLOCK), blocks, strict=True):
        np.testing.assert_allclose(got, parts[-1].mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([np.linalg.norm(each) for each in await embedded(normalize=True)], 1, rtol=1e-5)
    ids = [{"ids": each.token_ids} for each in encoded]
    for one, other in zip(await embedded(texts=[], sequences=ids), await embedded(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


TEXT = "He looked at the river and then"


@pytest.fixture(params=["tiny_b4_vae1", "tiny_b16_scaled"])
async def apart(request: pytest.FixtureRequest) -> Any:
    async with system(load_golden(request.param), split=True) as found:
        yield found


async def encoded(apart: System) -> types_pb2.Latents:
    response = await apart.latents.EncodeText(pb.EncodeTextRequest(texts=[TEXT]))
    return response.encodings[0].latents


async def raw_logits(apart: System, latents: types_pb2.Latents) -> np.ndarray:
    """Of the latents, block by block, from the decoder itself."""
    values = arrays.from_message(latents.values, "latents", (None, None))
    size = apart.stages.shape.block_size
    values = np.concatenate((values, np.zeros((-len(values) % size, values.shape[1]), np.float32)))
    call = apart.stages.decoder.Decode()
    await call.write(decoder_pb2.DecodeRequest(open=decoder_pb2.OpenDecode(with_logits=True)))
    found = []
    for block in values.reshape(-1, size, values.shape[1]):
        await call.write(decoder_pb2.DecodeRequest(block=arrays.latents_to_message(block, "")))
        found.append(arrays.from_message((await call.read()).logits, "logits", (None, None)))
    call.cancel()
    return np.concatenate(found)[: latents.values.shape[0]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


async def test_every_id_has_the_log_softmax_of_the_raw_logits_at_every_position(apart: System) -> None:
    latents = await encoded(apart)
    expected = log_softmax(await raw_logits(apart, latents))
    whole = await apart.latents.Logprobs(pb.LogprobsRequest(latents=latents, all_logprobs=True))
    found = np.frombuffer(whole.position_logprobs.data, "<f4").reshape(whole.position_logprobs.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert list(whole.token_ids) == expected.argmax(-1).tolist()
    np.testing.assert_allclose(whole.logprobs, expected.max(-1), atol=1e-5)
    chosen = pb.LogprobsRequest(text=TEXT, logprob_ids=[9, 3, 9], logprobs_dtype=types_pb2.DATA_TYPE_FLOAT16)
    some = await apart.latents.Logprobs(chosen)
    assert list(some.position_logprobs.shape) == [len(expected), 3]
    assert some.position_logprobs.dtype == types_pb2.DATA_TYPE_FLOAT16
    found = np.frombuffer(some.position_logprobs.data, "<f2").reshape(-1, 3)
    np.testing.assert_allclose(found, expected[:, [9, 3, 9]], rtol=1e-3)
    targets = expected[range(len(expected)), list(some.token_ids)]
    np.testing.assert_allclose(some.logprobs, targets, atol=1e-5)


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
