"""A gRPC server of ours: services, health, reflection, bounds, TLS, and a drain that loses nothing."""

import asyncio
import logging
import sys
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from colaserve_services.errors import UsageError
from colaserve_services.rpc import network
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.call_limit import CallLimit
from colaserve_services.rpc.edge import Edge
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.request_bounds import MOST_BYTES, RequestBounds
from colaserve_services.rpc.settings import ServerSettings
from colaserve_services.rpc.tls import server_credentials

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
KEEPALIVE_SECONDS = 30.0  # a silent connection is pinged this often and dropped if no answer comes
LIVENESS = "liveness"  # a health name for liveness probes: SERVING as long as the process answers and can compute

_log = logging.getLogger(__name__)


class RpcServer:
    """Serves servicers on one port.

    server = RpcServer(settings, metrics)
    server.add(PriorService(...))
    port = server.bind()             # before the long loading, so that a taken port is found at once
    await server.start()             # answers; health says NOT_SERVING
    await server.serving()           # after the warm-up
    await server.drain()             # NOT_SERVING, wait, let running calls end, stop
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics, keys: Keys | None = None):
        self._settings = settings
        refused = metrics.refused
        call_limit = CallLimit(settings.max_calls, lambda reason: refused.labels(self._stage(), reason).inc())
        self._edge = Edge(metrics, call_limit, keys, settings.first_message_seconds, settings.role_key)
        self._server = grpc.aio.server(
            interceptors=[self._edge], options=_options(settings), migration_thread_pool=None
        )
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self._port: int | None = None
        self._draining = self._failing = self._ready = False

    def add(self, servicer: object) -> None:
        """Serve an object of a generated `<Service>Servicer` class."""
        name = service_descriptor(servicer).full_name
        base = next(kind for kind in type(servicer).__mro__ if kind.__module__.endswith("_pb2_grpc"))
        register = getattr(sys.modules[base.__module__], f"add_{base.__name__}_to_server")
        register(servicer, self._server)
        self._names.append(name)

    def bound_latents(self, context_bytes: int) -> None:
        """Take requests with as many bytes of latents as the longest context has; until then, the longest message."""
        self._edge.bounds = RequestBounds(context_bytes)

    def bind(self) -> int:
        """Take the port and return it. Raises UsageError when it is taken or a certificate cannot be read."""
        if self._port is None:
            address, server = network.address(self._settings.host, self._settings.port), self._server
            tls = server_credentials(self._settings.tls) if self._settings.tls else None
            try:
                self._port = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
            except RuntimeError as error:
                raise UsageError(f"--grpc-port: cannot listen on {address}; is the port taken?") from error
        return self._port

    async def start(self) -> int:
        """Answer calls; return the port."""
        port = self.bind()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        await self._set_health(NOT_SERVING)
        await self._health.set(LIVENESS, SERVING)
        await self._server.start()
        return port

    @property
    def alive(self) -> bool:
        """Whether what computes behind it works, as far as it is known."""
        return not self._failing

    @property
    def ready(self) -> bool:
        """Whether calls should come here."""
        return self._ready and self.alive and not self._draining

    async def serving(self, ready: bool = True) -> None:
        """Say SERVING (or NOT_SERVING) for every service and for the whole; a drain has the last word."""
        self._ready = ready
        if not self._draining:
            await self._set_health(SERVING if self.ready else NOT_SERVING)

    async def failing(self, failing: bool) -> None:
        """What computes behind it fails whatever it is given: neither ready nor alive; or it works again."""
        self._failing = failing
        await self._health.set(LIVENESS, NOT_SERVING if failing else SERVING)
        await self.serving(self._ready)

    async def drain(self, drain_seconds: float | None = None) -> None:
        """NOT_SERVING; wait until balancers saw it; refuse new calls and let running ones end, within the grace."""
        settings, self._draining = self._settings, True
        await self._set_health(NOT_SERVING)
        await asyncio.sleep(settings.drain_seconds if drain_seconds is None else drain_seconds)
        await self.stop(settings.grace_seconds)

    async def stop(self, grace: float = 0.0) -> None:
        """Refuse new calls, give running ones `grace` seconds, then cancel them."""
        await self._server.stop(grace)  # again with less grace: what runs is cut sooner

    async def _set_health(self, status: Any) -> None:
        for name in (*self._names, ""):
            await self._health.set(name, status)

    def _stage(self) -> str:
        """What refusals are counted for: the coordinator where it is served, else the first stage."""
        stages = [name.rpartition(".")[2].removesuffix("Service").lower() for name in self._names]
        return "coordinator" if "generation" in stages or not stages else stages[0]


def service_descriptor(servicer: object) -> ServiceDescriptor:
    """The service that an object of a generated `<Service>Servicer` class implements."""
    for kind in type(servicer).__mro__:
        if kind.__module__.endswith("_pb2_grpc") and kind.__name__.endswith("Servicer"):
            messages: Any = sys.modules[kind.__module__.removesuffix("_grpc")]
            found: ServiceDescriptor = messages.DESCRIPTOR.services_by_name[kind.__name__.removesuffix("Servicer")]
            return found
    raise TypeError(f"{type(servicer).__name__} is no servicer")


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    options = [
        *network.options(MOST_BYTES, KEEPALIVE_SECONDS),
        network.UNCOMPRESSED,
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server behind it
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", 1000),  # of one connection
        ("grpc.server_handshake_timeout_ms", round(settings.first_message_seconds * 1000)),  # by default two minutes
        ("grpc.http2.min_ping_interval_without_data_ms", 500),  # a client may probe each second,
        ("grpc.http2.max_ping_strikes", 20),  # not flood: so many pings that come sooner end its connection
    ]
    if settings.max_connection_age:
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age * 1000)))
    return options
