"""Queries, keys and values after their joint product: norm, rotary, and into the pages, one launch.

A program takes all heads of one position, as pairs of channels that rotary turns: (2i, 2i + 1) of a prior's heads,
(i, i + head_dim / 2) of a VAE's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.model.backend import ops
from colaserve_services.model.backend.ops import Norm, Rows, Storage
from colaserve_services.model.kernels.registry import launch, padded, warps_of


@triton.jit
def _qkv(
    q, k, v, q_weight, q_bias, k_weight, k_bias, rotary, history, own, keys, values, out,
    FIRST: tl.constexpr, ROW: tl.constexpr, N: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr,
    AXIS: tl.constexpr, HALVES: tl.constexpr, EPS: tl.constexpr, CLIP: tl.constexpr, TURNS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1) + FIRST
    page = tl.load(own + i // N).to(tl.int64)
    if page >= 0:
        place = (page * POSITIONS + tl.load(history + i // N) % POSITIONS + i % N) * (H * D)
        source, target, weight, bias = v + i * ROW, values + place, k_weight, k_bias
        if part == 0:
            source, target, weight, bias = q + i * ROW, out + i * (H * D), q_weight, q_bias
        if part == 1:
            source, target = k + i * ROW, keys + place
        h = tl.arange(0, HEADS)[:, None]
        pair, both = tl.arange(0, PAIRS)[None, :], tl.arange(0, 2 * PAIRS)[None, :]
        seen, seen_both = (h < H) & (pair < D // 2), (h < H) & (both < D)
        at = h * D + pair if HALVES else h * D + both
        if HALVES:
            one, two = tl.load(source + at, seen, 0.0), tl.load(source + at + D // 2, seen, 0.0)
        else:
            one, two = tl.split(tl.reshape(tl.load(source + at, seen_both, 0.0), [HEADS, PAIRS, 2]))
        one, two = one.to(tl.float32), two.to(tl.float32)
        if CLIP is not None:
            one, two = tl.clamp(one, -CLIP, CLIP), tl.clamp(two, -CLIP, CLIP)
        if part < 2:
            if WIDTH:
                mean = tl.sum(one + two, AXIS, keep_dims=True) / WIDTH
                one, two = tl.where(seen, one - mean, 0.0), tl.where(seen, two - mean, 0.0)
                scale = 1.0 / tl.sqrt_rn(tl.sum(one * one + two * two, AXIS, keep_dims=True) / WIDTH + EPS)
                one, two = one * scale, two * scale
            if weight is not None:
                of = at if AXIS is None else at - h * D  # all heads have one weight
                if HALVES:
                    w_one, w_two = tl.load(weight + of, seen, 0.0), tl.load(weight + of + D // 2, seen, 0.0)
                    b_one, b_two = tl.load(bias + of, seen, 0.0), tl.load(bias + of + D // 2, seen, 0.0)
                else:
                    w_one, w_two = tl.split(tl.reshape(tl.load(weight + of, seen_both, 0.0), [HEADS, PAIRS, 2]))
                    b_one, b_two = tl.split(tl.reshape(tl.load(bias + of, seen_both, 0.0), [HEADS, PAIRS, 2]))
                one, two = one * w_one + b_one, two * w_two + b_two
            if TURNS > 0:
                turns = rotary + i * (2 * TURNS) + pair
                cos, sin = tl.load(turns, pair < TURNS, 1.0), tl.load(turns + TURNS, pair < TURNS, 0.0)
                one, two = one * cos - two * sin, two * cos + one * sin
        if HALVES:
            tl.store(target + at, one, seen)
            tl.store(target + at + D // 2, two, seen)
        else:
            tl.store(target + at, tl.reshape(tl.join(one, two), [HEADS, 2 * PAIRS]), seen_both)


class _Kind(NamedTuple):
    """What is done to queries and keys."""

    WIDTH: int  # of LayerNorm: a head's, all heads', 0 for none
    AXIS: int | None  # that it goes over
    HALVES: bool
    EPS: float
    CLIP: float | None
    TURNS: int


_AS_THEY_ARE = _Kind(0, 1, False, 0.0, None, 0)


def _launch(
    memory: Tensor, layer: int, parts: list[Tensor | None], norms: list[Tensor | None], rotary: Tensor | None,
    history: Tensor, own: Tensor, out: Tensor | None, kind: _Kind,
) -> None:  # fmt: skip
    """`parts`: queries or None, keys, values, each with the same distance of positions."""
    positions, H, D = memory.shape[-3:]
    first, x = (0, parts[0]) if parts[0] is not None else (1, parts[1])
    assert x is not None
    assert all(t is None or (t.stride(0) == x.stride(0) and t.stride(-1) == 1) for t in parts), "as they lie"
    heads, pairs = padded(H), padded(D // 2)
    launch(
        _qkv, (len(x), 3 - first), *parts, *norms, rotary, history, own, memory[0, layer], memory[1, layer], out,
        FIRST=first, ROW=x.stride(0), N=len(x) // len(own), POSITIONS=positions, **kind._asdict(), H=H, D=D,
        HEADS=heads, PAIRS=pairs, warps=warps_of(2 * heads * pairs),
    )  # fmt: skip


@torch.library.custom_op("colaserve::qkv", mutates_args=("memory",))
def _qkv_op(
    memory: Tensor, layer: int, x: Tensor, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
    k_bias: Tensor | None, eps: float | None, by_head: bool, clip: float | None, history: Tensor, own: Tensor,
    rotary: Tensor,
) -> Tensor:  # fmt: skip
    H, D = memory.shape[-2:]
    assert rotary.is_contiguous()
    out = memory.new_empty(len(x), H, D)
    width, axis = (D, 1) if by_head else (H * D, None)
    kind = _Kind(0 if eps is None else width, axis, not by_head, eps or 0.0, clip, rotary.shape[-1])
    norms = [q_weight, q_bias, k_weight, k_bias]
    _launch(memory, layer, list(x.split(H * D, dim=1)), norms, rotary, history, own, out, kind)
    return out


_qkv_op.register_fake(lambda memory, layer, x, *_: memory.new_empty(len(x), *memory.shape[-2:]))


@torch.library.custom_op("colaserve::write", mutates_args=("memory",))
def _write_op(memory: Tensor, layer: int, k: Tensor, v: Tensor, history: Tensor, own: Tensor) -> None:
    _launch(memory, layer, [None, k, v], [None] * 4, None, history, own, None, _AS_THEY_ARE)


_write_op.register_fake(lambda memory, layer, k, v, history, own: None)


def qkv(storage: Storage, layer: int, x: Tensor, q_norm: Norm, k_norm: Norm, eps: float, rows: Rows) -> Tensor:
    """As ops.qkv: LayerNorm and rotary of queries and keys; keys and values into the pages; the queries, (R, heads,
    head_dim) in the storage's dtype. Of a row whose `own` is -1 nothing is read or written."""
    at = rows.history, rows.own, rows.rotary
    return _qkv_op(storage.memory, layer, x, *q_norm, *k_norm, eps, True, None, *at)


def write(storage: Storage, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
    """As ops.write: keys after norm and rotary, and values, (R, heads, head_dim), into the rows' own pages."""
    _write_op(storage.memory, layer, k, v, rows.history, rows.own)


WideNorm = tuple[Tensor | None, Tensor | None]  # weight and bias, float32, (heads head_dim,)


def wide_qkv_reference(
    storage: Storage, layer: int, x: Tensor, norms: tuple[WideNorm, WideNorm] | None, eps: float, rows: Rows,
    clip: float | None = None,
) -> Tensor:  # fmt: skip
    x = x.float() if clip is None else x.float().clamp(-clip, clip)
    q, k, v = x.chunk(3, dim=-1)
    if norms:
        q, k = (F.layer_norm(t, t.shape[-1:], *norm, eps) for t, norm in zip((q, k), norms, strict=True))
    q, k, v = (t.unflatten(-1, storage.memory.shape[-2:]) for t in (q, k, v))
    cos, sin = rows.rotary.unsqueeze(2).unbind(1)
    halves = (t.chunk(2, dim=-1) for t in (q, k))
    q, k = (torch.cat((one * cos - two * sin, two * cos + one * sin), -1) for one, two in halves)
    ops.write(storage, layer, k, v, rows)
    return q.to(storage.memory.dtype)


def wide_qkv(
    storage: Storage, layer: int, x: Tensor, norms: tuple[WideNorm, WideNorm] | None, eps: float, rows: Rows,
    clip: float | None = None,
) -> Tensor:  # fmt: skip
    """As `qkv`, of a VAE: clamped to +-clip, LayerNorm over the full width, or none, and rotary over whole heads in
    float32; rows.rotary is (R, 2, head_dim / 2)."""
    q_norm, k_norm = norms or ((None, None), (None, None))
    at = clip, rows.history, rows.own, rows.rotary
    return _qkv_op(storage.memory, layer, x, *q_norm, *k_norm, eps if norms else None, False, *at)
