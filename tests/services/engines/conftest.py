"""The three engines on a golden checkpoint, on the CPU."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from colaserve_services.decoder.engine import DecoderEngine
from colaserve_services.encoder.engine import EncoderEngine
from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.watchdog import Watchdog
from colaserve_services.model.backend.pick import Picked
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import STAGES, load
from colaserve_services.prior.engine import PriorEngine

CPU = torch.device("cpu")


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
    picked: Picked | None = None,
    end_ids: Collection[int] = (),
    watchdog: Watchdog | None = None,
) -> Iterator[Engines]:
    """`network` wraps those that the engines compute with; `picked`: another backend than the fastest here."""
    torch.set_num_threads(1)
    checkpoint, device = Checkpoint.open(directory), DeviceThread(watchdog=watchdog)
    limits = limits or EngineLimits(max_context=512)
    shape, networks = checkpoint.shape, {stage: network(load(checkpoint, stage, CPU, dtype)) for stage in STAGES}
    encoder = EncoderEngine(networks["encoder"], shape, device, limits, pad_id, observer(), picked)
    decoder = DecoderEngine(networks["decoder"], shape, device, limits, observer(), picked, end_ids)
    prior = PriorEngine(networks["prior"], shape, device, limits, observer(), picked)
    for engine in (encoder, decoder, prior):  # memory may hold anything at first; NaN shows where it reaches a result
        engine.backend.storage.memory.fill_(math.nan)
    device.start()
    try:
        yield Engines(encoder, decoder, prior, device)
    finally:
        device.stop()
