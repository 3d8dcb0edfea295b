"""Engines of one process without a server: started, driven as clients would, and watched step by step; and the peak,
the speed of the work of a pass that counts alone.

Products: 2 x rows x weights of the four matrices of each layer (proj_qkv, proj_out, mlp.proj_in, mlp.proj_out), rows
being the latent positions of a pass, both branches and commits included. All else (attention, norms, modulation, GELU,
solver, copies, the 16-channel input and output projections) counts as no work but takes time.
"""

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_bench.report import Row, percentile
from colaserve_services.decoder.engine import DecodeJob, DecoderEngine
from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.errors import UsageError
from colaserve_services.model import loading
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.config import DiTConfig
from colaserve_services.model.flow import SamplerSettings, schedule
from colaserve_services.prior.engine import PriorEngine
from colaserve_services.prior.sampling_run import SampleJob

AHEAD = EngineLimits().run_ahead  # blocks that a session writes while others are still at their contexts
_ANY = 1 << 50  # bytes: benchmarks reserve what they need


@dataclass(frozen=True)
class Compute:
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


@dataclass(frozen=True)
class Load:
    """Sessions that start together, each with its own random context, and go on together once all have a block."""

    sessions: int
    context: int  # latents; whole blocks
    blocks: int  # to write, at least 2: the first one is warm-up; each session writes AHEAD more
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    preview_every: int = 0
    with_probes: bool = False
    given: int = 0  # positions of each written block

    @property
    def written(self) -> int:
        """Blocks of each session."""
        return self.blocks + AHEAD

    @property
    def guided_evaluations(self) -> int:
        """Of a block's evaluations, those that need the unconditional branch; for solvers of one evaluation a step."""
        times = schedule(self.sampler.steps)[:-1]
        return round(self.sampler.evaluations() * sum(map(self.sampler.guided, times)) / len(times))


@dataclass(frozen=True)
class Step:
    """One forward pass; `ended` is time.monotonic() seconds."""

    ended: float
    seconds: float
    rows: int  # latent positions
    sessions: int


class StepRecorder(EngineObserver):
    """Keeps the steady steps of a run: from when all sessions have a first block and step again, until one ends."""

    def __init__(self) -> None:
        self.begin(1)

    def begin(self, sessions: int) -> None:
        """Forget what was; `sessions` are about to start. While no session runs."""
        self._sessions, self._first_blocks, self._is_steady = sessions, 0, False
        self.steady: list[Step] = []

    def block(self, seconds: float, first: bool) -> None:
        self._first_blocks += first

    def load(self, running: int, kv_bytes: int, kv_budget: int) -> None:
        self._is_steady &= running == self._sessions

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        if self._is_steady:
            self.steady.append(Step(time.monotonic(), seconds, rows, sessions))
        elif self._first_blocks == sessions == self._sessions:
            self._first_blocks += 1  # once a run
            self._is_steady = True


class DeviceCalls:
    """Runs functions on the device thread between steps, where their OpenMP team is the engines' own: a `Worker`."""

    computes = False

    def __init__(self, device: DeviceThread):
        self._device = device
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        device.register(self)

    async def run(self, function: Callable[[], Any]) -> Any:
        """What `function` returns or raises."""
        return await asyncio.wrap_future(self.add(function))

    def add(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.append((future, function))
        self._device.wake()
        return future

    def step(self, heavy: bool) -> bool:
        if not self._queue:
            return False
        future, function = self._queue.popleft()
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        return True

    def next_deadline(self) -> float | None:
        return None

    def fail(self, error: Exception) -> None:
        raise AssertionError("every call catches what it raises") from error


@dataclass(frozen=True)
class Engines:
    """A prior that shares one device thread with a decoder, if there is one, through which every block goes then."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    prior: PriorEngine
    decoder: DecoderEngine | None
    steps: StepRecorder  # of the prior
    device_calls: DeviceCalls

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.prior.shape.block_size * self.prior.shape.patch_size


@contextmanager
def started(compute: Compute, max_context: int, max_running: int, decode: bool = False) -> Iterator[Engines]:
    """Load the engines, without prefix caches, and start their thread; stop it at the end."""
    thread = DeviceThread()

    def load() -> Engines:
        if compute.threads:
            torch.set_num_threads(compute.threads)
        checkpoint, device, dtype = Checkpoint.open(compute.model), compute.torch_device, loading.DTYPES[compute.dtype]
        limits = EngineLimits(max_context=max_context, max_running=max_running, kv_bytes=_ANY, share_prefixes=False)
        steps, decoder = StepRecorder(), None
        if decode:
            decoder = DecoderEngine(
                loading.load(checkpoint, "decoder", device, dtype), checkpoint.shape, thread, limits
            )
        prior = PriorEngine(loading.load(checkpoint, "prior", device, dtype), checkpoint.shape, thread, limits, steps)
        return Engines(checkpoint, dtype, prior, decoder, steps, DeviceCalls(thread))

    with ThreadPoolExecutor(1) as loader:  # its OpenMP team ends with it: docs/decisions.md, "One OpenMP team"
        engines = loader.submit(load).result()
    if compute.threads:  # OpenMP counts for each thread apart
        engines.device_calls.add(lambda: torch.set_num_threads(compute.threads or 1))
    thread.start()
    try:
        yield engines
    finally:
        thread.stop()


async def run(engines: Engines, load: Load, seed: int) -> Row:
    """Run a load to its end; its numbers, times in milliseconds where the name says so.

    Contexts differ with `seed`, so that no cache knows them.
    """
    check_blocks("--context", load.context, engines.prior.shape.block_size)
    if load.blocks < 2:
        raise UsageError(f"--blocks: got {load.blocks}, expected 2 or more: the first is warm-up")
    engines.steps.begin(load.sessions)
    began, together = time.monotonic(), asyncio.Barrier(load.sessions)
    firsts = await asyncio.gather(*(_session(engines, load, 1000 * seed + i, together) for i in range(load.sessions)))
    seconds = time.monotonic() - began
    await engines.device_calls.run(lambda: None)  # the last step's record is in
    return _numbers(engines, load) | {
        "tokens_per_second_with_prefill": load.sessions * load.written * engines.block_tokens / seconds,
        "first_block_seconds": statistics.median(first - began for first in firsts),
    }


def _numbers(engines: Engines, load: Load) -> Row:
    """Of the steady steps. Each brings each session on by one evaluation of a block."""
    steps, model = engines.steps.steady, engines.prior.model
    assert steps, "every load has steady steps"
    wall = steps[-1].ended - steps[0].ended + steps[0].seconds  # with what ran between the steps
    times = [step.seconds for step in steps]
    blocks_per_second = sum(step.sessions for step in steps) / load.sampler.evaluations() / wall
    flops = sum(product_flops(model.config, step.rows) for step in steps)
    return {
        "sessions": load.sessions,
        "context": load.context,
        "blocks_per_second": blocks_per_second,
        "tokens_per_second": blocks_per_second * engines.block_tokens,
        "step_ms_p50": 1e3 * statistics.median(times),
        "step_ms_p95": 1e3 * (percentile(times, 0.95) or 0.0),
        "steps": len(steps),
        "gflops": flops / (wall if model.device.type == "cuda" else sum(times)) / 1e9,
        "gflops_with_gaps": flops / wall / 1e9,
    }


def check_blocks(option: str, latents: int, block_size: int) -> None:
    """Raise UsageError unless these are whole blocks."""
    if latents % block_size:
        raise UsageError(f"{option}: got {latents}, expected a multiple of the block size, {block_size}")


def random_context(engines: Engines, latents: int, seed: int) -> Tensor:
    """Latents of a context that no cache knows."""
    return torch.randn(latents, engines.prior.shape.latent_dim, generator=torch.Generator().manual_seed(seed))


async def _session(engines: Engines, load: Load, seed: int, together: asyncio.Barrier) -> float:
    """Time of the first block. The engine pauses a session that is not read, so none is done before all have begun."""
    B, first = engines.prior.shape.block_size, None
    positions = load.context + load.written * B
    latents = random_context(engines, positions if load.given else load.context, seed)
    spans = [(end - B + load.given, end) for end in range(load.context + B, positions + B, B)] if load.given else []
    job = SampleJob(
        latents, load.written, spans, sampler=load.sampler, base_seed=seed,
        preview_every=load.preview_every, with_probes=load.with_probes,
    )  # fmt: skip
    decode = DecodeJob(latents[: load.context], max_latents=positions)
    decoding = engines.decoder.session(decode) if engines.decoder else nullcontext()
    async with engines.prior.session(job) as session, decoding as decoder:
        async for block in session:
            if block.timings is None:  # a preview
                continue
            if decoder is not None:
                await decoder.decode(block.latents)
            if first is None:
                first = time.monotonic()
                await together.wait()
    assert first is not None
    return first


LAYER_MATRICES = ("msa.proj_qkv", "msa.proj_out", "mlp.proj_in", "mlp.proj_out")


def product_flops(config: DiTConfig, rows: int) -> int:
    """Of one pass over so many rows."""
    return 2 * rows * config.num_layers * config.layer_weights


def _onednn(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


CALLS: dict[str, Callable[[Tensor, int], Callable[[Tensor], Tensor]]] = {  # weight (out, in), rows -> its product
    "linear": lambda weight, rows: lambda x: F.linear(x, weight),
    "onednn packed for the rows": _onednn,
    "onednn packed for 32": lambda weight, rows: _onednn(weight, 32),
}


class Peak:
    """The speed of products over the checkpoint's own matrices in layer order: what all else could at best reach.

    Use on the thread that the engine computes on. Every call that the backend has is timed once for each number of
    rows; later measurements repeat the fastest.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        config = checkpoint.dit_config
        names = [f"blocks.{i}.{matrix}.weight" for i in range(config.num_layers) for matrix in LAYER_MATRICES]
        found = {name: stored.to(device=device, dtype=dtype, copy=True) for name, stored in checkpoint.dit.read(names)}
        self._config, self.weights = config, [found[name] for name in names]
        self._fastest: dict[int, str] = {}  # rows -> call
        self._prepared: tuple[int, list[Callable[[Tensor], Tensor]]] = (0, [])  # rows, products

    def measure(self, rows: int, seconds: float) -> tuple[float, str]:
        """GFLOP/s, the median over the passes of about `seconds`, and the call that reached it."""
        if rows not in self._fastest:
            speeds = {
                call: self._gflops(products, rows, seconds) for call in CALLS if (products := self.products(call, rows))
            }
            self._fastest[rows] = max(speeds, key=speeds.__getitem__)
        if rows != self._prepared[0]:
            self._prepared = (0, [])  # not both at once
            self._prepared = rows, self.products(self._fastest[rows], rows)
        return self._gflops(self._prepared[1], rows, seconds), self._fastest[rows]

    def products(self, call: str, rows: int) -> list[Callable[[Tensor], Tensor]]:
        """Of every matrix; empty if this build of torch does not have the call, or not for this dtype or device."""
        try:
            products = [CALLS[call](weight, rows) for weight in self.weights[:4]]
            for product, x in zip(products, self.inputs(rows), strict=True):
                product(x)
        except (RuntimeError, AttributeError, NotImplementedError):
            return []
        return products + [CALLS[call](weight, rows) for weight in self.weights[4:]]

    def inputs(self, rows: int) -> list[Tensor]:
        """One for each of a layer's matrices."""
        return [torch.randn(rows, w.shape[1], device=w.device, dtype=w.dtype) for w in self.weights[:4]]

    def _gflops(self, products: list[Callable[[Tensor], Tensor]], rows: int, seconds: float) -> float:
        inputs, times = self.inputs(rows), list[float]()
        until = time.perf_counter() + seconds
        while len(times) < 4 or time.perf_counter() < until:
            started = time.perf_counter()
            for i, product in enumerate(products):
                product(inputs[i % len(inputs)])
            if self.weights[0].device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return product_flops(self._config, rows) / statistics.median(times[1:]) / 1e9  # the first is warm-up
