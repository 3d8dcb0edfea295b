"""Keys and values of one sequence, all layers: reserved once, written in place, never moved."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVShape:
    """What one position of a cache takes, and how keys are laid out."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def transposed_keys(self) -> bool:
        """Keys as (head_dim, positions): what matrix products of the CPU's bfloat16 read without packing them anew."""
        return self.device.type == "cpu" and self.dtype == torch.bfloat16

    def nbytes(self, positions: int) -> int:
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize * positions


class KVCache:
    """Keys after norm and rotary, and values; `capacity` positions."""

    def __init__(self, shape: KVShape, capacity: int):
        self.shape, self.capacity = shape, capacity
        by_position = (shape.layers, shape.heads, capacity, shape.head_dim)
        by_channel = (shape.layers, shape.heads, shape.head_dim, capacity)
        options = {"dtype": shape.dtype, "device": shape.device}
        self._keys = torch.empty(by_channel if shape.transposed_keys else by_position, **options)  # type: ignore[arg-type]
        self._values = torch.empty(by_position, **options)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return self.shape.nbytes(self.capacity)

    def keys(self, stop: int, start: int = 0) -> tuple[Tensor, ...]:
        """For each layer the keys of start..stop: (heads, head_dim, n) if transposed, else (heads, n, head_dim)."""
        assert stop <= self.capacity, "a session writes only what it reserved"
        if self.shape.transposed_keys:
            return self._keys[..., start:stop].unbind(0)
        return self._keys[:, :, start:stop].unbind(0)

    def values(self, stop: int, start: int = 0) -> tuple[Tensor, ...]:
        """For each layer the values of positions start..stop: (heads, n, head_dim)."""
        return self._values[:, :, start:stop].unbind(0)
