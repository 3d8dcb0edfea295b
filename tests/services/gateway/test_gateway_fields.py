"""Every field that a client may send has an effect on what is asked of the coordinator, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve_client.arrays import tensor_from_array
from colaserve_services import bounds
from colaserve_services.gateway.dialects import DIALECTS, messages, responses
from colaserve_services.gateway.dialects.chat import Message
from colaserve_services.gateway.dialects.fields import TextPart
from colaserve_services.gateway.dialects.openai import StreamOptions
from colaserve_services.gateway.dialects.refusals import UNSUPPORTED
from colaserve_services.gateway.dialects.transcript import chat_prompt, turns_of
from colaserve_services.gateway.settings import GatewaySettings
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import (
    CHAT,
    COMPLETIONS,
    COUNT,
    MESSAGES,
    RESPONSES,
    Running,
    asking,
    running,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAMPLER, SAMPLING = types_pb2.Sampler, types_pb2.Sampling

VALUES = {int: 3, float: 0.5}  # each within the range of every setting
SETTINGS = [
    ({field.flat: value}, GenerateRequest(**{message: bounds.wire({name: field}, {name: value})}))
    for message, table in (("sampler", bounds.SAMPLER), ("sampling", bounds.SAMPLING))
    for name, field in table.items()
    if name != "steering"
    for value in [next(iter(field.choices)) if field.choices else VALUES[field.kind]]
]
PROBE = types_pb2.Steering(direction=tensor_from_array([[1.0], [2.0]]), bias=tensor_from_array(3), scale=1, start=1,
                           logistic=True)  # fmt: skip
STEERED = SAMPLER(steering=[PROBE])
HALF = SAMPLER(guidance_start=0.75, guidance_end=0.25)
# fields and what they make of the GenerateRequest
ALL: list[tuple[dict[str, Any], GenerateRequest]] = [
    *SETTINGS,
    (
        {"steering": [{"direction": [[1], [2]], "bias": 3, "logistic": True}]},
        GenerateRequest(sampler={"steering": [PROBE]}),
    ),
    ({"top_k": -1}, GenerateRequest(sampling=SAMPLING(top_k=0))),
    ({"seed": 9}, GenerateRequest(seed=types_pb2.NoiseSeed(base_seed=9))),
    ({"guidance_interval": [0.75, 0.25]}, GenerateRequest(sampler=HALF)),
    ({"guidance_interval": [0.25, 0.75]}, GenerateRequest(sampler=HALF)),
    ({"ignore_eos": True}, GenerateRequest(ignore_end=True)),
    ({"skip_special_tokens": False}, GenerateRequest(print_special=True)),
    ({"cache_salt": "mine"}, GenerateRequest(cache_salt="mine")),
]
BOTH: list[tuple[dict[str, Any], GenerateRequest]] = [
    *ALL,
    ({"max_tokens": 5}, GenerateRequest(max_new_tokens=5)),
    ({"stop": ["a", "b"]}, GenerateRequest(stop=["a", "b"])),
]
FIRST = GenerateRequest(max_new_tokens=9)  # of messages, which must say how many
MADE = {
    CHAT: [
        *BOTH,
        ({"guided_choice": ["a", " b"]}, GenerateRequest(choices=[" a", " b"])),  # an answer loses its first space
        ({"max_completion_tokens": 5}, GenerateRequest(max_new_tokens=5)),
        ({"logprobs": True}, GenerateRequest(top_logprobs=0)),
        ({"logprobs": False, "top_logprobs": 0}, GenerateRequest()),
        ({"logprobs": True, "top_logprobs": 4}, GenerateRequest(top_logprobs=4)),
    ],
    COMPLETIONS: [
        *BOTH,
        ({"guided_choice": ["a", " b"]}, GenerateRequest(choices=["a", " b"])),
        ({"logprobs": 3}, GenerateRequest(top_logprobs=3)),
        ({"stream": True, "preview_every": 3}, GenerateRequest(preview_every=3)),
        ({"stream": True, "with_probes": True}, GenerateRequest(with_probes=True)),
        ({"stream": True, "with_latents": True}, GenerateRequest(with_latents=True)),
    ],
    RESPONSES: [*ALL, ({"max_output_tokens": 5}, GenerateRequest(max_new_tokens=5))],
    MESSAGES: [
        *ALL,
        ({"max_tokens": 5}, GenerateRequest(max_new_tokens=5)),
        ({"stop_sequences": ["a", "b"]}, GenerateRequest(stop=["a", "b"])),
    ],
}
# Fields that change the answer, the number of calls or their metadata; each has its own test.
SEEN_ELSEWHERE = {"model", "n", "stream", "stream_options", "user", "messages", "prompt", "best_of", "echo", "suffix",
                  "input", "instructions", "metadata", "system"}  # fmt: skip
PUBLISHED = json.loads(Path(__file__).with_name("published_fields.json").read_text(encoding="utf-8"))
REQUESTS = {dialect.path: dialect.schema for dialect in DIALECTS}
PARTS = (Message, TextPart, StreamOptions, responses.InputMessage, responses.InputPart, messages.ConversationMessage,
         messages.TextBlock, messages.Metadata)  # fmt: skip


async def ask(shared: Running, path: str, **fields: Any):
    return await shared.http.post(path, json=asking(path, "Where?", **fields))


async def check_asked(shared: Running, path: str, fields: dict[str, Any], addition: GenerateRequest) -> None:
    """These fields make this of the request that the coordinator gets, and nothing else."""
    response = await ask(shared, path, **fields)
    assert response.status_code == 200, response.text
    expected = GenerateRequest(prompt="Where?")
    expected.MergeFrom(FIRST if path == MESSAGES else GenerateRequest())
    expected.MergeFrom(addition)
    assert shared.fake.seen[-1].request == expected


@pytest.mark.parametrize("path", MADE)
async def test_the_walk_covers_every_field_of_the_schemas(path: str):
    assert set(REQUESTS[path].model_fields) <= {name for fields, _ in MADE[path] for name in fields} | SEEN_ELSEWHERE


async def test_every_field_of_the_published_schemas_is_honoured_or_has_its_row_of_refusals():
    kinds = {kind.__name__: kind for kind in (*REQUESTS.values(), messages.CountTokensRequest, *PARTS)}
    assert kinds.keys() == PUBLISHED.keys()
    for name, published in PUBLISHED.items():
        rows = UNSUPPORTED.get(name, UNSUPPORTED["request"])
        unknown = set(published["fields"]) - kinds[name].model_fields.keys() - rows.keys()
        assert not unknown, f"{name} of {published['schema']}"


@pytest.mark.parametrize(
    ("path", "fields", "addition"),
    [(path, *made) for path, all_made in MADE.items() for made in all_made],
    ids=lambda value: str(value)[:40].strip(),
)
async def test_a_field_reaches_the_coordinator_and_nothing_else_does(shared, path, fields, addition):
    await check_asked(shared, path, fields, addition)


@pytest.mark.parametrize("path", MADE)
async def test_a_request_without_options_sets_nothing_but_the_prompt(shared: Running, path: str):
    required = {"messages", "prompt", "input", "max_tokens" if path == MESSAGES else ""}
    unset = dict.fromkeys(REQUESTS[path].model_fields.keys() - required)
    await check_asked(shared, path, unset, GenerateRequest())


async def test_token_ids_go_as_ids(shared: Running):
    await shared.complete([[1, 2], [3]])
    assert [list(seen.request.prompt_ids.ids) for seen in shared.fake.seen[-2:]] == [[1, 2], [3]]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [[1], [300]]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "b", "c", "d"]}, "prompt"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    *[(COMPLETIONS, fields, next(iter(fields))) for fields in [
        {"preview_every": 1001, "stream": True}, {"preview_every": True, "stream": True}, {"with_latents": 1},
        {"preview_every": 1}, {"with_probes": True}, {"with_latents": True},
        {"with_probes": True, "stream": True, "suffix": "end"},
    ]],
    (CHAT, {"preview_every": 1, "stream": True}, "preview_every"),
    (CHAT, {"suffix": "end"}, "suffix"),
    *[(RESPONSES, fields, next(iter(fields))) for fields in [
        {"input": []}, {"input": 3}, {"input": None}, {"store": True}, {"previous_response_id": "resp_1"},
        {"metadata": {"a": 1}}, {"metadata": {"a" * 65: ""}}, {"max_output_tokens": 0}, {"stream": "yes"},
    ]],
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input[0].content[0].type"),
    *[(path, fields, next(iter(fields))) for path in (CHAT, COMPLETIONS) for fields in [
        {"max_tokens": 0}, {"max_tokens": 2**32}, {"max_tokens": "5"}, {"max_tokens": 5.5}, {"n": 0}, {"n": 4},
        {"stop": ["a", "b", "c", "d", "e"]}, {"stop": ""}, {"stop": [""]}, {"stop": 3}, {"stream": "yes"},
        {"stream_options": {"include_usage": True}}, {"temperature": -0.1}, {"temperature": "hot"}, {"top_p": 0},
        {"top_p": 1.1}, {"seed": -1}, {"seed": 2**63}, {"seed": 1.5}, {"user": 5}, {"user": "u" * 257},
        {"top_k": -2}, {"repetition_penalty": 0}, {"guidance_scale": -1}, {"guidance_scale": 1001}, {"steps": 0},
        {"steps": 1001}, {"solver": "rk4"}, {"guidance_interval": [1]}, {"guidance_interval": "all"},
        {"ignore_eos": 1}, {"logit_bias": {"5": 1}}, {"frequency_penalty": 0.5}, {"presence_penalty": -1},
        {"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"nonsense": 1},
        {"frequency_penalty": False}, {"store": 0},
        {"parallel_tool_calls": True}, {"modalities": ["audio"]}, {"reasoning_effort": "high"}, {"store": True},
    ]],
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param"), WRONG, ids=lambda value: str(value)[:60])
async def test_what_cannot_be_honoured_is_refused_by_name(shared, path, fields, param):
    shared.fake.seen.clear()
    response = await ask(shared, path, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{param}: ")
    assert not shared.fake.seen


def placed(place: str, extra: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A path, and a request with something extra in a part of it."""
    text = {"type": "text", "text": "a", **extra}
    user = {"role": "user", "content": "a", **extra}
    path, fields = {
        "request": (CHAT, extra),
        "StreamOptions": (CHAT, {"stream": True, "stream_options": extra}),
        "Message": (CHAT, {"messages": [user]}),
        "TextPart": (CHAT, {"messages": [{"role": "user", "content": [text]}]}),
        "ResponsesRequest": (RESPONSES, extra),
        "InputMessage": (RESPONSES, {"input": [user]}),
        "InputPart": (RESPONSES, {"input": [{"role": "user", "content": [{**text, "type": "input_text"}]}]}),
        "MessagesRequest": (MESSAGES, extra),
        "CountTokensRequest": (COUNT, {"messages": [{"role": "user", "content": "a"}], **extra}),
        "ConversationMessage": (MESSAGES, {"messages": [user]}),
        "TextBlock": (MESSAGES, {"messages": [{"role": "user", "content": [text]}]}),
        "Metadata": (MESSAGES, {"metadata": extra}),
    }[place]
    return path, fields if path == COUNT else asking(path, "a", **fields)


WHERE = {"request": "", "StreamOptions": "stream_options.", "Message": "messages[0].",
         "TextPart": "messages[0].content[0].", "ResponsesRequest": "", "InputMessage": "input[0].",
         "InputPart": "input[0].content[0].", "MessagesRequest": "", "CountTokensRequest": "",
         "ConversationMessage": "messages[0].", "TextBlock": "messages[0].content[0].",
         "Metadata": "metadata."}  # fmt: skip


async def send(shared: Running, place: str, **extra: Any):
    path, body = placed(place, extra)
    return await shared.http.post(path, json=body)


@pytest.mark.parametrize(("place", "name"), [(place, name) for place in UNSUPPORTED for name in UNSUPPORTED[place]])
async def test_an_unsupported_field_passes_where_it_asks_for_nothing_and_only_there(shared, place, name):
    neutral, why = UNSUPPORTED[place][name]
    for value in (None, *neutral):
        assert (await send(shared, place, **{name: value})).status_code == 200
    refused = await send(shared, place, **{name: {"some": "thing"}})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == f"{WHERE[place]}{name}: not supported: {why}"
    assert refused.json()["error"].get("param") == (WHERE[place] + name if "code" in refused.json()["error"] else None)


async def test_an_unknown_field_is_refused_by_its_place_or_passes_everywhere(shared: Running):
    async with running(FakeGeneration(), GatewaySettings(allow_unknown_fields=True)) as lenient:
        for place, where in WHERE.items():
            refused = (await send(shared, place, nonsense=None)).json()["error"]
            assert refused["message"] == f"{where}nonsense: unknown field"
            assert (await send(lenient, place, nonsense=1)).status_code == 200
        assert (await lenient.chat(tools=[{}])).status_code == 400


async def test_every_part_of_a_request_has_its_row_of_refusals():
    parts = {kind.__name__ for kind in PARTS}
    named = {"request", "ResponsesRequest", "MessagesRequest", "CountTokensRequest"}
    assert UNSUPPORTED.keys() == WHERE.keys() == parts | named


async def test_an_answer_can_be_sent_back_as_a_message(shared: Running):
    said = (await shared.chat()).json()["choices"][0]["message"]
    said |= dict.fromkeys(["annotations", "audio", "function_call", "tool_calls"])
    messages = [{"role": "user", "content": "a"}, said, {"role": "user", "content": "b"}]
    assert (await shared.chat(messages=messages)).status_code == 200
    assert shared.fake.seen[-1].request.prompt.startswith("User: a\nAssistant: Paris")


async def test_every_message_field_is_walked():
    assert set(Message.model_fields) == {"role", "content", "name", "type"}


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "prompt"), ({"prompt": "a", "messages": []}, "messages"), ({"prompt": "a", "model": "x"}, "model"),
     ({"prompt": "a", "extra": 1}, "extra"),
     ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt")],
)  # fmt: skip
async def test_tokenize_refuses_what_it_cannot_do(shared: Running, body: dict[str, Any], param: str):
    response = await shared.http.post("/tokenize", json=body)
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("tokens", [None, [-1], [2**32], ["a"], [1.5]])
async def test_detokenize_refuses_what_is_no_list_of_ids(shared: Running, tokens: object):
    response = await shared.http.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")


SEVERAL = [("system", "Be short."), ("user", "Hi"), ("assistant", " Hello."), ("user", "Bye")]


@pytest.mark.parametrize(
    ("messages", "frame", "prompt"),
    [
        ([("user", " as it is\n")], "", " as it is\n"),
        ([("user", "Hi {prompt}")], "Q: {prompt}\nA:", "Q: Hi {prompt}\nA:"),
        ([("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}])], "", "a b"),
        ([("user", "x", "ann")], "not for {prompt}", "User (ann): x\nAssistant:"),
        ([("system", "x")], "", "System: x\nAssistant:"),
        ([("developer", "x")], "", "System: x\nAssistant:"),
        ([("assistant", "x")], "", "Assistant: x\nAssistant:"),
        (SEVERAL, "not for {prompt}", "System: Be short.\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"),
    ],
)
async def test_one_message_of_an_unnamed_user_is_the_prompt_and_others_make_a_transcript(messages, frame, prompt):
    made = [Message(**dict(zip(("role", "content", "name"), one, strict=False))) for one in messages]
    assert chat_prompt(turns_of(made), frame) == prompt
