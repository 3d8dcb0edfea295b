"""Products of float8 on a GPU: weights with a scale for each output channel, inputs with a scale for each row."""

from importlib.util import find_spec

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_LEAST_CAPABILITY = (8, 9)


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

        self._product, (self._weight, self._scales) = fp8.product, fp8.quantized(weight)

    def product(self, x: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype) -> Tensor:
        """x W^T + bias, then GELU (with tanh) if wanted: (..., in) to (..., out) in `dtype`.

        A row with a number that is not finite gives NaN.
        """
        rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
        return self._product(rows, self._weight, self._scales, bias, gelu).unflatten(0, x.shape[:-1])
