"""Where Triton kernels are launched: counted here, and recorded without a GPU for what compiles them ahead.

What ships is what the functions of this package launch for a model's sizes, so no list of it is kept: `recording`
collects it from calls on small CPU tensors (scripts/check-kernels).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

launches: Counter[str] = Counter()  # of each kernel, since the process began

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32",
    torch.bool: "u1", torch.uint8: "u8",
}  # fmt: skip
_ALIGNED = 16  # bytes: Triton compiles a kernel of its own for pointers that are multiples
_ELEMENTS = 8  # of a thread, in kernels that go over a tile once
_INTERPRETED = triton.knobs.runtime.interpret
_recorded: "dict[Launch, None] | None" = None


class Launch(NamedTuple):
    """A kernel as it is compiled: the type of each argument, the constants among them, which pointers are aligned."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # numbers of the arguments
    warps: int
    stages: int


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    """Start a kernel on the current stream; `constants` are its constexpr arguments."""
    launches[kernel.__name__] += 1
    if _recorded is None:
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
        return
    types, given = dict.fromkeys(constants, "constexpr"), zip(kernel.arg_names, args, strict=False)
    types = {name: "constexpr" if value is None else _type(value) for name, value in given} | types
    constants |= {name: None for name, value in zip(kernel.arg_names, args, strict=False) if value is None}
    aligned = (i for i, value in enumerate(args) if isinstance(value, Tensor) and _is_aligned(value))
    found = tuple(types.items()), tuple(constants.items()), tuple(aligned)
    _recorded[Launch(kernel, *found, warps, stages)] = None


@contextmanager
def recording() -> Iterator[dict[Launch, None]]:
    """Launches within it start nothing: each different one becomes a key of what this gives, outputs are arbitrary."""
    global _recorded
    before, _recorded = _recorded, {}
    try:
        yield _recorded
    finally:
        _recorded = before


def _type(value: Any) -> str:
    return f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"


def _is_aligned(value: Tensor) -> bool:
    """Of an allocation that is aligned itself."""
    return value.storage_offset() * value.itemsize % _ALIGNED == 0


def dot_type(dtype: torch.dtype) -> Any:
    """Of what matrix units multiply. The interpreter has no products in bfloat16: it widens the numbers."""
    kinds = {torch.float8_e4m3fn: tl.float8e4nv} | ({} if _INTERPRETED else {torch.bfloat16: tl.bfloat16})
    return kinds.get(dtype, tl.float32)


def padded(size: int, least: int = 1) -> int:
    """Tiles have powers of two."""
    return max(least, triton.next_power_of_2(size))


def warps_of(elements: int) -> int:
    """For a tile that a kernel goes over once."""
    return min(8, padded(-(-elements // (32 * _ELEMENTS))))
