"""Slots of the KV pool."""

import pytest
import torch

from colaserve_services.model.kv_cache import KVCache, KVPool, KVShape

SHAPE = KVShape(layers=1, heads=1, head_dim=4, dtype=torch.bfloat16, device=torch.device("cpu"), front=4)


def test_a_slot_is_given_back_when_growing_fails() -> None:
    pool = KVPool(SHAPE)
    cache: KVCache = pool.take(8, 8)
    positions = cache.slab.capacity + 1
    with pytest.raises(AssertionError):
        pool.grown(cache, positions, positions)  # more than it can hold was never written
    assert pool.take(positions, positions).slot == 0
    grown = pool.grown(cache, 8, positions)
    assert (grown.slab.capacity >= positions, grown.slot) == (True, 1)
