"""The coordinator: what the stages are for each other. It holds no model and never looks into a latent but to check it.

coordinator = Coordinator(Stages(encoder, prior, decoder), tokenizer, defaults, limits)
await coordinator.connect()
async for response in generate(coordinator.services, request, Call()): ...
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from colaserve.v1 import generation_pb2, latent_service_pb2, types_pb2
from colaserve_services import __version__
from colaserve_services.coordinator import checks
from colaserve_services.coordinator.admission import Admission
from colaserve_services.coordinator.context import ServiceContext
from colaserve_services.coordinator.defaults import Defaults, resolve_sampler, resolve_sampling
from colaserve_services.coordinator.health import HealthMonitor
from colaserve_services.coordinator.limits import CoordinatorLimits
from colaserve_services.coordinator.stages import NAMES, Stages, agree
from colaserve_services.errors import CheckpointError, ModelMismatch, Unavailable
from colaserve_services.rpc.about import shape_message
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.text import Tokenizer

_log = logging.getLogger(__name__)


class Coordinator:
    """Serves GenerationService and LatentService out of three stages. One event loop; safe for concurrent calls."""

    def __init__(
        self,
        stages: Stages,
        tokenizer: Tokenizer,
        defaults: Defaults | None = None,
        limits: CoordinatorLimits | None = None,
        metrics: Metrics | None = None,
        model_name: str = "",
        space: str = "",
        description: str = "",
    ):
        """`space`: the latent space of the checkpoint that the tokenizer and the defaults are of; empty: not known.
        `description`: what its model can and cannot do."""
        self._tokenizer = tokenizer
        self._defaults, self._limits = defaults or Defaults.of(), limits or CoordinatorLimits()
        self._metrics = metrics or Metrics()
        for stage in NAMES:  # at 0, so that the first failure is an increase
            for outcome in ("resumed", "failed"):
                self._metrics.failovers.labels(stage, outcome)
            for kind in checks.KINDS:
                self._metrics.stage_faults.labels(stage, kind)
        self._admission = Admission(self._limits, self._metrics, stages.shared)
        self._health, self._changed = HealthMonitor(stages, self._metrics), stages.changed
        self._services: ServiceContext | None = None
        self._connected = asyncio.Event()
        self._connected_at = 0.0
        self.model_name, self._description = model_name, description
        self._space = space

    async def connect(self, silent_seconds: float = 15.0) -> None:
        """Wait for the stages, however long they take, and check that they serve one model; the log says which are
        lacking, each time so many seconds have passed. Raises Unavailable for what waiting does not change,
        ModelMismatch when they differ, CheckpointError when the tokenizer does not fit."""
        infos = await self._health.wait(self._space, silent_seconds)
        model = agree(infos, self._limits.max_context, self._limits.max_message_bytes)
        if self._space and model.space and self._space != model.space:
            raise ModelMismatch(
                f"the stages serve another model: space is {model.space} there, {self._space} in the coordinator's "
                "checkpoint (--model)"
            )
        if self._tokenizer.vocab_size > model.vocab_size:
            raise CheckpointError(
                f"tokenizer.json has ids up to {self._tokenizer.vocab_size - 1}, "
                f"the stages' model takes ids up to {model.vocab_size - 1}"
            )
        self._health.settle(model)
        self._admission.follow(self._health.capacities)
        self._services = ServiceContext(
            self._health.pools, model, self._tokenizer, self._defaults, self._limits, self._metrics, self._admission,
            self.model_name,
        )  # fmt: skip
        self._connected_at = time.monotonic()
        self._connected.set()

    async def connected(self, seconds: float) -> None:
        """Return as soon as connect() is done; after so many seconds even if it is not."""
        await _set_within(self._connected, seconds)

    @property
    def ready(self) -> bool:
        """Whether it is connected and every stage answered lately."""
        return self._services is not None and self._health.all_serving

    async def watch(self, changed: Callable[[bool], None]) -> None:
        """After connect(): look at the stages for ever, follow their limits, report whenever `ready` changes. Run it as
        a task, cancel it to stop."""
        reported = True  # as connect() left it
        while True:
            await _set_within(self._changed, self._limits.watch_seconds)  # a replica that began to serve may be called
            self._changed.clear()
            await self.look()
            if self.ready != reported:
                reported = self.ready
                _log.warning("ready: %s. %s", reported, self._health.faults())
                changed(reported)

    async def look(self) -> None:
        """Look at the stages now. They may have other limits; calls that run keep those they began with."""
        await self._health.look()
        self._admission.follow(self._health.capacities)
        model = self.services.model.within(self._health.infos, self._limits.max_context, self._limits.max_message_bytes)
        if model != self.services.model:
            self._services = replace(self.services, model=model)

    @property
    def services(self) -> ServiceContext:
        """What calls work with; Unavailable before connect()."""
        if self._services is None:
            raise Unavailable(f"the coordinator waits for its stages: {self._health.faults()}")
        return self._services

    async def generation_info(self) -> generation_pb2.GenerationServiceGetInfoResponse:
        """GenerationService.GetInfo; the stages as the last look found them."""
        model, sampling = self.services.model, resolve_sampling(types_pb2.Sampling(), self._defaults, 0)
        sampling.ClearField("seed")  # an unset one is derived from the run's noise seed, so a default has none
        return generation_pb2.GenerationServiceGetInfoResponse(
            model_name=self.model_name,
            model=shape_message(model),
            space=model.space,
            limits=self._limit_message(),
            server=self._server_message(),
            default_sampler=resolve_sampler(types_pb2.Sampler(), self._defaults, 0),
            default_sampling=sampling,
            default_max_new_tokens=self._defaults.max_new_tokens,
            chat_frame=self._defaults.chat_frame,
            end_ids=sorted(self._tokenizer.special.end),
            pad_id=self._tokenizer.special.pad,
            stages=self._health.messages(),
            description=self._description,
        )

    async def latent_info(self) -> latent_service_pb2.LatentServiceGetInfoResponse:
        """LatentService.GetInfo."""
        model = self.services.model
        return latent_service_pb2.LatentServiceGetInfoResponse(
            model=shape_message(model), space=model.space, limits=self._limit_message(), server=self._server_message()
        )

    def _limit_message(self) -> types_pb2.Limits:
        model, limits = self.services.model, self._limits
        return types_pb2.Limits(
            max_context=model.max_context,
            max_message_bytes=model.max_message_bytes,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
        )

    def _server_message(self) -> types_pb2.ServerInfo:
        return types_pb2.ServerInfo(
            version=__version__,
            running=self._admission.running,
            waiting=self._admission.waiting,
            uptime_seconds=time.monotonic() - self._connected_at,
        )


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    """Return as soon as it is set; after so many seconds even if it is not."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
