"""What happens to every call at a server's edge: request id, key, admission, metrics, one log line, status."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode

from colaserve_services.errors import DeadlineExceeded, InvalidRequest
from colaserve_services.rpc import checksums, requests, tracing, unread
from colaserve_services.rpc.admission import Admission
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.errors import status_from_errors
from colaserve_services.rpc.garbage import Garbage
from colaserve_services.rpc.logs import access
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.request_bounds import RequestBounds

UNGUARDED = "/grpc.health.v1."  # probes show no key, are not counted and not logged
FIRST_SECONDS = 30.0  # that a call's first message may take to come
NAMES = {code.value[0]: code.name for code in StatusCode}


class Method(NamedTuple):
    service: str  # without its package
    name: str


class Call(NamedTuple):
    request: Any  # a message, or an async iterator of them
    span: tracing.CallSpan
    sealed: bool  # whether its messages carry checksums


class Edge(grpc.aio.ServerInterceptor):
    """Wraps the handler of every method but those of the health service."""

    def __init__(
        self, metrics: Metrics, admission: Admission, keys: Keys | None = None, first_seconds: float = FIRST_SECONDS
    ):
        self._metrics, self._admission, self._keys, self._first_seconds = metrics, admission, keys, first_seconds
        self.bounds, self._garbage = RequestBounds(), Garbage()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The wrapped handler, or None for a method that nobody implements."""
        handler = await continuation(handler_call_details)
        path: str = handler_call_details.method
        if handler is None or path.startswith(UNGUARDED):
            return handler
        service, _, name = path.lstrip("/").rpartition("/")
        return self._wrap(handler, Method(service.rpartition(".")[2], name))

    def _wrap(self, handler: Any, method: Method) -> Any:
        """A handler of streams of bytes, whatever the method is: so the key is looked at before a message is read, the
        first message has a limited time to come, and each is checked before protobuf reads it."""
        serve = self._streaming if handler.response_streaming else self._unary
        return grpc.stream_stream_rpc_method_handler(serve(handler, method))

    def _unary(self, handler: Any, method: Method) -> Any:
        behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def serve(received: AsyncIterator[bytes], context: Any) -> None:
            async with self._call(received, method, handler, context) as call:
                response = await behavior(call.request, context)
                await _write(context, self._written(response, method, handler, call.sealed))

        return serve

    def _streaming(self, handler: Any, method: Method) -> Any:
        behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def serve(received: AsyncIterator[bytes], context: Any) -> None:
            async with self._call(received, method, handler, context) as call:
                with unread.endable():
                    async with aclosing(behavior(call.request, context)) as responses:  # however the call ends
                        await self._send(responses, method, handler, context, call)

        return serve

    async def _send(
        self, responses: AsyncIterator[Any], method: Method, handler: Any, context: Any, call: Call
    ) -> None:
        begun = False
        async for response in responses:
            if not begun:  # by itself: when a first write is broken off, grpc.aio would send it again with the status
                await context.send_initial_metadata(())
                begun = True
            call.span.block(**tracing.timing(response))  # before its reader may leave
            await _write(context, self._written(response, method, handler, call.sealed))

    async def _first(self, received: AsyncIterator[bytes], method: Method) -> bytes | None:
        """The first message, None where the stream ends without one."""
        try:
            async with asyncio.timeout(self._first_seconds):
                return await anext(received, None)
        except TimeoutError as error:
            waited = f"no message of {method.name} came within {self._first_seconds:g} s"
            raise DeadlineExceeded(waited) from error

    def _request(
        self, first: bytes | None, rest: AsyncIterator[bytes], method: Method, handler: Any, sealed: bool
    ) -> Any:
        if handler.request_streaming:
            return self._stream(first, rest, method, handler, sealed)
        if first is None:
            raise InvalidRequest("request", f"got no message, expected one request of {method.name}")
        return self._message(first, method, handler, sealed)

    async def _stream(
        self, first: bytes | None, rest: AsyncIterator[bytes], method: Method, handler: Any, sealed: bool
    ) -> AsyncIterator[Any]:
        if first is not None:
            yield self._message(first, method, handler, sealed)
        async for message in rest:
            yield self._message(message, method, handler, sealed)

    def _message(self, received: bytes, method: Method, handler: Any, sealed: bool) -> Any:
        self._metrics.transfer_bytes.labels("in", method.service).inc(len(received))
        self._garbage.received(len(received))
        self.bounds.check(method.name, received)
        received = checksums.opened(received, required=sealed)
        try:
            return handler.request_deserializer(received)
        except DecodeError as error:
            raise InvalidRequest("request", f"{len(received)} bytes that are no request of {method.name}") from error

    def _written(self, response: Any, method: Method, handler: Any, sealed: bool) -> bytes:
        message: bytes = handler.response_serializer(response)
        if sealed:
            message = checksums.seal(message)
        self._metrics.transfer_bytes.labels("out", method.service).inc(len(message))
        return message

    @asynccontextmanager
    async def _call(
        self, received: AsyncIterator[bytes], method: Method, handler: Any, context: Any
    ) -> AsyncIterator[Call]:
        await asyncio.sleep(0)  # a call that was reset at once ends here, at little cost
        metadata = context.invocation_metadata()
        request_id = requests.adopt(metadata)
        context.set_trailing_metadata(((requests.REQUEST_ID, request_id),))
        sealed = checksums.asked(metadata)
        with tracing.serving(tracing.span_name(method), metadata) as span:
            async with self._counted(method, context, span) as client:
                first = [await self._first(received, method)]  # who sends nothing takes no slot
                with self._admission.enter(client) if method.name != "GetInfo" else nullcontext():
                    request = self._request(first.pop(), received, method, handler, sealed)  # its bytes go here
                    yield Call(request, span, sealed)

    @asynccontextmanager
    async def _counted(self, method: Method, context: Any, span: tracing.CallSpan) -> AsyncIterator[str]:
        running = self._metrics.requests_in_progress.labels(*method)
        running.inc()
        started, code, client = time.perf_counter(), "OK", ""
        try:
            async with status_from_errors(context):
                client = self._client(context)
                yield client
        except asyncio.CancelledError:
            code = _why_cancelled(context) if not _number(context.code()) else NAMES[_number(context.code())]
            raise
        except BaseException:
            code = NAMES.get(_number(context.code()), "UNKNOWN")
            raise
        finally:
            running.dec()
            span.ended(code, failed=code not in ("OK", "CANCELLED"))
            self._record(method, code, time.perf_counter() - started, client)

    def _client(self, context: Any) -> str:
        if self._keys is not None:
            return self._keys.identify(requests.value(context.invocation_metadata(), requests.AUTHORIZATION))
        return str(context.peer()).rpartition(":")[0]

    def _record(self, method: Method, code: str, seconds: float, client: str) -> None:
        self._metrics.request_seconds.labels(*method, code).observe(seconds)
        told = {"service": method.service, "method": method.name, "code": code, "seconds": round(seconds, 4)}
        level = logging.DEBUG if method.name == "GetInfo" and code == "OK" else logging.INFO  # asked every second
        access.log(level, "call", extra={"fields": told | {"client": client}})


async def _write(context: Any, message: bytes) -> None:
    try:
        await context.write(message)
    except grpc.aio.InternalError as error:  # nobody is at the other end any more
        raise asyncio.CancelledError from error


def _number(code: Any) -> int:
    return code.value[0] if isinstance(code, StatusCode) else int(code or 0)


def _why_cancelled(context: Any) -> str:
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    return (StatusCode.DEADLINE_EXCEEDED if late else StatusCode.CANCELLED).name
