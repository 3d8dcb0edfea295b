"""Stubs that call a servicer in the same process, as grpc.aio stubs do: no socket, no serialisation.

    stub = InProcessStub(PriorService(engine, identity))
    async for block in stub.Sample(request, timeout=10): ...

Errors are `grpc.aio.AioRpcError`, as over a socket. A stream holds at most one message that was not read, so that a
slow reader slows its writer. Messages are passed by reference: neither side may change one that it has handed over.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from grpc.aio import AioRpcError, Metadata

from colaserve_services.rpc import requests, tracing, unread
from colaserve_services.rpc.errors import status_from_errors

PACKAGE = "colaserve.v1"
EOF: Any = grpc.aio.EOF


class InProcessStub:
    """Has a callable for every method of the service that `servicer` implements, called as on a grpc.aio stub."""

    def __init__(self, servicer: object):
        for method in service_descriptor(servicer).methods:
            setattr(self, method.name, _callable(getattr(servicer, method.name), method))


def service_descriptor(servicer: object) -> ServiceDescriptor:
    """The service that an object of a generated `<Service>Servicer` class implements."""
    for kind in type(servicer).__mro__:
        if kind.__module__.endswith("_pb2_grpc") and kind.__name__.endswith("Servicer"):
            return descriptor_pool.Default().FindServiceByName(f"{PACKAGE}.{kind.__name__.removesuffix('Servicer')}")
    raise TypeError(f"{type(servicer).__name__} is no servicer of {PACKAGE}")


def _callable(behavior: Any, method: MethodDescriptor) -> Callable[..., Any]:
    name = tracing.span_name((method.containing_service.name, method.name))

    def call(
        request: Any = None,
        *,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        **_: Any,  # credentials, compression and wait_for_ready mean nothing here
    ) -> Any:
        kind = StreamCall if method.server_streaming else UnaryCall
        return kind(behavior, name, request, method.client_streaming, timeout, metadata)

    return call


class _Mailbox:
    """Hands messages over one at a time; `put` returns when there is room for one more."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
        self._ended = False

    async def put(self, message: Any) -> None:
        await self._queue.put(message)

    async def get(self) -> Any:
        """The next message, or EOF; EOF again and again."""
        if self._ended:
            return EOF
        message = await self._queue.get()
        self._ended = message is EOF
        return message

    def empty(self) -> bool:
        return self._queue.empty()

    async def messages(self) -> AsyncIterator[Any]:
        while (message := await self.get()) is not EOF:
            yield message


class InProcessContext:
    """What a servicer is given beside the request; the part of grpc.aio.ServicerContext that services here use."""

    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...], deadline: float | None, out: _Mailbox):
        self._metadata, self._deadline, self._out = metadata, deadline, out
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()
        self._code, self._details = grpc.StatusCode.OK, ""
        self.inbox = _Mailbox()

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def peer(self) -> str:
        return "in-process"

    async def read(self) -> Any:
        return await self.inbox.get()

    async def write(self, message: Any) -> None:
        await self._out.put(message)

    def set_trailing_metadata(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        self._trailing = tuple(metadata)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> None:
        self._code, self._details = code, details
        self._trailing = tuple(trailing_metadata) or self._trailing
        raise grpc.aio.AbortError(details)


class _Call:
    """One running call, the part of grpc.aio.Call that services here use. The servicer runs in its own task.

    A call that is dropped before its end is cancelled, as in grpc.aio.
    """

    def __init__(
        self,
        behavior: Any,
        name: str,
        request: Any,
        client_streams: bool,
        timeout: float | None,
        metadata: Iterable[tuple[str, str | bytes]] | None,
    ):
        deadline = None if timeout is None else time.monotonic() + timeout
        self._out = _Mailbox()
        self._context = InProcessContext(tuple(metadata or ()), deadline, self._out)
        feed = request if client_streams else None
        argument = self._context.inbox.messages() if client_streams else request
        self._task = asyncio.create_task(_serve(behavior, name, argument, self._context, timeout, feed))
        self._task.add_done_callback(_retrieve)

    def __del__(self) -> None:
        task = getattr(self, "_task", None)
        if task is not None and not task.done() and not task.get_loop().is_closed():
            task.cancel()

    def cancel(self) -> bool:
        """End the call: the servicer is cancelled, the caller gets asyncio.CancelledError."""
        return self._task.cancel()

    async def trailing_metadata(self) -> Metadata:
        await self._ended()
        return Metadata(*self._context.trailing_metadata())

    async def code(self) -> grpc.StatusCode:
        """The status, once the call has ended."""
        error = await self._ended()
        return grpc.StatusCode.OK if error is None else error.code()

    async def details(self) -> str:
        error = await self._ended()
        return "" if error is None else error.details() or ""

    async def _ended(self) -> AioRpcError | None:
        await asyncio.wait([self._task])
        if self._task.cancelled():
            return _error(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
        error = self._task.exception()
        return error if isinstance(error, AioRpcError) else None


async def _serve(
    behavior: Any,
    name: str,
    argument: Any,
    context: InProcessContext,
    timeout: float | None,  # noqa: ASYNC109 - the caller's, not ours
    feed: Any,
) -> Any:
    requests.adopt(context.invocation_metadata())
    feeder = None if feed is None else asyncio.create_task(_feed(feed, context.inbox))
    try:
        with tracing.serving(name, context.invocation_metadata()) as span:
            async with asyncio.timeout(timeout):
                return await _run(behavior, argument, context, span)
    except TimeoutError as error:
        raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from error
    except grpc.aio.AbortError as error:
        raise _error(context.code(), context.details(), context.trailing_metadata()) from error
    finally:
        if feeder is not None:
            feeder.cancel()


async def _run(behavior: Any, argument: Any, context: InProcessContext, span: tracing.CallSpan) -> Any:
    async with status_from_errors(context):
        if not inspect.isasyncgenfunction(behavior):
            return await behavior(argument, context)
        with unread.endable():
            async with aclosing(behavior(argument, context)) as responses:
                async for response in responses:
                    span.block(**tracing.timing(response))  # before its reader may leave
                    await context.write(response)
        return None


async def _feed(messages: Any, inbox: _Mailbox) -> None:
    if hasattr(messages, "__aiter__"):
        async for message in messages:
            await inbox.put(message)
    else:
        for message in messages:
            await inbox.put(message)
    await inbox.put(EOF)


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # a caller that went away does not want to hear of it


class UnaryCall(_Call):
    """One response: `await call`."""

    def __await__(self) -> Generator[Any, None, Any]:
        return (yield from self._task.__await__())


class StreamCall(_Call):
    """Many responses: iterate over the call, or read(); write() and done_writing() when the caller streams too."""

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (response := await self.read()) is not EOF:
            yield response

    async def read(self) -> Any:
        """The next response, or EOF; raises the call's error after the responses before it."""
        try:
            return await self._next()
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def write(self, message: Any) -> None:
        """Hand a request over; raises asyncio.InvalidStateError once the call has ended, as grpc.aio does."""
        if self._task.done():
            raise asyncio.InvalidStateError("the call has ended")
        await self._hand_over(message)

    async def done_writing(self) -> None:
        """Say that no more requests come."""
        if not self._task.done():
            await self._hand_over(EOF)

    async def _next(self) -> Any:
        getter = asyncio.ensure_future(self._out.get())
        try:
            await asyncio.wait([getter, self._task], return_when=asyncio.FIRST_COMPLETED)
            if getter.done() or not self._out.empty():
                return await getter
            await asyncio.shield(self._task)
            return EOF
        finally:
            getter.cancel()

    async def _hand_over(self, message: Any) -> None:
        step = asyncio.ensure_future(self._context.inbox.put(message))
        try:
            await asyncio.wait([step, self._task], return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                await asyncio.shield(self._task)  # raises what ended the call
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            step.cancel()


def _error(code: grpc.StatusCode, details: str, trailing: Iterable[tuple[str, str | bytes]] = ()) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(*trailing), details, "")
