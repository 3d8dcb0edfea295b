"""A checkpoint's stages in this process: weights read, engines on one device thread, services in front of them.

The only part of the launcher that needs torch; imported when a stage is started.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from colaserve_services.decoder.engine import DecodeJob, DecoderEngine
from colaserve_services.decoder.service import DecoderService
from colaserve_services.encoder.engine import EncoderEngine
from colaserve_services.encoder.service import EncoderService
from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.failures import has_to_fit
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.errors import CheckpointError, InvalidRequest, StepFailed, Unavailable, UsageError
from colaserve_services.launch.hub import Progress
from colaserve_services.launch.memory import budgets
from colaserve_services.model import float8, int8, loading
from colaserve_services.model.backend import Sizes
from colaserve_services.model.backend.pick import pick
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.cpu_features import lacks_bfloat16
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.sampling import SamplingSettings
from colaserve_services.prior.engine import PriorEngine
from colaserve_services.prior.sampling_run import SampleJob
from colaserve_services.prior.service import PriorService
from colaserve_services.rpc.about import Identity
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.settings import MAX_MESSAGE_BYTES
from colaserve_services.text import Tokenizer

LEAST_CAPABILITY = (8, 0)  # before it bfloat16 is emulated
STAGES = ("encoder", "decoder", "prior")  # the device thread's turns: short steps first

Failing = Callable[[str, bool], None]  # a stage, and whether its engine is at fault
_Settings = TypeVar("_Settings", SamplerSettings, SamplingSettings)

_SLOW = "this CPU has no bfloat16 in hardware: weights take half the memory, and steps more time than in float32"
_log = logging.getLogger(__name__)


class EngineMetrics(EngineObserver):
    """Of one engine; `stage` is its label. Called on the device thread; prometheus_client's locks are short."""

    def __init__(self, metrics: Metrics, stage: str, failing: Failing = lambda *_: None):
        self._refused, self._stage, self._failing = metrics.refused, stage, failing
        self._running = metrics.running.labels(stage)
        self._rows, self._step = metrics.batch_rows.labels(stage), metrics.step_seconds.labels(stage)
        self._kv, self._budget = metrics.kv_bytes.labels(stage), metrics.kv_budget_bytes.labels(stage)
        self._utilization = metrics.kv_utilization.labels(stage)
        self._first, self._next = metrics.engine_first_block.labels(stage), metrics.engine_inter_block.labels(stage)
        self._in, self._out = metrics.engine_tokens.labels("in", stage), metrics.engine_tokens.labels("out", stage)
        self._hits, self._misses = metrics.prefix_hits.labels(stage), metrics.prefix_misses.labels(stage)
        self._held = metrics.prefix_bytes.labels(stage)
        self._step_failures, self._preemptions = metrics.step_failures.labels(stage), metrics.preemptions.labels(stage)

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        self._step.observe(seconds)
        self._rows.observe(rows)

    def load(self, running: int, kv_bytes: int, kv_budget: int) -> None:
        self._running.set(running)
        self._kv.set(kv_bytes)
        self._budget.set(kv_budget)
        self._utilization.set(kv_bytes / kv_budget if kv_budget else 0.0)

    def block(self, seconds: float, first: bool) -> None:
        (self._first if first else self._next).observe(seconds)

    def tokens(self, count_in: int, count_out: int) -> None:
        self._in.inc(count_in)
        self._out.inc(count_out)

    def prefix_cache(self, hits: int, misses: int, bytes_held: int) -> None:
        self._hits.inc(hits)
        self._misses.inc(misses)
        self._held.set(bytes_held)

    def preempted(self) -> None:
        self._preemptions.inc()

    def step_failed(self) -> None:
        self._step_failures.inc()

    def failing(self, failing: bool) -> None:
        self._failing(self._stage, failing)

    def refused(self, reason: str) -> None:
        self._refused.labels(self._stage, reason).inc()


@dataclass
class RunningStages:
    """Engines and their services by stage, all on one device thread."""

    engines: dict[str, Any]
    services: dict[str, Any]
    thread: DeviceThread

    async def warm_up(self) -> None:
        """A small piece of work for every engine, so that the first request finds all in place.

        Raises CheckpointError when an engine does not manage it, or its numbers are not finite.
        """
        for stage, engine in self.engines.items():
            try:
                await _warm_up(engine)
            except (Unavailable, StepFailed) as error:
                raise CheckpointError(f"the {stage} cannot serve with these weights: {error}") from error

    def stop(self) -> None:
        """End the device thread; whatever still runs is abandoned."""
        self.thread.stop()


def load_stages(
    checkpoint: Checkpoint,
    compute: Mapping[str, tuple[str, str]],
    limits: EngineLimits,
    metrics: Metrics,
    failing: Failing = lambda *_: None,
    network: Callable[[Any], Any] = lambda network: network,
) -> RunningStages:
    """Read the weights of stages and start their engines; `compute` has the names of each one's device and dtype.

    Blocks; raises CheckpointError and UsageError. `limits.kv_bytes` 0: what memory leaves. `failing` is called on the
    device thread when an engine is at fault, and when it computes again. `network` wraps those that the engines compute
    with.
    """
    picked = {}
    for stage, (device_name, dtype_name) in compute.items():
        device = pick_device(device_name)
        dtype = pick_dtype(dtype_name, device)
        picked[stage] = device, loading.dtype_beside(dtype) if stage == "encoder" else dtype
    for device, dtype in dict.fromkeys(picked.values()):
        if device.type == "cuda":  # it would plan anew for every length of keys, which grow with each block
            torch.backends.cuda.enable_cudnn_sdp(False)
        if device.type == "cpu" and dtype == torch.bfloat16 and (reason := lacks_bfloat16()):
            _log.warning(_SLOW, extra={"fields": {"reason": reason}})
    gpus = {device for device, _ in picked.values() if device.type == "cuda"}  # one a process: see launch/split.py
    thread = DeviceThread(begin=lambda: _enter(gpus))
    _enter(gpus)
    engines, services = {}, {}
    models: dict[str, Any] = {}
    for stage in (stage for stage in STAGES if stage in picked):
        models[stage] = _load(stage, checkpoint, *picked[stage], metrics)
    auto = {} if limits.kv_bytes else budgets(models, limits, checkpoint.shape.block_size, _backend)
    for stage, model in models.items():
        device, dtype = picked[stage]
        observer = EngineMetrics(metrics, stage, failing)
        own = replace(limits, kv_bytes=auto.get(stage, limits.kv_bytes))
        with has_to_fit(f"the {stage}", device):
            engine, serve = _stage(stage, network(model), checkpoint, thread, own, observer)
        block_tokens = engine.shape.block_size * engine.shape.patch_size
        metrics.kv_blocks.labels(stage, str(block_tokens)).set(engine.kv_blocks)
        _log.info("backend chosen", extra={"fields": {"stage": stage, **engine.chosen()}})
        weights, kind = checkpoint.weights_of(stage), str(dtype).removeprefix("torch.")
        backend = f"{engine.picked.name}: {engine.picked.why}"
        identity = Identity(checkpoint.space, weights, str(device), kind, MAX_MESSAGE_BYTES, backend)
        engines[stage], services[stage] = engine, serve(identity)
    thread.start()
    return RunningStages(engines, services, thread)


def _backend(stage: str, model: Any, sizes: Sizes) -> object:
    with has_to_fit(f"the {stage}", model.device):
        return getattr(pick(model.device, model.dtype), stage)(model, sizes)


def _enter(gpus: Collection[torch.device]) -> None:
    """Of a thread: what it launches without saying where goes to the process's GPU, not to the first of the machine."""
    for device in gpus:
        torch.cuda.set_device(device)


def pick_device(name: str) -> torch.device:
    """The torch device; UsageError when it does not exist here."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UsageError(f"--device: {name} is asked for, but this torch ({torch.__version__}) finds no GPU")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device: got {name}, this machine has {torch.cuda.device_count()} GPU(s)")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        what = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
        raise UsageError(f"--device: {what}, expected 8.0 (Ampere) or newer")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: float32 on a CPU, bfloat16 on CUDA. UsageError when it cannot be computed in here."""
    if name == "int8" and (reason := "it is for CPUs" if device.type == "cuda" else int8.missing()):
        raise UsageError(f"--dtype: int8 cannot be had here: {reason}")
    if name == "float8" and (reason := float8.missing(device)):
        raise UsageError(f"--dtype: float8 cannot be had here: {reason}")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return loading.DTYPES[name]


def _load(stage: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, metrics: Metrics) -> nn.Module:
    progress, started = Progress(f"reading the {stage}"), time.monotonic()
    try:
        with has_to_fit(f"the {stage}", device):
            model: nn.Module = loading.load(checkpoint, stage, device, dtype, progress)
    finally:
        progress.close()
    seconds = time.monotonic() - started
    metrics.weights_load_seconds.labels(stage).set(seconds)
    fields = {"stage": stage, "seconds": round(seconds, 2), "dtype": str(dtype)}
    _log.info("weights read", extra={"fields": fields})
    return model


def _stage(
    stage: str, model: Any, checkpoint: Checkpoint, thread: DeviceThread, limits: EngineLimits, observer: EngineMetrics
) -> tuple[Any, Callable[[Identity], Any]]:
    """A stage's engine, and what makes its service."""
    shape = checkpoint.shape_of(stage)
    if stage == "prior":
        prior = PriorEngine(model, shape, thread, limits, observer)
        return prior, lambda identity: PriorService(prior, identity, _defaults(SamplerSettings, checkpoint))
    special = Tokenizer.open(checkpoint.tokenizer_path, shape.vocab_size, checkpoint.defaults).special
    if stage == "encoder":
        encoder = EncoderEngine(model, shape, thread, limits, special.pad, observer)
        return encoder, lambda identity: EncoderService(encoder, identity)
    decoder = DecoderEngine(model, shape, thread, limits, observer, end_ids=special.end)
    return decoder, lambda identity: DecoderService(decoder, identity, _defaults(SamplingSettings, checkpoint))


def _defaults(kind: type[_Settings], checkpoint: Checkpoint) -> _Settings:
    """What unset fields of a request mean: the checkpoint's own defaults before those of the contract."""
    own = checkpoint.defaults.requests
    try:
        return kind(**{spec.name: own[spec.name] for spec in fields(kind) if spec.name in own})
    except InvalidRequest as error:
        raise CheckpointError(f"{checkpoint.directory / 'generation_config.json'}: {error}") from error


async def _warm_up(engine: EncoderEngine | PriorEngine | DecoderEngine) -> None:
    if isinstance(engine, EncoderEngine):
        await engine.encode([[0]])
        return
    B, nothing = engine.shape.block_size, torch.zeros(0, engine.shape.latent_dim)
    if isinstance(engine, DecoderEngine):
        async with engine.session(DecodeJob(nothing, max_latents=B)) as decoding:
            await decoding.decode(torch.zeros(B, engine.shape.latent_dim))
        return
    blocks = min(2, engine.limits.max_context // B)
    async with engine.session(SampleJob(nothing, blocks, sampler=SamplerSettings(steps=2), base_seed=0)) as session:
        async for _ in session:
            pass
