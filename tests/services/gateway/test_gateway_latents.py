"""POST /v1/latents/...: LatentService as JSON, in front of a coordinator with fake stages."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio

from colaserve.v1.generation_pb2 import Preview
from colaserve.v1.latent_service_pb2 import (
    DESCRIPTOR,
    EncodeTextResponse,
    ForkResponse,
    SampleLatentsResponse,
    TextEncoding,
)
from colaserve.v1.latent_service_pb2_grpc import LatentServiceServicer
from colaserve.v1.types_pb2 import Steering
from colaserve_services.coordinator.service import LatentServicer
from colaserve_services.gateway.app import create_app
from colaserve_services.gateway.backend import coordinator_stub
from colaserve_services.gateway.body import MOST_ITEMS
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.rpc.arrays import latents_to_message, to_message
from colaserve_services.rpc.local import LocalStub
from tests.services.coordinator.stage_fakes import SPACE, FakePrior
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import Running, events, running
from tests.services.inference.asking import connected
from tests.waiting import eventually

PATH = "/v1/latents/{}"
ROWS = np.array([[1, 2], [0.1, -4], [5, 6]], np.float32)
LISTED = ROWS.tolist()
STEERING = Steering(direction=to_message(ROWS[0]), bias=to_message(np.float32(0.5)), scale=1, start=1, logistic=True)
BASE64 = {"shape": [3, 2], "data": base64.b64encode(ROWS.tobytes()).decode()}


@asynccontextmanager
async def gateway(settings: GatewaySettings | None = None) -> AsyncIterator[tuple[Running, Any, FakePrior]]:
    """A gateway, a stub of the service behind it, and the prior behind that."""
    coordinator, prior = await connected()
    fake, stub = FakeGeneration(), LocalStub(LatentServicer(coordinator))
    async with running(fake, settings, stub=coordinator_stub(LocalStub(fake), stub)) as it:
        yield it, stub, prior


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def once() -> AsyncIterator[Running]:
    """One gateway for many refusals."""
    async with gateway() as (it, _, _):
        yield it


async def post(it: Running, name: str, **fields: Any) -> httpx.Response:
    return await it.http.post(PATH.format(name), json=fields)


def array(found: dict[str, Any]) -> np.ndarray:
    assert found["dtype"] == "float32"
    return np.frombuffer(base64.b64decode(found["data"]), "<f4").reshape(found["shape"])


def without_timing(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "timing"}


async def test_texts_become_latents_and_these_text_in_every_form_that_json_has():
    async with gateway() as (it, _, _):
        encoded = (await post(it, "encode", texts=["fox", "a hen"], with_variance=True)).json()
        first = encoded["encodings"][0]
        assert first["latents"]["space"] == SPACE
        assert array(first["latents"]).shape == array(first["log_variance"]).shape == (len(first["token_ids"]), 2)
        assert "".join(first["tokens"]) == "fox"
        [listed] = (await post(it, "encode", texts=["fox"], encoding="list")).json()["encodings"]
        assert np.array_equal(listed["latents"]["data"], array(first["latents"]))
        wanted = without_timing((await post(it, "decode", latents=BASE64)).json())
        halves = {**BASE64, "dtype": "float16", "data": base64.b64encode(ROWS.astype("<f2").tobytes()).decode()}
        assert without_timing((await post(it, "decode", latents=halves)).json()) != wanted, "0.1 is another number"
        for form in (LISTED, {"data": LISTED}, {"data": LISTED, "shape": [3, 2], "space": SPACE}):
            assert without_timing((await post(it, "decode", latents=form)).json()) == wanted
        again = await post(it, "decode", latents=listed["latents"])
        assert again.json() == (await post(it, "decode", latents=first["latents"])).json()


@pytest.mark.parametrize(
    ("name", "method", "fields", "request_fields"),
    [
        ("interpolate", "Interpolate",
         {"start": {"text": "fox"}, "end": {"text": "hen"}, "points": 2, "interpolation": "lerp"},
         {"start": {"text": "fox"}, "end": {"text": "hen"}, "points": 2, "interpolation": 1}),
        ("infill", "Infill",
         {"segments": [{"token_count": 1}], "seed": 1,
          "sampler": {"steering": [{"direction": [1, 2], "bias": 0.5, "logistic": True}]}},
         {"segments": [{"token_count": 1}], "sampler": {"steering": [STEERING]}, "seed": {"base_seed": 1}}),
        ("infill", "Infill",
         {"segments": [{"text": "a"}, {"token_count": 2}], "seed": 7, "sampler": {"steps": 3, "solver": "heun"}},
         {"segments": [{"text": "a"}, {"token_count": 2}], "seed": {"base_seed": 7},
          "sampler": {"steps": 3, "solver": 3}}),
        ("reconstruct", "Reconstruct", {"texts": ["fox"]}, {"texts": ["fox"]}),
        ("logprobs", "Logprobs", {"ids": [5, 6], "top_logprobs": 2}, {"ids": {"ids": [5, 6]}, "top_logprobs": 2}),
    ],
)  # fmt: skip
async def test_a_method_answers_as_over_grpc(name: str, method: str, fields: Any, request_fields: Any):
    async with gateway() as (it, stub, _):
        kind = DESCRIPTOR.services_by_name["LatentService"].methods_by_name[method].input_type._concrete_class
        wanted = await getattr(stub, method)(kind(**request_fields))
        assert not differing(wanted, (await post(it, name, **fields)).json())


def differing(message: Any, found: Any) -> list[str]:
    """The fields of a message that its JSON has otherwise."""
    names = []
    for field, value in message.ListFields():
        here = found[field.name]
        if field.name == "latents":
            same = array(here).tobytes() == value.values.data
        elif field.message_type is None:
            plain = value if isinstance(value, str | float | int) else list(value)
            same = here == ([("stop", "length")[one - 1] for one in plain] if field.enum_type else pytest.approx(plain))
        else:
            pairs = zip(value, here, strict=True) if isinstance(here, list) else [(value, here)]
            same = not any(differing(one, other) for one, other in pairs)
        names += [] if same else [field.name]
    return names


async def test_a_run_is_a_stream_of_blocks_that_replays():
    async with gateway() as (it, _, _):
        answer = await post(it, "sample", prefix=LISTED, max_blocks=3, seed=9)
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = events(answer)
        assert [(one["block_index"], one["seed"]) for one in blocks] == [
            (index, {"base_seed": 9, "sample_id": 0}) for index in range(3)
        ]
        assert np.array_equal(array(blocks[0]["latents"])[:3], ROWS)
        again = await post(it, "sample", prefix=BASE64, max_blocks=3, seed={"base_seed": 9}, sampler={})
        assert [one["latents"] for one in events(again)] == [one["latents"] for one in blocks]


@pytest.mark.parametrize(
    ("name", "fields", "param", "said"),
    [
        ("encode", {"texts": "fox"}, "texts", "should be a valid list"),
        ("encode", {"texts": ["a"], "with_variance": 1}, "with_variance", "should be a valid boolean"),
        ("encode", {"texts": ["a"], "text": "a"}, "text", "unknown field"),
        ("encode", {"texts": ["a"], "encoding": "hex"}, "encoding", "should be 'base64' or 'list'"),
        ("decode", {}, "latents", "got 0 latents"),
        ("decode", {"latents": "AAAA"}, "latents", "should be a valid dictionary"),
        ("decode", {"latents": {"data": "AAAA"}}, "latents.shape", "this field is required beside base64"),
        ("decode", {"latents": {**BASE64, "shape": [2, 2]}}, "latents.data", "got 24 bytes"),
        ("decode", {"latents": {**BASE64, "shape": [2, 3]}}, "latents.shape", "expected [any, 2]"),
        ("decode", {"latents": {**BASE64, "data": "=A"}}, "latents.data", "is no base64"),
        ("decode", {"latents": {**BASE64, "data": {}}}, "latents.data", "expected base64, or numbers"),
        ("decode", {"latents": 1}, "latents.shape", "got [], expected [any, 2]"),
        ("decode", {"latents": {**BASE64, "dtype": "float64"}}, "latents.dtype", "should be 'float32'"),
        ("decode", {"latents": {"data": LISTED, "dtype": "float16"}}, "latents.dtype", "expected float32"),
        ("decode", {"latents": {"data": LISTED, "shape": [2, 3]}}, "latents.shape", "the lists' is [3, 2]"),
        ("decode", {"latents": [[1, float("nan")]]}, "latents.data", "got nan at [0, 1]"),
        ("decode", {"latents": [[1, 1e300]]}, "latents.data", "got inf at [0, 1]"),
        ("decode", {"latents": [[1, 10**400]]}, "latents.data", "too large"),
        ("decode", {"latents": [[1, 2], [3]]}, "latents.data", "lists of equal lengths"),
        ("decode", {"latents": [[True, 2]]}, "latents.data", "or numbers"),
        ("decode", {"latents": [["1", 2]]}, "latents.data", "or numbers"),
        ("decode", {"latents": {**BASE64, "space": "another"}}, None, "latents.space: got latents of space 'another'"),
        ("decode", {"latents": LISTED, "sampling": {"top_k": -1}}, "sampling.top_k", "greater than or equal to 0"),
        ("sample", {"max_blocks": 2, "sampler": {"steps": 0}}, "sampler.steps", "greater than or equal to 1"),
        ("sample", {"max_blocks": 2, "sampler": {"step": 1}}, "sampler.step", "unknown field"),
        ("sample", {"max_blocks": 2**32}, "max_blocks", "less than or equal to 4294967295"),
        ("sample", {"max_blocks": 1, "prefix": [[1, 2, 3]]}, "prefix.shape", "got [1, 3]"),
        ("interpolate", {"start": {"text": "a", "latents": LISTED}, "points": 2}, "start.latents", "got both"),
        ("infill", {"segments": [{"text": "a"}, {"token_count": "2"}]}, "segments[1].token_count", "valid integer"),
        ("infill", {"segments": [{"token_count": 1}], "seed": -1}, "seed.base_seed", "greater than or equal to 0"),
    ],
)  # fmt: skip
@pytest.mark.asyncio(loop_scope="module")
async def test_what_cannot_be_served_is_a_400_that_names_the_field(once, name, fields, param, said):
    content = json.dumps(fields)  # httpx refuses NaN
    answer = await once.http.post(PATH.format(name), content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert said in error["message"]
    assert (error["code"] == "model_mismatch") == (param is None)


async def test_models_and_unknown_fields_are_as_elsewhere():
    async with gateway(GatewaySettings(allow_unknown_fields=True)) as (it, _, _):
        assert (await post(it, "encode", texts=["a"], later=1, model="fake/cola")).status_code == 200
        assert (await post(it, "encode", texts=["a"], model="gpt")).json()["error"]["code"] == "model_not_found"
        packed = {"content-encoding": "gzip", "content-type": "application/json"}
        answer = await it.http.post(PATH.format("encode"), content=b"\x1f\x8b\x08", headers=packed)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "content-encoding")


async def test_a_stream_that_its_deadline_ends_frees_the_prior():
    async with gateway() as (it, _, prior):
        body, path = {"max_blocks": 3}, PATH.format("sample")
        prior.faults[0] = (1, TimeoutError())
        prior.gate.clear()
        late = await it.http.post(path, json=body, headers={"x-request-timeout": "0.2"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        await eventually(lambda: prior.calls and not prior.running)


async def test_a_failure_after_the_first_block_ends_the_stream_with_an_error_event():
    async with gateway() as (it, _, prior):
        prior.faults = dict.fromkeys(range(9), (0, grpc.StatusCode.INTERNAL)) | {0: (1, grpc.StatusCode.INTERNAL)}
        block, failure = events(await post(it, "sample", max_blocks=3), end="")
        assert "block_index" in block
        assert set(failure["error"]) == {"message", "type", "param", "code"}


class OnlyPreviews(LatentServiceServicer):
    """Streams that end before the first block."""

    async def SampleLatents(self, request: Any, context: Any) -> AsyncIterator[SampleLatentsResponse]:
        yield SampleLatentsResponse(provisional=True)

    async def Fork(self, request: Any, context: Any) -> AsyncIterator[ForkResponse]:
        yield ForkResponse(preview=Preview(step=1))


async def test_a_preview_is_no_first_block(fake: FakeGeneration, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    async with running(fake, stub=coordinator_stub(LocalStub(fake), LocalStub(OnlyPreviews()))) as it:
        for name in ("sample", "fork"):
            assert "data: [DONE]" in (await post(it, name)).text
    served = [record.fields for record in caplog.records if record.name == "colaserve_services.access"]
    assert len(served) == 2
    assert not any("first_block_seconds" in fields for fields in served)


class Large(LatentServiceServicer):
    """Answers with more numbers than asked for."""

    async def EncodeText(self, request: Any, context: Any) -> EncodeTextResponse:
        latents = latents_to_message(np.ones((MOST_ITEMS // 8 + 1, 8), np.float32), SPACE)
        return EncodeTextResponse(encodings=[TextEncoding(latents=latents)])


async def test_more_numbers_than_lists_are_good_for_come_as_base64_only(fake: FakeGeneration):
    async with running(fake, stub=coordinator_stub(LocalStub(fake), LocalStub(Large()))) as it:
        refused = await post(it, "encode", texts=["a"], encoding="list")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "encoding")
        [encoding] = (await post(it, "encode", texts=["a"])).json()["encodings"]
        assert array(encoding["latents"]).sum() == MOST_ITEMS + 8


def test_every_method_has_a_path_that_the_document_explains():
    document = create_app(object(), GatewaySettings()).state.document
    paths = {path.rpartition("/")[2]: each["post"] for path, each in document["paths"].items() if "/latents/" in path}
    assert {"encode", "decode", "sample", "interpolate", "infill", "reconstruct", "logprobs"} <= paths.keys()
    assert len(paths) == len(DESCRIPTOR.services_by_name["LatentService"].methods) - 1, "all but GetInfo"
    for operation in paths.values():
        assert operation["description"]
        [content] = operation["requestBody"]["content"].values()
        schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        assert all(field.get("description") for field in schema["properties"].values())
