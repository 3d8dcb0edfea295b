# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which the server sees too
"""The asyncio clients of the three stages, for those who call them directly."""

from collections.abc import Sequence
from typing import Unpack

from numpy.typing import ArrayLike

from colaserve.v1 import decoder_pb2, encoder_pb2, prior_pb2, types_pb2
from colaserve_client import responses
from colaserve_client.base import AsyncBaseClient
from colaserve_client.errors import invalid
from colaserve_client.latents import Latents, LatentsLike
from colaserve_client.requests import build, merged
from colaserve_client.results import DecodedBlock, LatentBlock, SequenceEncoding, ServiceInfo
from colaserve_client.settings import NoiseSeed, Sampler, SamplerFields, Sampling, SamplingFields
from colaserve_client.transport import AsyncExchange, AsyncStream


class AsyncEncoderClient(AsyncBaseClient):
    """A connection to an encoder: token ids to latents.

    >>> async with AsyncEncoderClient(target) as encoder:
    ...     [encoding] = await encoder.encode([[102, 111, 120]])
    >>> encoding.latents
    Latents([[102.,   0.],
             [111.,   0.],
             [120.,   0.]], n=3, d=2, space='0123456789abcdef')
    """

    async def encode(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        with_variance: bool = False,
        timeout: float | None = None,
        request_id: str = "",
    ) -> list[SequenceEncoding]:
        """Encode 1 to 256 sequences of token ids, none empty; each result is independent of the others."""
        request = build(encoder_pb2.EncodeRequest, sequences=sequences, with_variance=with_variance or None)
        return await self._transport.unary(
            request, responses.several(SequenceEncoding, "encodings"), timeout, request_id
        )

    async def info(self, *, timeout: float | None = None, request_id: str = "") -> ServiceInfo:
        """The model, its limits and its load."""
        request = encoder_pb2.EncoderServiceGetInfoRequest()
        return await self._transport.unary(request, responses.one(ServiceInfo), timeout, request_id)


class AsyncPriorClient(AsyncBaseClient):
    """A connection to a prior: noise to latents, block by block.

    >>> async with AsyncPriorClient(target) as prior:
    ...     async with prior.sample(max_blocks=2, seed=7) as blocks:
    ...         print([block.index async for block in blocks])
    [0, 1]
    """

    def sample(
        self,
        latents: LatentsLike | None = None,
        *,
        max_blocks: int,
        open_spans: Sequence[tuple[int, int]] = (),
        first_block: int = 0,
        sampler: Sampler | None = None,
        seed: int | NoiseSeed | None = None,
        noise: ArrayLike | None = None,
        timeout: float | None = None,
        request_id: str = "",
        **settings: Unpack[SamplerFields],
    ) -> AsyncStream[LatentBlock]:
        """Write the blocks of a canvas and yield them; leaving early cancels and frees.

        Args:
            latents: what is known, from position 0 on; None: nothing.
            max_blocks: blocks to write, at least 1.
            open_spans: positions within the latents, [start, end), that are to be written too; ascending, disjoint.
            first_block: k when a run is resumed after k written blocks, which are then part of the latents.
            sampler: unset fields are steps 16, guidance_scale 7, solver euler, guidance from 1 to 0, resamples 1.
            seed: of the noise; or
            noise: the noise itself, (max_blocks, B, d). Exactly one of both.
        """
        if (seed is None) == (noise is None):
            raise invalid("noise_source", f"expected either seed or noise, got {'none' if seed is None else 'both'}")
        request = build(
            prior_pb2.SampleRequest,
            canvas=_canvas(latents, open_spans),
            max_blocks=max_blocks,
            first_block=first_block or None,
            seed=seed,
            noise=noise,
            **merged(settings, sampler=sampler),
        )
        return self._transport.stream(request, responses.latent_block, timeout, request_id)

    async def info(self, *, timeout: float | None = None, request_id: str = "") -> ServiceInfo:
        """The model, its limits and its load."""
        request = prior_pb2.PriorServiceGetInfoRequest()
        return await self._transport.unary(request, responses.one(ServiceInfo), timeout, request_id)


class AsyncDecoderClient(AsyncBaseClient):
    """A connection to a decoder: latent blocks to token ids.

    >>> async with AsyncEncoderClient(target) as encoder:
    ...     [encoding] = await encoder.encode([[102, 111, 120, 46]])
    >>> async with AsyncDecoderClient(target) as decoder:
    ...     async with decoder.session() as session:
    ...         block = await session.decode(encoding.latents)
    >>> block.token_ids
    (102, 111, 120, 46)
    """

    def session(
        self,
        prefix: LatentsLike | None = None,
        *,
        sampling: Sampling | None = None,
        history_ids: Sequence[int] = (),
        with_logits: bool = False,
        top_logprobs: int = 0,
        target_ids: Sequence[int] = (),
        max_latents: int = 0,
        timeout: float | None = None,
        request_id: str = "",
        **settings: Unpack[SamplingFields],
    ) -> "AsyncDecodeSession":
        """Open a session: a context manager that decodes block after block and frees its cache at the end.

        Args:
            prefix: latents before the first block, a multiple of B positions; None: none.
            sampling: unset fields are temperature 0, top_k 50, top_p 0.9, repetition_penalty 1.1, seed 0.
            history_ids: all ids sampled so far in this run, untrimmed.
            with_logits: also return the raw logits.
            top_logprobs: also return so many likely tokens a position, 0 to 20.
            target_ids: ids whose log-probability is wanted, for the positions of the session in order.
            max_latents: positions, prefix included, to reserve the cache for; 0: as many as the server allows.
            timeout: seconds for the whole session.
        """
        opening = build(
            decoder_pb2.OpenDecode,
            prefix=prefix,
            history_ids=history_ids,
            with_logits=with_logits or None,
            top_logprobs=top_logprobs or None,
            target_ids=target_ids,
            max_latents=max_latents or None,
            **merged(settings, sampling=sampling),
        )
        request = decoder_pb2.DecodeRequest(open=opening)
        return self._transport.exchange(AsyncDecodeSession, request, responses.decoded_block, timeout, request_id)

    async def info(self, *, timeout: float | None = None, request_id: str = "") -> ServiceInfo:
        """The model, its limits and its load."""
        request = decoder_pb2.DecoderServiceGetInfoRequest()
        return await self._transport.unary(request, responses.one(ServiceInfo), timeout, request_id)


class AsyncDecodeSession(AsyncExchange[decoder_pb2.DecodeRequest, DecodedBlock]):
    """An open session of a decoder; `AsyncDecoderClient.session` makes it."""

    async def decode(self, block: LatentsLike) -> DecodedBlock:
        """Decode the next block, (B, d)."""
        return await self._ask(decoder_pb2.DecodeRequest(block=Latents.of(block, "block").to_proto()))


def _canvas(latents: LatentsLike | None, open_spans: Sequence[tuple[int, int]]) -> types_pb2.Canvas:
    spans = [build(types_pb2.Span, f"canvas.open[{i}].", start=s, end=e) for i, (s, e) in enumerate(open_spans)]
    return build(types_pb2.Canvas, latents=latents, open=spans)
