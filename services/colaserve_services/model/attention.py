"""Attention over ragged batches: each sequence over its own past only, in place in its cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model import cpu_attention
from colaserve_services.model.cpu_features import lacks_bfloat16
from colaserve_services.model.kv_cache import KVCache, KVSlab, Views
from colaserve_services.model.layers import block_causal_mask, to_device

_FEW = 64  # rows of a segment without a cache, up to which products beat the fused kernel
_SCORES = 3 << 18  # of one product: as many as stay in the cores' own caches until the softmax reads them
_WIDE = 256  # keys; adding to so many scores in a row takes less time than to the few that a mask needs


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a batch that are consecutive positions of one sequence."""

    rows: int
    start: int = 0  # position of the first row
    cache: KVCache | None = None  # written at start.. and read up to the last row; None: the rows see only each other
    passing: bool = False  # the rows fill the cache's front room instead, until the next such segment does

    @property
    def kept(self) -> int:
        """Positions that the sequence has in its cache after the pass."""
        return self.start if self.passing else self.start + self.rows


class RaggedAttention:
    """The `attend` of an inference pass. Segments lie in the batch one after the other.

    A sequence may have several, what it keeps before what passes. Neighbours of as many rows whose caches lie side by
    side, or that have none, are computed as one batch. Cost grows with the sum of the segments' lengths; no mask spans
    the whole batch.
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
        compiled = cpu_attention.takes(v.device, v.dtype, v.shape[-1])
        if compiled:
            q, k = q.float().contiguous(), k.to(v.dtype)
        for part in self._parts:
            of_part = (x[part.rows].view(part.count, -1, *x.shape[1:]) for x in (q, k, v, rows))
            part.attend(layer, *of_part, compiled=compiled)
        return out


def _side_by_side(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Cut into runs that one batch can serve."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and _follows(groups[-1], segment):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _follows(group: list[Segment], segment: Segment) -> bool:
    """Whether a segment can join a batch: it is alike, and has no cache or the neighbouring slot of one slab."""
    last = group[-1]
    if (last.rows, last.passing) != (segment.rows, segment.passing):
        return False
    if last.cache is None or segment.cache is None:
        return last.cache is segment.cache
    return last.cache.slab is segment.cache.slab and last.cache.slot + 1 == segment.cache.slot


class _Part:
    """Segments of one length, as one batch: (segments, rows of each, heads, head_dim) of what `attend` gets."""

    _front = 0  # keys before the sequences' first

    def __init__(self, rows: slice, segments: list[Segment], block_size: int, device: torch.device):
        self.rows, self.count = rows, len(segments)
        self._block_size, self._device = block_size, device
        self._first, self._length = min(s.start for s in segments), max(s.kept for s in segments)
        starts, self._kept = torch.tensor([(s.start, s.kept) for s in segments]).T[..., None]
        self._queries = starts + torch.arange(segments[0].rows)

    @cached_property
    def _ends(self) -> Tensor:
        """For each query the first key that it does not see, (segments, rows)."""
        of_block = (self._queries // self._block_size + 1) * self._block_size
        return (self._front + torch.minimum(of_block, self._kept)).int()

    def _hidden(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of each segment's rows over its last keys: (segments, 1, rows, keys).

        0 for what a row sees, -inf for later blocks and for keys that the segment's sequence does not have. The keys
        before the first segment's rows are seen by all and left out. None when every row sees all keys.
        """
        keys = torch.arange(self._first, self._length)
        seen = block_causal_mask(self._queries, keys, self._block_size) & (keys < self._kept)[:, None]
        if seen.all():
            return None
        hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
        return to_device(hidden, self._device)[:, None]


class _Cached(_Part):
    """Segments over their caches, which lie side by side. Views into the caches are made once for all layers."""

    def __init__(self, rows: slice, segments: list[Segment], block_size: int, device: torch.device):
        super().__init__(rows, segments, block_size, device)
        caches = [segment.cache for segment in segments if segment.cache is not None]
        slab, slots = caches[0].slab, slice(caches[0].slot, caches[0].slot + len(caches))
        self._shape, self._front = slab.shape, slab.shape.front
        passing = [(slice(None), slab.front_slots(slots))]
        self._writes = passing if segments[0].passing else list(_kept(segments, slab, slots.start))
        self._keys, self._values = slab.readable(slots, self._length)
        self._seen = slice(0 if segments[0].passing else self._front, self._front + self._length)

    @cached_property
    def _mask(self) -> Tensor | None:
        hidden = self._hidden(self._shape.dtype)
        if hidden is None or not _by_products(self._device, self._shape.dtype):
            return hidden
        return _widened(hidden, min(self._seen.stop, _WIDE))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, compiled: bool) -> None:
        """Writes keys and values, and the output into `out`."""
        for sequences, (key_slots, value_slots) in self._writes:
            key_slots[layer].copy_(k[sequences].transpose(1, 2))
            value_slots[layer].copy_(v[sequences].transpose(1, 2))
        keys, values = self._keys[layer], self._values[layer]
        if compiled:
            cpu_attention.attend(q, keys, values, self._seen.start, self._ends, out)
            return
        q, out = q.transpose(1, 2), out.transpose(1, 2)
        if _by_products(v.device, v.dtype):
            q = _scaled(q, v.dtype)
            for some in self._batches(q.shape[1] * q.shape[2] * keys.shape[2]):
                hidden = None if self._mask is None else self._mask[some]
                out[some].copy_(_product_attention(q[some], keys[some], values[some], hidden, self._seen))
        else:
            keys, values = keys[:, :, self._seen], values[:, :, self._seen]
            out.copy_(_fused_attention(q.to(v.dtype), keys, values, self._mask))

    def _batches(self, scores: int) -> list[slice]:
        """Of the sequences, which have so many scores each."""
        step = max(1, _SCORES // scores)
        return [slice(i, i + step) for i in range(0, self.count, step)]


def _kept(segments: list[Segment], slab: KVSlab, first: int) -> Iterator[tuple[slice, Views]]:
    """Where neighbours of one start write: which segments, and for each layer the places of keys and values."""
    for start, same in groupby(range(len(segments)), key=lambda i: segments[i].start):
        places = list(same)
        begin, end = places[0], places[-1] + 1
        yield slice(begin, end), slab.write_slots(slice(first + begin, first + end), start, start + segments[0].rows)


class _Alone(_Part):
    """Segments without a cache."""

    @cached_property
    def _mask(self) -> Tensor | None:
        return self._hidden(torch.float32)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, compiled: bool) -> None:
        """The output into `out`."""
        if compiled:
            cpu_attention.attend(q, k.transpose(1, 2), v.transpose(1, 2), 0, self._ends, out)
            return
        q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
        if q.shape[2] <= _FEW and v.device.type == "cpu":  # float32 is faster then, whatever the compute dtype
            keys, values = k.float().contiguous(), torch.empty(v.shape).copy_(v)
            out.copy_(_product_attention(_scaled(q, torch.float32), keys, values, self._mask))
        else:
            hidden = None if self._mask is None else self._mask.to(v.dtype)
            out.copy_(_fused_attention(q.to(v.dtype), k.to(v.dtype), v, hidden))


def _by_products(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16 and lacks_bfloat16() is None


def _scaled(q: Tensor, dtype: torch.dtype) -> Tensor:
    """q / sqrt(d) in its own memory."""
    return torch.mul(q, q.shape[-1] ** -0.5, out=torch.empty(q.shape, dtype=dtype, device=q.device))


def _widened(hidden: Tensor, keys: int) -> Tensor:
    """Over at least so many keys, of which the new ones are the first, and seen."""
    return F.pad(hidden, (max(0, keys - hidden.shape[-1]), 0))


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """The library's attention: (batch, heads, n, head_dim) over (batch, heads, L, head_dim)."""
    if hidden is not None:
        hidden = _widened(hidden, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)


def _product_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, seen: slice = slice(None)) -> Tensor:
    """Attention as two products and a softmax: q scaled, (batch, heads, n, d), over (batch, heads, L, d).

    `seen`: of the keys; `hidden` is added to the scores of the last of them. For a few queries on a CPU it takes less
    than half the time of the fused kernel, which is made for many. In bfloat16 scores are rounded between product and
    softmax; the softmax computes in float32.
    """
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    begin, end, _ = seen.indices(scores.shape[-1])
    if hidden is not None:
        scores.view(*q.shape[:3], -1)[..., end - hidden.shape[-1] : end].add_(hidden)
    for unseen in (scores[..., :begin], scores[..., end:]):
        if unseen.numel():
            unseen.fill_(float("-inf"))
    torch.softmax(scores, dim=-1, out=scores)  # in place: half as much has to stay in the cores' caches
    return torch.bmm(scores, v.flatten(0, 1)).view(q.shape)
