"""What a pass over pages is made of, in plain torch: any device, any dtype. Faster ones have the same names.

A row is one block of n consecutive positions of a sequence. Its queries see all n, and the `history` positions before
them, so its length is its mask. Within a layer all rows write keys and values before any row reads.
"""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.float8 import Scaled, inputs_in, quantized

# Flags of kernels.update: this velocity becomes the slot's previous one; the slot has no previous one yet.
KEEPS, BEGINS = 1, 2
Norm = tuple[Tensor, Tensor]  # weight and bias, float32


class Rows(NamedTuple):
    """The rows of a pass, the same for all layers; int32 tensors. N rows of n positions are R = N n positions."""

    n: int
    tables: Tensor  # (S, P): the pages of S sequences in order; what no row reads is 0
    table: Tensor  # (N,): which one a row reads; rows of one are neighbours, earlier blocks first; -1: none
    history: Tensor  # (N,): positions that a row sees before its own, a multiple of n
    own: Tensor  # (N,): the page of its own positions, which lie there from history % (positions of a page) on
    rotary: Tensor  # (R, 2, rope_dim / 2): cos and sin, float32
    most: int  # the longest history


class PageShape(NamedTuple):
    """What a page holds: the keys and values of so many positions, in all layers."""

    layers: int
    positions: int
    heads: int
    head_dim: int
    dtype: torch.dtype


def takes(shape: PageShape) -> bool:
    """Whether these functions can compute with such pages."""
    return True


def key_cost(dtype: torch.dtype) -> float:
    """Of an operation of attention, in those of a product, which run at more of the peak."""
    return 2.5


class Storage:
    """Keys and values of all layers by page; made once, never moved."""

    def __init__(self, shape: PageShape, pages: int, device: torch.device):
        size = (2, shape.layers, pages, shape.positions, shape.heads, shape.head_dim)
        self.memory = torch.empty(size, dtype=shape.dtype, device=device)
        self.positions = shape.positions

    @staticmethod
    def page_bytes(shape: PageShape) -> int:
        """Of one page, in all layers."""
        return 2 * shape.layers * shape.positions * shape.heads * shape.head_dim * shape.dtype.itemsize


def adaln(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    index: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor | Scaled:
    """x += gate y, in place; then LayerNorm without affine, times scale, plus shift: (R, D) in `dtype`.

    x (R, D) float32; gate, scale and shift are rows (K, D) of a table, `index` (R,) the row for each position.
    """
    if y is not None and gate is not None:
        x.addcmul_(gate.index_select(0, index), y)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return inputs_in(torch.addcmul(shift.index_select(0, index), normed, scale.index_select(0, index)), dtype)


def qkv(storage: Storage, layer: int, x: Tensor, q_norm: Norm, k_norm: Norm, eps: float, rows: Rows) -> Tensor:
    """LayerNorm and rotary of queries and keys; keys and values into the pages; the queries, for `attention`.

    x: (R, 3 heads head_dim). The leading channels of each head turn in pairs (2i, 2i + 1), in float32.
    """
    heads, head_dim = storage.memory.shape[-2:]
    q, k, v = x.view(len(x), 3, heads, head_dim).unbind(1)
    q, k = (F.layer_norm(t.float(), (head_dim,), *norm, eps) for t, norm in ((q, q_norm), (k, k_norm)))
    cos, sin = rows.rotary.unsqueeze(2).unbind(1)
    turned = 2 * cos.shape[-1]
    for t in (q, k) if turned else ():
        first, second = t[..., :turned:2].clone(), t[..., 1:turned:2].clone()
        torch.sub(first * cos, second * sin, out=t[..., :turned:2])
        torch.add(second * cos, first * sin, out=t[..., 1:turned:2])
    write(storage, layer, k, v, rows)
    return q


def write(storage: Storage, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
    """Keys after norm and rotary, and values, (R, heads, head_dim), into the rows' own pages."""
    within = rows.history % storage.positions
    places = (rows.own * storage.positions + within)[:, None] + torch.arange(rows.n, device=k.device)
    for side, values in enumerate((k, v)):
        flat = storage.memory[side, layer].flatten(0, 1)
        flat.index_copy_(0, places.flatten(), values.to(flat.dtype))


def float8_attention(storage: Storage, layer: int, q: Tensor, rows: Rows) -> Scaled:
    """As `attention`, for a product of float8."""
    return quantized(attention(storage, layer, q, rows))


def attention(storage: Storage, layer: int, q: Tensor, rows: Rows) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over what each row sees: (R, heads * head_dim) in the storage's dtype."""
    keys, values = storage.memory[:, layer]
    q = q.view(-1, rows.n, *q.shape[-2:]).to(keys.dtype)
    out, numbers = torch.empty_like(q), zip(rows.table.tolist(), rows.history.tolist(), strict=True)
    for table, group in groupby(enumerate(numbers), key=lambda row: row[1][0]):
        some = list(group)
        of, starts = slice(some[0][0], some[-1][0] + 1), [history for _, (_, history) in some]
        if table < 0:
            k, v = (t.index_select(0, rows.own[of])[:, : rows.n] for t in (keys, values))
            out[of] = _fused(q[of], k, v, None)
            continue
        end = starts[-1] + rows.n
        pages = rows.tables[table, : -(-end // storage.positions)].clone()
        pages[-1] = rows.own[some[-1][0]]
        k, v = (t.index_select(0, pages).flatten(0, 1)[None, :end] for t in (keys, values))
        ends = torch.tensor(starts, device=q.device).repeat_interleave(rows.n) + rows.n
        seen = torch.arange(end, device=q.device) < ends[:, None] if len(some) > 1 else None
        out[of] = _fused(q[of].flatten(0, 1)[None], k, v, seen).view(out[of].shape)
    return out.flatten(2).flatten(0, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """(batch, positions, heads, head_dim) each."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
