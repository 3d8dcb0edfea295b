"""The asyncio client's calls of LatentService: texts to latents and back, forks, embeddings, likelihood."""

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from colaserve.v1 import latent_service_pb2 as pb
from colaserve_client import results
from colaserve_client.about import ServiceInfo
from colaserve_client.base import AsyncBaseClient
from colaserve_client.calls import AsyncStream, converted
from colaserve_client.errors import Details, ServerError, invalid
from colaserve_client.latents import Latents, LatentsLike
from colaserve_client.messages import build, of_kind, one, request, several
from colaserve_client.results import BranchBlock, GenerationChunk, GenerationResult, LatentBlock, TextEncoding
from colaserve_client.settings import (
    Branch,
    CallFields,
    DecodeFields,
    ForkFields,
    Interpolation,
    LogprobsFields,
    Pooling,
    Prompt,
    SampleFields,
    SamplingFields,
    ScoringFields,
    WritingFields,
)


class AsyncLatentClient(AsyncBaseClient):
    """What `AsyncClient` does with latents."""

    async def latent_info(self, **call: Unpack[CallFields]) -> ServiceInfo:
        """The latent space, its limits and the server's load.

        >>> (await client.latent_info()).space
        '0123456789abcdef'
        """
        return await self._unary(request(pb.LatentServiceGetInfoRequest, call), one(ServiceInfo), call)

    async def encode_text(
        self, texts: Sequence[str], *, with_variance: bool = False, **call: Unpack[CallFields]
    ) -> list[TextEncoding]:
        """Texts (1 to 256, none empty) to latents, with the log variance of the posterior on request.

        >>> encodings = await client.encode_text(["fox", "a hen"])
        >>> [encoding.latents.shape for encoding in encodings]
        [(3, 2), (5, 2)]
        """
        message = request(pb.EncodeTextRequest, call, texts=texts, with_variance=with_variance)
        return await self._unary(message, several(TextEncoding, "encodings"), call)

    async def decode_latents(self, latents: LatentsLike, **settings: Unpack[DecodeFields]) -> results.DecodedLatents:
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
        message = request(pb.DecodeLatentsRequest, settings, latents=Latents.of(latents))
        return await self._unary(message, one(results.DecodedLatents), settings)

    def sample_latents(
        self, prefix: LatentsLike | None = None, *, max_blocks: int, **settings: Unpack[SampleFields]
    ) -> AsyncStream[LatentBlock]:
        """Continue latents with the prior, block by block; None continues nothing. Leaving early cancels.

        The positions of a partial last block of the prefix are kept, and that block counts. `cache_salt`,
        `preview_every` and `with_probes` as in `generate`; a preview is a block that is `provisional`.

        >>> async with client.sample_latents(max_blocks=2, seed=7) as blocks:
        ...     print([(block.index, block.latents.values.shape) async for block in blocks])
        [(0, (4, 2)), (1, (4, 2))]
        """
        message = request(pb.SampleLatentsRequest, settings, prefix=prefix, max_blocks=max_blocks)
        return self._stream(message, one(LatentBlock), settings)

    async def interpolate(
        self,
        start: str | LatentsLike,
        end: str | LatentsLike,
        *,
        points: int = 5,
        interpolation: Interpolation | None = None,
        **settings: Unpack[SamplingFields],
    ) -> list[results.InterpolationPoint]:
        """Walk between two texts or latents and decode 2 to 256 points of the way, both ends included.

        interpolation: "slerp" (the default: along the great circle) or "lerp" (along the straight line).

        >>> [point.text for point in await client.interpolate("aaa", "ccc", points=3, interpolation="lerp")]
        ['aaa', 'bbb', 'ccc']
        """
        ends = {"start": _endpoint(start, "start"), "end": _endpoint(end, "end")}
        message = request(pb.InterpolateRequest, settings, **ends, points=points, interpolation=interpolation)
        return await self._unary(message, several(results.InterpolationPoint, "points"), settings)

    async def infill(self, segments: Sequence[str | int], **settings: Unpack[WritingFields]) -> results.InfillResult:
        """Write the holes of a text. A string is kept byte for byte, a number is a hole of so many tokens.

        A hole sees what is left of it and what is in its own block. `cache_salt` as in `generate`.

        >>> result = await client.infill(["My name is ", 3, "."], seed=7)
        >>> result.text, result.segments
        ('My name is ___.', ('My name is ', '___', '.'))
        """
        if isinstance(segments, str):
            raise invalid("segments", "expected a list of texts and hole sizes, got one text without a hole")
        made = []
        for index, each in enumerate(segments):
            field = "text" if isinstance(each, str) else "token_count"
            made.append(build(pb.InfillSegment, {field: each}, f"segments[{index}]."))
        message = request(pb.InfillRequest, settings, segments=made)
        return await self._unary(message, one(results.InfillResult), settings)

    async def reconstruct(self, texts: Sequence[str], **call: Unpack[CallFields]) -> list[results.Reconstruction]:
        """Texts (1 to 256, none empty) to latents and back: how faithful the latent space is.

        >>> [reconstruction] = await client.reconstruct(["fox"])
        >>> reconstruction.text, reconstruction.token_accuracy
        ('fox', 1.0)
        """
        message = request(pb.ReconstructRequest, call, texts=texts)
        return await self._unary(message, several(results.Reconstruction, "reconstructions"), call)

    def fork(
        self,
        prefix: Prompt | LatentsLike = "",
        branches: int | Sequence[Branch] = 2,
        **settings: Unpack[ForkFields],
    ) -> AsyncStream[BranchBlock]:
        """Continue one prefix in several ways at once and yield their blocks as they come. Leaving early cancels all.

        The servers encode, compute and hold the prefix once; each branch is as `generate` would write it alone. Its
        settings are those of `generate`, for all branches; a `Branch` may have its own.

        Args:
            prefix: a text, token ids, or latents (an array (n, d)). Latents behind the last whole block are kept.
            branches: 1 to 128 of them, or how many that differ in their noise alone.

        >>> branches = [Branch(seed=7), Branch(max_new_tokens=4)]
        >>> async with client.fork("Once upon a time", branches, max_new_tokens=8) as blocks:
        ...     print(sorted([(block.branch, block.index, block.text) async for block in blocks]))
        [(0, 0, ' the'), (0, 1, 're w'), (1, 0, ' the')]
        """
        kind = "text" if isinstance(prefix, str) else "latents" if np.ndim(prefix) == 2 else "ids"
        given = {"text": None, "ids": None, "latents": None, kind: prefix}
        each = [Branch()] * branches if isinstance(branches, int) else branches
        made = [
            build(pb.ForkBranch, vars(of_kind(branch, Branch, f"branches[{at}]")), f"branches[{at}].")
            for at, branch in enumerate(each)
        ]
        message = request(pb.ForkRequest, settings, **given, branches=made)
        return self._stream(message, one(BranchBlock), settings)

    async def fork_all(
        self,
        prefix: Prompt | LatentsLike = "",
        branches: int | Sequence[Branch] = 2,
        **settings: Unpack[ForkFields],
    ) -> list[GenerationResult]:
        """As `fork`, and return each branch whole, in order.

        >>> [result.text for result in await client.fork_all("Once upon a time", 3, max_new_tokens=4)]
        [' the', ' the', ' the']
        """
        chunks: list[list[BranchBlock]] = [[] for _ in range(branches if isinstance(branches, int) else len(branches))]
        async with self.fork(prefix, branches, **settings) as blocks:
            async for block in blocks:
                chunks[block.branch].append(block)
        return [generation_result(each, blocks.request_id) for each in chunks]

    async def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        pooling: Pooling | None = None,
        normalize: bool = False,
        **call: Unpack[CallFields],
    ) -> list[results.Embedding]:
        """A vector for each text: a mean of its latents.

        Args:
            texts: 1 to 256 texts, or token ids of each; none empty.
            pooling: "mean" (the default: of all latents), "last_block", or "per_block" (a vector a block).
            normalize: scale each vector to length 1.

        >>> [(embedding.values.shape, embedding.token_count) for embedding in await client.embed(["fox", "a hen"])]
        [((2,), 3), ((2,), 5)]
        """
        as_ids = not isinstance(texts, str) and any(not isinstance(text, str) for text in texts)
        given = {"sequences" if as_ids else "texts": texts}
        message = request(pb.EmbedRequest, call, **given, pooling=pooling, normalize=normalize)
        return await self._unary(message, several(results.Embedding, "embeddings"), call)

    async def logprobs(
        self,
        text: Prompt | None = None,
        *,
        latents: LatentsLike | None = None,
        **settings: Unpack[LogprobsFields],
    ) -> results.Logprobs:
        """Log-probabilities of a text's tokens as the model reconstructs it, or of the likeliest tokens of latents.

        Each block is decoded with those before it. Log-probabilities are log-softmax of the raw logits. This says how
        well latents hold a token; `score` says how likely the prior finds a text.

        Args:
            text: a text, or its token ids; or
            latents: n >= 1 positions of the server's space, or an array (n, d).
            top_logprobs: 0 to 20: how many likely tokens to return beside each.
            logprob_ids: ids whose log-probability is wanted at every position.
            all_logprobs: that of the whole vocabulary instead. The answer is one message, whose size bounds
                positions * ids.
            logprobs_dtype: "float32" (the default) or "float16", which halves that message.
            cache_salt: as in `generate`.

        >>> found = await client.logprobs("fox", logprob_ids=[111, 112])
        >>> found.tokens, found.position_logprobs.shape
        (('f', 'o', 'x'), (3, 2))
        """
        texts, ids = (text, None) if isinstance(text, str) else (None, text)
        message = request(pb.LogprobsRequest, settings, text=texts, ids=ids, latents=latents)
        return await self._unary(message, one(results.Logprobs), settings)

    async def score(self, text: str, prefix: str = "", **settings: Unpack[ScoringFields]) -> results.Score:
        """How likely the model finds a text after a prefix: a lower bound of its log-likelihood, in nats.

        The decoder's term and the posterior's entropy are exact for each draw of latents; the prior's log density is
        estimated by the probability-flow ODE, see docs/likelihood.md. Likelihood and quality need not agree.

        Args:
            text: not empty. It begins with a space where the prefix does not end with one.
            prefix: what comes before it.
            samples: draws from the posterior, up to 64; 0 takes its mean, which is no bound and has less noise.
            probes: 1 to 256, of each draw; more lessen the error of its density.
            steps: of the integration; each takes two evaluations with solver "heun", the default, one with the others.
            seed: equal seeds give equal scores. None: random, and returned.
            cache_salt: as in `generate`.

        >>> found = await client.score("fox", "a quick ", probes=16, seed=7)
        >>> found.log_likelihood, found.standard_error, found.evaluations
        (-12.5, 0.25, 2112)
        """
        message = request(pb.LatentServiceScoreRequest, settings, text=text, prefix=prefix)
        return await self._unary(message, one(results.Score), settings)


def _endpoint(point: str | LatentsLike, field: str) -> pb.Endpoint:
    if isinstance(point, str):
        return build(pb.Endpoint, {"text": point}, f"{field}.")
    return build(pb.Endpoint, {"latents": Latents.of(point, field)})


def generation_result(chunks: Sequence[GenerationChunk], request_id: str) -> GenerationResult:
    """The whole of all chunks; `ServerError` when the last one is missing or incomplete, or they do not fit."""
    last = chunks[-1] if chunks else None
    if last is None or last.finish_reason is None or last.usage is None or last.seed is None:
        raise ServerError("the stream ended without a finish reason, usage and seed", Details(request_id=request_id))
    latents = [chunk.latents for chunk in chunks if chunk.latents is not None]
    return GenerationResult(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        latents=converted(Latents.concat, latents, request_id) if latents else None,
        finish_reason=last.finish_reason,
        usage=last.usage,
        seed=last.seed,
        timing=last.timing,
        request_id=request_id,
        previews=tuple(chunk.preview for chunk in chunks if chunk.preview is not None),
        probes=tuple(chunk.probes for chunk in chunks if chunk.probes is not None and chunk.preview is None),
        choices=last.choices,
    )
