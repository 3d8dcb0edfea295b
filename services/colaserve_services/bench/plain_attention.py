"""Attention without the engine's savings, for `bench ablate`: keys re-rotated, caches concatenated, one dense mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.layers import rotary_angles, rotary_frequencies


@dataclass
class History:
    """Keys and values of every session and layer so far, (n, heads, head_dim) each, as new tensors at every step."""

    rope_dim: int
    rotates: bool  # keys are kept before rotary, which is done to all of them at every step
    dense: bool  # one attention over all rows and all keys of the batch, with a mask
    calls: int = 0
    kept: WeakKeyDictionary[Any, dict[int, tuple[Tensor, Tensor]]] = field(default_factory=WeakKeyDictionary)

    def extended(self, cache: Any, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The session's first `start` keys and values with k and v behind them."""
        layers = self.kept.setdefault(cache, {})
        if start:
            past_k, past_v = layers[layer]
            k, v = torch.cat((past_k[:start], k)), torch.cat((past_v[:start], v))
        layers[layer] = (k, v)
        return k, v


class PlainAttention:
    """Stands in for the engine's attention over one batch of segments."""

    def __init__(self, history: History, segments: Sequence[Any], block_size: int):
        self._history, self._segments, self._block_size = history, segments, block_size

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(..., heads, head_dim) each; q and k before rotary if the history rotates."""
        leading, history = q.shape[:-2], self._history
        history.calls += 1
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        parts = []
        row = 0
        for segment in self._segments:
            rows = slice(row, row + segment.rows)
            row = rows.stop
            keys, values = k[rows], v[rows]
            if segment.cache is not None:
                keys, values = history.extended(segment.cache, layer, segment.start, keys, values)
            queries = torch.arange(segment.start, segment.start + segment.rows, device=q.device)
            seen = queries[-1:] + 1 - torch.arange(len(keys), 0, -1, device=q.device)  # positions of the keys
            mask = seen // self._block_size <= queries[:, None] // self._block_size
            parts.append((self._turned(q[rows], queries), self._turned(keys, seen).to(v.dtype), values, mask))
        attend = _dense if history.dense else _ragged
        return attend(parts, v.dtype).view(*leading, *q.shape[-2:])

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        if not self._history.rotates:
            return x
        frequencies = rotary_frequencies(self._history.rope_dim, 10000.0).to(x.device)
        cos, sin = (t[:, None] for t in rotary_angles(positions, frequencies))
        first, second = x[..., : self._history.rope_dim].float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
        return torch.cat((turned, x[..., self._history.rope_dim :].float()), dim=-1)


Part = tuple[Tensor, Tensor, Tensor, Tensor]  # queries, keys, values, mask (queries, keys)


def _ragged(parts: list[Part], dtype: torch.dtype) -> Tensor:
    return torch.cat([_attend(q, k, v, None if mask.all() else mask, dtype) for q, k, v, mask in parts])


def _dense(parts: list[Part], dtype: torch.dtype) -> Tensor:
    q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))
    return _attend(q, k, v, torch.block_diag(*(part[3] for part in parts)).bool(), dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    q, k, v = (x.to(dtype).transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
