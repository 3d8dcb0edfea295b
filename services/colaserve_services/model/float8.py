"""Products of float8 (e4m3) on a GPU: a scale for each output channel of weights, and for each row of inputs."""

from importlib.util import find_spec
from typing import Final, NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST: Final = 448.0
LEAST: Final = 1e-12  # of a scale's numerator: rows of zeros
_LEAST_CAPABILITY = (8, 9)


class Scaled(NamedTuple):
    """What such a product reads."""

    rows: Tensor  # (R, K) float8
    scales: Tensor  # (R,) float32, what each row was divided by: its largest absolute value over 448


def quantized(x: Tensor) -> Scaled:
    """Rows (R, K) to float8. One with a number that is not finite gives NaN in a product."""
    x = x.float()
    scale = x.abs().amax(dim=1).clamp_min(LEAST) / LARGEST
    return Scaled((x / scale[:, None]).to(FLOAT8), scale)


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
        from colaserve_services.model.kernels import fp8  # importing it takes Triton

        self._kernels, self._weight = fp8, quantized(weight)

    def product(self, x: Tensor | Scaled, bias: Tensor | None, gelu: bool, dtype: torch.dtype) -> Tensor:
        """x W^T + bias, then GELU (with tanh) if wanted: (..., in) to (..., out) in `dtype`; rows with scales as they
        are.

        A row with a number that is not finite gives NaN.
        """
        if isinstance(x, Scaled):
            return self._kernels.product(*x, *self._weight, bias, gelu, dtype)
        rows = self._kernels.quantize(x.to(dtype).reshape(-1, x.shape[-1]).contiguous())
        return self._kernels.product(*rows, *self._weight, bias, gelu, dtype).unflatten(0, x.shape[:-1])
