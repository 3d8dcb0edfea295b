"""The anthropic client against a running gateway: sync, async, whole and streamed, counts and refusals.
Usage: use_anthropic.py URL MODEL"""

import asyncio
import sys
from typing import Any

import anthropic
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

ASK = "Question: What is the capital of France? Answer:"
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def main(url: str, model: str) -> None:
    made: dict[str, Any] = {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": 60}
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": ASK}],
        "max_tokens": 9,
        "extra_body": {"seed": 1, "temperature": 0, "top_k": 50, "top_p": 0.9, "ignore_eos": True},
    }
    with anthropic.Anthropic(**made) as client:
        expected = whole_and_streamed(client, asked)
        others(client, asked)
    with anthropic.Anthropic(**made | {"api_key": None, "auth_token": "none"}) as bearer:
        assert text_of(bearer.messages.create(**asked)) == expected
    assert asyncio.run(asynchronous(anthropic.AsyncAnthropic(**made), asked)) == expected


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


def whole_and_streamed(client: anthropic.Anthropic, asked: dict[str, Any]) -> str:
    message = client.messages.create(**asked)
    Message.model_validate(message.to_dict())  # every field of the published schema, with its type
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 9), message
    counted = client.messages.count_tokens(model=asked["model"], messages=asked["messages"])
    assert counted.input_tokens == message.usage.input_tokens, counted
    events = list(client.messages.create(stream=True, **asked))
    for event in events:
        EVENT.validate_python(event.to_dict())
    kinds = [event.type for event in events if event.type != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == text_of(message)
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text_of(message)
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.input_tokens) == ("max_tokens", message.usage.input_tokens), final
    assert final.usage.output_tokens == 9, final
    return text_of(message)


def others(client: anthropic.Anthropic, asked: dict[str, Any]) -> None:
    """A system message, a stop sequence, and refusals."""
    whole = text_of(client.messages.create(**asked | {"max_tokens": 64, "system": "Be short."}))
    stop = whole[len(whole) // 2 :][:3]
    message = client.messages.create(**asked | {"max_tokens": 64, "system": "Be short.", "stop_sequences": [stop]})
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop), (message, whole)
    assert text_of(message) == whole[: whole.index(stop)], (message, whole)
    for kind, fields in (
        (anthropic.BadRequestError, {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
        (anthropic.NotFoundError, {"model": "claude"}),
    ):
        try:
            refused = str(client.messages.create(**asked | fields))
        except kind as error:
            refused = error.message
        assert f"{next(iter(fields))}: " in refused, refused


async def asynchronous(client: anthropic.AsyncAnthropic, asked: dict[str, Any]) -> str:
    async with client:
        text = text_of(await client.messages.create(**asked))
        async with client.messages.stream(**asked) as stream:
            assert "".join([part async for part in stream.text_stream]) == text
    return text


main(*sys.argv[1:])
