"""Attention of rows over pages: a program is a row's head over 256 keys, a second one puts several of them together.

What a row gets depends on its own keys alone, bit for bit: splits are always of so many keys, and are put together in
their order. Keys of a tile may lie in several pages, or a tile be part of one.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from colaserve_services.model.backend.ops import PageShape, Rows, Storage
from colaserve_services.model.float8 import FLOAT8, Scaled
from colaserve_services.model.kernels.fp8 import rows_for, store_row
from colaserve_services.model.kernels.registry import dot_type, launch, padded, warps_of

SPLIT = 256  # keys of a program
_TILES = {torch.float32: 16, torch.bfloat16: 64}  # keys that it reads at once
_WARPS, _STAGES = 4, 5  # with fewer stages keys of a tile wait for those before
_AT_ONCE = 4  # splits that are put together at once
_LOG2_E = math.log2(math.e)
_QUERIES = 16  # at least, as matrix units take
_MOST_DIM, _MOST_POSITIONS = 256, 64
_KEY_COSTS = {torch.float32: 1.5, torch.bfloat16: 11.0}  # by arithmetic for an H200, whose memory it waits for


def takes(shape: PageShape) -> bool:
    """Whether these functions can compute with such pages."""
    return shape.dtype in _TILES and shape.head_dim <= _MOST_DIM and shape.positions <= _MOST_POSITIONS


def key_cost(dtype: torch.dtype) -> float:
    """Of an operation of attention, in those of a product."""
    return _KEY_COSTS[dtype]


@triton.jit(do_not_specialize=["width", "splits"])
def _attend(
    q, keys, values, tables, table, history, own, out, sums, weights, width, splits,
    N: tl.constexpr, POSITIONS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    page = tl.load(own + row)
    past = tl.load(history + row)
    end = tl.where(page < 0, 0, past + N)
    begin = split * SPLIT
    if (begin < end) | (split == 0):
        i, d = tl.arange(0, QUERIES)[:, None], tl.arange(0, CHANNELS)[None, :]
        seen_q = (i < N) & (d < D)
        at = (row * N + i) * (H * D) + head * D + d
        kind = values.dtype.element_ty
        queries = tl.load(q + at, seen_q & (page >= 0), 0.0).to(kind).to(DOT)
        pages = tables + tl.load(table + row).to(tl.int64) * width
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        found = tl.zeros([QUERIES, CHANNELS], tl.float32)
        for start in range(begin, tl.minimum(end, begin + SPLIT), TILE):
            key = start + tl.arange(0, TILE)
            seen = key < end
            of = key // POSITIONS
            before = of < past // POSITIONS
            place = tl.where(before, tl.load(pages + of, before, 0), page).to(tl.int64) * POSITIONS + key % POSITIONS
            place = place[:, None] * (H * D) + head * D + d
            k = tl.load(keys + place, seen[:, None] & (d < D), 0.0).to(DOT)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * SCALE
            scores = tl.where(seen[None, :], scores, float("-inf"))
            now = tl.maximum(largest, tl.max(scores, 1))
            weight = tl.exp2(scores - now[:, None])
            shrunk = tl.exp2(largest - now)
            total = total * shrunk + tl.sum(weight, 1)
            v = tl.load(values + place, seen[:, None] & (d < D), 0.0).to(DOT)
            found = found * shrunk[:, None] + tl.dot(weight.to(kind).to(DOT), v, input_precision="ieee")
            largest = now
        if end <= SPLIT:
            tl.store(out + at, found / tl.where(end > 0, total, 1.0)[:, None], seen_q)
        else:
            part = ((row * H + head) * splits + split) * N
            tl.store(sums + (part + i) * D + d, found, seen_q)
            j = tl.arange(0, QUERIES)
            tl.store(weights + part * 2 + j, largest, j < N)
            tl.store(weights + part * 2 + N + j, total, j < N)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    sums, weights, history, own, out, inputs, scales, splits,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, AT_ONCE: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program is a position: all heads, of which float8's scale is to be found. `inputs`: where those rows go."""
    i, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    end = tl.where(tl.load(own + row) < 0, 0, tl.load(history + row) + N)
    h, d = tl.arange(0, HEADS), tl.arange(0, CHANNELS)[None, :]
    seen, at = (h[:, None] < H) & (d < D), (row * N + i) * (H * D) + h[:, None] * D + d
    if end > SPLIT:
        largest = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        found = tl.zeros([HEADS, CHANNELS], tl.float32)
        for first in range(0, tl.cdiv(end, SPLIT), AT_ONCE):
            for s in tl.static_range(AT_ONCE):  # their loads do not wait for one another
                there = (first + s) * SPLIT < end
                part = ((row * H + h) * splits + first + s) * N
                peak = tl.where(there, tl.load(weights + part * 2 + i, (h < H) & there, 0.0), float("-inf"))
                now = tl.maximum(largest, peak)
                shrunk, share = tl.exp2(largest - now), tl.exp2(peak - now)
                total = total * shrunk + tl.load(weights + part * 2 + N + i, (h < H) & there, 0.0) * share
                some = tl.load(sums + (part[:, None] + i) * D + d, seen & there, 0.0)
                found = found * shrunk[:, None] + some * share[:, None]
                largest = now
        found = tl.where(seen, found / total[:, None], 0.0).to(out.dtype.element_ty)
        if scales is None:
            tl.store(out + at, found, seen)
        else:
            store_row(inputs, at, scales, row * N + i, found.to(tl.float32), seen)
    elif scales is not None:
        store_row(inputs, at, scales, row * N + i, tl.load(out + at, seen, 0.0).to(tl.float32), seen)


@torch.library.custom_op("colaserve::attention", mutates_args=())
def _attention_op(
    memory: Tensor, layer: int, q: Tensor, tables: Tensor, table: Tensor, history: Tensor, own: Tensor, n: int,
    most: int, float8: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    positions, H, D = memory.shape[-3:]
    rows, splits, queries = len(own), -(-(most + n) // SPLIT), padded(n, _QUERIES)
    assert q.is_contiguous(), "positions lie one after the other"
    out = memory.new_empty(len(q), H * D)
    partial = rows * H * splits * n if splits > 1 else 0
    sums, weights = (torch.empty(partial, size, device=q.device) for size in (D, 2))
    tile = max(16, _TILES[memory.dtype] * 128 // max(128, padded(D)))  # wider ones take more of shared memory
    sizes = {"N": n, "H": H, "D": D, "SPLIT": SPLIT, "CHANNELS": padded(D, 16)}
    launch(
        _attend, (splits, H, rows), q, memory[0, layer], memory[1, layer], tables, table, history, own, out, sums,
        weights, tables.stride(0), splits, POSITIONS=positions, SCALE=D**-0.5 * _LOG2_E, TILE=tile, QUERIES=queries,
        DOT=dot_type(memory.dtype), **sizes, warps=_WARPS, stages=_STAGES,
    )  # fmt: skip
    inputs, scales = rows_for(out, H * D, FLOAT8) if float8 else (out, torch.empty(0, device=q.device))
    if splits > 1 or float8:
        launch(
            _combine, (n, rows), sums, weights, history, own, out, inputs if float8 else None,
            scales if float8 else None, splits, AT_ONCE=_AT_ONCE, HEADS=padded(H), **sizes,
            warps=warps_of(padded(H) * padded(D)),
        )  # fmt: skip
    return inputs, scales


_attention_op.register_fake(
    lambda memory, layer, q, *rest: rows_for(q, memory[0, 0, 0, 0].numel(), FLOAT8 if rest[-1] else memory.dtype)
)


def attention(storage: Storage, layer: int, q: Tensor, rows: Rows) -> Tensor:
    """As ops.attention: softmax(q k^T / sqrt(head_dim)) v over what each row sees, (R, heads * head_dim) in the
    storage's dtype; 0 for a row whose `own` is -1. rows.most may be more than any history: it sets the grid alone."""
    at = rows.tables, rows.table, rows.history, rows.own, rows.n, rows.most
    return _attention_op(storage.memory, layer, q, *at, False)[0]


def float8_attention(storage: Storage, layer: int, q: Tensor, rows: Rows) -> Scaled:
    """As `attention`, for a product of float8; two launches, however long the rows are."""
    at = rows.tables, rows.table, rows.history, rows.own, rows.n, rows.most
    return Scaled(*_attention_op(storage.memory, layer, q, *at, True))
