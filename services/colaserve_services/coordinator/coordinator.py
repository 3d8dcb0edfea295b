"""The coordinator: what the stages are for each other. It holds no model and never looks into a latent but to check it.

coordinator = Coordinator(Stages(encoder, prior, decoder), tokenizer, defaults, limits)
await coordinator.connect()
async for response in coordinator.generate(request, Call()): ...
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from colaserve.v1 import generation_pb2, latent_service_pb2, types_pb2
from colaserve_services import __version__
from colaserve_services.coordinator import generation, infill, interpolation, latent_space
from colaserve_services.coordinator.admission import Admission
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.core import Core
from colaserve_services.coordinator.defaults import Defaults, resolve_sampler, resolve_sampling
from colaserve_services.coordinator.limits import CoordinatorLimits
from colaserve_services.coordinator.observer import CoordinatorObserver
from colaserve_services.coordinator.read_ahead import ReadAhead
from colaserve_services.coordinator.stages import Stages, agree
from colaserve_services.coordinator.watch import Lookout
from colaserve_services.errors import CheckpointError, ModelMismatch, Unavailable
from colaserve_services.offload import offload
from colaserve_services.text import Tokenizer

R = TypeVar("R")

_log = logging.getLogger(__name__)


class Coordinator:
    """Serves GenerationService and LatentService out of three stages. One event loop; safe for concurrent calls."""

    def __init__(
        self,
        stages: Stages,
        tokenizer: Tokenizer,
        defaults: Defaults | None = None,
        limits: CoordinatorLimits | None = None,
        observer: CoordinatorObserver | None = None,
        model_name: str = "",
        space: str = "",
        description: str = "",
    ):
        """`space`: the latent space of the checkpoint that the tokenizer and the defaults are of; empty: not known.
        `description`: what its model can and cannot do."""
        self._tokenizer = tokenizer
        self._defaults, self._limits = defaults or Defaults.of(), limits or CoordinatorLimits()
        self._observer = observer or CoordinatorObserver()
        self._admission = Admission(self._limits, self._observer)
        self._lookout, self._changed = Lookout(stages, self._observer), stages.changed
        self._core: Core | None = None
        self._connected = asyncio.Event()
        self._connected_at = 0.0
        self.model_name, self._description = model_name, description
        self._space = space

    async def connect(self) -> None:
        """Wait for the stages, however long they take, and check that they serve one model. Raises Unavailable for what
        waiting does not change, ModelMismatch when they differ, CheckpointError when the tokenizer does not fit."""
        infos = await self._lookout.wait(self._space)
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
        self._lookout.settle(model)
        self._admission.begin_with(infos["prior"].limits.max_running)
        self._core = Core(
            self._lookout.pools, model, self._tokenizer, self._defaults, self._limits, self._observer, self._admission
        )
        self._connected_at = time.monotonic()
        self._connected.set()

    async def connected(self, seconds: float) -> None:
        """Return as soon as connect() is done; after so many seconds even if it is not."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._connected.wait()

    @property
    def ready(self) -> bool:
        """Whether it is connected and every stage answered lately."""
        return self._core is not None and self._lookout.all_serving

    async def watch(self, changed: Callable[[bool], None]) -> None:
        """After connect(): look at the stages for ever, follow their limits, tell whenever `ready` changes. Run it as a
        task, cancel it to stop."""
        told = True  # as connect() left it
        while True:
            await self._until_next_look()
            await self._lookout.look()
            self._follow_limits()
            if self.ready != told:
                told = self.ready
                _log.warning("ready: %s. %s", told, self._lookout.faults())
                changed(told)

    async def _until_next_look(self) -> None:
        """A replica that began to serve is looked at at once: only then calls go to it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.watch_seconds):
                await self._changed.wait()
        self._changed.clear()

    def _follow_limits(self) -> None:
        """Stages may come back with other limits; calls that run keep those they began with."""
        model = self.core.model.within(self._lookout.infos, self._limits.max_context, self._limits.max_message_bytes)
        if model != self.core.model:
            self._core = replace(self.core, model=model)

    @property
    def core(self) -> Core:
        """What calls work with; Unavailable before connect()."""
        if self._core is None:
            raise Unavailable(f"the coordinator waits for its stages: {self._lookout.faults()}")
        return self._core

    def generate(
        self, request: generation_pb2.GenerateRequest, call: Call
    ) -> AsyncGenerator[generation_pb2.GenerateResponse, None]:
        """GenerationService.Generate. Close it (aclosing) when leaving early."""
        return self._read_in_time(generation.generate(self.core, request, call))

    async def _read_in_time(self, responses: AsyncGenerator[R, None]) -> AsyncGenerator[R, None]:
        """The responses; their slot is given up when nobody reads them while others wait for it."""
        async with ReadAhead(responses, self._admission.read_in_time) as ahead:
            async for response in ahead:
                yield response

    async def tokenize(self, request: generation_pb2.TokenizeRequest, call: Call) -> generation_pb2.TokenizeResponse:
        """GenerationService.Tokenize."""
        async with self._admission.slot(call, brief=True):
            ids = await self.core.tokenize(request.text, "text")
            tokens = await offload(self._tokenizer.token_texts, ids)
        return generation_pb2.TokenizeResponse(token_ids=ids, tokens=tokens)

    async def detokenize(
        self, request: generation_pb2.DetokenizeRequest, call: Call
    ) -> generation_pb2.DetokenizeResponse:
        """GenerationService.Detokenize."""
        async with self._admission.slot(call, brief=True):
            ids = self.core.checked(request.token_ids, "token_ids")
            tokens = await offload(self._tokenizer.token_texts, ids)
            text = await offload(self._tokenizer.decode, ids)
        return generation_pb2.DetokenizeResponse(text=text, tokens=tokens)

    async def encode_text(
        self, request: latent_service_pb2.EncodeTextRequest, call: Call
    ) -> latent_service_pb2.EncodeTextResponse:
        """LatentService.EncodeText."""
        return await latent_space.encode_text(self.core, request, call)

    async def decode_latents(
        self, request: latent_service_pb2.DecodeLatentsRequest, call: Call
    ) -> latent_service_pb2.DecodeLatentsResponse:
        """LatentService.DecodeLatents."""
        return await latent_space.decode_latents(self.core, request, call)

    def sample_latents(
        self, request: latent_service_pb2.SampleLatentsRequest, call: Call
    ) -> AsyncGenerator[latent_service_pb2.SampleLatentsResponse, None]:
        """LatentService.SampleLatents. Close it (aclosing) when leaving early."""
        return self._read_in_time(latent_space.sample_latents(self.core, request, call))

    async def interpolate(
        self, request: latent_service_pb2.InterpolateRequest, call: Call
    ) -> latent_service_pb2.InterpolateResponse:
        """LatentService.Interpolate."""
        return await interpolation.interpolate(self.core, request, call)

    async def infill(self, request: latent_service_pb2.InfillRequest, call: Call) -> latent_service_pb2.InfillResponse:
        """LatentService.Infill."""
        return await infill.infill(self.core, request, call)

    async def reconstruct(
        self, request: latent_service_pb2.ReconstructRequest, call: Call
    ) -> latent_service_pb2.ReconstructResponse:
        """LatentService.Reconstruct."""
        return await latent_space.reconstruct(self.core, request, call)

    async def generation_info(self) -> generation_pb2.GenerationServiceGetInfoResponse:
        """GenerationService.GetInfo; the stages as the last look found them."""
        model = self.core.model
        return generation_pb2.GenerationServiceGetInfoResponse(
            model_name=self.model_name,
            model=model.shape(),
            space=model.space,
            limits=self._limit_message(),
            server=self._server_message(),
            default_sampler=resolve_sampler(types_pb2.Sampler(), self._defaults),
            default_sampling=_without_seed(resolve_sampling(types_pb2.Sampling(), self._defaults, 0)),
            default_max_new_tokens=self._defaults.max_new_tokens,
            chat_frame=self._defaults.chat_frame,
            end_ids=sorted(self._tokenizer.special.end),
            pad_id=self._tokenizer.special.pad,
            stages=self._lookout.messages(),
            description=self._description,
        )

    async def latent_info(self) -> latent_service_pb2.LatentServiceGetInfoResponse:
        """LatentService.GetInfo."""
        model = self.core.model
        return latent_service_pb2.LatentServiceGetInfoResponse(
            model=model.shape(), space=model.space, limits=self._limit_message(), server=self._server_message()
        )

    def _limit_message(self) -> types_pb2.Limits:
        model, limits = self.core.model, self._limits
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


def _without_seed(sampling: types_pb2.Sampling) -> types_pb2.Sampling:
    """An unset seed means one derived from the run's noise seed, so a default has none."""
    sampling.ClearField("seed")
    return sampling
