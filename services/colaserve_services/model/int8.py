"""Products of int8 on a CPU: weights with a scale for each output channel, inputs with a scale for each row.

So a row's result depends on that row alone. oneDNN multiplies bytes, unsigned with 128 for zero, by signed weights and
adds in 32 bits; the rows' scales, bias and activation come behind it.
"""

import platform
from functools import cache

import torch
from torch import Tensor

from colaserve_services.model.backend import cpu_kernels
from colaserve_services.model.cpu_features import has_vnni

_ZERO = 128
_LARGEST = 127
_LARGEST_IN_16_BITS = 63  # where two products are added in 16 bits: 2 x 255 x 63 still fit


@cache
def missing() -> str | None:
    """Why such products are not to be had here, or None."""
    if platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available():
        return "it takes an x86-64 CPU and a torch with oneDNN"
    if reason := cpu_kernels.missing():
        return f"the compiled kernels are {reason}"
    return None


class Int8Weight:
    """A weight (out, in), float32, quantised to the nearest. Holds a quarter of its bytes."""

    def __init__(self, weight: Tensor):
        largest = _LARGEST if has_vnni() else _LARGEST_IN_16_BITS
        self._scale = (weight.abs().amax(dim=1) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (weight / self._scale[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)

    def product(self, x: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype) -> Tensor:
        """x W^T + bias, then GELU (with tanh) if wanted: (..., in) float32 or bfloat16 to (..., out) in `dtype`.

        A row with a number that is not finite gives NaN.
        """
        rows, scale = cpu_kernels.quantize(x.reshape(-1, x.shape[-1]).contiguous())
        sums = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, _ZERO, self._packed, self._scale, self._zeros, None, 1.0, 0, dtype, "none", [], ""
        )
        return cpu_kernels.rescale(sums, scale, bias, gelu).unflatten(0, x.shape[:-1])
