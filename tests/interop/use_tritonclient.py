"""tritonclient, unmodified, against GRPC_HOST:PORT and HTTP_URL: the four models, whole and streamed."""

import queue
import sys
from typing import Any

import numpy as np
from tritonclient import grpc, http, utils

SETTINGS = {"seed": 7, "max_new_tokens": 12, "ignore_end": True}
MODELS = {"generate", "encoder", "decoder", "prior"}


def text(kind: Any, value: str) -> Any:
    tensor = kind.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode()], dtype=object))
    return tensor


def latents(kind: Any, values: np.ndarray) -> Any:
    tensor = kind.InferInput("latents", list(values.shape), utils.np_to_triton_dtype(values.dtype))
    tensor.set_data_from_numpy(values)
    return tensor


def use(kind: Any, client: Any) -> list[int]:
    """What the gRPC and the HTTP client have in common; returns the ids that were written."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert all(client.is_model_ready(model) for model in MODELS)
    assert client.is_model_ready("generate", "1")
    written = client.infer("generate", [text(kind, "Hello")], parameters=SETTINGS, request_id="one")
    assert written.get_response().id == "one" if kind is grpc else written.get_response()["id"] == "one"
    assert written.as_numpy("finish_reason")[0] == b"length"
    encoded = client.infer("encoder", [text(kind, "Hello there")]).as_numpy("latents")
    for values in (encoded, encoded.astype(np.float16)):
        assert client.infer("decoder", [latents(kind, values)]).as_numpy("text_output").shape == (1,)
    outputs = [kind.InferRequestedOutput("latents")]
    sampled = client.infer("prior", [latents(kind, encoded)], outputs=outputs, parameters={"max_blocks": 2, "steps": 2})
    assert sampled.as_numpy("latents").shape[1] == encoded.shape[1]
    refused = None
    try:
        client.infer("generate", [text(kind, "Hello")], parameters={"steps": 0})
    except utils.InferenceServerException as error:
        refused = error
    assert refused, "steps of 0 were taken"
    assert "parameters.steps: got 0, expected 1 to 1000" in refused.message()
    assert "INVALID_ARGUMENT" in refused.status() or refused.status() == "400"
    return list(written.as_numpy("token_ids"))


def streamed(client: Any) -> list[int]:
    """The ids of a stream, an answer a block."""
    answers: queue.Queue[Any] = queue.Queue()
    flag = grpc.InferInput("streaming", [1], "BOOL")
    flag.set_data_from_numpy(np.array([True]))
    client.start_stream(lambda result, error: answers.put(error or result))
    inputs = [text(grpc, "Hello"), flag]
    client.async_stream_infer("generate", inputs, parameters=SETTINGS, enable_empty_final_response=True)
    ids: list[int] = []
    while True:
        answer = answers.get(timeout=30)
        ids += list(answer.as_numpy("token_ids"))
        if answer.get_response().parameters["triton_final_response"].bool_param:
            client.stop_stream()
            return ids


def main() -> None:
    with grpc.InferenceServerClient(sys.argv[1]) as client:
        assert {tensor.name for tensor in client.get_model_metadata("prior").outputs} == {"latents"}
        ids = use(grpc, client)
        assert streamed(client) == ids
    with http.InferenceServerClient(sys.argv[2].removeprefix("http://")) as client:
        assert [tensor["name"] for tensor in client.get_model_metadata("prior")["outputs"]] == ["latents"]
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert use(http, client) == ids
        plain = http.InferInput("text_input", [1], "BYTES")
        plain.set_data_from_numpy(np.array(["Hello"], dtype=object), binary_data=False)
        wanted = [http.InferRequestedOutput("token_ids", binary_data=False)]
        written = client.infer("generate", [plain], outputs=wanted, parameters=SETTINGS)
        assert written.get_response()["outputs"][0]["data"] == ids


main()
