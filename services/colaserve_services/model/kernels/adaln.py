"""Residuals and norms: what stands between a transformer's products, each one launch over positions."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.float8 import Scaled, inputs_in
from colaserve_services.model.kernels.fp8 import operation, rows_for, store_row
from colaserve_services.model.kernels.registry import launch, padded, warps_of


@triton.jit
def normed(x, seen, eps: tl.constexpr, D: tl.constexpr):
    """LayerNorm without affine over all of x, whose first D numbers in memory are seen; the others are 0."""
    mean = tl.sum(x) / D
    centered = tl.where(seen, x - mean, 0.0)
    return centered * (1.0 / tl.sqrt_rn(tl.sum(centered * centered) / D + eps))


@triton.jit
def _adaln(
    x, y, gate, scale, shift, index, out, scales,
    GATE_ROW: tl.constexpr, SCALE_ROW: tl.constexpr, SHIFT_ROW: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, TILE)
    seen = d < D
    row = tl.load(index + i).to(tl.int64)
    value = tl.load(x + i * D + d, seen, 0.0)
    if y is not None:
        value += tl.load(gate + row * GATE_ROW + d, seen, 0.0) * tl.load(y + i * D + d, seen, 0.0).to(tl.float32)
        tl.store(x + i * D + d, value, seen)
    found = normed(value, seen, EPS, D) * tl.load(scale + row * SCALE_ROW + d, seen, 0.0)
    found += tl.load(shift + row * SHIFT_ROW + d, seen, 0.0)
    store_row(out, i * D + d, scales, i, found, seen)


@operation("adaln", lambda x, *rest: (x, x.shape[1], rest[-1]), ["x"])
def adaln(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, index: Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ops.adaln: x += gate y, in place; then LayerNorm without affine, times scale, plus shift: (R, D) in `dtype`.

    x (R, D) float32; gate, scale and shift are rows (K, D) of a table, `index` (R,) int32 the row for each position:
    what is pinned names the row of time 0.
    """
    R, D = x.shape
    assert x.is_contiguous(), "positions lie one after the other"
    assert y is None or (y.is_contiguous() and gate is not None)
    assert all(t is None or t.stride(1) == 1 for t in (gate, scale, shift)), "rows of a table"
    out, scales = rows_for(x, D, dtype)
    gate = scale if gate is None else gate
    rows = {"GATE_ROW": gate.stride(0), "SCALE_ROW": scale.stride(0), "SHIFT_ROW": shift.stride(0)}
    tile = padded(D)
    launch(
        _adaln, (R,), x, y, gate, scale, shift, index, out, scales if len(scales) else None, **rows, EPS=eps, D=D,
        TILE=tile, warps=warps_of(tile),
    )  # fmt: skip
    return out, scales


@triton.jit
def _residual_norm(
    x, y, weight, bias, out, scales, OF_X: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, TILE)
    seen = d < D
    value = tl.load(x + i * D + d, seen, 0.0)
    branch = tl.load(y + i * D + d, seen, 0.0).to(tl.float32)
    found = normed(value if OF_X else branch, seen, EPS, D)
    if weight is not None:
        found = found * tl.load(weight + d, seen, 0.0) + tl.load(bias + d, seen, 0.0)
    found += branch if OF_X else value
    tl.store(x + i * D + d, found, seen)
    store_row(out, i * D + d, scales, i, found, seen)


Normed = Literal["x", "y"]


def residual_norm_reference(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, of: Normed
) -> Tensor | Scaled:
    one, other = (x, y.float()) if of == "x" else (y.float(), x)
    return inputs_in(x.copy_(F.layer_norm(one, x.shape[-1:], weight, bias, eps) + other), dtype)


@operation("residual_norm", lambda x, *rest: (x, x.shape[1], rest[-2]), ["x"])
def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, of: str
) -> tuple[Tensor, Tensor]:
    """x = LayerNorm(x) + y for `of` "x", x + LayerNorm(y) for "y", in place; the same in `dtype`, (R, D).

    x (R, D) float32; weight and bias (D,) float32, or both None.
    """
    assert of in ("x", "y")
    assert (x.shape, x.is_contiguous(), y.is_contiguous()) == (y.shape, True, True), "positions lie one after the other"
    D = x.shape[1]
    (out, scales), tile = rows_for(x, D, dtype), padded(D)
    launch(
        _residual_norm, (len(x),), x, y, weight, bias, out, scales if len(scales) else None, OF_X=of == "x", EPS=eps,
        D=D, TILE=tile, warps=warps_of(tile),
    )  # fmt: skip
    return out, scales
