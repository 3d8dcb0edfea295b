# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which the server sees too
"""What all asyncio clients share: how they connect, and that they are context managers."""

import asyncio
import time
from types import TracebackType
from typing import Self

from colaserve_client.channel import ClientConfig
from colaserve_client.errors import Unavailable
from colaserve_client.settings import DEFAULT_TARGET, Connection, Retry, Tls
from colaserve_client.transport import AsyncTransport


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
        self._target = target
        self._transport = AsyncTransport(
            ClientConfig(target, key, tls, timeout, retry or Retry(), connection or Connection())
        )

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._target

    async def healthy(self, timeout: float = 5.0) -> bool:
        """Whether the server answers within `timeout` seconds that it is ready to serve (grpc.health.v1)."""
        return await self._transport.healthy(timeout)

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return as soon as the server is ready; `Unavailable` when it is not within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not await self.healthy(max(deadline - time.monotonic(), 0.1)):  # it is asked once at least
            if (left := deadline - time.monotonic()) <= 0:
                raise Unavailable(f"{self._target} was not ready within {timeout:g} s")
            await asyncio.sleep(min(0.1, left))

    async def close(self) -> None:
        """Cancel what runs and disconnect."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
