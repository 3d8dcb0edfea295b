"""Requests of the Open Inference Protocol, what an answer holds, and the protocol over fake stages."""

from typing import Any

import numpy as np

from colaserve_services.coordinator import Coordinator
from colaserve_services.inference import open_inference_pb2 as pb
from colaserve_services.inference.service import InferenceServicer
from colaserve_services.rpc.local import LocalStub
from tests.services.coordinator.conftest import fakes, over
from tests.services.coordinator.stage_fakes import FakePrior


def parameters(**values: Any) -> dict[str, pb.InferParameter]:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    return {name: pb.InferParameter(**{kinds[type(value)]: value}) for name, value in values.items()}


def text(value: str | bytes, name: str = "text_input") -> dict[str, Any]:
    content = value.encode() if isinstance(value, str) else value
    return {"name": name, "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [content]}}


def raw(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def streaming(value: bool = True) -> dict[str, Any]:
    return {"name": "streaming", "datatype": "BOOL", "shape": [1], "contents": {"bool_contents": [value]}}


def latents(values: np.ndarray, datatype: str = "FP32", typed: bool = False) -> dict[str, Any]:
    contents = {"contents": {"fp32_contents": values.ravel()}} if typed else {}
    return {"name": "latents", "datatype": datatype, "shape": values.shape, **contents}


def asked(model: str, *inputs: Any, raw_contents: Any = (), outputs: Any = (), **more: Any) -> pb.ModelInferRequest:
    wanted = [{"name": name} for name in outputs]
    given = parameters(**more)
    return pb.ModelInferRequest(
        model_name=model, id="x", inputs=inputs, outputs=wanted, parameters=given, raw_input_contents=raw_contents
    )


def outputs(response: pb.ModelInferResponse) -> dict[str, Any]:
    """By name, each with its type."""

    def read(tensor: Any, content: bytes) -> Any:
        if tensor.datatype == "BYTES":
            assert (tensor.shape, int.from_bytes(content[:4], "little")) == ([1], len(content) - 4)
            return content[4:].decode()
        kind = {"FP32": "<f4", "UINT32": "<u4"}[tensor.datatype]
        return np.frombuffer(content, kind).reshape(tensor.shape)

    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {tensor.name: read(tensor, content) for tensor, content in pairs}


async def connected(**limits: Any) -> tuple[Coordinator, FakePrior]:
    """A coordinator, and the prior behind it."""
    stages = fakes()
    coordinator = over(stages, **limits)
    await coordinator.connect()
    return coordinator, stages["prior"]


async def served(**limits: Any) -> tuple[Any, FakePrior]:
    """A stub of the service, and the prior behind it."""
    coordinator, prior = await connected(**limits)
    return LocalStub(InferenceServicer(coordinator, lambda: True)), prior
