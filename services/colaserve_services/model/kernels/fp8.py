"""Products of float8 (e4m3): weights with a scale for each output channel, inputs with a scale for each row.

cuBLAS has none for a few rows and many columns. It takes compute capability 8.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.float8 import FLOAT8
from colaserve_services.model.kernels.registry import launch, padded, warps_of

_LARGEST = 448.0
_MULTIPLE = 16  # of inputs and outputs
_LEAST = 1e-12  # of a scale's numerator: rows of zeros
# Up to so many rows: tiles of rows, columns and sums, warps, stages. Few rows wait for the weights' bytes: small tiles
# of columns, so that all of a card reads them.
_TILES = (
    (16, (16, 16, 512, 4, 4)),
    (32, (32, 16, 512, 4, 4)),
    (128, (64, 64, 128, 4, 4)),
    (1 << 31, (128, 128, 128, 8, 3)),
)


@triton.jit
def _quantize(x, out, scales, LARGEST: tl.constexpr, LEAST: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, TILE)
    value = tl.load(x + i * D + d, d < D, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value)), LEAST) / LARGEST + tl.sum(value * 0.0)  # NaN if one is not finite
    tl.store(out + i * D + d, (value / scale).to(tl.float8e4nv), d < D)
    tl.store(scales + i, scale)


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


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, K) to float8 and each row's scale (R,), float32: its largest absolute value over 448."""
    scale = x.float().abs().amax(dim=1).clamp_min(_LEAST) / _LARGEST
    return (x.float() / scale[:, None]).to(FLOAT8), scale


def product_reference(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    rows, scale = quantized(x)
    out = rows.float() @ weight.float().T * scale[:, None] * scales + (0.0 if bias is None else bias.float())
    return (F.gelu(out, approximate="tanh") if gelu else out).to(x.dtype)


@torch.library.custom_op("colaserve::float8_product", mutates_args=())
def product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """x W^T + bias, then GELU (with tanh) if wanted: (R, K) float32 or bfloat16 to (R, N) in its dtype; two launches.

    weight (N, K) float8 and scales (N,) as of `quantized`. A row with a number that is not finite gives NaN.
    """
    assert x.is_contiguous(), "rows lie one after the other"
    (R, K), N = x.shape, len(weight)
    assert N % _MULTIPLE == K % _MULTIPLE == 0, f"inputs and outputs are multiples of {_MULTIPLE}, got {K} and {N}"
    inner, inner_scales = torch.empty_like(x, dtype=FLOAT8), torch.empty(R, device=x.device)
    out, tile = x.new_empty(R, N), padded(K)
    launch(
        _quantize, (R,), x, inner, inner_scales, LARGEST=_LARGEST, LEAST=_LEAST, D=K, TILE=tile, warps=warps_of(tile)
    )
    rows, columns, sums, warps, stages = next(tiles for most, tiles in _TILES if most >= R)
    launch(
        _product, (-(-N // columns), -(-R // rows)), inner, inner_scales, weight, scales, bias, out, R,
        N // _MULTIPLE, K // _MULTIPLE, MULTIPLE=_MULTIPLE, GELU=gelu, ROWS=rows, COLUMNS=columns, SUMS=sums,
        warps=warps, stages=stages,
    )  # fmt: skip
    return out


product.register_fake(lambda x, weight, scales, bias, gelu: x.new_empty(len(x), len(weight)))
