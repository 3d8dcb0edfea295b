"""Products of float8 (e4m3) on a GPU: a scale for each output channel of weights, and for each row of inputs, or for
each 128 numbers of one."""

from importlib.util import find_spec
from typing import Final, NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST: Final = 448.0
LEAST: Final = 1e-12  # of a scale's numerator: rows of zeros
GROUP: Final = 128  # numbers of a row, if not all, that share a scale
_LEAST_CAPABILITY = (8, 9)


class Scaled(NamedTuple):
    """What such a product reads."""

    rows: Tensor  # (R, K) float8
    scales: (
        Tensor  # float32, what was divided by: the largest absolute value over 448, of each row (R,) or group (R, G)
    )


def quantized(x: Tensor) -> Scaled:
    """Rows (R, K) to float8. One with a number that is not finite gives NaN in a product."""
    x = x.float()
    scale = x.abs().amax(dim=1).clamp_min(LEAST) / LARGEST
    return Scaled((x / scale[:, None]).to(FLOAT8), scale)


def widened(x: Scaled) -> Tensor:
    """(R, K) float32."""
    groups = x.scales.view(len(x.rows), -1).repeat_interleave(GROUP if x.scales.ndim == 2 else x.rows.shape[1], dim=1)
    return x.rows.float() * groups[:, : x.rows.shape[1]]


def inputs_in(x: Tensor, dtype: torch.dtype) -> Tensor | Scaled:
    """Rows (R, K) as products in `dtype` read them."""
    return quantized(x) if dtype == FLOAT8 else x.to(dtype)


def missing(device: torch.device) -> str | None:
    """Why such products are not to be had there, or None."""
    if device.type != "cuda":
        return "it is for GPUs"
    if find_spec("triton") is None:
        return "Triton is not installed (the extra `kernels`)"
    if (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        return "it takes compute capability 8.9, this GPU has {}.{}".format(*capability)
    return None


class Float8Weight:
    """A weight (out, in), float32, quantised to the nearest. Holds a quarter of its bytes."""

    def __init__(self, weight: Tensor):
        from colaserve_services.model import kernels  # importing it takes Triton

        self._kernels, self._weight = kernels, quantized(weight)

    def product(self, x: Tensor | Scaled, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor | Scaled:
        """activation(x W^T + bias): (..., in), or rows with scales, to (..., out) in `dtype`; what an activation gives
        goes into another such product, and is (R, out) with scales.

        A row with a number that is not finite gives NaN.
        """
        rows = x if isinstance(x, Scaled) else self._kernels.quantize(x.to(dtype).flatten(0, -2).contiguous())
        made = dtype if activation == "none" else FLOAT8
        found: Tensor | Scaled = self._kernels.product(*rows, *self._weight, bias, activation, made)
        return found.unflatten(0, x.shape[:-1]) if isinstance(x, Tensor) and isinstance(found, Tensor) else found
