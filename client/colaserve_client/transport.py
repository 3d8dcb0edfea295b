# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which the server sees too
"""Calls over grpc.aio: unary calls, server streams, sessions."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar
from weakref import WeakSet

import grpc
import grpc.aio
from google.protobuf.message import Message

from colaserve_client.calls import Attempts, converted, method_of
from colaserve_client.channel import ClientConfig, open_channel
from colaserve_client.errors import Cancelled, Details, ServerError, invalid
from colaserve_client.loop import LOOP

Q = TypeVar("Q")
S = TypeVar("S")
T = TypeVar("T")
E = TypeVar("E", bound="AsyncExchange[Any, Any]")
_EOF: Any = getattr(grpc.aio, "EOF")  # noqa: B009 - type stubs do not know it
# Where a stream has ended before grpc.aio writes to it and the event loop has not yet heard of it, its true status is
# lost for one of INTERNAL with this text. A busy loop hears of it in three rounds.
_LOST, _ROUNDS = "Internal error from Core", 3
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # a HealthCheckResponse whose status is SERVING


class AsyncTransport:
    """The connection of a client; opened by its first call, since a channel belongs to the running event loop."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._open = open_channel(config)
        self._channel: Any = None
        self._closed = False
        self._calls: WeakSet[AsyncStream[Any] | AsyncExchange[Any, Any]] = WeakSet()

    def _connected(self) -> Any:
        if self._closed:
            raise Cancelled("the client is closed")
        LOOP.check()
        if self._channel is None:
            self._channel = self._open()
        return self._channel

    def _attempts(self, timeout: float | None, request_id: str) -> Attempts:
        return Attempts(self._config, timeout, request_id, lambda: self._closed)

    def _start(self, kind: str, request: Message, *arguments: Message, **settings: Any) -> Any:
        """A call of grpc.aio, of the method that takes this kind of request."""
        path, response = method_of(request)
        callable_ = getattr(self._connected(), kind)(path, type(request).SerializeToString, response.FromString)
        return callable_(*arguments, **settings)

    async def unary(
        self, request: Message, convert: Callable[[Any], T], timeout: float | None = None, request_id: str = ""
    ) -> T:
        """One answer, converted; tried again where that is safe."""
        attempts = self._attempts(timeout, request_id)
        while True:
            try:
                answer = await self._start("unary_unary", request, request, **attempts.arguments())
                return converted(convert, answer, attempts.request_id)
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                raise Cancelled("the client was closed", Details(request_id=attempts.request_id)) from None
            except grpc.aio.AioRpcError as failure:
                await asyncio.sleep(attempts.pause(failure, started=False))

    def stream(
        self, request: Message, convert: Callable[[Any], T], timeout: float | None = None, request_id: str = ""
    ) -> "AsyncStream[T]":
        """Answers as they come, converted."""
        attempts = self._attempts(timeout, request_id)
        stream = AsyncStream(
            lambda: self._start("unary_stream", request, request, **attempts.arguments()), convert, attempts
        )
        self._calls.add(stream)
        return stream

    def exchange(
        self, kind: type[E], opening: Message, convert: Callable[[Any], Any], timeout: float | None, request_id: str
    ) -> E:
        """A session: it is opened by a request without an answer, then each request gets one, converted."""
        self._connected()
        attempts = self._attempts(timeout, request_id)
        exchange = kind(
            lambda: self._start("stream_stream", opening, **attempts.arguments()), opening, convert, attempts
        )
        self._calls.add(exchange)
        return exchange

    async def healthy(self, timeout: float) -> bool:
        """Whether the server says that it serves; False too when it cannot be reached."""
        try:
            call = self._connected().unary_unary(_HEALTH)
            return bool(await call(b"", **self._attempts(timeout, "").arguments()) == _SERVING)
        except grpc.aio.AioRpcError:
            return False

    def is_busy(self) -> bool:
        """Whether a stream or a session is open."""
        return any(call._is_open() for call in self._calls)

    async def disconnect(self) -> None:
        """Cancel what runs; the next call connects anew."""
        channel, self._channel = self._channel, None
        if channel is not None and not LOOP.is_lost:
            await channel.close()

    async def close(self) -> None:
        """Cancel what runs and disconnect; no call can be made afterwards."""
        self._closed = True
        await self.disconnect()


class Cancellable(Protocol):
    """A task, or a future of another thread."""

    def cancel(self) -> bool:
        """Cancel it."""


C = TypeVar("C", bound=Cancellable)
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

    async def one(item: S) -> T:
        async with free:
            return await function(item)

    return one


def _is_cancelled() -> bool:
    """Whether this task is cancelled; else a CancelledError in it comes of its call, which was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncStream(Generic[T]):
    """The answers of a call as they come. Leaving early (break, `aclose`, end of `async with`) cancels the call."""

    def __init__(self, start: Callable[[], Any], convert: Callable[[Any], T], attempts: Attempts) -> None:
        self._start, self._convert, self._attempts = start, convert, attempts
        self._received = self._ended = False
        self._left = asyncio.Event()
        self._call: Any = None  # until it is started, which may fail
        self._call = start()

    @property
    def request_id(self) -> str:
        """The call's x-request-id."""
        return self._attempts.request_id

    def __aiter__(self) -> "AsyncStream[T]":
        return self

    async def __anext__(self) -> T:
        LOOP.check()
        while not self._ended:
            if self._left.is_set():
                raise self._was_left()
            try:
                message = await self._call.read()
                if message is _EOF:
                    break
                self._received = True
                return converted(self._convert, message, self.request_id)
            except grpc.aio.AioRpcError as failure:
                await self._again(failure)
            except BaseException as error:
                self._cancel_call()
                self._end()
                if isinstance(error, asyncio.CancelledError) and not _is_cancelled():
                    raise self._was_left() from None
                raise
        self._end()
        raise StopAsyncIteration

    async def _again(self, failure: grpc.aio.AioRpcError) -> None:
        """Start the call anew, or raise."""
        self._call = None
        try:
            if not self._left.is_set():
                seconds = self._attempts.pause(failure, started=self._received)
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._left.wait()
            if self._left.is_set():
                raise self._was_left()
            self._call = self._start()
        except BaseException:
            self._end()
            raise

    def _was_left(self) -> Cancelled:
        self._end()
        return Cancelled("the stream was left", Details(request_id=self.request_id))

    def _end(self) -> None:
        """There is nothing more to read."""
        self._ended, self._call = True, None

    def _is_open(self) -> bool:
        return not (self._ended or self._left.is_set())

    def cancel(self) -> None:
        """Cancel the call, from any task; the server frees what it holds. Whoever reads on gets `Cancelled`."""
        self._left.set()
        self._cancel_call()

    def _cancel_call(self) -> None:
        if self._call is not None and not LOOP.is_lost:  # a forked child leaves its parent's call alone
            self._call.cancel()

    async def aclose(self) -> None:
        """Cancel the call, unless it has ended; there is nothing more to read."""
        self.cancel()
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._cancel_call()


class AsyncExchange(Generic[Q, T]):
    """A session over one stream: a request, its answer, the next request."""

    def __init__(self, start: Callable[[], Any], opening: Q, convert: Callable[[Any], T], attempts: Attempts) -> None:
        self._start, self._opening, self._convert, self._attempts = start, opening, convert, attempts
        self._received = self._closed = False
        self._call: Any = None

    @property
    def request_id(self) -> str:
        """The session's x-request-id."""
        return self._attempts.request_id

    async def _ask(self, request: Q) -> T:
        """The answer to a request."""
        LOOP.check()
        while True:
            if self._closed:
                raise Cancelled("the session is closed", Details(request_id=self.request_id))
            try:
                return await self._write_and_read(request)
            except grpc.aio.AioRpcError as failure:
                await self._again(failure)
            except BaseException as failure:  # the next answer would be that to this request
                self._close()
                if _is_cancelled() or not isinstance(failure, asyncio.CancelledError):
                    raise
                raise Cancelled("the session was closed", Details(request_id=self.request_id)) from None

    async def _write_and_read(self, request: Q) -> T:
        if self._call is None:
            self._call = self._start()
            await self._write(self._opening)
        await self._write(request)
        answer = await self._call.read()
        if answer is _EOF:
            raise ServerError("the session ended without an answer", Details(request_id=self.request_id))
        self._received = True
        return converted(self._convert, answer, self.request_id)

    async def _write(self, request: Q) -> None:
        for _ in range(_ROUNDS):
            await asyncio.sleep(0)
        try:
            await self._call.write(request)
        except asyncio.InvalidStateError:  # the call has ended already: reading says why
            await self._call.read()
            raise
        except grpc.aio.AioRpcError as failure:
            if failure.details() != _LOST:
                raise
            details = "the server ended the session while a request was being sent"
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, failure.initial_metadata(), failure.trailing_metadata(), details
            ) from None

    async def _again(self, failure: grpc.aio.AioRpcError) -> None:
        if self._closed:
            return
        try:
            await asyncio.sleep(self._attempts.pause(failure, started=self._received))
        except BaseException:
            self._close()
            raise
        self._call = None

    def _is_open(self) -> bool:
        return self._call is not None

    def _close(self) -> None:
        self._closed = True
        call, self._call = self._call, None
        if call is not None and not LOOP.is_lost:  # a forked child leaves its parent's call alone
            call.cancel()

    async def close(self) -> None:
        """End the session and free what it holds."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
