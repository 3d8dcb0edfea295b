"""EncoderService: token ids to latents. Translates and delegates to the engine, which checks what it is asked for."""

from typing import Any

from colaserve.v1 import encoder_pb2, encoder_pb2_grpc
from colaserve_services.encoder.engine import Encoded, EncoderEngine
from colaserve_services.rpc import about, arrays


class EncoderService(encoder_pb2_grpc.EncoderServiceServicer):
    """Serves one engine."""

    def __init__(self, engine: EncoderEngine, identity: about.Identity):
        self._engine, self._identity = engine, identity

    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Any) -> encoder_pb2.EncodeResponse:
        """Encode 1 to 256 sequences."""
        encoded, timings = await self._engine.encode(
            [sequence.ids for sequence in request.sequences],
            with_variance=request.with_variance,
            cache_salt=request.cache_salt,
            deadline=about.deadline(context),
        )
        encodings = [self._message(one) for one in encoded]
        return encoder_pb2.EncodeResponse(encodings=encodings, timing=about.timing(timings))

    async def GetInfo(
        self, request: encoder_pb2.EncoderServiceGetInfoRequest, context: Any
    ) -> encoder_pb2.EncoderServiceGetInfoResponse:
        """Describe the model, its limits and its load."""
        fields = about.info(self._engine, self._identity)
        return encoder_pb2.EncoderServiceGetInfoResponse(
            has_variance=self._engine.has_variance, scaling_factor=self._engine.scaling_factor, **fields
        )

    def _message(self, encoded: Encoded) -> encoder_pb2.Encoding:
        variance = encoded.log_variance
        return encoder_pb2.Encoding(
            latents=arrays.latents_to_message(encoded.latents.numpy(), self._identity.space),
            log_variance=None if variance is None else arrays.to_message(variance.float().numpy()),
        )
