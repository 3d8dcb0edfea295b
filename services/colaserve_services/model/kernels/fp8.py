"""Products of float8 (e4m3): weights with a scale for each output channel, inputs with a scale for each row.

cuBLAS has none for a few rows and many columns. It takes compute capability 8.9.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.float8 import FLOAT8, LARGEST, LEAST, Scaled
from colaserve_services.model.kernels.registry import launch, padded, warps_of

_LARGEST, _LEAST = tl.constexpr(LARGEST), tl.constexpr(LEAST)
_MULTIPLE = 16  # of inputs and outputs
# Up to so many rows: tiles of rows, columns and sums, warps, stages. Few rows wait for the weights' bytes: small tiles
# of columns, so that all of a card reads them.
_TILES = (
    (16, (16, 16, 512, 4, 4)),
    (32, (32, 16, 512, 4, 4)),
    (128, (64, 64, 128, 4, 4)),
    (1 << 31, (128, 128, 128, 8, 3)),
)


@triton.jit
def scale_of(row):
    """Of a row's numbers, a tile of any shape; NaN if one is not finite."""
    return tl.maximum(tl.max(tl.abs(row), axis=None), _LEAST) / _LARGEST + tl.sum(row * 0.0, axis=None)


@triton.jit
def store_row(out, at, scales, i, row, seen):
    """Write the i-th row: as float8 with its scale where there are scales. What is not seen of it is 0."""
    if scales is not None:
        scale = scale_of(row)
        tl.store(scales + i, scale)
        row = row / scale
    tl.store(out + at, row.to(out.dtype.element_ty), seen)


def rows_for(x: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a kernel writes for rows of x on the device: (R, width) in `dtype`, and scales (R,), of float8 alone."""
    scales = x.new_empty(len(x) if dtype == FLOAT8 else 0, dtype=torch.float32)
    return x.new_empty(len(x), width, dtype=dtype), scales


def operation(
    name: str, like: Callable[..., tuple[Tensor, int, torch.dtype]], mutates: Sequence[str] = ()
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


@triton.jit(do_not_specialize=["rows", "outputs", "inputs"])
def _product(
    x, x_scales, weight, scales, bias, out, rows, outputs, inputs, MULTIPLE: tl.constexpr, GELU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """`outputs` and `inputs` are numbers of multiples, so that one compiled kernel takes all weights, as they lie."""
    N, K = outputs * MULTIPLE, inputs * MULTIPLE
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, SUMS):
        k = start + tl.arange(0, SUMS)
        some = tl.load(x + m.to(tl.int64)[:, None] * K + k, (m[:, None] < rows) & (k[None, :] < K), 0.0)
        columns = tl.load(weight + n[:, None] * K + k, (n[:, None] < N) & (k[None, :] < K), 0.0)
        found = tl.dot(some, tl.trans(columns), found, max_num_imprecise_acc=128)
    found *= tl.load(x_scales + m, m < rows, 0.0)[:, None] * tl.load(scales + n, n < N, 0.0)[None, :]
    if bias is not None:
        found += tl.load(bias + n, n < N, 0.0)[None, :].to(tl.float32)
    if GELU:
        found *= tl.sigmoid(1.5957691216057308 * found * (1.0 + 0.044715 * found * found))
    tl.store(out + m.to(tl.int64)[:, None] * N + n, found, (m[:, None] < rows) & (n[None, :] < N))


@operation("float8_quantize", lambda x: (x, x.shape[1], FLOAT8))
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """As float8.quantized, of rows (R, K) float32 or bfloat16; for what no kernel of this package writes."""
    assert x.is_contiguous(), "rows lie one after the other"
    (R, K), (out, scales) = x.shape, rows_for(x, x.shape[1], FLOAT8)
    launch(_quantize, (R,), x, out, scales, D=K, TILE=padded(K), warps=warps_of(padded(K)))
    return out, scales


def product_reference(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype
) -> Tensor:
    out = x.float() @ weight.float().T * x_scales[:, None] * scales + (0.0 if bias is None else bias.float())
    return (F.gelu(out, approximate="tanh") if gelu else out).to(dtype)


@torch.library.custom_op("colaserve::float8_product", mutates_args=())
def product(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype
) -> Tensor:
    """x W^T + bias, then GELU (with tanh) if wanted: (R, K) to (R, N) in `dtype`.

    x (R, K) and weight (N, K) float8, x_scales (R,) and scales (N,), as in `Scaled`.
    """
    assert x.is_contiguous(), "rows lie one after the other"
    (R, K), N = x.shape, len(weight)
    assert N % _MULTIPLE == K % _MULTIPLE == 0, f"inputs and outputs are multiples of {_MULTIPLE}, got {K} and {N}"
    out = x.new_empty(R, N, dtype=dtype)
    rows, columns, sums, warps, stages = next(tiles for most, tiles in _TILES if most >= R)
    launch(
        _product, (-(-N // columns), -(-R // rows)), x, x_scales, weight, scales, bias, out, R,
        N // _MULTIPLE, K // _MULTIPLE, MULTIPLE=_MULTIPLE, GELU=gelu, ROWS=rows, COLUMNS=columns, SUMS=sums,
        warps=warps, stages=stages,
    )  # fmt: skip
    return out


product.register_fake(lambda x, x_scales, weight, *rest: x.new_empty(len(x), len(weight), dtype=rest[-1]))
