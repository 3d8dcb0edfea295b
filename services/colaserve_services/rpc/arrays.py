"""Tensor and Latents messages to numpy arrays and back, without torch. All that a sender can get wrong is checked."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colaserve.v1 import types_pb2
from colaserve_services.bounds import LATENT
from colaserve_services.errors import InvalidRequest, ModelMismatch

FloatArray = NDArray[np.float32]

_ELEMENT: dict[int, np.dtype[Any]] = {
    types_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
    types_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
}


def to_message(array: NDArray[Any]) -> types_pb2.Tensor:
    """A Tensor message of any shape: of float16 as it is, of all else in float32."""
    dtype = types_pb2.DATA_TYPE_FLOAT16 if array.dtype == np.float16 else types_pb2.DATA_TYPE_FLOAT32
    return types_pb2.Tensor(dtype=dtype, shape=array.shape, data=np.ascontiguousarray(array, _ELEMENT[dtype]).tobytes())


def logprobs_element(dtype: int, field: str) -> np.dtype[Any]:
    """The element type that log-probabilities are asked for in; InvalidRequest for another than float32 and float16."""
    if dtype not in (types_pb2.DATA_TYPE_UNSPECIFIED, types_pb2.DATA_TYPE_FLOAT32, types_pb2.DATA_TYPE_FLOAT16):
        raise InvalidRequest(field, f"got {dtype}, expected DATA_TYPE_FLOAT32 or DATA_TYPE_FLOAT16")
    return _ELEMENT[dtype or types_pb2.DATA_TYPE_FLOAT32]


def from_message(message: types_pb2.Tensor, field: str, shape: Sequence[int | None]) -> FloatArray:
    """A writable float32 array of `shape` (None: any extent there).

    Raises InvalidRequest, naming `field`, for another rank or extent, an unnamed dtype, a byte count that does not fit
    or a value beyond `bounds.LATENT`.
    """
    element = _ELEMENT.get(message.dtype)
    if element is None:
        known = ", ".join(types_pb2.DataType.Name(value) for value in _ELEMENT)
        raise InvalidRequest(f"{field}.dtype", f"got {message.dtype}, expected one of {known}")
    _check_shape(message, field, shape)
    expected = prod(message.shape) * element.itemsize
    if len(message.data) != expected:
        raise InvalidRequest(
            f"{field}.data", f"got {len(message.data)} bytes, shape {list(message.shape)} needs {expected}"
        )
    return _checked(_decode(message, element), field)


def latents_to_message(array: FloatArray, space: str) -> types_pb2.Latents:
    """Latents (n, d) of the space with that fingerprint."""
    return types_pb2.Latents(values=to_message(array), space=space)


def latents_from_message(
    message: types_pb2.Latents, field: str, latent_dim: int, space: str, positions: int | None = None
) -> FloatArray:
    """Latents as (n, latent_dim); a message that was not set gives (0, latent_dim).

    `positions` asks for exactly that n. Raises ModelMismatch for latents of another space, else as `from_message`.
    """
    check_space(message, field, space)
    if not positions and message.values == types_pb2.Tensor():
        return np.zeros((0, latent_dim), np.float32)
    return from_message(message.values, f"{field}.values", (positions, latent_dim))


def check_space(message: types_pb2.Latents, field: str, space: str) -> None:
    """Raise ModelMismatch unless the latents are of `space`, or say nothing about it."""
    if message.space and message.space != space:
        raise ModelMismatch(f"{field}.space: got latents of space {message.space[:64]!r}, this model's is {space!r}")


def _check_shape(message: types_pb2.Tensor, field: str, shape: Sequence[int | None]) -> None:
    fits = len(message.shape) == len(shape) and all(
        want is None or got == want for got, want in zip(message.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise InvalidRequest(f"{field}.shape", f"got {list(message.shape)[:8]}, expected [{wanted}]")


def _decode(message: types_pb2.Tensor, element: np.dtype[Any]) -> FloatArray:
    raw = np.frombuffer(message.data, element)
    if message.dtype == types_pb2.DATA_TYPE_BFLOAT16:
        values = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.astype(np.float32)  # a copy: the message's bytes are read-only
    return values.reshape(tuple(message.shape))


def _checked(array: FloatArray, field: str) -> FloatArray:
    within = np.abs(array) <= LATENT.most  # false for NaN too
    if not within.all():
        where = [int(index) for index in np.argwhere(~within)[0]]
        got = f"got {array[tuple(where)]:g} at {where}"
        raise InvalidRequest(f"{field}.data", f"{got}, expected finite values from {LATENT}")
    return array
