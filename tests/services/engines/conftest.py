"""The three engines on a golden checkpoint, on the CPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from colaserve_services.decoder.engine import DecoderEngine
from colaserve_services.encoder.engine import EncoderEngine
from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.kv_cache import KVShape, KVSlab
from colaserve_services.model.loading import STAGES, load
from colaserve_services.prior.engine import PriorEngine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def caches_come_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may hold anything at first; NaN shows in every result that it reached."""
    made = KVSlab.__init__

    def make(slab: KVSlab, shape: KVShape, capacity: int, slots: int) -> None:
        made(slab, shape, capacity, slots)
        for memory in (slab._keys, slab._values):
            memory.fill_(math.nan)

    monkeypatch.setattr(KVSlab, "__init__", make)


@dataclass
class Engines:
    encoder: EncoderEngine
    decoder: DecoderEngine
    prior: PriorEngine
    device: DeviceThread = field(repr=False)


@contextmanager
def engines(
    directory: Path,
    limits: EngineLimits | None = None,
    dtype: torch.dtype = torch.float32,
    pad_id: int = 2,
    network: Callable[[Any], Any] = lambda network: network,
    observer: Callable[[], EngineObserver] = EngineObserver,
) -> Iterator[Engines]:
    """`network` wraps those that the engines compute with."""
    torch.set_num_threads(1)
    checkpoint, device = Checkpoint.open(directory), DeviceThread()
    limits = limits or EngineLimits(max_context=512)
    shape, networks = checkpoint.shape, {stage: network(load(checkpoint, stage, CPU, dtype)) for stage in STAGES}
    encoder = EncoderEngine(networks["encoder"], shape, device, limits, pad_id, observer())
    decoder = DecoderEngine(networks["decoder"], shape, device, limits, observer())
    prior = PriorEngine(networks["prior"], shape, device, limits, observer())
    device.start()
    try:
        yield Engines(encoder, decoder, prior, device)
    finally:
        device.stop()
