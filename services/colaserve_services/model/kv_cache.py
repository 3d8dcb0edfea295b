"""Keys and values of a sequence, kept in place, and attention over ragged batches of sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.layers import block_causal_mask


@dataclass(frozen=True)
class KVShape:
    """What one position of a cache takes."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def nbytes(self, positions: int) -> int:
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize * positions


class KVCache:
    """Keys after norm and rotary, and values, of one sequence: reserved once, written in place, never moved."""

    def __init__(self, shape: KVShape, capacity: int):
        self.shape, self.capacity = shape, capacity
        size = (shape.layers, 2, shape.heads, capacity, shape.head_dim)
        self.data = torch.empty(size, dtype=shape.dtype, device=shape.device)

    @property
    def nbytes(self) -> int:
        return self.shape.nbytes(self.capacity)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Put keys and values, (n, heads, head_dim), at positions start.. of a layer."""
        assert start + len(k) <= self.capacity, "a session writes only what it reserved"
        slots = self.data[layer, :, :, start : start + len(k)]
        slots[0].copy_(k.transpose(0, 1))
        slots[1].copy_(v.transpose(0, 1))

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` positions, (heads, length, head_dim) each."""
        k, v = self.data[layer, :, :, :length].unbind(0)
        return k, v


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a batch that are consecutive positions of one sequence."""

    rows: int
    start: int = 0  # position of the first row
    cache: KVCache | None = None  # written at start.. and read up to the last row; None: the rows see only each other


class RaggedAttention:
    """Attention for a batch of segments, each over its own past only: the `attend` of an inference pass.

    Segments lie in the batch one after the other. Cost grows with the sum of their lengths; no mask spans the batch.
    """

    def __init__(self, segments: Sequence[Segment], block_size: int, device: torch.device):
        self._cached: list[tuple[slice, Segment, Tensor | None]] = []
        self._alone: list[tuple[slice, int, Tensor | None]] = []  # rows, length of one segment, mask
        row = 0
        for segment in segments:
            rows = slice(row, row + segment.rows)
            row = rows.stop
            mask = _mask(segment.rows, segment.start, block_size, device)
            if segment.cache is not None:
                self._cached.append((rows, segment, mask))
            elif self._alone and self._alone[-1][1] == segment.rows and self._alone[-1][0].stop == rows.start:
                self._alone[-1] = (slice(self._alone[-1][0].start, rows.stop), segment.rows, mask)
            else:
                self._alone.append((rows, segment.rows, mask))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(..., heads, head_dim) each, all rows of the batch in order."""
        leading = q.shape[:-2]
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        parts = {rows.start: self._over_cache(layer, q[rows], k[rows], v[rows], s, m) for rows, s, m in self._cached}
        for rows, length, mask in self._alone:
            qs, ks, vs = (x[rows].view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            parts[rows.start] = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask).transpose(1, 2).flatten(0, 1)
        return torch.cat([parts[start] for start in sorted(parts)]).view(*leading, *q.shape[-2:])

    @staticmethod
    def _over_cache(layer: int, q: Tensor, k: Tensor, v: Tensor, segment: Segment, mask: Tensor | None) -> Tensor:
        cache = segment.cache
        assert cache is not None
        cache.write(layer, segment.start, k, v)
        keys, values = cache.read(layer, segment.start + segment.rows)
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask)
        return out[0].transpose(0, 1)


def _mask(rows: int, start: int, block_size: int, device: torch.device) -> Tensor | None:
    """The block-causal mask of rows start.. over positions 0.. up to the last row; None where every row sees all."""
    if start // block_size == (start + rows - 1) // block_size:
        return None
    positions = torch.arange(start + rows, device=device)
    return block_causal_mask(positions[start:], positions, block_size)
