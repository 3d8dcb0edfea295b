"""The Open Inference Protocol over HTTP: JSON, with binary tensors behind it if the client likes, to and from the
coordinator's GRPCInferenceService, which checks it."""

import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, Final, NotRequired, TypeVar

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from colaserve_services import __version__
from colaserve_services.errors import Unavailable
from colaserve_services.gateway.answer import json_response, side_by_side
from colaserve_services.gateway.backend import Backend
from colaserve_services.gateway.body import parse, parsed, read_body
from colaserve_services.gateway.dialects.fields import Strict, Text
from colaserve_services.gateway.dialects.refusals import refuse_extras
from colaserve_services.gateway.edge import record_of
from colaserve_services.gateway.errors import invalid, with_own_names
from colaserve_services.gateway.gateway import deadline
from colaserve_services.gateway.openapi import JSON, Endpoint
from colaserve_services.gateway.settings import Bounds
from colaserve_services.inference import open_inference_pb2 as pb
from colaserve_services.inference.tensors import raw_element, raw_text

HEADER_LENGTH: Final = "inference-header-content-length"  # bytes of JSON before the binary tensors
BINARY: Final = "application/octet-stream"
MOST_TENSORS: Final = 16
_RANK: Final = 2  # deeper lists hold no tensor of any model
_INT64: Final = range(-(2**63), 2**63)
_PATHS: Final = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"

Whole = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Parameters = dict[Text, bool | Whole | float | Text]
T = TypeVar("T")


class InferInput(Strict):
    """An input tensor."""

    name: Text
    datatype: Text
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(max_length=8)]
    parameters: Parameters | None = Field(None, description="binary_data_size: bytes behind the JSON that it has.")
    data: list[Any] | None = Field(None, description="The elements, flat or by rows; none where they are binary.")


class InferOutput(Strict):
    """An output that is wanted."""

    name: Text
    parameters: Parameters | None = Field(None, description="binary_data: whether it is to come behind the JSON.")


class InferRequest(Strict):
    """POST /v2/models/{model}/infer."""

    id: Text | None = Field(None, description="Comes back.")
    parameters: Parameters | None = Field(None, description="Settings, such as seed, max_new_tokens and temperature.")
    inputs: Annotated[list[InferInput], Field(max_length=MOST_TENSORS)]
    outputs: Annotated[list[InferOutput], Field(max_length=MOST_TENSORS)] | None = None


class InferTensor(TypedDict):
    """An output tensor."""

    name: str
    datatype: str
    shape: list[int]
    data: NotRequired[list[Any]]
    parameters: NotRequired[dict[str, int]]


class InferResponse(TypedDict):
    """The answer."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    parameters: dict[str, Any]
    outputs: list[InferTensor]


class InferError(TypedDict):
    """Any answer of status 400 and above."""

    error: str


Ready = Callable[[Request], Awaitable[Response]]


def endpoints(backend: Backend, bounds: Bounds, ready: Ready) -> list[Endpoint]:
    """The paths. `ready` answers 200 while requests should come here."""
    handlers = _Handlers(backend, bounds, ready)
    plain, versioned = _PATHS
    infer: dict[str, Any] = {"body": InferRequest, "reads_body": True, "error": InferError}
    shown: dict[str, Any] = {"answers": {JSON: dict[str, Any]}, "error": InferError}
    return [
        Endpoint("GET", "/v2", handlers.server_metadata, **shown),
        Endpoint("GET", "/v2/health/live", handlers.server_live, **shown),
        Endpoint("GET", "/v2/health/ready", handlers.server_ready, **shown),
        Endpoint("GET", plain, handlers.model_metadata, **shown),
        Endpoint("GET", f"{plain}/ready", handlers.model_ready, **shown),
        Endpoint("POST", f"{plain}/infer", handlers.infer, answers={JSON: InferResponse, BINARY: bytes}, **infer),
        Endpoint("GET", versioned, handlers.model_metadata),  # in the document without a version alone
        Endpoint("GET", f"{versioned}/ready", handlers.model_ready),
        Endpoint("POST", f"{versioned}/infer", handlers.infer, **infer),
    ]


class _Handlers:
    def __init__(self, backend: Backend, bounds: Bounds, ready: Ready):
        self._backend, self._bounds, self._ready = backend, bounds, ready

    async def server_metadata(self, _: Request) -> dict[str, Any]:
        """Name and version."""
        return {"name": "colaserve", "version": __version__, "extensions": ["binary_tensor_data"]}

    async def server_live(self, _: Request) -> dict[str, Any]:
        """The process lives."""
        return {"live": True}

    async def server_ready(self, request: Request) -> Response:
        """Whether requests should come here."""
        status = (await self._ready(request)).status_code
        return json_response({"ready": status == 200}, status)

    async def model_metadata(self, request: Request) -> dict[str, Any]:
        """What a model takes and returns."""
        found = await _answered(self._backend.inference_model(*_model(request)))
        shown: dict[str, Any] = MessageToDict(found)
        for tensor in (*shown["inputs"], *shown["outputs"]):
            tensor["shape"] = list(map(int, tensor["shape"]))  # protobuf's JSON has int64 as text
        return shown

    async def model_ready(self, request: Request) -> Response:
        """Whether a model is there, and requests should come here."""
        await self.model_metadata(request)
        status = (await self._ready(request)).status_code
        return json_response({"name": _model(request)[0], "ready": status == 200}, status)

    async def infer(self, request: Request) -> Response:
        """Run a model: `generate`, `encoder`, `decoder` or `prior`."""
        body, record = await read_body(request, self._bounds), record_of(request.scope)
        head = _head_length(request, len(body))
        asked, as_binary = await parsed(body, partial(_read, *_model(request), head))
        record.choices, until = 1, deadline(request, self._bounds)
        found: list[pb.ModelInferResponse] = []

        async def take(_: int, response: pb.ModelInferResponse) -> None:
            found.append(response)

        call = partial(self._backend.messages, "ModelInfer", asked, until)
        try:
            await _answered(side_by_side([call], 1, take, request.receive))
        except asyncio.CancelledError as error:  # the server goes down and its grace is over; the client is still there
            raise Unavailable("the server went down before the answer was complete; a retry may succeed") from error
        counts = found[0].parameters
        record.prompt_tokens = counts["prompt_tokens"].int64_param if "prompt_tokens" in counts else 0
        record.completion_tokens = counts["completion_tokens"].int64_param if "completion_tokens" in counts else 0
        return _response(found[0], as_binary)


async def _answered(call: Awaitable[T]) -> T:
    """What the coordinator answers; its names of fields are those of the request."""
    try:
        return await call
    except grpc.RpcError as error:
        raise with_own_names(error, "the Open Inference Protocol") from error


def _model(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


def _head_length(request: Request, whole: int) -> int:
    """Bytes of JSON at the body's beginning."""
    given = request.headers.get(HEADER_LENGTH)
    if given is None:
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind != JSON:  # a web page of another origin can send a few other kinds unasked
            raise invalid("content-type", f"got {kind[:80]!r}, expected {JSON}, or {HEADER_LENGTH} beside it")
        return whole
    if not (given.isascii() and given.isdigit() and len(given) < 12 and int(given) <= whole):
        raise invalid(HEADER_LENGTH, f"got {given[:80]!r}, expected 0 to {whole}, the body's bytes")
    return int(given)


def _read(model: str, version: str, head: int, whole: bytes) -> tuple[pb.ModelInferRequest, Callable[[str], bool]]:
    """The request, and whether an output is to be binary."""
    tail = whole[head:]
    body = parse(whole[:head], InferRequest)
    refuse_extras(body, allow_unknown=False)
    settings = dict(body.parameters or {})
    by_default = settings.pop("binary_data_output", False) is True
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=body.id or "")
    _set_parameters(request.parameters, settings)
    for index, tensor in enumerate(body.inputs):
        given = dict(tensor.parameters or {})
        raw, tail = _content(tensor, given, tail, f"inputs[{index}]")
        made = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        _set_parameters(made.parameters, given)
        request.raw_input_contents.append(raw)
    if tail:
        raise invalid("inputs", f"the body has {len(tail)} bytes more than their binary_data_size")
    wanted = {}
    for output in body.outputs or ():
        given = dict(output.parameters or {})
        wanted[output.name] = given.pop("binary_data", by_default) is True
        _set_parameters(request.outputs.add(name=output.name).parameters, given)
    return request, lambda name: wanted.get(name, by_default)


def _set_parameters(messages: Any, values: Mapping[str, bool | int | float | str]) -> None:
    for name, value in values.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(messages[name], "uint64_param" if type(value) is int and value not in _INT64 else kind, value)


def _content(tensor: InferInput, given: dict[str, Any], tail: bytes, field: str) -> tuple[bytes, bytes]:
    """The raw content of an input, and the binary tensors after it."""
    size = given.pop("binary_data_size", None)
    if (size is None) == (tensor.data is None):
        raise invalid(field, "expected data, or the parameter binary_data_size, and not both")
    if size is None:
        return _raw(tensor, f"{field}.data"), tail
    if type(size) is not int or not 0 <= size <= len(tail):
        raise invalid(f"{field}.parameters.binary_data_size", f"expected 0 to {len(tail)}, the bytes that are left")
    return tail[:size], tail[size:]


def _raw(tensor: InferInput, field: str) -> bytes:
    elements = tensor.data or []
    for _ in range(_RANK):
        elements = [one for row in elements for one in (row if isinstance(row, list) else [row])]
    kinds = {"BYTES": (str,), "BOOL": (bool,), "FP32": (int, float)}.get(tensor.datatype)
    if kinds is None:
        raise invalid(
            field, f"{tensor.datatype[:80]!r} has no JSON form here; expected BYTES, BOOL, FP32 or binary data"
        )
    if not all(type(one) in kinds for one in elements):
        raise invalid(field, f"expected elements of {tensor.datatype}, flat or in rows")
    try:
        if tensor.datatype == "BYTES":
            return b"".join(raw_text(one.encode()) for one in elements)
        return bytes(elements) if tensor.datatype == "BOOL" else struct.pack(f"<{len(elements)}f", *elements)
    except (OverflowError, UnicodeEncodeError) as error:  # beyond float32, or half of a surrogate pair
        raise invalid(field, str(error)[:200]) from None


def _response(answer: pb.ModelInferResponse, as_binary: Callable[[str], bool]) -> Response:
    tensors, behind = list[InferTensor](), list[bytes]()
    for output, content in zip(answer.outputs, answer.raw_output_contents, strict=True):
        tensor: InferTensor = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if as_binary(output.name):
            tensor["parameters"] = {"binary_data_size": len(content)}
            behind.append(content)
        else:
            tensor["data"] = _elements(output.datatype, content)
        tensors.append(tensor)
    values = {name: getattr(one, one.WhichOneof("parameter_choice")) for name, one in answer.parameters.items()}
    whole: InferResponse = {
        "model_name": answer.model_name, "model_version": answer.model_version, "parameters": values, "outputs": tensors
    }  # fmt: skip
    if answer.id:
        whole["id"] = answer.id
    if not behind:
        return json_response(whole)
    head = to_json(whole)
    return Response(b"".join([head, *behind]), headers={HEADER_LENGTH: str(len(head))}, media_type=BINARY)


def _elements(datatype: str, content: bytes) -> list[Any]:
    if datatype == "BYTES":
        return [raw_element(content, "output").decode()]
    found: list[Any] = np.frombuffer(content, {"FP32": "<f4", "UINT32": "<u4"}[datatype]).tolist()
    return found
