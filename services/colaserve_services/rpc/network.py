"""What servers and channels have in common."""

import os
import socket

from colaserve_services.rpc.settings import MAX_MESSAGE_BYTES

UNCOMPRESSED = ("grpc.compression_enabled_algorithms_bitset", 1)  # others: UNIMPLEMENTED, and nothing is inflated


def address(host: str, port: int) -> str:
    """host:port, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, where = found[0]
    try:
        listener = socket.create_server(where, family=family, backlog=2048, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:  # whose text has the address, as those who call this say it anyway
        raise OSError(error.errno, os.strerror(error.errno or 0)) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what it accepts inherits this
    listener.setblocking(False)
    return listener


def options(most_received: int, keepalive_seconds: float) -> list[tuple[str, int]]:
    """Options of gRPC for either end of a connection; `most_received` is the bytes of one message."""
    keepalive = round(keepalive_seconds * 1000)
    return [
        ("grpc.max_receive_message_length", most_received),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", max(keepalive // 2, 1000)),  # without a byte
        ("grpc.http2.ping_timeout_ms", max(keepalive // 2, 1000)),  # without the answer; by default a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # else two, then one a minute: streams that wait send nothing
    ]
