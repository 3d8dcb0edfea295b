"""Clients of OpenAI's API, unmodified."""

from collections.abc import AsyncIterator

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from colaserve_services.errors import Overloaded, StepFailed
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.rpc.auth import Keys
from tests.services.gateway.fake_generation import SAYS
from tests.services.gateway.running_gateway import Running

ANSWER = SAYS[1:]  # of a chat, which leaves out the first space
MODEL = "fake/cola"


@pytest.fixture
async def keyed(start) -> Running:
    return await start(GatewaySettings(keys=Keys(["secret"])))


@pytest.fixture
async def client(keyed: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


async def test_openai_chats_and_reads_the_usage(client: openai.AsyncOpenAI, keyed: Running):
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=200,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].token == "!"
    assert answer._request_id == keyed.fake.seen[-1].header("x-request-id")


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_does_not_try_a_failed_step_again(keyed: Running, client: openai.AsyncOpenAI, stream: bool):
    keyed.fake.failure = StepFailed("this request's step failed")
    with pytest.raises(openai.InternalServerError) as caught:
        await client.with_options(max_retries=3).completions.create(model=MODEL, prompt="Hi", stream=stream)
    assert caught.value.code == "step_failed"
    assert len(keyed.fake.seen) == 1


async def test_openais_stream_helper_ends_with_the_whole_answer_and_its_usage(client: openai.AsyncOpenAI):
    messages = [{"role": "user", "content": "Hi"}]
    options = {"max_tokens": 200, "stream_options": {"include_usage": True}}
    async with client.chat.completions.stream(model=MODEL, messages=messages, **options) as stream:
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(SAYS.encode())


async def test_openai_embeds_texts_and_tokens(client: openai.AsyncOpenAI):
    """As base64, which it asks for unless told otherwise, and as numbers."""
    for one in ("fox", [102, 111, 120]):
        answer = await client.embeddings.create(model=MODEL, input=one, dimensions=16, user="me")
        assert answer.data[0].embedding[:4] == [3, 1, 1, 0]  # tokens, the mean, of length 1
        assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == (MODEL, 3, 3)
    for several in (["a"] * 600, [[97]] * 600):
        answer = await client.embeddings.create(
            model=MODEL, input=[*several, several[0] * 2], encoding_format="float",
            extra_body={"pooling": "last_block", "normalize": False},
        )  # fmt: skip
        assert [each.index for each in answer.data] == list(range(601))
        assert [each.embedding[:4] for each in answer.data] == [*[[1, 2, 0, 0]] * 600, [2, 2, 0, 0]]
        assert answer.usage.prompt_tokens == 602
    wrong: list[tuple[dict[str, object], str]] = [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": [1, -1]}, "input"),
        ({"input": "a" * 101}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"extra_body": {"pooling": "per_block"}}, "pooling"),
        ({"extra_body": {"store": True}}, "store"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.embeddings.create(**{"model": MODEL, "input": "a"} | fields)
        assert refused.value.param == param


async def test_openais_errors_are_raised_with_their_param(client: openai.AsyncOpenAI, keyed: Running):
    chat = client.chat.completions.create
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError) as bad:
        await chat(model=MODEL, messages=messages, tools=[{"type": "function", "function": {"name": "f"}}])
    assert bad.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        await chat(model="gpt-4", messages=messages)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    keyed.fake.failure = Overloaded("full", 7)
    with pytest.raises(openai.RateLimitError) as full:
        await chat(model=MODEL, messages=messages)
    assert full.value.response.headers["retry-after"] == "7"


async def test_an_error_in_the_middle_of_a_stream_is_raised(client: openai.AsyncOpenAI, keyed: Running):
    keyed.fake.failure, keyed.fake.fail_after = Overloaded("full"), 2
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="full"):
        async for _ in stream:
            pass


async def test_langchain_chats_streams_and_batches(keyed: Running):
    chat = ChatOpenAI(model=MODEL, base_url=f"{keyed.url}/v1", api_key="secret", max_tokens=200, temperature=0)
    answer = await chat.ainvoke([SystemMessage("Be short."), HumanMessage("Hi")])
    assert answer.content == ANSWER
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == len(SAYS.encode())
    assert keyed.fake.seen[0].request.prompt == "System: Be short.\nUser: Hi\nAssistant:"
    assert "".join([str(chunk.content) async for chunk in chat.astream("Hi")]) == ANSWER
    assert [one.content for one in await chat.abatch(["a", "b", "c"])] == [ANSWER] * 3
