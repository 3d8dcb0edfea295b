"""Keys and values of one sequence, all layers: reserved once, written in place, never moved."""

from dataclasses import dataclass

import torch
from torch import Tensor

Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

_WORTH_READING_WHOLE = 0.6  # share in use; below, copying what is in use is cheaper than computing over the rest


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
        self._keys = torch.zeros(
            by_channel if shape.transposed_keys else by_position, dtype=shape.dtype, device=shape.device
        )
        self._values = torch.zeros(by_position, dtype=shape.dtype, device=shape.device)

    def write_slots(self, start: int, stop: int) -> Views:
        """For each layer the places of positions start..stop: keys and values, (heads, n, head_dim) each."""
        assert stop <= self.capacity, "a session writes only what it reserved"
        keys = self._keys.transpose(2, 3) if self.shape.transposed_keys else self._keys
        return keys[:, :, start:stop].unbind(0), self._values[:, :, start:stop].unbind(0)

    def readable(self, stop: int) -> Views:
        """For each layer keys and values of positions 0..stop: (heads, n, head_dim); keys, if transposed, swapped.

        A product of the CPU copies operands that are no whole tensor, so transposed caches give all their room once
        enough of it is in use; what is not written yet is zero.
        """
        if not self.shape.transposed_keys:
            return self._keys[:, :, :stop].unbind(0), self._values[:, :, :stop].unbind(0)
        if stop >= _WORTH_READING_WHOLE * self.capacity:
            stop = self.capacity
        return self._keys[..., :stop].unbind(0), self._values[:, :, :stop].unbind(0)

    def nbytes_of(self, positions: int) -> int:
        return self.shape.nbytes(positions)

    def copy_of(self, stop: int) -> "KVCache":
        """A cache of its own that holds positions 0..stop."""
        copy = KVCache(self.shape, stop)
        copy.fill_from(self, stop)
        return copy

    def fill_from(self, other: "KVCache", stop: int) -> None:
        """Take positions 0..stop over from another cache."""
        places, sources = self.write_slots(0, stop), other.write_slots(0, stop)
        for ours, theirs in zip(places, sources, strict=True):
            for place, source in zip(ours, theirs, strict=True):
                place.copy_(source)
