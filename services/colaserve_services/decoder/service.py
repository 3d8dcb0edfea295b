"""DecoderService: latent blocks to token ids. Translates and delegates to the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from colaserve.v1 import decoder_pb2, decoder_pb2_grpc, types_pb2
from torch import Tensor

from colaserve_services.decoder.engine import DecodedBlock, DecodeJob, DecoderEngine
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.sampling import SamplingSettings
from colaserve_services.rpc import about, tensors
from colaserve_services.rpc.errors import status_from_errors

MOST_LOGPROBS = 20


class DecoderService(decoder_pb2_grpc.DecoderServiceServicer):
    """Serves one engine."""

    def __init__(self, engine: DecoderEngine, identity: about.Identity):
        self._engine, self._identity = engine, identity

    async def Decode(
        self, requests: AsyncIterator[decoder_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[decoder_pb2.DecodeResponse]:
        """Decode one run; leaving the session, however that happens, frees its KV."""
        async with status_from_errors(context):
            first = await anext(aiter(requests), None)
            if first is None or first.WhichOneof("request") != "open":
                raise InvalidRequest("request", "the first request of a Decode stream must set `open`")
            job = self._job(first.open)
            room = self._room(first.open, len(job.prefix))
            async with self._engine.session(job, deadline=about.deadline(context)) as session:
                async for request in requests:
                    latents = self._block(request, room)
                    room -= len(latents)
                    yield self._message(await session.decode(latents), job)

    async def GetInfo(
        self, request: decoder_pb2.DecoderServiceGetInfoRequest, context: Any
    ) -> decoder_pb2.DecoderServiceGetInfoResponse:
        """Describe the model, its limits and its load."""
        return decoder_pb2.DecoderServiceGetInfoResponse(**about.info(self._engine, self._identity))

    def _job(self, message: decoder_pb2.OpenDecode) -> DecodeJob:
        shape = self._engine.shape
        prefix = tensors.latents_from_message(message.prefix, "open.prefix", shape.latent_dim, self._identity.space)
        if len(prefix) % shape.block_size:
            raise InvalidRequest("open.prefix", f"got {len(prefix)} latents, expected a multiple of {shape.block_size}")
        if message.top_logprobs > MOST_LOGPROBS:
            raise InvalidRequest("open.top_logprobs", f"got {message.top_logprobs}, expected 0 to {MOST_LOGPROBS}")
        return DecodeJob(
            prefix=prefix,
            sampling=sampling_settings(message.sampling),
            history_ids=self._history(message),
            with_logits=message.with_logits,
            top_logprobs=message.top_logprobs,
            target_ids=self._targets(message, self._room(message, len(prefix))),
            max_latents=message.max_latents,
        )

    def _history(self, message: decoder_pb2.OpenDecode) -> tuple[int, ...]:
        shape, limits = self._engine.shape, self._engine.limits
        ids, unit = message.history_ids, shape.block_size * shape.patch_size
        if len(ids) % unit:
            raise InvalidRequest("open.history_ids", f"got {len(ids)} ids, expected a multiple of {unit}")
        if len(ids) > limits.max_context * shape.patch_size:
            raise InvalidRequest("open.history_ids", f"got {len(ids)} ids, more than max_context holds")
        return about.token_ids(ids, "open.history_ids", shape.vocab_size)

    def _room(self, message: decoder_pb2.OpenDecode, prefix: int) -> int:
        """Latents that may still come."""
        B, longest = self._engine.shape.block_size, self._engine.limits.max_context
        reserved = message.max_latents or longest // B * B
        if reserved % B or reserved > longest:
            raise InvalidRequest(
                "open.max_latents", f"got {reserved}, expected a multiple of {B}, at most max_context, {longest}"
            )
        if prefix > reserved:
            raise InvalidRequest("open.prefix", f"got {prefix} latents, more than the {reserved} that are reserved")
        return reserved - prefix

    def _targets(self, message: decoder_pb2.OpenDecode, room: int) -> tuple[int, ...]:
        shape = self._engine.shape
        if len(message.target_ids) > room * shape.patch_size:
            raise InvalidRequest(
                "open.target_ids",
                f"got {len(message.target_ids)} ids, this stream has {room * shape.patch_size} positions",
            )
        return about.token_ids(message.target_ids, "open.target_ids", shape.vocab_size)

    def _block(self, request: decoder_pb2.DecodeRequest, room: int) -> Tensor:
        shape = self._engine.shape
        if request.WhichOneof("request") != "block":
            raise InvalidRequest("request", "a Decode stream is opened once; every later request must set `block`")
        if room < shape.block_size:
            raise InvalidRequest("block", "one more than the stream has reserved, see open.max_latents")
        return tensors.latents_from_message(
            request.block, "block", shape.latent_dim, self._identity.space, shape.block_size
        )

    def _message(self, block: DecodedBlock, job: DecodeJob) -> decoder_pb2.DecodeResponse:
        return decoder_pb2.DecodeResponse(
            token_ids=block.token_ids,
            logprobs=block.logprobs,
            top_logprobs=[types_pb2.TopLogprobs(token_ids=ids, logprobs=values) for ids, values in block.top],
            logits=None if block.logits is None else tensors.to_message(block.logits),
            target_logprobs=block.target_logprobs,
            timing=about.timing(block.timings),
        )


def sampling_settings(message: types_pb2.Sampling) -> SamplingSettings:
    """The settings of a request, unset fields by the contract's brackets; InvalidRequest names the field."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return SamplingSettings(**about.set_fields(message, names))
