"""The openai client against a running gateway: chats, completions and responses, sync, async, whole and streamed, and
refusals. Usage: use_openai.py URL MODEL"""

import asyncio
import sys
from typing import Any

import openai
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

ASK = "Question: What is the capital of France? Answer:"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
BEFORE = ["created", "in_progress", "output_item.added", "content_part.added"]
AFTER = ["output_text.done", "content_part.done", "output_item.done"]


def main(url: str, model: str) -> None:
    made: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
    with openai.OpenAI(**made) as client:
        whole_and_streamed(client, model, more=True)
        expected = whole_and_streamed(client, model, more=False)
        refusals(client, model)
    assert asyncio.run(asynchronous(openai.AsyncOpenAI(**made), model)) == expected


def whole_and_streamed(client: openai.OpenAI, model: str, more: bool) -> str:
    """The text that all ways of asking must give. `more`: on after an end token, so that the budget ends it."""
    common: dict[str, Any] = {"model": model, "extra_body": {"seed": 1, "ignore_eos": more}, "temperature": 0}
    messages: Any = [{"role": "user", "content": ASK}]
    framed: Any = client.post("../tokenize", body={"messages": messages}, cast_to=dict[str, Any])  # type: ignore[type-var]
    text = client.completions.create(prompt=framed["tokens"], max_tokens=9, **common).choices[0].text
    chat = client.chat.completions.create(messages=messages, max_tokens=9, **common)
    assert chat.choices[0].message.content == text.removeprefix(" "), (chat, text)
    asked = {"input": ASK, "instructions": None, "max_output_tokens": 9, "metadata": {"a": "b"}, **common}
    response = client.responses.create(**asked)
    Response.model_validate(response.to_dict())  # every field of the published schema, with its type
    assert response.metadata == {"a": "b"}, response
    finished = {"stop": "completed", "length": "incomplete"}[chat.choices[0].finish_reason]
    assert response.status == ("incomplete" if more else finished), response
    assert response.output_text == chat.choices[0].message.content, response
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.total_tokens == chat.usage.total_tokens
    events = list(client.responses.create(stream=True, **asked))
    for event in events:
        EVENT.validate_python(event.to_dict())
    check(events, response)
    if response.status == "completed":  # the client's helper knows no other end
        with client.responses.stream(**asked) as stream:
            assert stream.until_done().get_final_response().output_text == response.output_text
    again: Any = [*messages, *[item.to_dict() for item in response.output], {"role": "user", "content": "And Peru?"}]
    assert client.responses.create(**asked | {"input": again}).output_text
    return response.output_text


def check(events: list[Any], response: Response) -> None:
    """The events of a stream of the same text."""
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    kinds = [*BEFORE, *["output_text.delta"] * len(deltas), *AFTER, response.status]
    assert [event.type for event in events] == [f"response.{kind}" for kind in kinds], events
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(deltas) == response.output_text


def refusals(client: openai.OpenAI, model: str) -> None:
    for fields in ({"store": True}, {"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]}):
        try:
            client.responses.create(model=model, input="x", **fields)  # type: ignore[call-overload]
            refused = None
        except openai.BadRequestError as error:
            refused = error.param
        assert refused == next(iter(fields)), fields


async def asynchronous(client: openai.AsyncOpenAI, model: str) -> str:
    common: dict[str, Any] = {"model": model, "input": ASK, "max_output_tokens": 9, "temperature": 0}
    async with client:
        response = await client.responses.create(extra_body={"seed": 1}, **common)
        stream = await client.responses.create(extra_body={"seed": 1}, stream=True, **common)
        check([event async for event in stream], response)
    return response.output_text


main(*sys.argv[1:])
