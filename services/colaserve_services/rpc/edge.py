"""What happens to every call at a server's edge: request id, key, admission, metrics, one log line, status."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode

from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc import checksums, requests, tracing
from colaserve_services.rpc.admission import Admission
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.errors import status_from_errors
from colaserve_services.rpc.logs import access
from colaserve_services.rpc.metrics import Metrics

UNGUARDED = "/grpc.health.v1."  # probes show no key, are not counted and not logged
NAMES = {code.value[0]: code.name for code in StatusCode}


class Method(NamedTuple):
    service: str  # without its package
    name: str


class Edge(grpc.aio.ServerInterceptor):
    """Wraps the handler of every method but those of the health service."""

    def __init__(self, metrics: Metrics, admission: Admission, keys: Keys | None = None):
        self._metrics, self._admission, self._keys = metrics, admission, keys

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
        """A handler that takes and gives bytes: messages are read here, so that what is none is the caller's error."""
        behavior = next(
            found
            for found in (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
            if found is not None
        )
        kind = f"{_word(handler.request_streaming)}_{_word(handler.response_streaming)}_rpc_method_handler"
        serve = self._streaming if handler.response_streaming else self._unary
        return getattr(grpc, kind)(serve(behavior, method, handler))

    def _unary(self, behavior: Any, method: Method, handler: Any) -> Any:
        async def serve(received: Any, context: Any) -> bytes:
            sealed = checksums.asked(context.invocation_metadata())
            async with self._call(method, context):
                response = await behavior(self._read(received, method, handler, sealed), context)
                return self._written(response, method, handler, sealed)

        return serve

    def _streaming(self, behavior: Any, method: Method, handler: Any) -> Any:
        async def serve(received: Any, context: Any) -> None:
            sealed = checksums.asked(context.invocation_metadata())
            async with (
                self._call(method, context) as span,
                aclosing(behavior(self._read(received, method, handler, sealed), context)) as responses,
            ):  # the handler is closed here and now, however its call ends
                async for response in responses:
                    span.block(**tracing.timing(response))  # before its reader may leave
                    await _write(context, self._written(response, method, handler, sealed))

        return serve

    def _read(self, received: Any, method: Method, handler: Any, sealed: bool) -> Any:
        if handler.request_streaming:
            return self._read_stream(received, method, handler, sealed)
        return self._message(received, method, handler, sealed)

    async def _read_stream(self, received: Any, method: Method, handler: Any, sealed: bool) -> AsyncIterator[Any]:
        async for message in received:
            yield self._message(message, method, handler, sealed)

    def _message(self, received: bytes, method: Method, handler: Any, sealed: bool) -> Any:
        self._metrics.transfer_bytes.labels("in", method.service).inc(len(received))
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
    async def _call(self, method: Method, context: Any) -> AsyncIterator[tracing.CallSpan]:
        request_id = requests.adopt(context.invocation_metadata())
        context.set_trailing_metadata(((requests.REQUEST_ID, request_id),))
        with tracing.serving(tracing.span_name(method), context.invocation_metadata()) as span:
            async with self._counted(method, context, span):
                yield span

    @asynccontextmanager
    async def _counted(self, method: Method, context: Any, span: tracing.CallSpan) -> AsyncIterator[None]:
        running = self._metrics.requests_in_progress.labels(*method)
        running.inc()
        started, code, client = time.perf_counter(), "OK", ""
        try:
            async with status_from_errors(context):
                client = self._client(context)
                with self._admission.enter(client) if method.name != "GetInfo" else _nothing():
                    yield
        except asyncio.CancelledError:
            code = _why_cancelled(context)
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
            shown = requests.value(context.invocation_metadata(), requests.AUTHORIZATION)
            return self._keys.identify(shown)
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


class _nothing:  # noqa: N801 - reads as a word where it is used
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _word(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _number(code: Any) -> int:
    return code.value[0] if isinstance(code, StatusCode) else int(code or 0)


def _why_cancelled(context: Any) -> str:
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    return (StatusCode.DEADLINE_EXCEEDED if late else StatusCode.CANCELLED).name
