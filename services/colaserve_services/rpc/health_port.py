"""The health service on a port of its own, without TLS and keys: Kubernetes' gRPC probes know neither."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from colaserve_services.errors import UsageError
from colaserve_services.rpc import network


class HealthPort:
    """Answers health checks and nothing else."""

    def __init__(self, servicer: Any, host: str, port: int):
        self._server = grpc.aio.server(
            options=[("grpc.so_reuseport", 0), network.UNCOMPRESSED], migration_thread_pool=None
        )
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        self._host, self._port = host, port

    def bind(self) -> int:
        """Take the port and return it. Raises UsageError when it is taken."""
        address = network.address(self._host, self._port)
        try:
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise UsageError(f"--health-port: cannot listen on {address}; is the port taken?") from error

    async def start(self) -> None:
        """Answer."""
        await self._server.start()

    async def stop(self) -> None:
        """End at once: checks are short."""
        await self._server.stop(0)
