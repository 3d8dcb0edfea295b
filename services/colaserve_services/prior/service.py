"""PriorService: a canvas to its written blocks. Translates and delegates to the engine, which checks the job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from colaserve.v1 import prior_pb2, prior_pb2_grpc, types_pb2
from colaserve_services.bounds import sampler_values
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.flow import SamplerSettings, Steering
from colaserve_services.prior.engine import PriorEngine
from colaserve_services.prior.sampling_run import SampleJob
from colaserve_services.rpc import about, arrays, cancellation, steering


class PriorService(prior_pb2_grpc.PriorServiceServicer):
    """Serves one engine."""

    def __init__(self, engine: PriorEngine, identity: about.Identity, defaults: SamplerSettings | None = None):
        """`defaults` stand for what a request leaves unset; None: those of the contract's brackets."""
        self._engine, self._identity, self._defaults = engine, identity, defaults or SamplerSettings()

    async def Sample(self, request: prior_pb2.SampleRequest, context: Any) -> AsyncIterator[prior_pb2.SampleResponse]:
        """Write the blocks of a canvas; leaving the session, however that happens, frees its KV."""
        job = self._job(request)
        async with self._engine.session(job, deadline=about.deadline(context)) as session:
            session.end_call = cancellation.end_call
            async for block in session:
                yield prior_pb2.SampleResponse(
                    block_index=block.index,
                    latents=arrays.latents_to_message(block.latents.numpy(), self._identity.space),
                    timing=None if block.timings is None else about.timing(block.timings),
                    provisional=block.timings is None,
                    step=block.step,
                    probes=None if block.probes is None else types_pb2.Probes(**asdict(block.probes)),
                    steps_saved=block.steps_saved,
                )

    async def GetInfo(
        self, request: prior_pb2.PriorServiceGetInfoRequest, context: Any
    ) -> prior_pb2.PriorServiceGetInfoResponse:
        """Describe the model, its limits and its load."""
        return prior_pb2.PriorServiceGetInfoResponse(**about.info(self._engine, self._identity))

    def _job(self, request: prior_pb2.SampleRequest) -> SampleJob:
        shape, canvas = self._engine.shape, request.canvas
        if len(canvas.open) > self._engine.limits.max_context:
            raise InvalidRequest(
                "canvas.open", f"got {len(canvas.open)} spans for {self._engine.limits.max_context} positions at most"
            )
        space, seeded = self._identity.space, request.WhichOneof("noise_source") == "seed"
        latents = arrays.latents_from_message(canvas.latents, "canvas.latents", shape.latent_dim, space)
        return SampleJob(
            latents=torch.from_numpy(latents),
            open=[(span.start, span.end) for span in canvas.open],
            max_blocks=request.max_blocks,
            first_block=request.first_block,
            sampler=self._sampler(request.sampler),
            base_seed=request.seed.base_seed if seeded else None,
            sample_id=request.seed.sample_id,
            noise=self._noise(request),
            cache_salt=request.cache_salt,
            preview_every=request.preview_every,
            with_probes=request.with_probes,
        )

    def _sampler(self, message: types_pb2.Sampler) -> SamplerSettings:
        values = sampler_values(message, vars(self._defaults))
        probes = steering.read(values["steering"], "sampler.steering", self._engine.shape.latent_dim)
        values["steering"] = tuple(Steering(torch.from_numpy(each.columns), each.start, each.end) for each in probes)
        return SamplerSettings(**values)

    def _noise(self, request: prior_pb2.SampleRequest) -> Tensor | None:
        if request.WhichOneof("noise_source") != "noise":
            return None
        shape = self._engine.shape
        rows = request.max_blocks, shape.block_size, shape.latent_dim
        return torch.from_numpy(arrays.from_message(request.noise, "noise", rows))
