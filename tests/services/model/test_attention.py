"""Ragged attention and the pool of caches: whatever lies side by side, each sequence sees its own past only."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from colaserve_services.model import cpu_attention
from colaserve_services.model.attention import RaggedAttention, Segment
from colaserve_services.model.kv_cache import KVCache, KVPool, KVShape

CPU = torch.device("cpu")
B, HEADS, WIDTH = 4, 2, 32


def pool(dtype: torch.dtype = torch.bfloat16) -> KVPool:
    return KVPool(KVShape(1, HEADS, WIDTH, dtype, CPU, front=B))


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


@pytest.mark.parametrize(
    ("dtype", "bound", "compiled"),
    [(torch.float32, 1e-5, False), (torch.bfloat16, 3e-2, False), (torch.bfloat16, 3e-2, True)],
)
def test_each_sequence_sees_its_own_past_only_whatever_lies_beside_it(dtype, bound, compiled, monkeypatch):
    """Passes of any subset, none to two blocks of a sequence kept, one that passes, and rows without a cache."""
    if compiled and cpu_attention.missing():
        pytest.skip(f"compiled attention: {cpu_attention.missing()}")
    monkeypatch.setattr(cpu_attention, "takes", lambda *of_values: compiled)
    torch.manual_seed(0)
    draw, caches = random.Random(0), pool(dtype)
    sequences = [Sequence(caches.take(room, 1000)) for room in (4, 4, 4, 8, 60, 70, 600)]
    for _ in range(20):
        turns = [(s, B * draw.choice((0, 1, 1, 2)), draw.random() < 0.8) for s in sequences if draw.random() < 0.8]
        for s, rows, _ in turns:
            s.cache = caches.grown(s.cache, len(s.keys), len(s.keys) + rows)
        turns.sort(key=lambda turn: (turn[0].cache.slab.number, turn[0].cache.slot))
        kept = sorted(((s, rows) for s, rows, _ in turns if rows), key=lambda turn: turn[1])
        passing = [(s, len(s.keys) + rows) for s, rows, passes in turns if passes]
        segments = [Segment(rows, len(s.keys), s.cache) for s, rows in kept]
        segments += [Segment(B, start, s.cache, passing=True) for s, start in passing] + [Segment(B)] * 3
        q, k, v = (torch.randn(sum(s.rows for s in segments), HEADS, WIDTH) for _ in range(3))
        got = RaggedAttention(segments, B, CPU)(0, q.clone(), k, v.to(dtype)).float()
        owners = [s for s, _ in (*kept, *passing)] + [Sequence(sequences[0].cache) for _ in range(3)]
        for owner, segment, rows in zip(
            owners, segments, torch.arange(len(q)).split([s.rows for s in segments]), strict=True
        ):
            keys, values = torch.cat((owner.keys, k[rows])), torch.cat((owner.values, v[rows]))
            torch.testing.assert_close(got[rows], by_hand(q[rows], keys, values), rtol=0, atol=bound)
            if not segment.passing:
                owner.keys, owner.values = keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 4, 32), (2, 8, 16, 2304), (16, 8, 16, 96), (3, 1, 5, 257)], ids=str)
def test_a_softmax_in_place_is_the_one_that_makes_a_tensor(shape, dtype):
    """What attention computes with, and torch does not promise."""
    scores = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    scores[..., -3:] = float("-inf")
    expected = scores.softmax(dim=-1)
    torch.softmax(scores, dim=-1, out=scores)
    assert torch.equal(scores, expected)


def test_sequences_of_like_length_lie_side_by_side():
    caches = pool()
    short, long = [caches.take(n, n) for n in (98, 104, 108)], caches.take(600, 600)
    assert [cache.slot for cache in short] == [0, 1, 2]
    assert short[0].slab is short[1].slab is short[2].slab is not long.slab


def test_a_cache_moves_when_it_is_full_and_not_before():
    caches = pool()
    cache = caches.take(8, 1000)
    room = cache.slab.capacity
    assert caches.grown(cache, 8, room) is cache
    larger = caches.grown(cache, 8, room + 1)
    assert larger.slab.capacity > room
    assert caches.take(8, 1000).slab is not cache.slab  # the place was given back, and the slab with it
    assert pool(torch.float32).take(8, 1000).slab.capacity == 1000


def fill(cache: KVCache, positions: int, value: float) -> None:
    for views in cache.slab.write_slots(cache.slots, 0, positions):
        for view in views:
            view.fill_(value)


def held(cache: KVCache, positions: int) -> set[float]:
    return {x for views in cache.slab.write_slots(cache.slots, 0, positions) for x in views[0].flatten().tolist()}


def test_the_last_sequence_of_a_slab_takes_the_place_that_another_left():
    caches = pool()
    taken = [caches.take(48, 48) for _ in range(4)]
    for number, cache in enumerate(taken):
        fill(cache, 48, float(number))
    caches.give_back(taken[1])
    assert [taken[i].slot for i in (0, 2, 3)] == [0, 2, 1]
    assert [held(taken[i], 48) for i in (0, 2, 3)] == [{0.0}, {2.0}, {3.0}]
    new = caches.take(48, 48)
    assert (new.slab, new.slot, held(new, 48)) == (taken[0].slab, 3, {0.0})


def test_a_slab_is_given_up_with_its_last_sequence():
    caches = pool()
    first, second = caches.take(48, 48), caches.take(48, 48)
    caches.give_back(first)
    caches.give_back(second)
    assert caches.take(48, 48).slab is not first.slab


def test_more_sequences_than_a_slab_can_hold_take_another():
    caches = pool()
    taken = [caches.take(48, 48) for _ in range(40)]
    assert len({(cache.slab.number, cache.slot) for cache in taken}) == 40
    assert len({cache.slab.number for cache in taken}) == 3


def test_a_slot_is_given_back_when_growing_fails():
    caches = KVPool(KVShape(layers=1, heads=1, head_dim=4, dtype=torch.bfloat16, device=CPU, front=4))
    cache = caches.take(8, 8)
    positions = cache.slab.capacity + 1
    with pytest.raises(AssertionError):
        caches.grown(cache, positions, positions)  # more than it can hold was never written
    assert caches.take(positions, positions).slot == 0
    grown = caches.grown(cache, 8, positions)
    assert (grown.slab.capacity >= positions, grown.slot) == (True, 1)
