"""PriorService: a canvas to its written blocks. Translates and delegates to the engine, which checks the job."""

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from colaserve.v1 import prior_pb2, prior_pb2_grpc, types_pb2
from colaserve_services.bounds import INTEGRATION, defaults, given, sampler_values
from colaserve_services.errors import InvalidRequest, ModelMismatch
from colaserve_services.model.flow import SamplerSettings, Steering
from colaserve_services.prior.engine import PriorEngine
from colaserve_services.prior.sampling_run import SampleJob
from colaserve_services.prior.scoring_run import ScoreJob, ScoringSession, scoring_settings
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

    async def Score(
        self, request: prior_pb2.PriorServiceScoreRequest, context: Any
    ) -> prior_pb2.PriorServiceScoreResponse:
        """The log density of a canvas's open positions; leaving the session frees its KV, as in Sample."""
        if self._identity.dtype != "float32":
            what = f"got {self._identity.dtype}, and differences of rounded velocities say nothing (--dtype)"
            raise ModelMismatch(f"Score needs a prior that computes in float32: {what}")
        job, found = self._score_job(request), prior_pb2.PriorServiceScoreResponse()
        async with self._engine.held(ScoringSession, job, about.deadline(context)) as session:
            session.end_call = cancellation.end_call
            async for block in session:
                found.log_densities.append(block.log_density)
                found.standard_errors.append(block.standard_error)
                found.evaluations += block.evaluations
                found.timing.queue_us += block.timings.queue_us
                found.timing.compute_us += block.timings.compute_us
        return found

    async def GetInfo(
        self, request: prior_pb2.PriorServiceGetInfoRequest, context: Any
    ) -> prior_pb2.PriorServiceGetInfoResponse:
        """Describe the model, its limits and its load."""
        return prior_pb2.PriorServiceGetInfoResponse(**about.info(self._engine, self._identity))

    def _canvas(self, canvas: types_pb2.Canvas) -> dict[str, Any]:
        most, dim = self._engine.limits.max_context, self._engine.shape.latent_dim
        if len(canvas.open) > most:
            raise InvalidRequest("canvas.open", f"got {len(canvas.open)} spans for {most} positions at most")
        latents = arrays.latents_from_message(canvas.latents, "canvas.latents", dim, self._identity.space)
        return {"latents": torch.from_numpy(latents), "open": [(span.start, span.end) for span in canvas.open]}

    def _job(self, request: prior_pb2.SampleRequest) -> SampleJob:
        seeded = request.WhichOneof("noise_source") == "seed"
        return SampleJob(
            **self._canvas(request.canvas),
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

    def _score_job(self, request: prior_pb2.PriorServiceScoreRequest) -> ScoreJob:
        canvas, B, most = self._canvas(request.canvas), self._engine.shape.block_size, self._engine.limits.max_context
        latents, spans = canvas["latents"], canvas["open"]
        if len(latents) % B or len(latents) > most:
            what = f"got {len(latents)} positions, expected whole blocks of {B}, at most {most} positions (max_context)"
            raise InvalidRequest("canvas.latents", what)
        if not spans:
            raise InvalidRequest("canvas.open", "got no span, expected the positions whose density is wanted")
        values = defaults(INTEGRATION) | given(request, INTEGRATION, "")
        return ScoreJob(
            **canvas,
            max_blocks=len(latents) // B - min(spans[0][0], len(latents) - 1) // B,
            sampler=scoring_settings(values["steps"], values["solver"]),
            base_seed=request.seed.base_seed,
            sample_id=request.seed.sample_id,
            cache_salt=request.cache_salt,
            probes=values["probes"],
        )

    def _sampler(self, message: types_pb2.Sampler) -> SamplerSettings:
        values = sampler_values(message, vars(self._defaults))
        windows = defaultdict[tuple[float, float], list[Tensor]](list)  # a run joins those of a step at each step
        for each in steering.read(values["steering"], "sampler.steering", self._engine.shape.latent_dim):
            windows[each.start, each.end].append(torch.from_numpy(each.columns))
        values["steering"] = tuple(Steering(torch.cat(columns), *window) for window, columns in windows.items())
        return SamplerSettings(**values)

    def _noise(self, request: prior_pb2.SampleRequest) -> Tensor | None:
        if request.WhichOneof("noise_source") != "noise":
            return None
        shape = self._engine.shape
        rows = request.max_blocks, shape.block_size, shape.latent_dim
        return torch.from_numpy(arrays.from_message(request.noise, "noise", rows))
