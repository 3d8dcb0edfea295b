"""The blocking clients: the asyncio ones, whose calls run on a loop in a thread of its own while the caller waits.

Any number of threads may use a client at once. Ctrl-C cancels what the main thread waits for.
"""

import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import closing
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from colaserve_client.base import AsyncBaseClient
from colaserve_client.calls import AsyncDecodeSession, AsyncStream, Call
from colaserve_client.client import AsyncClient, bounded, outcome, started_ahead
from colaserve_client.errors import ColaserveError
from colaserve_client.latents import LatentsLike
from colaserve_client.loop import LOOP
from colaserve_client.results import DecodedBlock, GenerationOutcome
from colaserve_client.settings import GenerationRequest, Prompt
from colaserve_client.stages import AsyncDecoderClient, AsyncEncoderClient, AsyncPriorClient

A = TypeVar("A", bound=AsyncBaseClient)
C_co = TypeVar("C_co", bound=AsyncBaseClient, covariant=True)
F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K", bound=Call[Any])
P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
_ASYNC_ONLY = re.compile(r"\b(?:await|async) |\bAsync(?=[A-Z])")
_END: Any = object()


def _described_by(method: Callable[..., Any]) -> Callable[[F], F]:
    """Decorator: the name, signature and docstring of an asyncio client's method."""

    def describe(function: F) -> F:
        wraps(method, assigned=["__name__"])(function)
        function.__qualname__, function.__doc__ = (
            _ASYNC_ONLY.sub("", text or "") for text in (method.__qualname__, method.__doc__)
        )
        return function

    return describe


def _taking(
    method: Callable[Concatenate[Any, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Decorator: the signature of an asyncio client's constructor."""
    return wraps(method)


def _blocking(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["BaseClient[A]", P], T]:
    """A method that waits for what the asyncio client's returns."""

    @_described_by(method)
    def call(self: "BaseClient[A]", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return LOOP.run(method, self._client, *args, **kwargs)

    return call


def _opening(
    method: Callable[Concatenate[A, P], S], kind: Callable[[S, "BaseClient[Any]"], T]
) -> Callable[Concatenate["BaseClient[A]", P], T]:
    """A method that opens what the asyncio client's opens, as something that blocks."""

    @_described_by(method)
    def call(self: "BaseClient[A]", /, *args: P.args, **kwargs: P.kwargs) -> T:
        async def start() -> S:
            return method(self._client, *args, **kwargs)

        return kind(LOOP.run(start), self)

    return call


class _Closing(ABC):
    """Something that `with` closes."""

    @abstractmethod
    def close(self) -> None:
        """Close it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BaseClient(_Closing, Generic[C_co]):
    """A connection to one server. The asyncio client of the same name says what arguments and methods are."""

    _kind: type[C_co]

    def __init_subclass__(cls) -> None:
        cls.__doc__ = _ASYNC_ONLY.sub("", cls._kind.__doc__ or "")

    @_taking(AsyncBaseClient.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client = self._kind(*args, **kwargs)
        LOOP.connected.add(self._client)
        weakref.finalize(self, LOOP.spawn, self._client.close).atexit = False

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._client.target

    healthy = _blocking(AsyncBaseClient.healthy)
    wait_until_ready = _blocking(AsyncBaseClient.wait_until_ready)

    def close(self) -> None:
        """Cancel what runs and disconnect."""
        if not LOOP.is_lost:  # a forked child leaves its parent's connection alone
            LOOP.run(self._client.close)


class _Opened(_Closing, Generic[K]):
    """What a call has opened. Its client stays connected as long as it is used."""

    def __init__(self, call: K, client: BaseClient[Any]) -> None:
        self._call, self._client = call, client

    @property
    def request_id(self) -> str:
        """The call's x-request-id."""
        return self._call.request_id

    def _wait_for(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return LOOP.run(function, *args, **kwargs)
        except ColaserveError:
            raise
        except BaseException:  # such as Ctrl-C
            self.close()
            raise

    def close(self) -> None:
        """End the call and free what it holds; there is nothing more to read."""
        LOOP.call_soon(self._call._end)

    def __del__(self) -> None:
        self.close()


class Stream(_Opened[AsyncStream[T]]):
    """The answers of a call as they come. Leaving early (break, `close`, end of `with`, Ctrl-C) cancels the call."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        item = self._wait_for(self._next)
        if item is _END:
            raise StopIteration
        return item

    async def _next(self) -> T:
        return await anext(self._call, _END)

    def cancel(self) -> None:
        """Cancel the call, from any thread; the server frees what it holds. Whoever reads on gets `Cancelled`."""
        LOOP.call_soon(self._call.cancel)


class DecodeSession(_Opened[AsyncDecodeSession]):
    """An open session of a decoder; `DecoderClient.session` makes it."""

    def decode(self, block: LatentsLike) -> DecodedBlock:
        """Decode the next block, (B, d)."""
        return self._wait_for(self._call.decode, block)

    def preview(self, block: LatentsLike) -> DecodedBlock:
        """What the next block would be decoded to, (B, d); the session stays as it is."""
        return self._wait_for(self._call.preview, block)


class Client(BaseClient[AsyncClient]):
    _kind = AsyncClient

    generate = _blocking(AsyncClient.generate)
    stream = _opening(AsyncClient.stream, Stream)
    fork = _opening(AsyncClient.fork, Stream)
    fork_all = _blocking(AsyncClient.fork_all)
    embed = _blocking(AsyncClient.embed)
    tokenize = _blocking(AsyncClient.tokenize)
    detokenize = _blocking(AsyncClient.detokenize)
    info = _blocking(AsyncClient.info)
    latent_info = _blocking(AsyncClient.latent_info)
    encode_text = _blocking(AsyncClient.encode_text)
    decode_latents = _blocking(AsyncClient.decode_latents)
    logprobs = _blocking(AsyncClient.logprobs)
    score = _blocking(AsyncClient.score)
    sample_latents = _opening(AsyncClient.sample_latents, Stream)
    interpolate = _blocking(AsyncClient.interpolate)
    infill = _blocking(AsyncClient.infill)
    reconstruct = _blocking(AsyncClient.reconstruct)

    @_described_by(AsyncClient.generate_many)
    def generate_many(
        self, prompts: Iterable[Prompt | GenerationRequest], *, concurrency: int = 8, timeout: float | None = None
    ) -> Generator[GenerationOutcome, None, None]:
        one = bounded(partial(outcome, self._client, timeout), concurrency)
        with closing(started_ahead(lambda prompt: LOOP.submit(one, prompt), prompts, concurrency)) as futures:
            for future in futures:
                yield LOOP.result(future)


class EncoderClient(BaseClient[AsyncEncoderClient]):
    _kind = AsyncEncoderClient
    encode = _blocking(AsyncEncoderClient.encode)
    info = _blocking(AsyncEncoderClient.info)


class PriorClient(BaseClient[AsyncPriorClient]):
    _kind = AsyncPriorClient
    sample = _opening(AsyncPriorClient.sample, Stream)
    score = _blocking(AsyncPriorClient.score)
    info = _blocking(AsyncPriorClient.info)


class DecoderClient(BaseClient[AsyncDecoderClient]):
    _kind = AsyncDecoderClient
    session = _opening(AsyncDecoderClient.session, DecodeSession)
    info = _blocking(AsyncDecoderClient.info)
