"""Ragged attention and the pool of caches: whatever lies side by side, each sequence sees its own past only."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from colaserve_services.model.attention import RaggedAttention, Segment
from colaserve_services.model.kv_cache import KVCache, KVPool, KVShape

CPU = torch.device("cpu")
B, HEADS, WIDTH = 4, 2, 8


def pool(dtype: torch.dtype = torch.bfloat16) -> KVPool:
    return KVPool(KVShape(1, HEADS, WIDTH, dtype, CPU))


def nothing() -> Tensor:
    return torch.zeros(0, HEADS, WIDTH)


@dataclass
class Sequence:
    """A cache and, beside it, all keys and values that it must hold."""

    cache: KVCache
    keys: Tensor = field(default_factory=nothing)
    values: Tensor = field(default_factory=nothing)


def by_hand(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Block-causal attention of the last len(q) positions, written out in float32."""
    positions = torch.arange(len(keys))
    seen = positions // B <= positions[-len(q) :, None] // B
    scores = torch.einsum("qhd,khd->hqk", q, keys) * WIDTH**-0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_each_sequence_sees_its_own_past_only_whatever_lies_beside_it(dtype, bound):
    """Passes of any subset, with one or two blocks a sequence, and rows without a cache behind them."""
    torch.manual_seed(0)
    draw, caches = random.Random(0), pool(dtype)
    sequences = [Sequence(caches.take(room)) for room in (40, 50, 60, 64, 100, 128, 600)]
    for _ in range(8):
        turns = [(s, B * draw.choice((1, 1, 2))) for s in sequences if draw.random() < 0.8]
        turns.sort(key=lambda turn: (turn[1], turn[0].cache.slab.number, turn[0].cache.slot))
        segments = [Segment(rows, len(s.keys), s.cache) for s, rows in turns] + [Segment(B)] * 3
        q, k, v = (torch.randn(sum(s.rows for s in segments), HEADS, WIDTH) for _ in range(3))
        got = RaggedAttention(segments, B, CPU)(0, q.clone(), k, v.to(dtype)).float()
        for i, rows in enumerate(torch.arange(len(q)).split([s.rows for s in segments])):
            sequence = turns[i][0] if i < len(turns) else Sequence(sequences[0].cache)
            sequence.keys = torch.cat((sequence.keys, k[rows]))
            sequence.values = torch.cat((sequence.values, v[rows]))
            expected = by_hand(q[rows], sequence.keys, sequence.values)
            torch.testing.assert_close(got[rows], expected, rtol=0, atol=bound)


def test_short_sequences_lie_side_by_side_and_long_ones_alone():
    caches = pool()
    short, long = [caches.take(100) for _ in range(3)], caches.take(600)
    assert [cache.slot for cache in short] == [0, 1, 2]
    assert short[0].slab is short[1].slab is short[2].slab is not long.slab


def test_a_place_left_is_taken_next_and_is_empty():
    caches = pool()
    first, second = caches.take(64), caches.take(64)
    for keys, values in zip(*first.slab.write_slots(first.slots, 0, 64), strict=True):
        keys.fill_(1.0)
        values.fill_(1.0)
    caches.give_back(first)
    third = caches.take(64)
    assert (third.slab, third.slot) == (second.slab, 0)
    for views in third.slab.readable(third.slots, 64):
        assert not any(view.any() for view in views)


def test_a_slab_is_given_up_with_its_last_sequence():
    caches = pool()
    first, second = caches.take(64), caches.take(64)
    caches.give_back(first)
    caches.give_back(second)
    assert caches.take(64).slab is not first.slab


def test_more_sequences_than_a_slab_has_room_for_take_another():
    caches = pool()
    taken = [caches.take(64) for _ in range(40)]
    assert len({(cache.slab.number, cache.slot) for cache in taken}) == 40
    assert len({cache.slab.number for cache in taken}) == 3
