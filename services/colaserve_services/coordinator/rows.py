"""Rows of a Latents message, taken and joined by their bytes: the values are never looked at."""

from collections.abc import Sequence

from colaserve.v1 import types_pb2

FLOAT32 = types_pb2.DATA_TYPE_FLOAT32
_BYTES = 4


def count(latents: types_pb2.Latents) -> int:
    """n of (n, d); 0 for a message that was not set."""
    return latents.values.shape[0] if latents.values.shape else 0


def take(latents: types_pb2.Latents, start: int, end: int) -> types_pb2.Latents:
    """Rows [start, end) of float32 latents."""
    width = latents.values.shape[1] if latents.values.shape else 0
    stride = width * _BYTES
    data = latents.values.data[start * stride : end * stride]
    return of(data, width, latents.space)


def join(parts: Sequence[types_pb2.Latents], width: int, space: str, zeros: int = 0) -> types_pb2.Latents:
    """All rows of float32 latents, one after the other, and so many of zeros; `width` is d."""
    data = [*(part.values.data for part in parts), bytes(zeros * width * _BYTES)]
    return of(b"".join(data), width, space)


def of(data: bytes, width: int, space: str) -> types_pb2.Latents:
    """Latents of these bytes, row-major float32."""
    rows = len(data) // (width * _BYTES) if width else 0
    return types_pb2.Latents(values=types_pb2.Tensor(dtype=FLOAT32, shape=(rows, width), data=data), space=space)
