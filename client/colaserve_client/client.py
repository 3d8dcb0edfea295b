# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which the server sees too
"""The asyncio client of a coordinator: text and latents in, text and latents out."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar, Unpack

from colaserve.v1 import generation_pb2
from colaserve_client.about import ModelInfo
from colaserve_client.calls import AsyncStream
from colaserve_client.errors import ColaserveError, invalid
from colaserve_client.latent_client import AsyncLatentClient, generation_result
from colaserve_client.messages import of_kind, one, request
from colaserve_client.results import GenerationChunk, GenerationOutcome, GenerationResult, Tokens
from colaserve_client.settings import CallFields, GenerationFields, GenerationRequest, Prompt

S = TypeVar("S")
T = TypeVar("T")


class AsyncClient(AsyncLatentClient):
    """A connection to a coordinator. An asyncio client is for one event loop, a blocking one for any number of threads.

    Every call takes `timeout` (seconds, retries included; `math.inf` for no deadline) and `request_id` (sent as
    x-request-id, drawn at random when empty), and raises the errors of `colaserve_client.errors`.

    >>> async with AsyncClient(target) as client:
    ...     result = await client.generate("Once upon a time", max_new_tokens=12)
    >>> result.text
    ' there was a'
    >>> result.finish_reason, result.usage.completion_tokens
    ('length', 12)
    """

    async def generate(self, prompt: Prompt, **settings: Unpack[GenerationFields]) -> GenerationResult:
        """Continue a prompt and return the whole text.

        Args:
            prompt: a text, or token ids; may be empty. Tokenized as it is, without a template.
            max_new_tokens: at least 1; None: the server's default.
            sampler: how latents are sampled; or its fields as keywords: steps, guidance_scale, solver and so on.
            sampling: how tokens are drawn; or its fields as keywords: temperature, top_k and so on, sampling_seed.
            seed: of the noise; equal seeds give equal texts. None: random, and returned.
            stop: up to 16 strings of up to 1,000 characters; the text ends before the first of them.
            choices: 2 to 64 texts, none empty: the text is the one that the written latents read as best, by the sum
                of its tokens' log-probabilities. Begin them with a space where the text would.
            ignore_end: write on past end tokens.
            with_latents: also return the latents of the written blocks.
            top_logprobs: 0 to 20: also return every token's log-probability and those of so many likely ones.
            print_special: print end and pad tokens in the text; otherwise they have none.
            cache_salt: share what servers keep of prompts only with requests of the same salt, up to 256 characters.
            preview_every: also look at the block under way after every so many steps; 0 or None: not at all. Previews
                change nothing of the text. Servers leave out those that would delay it.
            with_probes: also return the probes of each block.

        >>> result = await client.generate("Once upon a time", seed=7, stop=["fox"], temperature=0.7)
        >>> result.text, result.finish_reason, result.seed
        (' there was a ', 'stop', NoiseSeed(base_seed=7, sample_id=0))
        """
        async with self.stream(prompt, **settings) as stream:
            chunks = [chunk async for chunk in stream]
        return generation_result(chunks, stream.request_id)

    def stream(self, prompt: Prompt, **settings: Unpack[GenerationFields]) -> AsyncStream[GenerationChunk]:
        """Continue a prompt and yield the text block by block, as `generate` otherwise.

        Leaving the stream early cancels the generation: `async with` does so at the end of its block, `break` alone
        when the stream is garbage collected. With `preview_every`, chunks that bring a `preview` and no text come
        between those of the blocks.

        >>> async with client.stream("Once upon a time", max_new_tokens=12) as stream:
        ...     async for chunk in stream:
        ...         print(repr(chunk.text), chunk.finish_reason)
        ' the' None
        're w' None
        'as a' length
        """
        if prompt is None:
            raise invalid("prompt", "expected a text or token ids, got None")
        texts, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        message = request(generation_pb2.GenerateRequest, settings, prompt=texts, prompt_ids=ids)
        return self._stream(message, one(GenerationChunk), settings)

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

    async def tokenize(self, text: str, **call: Unpack[CallFields]) -> Tokens:
        """Text to token ids, as generate does it.

        >>> await client.tokenize("fox")
        Tokens(ids=(102, 111, 120), texts=('f', 'o', 'x'))
        """
        message = request(generation_pb2.TokenizeRequest, call, text=of_kind(text, str, "text"))
        return await self._unary(message, one(Tokens), call)

    async def detokenize(self, ids: Sequence[int], **call: Unpack[CallFields]) -> str:
        """Token ids to text, as generate does it; special tokens included.

        >>> await client.detokenize([102, 111, 120])
        'fox'
        """
        message = request(generation_pb2.DetokenizeRequest, call, token_ids=ids)
        return await self._unary(message, attrgetter("text"), call)

    async def info(self, **call: Unpack[CallFields]) -> ModelInfo:
        """The model, its defaults, the server's limits and load, and the stages behind it.

        >>> info = await client.info()
        >>> info.model.block_size, info.default_max_new_tokens, [stage.stage for stage in info.stages]
        (4, 32, ['encoder', 'prior', 'decoder'])
        """
        return await self._unary(request(generation_pb2.GenerationServiceGetInfoRequest, call), one(ModelInfo), call)


async def outcome(client: AsyncClient, timeout: float | None, prompt: Prompt | GenerationRequest) -> GenerationOutcome:
    """What comes of one prompt of a batch."""
    request = prompt if isinstance(prompt, GenerationRequest) else GenerationRequest(prompt)
    try:
        return GenerationOutcome(request, await client.generate(**vars(request), timeout=timeout), None)
    except ColaserveError as error:
        return GenerationOutcome(request, None, error)


C = TypeVar("C", "asyncio.Task[Any]", "Future[Any]")
_NOTHING_LEFT: Any = object()
_LOOK_AHEAD = 4  # times the concurrency: results that may wait for a slow one before them


def started_ahead(start: Callable[[S], C], items: Iterable[S], concurrency: int) -> Generator[C, None, None]:
    """What `start` makes of the items, in their order, some of them ahead; leaving early cancels those."""
    source, ahead = iter(items), deque[C]()
    try:
        while True:
            while len(ahead) < _LOOK_AHEAD * concurrency and (item := next(source, _NOTHING_LEFT)) is not _NOTHING_LEFT:
                ahead.append(start(item))
            if not ahead:
                return
            yield ahead.popleft()
    finally:
        for each in ahead:
            each.cancel()


def bounded(function: Callable[[S], Awaitable[T]], concurrency: int) -> Callable[[S], Coroutine[Any, Any, T]]:
    """The function, so many calls of it at a time."""
    if concurrency < 1:
        raise invalid("concurrency", f"expected 1 or more, got {concurrency}")
    free = asyncio.Semaphore(concurrency)

    async def one_call(item: S) -> T:
        async with free:
            return await function(item)

    return one_call
