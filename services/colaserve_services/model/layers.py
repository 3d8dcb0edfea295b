"""The parts that both networks are made of. Inference and training run the same modules."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colaserve_services.model.backend import cpu_kernels
from colaserve_services.model.cpu_features import lacks_bfloat16, packs
from colaserve_services.model.float8 import FLOAT8, Float8Weight, Scaled
from colaserve_services.model.int8 import Int8Weight

# attend(layer, q, k, v) -> output: mixes rows. Queries, keys and values are (..., heads, head_dim), after norm and
# rotary; the leading dimensions are those of the rows that the network was called with. Queries and keys may be float32
# where values are bfloat16; the output has the dtype of the values.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

LinearActivation = Literal["none", "gelu", "gelu_tanh", "silu", "swiglu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[1]) * x.chunk(2, dim=-1)[0],  # of a value and a gate: half as wide
}
_PACKED_FOR = 32  # rows
_GELU_APART_FROM = 128  # rows: oneDNN's GELU behind a product by tiles takes half the product's time
_WIDENED_AT_ONCE = 1 << 19  # elements of a weight: as many as stay in a core's own cache until the product reads them
_FUSED: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
}


class Linear(nn.Linear):
    """activation(x W^T + b). `pack` fixes the weight for inference in the layout the backend is fastest with."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: LinearActivation = "none"):
        super().__init__(in_features, out_features, bias)
        self.activation = activation
        self._packed: Tensor | None = None
        self._quantized: Int8Weight | Float8Weight | None = None
        self._widens = self._in_epilogue = self._gelu_apart = False

    def forward(self, x: Tensor | Scaled) -> Tensor | Scaled:  # type: ignore[override]
        """(..., in_features) -> (..., out_features), or half of that."""
        if isinstance(self._quantized, Float8Weight):
            return self._quantized.product(x, self.bias, self.activation, self.weight.dtype)
        assert isinstance(x, Tensor), "rows with scales are for products of float8"
        if self._quantized:
            gelu = self.activation == "gelu_tanh"
            product = self._quantized.product(x, self.bias, gelu, self.weight.dtype)
            return product if gelu else ACTIVATIONS[self.activation](product)
        if self._packed is not None:
            x = x.to(self.weight.dtype)
            apart = self._gelu_apart and x.shape[:-1].numel() >= _GELU_APART_FROM
            fused = None if apart else _FUSED.get(self.activation)
            product = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, *(fused or _FUSED["none"]))
            if fused:
                return product
            return cpu_kernels.rescale(product, gelu=True) if apart else ACTIVATIONS[self.activation](product)
        if self._widens:
            return self._widened(x)
        if not torch.is_grad_enabled():
            x = x.to(self.weight.dtype)
            if self._in_epilogue:
                return torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True).unflatten(
                    0, x.shape[:-1]
                )
        return ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))

    def pack(self) -> None:
        """Choose the fastest way to multiply with a float32 or bfloat16 weight on this CPU, or GPU.

        Where oneDNN's blocked layout makes it faster, that alone is kept, tuned for a few rows. CUDA's products compute
        GELU's approximation themselves.
        """
        weight = self.weight.detach()
        if weight.device.type != "cpu":
            self._in_epilogue = self.activation == "gelu_tanh" and self.bias is not None
            return
        if packs(weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
            self.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
            self._gelu_apart = self.activation == "gelu_tanh" and cpu_kernels.by_tiles(weight.dtype)
        else:
            self._widens = weight.dtype == torch.bfloat16 and lacks_bfloat16() is not None

    @property
    def is_quantized(self) -> bool:
        return self._quantized is not None

    @property
    def inputs(self) -> torch.dtype:
        """What it is fastest with; with float8 those are `Scaled`."""
        return FLOAT8 if isinstance(self._quantized, Float8Weight) else self.weight.dtype

    def quantize(self, kind: torch.dtype, dtype: torch.dtype) -> None:
        """Keep the weight, which must be float32, as int8 or float8; outputs are in `dtype`, as what comes in is."""
        self._quantized = (Float8Weight if kind == FLOAT8 else Int8Weight)(self.weight.detach())
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def _widened(self, x: Tensor) -> Tensor:
        """Computed in float32, some rows of the weight at a time: without the hardware bfloat16 takes ten times that.

        It rounds where the hardware does: the input, the weight and the output.
        """
        x = x.bfloat16().float()
        pieces = (piece.float() for piece in self.weight.split(max(1, _WIDENED_AT_ONCE // self.in_features)))
        product = torch.cat([F.linear(x, piece) for piece in pieces], dim=-1)
        if self.bias is not None:
            product += self.bias
        return ACTIVATIONS[self.activation](product).bfloat16()


def padded_rows(rows: int, dtype: torch.dtype, device: torch.device, step: int = 16, parts: int = 8) -> int:
    """Rows that a product over so many is to have, so that there are few different numbers: a multiple of `step`, or of
    the next power of two over `parts`.

    For each number of rows oneDNN generates code on a CPU and keeps some 0.6 MiB of it. Elsewhere `rows`.
    """
    if device.type != "cpu" or not (dtype == torch.bfloat16 or packs(dtype)):
        return rows
    step = max(step, (1 << (rows - 1).bit_length()) // parts)
    return -(-rows // step) * step


class LayerNorm(nn.LayerNorm):
    """LayerNorm that always computes in float32, whatever comes in; returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


def rotary_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for i < dim/2, float32."""
    return torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float32)


def rotary_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency: (...,) -> (..., dim/2) each, float32."""
    angles = positions.float()[..., None] * frequencies
    return angles.cos(), angles.sin()


def masked_attention(mask: Tensor | None) -> Attend:
    """Attention of whole sequences for training: rows are (N, L), `mask` broadcasts to (N, heads, L, L), True sees."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.to(v.dtype).transpose(-3, -2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-3, -2)

    return attend


def block_causal_mask(queries: Tensor, keys: Tensor, block_size: int) -> Tensor:
    """True where a query position sees a key position: floor(key / block) <= floor(query / block). (..., Q, K)."""
    return keys[..., None, :] // block_size <= queries[..., :, None] // block_size


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor made on the CPU, on the device, without waiting for what the device still has to do.

    CUDA reads them from pinned memory, which torch keeps as long as that takes: from other memory larger ones wait.
    """
    pinned = values.pin_memory() if device.type == "cuda" and values.device.type == "cpu" else values
    return pinned.to(device, non_blocking=True)
