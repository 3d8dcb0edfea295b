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


class Seen(EngineObserver):
    """What an engine told: of each pass its seconds and rows, of the prefix cache what was found and not, the most KV
    that was held at once, sessions that were preempted or failed alone, and whether it was at fault."""

    def __init__(self) -> None:
        self.seconds, self.rows = list[float](), list[int]()
        self.hits, self.reported = list[tuple[int, int]](), list[bool]()
        self.cached_bytes = self.most_kv_bytes = self.preemptions = self.alone = 0

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        self.seconds.append(seconds)
        self.rows.append(rows)

    def load(self, running: int, kv_bytes: int, kv_budget: int) -> None:
        self.most_kv_bytes = max(self.most_kv_bytes, kv_bytes)

    def prefix_cache(self, hits: int, misses: int, bytes_held: int) -> None:
        self.cached_bytes = bytes_held
        if hits or misses:
            self.hits.append((hits, misses))

    def preempted(self) -> None:
        self.preemptions += 1

    def step_failed(self) -> None:
        self.alone += 1

    def failing(self, failing: bool) -> None:
        self.reported.append(failing)


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
    picked: Picked | None = None,
    end_ids: Collection[int] = (),
    watchdog: Watchdog | None = None,
) -> Iterator[Engines]:
    """`network` wraps those that the engines compute with; `picked`: another backend than the fastest here."""
    torch.set_num_threads(1)
    checkpoint, device = Checkpoint.open(directory), DeviceThread(watchdog=watchdog)
    limits = limits or EngineLimits(max_context=512)
    shape, networks = checkpoint.shape, {stage: network(load(checkpoint, stage, CPU, dtype)) for stage in STAGES}
    encoder = EncoderEngine(networks["encoder"], shape, device, limits, pad_id, Seen(), picked)
    decoder = DecoderEngine(networks["decoder"], shape, device, limits, Seen(), picked, end_ids)
    prior = PriorEngine(networks["prior"], shape, device, limits, Seen(), picked)
    for engine in (encoder, decoder, prior):  # memory may hold anything at first; NaN shows where it reaches a result
        engine.backend.storage.memory.fill_(math.nan)
    device.start()
    try:
        yield Engines(encoder, decoder, prior, device)
    finally:
        device.stop()
