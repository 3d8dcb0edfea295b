"""Tensors of the Open Inference Protocol: a request's inputs, checked, and an answer's outputs, as raw contents."""

from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as brief
from typing import Any, Final, NamedTuple

import numpy as np

from colaserve.v1 import types_pb2
from colaserve_services.errors import InvalidRequest, require
from colaserve_services.inference import open_inference_pb2 as pb

LENGTH_BYTES: Final = 4  # before each element of BYTES
_FLOATS: Final[Mapping[str, types_pb2.DataType]] = {
    "FP32": types_pb2.DATA_TYPE_FLOAT32,
    "FP16": types_pb2.DATA_TYPE_FLOAT16,
    "BF16": types_pb2.DATA_TYPE_BFLOAT16,
}
_UINT32_END: Final = 2**32

Input = pb.ModelInferRequest.InferInputTensor


class Spec(NamedTuple):
    """A tensor that a model takes or returns: a text (BYTES), a truth value (BOOL), ids (UINT32) or latents (FP32)."""

    name: str
    datatype: str
    optional: bool = False

    def shape(self, latent_dim: int) -> list[int]:
        """Its extents; -1 is any."""
        return {"UINT32": [-1], "FP32": [-1, latent_dim]}.get(self.datatype, [1])

    def metadata(self, latent_dim: int) -> pb.ModelMetadataResponse.TensorMetadata:
        return pb.ModelMetadataResponse.TensorMetadata(
            name=self.name, datatype=self.datatype, shape=self.shape(latent_dim)
        )


def read_inputs(request: pb.ModelInferRequest, specs: Sequence[Spec]) -> dict[str, Any]:
    """The inputs by name: a str, a bool, or a Tensor message whose values are not checked. Raises InvalidRequest."""
    raw, known = request.raw_input_contents, {spec.name: spec for spec in specs}
    expected = f"one for each of the {len(request.inputs)} inputs, or none"
    require(len(raw) in (0, len(request.inputs)), "raw_input_contents", len(raw), expected)
    found: dict[str, Any] = {}
    for index, tensor in enumerate(request.inputs):
        field, names = f"inputs[{index}]", [name for name in known if name not in found]
        require(tensor.name in names, f"{field}.name", brief(tensor.name), f"one of {names}")
        require(not tensor.parameters, f"{field}.parameters", len(tensor.parameters), "none")
        given = raw[index] if raw else None
        require(given is None or not tensor.contents.ListFields(), f"{field}.contents", "raw contents too", "only one")
        found[tensor.name] = _READERS[known[tensor.name].datatype](tensor, given, field)
    for spec in specs:
        require(spec.optional or spec.name in found, "inputs", list(found), f"{spec.name} among them")
    return found


def _text(tensor: Input, raw: bytes | None, field: str) -> str:
    element = raw_element(raw, f"{field}: its raw contents") if raw is not None else None
    [content] = _one(tensor, "BYTES", "bytes_contents", field) if element is None else [element]
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(field, f"got bytes that are no UTF-8 at {error.start}, expected a text") from None


def _flag(tensor: Input, raw: bytes | None, field: str) -> bool:
    if raw is None:
        [flag] = _one(tensor, "BOOL", "bool_contents", field)
        return bool(flag)
    _check(tensor, "BOOL", field)
    require(raw in (b"\0", b"\1"), field, f"{len(raw)} bytes", "one raw byte, 0 or 1")
    return raw == b"\1"


def _latents(tensor: Input, raw: bytes | None, field: str) -> types_pb2.Tensor:
    require(tensor.datatype in _FLOATS, f"{field}.datatype", brief(tensor.datatype), f"one of {list(_FLOATS)}")
    shape = tensor.shape[:3]  # more than two are refused
    require(all(0 <= n < _UINT32_END for n in shape), f"{field}.shape", list(shape), "extents of 0 to 2^32 - 1")
    if raw is None:
        require(tensor.datatype == "FP32", f"{field}.contents", tensor.datatype, "raw_input_contents for it")
        raw = np.array(_typed(tensor, "fp32_contents", field), "<f4").tobytes()
    return types_pb2.Tensor(dtype=_FLOATS[tensor.datatype], shape=shape, data=raw)


_READERS: Final[Mapping[str, Callable[[Input, bytes | None, str], Any]]] = {
    "BYTES": _text,
    "BOOL": _flag,
    "FP32": _latents,
}


def _one(tensor: Input, datatype: str, name: str, field: str) -> Sequence[Any]:
    _check(tensor, datatype, field)
    elements = _typed(tensor, name, field)
    require(len(elements) == 1, f"{field}.contents.{name}", f"{len(elements)} elements", "1")
    return elements


def _check(tensor: Input, datatype: str, field: str) -> None:
    require(tensor.datatype == datatype, f"{field}.datatype", brief(tensor.datatype), datatype)
    require(tensor.shape == [1], f"{field}.shape", list(tensor.shape[:8]), "[1]")


def _typed(tensor: Input, name: str, field: str) -> Sequence[Any]:
    others = [descriptor.name for descriptor, _ in tensor.contents.ListFields() if descriptor.name != name]
    require(not others, f"{field}.contents", f"{others}", f"{name} for {tensor.datatype}")
    elements: Sequence[Any] = getattr(tensor.contents, name)
    return elements


def raw_element(raw: bytes, field: str) -> bytes:
    """The one element of a raw tensor of BYTES."""
    length = int.from_bytes(raw[:LENGTH_BYTES], "little")
    expected = f"one element: its length in {LENGTH_BYTES} bytes, then so many"
    require(len(raw) >= LENGTH_BYTES and len(raw) == LENGTH_BYTES + length, field, f"{len(raw)} bytes", expected)
    return raw[LENGTH_BYTES:]


def raw_text(content: bytes) -> bytes:
    """A text as a raw tensor of BYTES with one element."""
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def add_output(response: pb.ModelInferResponse, spec: Spec, content: bytes, latent_dim: int) -> None:
    """Add a tensor, whose elements are these bytes."""
    shape = [1]
    if spec.datatype == "BYTES":
        content = raw_text(content)
    elif spec.datatype == "UINT32":
        shape = [len(content) // 4]
    else:
        shape = [len(content) // (4 * latent_dim), latent_dim]
    response.outputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
    response.raw_output_contents.append(content)
