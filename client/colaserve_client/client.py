# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which the server sees too
"""The asyncio client of a coordinator: text and latents in, text and latents out."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import closing
from dataclasses import fields
from functools import partial
from operator import attrgetter
from typing import Unpack

from colaserve.v1 import generation_pb2, latent_service_pb2
from colaserve_client import requests, responses
from colaserve_client.base import AsyncBaseClient
from colaserve_client.errors import ColaserveError, invalid
from colaserve_client.latents import Latents, LatentsLike
from colaserve_client.requests import build, merged
from colaserve_client.results import (
    DecodedLatents,
    GenerationChunk,
    GenerationOutcome,
    GenerationResult,
    InfillResult,
    InterpolationPoint,
    LatentBlock,
    ModelInfo,
    Reconstruction,
    ServiceInfo,
    TextEncoding,
    Tokens,
)
from colaserve_client.settings import (
    GenerationFields,
    GenerationRequest,
    Interpolation,
    NoiseSeed,
    Prompt,
    Sampler,
    SamplerFields,
    Sampling,
    SamplingFields,
    WritingFields,
)
from colaserve_client.transport import AsyncStream, bounded, started_ahead


class AsyncClient(AsyncBaseClient):
    """A connection to a coordinator, for one event loop.

    Every call takes `timeout` (seconds, retries included; `math.inf` for no deadline) and `request_id` (sent as
    x-request-id, drawn at random when empty), and raises the errors of `colaserve_client.errors`.

    >>> async with AsyncClient(target) as client:
    ...     result = await client.generate("Once upon a time", max_new_tokens=12)
    >>> result.text
    ' there was a'
    >>> result.finish_reason, result.usage.completion_tokens
    ('length', 12)
    """

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        request_id: str = "",
        **settings: Unpack[GenerationFields],
    ) -> GenerationResult:
        """Continue a prompt and return the whole text.

        Args:
            prompt: a text, or token ids; may be empty. Tokenized as it is, without a template.
            max_new_tokens: at least 1; None: the server's default.
            sampler: how latents are sampled; or its fields as keywords: steps, guidance_scale, solver and so on.
            sampling: how tokens are drawn; or its fields as keywords: temperature, top_k and so on, sampling_seed.
            seed: of the noise; equal seeds give equal texts. None: random, and returned.
            stop: up to 16 strings of up to 1,000 characters; the text ends before the first of them.
            ignore_end: write on past end tokens.
            with_latents: also return the latents of the written blocks.
            top_logprobs: 0 to 20: also return every token's log-probability and those of so many likely ones.
            print_special: print end and pad tokens in the text; otherwise they have none.
            cache_salt: share what servers keep of prompts only with requests of the same salt, up to 256 characters.

        >>> result = await client.generate("Once upon a time", seed=7, stop=["fox"], temperature=0.7)
        >>> result.text, result.finish_reason, result.seed
        (' there was a ', 'stop', NoiseSeed(base_seed=7, sample_id=0))
        """
        async with self.stream(prompt, timeout=timeout, request_id=request_id, **settings) as stream:
            chunks = [chunk async for chunk in stream]
        return responses.generation_result(chunks, stream.request_id)

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        request_id: str = "",
        **settings: Unpack[GenerationFields],
    ) -> AsyncStream[GenerationChunk]:
        """Continue a prompt and yield the text block by block, as `generate` otherwise.

        Leaving the stream early cancels the generation: `async with` does so at the end of its block, `break` alone
        when the stream is garbage collected.

        >>> async with client.stream("Once upon a time", max_new_tokens=12) as stream:
        ...     async for chunk in stream:
        ...         print(repr(chunk.text), chunk.finish_reason)
        ' the' None
        're w' None
        'as a' length
        """
        request = requests.generate(requests.generation(prompt, settings))
        return self._transport.stream(request, responses.generation_chunk, timeout, request_id)

    async def generate_many(
        self, prompts: Iterable[Prompt | GenerationRequest], *, concurrency: int = 8, timeout: float | None = None
    ) -> AsyncGenerator[GenerationOutcome, None]:
        """Generate for many prompts, `concurrency` at a time; the outcomes come in the prompts' order.

        A prompt that fails gives an outcome with its error and does not disturb the others. `prompts` is read as far
        as needed, so it may be endless. Leaving early cancels what runs. `timeout` is for each prompt, from when its
        call starts.

        >>> prompts = [GenerationRequest("Once upon a time", max_new_tokens=n) for n in (6, 0)]
        >>> async for outcome in client.generate_many(prompts):
        ...     print(outcome.unwrap().text if outcome.result else outcome.error)
         there
        max_new_tokens: got 0, expected 1 or more
        """
        one = bounded(partial(outcome, self, timeout), concurrency)
        with closing(started_ahead(lambda prompt: asyncio.create_task(one(prompt)), prompts, concurrency)) as tasks:
            for task in tasks:
                yield await task

    async def tokenize(self, text: str, *, timeout: float | None = None, request_id: str = "") -> Tokens:
        """Text to token ids, as generate does it.

        >>> await client.tokenize("fox")
        Tokens(ids=(102, 111, 120), texts=('f', 'o', 'x'))
        """
        request = build(generation_pb2.TokenizeRequest, text=requests.of_kind(text, str, "text"))
        return await self._transport.unary(request, responses.tokens, timeout, request_id)

    async def detokenize(self, ids: Sequence[int], *, timeout: float | None = None, request_id: str = "") -> str:
        """Token ids to text, as generate does it; special tokens included.

        >>> await client.detokenize([102, 111, 120])
        'fox'
        """
        request = build(generation_pb2.DetokenizeRequest, token_ids=ids)
        return await self._transport.unary(request, attrgetter("text"), timeout, request_id)

    async def info(self, *, timeout: float | None = None, request_id: str = "") -> ModelInfo:
        """The model, its defaults, the server's limits and load, and the stages behind it.

        >>> info = await client.info()
        >>> info.model.block_size, info.default_max_new_tokens, [stage.stage for stage in info.stages]
        (4, 32, ['encoder', 'prior', 'decoder'])
        """
        request = generation_pb2.GenerationServiceGetInfoRequest()
        return await self._transport.unary(request, responses.model_info, timeout, request_id)

    async def latent_info(self, *, timeout: float | None = None, request_id: str = "") -> ServiceInfo:
        """The latent space, its limits and the server's load.

        >>> (await client.latent_info()).space
        '0123456789abcdef'
        """
        request = latent_service_pb2.LatentServiceGetInfoRequest()
        return await self._transport.unary(request, responses.one(ServiceInfo), timeout, request_id)

    async def encode_text(
        self, texts: Sequence[str], *, with_variance: bool = False, timeout: float | None = None, request_id: str = ""
    ) -> list[TextEncoding]:
        """Texts (1 to 256, none empty) to latents, with the log variance of the posterior on request.

        >>> encodings = await client.encode_text(["fox", "a hen"])
        >>> [encoding.latents.shape for encoding in encodings]
        [(3, 2), (5, 2)]
        """
        request = build(
            latent_service_pb2.EncodeTextRequest,
            texts=requests.strings(texts, "texts"),
            with_variance=with_variance or None,
        )
        answer = responses.several(TextEncoding, "encodings")
        return await self._transport.unary(request, answer, timeout, request_id)

    async def decode_latents(
        self,
        latents: LatentsLike,
        *,
        sampling: Sampling | None = None,
        top_logprobs: int | None = None,
        target_ids: Sequence[int] = (),
        token_count: int | None = None,
        timeout: float | None = None,
        request_id: str = "",
        **settings: Unpack[SamplingFields],
    ) -> DecodedLatents:
        """Latents to text.

        Args:
            latents: n >= 1 positions of the server's space, `ModelMismatch` otherwise; or an array (n, d).
            sampling: how tokens are drawn; the repetition penalty is 1 unless set.
            top_logprobs: as for `generate`.
            target_ids: ids whose log-probability is wanted at each position.
            token_count: how many tokens to return; None: all, up to the first end or pad token.

        >>> [encoding] = await client.encode_text(["fox"])
        >>> (await client.decode_latents(encoding.latents)).text
        'fox'
        """
        request = build(
            latent_service_pb2.DecodeLatentsRequest,
            latents=Latents.of(latents),
            top_logprobs=top_logprobs,
            target_ids=target_ids,
            token_count=token_count,
            **merged(settings, sampling=sampling),
        )
        return await self._transport.unary(request, responses.decoded_latents, timeout, request_id)

    def sample_latents(
        self,
        prefix: LatentsLike | None = None,
        *,
        max_blocks: int,
        sampler: Sampler | None = None,
        seed: int | NoiseSeed | None = None,
        cache_salt: str = "",
        timeout: float | None = None,
        request_id: str = "",
        **settings: Unpack[SamplerFields],
    ) -> AsyncStream[LatentBlock]:
        """Continue latents with the prior, block by block; None continues nothing. Leaving early cancels.

        The positions of a partial last block of the prefix are kept, and that block counts. `cache_salt`: as in
        `generate`.

        >>> async with client.sample_latents(max_blocks=2, seed=7) as blocks:
        ...     print([(block.index, block.latents.values.shape) async for block in blocks])
        [(0, (4, 2)), (1, (4, 2))]
        """
        request = build(
            latent_service_pb2.SampleLatentsRequest,
            prefix=prefix,
            max_blocks=max_blocks,
            seed=seed,
            cache_salt=cache_salt,
            **merged(settings, sampler=sampler),
        )
        return self._transport.stream(request, responses.latent_block, timeout, request_id)

    async def interpolate(
        self,
        start: str | LatentsLike,
        end: str | LatentsLike,
        *,
        points: int = 5,
        interpolation: Interpolation | None = None,
        sampling: Sampling | None = None,
        timeout: float | None = None,
        request_id: str = "",
        **settings: Unpack[SamplingFields],
    ) -> list[InterpolationPoint]:
        """Walk between two texts or latents and decode 2 to 256 points of the way, both ends included.

        interpolation: "slerp" (the default: along the great circle) or "lerp" (along the straight line).

        >>> [point.text for point in await client.interpolate("aaa", "ccc", points=3, interpolation="lerp")]
        ['aaa', 'bbb', 'ccc']
        """
        request = build(
            latent_service_pb2.InterpolateRequest,
            start=_endpoint(start, "start"),
            end=_endpoint(end, "end"),
            points=points,
            interpolation=interpolation,
            **merged(settings, sampling=sampling),
        )
        return await self._transport.unary(
            request, responses.several(InterpolationPoint, "points"), timeout, request_id
        )

    async def infill(
        self,
        segments: Sequence[str | int],
        *,
        sampler: Sampler | None = None,
        sampling: Sampling | None = None,
        seed: int | NoiseSeed | None = None,
        cache_salt: str = "",
        timeout: float | None = None,
        request_id: str = "",
        **settings: Unpack[WritingFields],
    ) -> InfillResult:
        """Write the holes of a text. A string is kept byte for byte, a number is a hole of so many tokens.

        A hole sees what is left of it and what is in its own block. `cache_salt` as in `generate`.

        >>> result = await client.infill(["My name is ", 3, "."], seed=7)
        >>> result.text, result.segments
        ('My name is ___.', ('My name is ', '___', '.'))
        """
        request = build(
            latent_service_pb2.InfillRequest,
            segments=_segments(segments),
            seed=seed,
            cache_salt=cache_salt,
            **merged(settings, sampler=sampler, sampling=sampling),
        )
        return await self._transport.unary(request, responses.one(InfillResult), timeout, request_id)

    async def reconstruct(
        self, texts: Sequence[str], *, timeout: float | None = None, request_id: str = ""
    ) -> list[Reconstruction]:
        """Texts (1 to 256, none empty) to latents and back: how faithful the latent space is.

        >>> [reconstruction] = await client.reconstruct(["fox"])
        >>> reconstruction.text, reconstruction.token_accuracy
        ('fox', 1.0)
        """
        request = build(latent_service_pb2.ReconstructRequest, texts=requests.strings(texts, "texts"))
        return await self._transport.unary(
            request, responses.several(Reconstruction, "reconstructions"), timeout, request_id
        )


async def outcome(client: AsyncClient, timeout: float | None, prompt: Prompt | GenerationRequest) -> GenerationOutcome:
    """What comes of one prompt of a batch."""
    request = prompt if isinstance(prompt, GenerationRequest) else GenerationRequest(prompt)
    settings = {field.name: getattr(request, field.name) for field in fields(request)}
    try:
        return GenerationOutcome(request, await client.generate(**settings, timeout=timeout), None)
    except ColaserveError as error:
        return GenerationOutcome(request, None, error)


def _endpoint(point: str | LatentsLike, field: str) -> latent_service_pb2.Endpoint:
    if isinstance(point, str):
        return build(latent_service_pb2.Endpoint, f"{field}.", text=point)
    return build(latent_service_pb2.Endpoint, latents=Latents.of(point, field))


def _segments(segments: Sequence[str | int]) -> list[latent_service_pb2.InfillSegment]:
    if isinstance(segments, str):
        raise invalid("segments", "expected a list of texts and hole sizes, got one text without a hole")
    return [
        build(
            latent_service_pb2.InfillSegment,
            f"segments[{index}].",
            **{"text" if isinstance(segment, str) else "token_count": segment},
        )
        for index, segment in enumerate(segments)
    ]
