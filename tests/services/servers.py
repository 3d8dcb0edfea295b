"""Servicers behind a server of ours on a free port, and what a call ends with."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from colaserve_services.launch.process import keep_grpc
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.errors import error_from_rpc
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.server import RpcServer
from colaserve_services.rpc.settings import ServerSettings

UNREAD = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]  # of a channel: little waits to be read


@dataclass
class Served:
    """A server that runs, and a channel to it."""

    server: RpcServer
    metrics: Metrics
    port: int
    channel: grpc.aio.Channel


@asynccontextmanager
async def served(
    *servicers: object,
    settings: ServerSettings | None = None,
    metrics: Metrics | None = None,
    keys: Keys | None = None,
    ready: bool = True,
    options: Sequence[tuple[str, int]] = (),
) -> AsyncIterator[Served]:
    """`options`: of the channel."""
    keep_grpc()
    metrics = metrics or Metrics()
    server = RpcServer(settings or ServerSettings(), metrics, keys)
    for servicer in servicers:
        server.add(servicer)
    port = await server.start()
    if ready:
        await server.serving()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            yield Served(server, metrics, port, channel)
    finally:
        await server.stop()


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """The status that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def refusal(call: Awaitable[Any]) -> Exception:
    """Our error for that status."""
    return error_from_rpc(await failure(call))
