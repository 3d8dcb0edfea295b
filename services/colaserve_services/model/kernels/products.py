"""Products with a weight and their activation, one launch: of float8 (e4m3), and those that cuBLAS has no activation
for.

float8 has a scale for each output channel of weights, and for each row of inputs, or for each `GROUP` numbers of a row
that a product with an activation writes: a program has no more of it. cuBLAS has no such product for a few rows and
many columns. It takes compute capability 8.9.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from colaserve_services.model.float8 import FLOAT8, GROUP, Scaled, quantized, widened
from colaserve_services.model.kernels.fp8 import operation, rows_for, scale_of
from colaserve_services.model.kernels.registry import dot_type, launch
from colaserve_services.model.layers import ACTIVATIONS, Linear

_BYTES = GROUP  # of a row that are multiplied at once
_SHARED = 99 << 10  # bytes of shared memory that a block may have at least
_MOST_STAGES = 4
# Up to so many rows: tiles of rows and columns, and warps. Few rows wait for the weights' bytes: small tiles of
# columns, so that all of a card reads them.
_TILES = ((16, (16, 16, 4)), (32, (32, 16, 4)), (128, (64, 64, 4)), (1 << 31, (128, 128, 8)))
_TILE_OF_FLOAT32 = 32, 32, 8  # which matrix units do not multiply


@triton.jit
def _sums(
    x, x_scales, weight, scales, bias, m, seen_m, n, seen_n, K,
    GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr, AT_ONCE: tl.constexpr,
    DOT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of x W^T + bias, float32."""
    rows, columns = x + m.to(tl.int64)[:, None] * K, weight + n.to(tl.int64)[:, None] * K
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, SUMS * AT_ONCE):
        for part in tl.static_range(AT_ONCE):  # their loads do not wait for one another
            first = start + part * SUMS
            k = (first + tl.arange(0, SUMS))[None, :]
            some = tl.load(rows + k, seen_m[:, None] & (k < K), 0.0).to(DOT)
            others = tl.trans(tl.load(columns + k, seen_n[:, None] & (k < K), 0.0).to(DOT))
            if GROUPED:
                scale = tl.load(x_scales + m * tl.cdiv(K, SUMS) + first // SUMS, seen_m & (first < K), 0.0)
                found += tl.dot(some, others) * scale[:, None]
            else:
                found = tl.dot(some, others, found, input_precision="ieee", max_num_imprecise_acc=EXACT)
    if scales is not None:
        found *= tl.load(scales + n, seen_n, 0.0)[None, :]
        if not GROUPED:
            found *= tl.load(x_scales + m, seen_m, 0.0)[:, None]
    if bias is not None:
        found += tl.load(bias + n, seen_n, 0.0)[None, :].to(tl.float32)
    return found


@triton.jit(do_not_specialize=["rows", "outputs", "inputs"])
def _product(
    x, x_scales, weight, scales, bias, out, out_scales, rows, outputs, inputs,
    MULTIPLE: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SUMS: tl.constexpr, AT_ONCE: tl.constexpr, DOT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`outputs` and `inputs` are numbers of multiples, so that one compiled kernel takes all weights, as they lie."""
    N, K = outputs * MULTIPLE, inputs * MULTIPLE
    n, m = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    seen_n, seen_m = n < N, m < rows
    found = _sums(
        x, x_scales, weight, scales, bias, m, seen_m, n, seen_n, K, GROUPED, ROWS, COLUMNS, SUMS, AT_ONCE, DOT, EXACT
    )
    if ACTIVATION == "gelu_tanh":
        found *= tl.sigmoid(1.5957691216057308 * found * (1.0 + 0.044715 * found * found))
    if ACTIVATION == "gelu":
        found *= 0.5 + 0.5 * tl.erf(found * 0.7071067811865476)
    if ACTIVATION == "silu":
        found *= tl.sigmoid(found)
    if ACTIVATION == "swiglu":
        gate = _sums(
            x, x_scales, weight, scales, bias, m, seen_m, n + N, seen_n, K, GROUPED, ROWS, COLUMNS, SUMS, AT_ONCE, DOT,
            EXACT,
        )  # fmt: skip
        found *= gate * tl.sigmoid(gate)
    if out_scales is not None:  # the program's columns are a group
        scale = scale_of(found, 1)
        tl.store(out_scales + m * tl.num_programs(0) + tl.program_id(0), scale, seen_m)
        found = found / scale[:, None]
    at = m.to(tl.int64)[:, None] * N + n
    tl.store(out + at, found.to(out.dtype.element_ty), seen_m[:, None] & seen_n[None, :])


def _width(weight: Tensor, activation: str) -> int:
    return len(weight) // 2 if activation == "swiglu" else len(weight)


def product_reference(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor | None, bias: Tensor | None, activation: str,
    dtype: torch.dtype,
) -> Tensor | Scaled:  # fmt: skip
    one = x.float() if x_scales is None else widened(Scaled(x, x_scales))
    other = weight.float() if scales is None else widened(Scaled(weight, scales))
    out = ACTIVATIONS[activation](one @ other.T + (0.0 if bias is None else bias.float()))
    if dtype != FLOAT8:
        return out.to(dtype)
    rows, found = zip(*map(quantized, out.split(GROUP, dim=1)), strict=True)
    return Scaled(torch.cat(rows, dim=1), torch.stack(found, dim=1))


@operation("product", lambda x, _, weight, *rest: (x, n := _width(weight, rest[-2]), rest[-1], -(-n // GROUP)))
def product(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor | None, bias: Tensor | None, activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """activation(x W^T + bias), as Linear names activations: (R, K) to (R, N) in `dtype`; float8 with a scale for each
    `GROUP` numbers.

    x (R, K) and weight (N, K), or (2 N, K) for swiglu, in one dtype; of float8, x_scales (R,), or (R, groups) as this
    writes them, and scales (N,).
    """
    assert all(t.is_contiguous() for t in (x, weight)), "rows lie one after the other"
    (R, K), N = x.shape, _width(weight, activation)
    out, out_scales = rows_for(x, N, dtype, -(-N // GROUP))
    rows, columns, warps = next(tiles for most, tiles in _TILES if most >= R)
    if x.dtype == torch.float32:
        rows, columns, warps = _TILE_OF_FLOAT32
    if dtype == FLOAT8:
        columns = GROUP
        if activation == "swiglu":  # two tiles of sums
            rows, warps = min(rows, 64), 8
    at_once, multiple = max(1, 64 // columns), math.gcd(16, K, N)
    launch(
        _product, (-(-N // columns), -(-R // rows)), x, x_scales, weight, scales, bias, out,
        out_scales if dtype == FLOAT8 else None, R, N // multiple, K // multiple, MULTIPLE=multiple,
        ACTIVATION=activation, GROUPED=x_scales is not None and x_scales.ndim == 2, ROWS=rows, COLUMNS=columns,
        SUMS=_BYTES // x.itemsize, AT_ONCE=at_once, DOT=dot_type(x.dtype), EXACT=_BYTES if x.dtype == FLOAT8 else None,
        warps=warps, stages=min(_MOST_STAGES, _SHARED // ((rows + columns) * _BYTES * at_once)),
    )  # fmt: skip
    return out, out_scales


def activated(linear: Linear, x: Tensor | Scaled) -> Tensor | Scaled:
    """What it gives of (R, K), in one launch."""
    if isinstance(x, Scaled) or not linear.weight.numel():  # of float8, or packed for a CPU
        return linear(x)
    return product(x, None, linear.weight, None, linear.bias, linear.activation, x.dtype)
