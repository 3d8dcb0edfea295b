"""Connections to other services: balanced over replicas, skipping those that are not SERVING, with TLS and a key."""

import ipaddress
import json
import re
import socket
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from colaserve_services.errors import UsageError
from colaserve_services.rpc import network, requests
from colaserve_services.rpc.settings import MAX_MESSAGE_BYTES, ChannelSettings
from colaserve_services.rpc.tls import channel_credentials

_HOST = re.compile(r"[\w.:%-]+|\[[\w.:%]+\]")  # a name or an address
PRIOR = "colaserve.v1.PriorService"
KEEPALIVE_SECONDS = 5.0  # a silent connection is pinged this often and dropped if no answer comes
# Messages are taken from the network as they are read. By default it would hold hundreds of unread blocks, and the
# prior, which pauses when its blocks are not read, would never pause.
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))


def open_channel(target: str, settings: ChannelSettings, service: str, host: str = "") -> grpc.aio.Channel:
    """A channel to the replicas of `service` (full name): "host:port", "dns:///host:port" or "a:1,b:2".

    Calls go round over the replicas whose health service says SERVING for `service`. A name is looked up again when a
    connection is lost or reaches its maximum age; names in a list are looked up once, now. `host` is the name that a
    target which is an address was looked up by: certificates are for names.
    """
    options = [*_options(service), *(SMALL_WINDOW if service == PRIOR else ())]
    address = resolve(target)
    if settings.tls is None:
        return grpc.aio.insecure_channel(address, options)
    if name := host or _common_host(target):
        options.append(("grpc.ssl_target_name_override", name))
    return grpc.aio.secure_channel(address, channel_credentials(settings.tls), options)


class Stub:
    """A grpc.aio stub whose calls carry this process' key and the request id of the call being served."""

    def __init__(self, kind: Callable[[Any], Any], channel: grpc.aio.Channel, settings: ChannelSettings):
        self._kind, self._key = kind, f"Bearer {settings.api_key}" if settings.api_key else ""
        self.use(channel)

    def use(self, channel: grpc.aio.Channel) -> None:
        """Make later calls on this channel."""
        for name, method in vars(self._kind(channel)).items():
            setattr(self, name, self._carrying(method))

    def _carrying(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, metadata: Iterable[tuple[str, str | bytes]] | None = None, **more: Any) -> Any:
            return method(*args, metadata=self._metadata(tuple(metadata or ())), **more)

        return call

    def _metadata(self, given: requests.Metadata) -> requests.Metadata:
        names = {name for name, _ in given}
        added = tuple(pair for pair in requests.outgoing_metadata() if pair[0] not in names)
        if self._key and requests.AUTHORIZATION not in names:
            added += ((requests.AUTHORIZATION, self._key),)
        return (*given, *added)


def resolve(target: str) -> str:
    """The gRPC name of a target; raise UsageError for one that is none."""
    if "://" in target or target.startswith(("ipv4:", "ipv6:", "unix:")):
        return target
    parts = split_target(target)
    if len(parts) == 1:
        split_address(parts[0])
        return f"dns:///{parts[0]}"
    addresses = [_address(*split_address(part)) for part in parts]
    version = {ip.version for ip, _ in addresses}
    if len(version) > 1:
        raise UsageError(f"{target!r} mixes IPv4 and IPv6 addresses; give addresses of one kind")
    scheme = f"ipv{version.pop()}"
    return f"{scheme}:" + ",".join(network.address(str(ip), port) for ip, port in addresses)


def split_target(target: str) -> list[str]:
    """The addresses of a target that lists them with commas; raise UsageError for one that is none."""
    listed = target.removeprefix("ipv4:").removeprefix("ipv6:")
    parts = [part.strip() for part in listed.split(",")]
    if not all(parts):
        raise UsageError(f"no address in {target!r}; expected host:port, dns:///host:port or a list with commas")
    return parts


def _common_host(target: str) -> str:
    """The host of all addresses in a list, which their certificates must name; empty where there is no list."""
    hosts = {split_address(part)[0] for part in split_target(target)} if "," in target else {""}
    if len(hosts) > 1:
        raise UsageError(f"{target!r}: with TLS, give one name that is looked up as all of these hosts")
    return hosts.pop()


def split_address(part: str) -> tuple[str, int]:
    """(host, port) of "host:port"; raise UsageError for what is none."""
    host, _, port = part.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{part!r} is no address; expected host:port")
    return host.strip("[]"), int(port)


def _address(host: str, port: int) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"{host!r} cannot be looked up: {error.strerror or error}") from error
    found.sort(key=lambda info: info[0] != socket.AF_INET)
    return ipaddress.ip_address(found[0][4][0]), port


def _options(service: str) -> list[tuple[str, Any]]:
    config = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": service}}
    return [
        *network.options(MAX_MESSAGE_BYTES, KEEPALIVE_SECONDS),
        ("grpc.enable_http_proxy", 0),  # services call each other directly, whatever http_proxy says
        ("grpc.service_config", json.dumps(config)),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5000),  # which is in truth the time that connecting may take
        ("grpc.max_reconnect_backoff_ms", 1000),  # the others may die before one that came back is found
        ("grpc.dns_min_time_between_resolutions_ms", 2000),
        ("grpc.use_local_subchannel_pool", 1),  # channels of one process do not share the fate of a connection
    ]
