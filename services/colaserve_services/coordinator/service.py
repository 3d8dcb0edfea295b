"""GenerationService and LatentService over gRPC: translate and delegate. Errors become statuses in rpc/errors.py."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final

from colaserve.v1 import generation_pb2, generation_pb2_grpc, latent_service_pb2, latent_service_pb2_grpc
from colaserve_services.coordinator import embedding, fork, generation, infill, interpolation, latent_space, scoring
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext
from colaserve_services.coordinator.coordinator import Coordinator
from colaserve_services.coordinator.read_ahead import ReadAhead
from colaserve_services.offload import offload

CONNECTED_SECONDS: Final = 3.0  # that a call waits for a coordinator which has just started, and is refused after


class Servicer:
    """What delegates to a coordinator."""

    def __init__(self, coordinator: Coordinator, connected_seconds: float = CONNECTED_SECONDS):
        self._coordinator, self._connected_seconds = coordinator, connected_seconds

    async def connected(self) -> Coordinator:
        """The coordinator, once it is connected; after a while even if it is not."""
        await self._coordinator.connected(self._connected_seconds)
        return self._coordinator


def _unary(work: Callable[[ServiceContext, Any, Call], Awaitable[Any]]) -> Any:
    async def serve(self: Servicer, request: Any, context: Any) -> Any:
        return await work((await self.connected()).services, request, Call.of(context))

    return serve


def _streaming(
    work: Callable[[ServiceContext, Any, Call], AsyncGenerator[list[Any], None]],
    are_previews: Callable[[list[Any]], bool] = generation.are_previews,
) -> Any:
    """The call's end, however it comes, frees what it holds in the stages; so does a reader who stays away. A slow one
    misses previews."""

    async def serve(self: Servicer, request: Any, context: Any) -> AsyncIterator[Any]:
        services, call = (await self.connected()).services, Call.of(context)
        responses = work(services, request, call)
        async with ReadAhead(responses, partial(services.admission.read_in_time, call), are_previews) as ahead:
            async for together in ahead:
                for response in together:
                    yield response

    return serve


async def tokenize(
    services: ServiceContext, request: generation_pb2.TokenizeRequest, call: Call
) -> generation_pb2.TokenizeResponse:
    """Text to ids."""
    async with services.admission.slot(call, brief=True):
        ids = await services.tokenize(request.text, "text")
        tokens = await offload(services.tokenizer.token_texts, ids)
    return generation_pb2.TokenizeResponse(token_ids=ids, tokens=tokens)


async def detokenize(
    services: ServiceContext, request: generation_pb2.DetokenizeRequest, call: Call
) -> generation_pb2.DetokenizeResponse:
    """Ids to text."""
    async with services.admission.slot(call, brief=True):
        ids = services.checked(request.token_ids, "token_ids")
        tokens = await offload(services.tokenizer.token_texts, ids)
        text = await offload(services.tokenizer.decode, ids)
    return generation_pb2.DetokenizeResponse(text=text, tokens=tokens)


class GenerationServicer(Servicer, generation_pb2_grpc.GenerationServiceServicer):
    """Text in, text out."""

    Generate = _streaming(generation.generate)
    Tokenize = _unary(tokenize)
    Detokenize = _unary(detokenize)

    async def GetInfo(
        self, request: generation_pb2.GenerationServiceGetInfoRequest, context: Any
    ) -> generation_pb2.GenerationServiceGetInfoResponse:
        """The model, its defaults, its limits, the stages and the load."""
        return await (await self.connected()).generation_info()


class LatentServicer(Servicer, latent_service_pb2_grpc.LatentServiceServicer):
    """The latent space for programs."""

    EncodeText = _unary(latent_space.encode_text)
    DecodeLatents = _unary(latent_space.decode_latents)
    SampleLatents = _streaming(latent_space.sample_latents, lambda together: together[0].provisional)
    Interpolate = _unary(interpolation.interpolate)
    Infill = _unary(infill.infill)
    Reconstruct = _unary(latent_space.reconstruct)
    Logprobs = _unary(latent_space.logprobs)
    Fork = _streaming(fork.fork)
    Embed = _unary(embedding.embed)
    Score = _unary(scoring.score)

    async def GetInfo(
        self, request: latent_service_pb2.LatentServiceGetInfoRequest, context: Any
    ) -> latent_service_pb2.LatentServiceGetInfoResponse:
        """The space and its limits."""
        return await (await self.connected()).latent_info()
