"""`suffix`: a hole between two texts."""

from typing import Any

import pytest

from colaserve.v1 import types_pb2
from colaserve.v1.latent_service_pb2 import InfillRequest, InfillSegment
from colaserve_services.errors import InvalidRequest
from tests.services.gateway.running_gateway import Running, events


async def test_a_suffix_makes_a_hole_of_max_tokens_whose_text_is_the_answer(gateway: Running):
    fields = {"max_tokens": 5, "seed": 3, "steps": 4, "temperature": 0.5}
    answer = (await gateway.complete("My name is ", suffix=".", **fields)).json()
    assert answer["choices"] == [{"index": 0, "text": "_____", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
    assert gateway.fake.infill.seen == [
        InfillRequest(
            segments=[InfillSegment(text="My name is "), InfillSegment(token_count=5), InfillSegment(text=".")],
            sampler=types_pb2.Sampler(steps=4),
            sampling=types_pb2.Sampling(temperature=0.5),
            seed=types_pb2.NoiseSeed(base_seed=3),
        )
    ]
    assert not gateway.fake.seen


async def test_a_coordinator_of_an_earlier_version_names_no_reason_and_the_hole_counts_as_full(gateway: Running):
    gateway.fake.infill.older = True
    [choice] = (await gateway.complete("a", suffix="b", max_tokens=3)).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("___", "length")


async def test_a_streamed_hole_comes_in_one_chunk(gateway: Running):
    response = await gateway.complete(["a"], suffix="b", stream=True, stream_options={"include_usage": True})
    first, usage = events(response)
    assert first["choices"][0]["text"] == "_" * 32
    assert usage["usage"]["completion_tokens"] == 32


@pytest.mark.parametrize("suffix", ["", None])
async def test_an_empty_suffix_is_none(gateway: Running, suffix: str | None):
    assert (await gateway.complete("a", suffix=suffix, n=2, logprobs=0)).status_code == 200
    assert not gateway.fake.infill.seen


@pytest.mark.parametrize(
    "fields",
    [{"n": 2}, {"logprobs": 0}, {"echo": True}, {"stop": "x"}, {"stop": ["x"]}, {"ignore_eos": True},
     {"skip_special_tokens": False}, {"prompt": ["a", "b"]}, {"prompt": [1, 2]}],
)  # fmt: skip
async def test_what_a_hole_cannot_honour_is_refused_by_name(gateway: Running, fields: dict[str, Any]):
    error = (await gateway.http.post("/v1/completions", json={"prompt": "a", "suffix": "b", **fields})).json()["error"]
    assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_parameter")
    assert not gateway.fake.infill.seen


async def test_the_same_fields_pass_where_they_ask_for_nothing(gateway: Running):
    neutral = {"n": 1, "best_of": 1, "logprobs": None, "echo": False, "stop": [], "ignore_eos": False}
    assert (await gateway.complete("a", suffix="b", **neutral, skip_special_tokens=True)).status_code == 200


@pytest.mark.parametrize(
    ("prompt", "field", "param"),
    [("a", "segments[0].text", "prompt"), ("a", "segments[1]", "max_tokens"), ("a", "segments[2]", "suffix"),
     ("", "segments[0]", "max_tokens"), ("", "segments[1].text", "suffix"), ("a", "sampler.steps", "steps")],
)  # fmt: skip
async def test_a_refusal_names_what_the_client_sent(gateway: Running, prompt: str, field: str, param: str):
    gateway.fake.infill.failure = InvalidRequest(field, "too long")
    response = await gateway.complete(prompt, suffix="b")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert response.json()["error"]["message"] == f"{param}: too long"
