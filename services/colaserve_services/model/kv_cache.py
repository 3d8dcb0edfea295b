"""Keys and values of sequences, all layers: written in place, side by side, moved only when their room is full."""

import itertools
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

_WORTH_READING_WHOLE = 0.6  # share in use; below, copying what is in use is cheaper than computing over the rest
_STEP = 32  # positions; a softmax over other lengths takes half as long again
_SHORT = 1024  # positions; up to here room grows by a quarter of the next power of two, beyond by a thirty-second
_SLOTS = 16  # of a slab, at most
_IDLE_BYTES = 512 << 20  # of slots without a sequence; beyond, new slabs have one slot


@dataclass(frozen=True)
class KVShape:
    """What one position of a cache takes."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    front: int = 0  # positions of room before the sequence, for rows that every pass writes anew

    @property
    def pooled(self) -> bool:
        """Whether sequences lie side by side in shared slabs, for products over many of them: bfloat16 on a CPU."""
        return self.device.type == "cpu" and self.dtype == torch.bfloat16

    def nbytes(self, positions: int) -> int:
        """Of a sequence with so many positions, and the room before it."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize * (self.front + positions)


class KVSlab:
    """Room for `slots` sequences of `capacity` positions; those that are there lie side by side, to be read as one."""

    _numbers = itertools.count()

    def __init__(self, shape: KVShape, capacity: int, slots: int):
        self.shape, self.capacity, self._slots = shape, capacity, slots
        self.number = next(self._numbers)  # slabs in order of their making
        # Weak, since caches hold their slab: a cache that nobody holds any more is freed at once, not by the collector
        # of cycles, which counts objects and not their bytes.
        self._held: list[weakref.ref[KVCache]] = []
        self._room = shape.front + capacity
        size = (shape.layers, slots, shape.heads, self._room, shape.head_dim)
        self._keys, self._values = (torch.empty(size, dtype=shape.dtype, device=shape.device) for _ in range(2))

    @property
    def full(self) -> bool:
        return len(self._held) == self._slots

    @property
    def unused(self) -> bool:
        return not self._held

    @property
    def idle_bytes(self) -> int:
        """Of the slots without a sequence."""
        return (self._slots - len(self._held)) * self.shape.nbytes(self.capacity)

    def take(self, cache: "KVCache") -> int:
        """The next slot; in a pool zeroed, since more is read there than was written."""
        slot = len(self._held)
        self._held.append(weakref.ref(cache))
        if self.shape.pooled:
            self._keys[:, slot].zero_()
            self._values[:, slot].zero_()
        return slot

    def give_back(self, slot: int) -> None:
        """The sequence of the last slot moves to the place left."""
        held = self._held.pop()
        last = held()
        if last is not None and last.slot != slot:
            self._keys[:, slot].copy_(self._keys[:, last.slot])
            self._values[:, slot].copy_(self._values[:, last.slot])
            self._held[slot], last.slot = held, slot

    def front_slots(self, slots: slice) -> Views:
        """For each layer the room before the sequences: keys and values, (slots, heads, front, head_dim) each."""
        return self._places(slots, 0, self.shape.front)

    def write_slots(self, slots: slice, start: int, stop: int) -> Views:
        """For each layer the places of positions start..stop: keys and values, (slots, heads, n, head_dim) each."""
        assert stop <= self.capacity, "a session writes only what it reserved"
        return self._places(slots, self.shape.front + start, self.shape.front + stop)

    def _places(self, slots: slice, begin: int, end: int) -> Views:
        return self._keys[:, slots, :, begin:end].unbind(0), self._values[:, slots, :, begin:end].unbind(0)

    def readable(self, slots: slice, stop: int) -> Views:
        """For each layer keys and values of the front room and positions 0..stop: (slots, heads, n, head_dim).

        A product of the CPU copies operands that are no whole tensor, so in a pool they come with all their room once
        enough of it is in use, and before with room to an even length. What was never written is zero.
        """
        end = self.shape.front + stop
        if self.shape.pooled:
            end = self._room if end >= _WORTH_READING_WHOLE * self._room else _even(end)
        return self._places(slots, 0, end)


def _even(positions: int) -> int:
    """Rounded up to a length that softmax is fast over."""
    return -(-positions // _STEP) * _STEP


class KVCache:
    """One sequence's keys after norm and rotary, and values: a slot of a slab, by default of one of its own."""

    def __init__(self, shape: KVShape, capacity: int, slab: KVSlab | None = None):
        self.shape = shape
        self.slab = slab or KVSlab(shape, capacity, 1)
        self.slot = self.slab.take(self)

    def nbytes_of(self, positions: int) -> int:
        """Of a copy."""
        return replace(self.shape, front=0).nbytes(positions)

    def copy_of(self, stop: int) -> "KVCache":
        """A cache of its own that holds positions 0..stop, without front room."""
        copy = KVCache(replace(self.shape, front=0), stop)
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
    """Makes caches for sequences that grow, and moves them as they do.

    Where they are pooled, a cache has room for little more than what it holds, and those with as much room lie side
    by side: one product serves many of them, and reads little that is not in use. A slot's memory stays until its slab
    is given up, which is when the last sequence leaves it. Elsewhere a cache has all its room from the start.

    Views into caches hold until one is grown or given back.
    """

    def __init__(self, shape: KVShape):
        self.shape = shape
        self._slabs: list[KVSlab] = []

    def room(self, positions: int) -> int:
        """Positions that a cache which holds so many has room for."""
        if not self.shape.pooled:
            return positions
        needed = self.shape.front + positions
        step = max(_STEP, (1 << (needed - 1).bit_length()) // (4 if needed <= _SHORT else 32))
        return max(2 * _STEP, -(-needed // step) * step) - self.shape.front

    def take(self, positions: int, most: int) -> KVCache:
        """A cache for so many positions at first, and `most` in the end."""
        capacity = self.room(positions if self.shape.pooled else most)
        open_slabs = (slab for slab in self._slabs if slab.capacity == capacity and not slab.full)
        return KVCache(self.shape, capacity, next(open_slabs, None) or self._new_slab(capacity))

    def grown(self, cache: KVCache, held: int, positions: int) -> KVCache:
        """The cache, of which the first `held` positions are written, or another with what it holds and more room."""
        if positions <= cache.slab.capacity:
            return cache
        larger = self.take(positions, positions)
        try:
            larger.fill_from(cache, held)
        except Exception:
            self.give_back(larger)
            raise
        self.give_back(cache)
        return larger

    def _new_slab(self, capacity: int) -> KVSlab:
        slots = 1
        if self.shape.pooled:
            idle = sum(slab.idle_bytes for slab in self._slabs)
            slots = max(1, min(_SLOTS, (_IDLE_BYTES - idle) // self.shape.nbytes(capacity)))
        self._slabs.append(KVSlab(self.shape, capacity, slots))
        return self._slabs[-1]

    def give_back(self, cache: KVCache) -> None:
        cache.slab.give_back(cache.slot)
        self._slabs = [slab for slab in self._slabs if not slab.unused]
