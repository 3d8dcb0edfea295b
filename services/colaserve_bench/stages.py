"""The engines of one process without any server, and work of our own on their device thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from colaserve_bench.recorder import StepRecorder
from colaserve_services.decoder.engine import DecoderEngine
from colaserve_services.encoder.engine import EncoderEngine
from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import UsageError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.prior.engine import PriorEngine
from colaserve_services.text import Tokenizer

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ANY = 1 << 50  # bytes: benchmarks reserve what they need


@dataclass(frozen=True)
class ComputeSettings:
    """Which checkpoint, and how it computes."""

    model: Path
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int | None = None  # None: torch's choice

    @property
    def torch_device(self) -> torch.device:
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device: got cuda, and torch finds no GPU")
        return device


class Errands:
    """Runs functions on the device thread between steps, where their OpenMP team is the engines' own."""

    def __init__(self, device: DeviceThread):
        self._device = device
        self._waiting: deque[Callable[[], None]] = deque()
        device.register(self)

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def errand() -> None:
            try:
                value = function()
            except Exception as error:
                loop.call_soon_threadsafe(result.set_exception, error)
            else:
                loop.call_soon_threadsafe(result.set_result, value)

        self.add(errand)
        return await result

    def add(self, function: Callable[[], None]) -> None:
        """Let a function that raises nothing run when its turn comes."""
        self._waiting.append(function)
        self._device.wake()

    def step(self) -> bool:
        """As a Worker: one errand a turn."""
        if not self._waiting:
            return False
        self._waiting.popleft()()
        return True

    def next_deadline(self) -> float | None:
        return None

    def fail(self, error: Exception) -> None:
        raise AssertionError("errands catch what they raise") from error


@dataclass(frozen=True)
class Stages:
    """Engines that share one device thread; those not asked for are None."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    prior: PriorEngine
    encoder: EncoderEngine | None
    decoder: DecoderEngine | None
    steps: StepRecorder  # of the prior
    errands: Errands

    @property
    def block_tokens(self) -> int:
        """Tokens that a block holds."""
        return self.prior.shape.block_size * self.prior.shape.patch_size


@contextmanager
def started(
    compute: ComputeSettings,
    *,
    max_context: int,
    max_running: int,
    roles: tuple[str, ...] = ("prior",),
) -> Iterator[Stages]:
    """Load the engines of `roles`, without prefix caches, and start their thread; stop it at the end."""
    with ThreadPoolExecutor(1) as loader:  # its OpenMP team ends with it: docs/decisions.md, "One OpenMP team"
        stages, thread = loader.submit(_load, compute, max_context, max_running, roles).result()
    if compute.threads:
        stages.errands.add(lambda: torch.set_num_threads(compute.threads or 1))  # OpenMP counts for each thread apart
    thread.start()
    try:
        yield stages
    finally:
        thread.stop()


def _load(
    compute: ComputeSettings, max_context: int, max_running: int, roles: tuple[str, ...]
) -> tuple[Stages, DeviceThread]:
    if compute.threads:
        torch.set_num_threads(compute.threads)
    checkpoint, device, dtype = Checkpoint.open(compute.model), compute.torch_device, DTYPES[compute.dtype]
    bounds = EngineLimits(max_context=max_context, max_running=max_running, kv_bytes=_ANY, prefix_cache_bytes=0)
    thread, shape, steps = DeviceThread(), checkpoint.shape, StepRecorder()
    encoder = decoder = None
    if "encoder" in roles:
        words = Tokenizer.open(checkpoint.tokenizer_path, shape.vocab_size, checkpoint.defaults)
        encoder = EncoderEngine(checkpoint.load_encoder(device, dtype), shape, thread, bounds, words.special.pad)
    if "decoder" in roles:
        decoder = DecoderEngine(checkpoint.load_decoder(device, dtype), shape, thread, bounds)
    prior = PriorEngine(checkpoint.load_prior(device, dtype), shape, thread, bounds, steps)
    return Stages(checkpoint, dtype, prior, encoder, decoder, steps, Errands(thread)), thread
