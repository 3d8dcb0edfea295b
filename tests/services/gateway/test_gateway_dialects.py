"""Responses and messages, and what all dialects have in common."""

import json
from typing import Any

import httpx
import pytest

from colaserve_services.errors import InvalidRequest, Overloaded, Unavailable
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.rpc.auth import Keys
from tests.services.gateway.fake_generation import SAYS
from tests.services.gateway.running_gateway import (
    BUDGET,
    COUNT,
    MESSAGES,
    RESPONSES,
    Running,
    asking,
)

WHOLE = len(SAYS.encode())


def said(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


def body(path: str, text: str, tokens: int, **fields: Any) -> dict[str, Any]:
    return asking(path, text, **{BUDGET[path]: tokens}, **fields)


def named_events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of a stream."""
    lines = [event.split("\ndata: ") for event in response.text.split("\n\n") if event]
    return [(name.removeprefix("event: "), json.loads(data)) for name, data in lines]


BEFORE = ["created", "in_progress", "output_item.added", "content_part.added"]
AFTER = ["output_text.done", "content_part.done", "output_item.done"]


@pytest.mark.parametrize(("tokens", "last"), [(200, "completed"), (9, "incomplete")])
async def test_a_response_comes_as_numbered_events_that_end_in_the_whole_one(gateway: Running, tokens: int, last: str):
    fields = {"instructions": "Be short.", "metadata": {"a": "b"}, "user": "me"}
    whole = (await gateway.http.post(RESPONSES, json=body(RESPONSES, "Where?", tokens, **fields))).json()
    streamed = await gateway.http.post(RESPONSES, json=body(RESPONSES, "Where?", tokens, stream=True, **fields))
    assert "[DONE]" not in streamed.text
    names, found = zip(*named_events(streamed), strict=True)
    assert [event["type"] for event in found] == list(names)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    deltas = [event["delta"] for event in found if event["type"].endswith(".delta")]
    kinds = [*BEFORE, *["output_text.delta"] * len(deltas), *AFTER, last]
    assert list(names) == [f"response.{kind}" for kind in kinds]
    assert "".join(deltas) == found[-4]["text"] == whole["output"][0]["content"][0]["text"]
    changing = {"id": None, "created_at": None, "completed_at": None, "output": None}
    assert found[-1]["response"] | changing == whole | changing
    assert (whole["instructions"], whole["metadata"], whole["store"]) == ("Be short.", {"a": "b"}, False)
    assert (whole["temperature"], whole["top_p"]) == (0, 0.9), "the server's defaults, as they were written"
    assert gateway.fake.seen[0].request.prompt == "System: Be short.\nUser: Where?\nAssistant:"


async def test_a_responses_output_can_be_sent_back_as_input(gateway: Running):
    output = (await gateway.http.post(RESPONSES, json={"input": "a"})).json()["output"]
    parts = [{"type": "input_text", "text": "b"}]
    again = await gateway.http.post(RESPONSES, json={"input": [said("a"), *output, {"role": "user", "content": parts}]})
    assert again.status_code == 200, again.text
    assert gateway.fake.seen[-1].request.prompt.startswith("User: a\nAssistant: Paris")


async def test_a_response_that_fails_in_the_middle_says_so_in_its_last_event(gateway: Running):
    gateway.fake.failure, gateway.fake.fail_after = Overloaded("full"), 2
    name, last = named_events(await gateway.http.post(RESPONSES, json={"input": "x", "stream": True}))[-1]
    assert name == "response.failed"
    assert (last["response"]["status"], last["response"]["output"]) == ("failed", [])
    assert last["response"]["error"] == {"code": "rate_limit_exceeded", "message": "full"}


async def test_a_message_comes_as_blocks_between_its_start_and_stop(gateway: Running):
    streamed = named_events(await gateway.http.post(MESSAGES, json=body(MESSAGES, "Where?", 200, stream=True)))
    names, found = zip(*streamed, strict=True)
    deltas = [event["delta"]["text"] for event in found if event["type"] == "content_block_delta"]
    kinds = ["message_start", "content_block_start", *["content_block_delta"] * len(deltas), "content_block_stop"]
    assert [event["type"] for event in found] == list(names) == [*kinds, "message_delta", "message_stop"]
    assert "".join(deltas) == SAYS[1:]
    assert found[0]["message"]["usage"] == {"input_tokens": 6, "output_tokens": 0}
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"] == {"input_tokens": 6, "output_tokens": WHOLE}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_message_names_the_stop_sequence_that_ended_it(gateway: Running, stream: bool):
    fields = {"stop_sequences": ["never", " of"], "stream": stream}
    response = await gateway.http.post(MESSAGES, json=body(MESSAGES, "x", 200, **fields))
    end = named_events(response)[-2][1]["delta"] if stream else response.json()
    assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", " of")


async def test_a_messages_system_its_blocks_and_its_begun_answer_make_the_prompt(gateway: Running):
    block = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": block}, said("It is", "assistant")]
    asked = {"system": block, "messages": messages, "metadata": {"user_id": "me"}}
    answer = (await gateway.http.post(MESSAGES, json={**asked, "max_tokens": 200})).json()
    prompt = "System: Be short.\nUser: Be short.\nAssistant: It is"
    assert gateway.fake.seen[0].request.prompt == prompt
    assert answer["content"][0]["text"] == SAYS, "after a begun answer the first space belongs to the text"
    del asked["metadata"]
    assert (await gateway.http.post(COUNT, json=asked)).json() == {"input_tokens": len(prompt)}
    streamed = named_events(await gateway.http.post(MESSAGES, json={**asked, "max_tokens": 200, "stream": True}))
    assert streamed[2][1]["delta"]["text"].startswith(" ")


async def test_errors_on_anthropics_paths_have_its_shape(gateway: Running):
    def shape(response: httpx.Response) -> tuple[int, str]:
        error = response.json()
        assert set(error) == {"type", "error", "request_id"}
        assert error["request_id"] == response.headers["x-request-id"]
        return response.status_code, error["error"]["type"]

    send = gateway.http.post
    assert shape(await send(MESSAGES, json={"messages": [said("x")]})) == (400, "invalid_request_error")
    assert shape(await send(COUNT, json={"messages": []})) == (400, "invalid_request_error")
    assert shape(await send(MESSAGES, json=body(MESSAGES, "x", 1) | {"model": "y"})) == (404, "not_found_error")
    assert shape(await gateway.http.get(MESSAGES)) == (405, "invalid_request_error")
    assert shape(await send(MESSAGES + "/batches", json={})) == (404, "not_found_error")
    for failure, expected in (
        (Overloaded("full"), (429, "rate_limit_error")),
        (Unavailable("down"), (503, "api_error")),
        (InvalidRequest("stop", "too long"), (400, "invalid_request_error")),
    ):
        gateway.fake.failure = failure
        response = await send(MESSAGES, json=body(MESSAGES, "x", 1, stream=True))
        assert shape(response) == expected
    assert response.json()["error"]["message"] == "stop_sequences: too long"


async def test_a_message_that_fails_in_the_middle_ends_in_an_error_event(gateway: Running):
    gateway.fake.failure, gateway.fake.fail_after = Unavailable("down"), 2
    name, last = named_events(await gateway.http.post(MESSAGES, json=body(MESSAGES, "x", 200, stream=True)))[-1]
    assert (name, last["error"]) == ("error", {"type": "api_error", "message": "down"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"x-api-key": "secret"}, 200), ({"authorization": "Bearer secret"}, 200), ({"x-api-key": "wrong"}, 401),
     ({"authorization": "Bearer wrong", "x-api-key": "secret"}, 401), ({}, 401)],
)  # fmt: skip
async def test_a_key_comes_as_bearer_or_as_x_api_key(start, headers: dict[str, str], status: int):
    keyed = await start(GatewaySettings(keys=Keys(["secret"])))
    response = await keyed.http.post(MESSAGES, json=body(MESSAGES, "x", 1), headers=headers)
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["type"] == "authentication_error"
