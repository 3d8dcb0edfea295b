"""Attention over ragged batches: each sequence over its own past only, in place in its cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.kv_cache import KVCache
from colaserve_services.model.layers import block_causal_mask

_FEW = 64  # rows of a segment without a cache, up to which products beat the fused kernel


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a batch that are consecutive positions of one sequence."""

    rows: int
    start: int = 0  # position of the first row
    cache: KVCache | None = None  # written at start.. and read up to the last row; None: the rows see only each other

    @property
    def stop(self) -> int:
        """Positions up to the last row."""
        return self.start + self.rows


class RaggedAttention:
    """The `attend` of an inference pass. Segments lie in the batch one after the other.

    Neighbours of as many rows whose caches lie side by side, or that have none, are computed as one batch. Cost grows
    with the sum of the segments' lengths; no mask spans the whole batch.
    """

    def __init__(self, segments: Sequence[Segment], block_size: int, device: torch.device):
        self._parts: list[_Cached | _Alone] = []
        row = 0
        for group in _side_by_side(segments):
            rows = slice(row, row + len(group) * group[0].rows)
            row = rows.stop
            part = _Alone if group[0].cache is None else _Cached
            self._parts.append(part(rows, group, block_size, device))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(..., heads, head_dim) each, all rows of the batch in order; the output in the dtype of v."""
        out = v.new_empty(v.shape)
        q, k, v, rows = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v, out))
        for part in self._parts:
            part.attend(layer, q[part.rows], k[part.rows], v[part.rows], rows[part.rows])
        return out


def _side_by_side(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Cut into runs that one batch can serve."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and _follows(groups[-1][-1], segment):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _follows(last: Segment, segment: Segment) -> bool:
    """Whether both can be in one batch: as long, and both without a cache or in neighbouring slots of one slab."""
    if last.rows != segment.rows or last.cache is None or segment.cache is None:
        return last.rows == segment.rows and last.cache is segment.cache
    shape = segment.cache.shape
    neighbours = last.cache.slab is segment.cache.slab and last.cache.slot + 1 == segment.cache.slot
    return shape.transposed_keys and neighbours


class _Cached:
    """Segments over their caches, which lie side by side. Views into the caches are made once for all layers."""

    def __init__(self, rows: slice, segments: list[Segment], block_size: int, device: torch.device):
        self.rows, self._count = rows, len(segments)
        caches = [segment.cache for segment in segments if segment.cache is not None]
        slab, first = caches[0].slab, caches[0].slot
        longest = max(segment.stop for segment in segments)
        self._keys, self._values = slab.readable(slice(first, first + len(caches)), longest)
        self._writes = []
        for start, same in groupby(range(len(segments)), key=lambda i: segments[i].start):
            places = list(same)
            slots = slice(first + places[0], first + places[-1] + 1)
            written = slab.write_slots(slots, start, start + segments[0].rows)
            self._writes.append((slice(places[0], places[-1] + 1), *written))
        length, dtype = self._values[0].shape[2], self._values[0].dtype
        self._hidden = _hidden(segments, length, block_size, device, dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        q, k, v, out = (x.view(self._count, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v, out))
        for sequences, key_slots, value_slots in self._writes:
            key_slots[layer].copy_(k[sequences])
            value_slots[layer].copy_(v[sequences])
        keys, values = self._keys[layer], self._values[layer]
        if _by_products(v):
            q = _scaled(q, v.dtype)
            out.copy_(_product_attention(q, keys.flatten(0, 1), values, self._hidden))
        else:
            out.copy_(_fused_attention(q.to(v.dtype), keys, values, self._hidden))


class _Alone:
    """Segments of one length without a cache, as one batch."""

    def __init__(self, rows: slice, segments: list[Segment], block_size: int, device: torch.device):
        self.rows, self._count, self._few = rows, len(segments), segments[0].rows <= _FEW
        self._hidden = _hidden(segments[:1], segments[0].rows, block_size, device, torch.float32)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        q, k, v, out = (x.view(self._count, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v, out))
        if self._few and v.device.type == "cpu":  # float32 is faster then, whatever the compute dtype
            keys = k.float().flatten(0, 1).transpose(1, 2)
            out.copy_(_product_attention(_scaled(q, torch.float32), keys, v.float(), self._hidden))
        else:
            hidden = None if self._hidden is None else self._hidden.to(v.dtype)
            out.copy_(_fused_attention(q.to(v.dtype), k.to(v.dtype), v, hidden))


def _by_products(v: Tensor) -> bool:
    return v.device.type == "cpu" and v.dtype == torch.bfloat16


def _scaled(q: Tensor, dtype: torch.dtype) -> Tensor:
    """q / sqrt(d) in its own memory."""
    return torch.mul(q, q.shape[-1] ** -0.5, out=torch.empty(q.shape, dtype=dtype, device=q.device))


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """The library's attention: (batch, heads, n, head_dim) over (batch, heads, L, head_dim)."""
    if hidden is not None:
        hidden = F.pad(hidden, (k.shape[2] - hidden.shape[-1], 0))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)


def _product_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """Attention as two products and a softmax: q scaled, (batch, heads, n, d), over k (batch x heads, d, L) and v.

    For a few queries on a CPU it takes less than half the time of the fused kernel, which is made for many. In bfloat16
    scores are rounded between product and softmax; the softmax computes in float32.
    """
    scores = torch.bmm(q.flatten(0, 1), k)
    if hidden is not None:
        scores.view(*q.shape[:3], -1)[..., -hidden.shape[-1] :].add_(hidden)
    return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).view(q.shape)


def _hidden(
    segments: list[Segment], length: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores of each segment's rows over the last of `length` keys: (segments, 1, rows, keys).

    0 for what a row sees, -inf for later blocks and for room of a cache that is not in use yet. The keys before the
    first segment's rows are seen by all and left out. None when every row sees all keys.
    """
    rows, start = segments[0].rows, torch.tensor([segment.start for segment in segments], device=device)[:, None]
    queries = start + torch.arange(rows, device=device)
    keys = torch.arange(min(segment.start for segment in segments), length, device=device)
    seen = block_causal_mask(queries, keys, block_size) & (keys < start + rows)[:, None]
    if seen.all():
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))[:, None]
