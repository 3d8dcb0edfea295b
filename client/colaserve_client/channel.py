"""How a client reaches its server: target, key, channel arguments, credentials."""

import json
import re
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path

import grpc
import grpc.aio

from colaserve_client.errors import invalid
from colaserve_client.settings import Connection, Tls

_HOST_AND_PORT = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.%\w]+\]):\d{1,5}")
_RESOLVED_BY_GRPC = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")


@cache
def client_version() -> str:
    """Of the installed package; "unknown" when it runs from a source tree that was never installed."""
    try:
        return version("colaserve-client")
    except PackageNotFoundError:
        return "unknown"


def checked_key(key: str) -> str:
    """The key without the blanks around it; `InvalidRequest` for none, and for one that HTTP cannot carry."""
    key = key.strip()  # of a file or a variable, which often ends with a newline
    if not (key and key.isascii() and key.isprintable()):
        raise invalid("key", "expected printable ASCII characters")
    return key


def checked_target(target: str) -> str:
    """The target without the blanks around it; `InvalidRequest` when gRPC could not make sense of it."""
    target = target.strip()
    plain = _HOST_AND_PORT.fullmatch(target) and int(target.rpartition(":")[2]) < 65536
    if plain or target.startswith(_RESOLVED_BY_GRPC):
        return target
    raise invalid("target", f'expected "host:port" or a gRPC name such as "dns:///host:port", got {target!r}')


def channel_to(target: str, tls: Tls | None, connection: Connection) -> Callable[[], grpc.aio.Channel]:
    """What opens a channel for the running event loop; files that cannot be read are an `InvalidRequest` at once."""
    options = _channel_options(target, connection, tls)
    if tls is None:
        return partial(grpc.aio.insecure_channel, target, options)
    files = (_pem(tls.ca, "tls.ca"), _pem(tls.key, "tls.key"), _pem(tls.cert, "tls.cert"))
    return partial(grpc.aio.secure_channel, target, grpc.ssl_channel_credentials(*files), options)


def _channel_options(target: str, connection: Connection, tls: Tls | None) -> list[tuple[str, str | int]]:
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
    return options


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
