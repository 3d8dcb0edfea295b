"""What happens to every call at a server's edge: request id, key, call limit, metrics, one log line, status."""

import asyncio
import logging
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode

from colaserve_services.errors import DeadlineExceeded, InvalidRequest
from colaserve_services.rpc import cancellation, requests, tracing
from colaserve_services.rpc.auth import Keys, has_role_certificate, is_role_key
from colaserve_services.rpc.call_limit import CallLimit
from colaserve_services.rpc.errors import end_with
from colaserve_services.rpc.garbage import Garbage
from colaserve_services.rpc.logs import access
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.request_bounds import RequestBounds

UNGUARDED: Final = "/grpc.health.v1."  # probes show no key, are not counted and not logged
FIRST_SECONDS: Final = 30.0  # that a call's first message may take to come
RESET_SECONDS: Final = 0.005  # until a call without a message is answered: one that was reset is cancelled meanwhile
# Callers of builds before December 2026 take only answers that end with a CRC-32, in a field that others skip. What
# they send ends with one too, and TLS has made it unnecessary: it is not looked at.
CHECKSUM: Final = ("x-colaserve-checksum", "crc32")
CHECKSUM_TAG: Final = b"\x9d\xa4\xe8\x03"  # field 1000003, fixed32
_NAMES: Final = {code.value[0]: code.name for code in StatusCode}


@dataclass(frozen=True)
class Method:
    """A method of a service, what serves it, and the gauge of its calls."""

    service: str  # without its package
    name: str
    handler: Any
    running: Any

    @property
    def labels(self) -> tuple[str, str]:
        return self.service, self.name


class Edge(grpc.aio.ServerInterceptor):
    """Wraps the handler of every method but those of the health service."""

    def __init__(
        self,
        metrics: Metrics,
        call_limit: CallLimit,
        keys: Keys | None = None,
        first_seconds: float = FIRST_SECONDS,
        role_key: str = "",
    ):
        """`role_key`: the key that the roles show each other."""
        self._metrics, self._call_limit, self._keys, self._first_seconds = metrics, call_limit, keys, first_seconds
        self._role_key = role_key
        self.bounds, self._garbage = RequestBounds(), Garbage()
        self._handlers: dict[str, Any] = {}  # by path

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """A handler of streams of bytes, whatever the method is: so the key is looked at before a message is read, the
        first message has a limited time to come, and each is checked before protobuf reads it. None for a method that
        is not implemented."""
        path: str = handler_call_details.method
        if path in self._handlers:
            return self._handlers[path]
        handler = await continuation(handler_call_details)
        if handler is None or path.startswith(UNGUARDED):
            return handler
        *_, service, name = path.replace("/", ".").split(".")
        method = Method(service, name, handler, self._metrics.requests_in_progress.labels(service, name))

        async def serve(received: AsyncIterator[bytes], context: Any) -> None:
            await self._serve(method, received, context)

        return self._handlers.setdefault(path, grpc.stream_stream_rpc_method_handler(serve))

    async def _serve(self, method: Method, received: AsyncIterator[bytes], context: Any) -> None:
        """Authenticate the client; answer, or end with the status of what is raised; count, time and log."""
        metadata, started, code, client, begun = context.invocation_metadata(), time.perf_counter(), "OK", "", False
        context.set_trailing_metadata(((requests.REQUEST_ID, requests.adopt(metadata)),))
        method.running.inc()
        with tracing.serving(tracing.span_name(method.labels), metadata) as span:
            try:
                try:
                    client = self._client(context)
                    first = [await self._first(received, method)]  # a call without a message takes no slot
                    begun = True
                    with self._call_limit.enter() if method.name not in requests.PROBES else nullcontext():
                        request = self._request(first.pop(), received, method)  # its bytes go here
                        await self._answer(request, method, context, span)
                except Exception as error:
                    await asyncio.sleep(0 if begun else RESET_SECONDS)
                    await end_with(error, context)
            except BaseException as error:
                code = _code(context, error)
                raise
            finally:
                method.running.dec()
                span.ended(code, failed=code not in ("OK", "CANCELLED"))
                quiet = code == "OK" if method.name in requests.PROBES else code == "CANCELLED" and not begun
                self._record(method, code, time.perf_counter() - started, client, quiet)

    async def _answer(self, request: Any, method: Method, context: Any, span: tracing.CallSpan) -> None:
        handler = method.handler
        if not handler.response_streaming:
            behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
            await self._write(await behavior(request, context), method, context)
            return
        behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
        begun = False
        with cancellation.endable():
            async with aclosing(behavior(request, context)) as responses:  # however the call ends
                async for response in responses:
                    if not begun:  # by itself: grpc.aio would send a first write that is broken off with the status
                        await context.send_initial_metadata(())
                        begun = True
                    span.block(response)  # before its reader may leave
                    await self._write(response, method, context)

    async def _write(self, response: Any, method: Method, context: Any) -> None:
        message: bytes = method.handler.response_serializer(response)
        if requests.value(context.invocation_metadata(), CHECKSUM[0]) == CHECKSUM[1]:
            message += CHECKSUM_TAG + zlib.crc32(message).to_bytes(4, "little")
        self._metrics.transfer_bytes.labels("out", method.service).inc(len(message))
        try:
            await context.write(message)
        except grpc.aio.InternalError as error:  # the caller has gone
            raise asyncio.CancelledError from error

    async def _first(self, received: AsyncIterator[bytes], method: Method) -> bytes | None:
        """The first message, None where the stream ends without one."""
        try:
            async with asyncio.timeout(self._first_seconds):
                if (message := await anext(received, None)) is None:
                    await asyncio.sleep(RESET_SECONDS)
                return message
        except TimeoutError as error:
            waited = f"no message of {method.name} came within {self._first_seconds:g} s"
            raise DeadlineExceeded(waited) from error

    def _request(self, first: bytes | None, rest: AsyncIterator[bytes], method: Method) -> Any:
        """A message, or an async iterator of them."""
        if method.handler.request_streaming:
            return self._stream(first, rest, method)
        if first is None:
            raise InvalidRequest("request", f"got no message, expected one request of {method.name}")
        return self._message(first, method)

    async def _stream(self, first: bytes | None, rest: AsyncIterator[bytes], method: Method) -> AsyncIterator[Any]:
        if first is not None:
            yield self._message(first, method)
        async for message in rest:
            yield self._message(message, method)

    def _message(self, received: bytes, method: Method) -> Any:
        self._metrics.transfer_bytes.labels("in", method.service).inc(len(received))
        self._garbage.received(len(received))
        read = method.handler.request_deserializer  # the class's FromString
        self.bounds.check(method.name, received, read.__self__.DESCRIPTOR)
        try:
            return read(received)
        except DecodeError as error:
            raise InvalidRequest("request", f"{len(received)} bytes that are no request of {method.name}") from error

    def _client(self, context: Any) -> str:
        """Who calls: the name of its key, else its address. A role may say for whom it calls."""
        metadata, address = context.invocation_metadata(), str(context.peer()).rpartition(":")[0]
        shown = requests.value(metadata, requests.AUTHORIZATION)
        key = None if self._keys is None else self._keys.identify(shown)
        requests.set_caller(key, address)
        if is_role_key(shown, self._role_key) or has_role_certificate(context):
            requests.adopt_caller(metadata)
        return address if key is None else key

    def _record(self, method: Method, code: str, seconds: float, client: str, quiet: bool) -> None:
        self._metrics.request_seconds.labels(*method.labels, code).observe(seconds)
        fields = {"service": method.service, "method": method.name, "code": code, "seconds": round(seconds, 4)}
        access.log(logging.DEBUG if quiet else logging.INFO, "call", extra={"fields": fields | {"client": client}})


def _code(context: Any, error: BaseException) -> str:
    """The name of the status that a call ended with."""
    given = context.code()
    if number := given.value[0] if isinstance(given, StatusCode) else int(given or 0):
        return _NAMES.get(number, "UNKNOWN")
    if not isinstance(error, asyncio.CancelledError):
        return "UNKNOWN"
    remaining = context.time_remaining()
    return "DEADLINE_EXCEEDED" if remaining is not None and remaining <= 0 else "CANCELLED"
