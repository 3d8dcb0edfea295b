"""Small tensors made on the CPU that the device needs."""

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, without waiting for what the device still has to do.

    CUDA has read pageable memory when the copy's call returns, so they may change or be freed at once.
    """
    return values.to(device, non_blocking=True)
