"""Calls over grpc.aio: with one answer, with a stream of them, and sessions; until when and how often each is tried."""

import asyncio
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any, Generic, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.message import Message

from colaserve.v1 import decoder_pb2, encoder_pb2, generation_pb2, latent_service_pb2, prior_pb2
from colaserve_client import errors
from colaserve_client.errors import Cancelled, DeadlineExceeded, Details, Overloaded, ServerError, Unavailable, invalid
from colaserve_client.latents import Latents, LatentsLike
from colaserve_client.loop import LOOP
from colaserve_client.results import DecodedBlock
from colaserve_client.settings import Retry

S = TypeVar("S")
T = TypeVar("T")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_FOREVER = 1e9  # seconds; gRPC takes a deadline that is much further away for one that has passed
_EOF: Any = getattr(grpc.aio, "EOF")  # noqa: B009 - type stubs do not know it
# Where a stream has ended before grpc.aio writes to it and the event loop has not yet heard of it, its true status is
# lost for one of INTERNAL with this text. A busy loop hears of it in three rounds.
_LOST, _ROUNDS = "Internal error from Core", 3


METHODS: Mapping[str, tuple[str, type[Message]]] = {  # path and type of the response by the name of the request
    method.input_type.full_name: (
        f"/{service.full_name}/{method.name}",
        message_factory.GetMessageClass(method.output_type),
    )
    for module in (generation_pb2, latent_service_pb2, encoder_pb2, prior_pb2, decoder_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def checked_timeout(timeout: float | None) -> float | None:
    """The timeout itself; `InvalidRequest` for what is no number of seconds above 0."""
    if timeout is not None and not (isinstance(timeout, Real) and timeout > 0):
        raise invalid("timeout", f"expected more than 0 seconds, got {timeout!r}")
    return timeout


def converted(convert: Callable[[S], T], answer: S, request_id: str) -> T:
    """What `convert` makes of an answer; `ServerError` when the answer is malformed."""
    try:
        return convert(answer)
    except (errors.ModelMismatch, ValueError) as error:  # as it would be the caller's fault in a request
        raise ServerError(f"malformed answer: {error}", Details(request_id=request_id)) from error


class Attempts:
    """The attempts of one call: until when, and with what pauses. One task uses it."""

    def __init__(
        self, retry: Retry, key: str | None = None, timeout: float | None = None, request_id: str = ""
    ) -> None:
        checked_timeout(timeout)
        self.request_id = request_id or uuid.uuid4().hex
        if not _REQUEST_ID.fullmatch(self.request_id):  # the server would choose another one
            raise invalid("request_id", f"expected 1 to 128 of A-Z a-z 0-9 . _ : / + = @ -, got {request_id!r}")
        self._retry, self._key, self._failures = retry, key, 0
        self._timeout = None if timeout is None or timeout > _FOREVER else timeout
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def arguments(self) -> dict[str, Any]:
        """What gRPC is given beside the request: the seconds that are left, and the metadata."""
        key = [("authorization", f"Bearer {self._key}")] if self._key else []
        return {"timeout": self._seconds_left(), "metadata": [("x-request-id", self.request_id), *key]}

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause(self, failure: grpc.RpcError, *, started: bool) -> float:
        """Seconds to wait before the next attempt; raises the typed error when there is to be none.

        `started`: something of the answer has come already, so that a new attempt would not be the same call.
        """
        failure = failure.with_traceback(None)  # its frames would keep the call, and with it the channel
        error = errors.error_from_rpc(failure, self.request_id)
        if isinstance(error, DeadlineExceeded) and self._timeout is not None:
            error = DeadlineExceeded(f"not done within the timeout of {self._timeout:g} s ({error})", error.details)
        self._failures += 1
        again = isinstance(error, Unavailable | Overloaded) and error.details.reason != errors.STEP_FAILED
        if started or not again or self._failures >= self._retry.attempts:
            raise error from failure
        hint = error.retry_after if isinstance(error, Overloaded) else None
        seconds = self._retry.pause(self._failures) if hint is None else hint
        seconds *= random.uniform(1.0, 1.2)  # apart from others that were refused just now
        left = self._seconds_left()
        if left is not None and seconds >= left:
            raise error from failure
        return seconds


class Call(Generic[T]):
    """A call with one answer, and what the other kinds have in common with it."""

    _left_as, _starts_at_once = "the call was cancelled", False

    def __init__(
        self, start: Callable[..., Any], request: Message, convert: Callable[[Any], T], attempts: Attempts
    ) -> None:
        self._start, self._request, self._convert, self._attempts = start, request, convert, attempts
        self._received = self._ended = False
        self._left = asyncio.Event()
        self._call: Any = None  # of grpc.aio, while it is open
        if self._starts_at_once:
            self._call = start(request)

    @property
    def request_id(self) -> str:
        """The call's x-request-id."""
        return self._attempts.request_id

    async def _answer(self) -> T:
        return self._taken(await self._start(self._request))

    def _taken(self, message: Any) -> T:
        self._received = True
        return converted(self._convert, message, self.request_id)

    async def _tried(self, attempt: Callable[[], Awaitable[S]]) -> S:
        """What an attempt gives; it is repeated where that is safe, and the call ends with what it raises."""
        LOOP.check()
        try:
            while not self._left.is_set():
                try:
                    return await attempt()
                except grpc.aio.AioRpcError as failure:
                    self._call = None
                    if not self._left.is_set():
                        with suppress(TimeoutError):
                            async with asyncio.timeout(self._attempts.pause(failure, started=self._received)):
                                await self._left.wait()
        except BaseException as error:
            self._end()
            task = asyncio.current_task()  # unless it is cancelled itself, a CancelledError in it comes of its call
            if (task is not None and task.cancelling() > 0) or not isinstance(error, asyncio.CancelledError):
                raise
        self._ended = True
        raise Cancelled(self._left_as, Details(request_id=self.request_id))

    def _leave(self, reason: str = "") -> None:
        """Cancel the call; whoever waits for an answer gets `Cancelled`."""
        self._left_as = reason or self._left_as
        self._left.set()
        self._cancel()

    def _end(self) -> None:
        """Cancel the call, of which nobody wants more."""
        self._ended = True
        self._leave()

    def _cancel(self) -> None:
        if self._call is not None and not LOOP.is_lost:  # a forked child leaves its parent's call alone
            self._call.cancel()
            self._call = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()


class AsyncStream(Call[T]):
    """The answers of a call as they come. Leaving early (break, `aclose`, end of `async with`) cancels the call."""

    _left_as, _starts_at_once = "the stream was left", True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        item = _EOF if self._ended else await self._tried(self._read)
        if item is _EOF:
            self._ended, self._call = True, None
            raise StopAsyncIteration
        return item

    async def _read(self) -> T:
        if self._call is None:
            self._call = self._start(self._request)
        message = await self._call.read()
        return message if message is _EOF else self._taken(message)

    def cancel(self) -> None:
        """Cancel the call, from any task; the server frees what it holds. Whoever reads on gets `Cancelled`."""
        self._leave()

    async def aclose(self) -> None:
        """Cancel the call, unless it has ended; there is nothing more to read."""
        self._end()

    def __del__(self) -> None:
        self._cancel()


class AsyncDecodeSession(Call[DecodedBlock]):
    """An open session of a decoder; `AsyncDecoderClient.session` makes it."""

    _left_as = "the session is closed"

    async def decode(self, block: LatentsLike) -> DecodedBlock:
        """Decode the next block, (B, d)."""
        return await self._ask(decoder_pb2.DecodeRequest(block=Latents.of(block, "block").to_proto()))

    async def preview(self, block: LatentsLike) -> DecodedBlock:
        """What the next block would be decoded to, (B, d); the session stays as it is."""
        return await self._ask(decoder_pb2.DecodeRequest(preview=Latents.of(block, "preview").to_proto()))

    async def _ask(self, request: decoder_pb2.DecodeRequest) -> DecodedBlock:
        """The answer to a request; the first one opens the session, which has no answer."""

        async def attempt() -> DecodedBlock:
            if self._call is None:
                self._call = self._start()
                await self._write(self._request)
            await self._write(request)
            answer = await self._call.read()
            if answer is _EOF:
                raise ServerError("the session ended without an answer", Details(request_id=self.request_id))
            return self._taken(answer)

        return await self._tried(attempt)

    async def _write(self, request: Message) -> None:
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

    async def close(self) -> None:
        """End the session and free what it holds."""
        self._end()
