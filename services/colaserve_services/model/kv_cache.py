"""Keys and values of sequences, all layers: room reserved once, written in place, never moved."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

_WORTH_READING_WHOLE = 0.6  # share in use; below, copying what is in use is cheaper than computing over the rest
_SHORT = 1024  # positions; an attention over more is so long that its own call costs little
_SLOTS = 16  # of a shared slab, at most
_SLAB_BYTES = 256 << 20  # of a shared slab, at most; only what its sequences use becomes resident


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


class KVSlab:
    """Room for `slots` sequences of `capacity` positions, side by side: neighbours can be read as one batch."""

    _numbers = itertools.count()

    def __init__(self, shape: KVShape, capacity: int, slots: int):
        self.shape, self.capacity = shape, capacity
        self.number = next(self._numbers)  # slabs in order of their making
        self._free = list(range(slots))
        self._slots = slots
        by_position = (shape.layers, slots, shape.heads, capacity, shape.head_dim)
        by_channel = (shape.layers, slots, shape.heads, shape.head_dim, capacity)
        by_key = by_channel if shape.transposed_keys else by_position
        self._keys = torch.empty(by_key, dtype=shape.dtype, device=shape.device)
        self._values = torch.empty(by_position, dtype=shape.dtype, device=shape.device)

    @property
    def full(self) -> bool:
        return not self._free

    @property
    def unused(self) -> bool:
        return len(self._free) == self._slots

    def take(self) -> int:
        """The lowest free slot, zeroed: the nearer the slots in use, the more of them lie side by side."""
        slot = min(self._free)
        self._free.remove(slot)
        self._keys[:, slot].zero_()
        self._values[:, slot].zero_()
        return slot

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def write_slots(self, slots: slice, start: int, stop: int) -> Views:
        """For each layer the places of positions start..stop: keys and values, (slots, heads, n, head_dim) each."""
        assert stop <= self.capacity, "a session writes only what it reserved"
        keys = self._keys.transpose(3, 4) if self.shape.transposed_keys else self._keys
        return keys[:, slots, :, start:stop].unbind(0), self._values[:, slots, :, start:stop].unbind(0)

    def readable(self, slots: slice, stop: int) -> Views:
        """For each layer keys and values of positions 0..stop, (slots, heads, n, head_dim); transposed keys swapped.

        A product of the CPU copies operands that are no whole tensor, so transposed keys come with all their room once
        enough of it is in use, and the values too; what is not written yet is zero.
        """
        if not self.shape.transposed_keys:
            return self._keys[:, slots, :, :stop].unbind(0), self._values[:, slots, :, :stop].unbind(0)
        if stop >= _WORTH_READING_WHOLE * self.capacity:
            stop = self.capacity
        return self._keys[:, slots, ..., :stop].unbind(0), self._values[:, slots, :, :stop].unbind(0)


class KVCache:
    """One sequence's keys after norm and rotary, and values: a slot of a slab, by default of one of its own."""

    def __init__(self, shape: KVShape, capacity: int, slab: KVSlab | None = None):
        self.shape = shape
        self.slab = slab or KVSlab(shape, capacity, 1)
        self.slot = self.slab.take()

    def nbytes_of(self, positions: int) -> int:
        return self.shape.nbytes(positions)

    def copy_of(self, stop: int) -> "KVCache":
        """A cache of its own that holds positions 0..stop."""
        copy = KVCache(self.shape, stop)
        copy.fill_from(self, stop)
        return copy

    def fill_from(self, other: "KVCache", stop: int) -> None:
        """Take positions 0..stop over from another cache."""
        places, sources = (cache.slab.write_slots(cache.slots, 0, stop) for cache in (self, other))
        for ours, theirs in zip(places, sources, strict=True):
            for place, source in zip(ours, theirs, strict=True):
                place.copy_(source)

    @property
    def slots(self) -> slice:
        """This one's, of the slab."""
        return slice(self.slot, self.slot + 1)


class KVPool:
    """Makes caches; those of short sequences lie side by side where that lets one product serve many of them.

    A slot's memory stays until its slab is given up, which is when the last sequence leaves it.
    """

    def __init__(self, shape: KVShape):
        self.shape = shape
        self._slabs: list[KVSlab] = []

    def _shares(self, positions: int) -> bool:
        return self.shape.transposed_keys and positions <= _SHORT

    def room(self, positions: int) -> int:
        """Positions that a cache for so many takes: sequences that differ little share slabs."""
        if not self._shares(positions):
            return positions
        power = 1 << (positions - 1).bit_length()
        return max(64, power if 4 * positions > 3 * power else 3 * power // 4)

    def take(self, positions: int) -> KVCache:
        if not self._shares(positions):
            return KVCache(self.shape, positions)
        capacity = self.room(positions)
        open_slabs = (slab for slab in self._slabs if slab.capacity == capacity and not slab.full)
        slab = next(open_slabs, None) or self._new_slab(capacity)
        return KVCache(self.shape, capacity, slab)

    def _new_slab(self, capacity: int) -> KVSlab:
        slots = max(1, min(_SLOTS, _SLAB_BYTES // self.shape.nbytes(capacity)))
        self._slabs.append(KVSlab(self.shape, capacity, slots))
        return self._slabs[-1]

    def give_back(self, cache: KVCache) -> None:
        cache.slab.give_back(cache.slot)
        self._slabs = [slab for slab in self._slabs if not slab.unused]
