"""Tensor messages to numpy arrays and back, without torch."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colaserve.v1 import types_pb2
from colaserve_client.errors import invalid

FloatArray = NDArray[np.float32]
LARGEST = 10_000.0  # of latents and noise, either sign, that servers take
_PARALLEL = 1e-3  # sine of the angle below which the great circle is a straight line


def _from_bfloat16(data: bytes) -> FloatArray:
    """A bfloat16 is the upper half of a float32."""
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


_DECODE: Mapping[int, tuple[int, Callable[[bytes], FloatArray]]] = {  # dtype -> element size, decoder
    types_pb2.DATA_TYPE_FLOAT32: (4, lambda data: np.frombuffer(data, "<f4").astype(np.float32)),
    types_pb2.DATA_TYPE_BFLOAT16: (2, _from_bfloat16),
    types_pb2.DATA_TYPE_FLOAT16: (2, lambda data: np.frombuffer(data, "<f2").astype(np.float32)),
}


def array_from_tensor(tensor: types_pb2.Tensor, field: str = "tensor") -> FloatArray:
    """The array of a message; `InvalidRequest` names `field` when dtype, shape and bytes do not fit."""
    if tensor.dtype not in _DECODE:
        raise invalid(field, f"dtype {tensor.dtype} is not one of float32, bfloat16, float16")
    size, decode = _DECODE[tensor.dtype]
    shape = tuple(tensor.shape)
    if len(tensor.data) != size * math.prod(shape):
        raise invalid(field, f"shape {shape} needs {size * math.prod(shape)} bytes, got {len(tensor.data)}")
    return decode(tensor.data).reshape(shape)


def tensor_from_array(values: ArrayLike, field: str = "tensor") -> types_pb2.Tensor:
    """A float32 message of latents or noise; `InvalidRequest` names the position of what is beyond LARGEST."""
    array = float_array(values, field)
    beyond = np.abs(array) > LARGEST
    if beyond.any():
        where = np.argwhere(beyond)[0].tolist()
        raise invalid(field, f"got {array[tuple(where)]:g} at {where}, expected {-LARGEST:g} to {LARGEST:g}")
    return types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=array.astype("<f4").tobytes())


def float_array(values: ArrayLike, field: str) -> FloatArray:
    """A contiguous float32 copy; `InvalidRequest` names `field` when the values are no finite numbers."""
    try:
        if values is None:  # which numpy takes for NaN
            raise TypeError("nothing was given")
        with np.errstate(over="ignore"):  # what is infinite as float32 is refused below
            array = np.array(values, dtype=np.float32, order="C")
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of torch that has a gradient
        raise invalid(field, f"expected numbers, got {type(values).__name__} ({error})") from error
    if not np.isfinite(array).all():
        raise invalid(field, "expected finite numbers, got NaN or infinity")
    return array


def shortest(value: float) -> float:
    """The float that prints as a float32 does: 0.9, where float32's nearest number is 0.8999999761581421."""
    return float(str(np.float32(value)))


def shortest_all(values: FloatArray) -> Any:
    """Nested lists of an array's numbers, each the float that prints as the float32 does."""
    return values.astype(str).astype(np.float64).tolist()


def unit(values: FloatArray) -> FloatArray:
    """Every vector (of the last dimension) scaled to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    return (values / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def lerp(start: FloatArray, end: FloatArray, weight: float) -> FloatArray:
    """The straight line: `start` at weight 0, `end` at 1, bit for bit."""
    if weight in (0, 1):
        return end if weight else start
    return ((1 - weight) * start + weight * end).astype(np.float32)


def slerp(start: FloatArray, end: FloatArray, weight: float) -> FloatArray:
    """The great circle, row by row; the straight line for rows that are nearly parallel (or opposite, or zero)."""
    straight = lerp(start, end, weight)
    if weight in (0, 1):
        return straight
    a, b = start.astype(np.float64), end.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1, keepdims=True) * np.linalg.norm(b, axis=-1, keepdims=True)
    cosine = np.divide((a * b).sum(-1, keepdims=True), norms, out=np.ones_like(norms), where=norms > 0)
    angle = np.arccos(np.clip(cosine, -1, 1))
    sine = np.sin(angle)
    curved = sine > _PARALLEL
    safe = np.where(curved, sine, 1)
    arc = (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / safe
    return np.where(curved, arc, straight).astype(np.float32)
