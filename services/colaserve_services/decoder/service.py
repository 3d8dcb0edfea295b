"""DecoderService: latent blocks to token ids. Translates and delegates to the engine, which checks the job."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from colaserve.v1 import decoder_pb2, decoder_pb2_grpc, types_pb2
from colaserve_services.bounds import SAMPLING, given
from colaserve_services.decoder.engine import DecodedBlock, DecodeJob, DecoderEngine
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.sampling import SamplingSettings
from colaserve_services.rpc import about, arrays, cancellation

_MOST_PREVIEWS = 16  # of a block, in one request


class DecoderService(decoder_pb2_grpc.DecoderServiceServicer):
    """Serves one engine."""

    def __init__(self, engine: DecoderEngine, identity: about.Identity, defaults: SamplingSettings | None = None):
        """`defaults` stand for what a request leaves unset; None: those of the contract's brackets."""
        self._engine, self._identity, self._defaults = engine, identity, defaults or SamplingSettings()

    async def Decode(
        self, requests: AsyncIterator[decoder_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[decoder_pb2.DecodeResponse]:
        """Decode one run; leaving the session, however that happens, frees its KV."""
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("request") != "open":
            raise InvalidRequest("request", "the first request of a Decode stream must set `open`")
        job = self._job(first.open)
        async with self._engine.session(job, deadline=about.deadline(context)) as session:
            session.end_call = cancellation.end_call
            async for request in requests:
                kind = request.WhichOneof("request")
                if kind not in ("block", "preview"):
                    what = "every later request must set `block` or `preview`"
                    raise InvalidRequest("request", f"a Decode stream is opened once; {what}")
                message, size = getattr(request, kind), self._engine.shape.block_size
                most = _MOST_PREVIEWS if kind == "preview" else 1
                latents = self._latents(message, kind, size * min(max(1, sum(message.values.shape[:1]) // size), most))
                for each in [await session.decode(latents)] if kind == "block" else await session.preview(latents):
                    yield _message(each)

    async def GetInfo(
        self, request: decoder_pb2.DecoderServiceGetInfoRequest, context: Any
    ) -> decoder_pb2.DecoderServiceGetInfoResponse:
        """Describe the model, its limits and its load."""
        return decoder_pb2.DecoderServiceGetInfoResponse(**about.info(self._engine, self._identity))

    def _job(self, message: decoder_pb2.OpenDecode) -> DecodeJob:
        return DecodeJob(
            prefix=self._latents(message.prefix, "open.prefix"),
            sampling=replace(self._defaults, **given(message.sampling, SAMPLING, "sampling.")),
            history_ids=message.history_ids,
            with_logits=message.with_logits,
            top_logprobs=message.top_logprobs,
            target_ids=message.target_ids,
            max_latents=message.max_latents,
            cache_salt=message.cache_salt,
            with_probes=message.with_probes,
            logprob_ids=message.logprob_ids,
            all_logprobs=message.all_logprobs,
            logprobs_dtype=getattr(torch, arrays.logprobs_element(message.logprobs_dtype, "open.logprobs_dtype").name),
        )

    def _latents(self, message: types_pb2.Latents, field: str, positions: int | None = None) -> Tensor:
        dim, space = self._engine.shape.latent_dim, self._identity.space
        return torch.from_numpy(arrays.latents_from_message(message, field, dim, space, positions))


def _message(block: DecodedBlock) -> decoder_pb2.DecodeResponse:
    looked_up = block.position_logprobs
    return decoder_pb2.DecodeResponse(
        block_index=block.index,
        token_ids=block.token_ids,
        logprobs=block.logprobs,
        top_logprobs=[types_pb2.TopLogprobs(token_ids=ids, logprobs=values) for ids, values in block.top],
        logits=None if block.logits is None else arrays.to_message(block.logits.float().numpy()),
        target_logprobs=block.target_logprobs,
        provisional=block.provisional,
        probes=None if block.probes is None else types_pb2.Probes(**block.probes._asdict()),
        position_logprobs=None if looked_up is None else arrays.to_message(looked_up.numpy()),
        timing=about.timing(block.timings),
    )
