"""Tensor messages to numpy arrays and back, without torch."""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colaserve.v1 import types_pb2
from colaserve_client.errors import invalid

FloatArray = NDArray[np.float32]


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
    """A float32 message of an array; `InvalidRequest` names `field` when the values are no finite numbers."""
    array = float_array(values, field)
    return types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=array.astype("<f4").tobytes())


def float_array(values: ArrayLike, field: str) -> FloatArray:
    """A contiguous float32 copy; `InvalidRequest` names `field` when the values are no finite numbers."""
    try:
        array = np.array(values, dtype=np.float32, order="C")
    except (TypeError, ValueError) as error:
        raise invalid(field, f"expected numbers, got {type(values).__name__} ({error})") from error
    if not np.isfinite(array).all():
        raise invalid(field, "expected finite numbers, got NaN or infinity")
    return array
