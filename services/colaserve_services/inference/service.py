"""GRPCInferenceService over gRPC: translate and delegate."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from colaserve_services import __version__
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.coordinator import Coordinator
from colaserve_services.coordinator.read_ahead import ReadAhead
from colaserve_services.coordinator.service import Servicer
from colaserve_services.errors import InvalidRequest, Unavailable
from colaserve_services.inference import open_inference_pb2 as pb
from colaserve_services.inference.models import Inference, Part, answers, model_of
from colaserve_services.inference.open_inference_pb2_grpc import GRPCInferenceServiceServicer


class InferenceServicer(Servicer, GRPCInferenceServiceServicer):
    """The Open Inference Protocol. `ready`: whether calls should come to this process."""

    def __init__(self, coordinator: Coordinator, ready: Callable[[], bool], **more: Any):
        super().__init__(coordinator, **more)
        self._ready = ready

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        """It answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        """Whether calls should come here."""
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        """False for one that does not exist."""
        try:
            model_of(request.name, request.version)
        except InvalidRequest:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ready())

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        """Name and version."""
        return pb.ServerMetadataResponse(name="colaserve", version=__version__)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        """What a model takes and returns."""
        model, coordinator = model_of(request.name, request.version, "name"), await self.connected()
        platform = f"colaserve_{coordinator.model_name}"
        return model.metadata(request.name, platform, coordinator.services.model.latent_dim)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        """One answer."""
        inference = Inference(request)
        if inference.streaming:
            raise InvalidRequest("streaming", "got true, which only ModelStreamInfer takes")
        services = (await self.connected()).services
        async with aclosing(inference.parts(services, Call.of(context))) as parts:
            return inference.answer([part async for part in parts], services.model.latent_dim)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """The answers to one request after the other."""
        coordinator = await self.connected()
        while (request := await _next(requests, coordinator.services.limits.idle_seconds)) is not None:
            inference, services, call = Inference(request), coordinator.services, Call.of(context)
            parts: AsyncGenerator[Part, None] = inference.parts(services, call)
            async with ReadAhead(parts, partial(services.admission.read_in_time, call)) as ahead:
                async for response in answers(inference, aiter(ahead), services.model.latent_dim):
                    yield pb.ModelStreamInferResponse(infer_response=response)


async def _next(requests: AsyncIterator[pb.ModelInferRequest], seconds: float) -> pb.ModelInferRequest | None:
    """The next request, None after the last; Unavailable when the caller is idle for so long."""
    try:
        async with asyncio.timeout(seconds):
            return await anext(requests, None)
    except TimeoutError as error:
        raise Unavailable(f"no request came for {seconds:g} s; open another stream") from error
