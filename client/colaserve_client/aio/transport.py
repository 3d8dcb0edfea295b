# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which the server sees too
"""Calls over grpc.aio: unary, server streams, sessions. `sync/transport.py` is its twin with threads."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import grpc
import grpc.aio

from colaserve_client.calls import (
    Attempts,
    CallOptions,
    ClientConfig,
    Method,
    Q,
    R,
    check_same_process,
    converted,
    forked,
)
from colaserve_client.channel import channel_options, credentials
from colaserve_client.errors import Cancelled, Details, ServerError, Unavailable, invalid

S = TypeVar("S")
T = TypeVar("T")
_NOTHING_LEFT: Any = object()
_EOF: Any = getattr(grpc.aio, "EOF")  # noqa: B009 - type stubs do not know it
_LOOK_AHEAD = 4  # times the concurrency: results that may wait for a slow one before them
# Where a stream has ended before grpc.aio writes to it and the event loop has not yet heard of it, its true status is
# lost for one of INTERNAL with this text. A busy loop hears of it in three rounds.
_LOST, _ROUNDS = "Internal error from Core", 3
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # a HealthCheckResponse whose status is SERVING

_FORKED = (
    "this process was forked from one whose asyncio clients were connected, which these do not survive: "
    "close them before the fork, use the blocking Client, or start the process with the spawn method"
)
_connected: "WeakSet[AsyncTransport]" = WeakSet()  # a call in a forked child of such a process would end the child


class AsyncTransport:
    """The connection of a client; opened by its first call, since a channel belongs to the running event loop."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._options = channel_options(config.target, config.connection, config.tls)
        self._credentials = None if config.tls is None else credentials(config.tls)
        self._opened: Any = None
        self._process = os.getpid()
        self._closed = False

    def _channel(self) -> Any:
        if self._closed:
            raise Cancelled("the client is closed")
        if any(forked(transport._process) for transport in _connected):
            raise Unavailable(_FORKED)
        if self._opened is None:
            self._process = os.getpid()
            _connected.add(self)
            self._opened = (
                grpc.aio.insecure_channel(self._config.target, options=self._options)
                if self._credentials is None
                else grpc.aio.secure_channel(self._config.target, self._credentials, options=self._options)
            )
        return self._opened

    async def unary(self, method: Method[Q, R], request: Q, convert: Callable[[R], T], options: CallOptions) -> T:
        """One answer, converted; tried again where that is safe."""
        options = options.resolved(self._config)
        attempts = Attempts(self._config.retry, options, lambda: self._closed)
        call = self._channel().unary_unary(method.path, method.serialize, method.deserialize)
        while True:
            try:
                answer = await call(request, timeout=attempts.remaining(), metadata=options.metadata(self._config))
                return converted(convert, answer, options.request_id)
            except asyncio.CancelledError:
                if _asked_to_stop():
                    raise
                raise Cancelled("the client was closed", Details(request_id=options.request_id)) from None
            except grpc.aio.AioRpcError as failure:
                await asyncio.sleep(attempts.pause(failure, started=False))

    def stream(
        self, method: Method[Q, R], request: Q, convert: Callable[[R], T], options: CallOptions
    ) -> "AsyncStream[T]":
        """Answers as they come, converted."""
        options = options.resolved(self._config)
        attempts = Attempts(self._config.retry, options, lambda: self._closed)
        call = self._channel().unary_stream(method.path, method.serialize, method.deserialize)

        def start() -> Any:
            return call(request, timeout=attempts.remaining(), metadata=options.metadata(self._config))

        return AsyncStream(start, convert, attempts, options.request_id)

    def exchange(
        self, method: Method[Q, R], opening: Q, convert: Callable[[R], T], options: CallOptions
    ) -> "AsyncExchange[Q, T]":
        """A session: it is opened by a request without an answer, then each request gets one, converted."""
        options = options.resolved(self._config)
        attempts = Attempts(self._config.retry, options, lambda: self._closed)
        call = self._channel().stream_stream(method.path, method.serialize, method.deserialize)

        def start() -> Any:
            return call(timeout=attempts.remaining(), metadata=options.metadata(self._config))

        return AsyncExchange(start, opening, convert, attempts, options.request_id)

    async def healthy(self, timeout: float) -> bool:
        """Whether the server says that it serves; False too when it cannot be reached."""
        options = CallOptions(timeout).resolved(self._config)
        try:
            call = self._channel().unary_unary(_HEALTH)
            answer = await call(b"", timeout=options.timeout, metadata=options.metadata(self._config))
            return bool(answer == _SERVING)
        except grpc.aio.AioRpcError:
            return False

    async def map(
        self, function: Callable[[S], Awaitable[T]], items: Iterable[S], concurrency: int
    ) -> AsyncGenerator[T, None]:
        """What `function` makes of the items, in their order, so many at a time; leaving early cancels the rest."""
        if concurrency < 1:
            raise invalid("concurrency", f"expected 1 or more, got {concurrency}")
        free = asyncio.Semaphore(concurrency)

        async def one(item: S) -> T:
            async with free:
                return await function(item)

        source, window = iter(items), deque[asyncio.Task[T]]()
        try:
            while True:
                while (
                    len(window) < _LOOK_AHEAD * concurrency
                    and (item := next(source, _NOTHING_LEFT)) is not _NOTHING_LEFT
                ):
                    window.append(asyncio.create_task(one(item)))
                if not window:
                    return
                yield await window.popleft()
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def close(self) -> None:
        """Cancel what runs and disconnect; no call can be made afterwards."""
        self._closed = True
        if self._opened is not None and self._process == os.getpid():
            await self._opened.close()
            _connected.discard(self)


def _asked_to_stop() -> bool:
    """Whether this task is cancelled; else a CancelledError in it comes of its call, which was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncStream(Generic[T]):
    """The answers of a call as they come. Leaving early (break, `aclose`, end of `async with`) cancels the call."""

    def __init__(self, start: Callable[[], Any], convert: Callable[[Any], T], attempts: Attempts, request_id: str):
        self._start, self._convert, self._attempts = start, convert, attempts
        self.request_id, self._process = request_id, os.getpid()
        self._received = self._ended = False
        self._left = asyncio.Event()
        self._call: Any = None  # until it is started, which may fail
        self._call = start()

    def __aiter__(self) -> "AsyncStream[T]":
        return self

    async def __anext__(self) -> T:
        check_same_process(self._process, "stream")
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
            except asyncio.CancelledError:
                self._ended = True
                if _asked_to_stop():
                    raise
                raise self._was_left() from None
            except BaseException:
                await self.aclose()
                raise
        self._ended = True
        raise StopAsyncIteration

    async def _again(self, failure: grpc.aio.AioRpcError) -> None:
        """Start the call anew, or raise."""
        if self._left.is_set():
            raise self._was_left() from failure
        try:
            seconds = self._attempts.pause(failure, started=self._received)
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._left.wait()
        except BaseException:
            self._ended = True
            raise
        if self._left.is_set():
            raise self._was_left() from failure
        self._call = self._start()

    def _was_left(self) -> Cancelled:
        self._ended = True
        return Cancelled("the stream was left", Details(request_id=self.request_id))

    def cancel(self) -> None:
        """Cancel the call, from any task; the server frees what it holds. Whoever reads on gets `Cancelled`."""
        self._left.set()
        self._cancel_call()

    def _cancel_call(self) -> None:
        if self._call is not None and self._process == os.getpid():  # a forked child leaves its parent's call alone
            self._call.cancel()

    async def aclose(self) -> None:
        """Cancel the call, unless it has ended; there is nothing more to read."""
        self._ended = True
        self.cancel()

    async def __aenter__(self) -> "AsyncStream[T]":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._ended:
            self._cancel_call()


class AsyncExchange(Generic[Q, T]):
    """A session over one stream: a request, its answer, the next request."""

    def __init__(
        self, start: Callable[[], Any], opening: Q, convert: Callable[[Any], T], attempts: Attempts, request_id: str
    ) -> None:
        self._start, self._opening, self._convert, self._attempts = start, opening, convert, attempts
        self.request_id, self._process = request_id, os.getpid()
        self._received = self._closed = False
        self._call: Any = None

    async def ask(self, request: Q) -> T:
        """The answer to a request."""
        check_same_process(self._process, "session")
        while True:
            if self._closed:
                raise Cancelled("the session is closed", Details(request_id=self.request_id))
            try:
                return await self._write_and_read(request)
            except grpc.aio.AioRpcError as failure:
                await self._again(failure)
            except BaseException as failure:  # the next answer would be that to this request
                await self.close()
                if _asked_to_stop() or not isinstance(failure, asyncio.CancelledError):
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
        except asyncio.InvalidStateError:  # the call has ended already: reading tells why
            await self._call.read()
            raise
        except grpc.aio.AioRpcError as failure:
            if failure.details() != _LOST:
                raise
            details = "the server ended the session while a request was being sent"
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, failure.initial_metadata(), failure.trailing_metadata(), details
            ) from failure

    async def _again(self, failure: grpc.aio.AioRpcError) -> None:
        if self._closed:
            return
        try:
            await asyncio.sleep(self._attempts.pause(failure, started=self._received))
        except BaseException:
            await self.close()
            raise
        self._call = None

    async def close(self) -> None:
        """End the session; the server frees what it holds."""
        self._closed = True
        if self._call is not None and self._process == os.getpid():
            self._call.cancel()
