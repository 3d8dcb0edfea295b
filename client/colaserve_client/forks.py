"""The asyncio client's calls for forks of a prefix and for embeddings of texts."""

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from colaserve.v1 import latent_service_pb2
from colaserve_client.base import AsyncBaseClient
from colaserve_client.calls import AsyncStream, converted
from colaserve_client.errors import Details, ServerError
from colaserve_client.latents import Latents, LatentsLike
from colaserve_client.messages import build, of_kind, one, request, several
from colaserve_client.results import BranchBlock, Embedding, GenerationChunk, GenerationResult
from colaserve_client.settings import Branch, CallFields, ForkFields, Pooling, Prompt


class AsyncForks(AsyncBaseClient):
    """`fork`, `fork_all` and `embed` of `AsyncClient`."""

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
            build(latent_service_pb2.ForkBranch, vars(of_kind(branch, Branch, f"branches[{at}]")), f"branches[{at}].")
            for at, branch in enumerate(each)
        ]
        message = request(latent_service_pb2.ForkRequest, settings, **given, branches=made)
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
    ) -> list[Embedding]:
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
        message = request(latent_service_pb2.EmbedRequest, call, **given, pooling=pooling, normalize=normalize)
        return await self._unary(message, several(Embedding, "embeddings"), call)


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
