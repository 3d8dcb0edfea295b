"""PriorService: a canvas to its written blocks. Translates and delegates to the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from colaserve.v1 import prior_pb2, prior_pb2_grpc, types_pb2

from colaserve_services.errors import InvalidRequest
from colaserve_services.model.flow import SamplerSettings, SolverName
from colaserve_services.prior.engine import PriorEngine, SampleJob
from colaserve_services.rpc import about, tensors
from colaserve_services.rpc.errors import status_from_errors

SAMPLE_IDS, SEEDS = 10_000, 1 << 63
SOLVERS: dict[int, SolverName] = {
    types_pb2.SOLVER_UNSPECIFIED: "euler",
    types_pb2.SOLVER_EULER: "euler",
    types_pb2.SOLVER_AB2: "ab2",
    types_pb2.SOLVER_HEUN: "heun",
}


class PriorService(prior_pb2_grpc.PriorServiceServicer):
    """Serves one engine."""

    def __init__(self, engine: PriorEngine, identity: about.Identity):
        self._engine, self._identity = engine, identity

    async def Sample(self, request: prior_pb2.SampleRequest, context: Any) -> AsyncIterator[prior_pb2.SampleResponse]:
        """Write the blocks of a canvas; leaving the session, however that happens, frees its KV."""
        async with status_from_errors(context):
            job = self._job(request)
            async with self._engine.session(job, deadline=about.deadline(context)) as session:
                async for block in session:
                    yield prior_pb2.SampleResponse(
                        block_index=block.index,
                        latents=tensors.latents_to_message(block.latents, self._identity.space),
                        timing=about.timing(block.timings),
                    )

    async def GetInfo(
        self, request: prior_pb2.PriorServiceGetInfoRequest, context: Any
    ) -> prior_pb2.PriorServiceGetInfoResponse:
        """Describe the model, its limits and its load."""
        return prior_pb2.PriorServiceGetInfoResponse(**about.info(self._engine, self._identity))

    def _job(self, request: prior_pb2.SampleRequest) -> SampleJob:
        shape = self._engine.shape
        latents = tensors.latents_from_message(
            request.canvas.latents, "canvas.latents", shape.latent_dim, self._identity.space
        )
        spans = open_spans(request.canvas.open, len(latents))
        self._check_extent(request, len(latents), spans[0][0] if spans else len(latents))
        sampler = sampler_settings(request.sampler)
        noise, base_seed, sample_id = self._noise(request, sampler)
        return SampleJob(
            latents=latents,
            open=spans,
            max_blocks=request.max_blocks,
            first_block=request.first_block,
            sampler=sampler,
            base_seed=base_seed,
            sample_id=sample_id,
            noise=noise,
        )

    def _check_extent(self, request: prior_pb2.SampleRequest, given: int, first_open: int) -> None:
        B, blocks = self._engine.shape.block_size, request.max_blocks
        context = first_open // B
        if blocks < 1:
            raise InvalidRequest("max_blocks", "got 0, expected 1 or more")
        limit = self._engine.limits.max_context
        if (context + blocks) * B > limit:
            raise InvalidRequest(
                "max_blocks",
                f"{context} blocks of context and {blocks} to write are {(context + blocks) * B} latents, "
                f"more than max_context, {limit}",
            )
        if given > (context + blocks) * B:
            raise InvalidRequest(
                "max_blocks",
                f"{given} latents are given, but {context} blocks of context and {blocks} to write "
                f"hold {(context + blocks) * B}",
            )
        if request.first_block > context:
            raise InvalidRequest(
                "first_block", f"got {request.first_block}, but the canvas begins with {context} known blocks"
            )

    def _noise(self, request: prior_pb2.SampleRequest, sampler: SamplerSettings) -> tuple[Any, int | None, int]:
        """(explicit noise or None, base seed or None, sample id)."""
        source, shape = request.WhichOneof("noise_source"), self._engine.shape
        if source == "seed":
            check_seed(request.seed, request.first_block + request.max_blocks)
            return None, request.seed.base_seed, request.seed.sample_id
        if source is None:
            raise InvalidRequest("noise_source", "set `seed` or `noise`")
        if sampler.resamples > 1:
            raise InvalidRequest("sampler.resamples", f"got {sampler.resamples} with explicit noise, which allows 1")
        wanted = (request.max_blocks, shape.block_size, shape.latent_dim)
        return tensors.from_message(request.noise, "noise", wanted), None, 0


def open_spans(spans: Iterable[types_pb2.Span], positions: int) -> tuple[tuple[int, int], ...]:
    """Spans as pairs; InvalidRequest unless they ascend, are disjoint, not empty and inside of 0..positions."""
    found: list[tuple[int, int]] = []
    for i, span in enumerate(spans):
        least = found[-1][1] if found else 0
        if not least <= span.start < span.end <= positions:
            raise InvalidRequest(
                f"canvas.open[{i}]",
                f"got [{span.start}, {span.end}), expected start < end within {least} to {positions}",
            )
        found.append((span.start, span.end))
    return tuple(found)


def sampler_settings(message: types_pb2.Sampler) -> SamplerSettings:
    """The settings of a request, unset fields by the contract's brackets; InvalidRequest names the field."""
    solver = SOLVERS.get(message.solver)
    if solver is None:
        known = ", ".join(types_pb2.Solver.Name(value) for value in SOLVERS)
        raise InvalidRequest("sampler.solver", f"got {message.solver}, expected one of {known}")
    names = ("steps", "guidance_scale", "guidance_start", "guidance_end", "resamples")
    return SamplerSettings(solver=solver, **about.set_fields(message, names))


def check_seed(seed: types_pb2.NoiseSeed, end_block: int) -> None:
    """InvalidRequest unless every block before `end_block` has a seed below 2^63."""
    if seed.sample_id >= SAMPLE_IDS:
        raise InvalidRequest("seed.sample_id", f"got {seed.sample_id}, expected 0 to {SAMPLE_IDS - 1}")
    highest = seed.base_seed + 1_000 * seed.sample_id + 10_000_000 * (end_block - 1)
    if highest >= SEEDS:
        raise InvalidRequest(
            "seed.base_seed", f"got {seed.base_seed}; with sample and blocks added it exceeds 2^63 - 1"
        )
