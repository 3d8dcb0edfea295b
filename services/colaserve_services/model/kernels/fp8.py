"""Rows as products of float8 (e4m3) read them, with scales: whoever makes them writes them so."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from colaserve_services.model.float8 import FLOAT8, LARGEST, LEAST, Scaled
from colaserve_services.model.kernels.registry import launch, padded, warps_of

_LARGEST, _LEAST = tl.constexpr(LARGEST), tl.constexpr(LEAST)


@triton.jit
def scale_of(numbers, AXIS: tl.constexpr):
    """Of those along an axis, or None for all; NaN if one is not finite."""
    return tl.maximum(tl.max(tl.abs(numbers), AXIS), _LEAST) / _LARGEST + tl.sum(numbers * 0.0, AXIS)


@triton.jit
def store_row(out, at, scales, i, row, seen):
    """Write the i-th row: as float8 with its scale where there are scales. What is not seen of it is 0."""
    if scales is not None:
        scale = scale_of(row, None)
        tl.store(scales + i, scale)
        row = row / scale
    tl.store(out + at, row.to(out.dtype.element_ty), seen)


def rows_for(x: Tensor, width: int, dtype: torch.dtype, *groups: int) -> tuple[Tensor, Tensor]:
    """What a kernel writes for rows of x on the device: (R, width) in `dtype`, and scales, of float8 alone: (R,), or
    (R, groups)."""
    scales = x.new_empty(len(x) if dtype == FLOAT8 else 0, *groups, dtype=torch.float32)
    return x.new_empty(len(x), width, dtype=dtype), scales


def operation(
    name: str, like: Callable[..., tuple[Any, ...]], mutates: Sequence[str] = ()
) -> Callable[[Callable[..., tuple[Tensor, Tensor]]], Callable[..., Any]]:
    """Make an operation of a function that returns what `rows_for` made for `like` of its arguments; what is called
    gives that as a product takes it: a tensor, or `Scaled`."""

    def registered(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"colaserve::{name}", function, mutates_args=mutates)
        op.register_fake(lambda *given: rows_for(*like(*given)))

        @wraps(function)
        def called(*given: Any) -> Tensor | Scaled:
            rows, scales = op(*given)
            return Scaled(rows, scales) if rows.dtype == FLOAT8 else rows

        return called

    return registered


@triton.jit
def _quantize(x, out, scales, D: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, TILE)
    store_row(out, i * D + d, scales, i, tl.load(x + i * D + d, d < D, 0.0).to(tl.float32), d < D)


@operation("float8_quantize", lambda x: (x, x.shape[1], FLOAT8))
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """As float8.quantized, of rows (R, K) float32 or bfloat16; for what no kernel of this package writes."""
    assert x.is_contiguous(), "rows lie one after the other"
    (R, K), (out, scales) = x.shape, rows_for(x, x.shape[1], FLOAT8)
    launch(_quantize, (R,), x, out, scales, D=K, TILE=padded(K), warps=warps_of(padded(K)))
    return out, scales
