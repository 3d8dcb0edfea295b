"""GenerationService and LatentService over gRPC: translate and delegate. Errors become statuses in rpc/errors.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from colaserve.v1 import generation_pb2, generation_pb2_grpc, latent_service_pb2, latent_service_pb2_grpc
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.coordinator import Coordinator

CONNECTED_SECONDS: Final = 3.0  # that a call waits for a coordinator which has just started, and is refused after


class _OfCoordinator:
    """What delegates to a coordinator."""

    def __init__(self, coordinator: Coordinator):
        self._coordinator = coordinator

    async def _connected(self) -> Coordinator:
        await self._coordinator.connected(CONNECTED_SECONDS)
        return self._coordinator


class GenerationServicer(_OfCoordinator, generation_pb2_grpc.GenerationServiceServicer):
    """Text in, text out."""

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """A response a block; the call's end, however it comes, frees what it holds in the stages."""
        coordinator = await self._connected()
        async with aclosing(coordinator.generate(request, call_of(context))) as responses:
            async for response in responses:
                yield response

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Any) -> generation_pb2.TokenizeResponse:
        """Text to ids."""
        return await (await self._connected()).tokenize(request, call_of(context))

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Any
    ) -> generation_pb2.DetokenizeResponse:
        """Ids to text."""
        return await (await self._connected()).detokenize(request, call_of(context))

    async def GetInfo(
        self, request: generation_pb2.GenerationServiceGetInfoRequest, context: Any
    ) -> generation_pb2.GenerationServiceGetInfoResponse:
        """The model, its defaults, its limits, the stages and the load."""
        return await (await self._connected()).generation_info()


class LatentServicer(_OfCoordinator, latent_service_pb2_grpc.LatentServiceServicer):
    """The latent space for programs."""

    async def EncodeText(
        self, request: latent_service_pb2.EncodeTextRequest, context: Any
    ) -> latent_service_pb2.EncodeTextResponse:
        """Texts to latents."""
        return await (await self._connected()).encode_text(request, call_of(context))

    async def DecodeLatents(
        self, request: latent_service_pb2.DecodeLatentsRequest, context: Any
    ) -> latent_service_pb2.DecodeLatentsResponse:
        """Latents to text."""
        return await (await self._connected()).decode_latents(request, call_of(context))

    async def SampleLatents(
        self, request: latent_service_pb2.SampleLatentsRequest, context: Any
    ) -> AsyncIterator[latent_service_pb2.SampleLatentsResponse]:
        """Latents continued, a response a block."""
        coordinator = await self._connected()
        async with aclosing(coordinator.sample_latents(request, call_of(context))) as responses:
            async for response in responses:
                yield response

    async def Interpolate(
        self, request: latent_service_pb2.InterpolateRequest, context: Any
    ) -> latent_service_pb2.InterpolateResponse:
        """The points between two texts or latents."""
        return await (await self._connected()).interpolate(request, call_of(context))

    async def Infill(
        self, request: latent_service_pb2.InfillRequest, context: Any
    ) -> latent_service_pb2.InfillResponse:
        """A text's holes written."""
        return await (await self._connected()).infill(request, call_of(context))

    async def Reconstruct(
        self, request: latent_service_pb2.ReconstructRequest, context: Any
    ) -> latent_service_pb2.ReconstructResponse:
        """Texts there and back."""
        return await (await self._connected()).reconstruct(request, call_of(context))

    async def GetInfo(
        self, request: latent_service_pb2.LatentServiceGetInfoRequest, context: Any
    ) -> latent_service_pb2.LatentServiceGetInfoResponse:
        """The space and its limits."""
        return await (await self._connected()).latent_info()


def call_of(context: Any) -> Call:
    """The deadline and the caller of a gRPC call."""
    return Call.of(context.time_remaining(), context.invocation_metadata(), str(context.peer()))
