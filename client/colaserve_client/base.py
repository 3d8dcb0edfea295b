# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which the server sees too
"""What all asyncio clients share: how they connect, how they call, and that they are context managers."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar
from weakref import WeakSet

import grpc.aio
from google.protobuf.message import Message

from colaserve_client.calls import AsyncStream, Attempts, Call, checked_timeout, method_of
from colaserve_client.channel import channel_to, checked_key, checked_target
from colaserve_client.errors import Cancelled, Unavailable
from colaserve_client.loop import LOOP
from colaserve_client.settings import DEFAULT_TARGET, Connection, Retry, Tls

C = TypeVar("C", bound=Call[Any])
T = TypeVar("T")
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # a HealthCheckResponse whose status is SERVING


class AsyncBaseClient:
    """A connection to one server.

    Args:
        target: "host:port", or a name that gRPC resolves, such as "dns:///host:port".
        key: sent as bearer key with every call.
        tls: None means not encrypted.
        timeout: seconds that a call may take, retries included, where the call itself gives none; None: no deadline.
        retry: how often a call is tried that failed before anything came back; None: `Retry()`.
        connection: keepalive, message sizes, load balancing; None: `Connection()`.

    Raises `InvalidRequest` for a setting that makes no sense. Connecting happens with the first call.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        key: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        connection: Connection | None = None,
    ) -> None:
        self._target = checked_target(target)
        self._key = None if key is None else checked_key(key)
        self._timeout, self._retry = checked_timeout(timeout), retry or Retry()
        self._open = channel_to(self._target, tls, connection or Connection())
        self._channel: Any = None  # opened by the first call, since it belongs to the running event loop
        self._closed = False
        self._calls: WeakSet[Call[Any]] = WeakSet()

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._target

    async def healthy(self, timeout: float = 5.0) -> bool:
        """Whether the server answers within `timeout` seconds that it is ready to serve (grpc.health.v1)."""
        try:
            call = self._connected().unary_unary(_HEALTH)
            return bool(await call(b"", **self._attempts({"timeout": timeout}).arguments()) == _SERVING)
        except grpc.aio.AioRpcError:
            return False

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return as soon as the server is ready; `Unavailable` when it is not within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not await self.healthy(max(deadline - time.monotonic(), 0.1)):  # it is called once at least
            if (left := deadline - time.monotonic()) <= 0:
                raise Unavailable(f"{self._target} was not ready within {timeout:g} s")
            await asyncio.sleep(min(0.1, left))

    async def close(self) -> None:
        """Cancel what runs and disconnect."""
        self._closed = True
        for call in list(self._calls):
            call._leave("the client was closed")
        await self._disconnect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _unary(self, request: Message, convert: Callable[[Any], T], settings: Mapping[str, Any]) -> T:
        """One answer, converted."""
        call = self._begun(Call[T], "unary_unary", request, convert, settings)
        return await call._tried(call._answer)

    def _stream(self, request: Message, convert: Callable[[Any], T], settings: Mapping[str, Any]) -> AsyncStream[T]:
        """Answers as they come, converted."""
        return self._begun(AsyncStream[T], "unary_stream", request, convert, settings)

    def _begun(
        self,
        kind: Callable[..., C],
        shape: str,
        request: Message,
        convert: Callable[[Any], Any],
        settings: Mapping[str, Any],
    ) -> C:
        """A call of the method that takes such requests; `settings` holds its timeout and its request id."""
        path, response = method_of(request)
        attempts = self._attempts(settings)
        self._connected()

        def start(*arguments: Message) -> Any:
            callable_ = getattr(self._connected(), shape)(path, type(request).SerializeToString, response.FromString)
            return callable_(*arguments, **attempts.arguments())

        call = kind(start, request, convert, attempts)
        self._calls.add(call)
        return call

    def _attempts(self, settings: Mapping[str, Any]) -> Attempts:
        timeout = settings.get("timeout")
        timeout = self._timeout if timeout is None else timeout
        return Attempts(self._retry, self._key, timeout, settings.get("request_id", ""))

    def _connected(self) -> Any:
        if self._closed:
            raise Cancelled("the client is closed")
        LOOP.check()
        if self._channel is None:
            self._channel = self._open()
        return self._channel

    def _is_busy(self) -> bool:
        """Whether a stream or a session is open."""
        return any(call._is_open() for call in self._calls)

    async def _disconnect(self) -> None:
        """Cancel what runs; the next call connects anew."""
        channel, self._channel = self._channel, None
        if channel is not None and not LOOP.is_lost:
            await channel.close()
