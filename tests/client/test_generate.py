"""Generation: whole, streamed and in batches, against a real server.

The blocking client is a facade over the asyncio one, so what is shown of it holds for both; tests of asyncio are of
its own ways to leave a call.
"""

import asyncio
import gc
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import get_type_hints

import grpc
import numpy as np
import pytest

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve_client import (
    AsyncClient,
    Cancelled,
    Client,
    DecoderClient,
    GenerationRequest,
    InvalidRequest,
    NoiseSeed,
    PriorClient,
    Probes,
    Retry,
    Sampler,
    Sampling,
    Steering,
    TokenLogprobs,
    TopToken,
)
from colaserve_client.arrays import tensor_from_array
from colaserve_client.fields import flat_fields
from colaserve_client.settings import CallFields, GenerationFields, SamplerFields, SamplingFields
from tests.client.behaviour import Behaviour, Failure
from tests.client.fakes import STORY, FakeServer
from tests.waiting import eventually, wait_until, when


def test_chunks_joined_are_the_whole(client: Client) -> None:
    whole = client.generate("Once", with_latents=True, top_logprobs=2)
    chunks = list(client.stream("Once", with_latents=True, top_logprobs=2))
    assert whole.text == "".join(chunk.text for chunk in chunks) == STORY.decode()
    assert whole.token_ids == tuple(STORY)
    np.testing.assert_array_equal(whole.latents.values[:, 0], list(STORY))
    assert whole.logprobs[0] == TokenLogprobs(STORY[0], -0.25, " ", (TopToken(32, -0.5, " "), TopToken(33, -0.75, "!")))
    assert "".join(whole.tokens) == whole.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * 6 + ["stop"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.blocks) == (4, 28, 7)


def test_a_result_reads_as_its_text(client: Client) -> None:
    result = client.generate("Once")
    assert str(result) == f"{result}" == STORY.decode()
    assert "".join(map(str, client.stream("Once"))) == STORY.decode()
    assert str(client.infill(["a", 2])) == "a__"
    assert str(client.reconstruct(["fox"])[0]) == str(client.interpolate("fox", "fox")[0]) == "fox"
    assert all(shown in result._repr_html_() for shown in ("<caption> there was", "<td>finish_reason</td>"))


def test_what_came_as_float32_prints_as_it_was_meant(client: Client, behaviour: Behaviour) -> None:
    behaviour.logprob = -0.1
    result = client.generate("Once", top_logprobs=1)
    assert [result.logprobs[0].logprob, result.logprobs[0].top[0].logprob] == [-0.1, -0.35]
    assert client.info().default_sampling.top_p == 0.9


SAMPLER = {
    "steps": 8,
    "guidance_scale": 1.5,
    "solver": "heun",
    "guidance_start": 0.75,
    "guidance_end": 0.25,
    "resamples": 2,
    "stable_steps": 2,
    "stable_distance": 0.5,
    "steering": [{"direction": [[1], [1]], "bias": [0], "scale": 3, "start": 0.75, "end": 0.5, "logistic": True}],
}
SAMPLING = {"temperature": 0.5, "top_k": 0, "top_p": 0.25, "repetition_penalty": 1.25}
PROBE = Steering(np.ones((2, 1)), np.zeros(1), 3.0, 0.75, 0.5, logistic=True)
OBJECTS = {"sampler": Sampler(**{**SAMPLER, "steering": [PROBE]}), "sampling": Sampling(**SAMPLING, seed=9)}
KEYWORDS = {**SAMPLER, **SAMPLING, "sampling_seed": 9}
MIXED = {**KEYWORDS, "steps": None, "top_k": None, "sampler": Sampler(steps=8), "sampling": Sampling(top_k=0)}


@pytest.mark.parametrize("settings", [OBJECTS, KEYWORDS, MIXED], ids=["objects", "keywords", "both"])
def test_every_setting_reaches_the_server(client: Client, behaviour: Behaviour, settings: dict) -> None:
    own = {"max_new_tokens": 5, "stop": ["a", "b"], "cache_salt": "mine", "top_logprobs": 0}
    flags = {"ignore_end": True, "with_latents": True, "print_special": True}
    client.generate([1, 2, 3], seed=NoiseSeed(5, 6), **own, **flags, **settings)
    probe = SAMPLER["steering"][0]
    sent = {**probe, "direction": tensor_from_array(probe["direction"]), "bias": tensor_from_array(probe["bias"])}
    assert behaviour.requests[-1] == GenerateRequest(
        prompt_ids={"ids": [1, 2, 3]},
        sampler={**SAMPLER, "solver": types_pb2.SOLVER_HEUN, "steering": [sent]},
        sampling={**SAMPLING, "seed": 9},
        seed={"base_seed": 5, "sample_id": 6},
        **own,
        **flags,
    )


def test_the_keywords_of_calls_are_the_fields_of_the_settings() -> None:
    call = set(get_type_hints(CallFields))
    assert set(get_type_hints(SamplerFields)) == call | {"sampler", *flat_fields(Sampler)}
    assert set(get_type_hints(SamplingFields)) == call | {"sampling", *flat_fields(Sampling)}
    own = {field.name for field in fields(GenerationRequest)} - {"prompt"}
    assert set(get_type_hints(GenerationFields)) == call | own | set(flat_fields(Sampler, Sampling))


def test_keywords_that_a_call_does_not_have_are_type_errors(client: Client) -> None:
    for call in (
        lambda: client.generate("Once", temprature=1),
        lambda: client.sample_latents(max_blocks=1, temperature=1),
        lambda: client.decode_latents([[97.0, 0.0]], steps=2),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            call()


@pytest.mark.parametrize("prompt", ["", "\0", "héllo 🎈 漢字", "<|endoftext|>"])
def test_any_text_goes_through_unchanged_and_what_is_not_given_is_left_to_the_server(client, behaviour, prompt):
    client.generate(prompt)
    assert behaviour.requests[-1] == GenerateRequest(prompt=prompt)


def test_metadata_has_key_and_request_id(server, behaviour: Behaviour) -> None:  # type: ignore[no-untyped-def]
    with Client(server.target, key="secret") as client:
        assert client.generate("Once", request_id="abc").request_id == "abc"
        assert len(client.generate("Once").request_id) == 32
    assert behaviour.metadata[0]["x-request-id"] == "abc"
    assert behaviour.metadata[0]["authorization"] == "Bearer secret"
    assert behaviour.metadata[0]["user-agent"].startswith("colaserve-client/")


# Leaving early


def test_break_cancels_at_the_server(client: Client, behaviour: Behaviour) -> None:
    behaviour.wait_after = 2
    for _ in client.stream("Once"):
        break
    gc.collect()
    wait_until(lambda: behaviour.running == 0)
    assert (behaviour.calls, behaviour.cancelled) == (1, 1)


def test_another_thread_may_cancel(client: Client, behaviour: Behaviour) -> None:
    behaviour.wait_after = 1
    stream = client.stream("Once")
    with when(lambda: behaviour.running == 1, stream.cancel), pytest.raises(Cancelled):
        list(stream)
    wait_until(lambda: behaviour.cancelled == 1)
    assert list(stream) == []


def test_a_stream_that_was_cancelled_between_two_messages_does_not_look_whole(client: Client) -> None:
    stream = client.stream("Once")
    next(stream)
    stream.cancel()
    with pytest.raises(Cancelled):
        list(stream)
    closed = client.stream("Once")
    next(closed)
    closed.close()  # by who reads it
    assert list(closed) == []


async def test_leaving_an_asyncio_stream_cancels_at_the_server(async_client: AsyncClient, behaviour: Behaviour) -> None:
    behaviour.wait_after = 2
    async with async_client.stream("Once") as stream:
        async for _ in stream:
            break
    async for _ in async_client.stream("Once"):
        break
    gc.collect()
    await eventually(lambda: behaviour.running == 0)
    assert (behaviour.calls, behaviour.cancelled) == (2, 2)


async def test_cancelling_the_task_cancels_at_the_server(async_client: AsyncClient, behaviour: Behaviour) -> None:
    behaviour.wait_after = 1
    generating = asyncio.create_task(async_client.generate("Once"))
    await eventually(lambda: behaviour.running == 1)
    generating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await generating
    await eventually(lambda: behaviour.cancelled == 1)


async def test_cancelling_an_asyncio_stream_while_it_waits_to_try_again_is_reported_at_once(server: FakeServer) -> None:
    server.behaviour.failures.append(Failure(grpc.StatusCode.UNAVAILABLE))
    patient = Retry(attempts=2, first_pause=100, longest_pause=100)
    async with AsyncClient(server.target, retry=patient) as client:
        stream = client.stream("Once")
        reading = asyncio.ensure_future(anext(stream))
        await eventually(lambda: server.behaviour.calls == 1)
        await asyncio.sleep(0.2)
        stream.cancel()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(reading, 20)
    assert server.behaviour.calls == 1


async def test_closing_an_asyncio_client_cancels_its_calls_and_says_so(server: FakeServer) -> None:
    server.behaviour.wait_after, server.behaviour.delay = 1, 20
    client = AsyncClient(server.target)
    calls = [asyncio.ensure_future(call) for call in (client.generate("Once"), client.tokenize("fox"))]
    await eventually(lambda: server.behaviour.calls == 2)
    await client.close()
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, Cancelled)
    with pytest.raises(Cancelled, match="client is closed"):
        await client.generate("Once")


# Batches


def test_a_batch_keeps_its_order_and_its_bound(client: Client, behaviour: Behaviour) -> None:
    behaviour.wait_after = 1
    prompts = [GenerationRequest("Once", max_new_tokens=n + 5) for n in range(12)]
    with when(lambda: behaviour.running == 3, behaviour.go_on.set):
        outcomes = list(client.generate_many(prompts, concurrency=3))
    assert [len(outcome.unwrap().token_ids) for outcome in outcomes] == list(range(5, 17))
    assert [outcome.request for outcome in outcomes] == prompts
    assert behaviour.most_running == 3


def test_an_endless_batch_is_read_only_as_far_as_needed(client: Client, behaviour: Behaviour) -> None:
    outcomes = client.generate_many((str(number) for number in itertools.count()), concurrency=2)
    assert next(outcomes).request.prompt == "0"
    behaviour.wait_after = 1
    started = time.monotonic()
    outcomes.close()
    assert time.monotonic() - started < 5
    wait_until(lambda: behaviour.running == 0)
    assert behaviour.calls <= 8


async def test_leaving_an_asyncio_batch_cancels_what_runs(async_client: AsyncClient, behaviour: Behaviour) -> None:
    outcomes = async_client.generate_many((str(number) for number in itertools.count()), concurrency=2)
    await anext(outcomes)
    behaviour.wait_after = 1
    await eventually(lambda: behaviour.running == 2)
    await outcomes.aclose()
    await eventually(lambda: behaviour.running == 0)
    assert behaviour.cancelled == 2


def test_threads_may_share_a_client(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: client.generate("Once", max_new_tokens=n % 9 + 1), range(40)))
    assert [len(result.token_ids) for result in results] == [n % 9 + 1 for n in range(40)]


PROBES = Probes(1.5, None, None, None, 0.1, 0.0)


def test_previews_come_between_the_chunks_of_blocks_and_in_the_result(client: Client) -> None:
    chunks = list(client.stream("Once", preview_every=2, with_latents=True))
    assert [chunk.preview is not None for chunk in chunks] == [True, False] * 7
    looks = [chunk.preview for chunk in chunks if chunk.preview is not None]
    assert [(look.index, look.step, look.text) for look in looks[:2]] == [(0, 2, " t??"), (1, 2, "re??")]
    assert looks[0].latents.shape == (4, 2)
    assert "".join(map(str, chunks)) == STORY.decode()
    whole = client.generate("Once", preview_every=2, with_latents=True)
    assert (whole.text, list(whole.previews), whole.probes) == (STORY.decode(), looks, ())
    assert client.generate("Once").previews == ()


def test_a_result_has_the_probes_of_its_blocks_alone(client: Client) -> None:
    assert client.generate("Once", with_probes=True, preview_every=1).probes == (PROBES,) * 7
    chunks = list(client.stream("Once", with_probes=True, preview_every=2))
    assert all(chunk.probes == PROBES for chunk in chunks)
    assert {chunk.probes for chunk in client.stream("Once")} == {None}


def test_sampled_latents_and_the_stages_have_them_too(server: FakeServer, client: Client, behaviour: Behaviour) -> None:
    blocks = list(client.sample_latents(max_blocks=2, preview_every=2, with_probes=True))
    found = [(block.index, block.step, block.provisional, block.probes) for block in blocks]
    assert found == [(index, *rest) for index in range(2) for rest in ((2, True, PROBES), (4, False, PROBES))]
    with PriorClient(server.target) as prior, DecoderClient(server.target) as decoder:
        list(prior.sample(max_blocks=1, seed=1, preview_every=3, with_probes=True))
        assert (behaviour.requests[-1].preview_every, behaviour.requests[-1].with_probes) == (3, True)
        with decoder.session(with_probes=True) as session:
            look, block = session.preview(blocks[0].latents), session.decode(blocks[1].latents)
        assert (look.provisional, look.token_ids, look.probes) == (True, block.token_ids, PROBES)
        assert not block.provisional


@pytest.mark.parametrize(("value", "fault"), [(1001, "got 1001, expected 0 to 1000"), (-1, "got -1"), (True, "True")])
def test_malformed_wishes_for_previews_are_refused_by_name(client: Client, value: int, fault: str) -> None:
    for ask in (client.stream, client.generate):
        with pytest.raises(InvalidRequest, match=f"^preview_every: .*{re.escape(fault)}"):
            ask("Once", preview_every=value)
    with pytest.raises(InvalidRequest, match=r"^preview_every: "):
        client.sample_latents(max_blocks=1, preview_every=value)
    with pytest.raises(InvalidRequest, match=r"^with_probes: got 1, expected true or false"):
        client.generate("Once", with_probes=1)  # type: ignore[arg-type]
