"""The fast path on CPUs: the passes of `reference` with compiled kernels, where a pass can use them."""

from types import ModuleType

import torch

from colaserve_services.model.backend import cpu_kernels, ops


def kernels(dtype: torch.dtype, head_dim: int, positions: int) -> ModuleType:
    """What passes over such pages are made of."""
    return cpu_kernels if cpu_kernels.takes(dtype, head_dim, positions) else ops
