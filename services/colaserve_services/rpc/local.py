"""Calls within one process: a stub that calls a servicer as grpc.aio stubs do, without a socket and serialisation.

    stub = LocalStub(PriorService(engine, identity))
    async for block in stub.Sample(request, timeout=10): ...

Errors are `grpc.aio.AioRpcError`, as over a socket. One response waits unread, so that a slow reader slows its writer.
Messages are passed by reference: neither side may change one that it has handed over.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor
from grpc.aio import AioRpcError, Metadata

from colaserve_services.errors import DeadlineExceeded
from colaserve_services.rpc import cancellation, requests, tracing
from colaserve_services.rpc.errors import rpc_error
from colaserve_services.rpc.server import service_descriptor

EOF: Any = grpc.aio.EOF


class LocalStub:
    """Has a callable for every method of the service that `servicer` implements."""

    def __init__(self, servicer: object):
        for method in service_descriptor(servicer).methods:
            setattr(self, method.name, partial(LocalCall, getattr(servicer, method.name), method))


class LocalCall:
    """A running call, whose servicer runs in a task: what is used here of grpc.aio's Call and of its ServicerContext.
    `await` it for one response; iterate over it, or read(), for many; write() where the caller streams too."""

    def __init__(
        self,
        behavior: Callable[..., Any],
        method: MethodDescriptor,
        request: Any = None,
        *,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
    ):
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._metadata = tuple(metadata or ())
        self._requests, self._responses = asyncio.Queue[Any](), asyncio.Queue[Any]()
        self._unread = asyncio.Semaphore(1)  # held by the response that waits
        argument = self._received() if method.client_streaming else request
        self._task = asyncio.create_task(self._serve(behavior, method, argument))
        self._task.add_done_callback(self._end)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (response := await self.read()) is not EOF:
            yield response

    async def read(self) -> Any:
        """The next response, or EOF; raises the call's error after the responses before it."""
        try:
            response = await self._responses.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if response is EOF:
            self._responses.put_nowait(EOF)  # for the next look
            await self._task
            return EOF
        self._unread.release()
        return response

    async def write(self, message: Any) -> None:
        """Hand a request over; raises the call's error, or asyncio.InvalidStateError, once it has ended."""
        if self._task.done():
            await self._task
            raise asyncio.InvalidStateError("the call has ended")
        self._requests.put_nowait(message)

    def cancel(self) -> bool:
        """End the call: the servicer is cancelled, the caller gets asyncio.CancelledError."""
        return self._task.cancel()

    def invocation_metadata(self) -> requests.Metadata:
        return self._metadata

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def peer(self) -> str:
        return "in-process"

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        """End the call with this status."""
        raise AioRpcError(code, Metadata(), Metadata(), details)

    async def _serve(self, behavior: Callable[..., Any], method: MethodDescriptor, argument: Any) -> Any:
        requests.adopt(self._metadata)
        requests.adopt_caller(self._metadata)
        name = tracing.span_name((method.containing_service.name, method.name))
        try:
            with tracing.serving(name, self._metadata) as span:
                async with asyncio.timeout(self.time_remaining()) as timer:
                    if not method.server_streaming:
                        return await behavior(argument, self)
                    with cancellation.endable():
                        async with aclosing(behavior(argument, self)) as responses:
                            async for response in responses:
                                span.block(response)  # before its reader may leave
                                await self._unread.acquire()
                                self._responses.put_nowait(response)
                    return None
        except AioRpcError:
            raise
        except Exception as error:
            late = isinstance(error, TimeoutError) and timer.expired()
            raise rpc_error(DeadlineExceeded("the deadline has passed") if late else error) from error

    async def _received(self) -> AsyncIterator[Any]:
        """The requests, as the servicer reads them."""
        while True:
            yield await self._requests.get()

    def _end(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # a caller that went away does not want to hear of it
        self._responses.put_nowait(EOF)
