"""Latents as a value: an array that knows which latent space it belongs to."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from colaserve.v1 import types_pb2
from colaserve_client.arrays import FloatArray, array_from_tensor, float_array, slerp, tensor_from_array, unit
from colaserve_client.errors import ModelMismatch, invalid
from colaserve_client.writing import write_file

_FORMAT = "colaserve.latents.v1"
_SHOWN = 16  # positions, and numbers of each, in a notebook


_Operator = Callable[["Latents", "LatentsLike"], "Latents"]


def _operators(operation: Callable[..., Any]) -> tuple[_Operator, _Operator]:
    """An arithmetic operator and its reflection: number by number, with numpy's broadcasting."""

    def made(left: Any, right: Any) -> "Latents":
        arrays = [float_array(operand, "operand") for operand in (left, right)]
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused below
                return Latents(operation(*arrays), _common_space([left, right]))
        except ValueError as error:
            shapes = " and ".join(str(array.shape) for array in arrays)
            raise invalid("operand", f"shapes {shapes} give no finite latents: {error}") from error

    return lambda self, other: made(self, other), lambda self, other: made(other, self)


class Latents:
    """Latents of one sequence: float32, (n, d), read-only, with the fingerprint of their space.

    An empty space is not checked. Equal means: the same space and the same numbers.
    `+ - * /` are arithmetic with numbers, arrays and other latents of the space; `concat` joins.

    >>> import numpy as np
    >>> latents = Latents(np.arange(20).reshape(10, 2), space="0123456789abcdef")
    >>> latents.shape
    (10, 2)
    >>> (latents[2:5] - latents[1:4]) / 4
    Latents([[0.5, 0.5],
             [0.5, 0.5],
             [0.5, 0.5]], n=3, d=2, space='0123456789abcdef')
    >>> [len(block) for block in latents.blocks(4)]
    [4, 4, 2]
    >>> Latents.concat([latents[:4], latents[4:]]) == latents
    True
    """

    __slots__ = ("_space", "_values")
    __array_priority__ = 1000  # so that `array + latents` are latents, too

    def __init__(self, values: ArrayLike, space: str = "") -> None:
        self._values, self._space = _checked(values, "latents"), space

    @staticmethod
    def of(values: "LatentsLike", field: str = "latents") -> "Latents":
        """Latents as they are; an array as latents of the empty space. `InvalidRequest` names `field`."""
        return values if isinstance(values, Latents) else Latents(_checked(values, field))

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
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self), self.dim

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

    def numpy(self) -> FloatArray:
        """A copy that can be written to."""
        return self._values.copy()

    def normalized(self) -> "Latents":
        """Every position scaled to length 1; zeros stay zeros.

        >>> Latents([[3, 4], [0, 0]]).normalized().values.tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
        """
        return Latents(unit(self._values), self._space)

    def slerp(self, end: "LatentsLike", weight: float) -> "Latents":
        """The point of the great circle from here to `end`, position by position: weight 0 is here, 1 is `end`.

        >>> Latents([[1, 0]]).slerp([[0, 1]], 0.5).values.round(3).tolist()
        [[0.7070000171661377, 0.7070000171661377]]
        """
        other = Latents.of(end, "end")
        space = _common_space([self, other])
        if self.shape != other.shape:
            raise invalid("end", f"got shape {other.shape}, expected {self.shape}")
        return Latents(slerp(self._values, other._values, weight), space)

    @staticmethod
    def concat(parts: Iterable["LatentsLike"]) -> "Latents":
        """All in a row, at least one; an empty space takes over that of the others.

        Raises `ModelMismatch` when they belong to different spaces.
        """
        found = [Latents.of(part, f"parts[{index}]") for index, part in enumerate(parts)]
        if not found:
            raise invalid("parts", "expected one or more latents, got none")
        if len({part.dim for part in found}) > 1:
            raise ModelMismatch(f"latents of {sorted({part.dim for part in found})} channels cannot be joined")
        return Latents(np.concatenate([part.values for part in found]), _common_space(found))

    __add__, __radd__ = _operators(np.add)
    __sub__, __rsub__ = _operators(np.subtract)
    __mul__, __rmul__ = _operators(np.multiply)
    __truediv__, __rtruediv__ = _operators(np.divide)

    def __neg__(self) -> "Latents":
        return Latents(-self._values, self._space)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Latents):
            return NotImplemented
        return self._space == other._space and np.array_equal(self._values, other._values)

    def __hash__(self) -> int:
        return hash((self._space, self._values.shape, (self._values + 0.0).tobytes()))  # -0.0 equals 0.0

    def __repr__(self) -> str:
        numbers = np.array2string(
            self._values, precision=4, suppress_small=True, separator=", ", threshold=40, edgeitems=2, prefix="Latents("
        )
        return f"Latents({numbers}, n={len(self)}, d={self.dim}, space={self._space!r})"

    def _repr_html_(self) -> str:
        """For notebooks: position by position, the first ones."""
        rows = [[f"{number:.4g}" for number in row[:_SHOWN]] for row in self._values[:_SHOWN].tolist()]
        more = "" if max(self.shape) <= _SHOWN else f", the first {_SHOWN} of each are shown"
        about = f"Latents: {len(self)} positions of {self.dim} numbers{more}; space {self._space or 'not named'}"
        return html_table(about, rows)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """So that numpy functions take latents."""
        return self._values.astype(dtype or np.float32, copy=bool(copy))

    def plot(self, ax: Any = None, *, labels: Sequence[str] = ()) -> Any:
        """Draw a heat map, positions from left to right and channels from top to bottom. Needs matplotlib:
        `colaserve-client[plot]`.

        ax: matplotlib's axes to draw into; None: new ones of pyplot. They are returned.
        labels: one for each position, such as the tokens of an encoding whose latents are a token each.
        """
        from colaserve_client.pictures import heat_map

        return heat_map(self, ax, labels)

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


LatentsLike = Latents | ArrayLike
"""What is taken wherever latents are: latents, or an array of shape (n, d), whose space is not checked."""


def _checked(values: ArrayLike, field: str) -> FloatArray:
    array = float_array(values, field)
    if array.ndim != 2:
        raise invalid(field, f"expected an array of shape (n, d), got shape {array.shape}")
    array.flags.writeable = False
    return array


def _common_space(operands: Iterable[object]) -> str:
    """The space of all that are latents and name one; `ModelMismatch` when they name several."""
    spaces = sorted({one.space for one in operands if isinstance(one, Latents) and one.space})
    if len(spaces) > 1:
        raise ModelMismatch(f"latents of different spaces do not go together: {', '.join(spaces)}")
    return spaces[0] if spaces else ""


def html_table(caption: str, rows: Iterable[Sequence[object]]) -> str:
    """A table for a notebook; everything in it is text."""
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{escape(caption)}</caption>{body}</table>"


def save_latents(path: str | os.PathLike[str], latents: Mapping[str, LatentsLike]) -> None:
    """Write sequences of one space to a safetensors file: a float32 tensor (n, d) each, the space in the metadata."""
    from safetensors.numpy import save

    found = {name: Latents.of(each, name) for name, each in latents.items()}
    metadata = {"format": _FORMAT, "space": _common_space(found.values())}
    data = save({name: np.ascontiguousarray(each.values) for name, each in found.items()}, metadata=metadata)
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
