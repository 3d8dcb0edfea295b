# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which the server sees too
"""What all asyncio clients share: how they connect (target, key, channel arguments, credentials), how they call, and
that they are context managers.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self, TypeVar
from weakref import WeakSet

import grpc
import grpc.aio
from google.protobuf.message import Message

from colaserve_client.calls import METHODS, AsyncStream, Attempts, Call, checked_timeout
from colaserve_client.errors import Cancelled, Unavailable, invalid
from colaserve_client.loop import LOOP
from colaserve_client.settings import DEFAULT_TARGET, Connection, Retry, Tls

C = TypeVar("C", bound=Call[Any])
T = TypeVar("T")
_HEALTH = "/grpc.health.v1.Health/Check"
_HOST_AND_PORT = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.%\w]+\]):\d{1,5}")
_RESOLVED_BY_GRPC = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")
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
        self._target = target.strip()
        plain = _HOST_AND_PORT.fullmatch(self._target) and int(self._target.rpartition(":")[2]) < 65536
        if not (plain or self._target.startswith(_RESOLVED_BY_GRPC)):
            expected = '"host:port" or a gRPC name such as "dns:///host:port"'
            raise invalid("target", f"expected {expected}, got {self._target!r}")
        self._key = None if key is None else key.strip()  # of a file or a variable, which often ends with a newline
        if self._key is not None and not (self._key and self._key.isascii() and self._key.isprintable()):
            raise invalid("key", "expected printable ASCII characters")
        self._timeout, self._retry = checked_timeout(timeout), retry or Retry()
        self._open = _channel_to(self._target, tls, connection or Connection())
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
        path, response = METHODS[request.DESCRIPTOR.full_name]
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
        return any(call._call is not None for call in self._calls)

    async def _disconnect(self) -> None:
        """Cancel what runs; the next call connects anew."""
        channel, self._channel = self._channel, None
        if channel is not None and not LOOP.is_lost:
            await channel.close()


@cache
def client_version() -> str:
    """Of the installed package; "unknown" when it runs from a source tree that was never installed."""
    try:
        return version("colaserve-client")
    except PackageNotFoundError:
        return "unknown"


def _channel_to(target: str, tls: Tls | None, connection: Connection) -> Callable[[], grpc.aio.Channel]:
    """What opens a channel for the running event loop; files that cannot be read are an `InvalidRequest` at once."""
    options: list[tuple[str, str | int]] = [
        ("grpc.primary_user_agent", f"colaserve-client/{client_version()}"),
        ("grpc.max_send_message_length", connection.max_message_bytes),
        ("grpc.max_receive_message_length", connection.max_message_bytes),
        ("grpc.keepalive_time_ms", _milliseconds(connection.keepalive)),
        ("grpc.keepalive_timeout_ms", _milliseconds(connection.keepalive_timeout)),
        ("grpc.client_idle_timeout_ms", _milliseconds(connection.idle)),
        ("grpc.initial_reconnect_backoff_ms", 100),  # so that a server which just started is found at once
        ("grpc.min_reconnect_backoff_ms", 5000),  # which is in truth the time that connecting may take
        ("grpc.max_reconnect_backoff_ms", 1000),  # and one that was away long: `Retry()` tries for longer than this
        ("grpc.use_local_subchannel_pool", 1),  # a new client does not wait because an older one could not connect
        ("grpc.enable_retries", 0),  # `Attempts` alone decides what is tried again
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [{connection.load_balancing: {}}]})),
    ]
    if _is_loopback(target):
        options.append(("grpc.enable_http_proxy", 0))  # a proxy could not reach this machine's servers
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    if tls is None:
        return partial(grpc.aio.insecure_channel, target, options)
    files = (_pem(tls.ca, "tls.ca"), _pem(tls.key, "tls.key"), _pem(tls.cert, "tls.cert"))
    return partial(grpc.aio.secure_channel, target, grpc.ssl_channel_credentials(*files), options)


def _is_loopback(target: str) -> bool:
    """Whether a target is on this machine: a proxy of the environment is then bypassed."""
    host = re.sub(r".*/|^(?:dns|ipv4|ipv6):", "", target).rpartition(":")[0]
    if target.startswith("unix") or host in ("localhost", "ip6-localhost"):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _milliseconds(seconds: float) -> int:
    return int(min(seconds * 1000, 2**31 - 1))  # gRPC's most, which it takes for never


def _pem(path: str | Path | None, field: str) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise invalid(field, f"cannot read {path}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise invalid(field, f"{path} is no PEM file")
    return content
