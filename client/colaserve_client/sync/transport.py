"""Calls over blocking gRPC: unary, server streams, sessions. `aio/transport.py` is its twin for asyncio."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc

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
from colaserve_client.errors import Cancelled, Details, ServerError, invalid
from colaserve_client.sync.shield import SIGNAL_CHECK_SECONDS, Shield

S = TypeVar("S")
T = TypeVar("T")
_NOTHING_LEFT: Any = object()
_LOOK_AHEAD = 4  # times the concurrency: results that may wait for a slow one before them
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # a HealthCheckResponse whose status is SERVING


class Transport:
    """The connection of a client; any number of threads may use it at once."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._options = channel_options(config.target, config.connection, config.tls)
        self._credentials = None if config.tls is None else credentials(config.tls)
        self._parents: Any = None  # the channel of the process that this one was forked from: never touched again
        self._closed = False
        self._open()

    def _open(self) -> None:
        self._process, self._shield = os.getpid(), Shield()
        self._channel: Any = (
            grpc.insecure_channel(self._config.target, options=self._options)
            if self._credentials is None
            else grpc.secure_channel(self._config.target, self._credentials, options=self._options)
        )

    def _open_channel(self) -> Any:
        if self._closed:
            raise Cancelled("the client is closed")
        if forked(self._process):
            self._parents = (self._parents, self._channel)
            self._open()
        return self._channel

    def unary(self, method: Method[Q, R], request: Q, convert: Callable[[R], T], options: CallOptions) -> T:
        """One answer, converted; tried again where that is safe."""
        options = options.resolved(self._config)
        attempts = Attempts(self._config.retry, options, lambda: self._closed)
        call = self._open_channel().unary_unary(method.path, method.serialize, method.deserialize)
        while True:
            try:
                answer = self._answer(call, request, attempts.remaining(), options)
                return converted(convert, answer, options.request_id)
            except grpc.RpcError as failure:
                time.sleep(attempts.pause(failure, started=False))

    def _answer(self, call: Any, request: Any, timeout: float | None, options: CallOptions) -> Any:
        """One answer, or gRPC's error; Ctrl-C cancels the call."""
        metadata = options.metadata(self._config)
        if not Shield.needed():
            return call(request, timeout=timeout, metadata=metadata)
        running = self._shield.run(lambda: call.future(request, timeout=timeout, metadata=metadata))
        try:
            return self._shield.run(running.result)
        except grpc.RpcError:
            raise
        except BaseException:
            running.cancel()
            raise

    def stream(self, method: Method[Q, R], request: Q, convert: Callable[[R], T], options: CallOptions) -> "Stream[T]":
        """Answers as they come, converted."""
        options = options.resolved(self._config)
        attempts = Attempts(self._config.retry, options, lambda: self._closed)
        call = self._open_channel().unary_stream(method.path, method.serialize, method.deserialize)

        def start() -> Any:
            return call(request, timeout=attempts.remaining(), metadata=options.metadata(self._config))

        return Stream(start, convert, attempts, options.request_id, self._shield)

    def exchange(
        self, method: Method[Q, R], opening: Q, convert: Callable[[R], T], options: CallOptions
    ) -> "Exchange[Q, T]":
        """A session: it is opened by a request without an answer, then each request gets one, converted."""
        options = options.resolved(self._config)
        attempts = Attempts(self._config.retry, options, lambda: self._closed)
        call = self._open_channel().stream_stream(method.path, method.serialize, method.deserialize)

        def start(requests: Iterator[Q]) -> Any:
            return call(requests, timeout=attempts.remaining(), metadata=options.metadata(self._config))

        return Exchange(start, opening, convert, attempts, options.request_id, self._shield)

    def healthy(self, timeout: float) -> bool:
        """Whether the server says that it serves; False too when it cannot be reached."""
        options = CallOptions(timeout).resolved(self._config)
        try:
            call = self._open_channel().unary_unary(_HEALTH)
            return bool(self._answer(call, b"", options.timeout, options) == _SERVING)
        except grpc.RpcError:
            return False

    def map(self, function: Callable[[S], T], items: Iterable[S], concurrency: int) -> Generator[T, None, None]:
        """What `function` makes of the items, in their order, so many at a time; leaving early cancels the rest."""
        if concurrency < 1:
            raise invalid("concurrency", f"expected 1 or more, got {concurrency}")
        batch = _Batch()

        def one(item: S) -> T:
            _batch_of_thread.value = batch
            return function(item)

        source, window = iter(items), deque[Future[T]]()
        with ThreadPoolExecutor(concurrency, thread_name_prefix="colaserve-batch") as pool:
            try:
                while True:
                    while (
                        len(window) < _LOOK_AHEAD * concurrency
                        and (item := next(source, _NOTHING_LEFT)) is not _NOTHING_LEFT
                    ):
                        window.append(pool.submit(one, item))
                    if not window:
                        return
                    yield _result(window.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                batch.cancel()

    def close(self) -> None:
        """Cancel what runs and disconnect; no call can be made afterwards."""
        self._closed = True
        if self._process == os.getpid():
            self._channel.close()
            self._shield.close()


def _result(future: Future[T]) -> T:
    """Its result once it is there. Waiting without a timeout may miss Ctrl-C (gRPC's calls wait in the same way)."""
    while not wait([future], timeout=SIGNAL_CHECK_SECONDS).done:
        pass
    return future.result()


class _Batch:
    """The streams that the threads of one `map` have open, to cancel them together."""

    def __init__(self) -> None:
        self._streams: set[Stream[Any]] = set()
        self._cancelled, self._lock = False, threading.Lock()

    def add(self, stream: "Stream[Any]") -> None:
        """Cancel it with the others, at once when they are cancelled already."""
        with self._lock:
            self._streams.add(stream)
        if self._cancelled:
            stream.cancel()

    def discard(self, stream: "Stream[Any]") -> None:
        """It has ended."""
        with self._lock:
            self._streams.discard(stream)

    def cancel(self) -> None:
        """Cancel all, and all that are still added."""
        self._cancelled = True
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()


class _BatchOfThread(threading.local):
    value: _Batch | None = None  # set in the threads of a `map`


_batch_of_thread = _BatchOfThread()


class Stream(Generic[T]):
    """The answers of a call as they come. Leaving early (break, `close`, end of `with`, Ctrl-C) cancels the call."""

    def __init__(
        self,
        start: Callable[[], Any],
        convert: Callable[[Any], T],
        attempts: Attempts,
        request_id: str,
        shield: Shield,
    ) -> None:
        self._start, self._convert, self._attempts, self._shield = start, convert, attempts, shield
        self.request_id, self._process = request_id, os.getpid()
        self._received = self._ended = False
        self._left = threading.Event()
        self._call: Any = None  # until it is started, which Ctrl-C may prevent
        self._call = shield.run(start)
        self._batch = _batch_of_thread.value
        if self._batch is not None:
            self._batch.add(self)

    def __iter__(self) -> "Stream[T]":
        return self

    def __next__(self) -> T:
        check_same_process(self._process, "stream")
        while not self._ended:
            if self._left.is_set():
                raise self._was_left()
            try:
                message = self._shield.run(self._call.__next__)
                self._received = True
                return converted(self._convert, message, self.request_id)
            except grpc.RpcError as failure:
                self._again(failure)
            except StopIteration:
                break
            except BaseException:
                self.close()
                raise
        self._end()
        raise StopIteration

    def _again(self, failure: grpc.RpcError) -> None:
        """Start the call anew, or raise."""
        if self._left.is_set():
            raise self._was_left() from failure
        try:
            seconds = self._attempts.pause(failure, started=self._received)
        except BaseException:
            self._end()
            raise
        if not self._left.wait(seconds):
            self._call = self._shield.run(self._start)
        if self._left.is_set():  # perhaps while the call was started, which then is not the one that was cancelled
            self._call.cancel()
            raise self._was_left() from failure

    def _was_left(self) -> Cancelled:
        self._end()
        return Cancelled("the stream was left", Details(request_id=self.request_id))

    def _end(self) -> None:
        self._ended = True
        if self._batch is not None:
            self._batch.discard(self)

    def cancel(self) -> None:
        """Cancel the call, from any thread; the server frees what it holds. Whoever reads on gets `Cancelled`."""
        self._left.set()
        self._cancel_call()

    def _cancel_call(self) -> None:
        if self._call is not None and self._process == os.getpid():  # a forked child leaves its parent's call alone
            self._call.cancel()

    def close(self) -> None:
        """Cancel the call, unless it has ended; there is nothing more to read."""
        self._end()
        self.cancel()

    def __enter__(self) -> "Stream[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._ended:
            self._cancel_call()


class Exchange(Generic[Q, T]):
    """A session over one stream: a request, its answer, the next request."""

    def __init__(
        self,
        start: Callable[[Iterator[Q]], Any],
        opening: Q,
        convert: Callable[[Any], T],
        attempts: Attempts,
        request_id: str,
        shield: Shield,
    ) -> None:
        self._start, self._opening, self._convert, self._attempts = start, opening, convert, attempts
        self._shield = shield
        self.request_id, self._process = request_id, os.getpid()
        self._received = self._closed = False
        self._call: Any = None
        self._requests: SimpleQueue[Q | None] = SimpleQueue()

    def ask(self, request: Q) -> T:
        """The answer to a request."""
        check_same_process(self._process, "session")
        while True:
            if self._closed:
                raise Cancelled("the session is closed", Details(request_id=self.request_id))
            try:
                return self._write_and_read(request)
            except grpc.RpcError as failure:
                self._again(failure)
            except StopIteration:
                raise ServerError("the session ended without an answer", Details(request_id=self.request_id)) from None
            except BaseException:
                self.close()
                raise

    def _write_and_read(self, request: Q) -> T:
        if self._call is None:
            self._requests = SimpleQueue()
            requests = iter(self._requests.get, None)
            self._call = self._shield.run(lambda: self._start(requests))
            self._requests.put(self._opening)
        self._requests.put(request)
        answer = self._shield.run(self._call.__next__)
        self._received = True
        return converted(self._convert, answer, self.request_id)

    def _again(self, failure: grpc.RpcError) -> None:
        self._requests.put(None)  # ends gRPC's thread that sends
        if self._closed:
            return
        try:
            time.sleep(self._attempts.pause(failure, started=self._received))
        except BaseException:
            self.close()
            raise
        self._call = None

    def close(self) -> None:
        """End the session; the server frees what it holds."""
        self._closed = True
        if self._process != os.getpid():  # a forked child leaves its parent's call alone
            return
        self._requests.put(None)
        if self._call is not None:
            self._call.cancel()
