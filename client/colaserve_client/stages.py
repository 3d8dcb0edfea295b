"""The asyncio clients of the three stages, for those who call them directly."""

from collections.abc import Sequence
from typing import Unpack

from colaserve.v1 import decoder_pb2, encoder_pb2, prior_pb2, types_pb2
from colaserve_client.about import ServiceInfo
from colaserve_client.base import AsyncBaseClient
from colaserve_client.calls import AsyncDecodeSession, AsyncStream
from colaserve_client.errors import invalid
from colaserve_client.latents import Latents, LatentsLike
from colaserve_client.messages import build, one, request, several
from colaserve_client.results import DecodedBlock, Density, LatentBlock, SequenceEncoding
from colaserve_client.settings import CallFields, CanvasFields, DensityFields, SessionFields


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
        cache_salt: str = "",
        **call: Unpack[CallFields],
    ) -> list[SequenceEncoding]:
        """Encode 1 to 256 sequences of token ids, none empty; each result is independent of the others. `cache_salt`
        here and below as in `Client.generate`."""
        kind = encoder_pb2.EncodeRequest
        message = request(kind, call, sequences=sequences, with_variance=with_variance, cache_salt=cache_salt)
        return await self._unary(message, several(SequenceEncoding, "encodings"), call)

    async def info(self, **call: Unpack[CallFields]) -> ServiceInfo:
        """The model, its limits and its load."""
        return await self._unary(request(encoder_pb2.EncoderServiceGetInfoRequest, call), one(ServiceInfo), call)


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
        **settings: Unpack[CanvasFields],
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
            preview_every: also yield the block under way, `provisional`, after every so many steps.
            with_probes: also return the prior's probes of each block.
        """
        seed = settings.get("seed")
        if (seed is None) == (settings.get("noise") is None):
            raise invalid("noise_source", f"expected either seed or noise, got {'none' if seed is None else 'both'}")
        canvas = _canvas(latents, open_spans)
        message = request(prior_pb2.SampleRequest, settings, canvas=canvas, max_blocks=max_blocks)
        return self._stream(message, one(LatentBlock), settings)

    async def score(
        self,
        latents: LatentsLike,
        *,
        open_spans: Sequence[tuple[int, int]] | None = None,
        **settings: Unpack[DensityFields],
    ) -> Density:
        """The log density of latents, whole blocks of them, by the probability-flow ODE: see docs/likelihood.md.

        Args:
            latents: (blocks * B, d).
            open_spans: positions [start, end), ascending, disjoint, whose density is wanted; None: all. Leading blocks
                without one are context, other positions are given.
            probes, steps, solver: as for `Client.score`; 8, 32 and "heun" unless set.
            seed: of the probes, 0 unless set.

        Raises `ModelMismatch` unless the prior computes in float32.
        """
        known = Latents.of(latents)
        canvas = _canvas(known, [(0, len(known))] if open_spans is None else open_spans)
        message = request(prior_pb2.PriorServiceScoreRequest, settings, canvas=canvas)
        return await self._unary(message, one(Density), settings)

    async def info(self, **call: Unpack[CallFields]) -> ServiceInfo:
        """The model, its limits and its load."""
        return await self._unary(request(prior_pb2.PriorServiceGetInfoRequest, call), one(ServiceInfo), call)


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

    def session(self, prefix: LatentsLike | None = None, **settings: Unpack[SessionFields]) -> AsyncDecodeSession:
        """Open a session: a context manager that decodes block after block and frees its cache at the end.

        Args:
            prefix: latents before the first block, a multiple of B positions; None: none.
            sampling: unset fields are temperature 0, top_k 50, top_p 0.9, repetition_penalty 1.1, seed 0.
            history_ids: all ids sampled so far in this run, untrimmed.
            with_logits: also return the raw logits.
            top_logprobs: also return so many likely tokens a position, 0 to 20.
            target_ids: ids whose log-probability is wanted, for the positions of the session in order.
            logprob_ids, all_logprobs, logprobs_dtype: as for `Client.logprobs`.
            max_latents: positions, prefix included, to reserve the cache for; 0: as many as the server allows.
            with_probes: also return the decoder's probes.
            timeout: seconds for the whole session.
        """
        message = decoder_pb2.DecodeRequest(open=request(decoder_pb2.OpenDecode, settings, prefix=prefix))
        return self._begun(AsyncDecodeSession, "stream_stream", message, one(DecodedBlock), settings)

    async def info(self, **call: Unpack[CallFields]) -> ServiceInfo:
        """The model, its limits and its load."""
        return await self._unary(request(decoder_pb2.DecoderServiceGetInfoRequest, call), one(ServiceInfo), call)


def _canvas(latents: LatentsLike | None, open_spans: Sequence[tuple[int, int]]) -> types_pb2.Canvas:
    spans = [build(types_pb2.Span, {"start": s, "end": e}, f"canvas.open[{i}].") for i, (s, e) in enumerate(open_spans)]
    return build(types_pb2.Canvas, {"latents": latents, "open": spans})
