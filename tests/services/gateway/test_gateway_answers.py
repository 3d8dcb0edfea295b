"""What is answered when all goes well, and with `suffix`: a hole between two texts."""

import base64
import math
import re
from typing import Any

import numpy as np
import pytest

from colaserve.v1 import types_pb2
from colaserve.v1.latent_service_pb2 import InfillRequest, InfillSegment
from colaserve_services.errors import InvalidRequest, Unavailable
from tests.bytes_model import BLOCK, SPACE
from tests.services.gateway.fake_generation import SAYS
from tests.services.gateway.running_gateway import CHAT, COMPLETIONS, Running, events

WHOLE = len(SAYS.encode())


async def test_a_chat_answer_holds_the_text_the_reason_and_the_usage(gateway: Running):
    answer = (await gateway.chat("Where?", max_tokens=200)).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "fake/cola"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": SAYS[1:], "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": WHOLE, "total_tokens": 6 + WHOLE}


async def test_the_budget_is_thirty_two_tokens_and_ends_the_text_with_length(gateway: Running):
    answer = (await gateway.complete("Where?")).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": SAYS[:32], "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["completion_tokens"] == 32


async def test_a_chat_stream_opens_with_the_role_and_its_deltas_make_the_text(gateway: Running):
    response = await gateway.chat(stream=True, max_tokens=200)
    assert response.headers["content-type"].startswith("text/event-stream")
    choices = [event["choices"][0] for event in events(response)]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == SAYS[1:]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}
    assert all("usage" not in event for event in events(response))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_usage_comes_in_a_last_chunk_without_choices_when_asked_for(gateway: Running, path: str):
    ask = gateway.chat if path == CHAT else gateway.complete
    whole = (await ask("Where?", n=2)).json()["usage"]
    *chunks, last = events(await ask("Where?", n=2, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert last["usage"] == whole
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_a_completion_stream_makes_the_same_text_as_the_whole_answer(gateway: Running):
    whole = (await gateway.complete(["a", "b"], n=2, seed=5, max_tokens=200, logprobs=2)).json()["choices"]
    streamed = events(await gateway.complete(["a", "b"], n=2, seed=5, max_tokens=200, logprobs=2, stream=True))
    for index, choice in enumerate(whole):
        mine = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in mine) == choice["text"]
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [item for one in mine for item in one["logprobs"][column]] == choice["logprobs"][column]


async def test_prompts_and_choices_come_in_their_order_and_run_side_by_side(gateway: Running):
    answer = (await gateway.complete(["a", "bb"], n=3, seed=7, max_tokens=200)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [f"{SAYS}#7.{sample}" for sample in (0, 1, 2, 0, 1, 2)]
    assert [seen.request.prompt for seen in gateway.fake.seen] == ["a"] * 3 + ["bb"] * 3
    assert gateway.fake.most_running == 6
    assert [fork.text for fork in gateway.fake.infill.forks] == ["a", "bb"]  # each prompt goes once
    assert answer["usage"]["prompt_tokens"] == 3  # a prompt counts once


async def test_chat_logprobs_have_each_tokens_text_and_bytes(gateway: Running):
    answer = (await gateway.chat(logprobs=True, top_logprobs=2, max_tokens=2)).json()
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == (" ", -0.5, [32])
    assert [one["token"] for one in second["top_logprobs"]] == ["P", "Q"]


@pytest.mark.parametrize(("says", "content"), [("  two", " two"), (" ", ""), ("none", "none"), ("\n one", "\n one")])
async def test_a_chat_leaves_out_the_first_space_alone_and_a_completion_nothing(gateway, says, content):
    gateway.fake.says = says
    whole = (await gateway.chat(n=2, logprobs=True)).json()["choices"]
    assert [choice["message"]["content"] for choice in whole] == [content] * 2
    assert [one["token"] for one in whole[0]["logprobs"]["content"]] == list(says)
    deltas = [event["choices"][0] for event in events(await gateway.chat(n=2, stream=True))]
    for index in range(2):
        mine = [choice["delta"].get("content", "") for choice in deltas if choice["index"] == index]
        assert "".join(mine) == content
    assert (await gateway.complete()).json()["choices"][0]["text"] == says


async def test_a_token_that_is_part_of_a_character_is_called_by_its_id_and_begins_where_that_does(gateway: Running):
    gateway.fake.says = "a日éx"
    [choice] = (await gateway.chat(logprobs=True)).json()["choices"]
    assert choice["message"]["content"] == "a日éx"
    tokens = ["a", *(f"token_id:{byte}" for byte in "日é".encode()), "x"]
    assert [one["token"] for one in choice["logprobs"]["content"]] == tokens
    assert choice["logprobs"]["content"][1]["bytes"] is None
    [choice] = (await gateway.complete(logprobs=0)).json()["choices"]
    assert choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("logprob", "printed"), [(-math.inf, -9999.0), (-0.1, -0.1)])
async def test_a_logprob_prints_as_the_float32_that_it_is_and_as_json_can_say(gateway, logprob, printed):
    gateway.fake.logprob = logprob
    [choice] = (await gateway.complete(logprobs=0, max_tokens=1)).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [printed]
    assert choice["logprobs"]["top_logprobs"] == [{" ": printed}]


@pytest.mark.parametrize(("prompt", "text"), [("Where?", "Where?"), ([87, 104], "Wh")])
async def test_echo_begins_the_text_with_the_prompt(gateway: Running, prompt: object, text: str):
    assert (await gateway.complete(prompt, echo=True, max_tokens=4)).json()["choices"][0]["text"] == text + SAYS[:4]
    streamed = events(await gateway.complete(prompt, echo=True, max_tokens=4, stream=True))
    assert streamed[0]["choices"][0]["text"] == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hé", [104, 195, 169]])
async def test_an_echo_with_logprobs_scores_the_prompt_and_goes_on_for_all_of_max_tokens(gateway, prompt, stream):
    response = await gateway.complete([prompt], echo=True, logprobs=1, max_tokens=2, stream=stream)
    answers = [answer["choices"][0] for answer in (events(response) if stream else [response.json()])]
    assert "".join(answer["text"] for answer in answers) == "hé P"
    columns = {name: [one for answer in answers for one in answer["logprobs"][name]] for name in answers[0]["logprobs"]}
    assert columns["token_logprobs"] == [-0.25] * 3 + [-0.5] * 2
    assert columns["tokens"] == ["h", "token_id:195", "token_id:169", " ", "P"]
    assert columns["text_offset"] == [0, 1, 1, 2, 3]
    assert [len(top) for top in columns["top_logprobs"]] == [1] * 5
    assert gateway.fake.seen[-1].request.ignore_end, "or a text that ends at once would lack the token to cut off"
    await gateway.complete("x", echo=True, logprobs=1, ignore_eos=False)
    assert not gateway.fake.seen[-1].request.ignore_end


@pytest.mark.parametrize(("prompt", "count"), [("hé", 3), ([104, 105], 2), ("", 0)])
async def test_an_echo_of_no_tokens_is_the_prompt_alone(gateway: Running, prompt: object, count: int):
    answer = (await gateway.complete(prompt, echo=True, logprobs=0, max_tokens=0)).json()
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["logprobs"]["token_logprobs"]) == ("length", [-0.25] * count)
    assert answer["usage"] == {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
    assert not gateway.fake.seen
    assert (await gateway.complete("x", max_tokens=0)).json()["error"]["param"] == "max_tokens"


async def test_the_served_model_is_listed_with_its_defaults(gateway: Running):
    [model] = (await gateway.http.get("/v1/models")).json()["data"]
    assert (model["id"], model["max_model_len"]) == ("fake/cola", 512)
    assert model["defaults"]["max_tokens"] == 32
    assert model["defaults"]["solver"] == "euler"
    assert (await gateway.http.get("/v1/models/fake/cola")).json() == model
    assert (await gateway.http.get("/v1/models/cola")).status_code == 404


async def test_texts_are_tokenized_and_back_and_messages_as_a_chat_frames_them(gateway: Running):
    gateway.fake.chat_frame = "<{prompt}>"
    got = (await gateway.http.post("/tokenize", json={"prompt": "hé!", "return_token_strs": True})).json()
    assert got == {"count": 4, "max_model_len": 512, "tokens": [104, 195, 169, 33], "token_strs": ["h", "�", "�", "!"]}
    back = await gateway.http.post("/detokenize", json={"tokens": got["tokens"]})
    assert back.json() == {"prompt": "hé!"}
    got = await gateway.http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]})
    assert got.json()["tokens"] == list(b"<a>")
    assert got.json()["token_strs"] is None


async def test_the_documents_page_shows_every_path_and_loads_nothing(gateway: Running):
    page = (await gateway.http.get("/docs")).text
    document = (await gateway.http.get("/openapi.json")).json()
    assert all(path in page for path in document["paths"])
    assert "With <code>stream</code>, server-sent" in page
    assert "`" not in page
    assert "src=" not in page
    assert "http://" not in page


async def test_the_documents_page_shows_the_served_models_defaults_and_bounds_or_none(start):
    gateway = await start()
    defaults = (await gateway.http.get("/v1/models")).json()["data"][0]["defaults"]
    row = "<td>guidance_scale</td><td>number 0..1000</td><td>{}</td>"
    page = (await gateway.http.get("/docs")).text
    assert row.format(defaults["guidance_scale"]) in page
    assert row.format(defaults["guidance_scale"]).replace("<td>g", "<td>sampler.g") in page
    assert "<td>segments[].token_count</td>" in page
    score = page.partition("<code>POST /v1/latents/score</code>")[2]
    assert "<td>solver</td><td>&#x27;euler&#x27; | &#x27;ab2&#x27; | &#x27;heun&#x27;</td><td>heun</td>" in score
    assert "<td>steps</td><td>integer 1..1000</td><td>32</td>" in score
    assert "<td>points</td><td>integer 2..256</td>" in page
    bounds = {"max_blocks": (1, 512 // BLOCK), "max_completion_tokens": (1, 512), "tokens (required)": (0, 299)}
    for name, (least, most) in bounds.items():
        assert re.search(rf"<td>{re.escape(name)}</td><td>(list of )?integer {least}[.][.]{most}</td>", page), name
    assert not re.search(r"string \d*[.]{2}", page), "a bound of ids is none of a text"
    assert not re.search(r"[.]{2}\d{10}|<td>\w+ -\d{10}", page), "a type's range says nothing of the model"
    gateway.fake.info_failure = Unavailable("away")
    page = (await (await start()).http.get("/docs")).text
    assert row.format("") in page
    assert "<td>max_blocks</td><td>integer 1..</td>" in page


async def test_requests_are_counted_by_path_and_status_and_bytes_both_ways(gateway: Running):
    answer = await gateway.chat()
    assert gateway.counted("transfer_bytes_total", direction="in") == len(answer.request.content)
    assert gateway.counted("transfer_bytes_total", direction="out") == len(answer.content)
    await gateway.chat(n=0)
    await gateway.http.get("/nowhere/1")
    for method, code in ((CHAT, "200"), (CHAT, "400"), ("unknown", "404")):
        assert gateway.counted("request_seconds_count", method=method, code=code) == 1
    assert 'colaserve_request_seconds_count{code="200",' in (await gateway.http.get("/metrics")).text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_coordinator_of_an_earlier_version_gives_the_same_log_probabilities(gateway: Running, stream: bool):
    gateway.fake.says = "a日 éx, and more than a block of it"
    asks = [gateway.complete, gateway.chat]
    fields = [{"logprobs": 3}, {"logprobs": True, "top_logprobs": 3}]
    given = []
    for gateway.fake.older in (False, True):
        for ask, wanted in zip(asks, fields, strict=True):
            response = await ask(n=2, seed=1, max_tokens=200, stream=stream, **wanted)
            assert response.status_code == 200
            given.append(events(response) if stream else [response.json()])
    assert [_choices(answers) for answers in given[:2]] == [_choices(answers) for answers in given[2:]]


def _choices(answers: list[dict]) -> list[list[dict]]:
    """The parts of each choice, in order."""
    every = [choice for answer in answers for choice in answer["choices"]]
    return [[choice for choice in every if choice["index"] == index] for index in range(2)]


async def watched(gateway: Running, **fields: Any) -> list[dict[str, Any]]:
    """The choices in a stream."""
    response = await gateway.complete(stream=True, max_tokens=100, **fields)
    return [choice for event in events(response) for choice in event["choices"]]


async def test_previews_are_chunks_of_their_own_without_text(gateway: Running):
    plain = await watched(gateway)
    found = await watched(gateway, preview_every=2)
    looks = [choice for choice in found if "preview" in choice]
    assert [choice for choice in found if "preview" not in choice] == plain
    assert found[0] == looks[0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": None,
        "preview": {"block_index": 0, "step": 2, "text": " P??"},
    }  # fmt: skip
    assert [look["preview"]["block_index"] for look in looks] == list(range(len(looks)))
    assert "".join(choice["text"] for choice in found) == SAYS


async def test_probes_and_latents_come_with_their_block(gateway: Running):
    for choice in await watched(gateway, preview_every=1, with_probes=True, with_latents=True):
        where = choice.get("preview", choice)
        rows, values = where["latents"]["shape"][0], base64.b64decode(where["latents"].pop("data"))
        assert where["latents"] == {"shape": [rows, 2], "dtype": "float32", "space": SPACE}
        text = bytes(int(token) for token in np.frombuffer(values, "<f4")[::2])
        assert text.decode(errors="ignore") == where["text"] or b"?" in text
        if where is choice:
            assert choice["probes"] == {"norm": 1.5, "entropy": pytest.approx(0.1), "end_probability": 0}


async def test_a_preview_is_no_first_block(gateway: Running):
    """The text of an echoed prompt still comes first."""
    first, *_ = await watched(gateway, preview_every=1, echo=True)
    assert first["text"] == "Where?"


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
