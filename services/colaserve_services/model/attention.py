"""Attention over ragged batches: each sequence over its own past only, in place in its cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.kv_cache import KVCache
from colaserve_services.model.layers import block_causal_mask


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a batch that are consecutive positions of one sequence."""

    rows: int
    start: int = 0  # position of the first row
    cache: KVCache | None = None  # written at start.. and read up to the last row; None: the rows see only each other


class RaggedAttention:
    """The `attend` of an inference pass. Segments lie in the batch one after the other.

    Cost grows with the sum of the segments' lengths; no mask spans the batch, or anything but a segment's own rows.
    """

    def __init__(self, segments: Sequence[Segment], block_size: int, device: torch.device):
        self._parts: list[_Cached | _Alone] = []
        row = 0
        for segment in segments:
            rows = slice(row, row + segment.rows)
            row = rows.stop
            last = self._parts[-1] if self._parts else None
            if segment.cache is not None:
                self._parts.append(_Cached(rows, segment, segment.cache, _mask(segment, block_size, device)))
            elif isinstance(last, _Alone) and last.length == segment.rows:
                last.rows = slice(last.rows.start, rows.stop)
            else:
                self._parts.append(_Alone(rows, segment.rows, _mask(segment, block_size, device)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(..., heads, head_dim) each, all rows of the batch in order; the output in the dtype of v."""
        leading = q.shape[:-2]
        if _by_products(v):
            q = torch.mul(q, q.shape[-1] ** -0.5, out=torch.empty(q.shape, dtype=v.dtype, device=v.device))
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q.to(v.dtype), k, v))
        outputs = [part.attend(layer, q, k, v) for part in self._parts]
        return torch.cat(outputs).view(*leading, *q.shape[-2:])


class _Cached:
    """A segment over its cache. Views into the cache are made once for all layers."""

    def __init__(self, rows: slice, segment: Segment, cache: KVCache, mask: Tensor | None):
        self.rows, self._mask = rows, mask
        self._stop = segment.start + segment.rows
        self._key_slots, self._value_slots = cache.write_slots(segment.start, self._stop)
        self._keys, self._values = cache.readable(self._stop)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[self.rows].transpose(0, 1) for x in (q, k, v))
        keys, values = self._keys[layer], self._values[layer]
        self._key_slots[layer].copy_(k)
        self._value_slots[layer].copy_(v)
        if _by_products(v):
            return _product_attention(q, keys, values, self._mask, self._stop).transpose(0, 1)
        return _fused_attention(q[None], keys[None], values[None], self._mask)[0].transpose(0, 1)


class _Alone:
    """Neighbouring segments of one length without a cache, as one batch."""

    def __init__(self, rows: slice, length: int, mask: Tensor | None):
        self.rows, self.length, self._mask = rows, length, mask

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[self.rows].to(v.dtype).view(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if _by_products(v):
            qs, ks, vs = (x.flatten(0, 1) for x in (q, k.transpose(2, 3), v))
            out = _product_attention(qs, ks, vs, self._mask, self.length).view(q.shape)
        else:
            out = _fused_attention(q, k, v, self._mask)
        return out.transpose(1, 2).flatten(0, 1)


def _by_products(v: Tensor) -> bool:
    return v.device.type == "cpu" and v.dtype == torch.bfloat16


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The library's attention: (batch, heads, n, head_dim) over (batch, heads, L, head_dim)."""
    if mask is not None:
        past = torch.ones(len(mask), k.shape[2] - len(mask), dtype=torch.bool, device=mask.device)
        mask = torch.cat((past, mask), dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, stop: int) -> Tensor:
    """Attention as two products and a softmax: (batch, n, d), scaled, over (batch, d, L) and (batch, L, d).

    For a few queries on a CPU in bfloat16 it takes less than half the time of the fused kernel, which is made for many.
    Scores are rounded to bfloat16 between product and softmax; the softmax computes in float32. Positions from `stop`
    on are room of the cache that is not in use yet.
    """
    scores = torch.bmm(q, k)
    if stop < scores.shape[-1]:
        scores[:, :, stop:] = float("-inf")
    if mask is not None:
        scores[:, :, stop - len(mask) : stop].masked_fill_(~mask, float("-inf"))
    return torch.bmm(scores.softmax(dim=-1), v)


def _mask(segment: Segment, block_size: int, device: torch.device) -> Tensor | None:
    """Which of the segment's own rows each row sees, block-causally; None when every row sees all."""
    if segment.start // block_size == (segment.start + segment.rows - 1) // block_size:
        return None
    positions = torch.arange(segment.start, segment.start + segment.rows, device=device)
    return block_causal_mask(positions, positions, block_size)
