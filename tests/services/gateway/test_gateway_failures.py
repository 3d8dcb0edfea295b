"""What is answered when something goes wrong, and that nothing is left running."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from colaserve.v1.latent_service_pb2_grpc import LatentServiceServicer
from colaserve_services.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelMismatch,
    Overloaded,
    StepFailed,
    Unavailable,
)
from colaserve_services.gateway.backend import coordinator_stub
from colaserve_services.gateway.settings import Bounds, GatewaySettings
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.local import LocalStub
from tests.services.gateway.fake_generation import SAYS, FakeGeneration
from tests.services.gateway.running_gateway import CHAT, COMPLETIONS, Running, events, running
from tests.waiting import eventually

BODY = {"model": "fake/cola", "prompt": "x", "stream": True, "max_tokens": 200}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "kind", "code", "header"),
    [
        (InvalidRequest("sampler.steps", "got 0"), 400, "invalid_request_error", "invalid_value", None),
        (ModelMismatch("another space"), 400, "invalid_request_error", "model_mismatch", None),
        (Overloaded("full", 2.5), 429, "rate_limit_error", "rate_limit_exceeded", ("retry-after", "3")),
        (Unavailable("prior is down"), 503, "server_error", "unavailable", ("retry-after", "1")),
        (DeadlineExceeded("late"), 504, "server_error", "deadline_exceeded", None),
        (StepFailed("it failed"), 500, "server_error", "step_failed", ("x-should-retry", "false")),
        (RuntimeError("secret"), 500, "server_error", "internal_error", None),
    ],
)
async def test_what_fails_before_the_first_block_has_its_status(gateway, failure, status, kind, code, header, stream):
    gateway.fake.failure = failure
    response = await gateway.chat(stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (status, kind, code)
    assert header is None or header in response.headers.items()
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("path", "field", "param"),
    [
        (CHAT, "prompt", "messages"),
        (CHAT, "max_new_tokens", "max_tokens"),
        (COMPLETIONS, "prompt", "prompt"),
        (COMPLETIONS, "prompt_ids", "prompt"),
        (COMPLETIONS, "sampler.guidance_end", "guidance_end"),
        (COMPLETIONS, "sampling.top_p", "top_p"),
        (COMPLETIONS, "stop[1]", "stop"),
        (COMPLETIONS, "sampler.steering[1].direction.shape", "steering[1].direction.shape"),
        (COMPLETIONS, "top_logprobs", "logprobs"),
    ],
)
async def test_a_coordinators_refusal_names_the_field_as_the_client_does(gateway, path, field, param):
    gateway.fake.failure = InvalidRequest(field, "got 3, expected less")
    response = await (gateway.chat if path == CHAT else gateway.complete)()
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["message"] == f"{param}: got 3, expected less"


async def test_a_failure_in_the_middle_ends_the_stream_with_an_error_and_without_done(gateway: Running):
    gateway.fake.failure, gateway.fake.fail_after = Unavailable("prior is down"), 2
    response = await gateway.complete(stream=True)
    *texts, last = events(response, end="")
    assert "".join(text["choices"][0]["text"] for text in texts) == SAYS[:8]
    assert last["error"]["code"] == "unavailable"
    assert gateway.counted("request_seconds_count", method=COMPLETIONS, code="503") == 1


async def test_a_failure_of_one_choice_cancels_the_others(gateway: Running):
    gateway.fake.failure, gateway.fake.fail_after = Unavailable("gone"), 1
    assert (await gateway.complete(n=3)).status_code == 503
    await eventually(lambda: gateway.fake.running == 0)


async def test_a_generation_without_an_end_is_no_answer(gateway: Running):
    gateway.fake.ends_without_reason = True
    assert (await gateway.chat()).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_cancels_its_generations(gateway: Running, stream: bool, n: int):
    gateway.fake.gate = asyncio.Event()
    asking = asyncio.create_task(gateway.complete(stream=stream, n=n))
    await eventually(lambda: gateway.fake.running == n)
    asking.cancel()
    await eventually(lambda: gateway.fake.running == 0)
    assert all(seen.cancelled and not seen.ended for seen in gateway.fake.seen)
    await eventually(lambda: gateway.counted("request_seconds_count", method=COMPLETIONS, code="499") == 1)


async def test_a_stream_that_is_not_read_while_others_wait_ends_with_an_error_event(fake: FakeGeneration):
    fake.says, fake.model_name = "ever and " * 100_000, "long" * 2500  # so are the events, which bear it
    settings, body = GatewaySettings(bounds=Bounds(unread_seconds=0.2)), {**BODY, "model": None, "max_tokens": 900_000}
    async with running(fake, settings) as gateway:
        async with gateway.http.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            asked = fake.infos
            await eventually(lambda: fake.infos > asked)  # the gateway asks whether calls are queued: none
            assert fake.running == 1
            fake.waiting = 1
            await eventually(lambda: fake.running == 0)
            said = [line async for line in lines if line]
        assert json.loads(said[-1].removeprefix("data: "))["error"] == {
            "message": "not read for 0.2 s while others waited", "type": "server_error", "param": None,
            "code": "unavailable",
        }  # fmt: skip


@pytest.mark.parametrize("forgets", [False, True])
async def test_a_deadline_ends_the_generation_also_of_a_coordinator_that_forgets_it(fake, forgets):
    fake.gate = asyncio.Event()
    stub = coordinator_stub(LocalStub(fake), LocalStub(fake.infill))
    if forgets:
        generate = stub.Generate
        stub.Generate = lambda request, timeout, metadata: generate(request, metadata=metadata)
    async with running(fake, stub=stub) as gateway:
        headers = {"x-request-timeout": "1"}
        response = await gateway.http.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert forgets or 0 < (fake.seen[0].seconds or 0) <= 1
        await eventually(lambda: fake.running == 0)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
async def test_an_impossible_deadline_is_refused(gateway: Running, given: str):
    response = await gateway.http.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-timeout": given})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout")


async def test_the_servers_bound_holds_for_every_deadline(start):
    gateway = await start(GatewaySettings(bounds=Bounds(request_seconds=5)))
    await gateway.http.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-timeout": "1000"})
    assert gateway.fake.seen[0].seconds <= 5


class Older(LatentServiceServicer):
    """What a coordinator without these methods answers."""

    async def EncodeText(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    async def Fork(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield await self.EncodeText(request, context)


async def test_a_coordinator_of_an_earlier_version_is_said_to_be_one():
    fake = FakeGeneration()
    async with running(fake, stub=coordinator_stub(LocalStub(fake), LocalStub(Older()))) as gateway:
        encoded = await gateway.http.post("/v1/latents/encode", json={"texts": ["a"]})
        forked = await gateway.complete(n=2)
        for answer, lacking in ((encoded, "LatentService.EncodeText"), (forked, "what this needs")):
            assert answer.status_code == 503
            assert f"of an earlier version, without {lacking}" in answer.json()["error"]["message"]
        assert (await gateway.complete()).status_code == 200


async def test_more_texts_than_may_run_side_by_side_wait(start):
    gateway = await start(GatewaySettings(bounds=Bounds(parallel_choices=2)))
    answer = await gateway.complete(["x"] * 7, max_tokens=200)
    assert [choice["text"] for choice in answer.json()["choices"]] == [SAYS] * 7
    assert gateway.fake.most_running == 2


async def test_the_request_id_and_the_trace_go_through_and_the_key_does_not(start):
    gateway = await start(GatewaySettings(keys=Keys(["right"])))
    headers = {"x-request-id": "abc-1", "traceparent": "00-ab-cd-01", "authorization": "Bearer right"}
    response = await gateway.http.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "cmpl-abc-1"
    for response in (await gateway.http.get("/nowhere"), await gateway.chat(n=0), await gateway.http.get("/health")):
        assert len(response.headers["x-request-id"]) == 32
    [seen] = gateway.fake.seen
    assert (seen.header("x-request-id"), seen.header("traceparent")) == ("abc-1", "00-ab-cd-01")
    assert "right" not in str(seen.metadata)


async def test_keys_are_asked_for_except_where_probes_and_readers_come(start):
    gateway = await start(GatewaySettings(keys=Keys(["right", "another"])))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
        response = await gateway.http.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
        assert (await gateway.http.get(path)).status_code == 200
    assert (await gateway.http.get("/v1/models")).status_code == 401
    assert not gateway.fake.seen


async def test_one_request_too_many_is_refused_at_once(start):
    gateway = await start(GatewaySettings(max_calls=1))
    gateway.fake.gate = asyncio.Event()
    first = asyncio.create_task(gateway.complete())
    await eventually(lambda: gateway.fake.running == 1)
    refused = await gateway.complete()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    gateway.fake.gate.set()
    assert [(await first).status_code, (await gateway.complete()).status_code] == [200, 200]
    assert 'colaserve_refused_total{reason="calls",stage="gateway"} 1.0' in (await gateway.http.get("/metrics")).text


async def test_another_model_is_not_found(gateway: Running):
    for response in (
        await gateway.chat(model="gpt"),
        await gateway.complete(model="gpt"),
        await gateway.http.get("/v1/models/gpt"),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_unknown_paths_and_methods_are_refused_in_the_same_shape(gateway: Running):
    assert (await gateway.http.get("/v3")).json()["error"]["code"] == "not_found"
    assert (await gateway.http.get("/v2/other")).json()["error"].startswith("/v2/other: there is no such path")
    wrong = await gateway.http.get(COMPLETIONS)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.json()["error"]["message"] == "GET is not for this path; it takes POST"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1/completions/", "did you mean /v1/completions?"),
        ("/completions", "did you mean /v1/completions?"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/v1/model", "did you mean /v1/models?"),
        ("/healthz", "did you mean /health?"),
        ("/" + "x" * 5000, "GET / has links to what is there"),
    ],
)
async def test_an_unknown_path_is_a_404_that_names_the_nearest(gateway: Running, path: str, hint: str):
    response = await gateway.http.post(path, json=BODY, headers={"host": "elsewhere.example"})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == f"{path[:100]}: there is no such path; {hint}"
    assert "location" not in response.headers


async def test_the_root_page_links_what_is_there_and_needs_no_key(start):
    gateway = await start(GatewaySettings(keys=Keys(["secret"])))
    page = await gateway.http.get("/")
    links = re.findall('<a href="([^"]+)"', page.text)
    assert {"docs", "v1/models", "health"} <= set(links)
    for link in links:
        answer = await gateway.http.get(f"/{link}", headers={"authorization": "Bearer secret"})
        assert answer.status_code == 200, link
    assert (await gateway.http.head("/")).status_code == 200


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_that_is_too_long_is_refused_while_it_comes(start, declared: bool):
    gateway = await start(GatewaySettings(bounds=Bounds(body_bytes=1000)))
    body = json.dumps({"prompt": "x" * 5000}).encode()

    async def pieces():
        yield body[:2500]
        yield body[2500:]

    headers = {"content-type": "application/json"}
    response = await gateway.http.post(COMPLETIONS, content=body if declared else pieces(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_body_that_does_not_come_is_not_waited_for(start):
    gateway = await start(GatewaySettings(bounds=Bounds(body_seconds=0.1)))
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
    assert b" 408 " in await reader.readline()
    writer.close()


OBJECT = "the body must be a JSON object, sent with content-type application/json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is not valid JSON: "),
        (b"", "the body is not valid JSON: "),
        (b"[1]", OBJECT),
        (b'{"prompt": "\xff"}', "the body is not UTF-8 at byte 12"),
        (b"[" * 20_000, "the body is nested too deep"),
        (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "the body has a whole number of more than 4300 digits"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature: should be a finite number, got nan"),
        (b'{"prompt": "x", "seed": 1e400}', "seed: "),
        (b'{"prompt": ["a", "b\\ud800"]}', "prompt[1]: half of a surrogate pair at character 1"),
        (b'{"prompt": "x", "\\ud800": 1}', OBJECT),
        (b'{"prompt": "x", "stop": "\\ud800"}', "stop: half of a surrogate pair at character 0"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_wrong_body_is_refused_with_its_fault(gateway: Running, content: bytes, message: str):
    response = await gateway.http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith(message)
    assert error["param"] or error["code"] == "invalid_json"
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        other = await gateway.http.post(COMPLETIONS, content=content, headers={"content-type": kind})
        assert (other.status_code, other.json()["error"]["message"]) == (400, OBJECT)


async def test_browsers_may_call_where_their_origin_is_allowed_and_errors_reach_them(start, gateway: Running):
    elsewhere = await gateway.http.get("/health", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in elsewhere.headers
    gateway = await start(GatewaySettings(cors_origins=("https://a.example",), keys=Keys(["k"])))
    origin = {"origin": "https://a.example"}
    asking = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = await gateway.http.options(COMPLETIONS, headers=asking)
    assert preflight.status_code == 200
    refused = await gateway.http.post(COMPLETIONS, json={}, headers=origin)
    for response in (preflight, refused):
        assert response.headers["access-control-allow-origin"] == "https://a.example"
    other = await gateway.http.get("/health", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


async def test_logs_describe_the_request_and_never_its_text(gateway: Running, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    await gateway.complete("TOP SECRET", user="zoe")
    await gateway.complete("TOP SECRET", tools=[{"x": "TOP SECRET"}])
    [served, refused] = [record for record in caplog.records if record.name == "colaserve_services.access"]
    assert served.fields["method"] == COMPLETIONS
    assert (served.fields["user"], served.fields["prompt_tokens"], served.fields["code"]) == ("zoe", 10, 200)
    assert refused.fields["code"] == 400
    assert not any("SECRET" in str(record.__dict__) or "Paris" in str(record.__dict__) for record in caplog.records)


async def test_what_nobody_foresaw_is_logged_with_its_traceback(fake: FakeGeneration, caplog: pytest.LogCaptureFixture):
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    stub = SimpleNamespace(GetInfo=LocalStub(fake).GetInfo, Tokenize=broken)
    async with running(fake, stub=stub) as gateway:
        response = await gateway.http.post("/tokenize", json={"prompt": "x"}, headers={"x-request-id": "r1"})
    assert response.status_code == 500
    assert "r1" in response.json()["error"]["message"]
    assert "a bug" in caplog.text
    assert "a bug" not in response.text
