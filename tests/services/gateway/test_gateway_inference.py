"""The HTTP form of the Open Inference Protocol, in front of the service itself."""

import json
from typing import Any

import grpc
import numpy as np
import pytest

from colaserve_services.gateway.backend import coordinator_stub
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.inference import open_inference_pb2 as pb
from colaserve_services.inference.open_inference_pb2_grpc import GRPCInferenceServiceServicer
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.local import LocalStub
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import running
from tests.services.inference.asking import served

INFER = "/v2/models/{}/infer"
HEADER = "inference-header-content-length"
TEXT = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hello"]}
ROWS = np.arange(8, dtype="<f4").reshape(4, 2)
LATENTS = {"name": "latents", "datatype": "FP32", "shape": [4, 2]}
SETTINGS = {"seed": 7, "max_new_tokens": 9, "ignore_end": True}


def gateway(fake: FakeGeneration, inference: Any, settings: GatewaySettings | None = None) -> Any:
    stub = coordinator_stub(LocalStub(fake), LocalStub(fake.infill), inference)
    return running(fake, settings, stub=stub)


def binary(body: dict[str, Any], *tensors: bytes) -> dict[str, Any]:
    head = json.dumps(body).encode()
    return {"content": b"".join([head, *tensors]), "headers": {HEADER: str(len(head))}}


async def test_json_and_binary_tensors_say_what_grpc_says(fake):
    stub, _ = await served()
    parameters = {
        name: pb.InferParameter(int64_param=value) for name, value in SETTINGS.items() if name != "ignore_end"
    }
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"Hello"]}}
    parameters["ignore_end"] = pb.InferParameter(bool_param=True)
    wanted = await stub.ModelInfer(pb.ModelInferRequest(model_name="generate", inputs=[tensor], parameters=parameters))
    ids = list(np.frombuffer(wanted.raw_output_contents[2], "<u4"))
    async with gateway(fake, stub) as it:
        body = {"id": "a", "inputs": [TEXT], "parameters": SETTINGS}
        answer = (await it.http.post(INFER.format("generate"), json=body)).json()
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a", "generate", "1")
        assert answer["outputs"][2] == {"name": "token_ids", "datatype": "UINT32", "shape": [9], "data": ids}
        assert answer["parameters"] == {"prompt_tokens": 1, "completion_tokens": 9, "seed": 7, "sample_id": 0} | {
            "prompt_tokens": wanted.parameters["prompt_tokens"].int64_param
        }
        size = {"binary_data_size": ROWS.nbytes}
        asked = {"inputs": [{**LATENTS, "parameters": size}], "parameters": {"binary_data_output": True, "seed": 1}}
        raw = await it.http.post(INFER.format("prior"), **binary(asked, ROWS.tobytes()))
        head = int(raw.headers[HEADER])
        said = json.loads(raw.content[:head])["outputs"][0]
        assert said == {**LATENTS, "parameters": {"binary_data_size": 32}}
        rows = {**LATENTS, "data": ROWS.tolist()}
        again = await it.http.post(INFER.format("prior"), json={"inputs": [rows], "parameters": {"seed": 1}})
        values = again.json()["outputs"][0]["data"]
        assert np.array_equal(np.frombuffer(raw.content[head:], "<f4"), values)


async def test_what_a_model_takes_and_whether_it_is_ready_can_be_asked(fake):
    stub, _ = await served()
    async with gateway(fake, stub, GatewaySettings(keys=Keys(["secret"]), ready_seconds=0)) as it:
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await it.http.get(path)).status_code == 200, "without a key"
        refused = await it.http.get("/v2")
        assert (refused.status_code, type(refused.json()["error"])) == (401, str)
        it.http.headers["authorization"] = "Bearer secret"
        assert (await it.http.get("/v2")).json()["name"] == "colaserve"
        model = (await it.http.get("/v2/models/prior/versions/1")).json()
        assert model["outputs"] == [{"name": "latents", "datatype": "FP32", "shape": [-1, 2]}]
        assert (await it.http.get("/v2/models/prior/ready")).json() == {"name": "prior", "ready": True}
        fake.serving = False
        assert (await it.http.get("/v2/health/ready")).status_code == 503


@pytest.mark.parametrize(
    ("model", "sent", "said"),
    [
        ("gpt", {"json": {"inputs": [TEXT]}}, "model_name: got 'gpt', expected one of"),
        ("generate", {"json": {"inputs": [TEXT], "parameters": {"steps": 0}}}, "parameters.steps: got 0, expected"),
        ("generate", {"json": {"inputs": [TEXT], "extra": 1}}, "extra: unknown field"),
        ("generate", {"json": {"inputs": [{**TEXT, "data": [1]}]}}, "inputs[0].data: expected elements of BYTES"),
        ("generate", {"json": {"inputs": [{**TEXT, "data": None}]}}, "inputs[0]: expected data, or the parameter"),
        ("generate", {"json": {"inputs": [{**TEXT, "shape": ["1"]}]}}, "inputs[0].shape[0]: should be a valid integer"),
        ("generate", {"json": [TEXT]}, "the body must be a JSON object"),
        ("generate", {"content": "{", "headers": {"content-type": "application/json"}}, "the body is not valid JSON"),
        ("generate", {"content": "{}", "headers": {"content-type": "text/plain"}}, "content-type: got 'text/plain'"),
        ("generate", {"content": "{}", "headers": {HEADER: "9"}}, f"{HEADER}: got '9', expected 0 to 2"),
        ("decoder", {"json": {"inputs": [{**LATENTS, "datatype": "FP16", "data": []}]}}, "'FP16' has no JSON form"),
        ("decoder", {"json": {"inputs": [{**LATENTS, "data": [1e300] * 8}]}}, "inputs[0].data: float too large"),
        ("decoder", {"json": {"inputs": [{**LATENTS, "data": [1.0]}]}}, "latents.data: got 4 bytes, shape [4, 2]"),
        ("decoder", binary({"inputs": [LATENTS]}, b"abcd"), "inputs[0]: expected data, or the parameter"),
        ("decoder", binary({"inputs": [{**LATENTS, "parameters": {"binary_data_size": 99}}]}, b"a"), "expected 0 to 1"),
        ("decoder", binary({"inputs": []}, b"abcd"), "inputs: the body has 4 bytes more"),
    ],
)  # fmt: skip
async def test_what_cannot_be_served_is_a_400_in_the_protocols_shape(fake, model: str, sent: Any, said: str):
    async with gateway(fake, (await served())[0]) as it:
        answer = await it.http.post(INFER.format(model), **sent)
        assert answer.status_code == 400
        assert said in answer.json()["error"]


class Older(GRPCInferenceServiceServicer):
    """What a coordinator without the protocol answers."""

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


async def test_a_coordinator_of_an_earlier_version_is_said_to_be_one(fake):
    async with gateway(fake, LocalStub(Older())) as it:
        answer = await it.http.get("/v2/models/prior")
        assert (answer.status_code, "of an earlier version" in answer.json()["error"]) == (503, True)
