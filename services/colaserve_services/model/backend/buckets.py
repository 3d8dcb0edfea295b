"""Passes of few sizes over memory that stays where it is: filled on the CPU, moved at once, computed by one graph."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colaserve_services.model.backend import Row
from colaserve_services.model.backend.streams import Event, Stream

# Blocks: two a session, those of contexts and finished ones; what lacks is computed in vain.
ROWS: Final = (
    1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 72, 96, 128, 144, 160, 192, 224, 256, 288, 320, 384,
)  # fmt: skip
KEYS: Final = 256  # of a split of the kernels' attention
STEERING: Final = 1024  # columns of `Denoise.steering` in a pass; rpc/steering.py takes no more for a row
_ALIGNED = 16  # bytes: compiled kernels are told so

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Bucket(NamedTuple):
    """The size of a pass: blocks, and splits of keys that the longest history takes, a power of two."""

    rows: int
    splits: int


class Filled(NamedTuple):
    """Rows of a pass in the memory of the CPU."""

    bucket: Bucket
    number: int  # of the memory
    nbytes: int  # that are to be moved
    rows: Sequence[Row]


class _Fields:
    """Where arrays lie in one piece of memory."""

    def __init__(self, shapes: Shapes):
        self._at: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
        self.nbytes = 0
        for name, (dtype, shape) in shapes.items():
            begin = -(-self.nbytes // _ALIGNED) * _ALIGNED
            self.nbytes = begin + int(np.prod(shape)) * dtype.itemsize
            self._at[name] = begin, self.nbytes, dtype, shape

    def end(self, name: str) -> int:
        return self._at[name][1]

    def of(self, memory: Tensor) -> dict[str, Tensor]:
        """The arrays in (nbytes,) uint8."""
        return {name: memory[a:b].view(dtype).view(shape) for name, (a, b, dtype, shape) in self._at.items()}


class Buckets:
    """`shapes` has the arrays of so many rows, `body` computes from them on the device: tensors that a graph writes
    again and again, good until the next pass of any size. Nothing else of a pass is allocated but what it leaves."""

    def __init__(
        self,
        stream: Stream,
        most: Bucket,
        shapes: Callable[[int], Shapes],
        body: Callable[[Bucket, dict[str, Tensor]], Sequence[Tensor]],
    ):
        """`most` rows of a pass, and splits, at least; a pass of more rows is cut."""
        self.stream, self._body = stream, body
        sizes = [*takewhile(lambda rows: rows < most.rows, ROWS)]
        self._sizes = [*sizes, ROWS[len(sizes)]] if len(sizes) < len(ROWS) else sizes
        self._splits = [1 << i for i in range((most.splits - 1).bit_length() + 1)]
        self._fields = {rows: _Fields(shapes(rows)) for rows in self._sizes}
        self._staged = stream.memory(max(fields.nbytes for fields in self._fields.values()))
        self._host: list[Tensor] = []
        self._views: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}
        self._passes: dict[Bucket, Callable[[], Sequence[Tensor]]] = {}

    @torch.inference_mode()
    def capture(self, fill: Callable[[Bucket], Filled]) -> None:
        """Make what computes each size, the largest first, since the others find their memory in its; `fill` gives a
        pass of a size over no session's rows."""
        self.stream.join()
        with self.stream.on():
            for rows in reversed(self._sizes):
                for splits in reversed(self._splits):
                    bucket = Bucket(rows, splits)
                    self._move(fill(bucket))
                    fields = self._fields[rows].of(self._staged)
                    self._passes[bucket] = self.stream.captured(partial(self._body, bucket, fields))
            self.stream.record().wait()

    def cut(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Pieces that one graph each takes, in their order: what a later one reads an earlier one has written."""
        begin = count = columns = 0
        for i, row in enumerate(rows):
            more = 1 + row.guided
            steers = 0 if row.denoise is None or row.denoise.steering is None else len(row.denoise.steering)
            if i > begin and (count + more > self._sizes[-1] or columns + steers > STEERING):
                yield rows[begin:i]
                begin, count, columns = i, 0, 0
            count, columns = count + more, columns + steers
        if rows:
            yield rows[begin:]

    def size(self, rows: Sequence[Row]) -> int:
        """The smallest bucket that takes them and the unconditional ones beside them."""
        count = len(rows) + sum(row.guided for row in rows)
        return next(size for size in self._sizes if size >= count)

    def host(self, rows: int, number: int) -> dict[str, NDArray[Any]]:
        """The arrays of a size in a memory of the CPU, which hold anything; whoever has filled it before is done."""
        while len(self._host) <= number:
            self._host.append(self.stream.host(len(self._staged)))
        if (rows, number) not in self._views:
            fields = self._fields[rows].of(self._host[number])
            self._views[rows, number] = {name: values.numpy() for name, values in fields.items()}
        return self._views[rows, number]

    def filled(self, rows: Sequence[Row], size: int, number: int, longest: int, last: str = "") -> Filled:
        """`longest`: positions that a row reads; `last`: the array of `shapes` behind which nothing counts."""
        fields = self._fields[size]
        splits = 1 << (-(-longest // KEYS) - 1).bit_length()
        return Filled(Bucket(size, splits), number, fields.end(last) if last else fields.nbytes, rows)

    def start(self, filled: Filled) -> Sequence[Tensor]:
        """Compute; on the stream."""
        self._move(filled)
        return self._passes[filled.bucket]()

    def _move(self, filled: Filled) -> None:
        self._staged[: filled.nbytes].copy_(self._host[filled.number][: filled.nbytes], non_blocking=True)


class UnderWay:
    """A pass on a stream, between two events."""

    def __init__(self, begin: Event, end: Event, results: Callable[[], Sequence[Any]]):
        self._begin, self._end, self._results = begin, end, results

    @property
    def seconds(self) -> float | None:
        return self._end.since(self._begin)

    def done(self) -> bool:
        return self._end.done()

    def results(self) -> Sequence[Any]:
        self._end.wait()
        return self._results()
