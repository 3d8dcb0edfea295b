"""Latents as a value: an array that knows which latent space it belongs to."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from colaserve.v1 import types_pb2
from colaserve_client.arrays import FloatArray, array_from_tensor, float_array, tensor_from_array
from colaserve_client.errors import ModelMismatch, invalid
from colaserve_client.writing import write_file

_FORMAT = "colaserve.latents.v1"


class Latents:
    """Normalised latents of one sequence: float32, (n, d), read-only, with the fingerprint of their space.

    An empty space means that the caller vouches for it. Equal means: the same space and the same numbers.

    >>> import numpy as np
    >>> latents = Latents(np.zeros((10, 16)), space="0123456789abcdef")
    >>> len(latents), latents.dim
    (10, 16)
    >>> latents[2:5]
    Latents(n=3, d=16, space='0123456789abcdef')
    >>> [len(block) for block in latents.blocks(4)]
    [4, 4, 2]
    >>> latents[:4] + latents[4:] == latents
    True
    """

    __slots__ = ("_space", "_values")

    def __init__(self, values: ArrayLike, space: str = "") -> None:
        array = float_array(values, "latents")
        if array.ndim != 2:
            raise invalid("latents", f"expected an array of shape (n, d), got shape {array.shape}")
        array.flags.writeable = False
        self._values, self._space = array, space

    def __reduce__(self) -> tuple[type["Latents"], tuple[FloatArray, str]]:
        return Latents, (self._values, self._space)  # copies are read-only too

    @property
    def values(self) -> FloatArray:
        """The array, (n, d), read-only."""
        return self._values

    @property
    def space(self) -> str:
        """The fingerprint of the latent space, 16 hex digits, or empty."""
        return self._space

    @property
    def dim(self) -> int:
        """d, channels of a latent."""
        return int(self._values.shape[1])

    def __len__(self) -> int:
        """n, the number of positions."""
        return int(self._values.shape[0])

    def __getitem__(self, positions: int | np.integer[Any] | slice) -> "Latents":
        """The latents at one or several positions."""
        if isinstance(positions, int | np.integer):
            return Latents(self._values[positions][None], self._space)
        return Latents(self._values[positions], self._space)

    def __iter__(self) -> Iterator["Latents"]:
        """Position by position."""
        return self.blocks(1)

    def blocks(self, size: int) -> Iterator["Latents"]:
        """Cut into blocks of `size` positions; the last may be shorter."""
        if size < 1:
            raise invalid("size", f"expected 1 or more, got {size}")
        return (self[start : start + size] for start in range(0, len(self), size))

    def __add__(self, other: "Latents") -> "Latents":
        """Both in a row; `ModelMismatch` when they belong to different spaces."""
        return Latents.concatenate([self, other])

    @staticmethod
    def concatenate(parts: Iterable["Latents"]) -> "Latents":
        """All in a row, at least one; an empty space takes over that of the others.

        Raises `ModelMismatch` when they belong to different spaces.
        """
        parts = list(parts)
        if not parts:
            raise invalid("parts", "expected one or more latents, got none")
        spaces = sorted({part.space for part in parts if part.space})
        if len(spaces) > 1:
            raise ModelMismatch(f"latents of different spaces cannot be joined: {', '.join(spaces)}")
        if len({part.dim for part in parts}) > 1:
            raise ModelMismatch(f"latents of {sorted({part.dim for part in parts})} channels cannot be joined")
        return Latents(np.concatenate([part.values for part in parts]), *spaces)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Latents):
            return NotImplemented
        return self._space == other._space and np.array_equal(self._values, other._values)

    def __hash__(self) -> int:
        return hash((self._space, self._values.shape, (self._values + 0.0).tobytes()))  # -0.0 equals 0.0

    def __repr__(self) -> str:
        return f"Latents(n={len(self)}, d={self.dim}, space={self._space!r})"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """So that numpy functions take latents."""
        return self._values.astype(dtype or np.float32, copy=bool(copy))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, see `save_latents`."""
        save_latents(path, {"latents": self})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Latents":
        """Read a safetensors file that holds one sequence; `load_latents` reads several."""
        found = load_latents(path)
        if len(found) != 1:
            raise invalid("path", f"expected one sequence in {os.fspath(path)}, got {len(found)}; use load_latents")
        return next(iter(found.values()))

    @staticmethod
    def from_proto(message: types_pb2.Latents) -> "Latents":
        """The value of a message; float32, bfloat16 and float16 are read."""
        return Latents(array_from_tensor(message.values, "latents.values"), message.space)

    def to_proto(self) -> types_pb2.Latents:
        """The message, float32."""
        return types_pb2.Latents(values=tensor_from_array(self._values, "latents.values"), space=self._space)


def save_latents(path: str | os.PathLike[str], latents: Mapping[str, Latents]) -> None:
    """Write sequences of one space to a safetensors file: a float32 tensor (n, d) each, the space in the metadata."""
    from safetensors.numpy import save

    space = Latents.concatenate(latents.values()).space if latents else ""
    metadata = {"format": _FORMAT, "space": space}
    data = save({name: np.ascontiguousarray(each.values) for name, each in latents.items()}, metadata=metadata)
    write_file(path, data)


def load_latents(path: str | os.PathLike[str]) -> dict[str, Latents]:
    """Read sequences by name, in name order. A file without metadata gives latents of the empty space."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            space = (file.metadata() or {}).get("space", "")
            return {name: Latents(file.get_tensor(name), space) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise invalid("path", f"{os.fspath(path)} is no safetensors file: {error}") from error
