"""EncoderService: token ids to latents. Translates and delegates to the engine."""

from __future__ import annotations

from typing import Any

from colaserve.v1 import encoder_pb2, encoder_pb2_grpc

from colaserve_services.encoder.engine import Encoded, EncoderEngine
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc import about, tensors
from colaserve_services.rpc.errors import status_from_errors

MAX_SEQUENCES = 256


class EncoderService(encoder_pb2_grpc.EncoderServiceServicer):
    """Serves one engine."""

    def __init__(self, engine: EncoderEngine, identity: about.Identity):
        self._engine, self._identity = engine, identity

    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Any) -> encoder_pb2.EncodeResponse:
        """Encode 1 to 256 sequences."""
        async with status_from_errors(context):
            sequences = self._sequences(request)
            if request.with_variance and not self._engine.has_variance:
                raise InvalidRequest("with_variance", "this checkpoint's encoder has no variance (use_variation false)")
            encoded, timings = await self._engine.encode(
                sequences, with_variance=request.with_variance, deadline=about.deadline(context)
            )
            encodings = [self._message(one) for one in encoded]
            return encoder_pb2.EncodeResponse(encodings=encodings, timing=about.timing(timings))

    async def GetInfo(
        self, request: encoder_pb2.EncoderServiceGetInfoRequest, context: Any
    ) -> encoder_pb2.EncoderServiceGetInfoResponse:
        """Describe the model, its limits and its load."""
        fields = about.info(self._engine, self._identity)
        return encoder_pb2.EncoderServiceGetInfoResponse(has_variance=self._engine.has_variance, **fields)

    def _sequences(self, request: encoder_pb2.EncodeRequest) -> list[tuple[int, ...]]:
        if not 1 <= len(request.sequences) <= MAX_SEQUENCES:
            raise InvalidRequest("sequences", f"got {len(request.sequences)}, expected 1 to {MAX_SEQUENCES}")
        return [self._ids(sequence.ids, f"sequences[{i}].ids") for i, sequence in enumerate(request.sequences)]

    def _ids(self, ids: Any, field: str) -> tuple[int, ...]:
        shape, limits = self._engine.shape, self._engine.limits
        longest = limits.max_context * shape.patch_size
        if not 1 <= len(ids) <= longest:
            raise InvalidRequest(field, f"got {len(ids)} tokens, expected 1 to {longest} (max_context)")
        return about.token_ids(ids, field, shape.vocab_size)

    def _message(self, encoded: Encoded) -> encoder_pb2.Encoding:
        variance = encoded.log_variance
        return encoder_pb2.Encoding(
            latents=tensors.latents_to_message(encoded.latents, self._identity.space),
            log_variance=None if variance is None else tensors.to_message(variance),
        )
