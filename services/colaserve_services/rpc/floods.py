"""Connections that open calls and reset them at once, over and over: gRPC refuses their calls, and this ends them."""

from __future__ import annotations

import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import unquote

MOST_RESETS: Final = 100  # calls that one connection may give up, before their first message, in RESET_SECONDS
RESET_SECONDS: Final = 10.0
_MOST_CONNECTIONS: Final = 10_000  # that are counted at once
_DESCRIPTORS: Final = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"

_log = logging.getLogger(__name__)


class Resets:
    """Counts the calls that were given up before their first message, by connection."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, end: Callable[[str], bool] | None = None):
        self._clock, self._end = clock, end or end_connection
        self._counted: dict[str, tuple[float, int]] = {}  # connection -> (since when, how many)

    def count(self, peer: str) -> None:
        """One more, of a connection as gRPC names it; one too many ends the connection."""
        now = self._clock()
        since, count = self._counted.pop(peer, (now, 0))
        since, count = (since, count + 1) if now - since < RESET_SECONDS else (now, 1)
        if count > MOST_RESETS:
            if self._end(peer):
                _log.warning("connection ended: it resets its calls", extra={"fields": {"peer": peer, "resets": count}})
            return
        if len(self._counted) >= _MOST_CONNECTIONS:
            del self._counted[next(iter(self._counted))]  # the one that was quiet for longest
        self._counted[peer] = since, count


def end_connection(peer: str) -> bool:
    """Shut down this process' connection with "ipv4:host:port" or "ipv6:[host]:port"; whether it was there.

    gRPC gives a server no way to do it: the descriptor is found among all of the process.
    """
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    for name in os.listdir(_DESCRIPTORS):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode) and _shut_down(int(name), host.strip("[]"), port):
                return True
        except OSError:  # closed meanwhile, or no connection
            continue
    return False


def _shut_down(descriptor: int, host: str, port: str) -> bool:
    """Whether this socket was the connection with that host and port; it is shut down then."""
    with socket.socket(fileno=os.dup(descriptor)) as found:
        there = found.getpeername()
        ours = isinstance(there, tuple) and (there[0].removeprefix("::ffff:"), str(there[1])) == (host, port)
        if ours:
            found.shutdown(socket.SHUT_RDWR)
        return ours
