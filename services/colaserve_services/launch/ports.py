"""The ports of a process, looked at before any work."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from colaserve_services.errors import UsageError
from colaserve_services.rpc import network

NAMES = ("grpc_port", "health_port", "http_port", "metrics_port")


def check(params: Mapping[str, Any]) -> None:
    """Raise one UsageError that names every port among the options that cannot be listened on. 0 takes a free one."""
    with ExitStack() as held:  # until all were looked at, so that a port given twice is found
        faults = [_fault(held, name, params["host"], port) for name in NAMES if (port := params.get(name))]
    if found := [fault for fault in faults if fault]:
        raise UsageError("; ".join(found))


def _fault(held: ExitStack, name: str, host: str, port: int) -> str:
    """What is wrong with one; empty when it can be listened on."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = held.enter_context(socket.socket(family, kind, protocol))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a server that just ended left is no fault
        listener.bind(where)
        listener.listen()
    except OSError as error:
        flag = "--" + name.replace("_", "-")
        return f"{flag}: cannot listen on {network.address(host, port)}: {error.strerror or error}"
    return ""
