"""The call that work is done for: its deadline, its caller, when it came."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from colaserve_services.errors import DeadlineExceeded
from colaserve_services.rpc import requests

ANONYMOUS = "anonymous"


@dataclass(frozen=True)
class Call:
    """`deadline` is time.monotonic() seconds, None without one; `key` names the caller, see `caller_name`."""

    deadline: float | None = None
    key: str = ANONYMOUS
    arrived: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, remaining: float | None, metadata: Iterable[tuple[str, str | bytes]] | None, peer: str) -> Call:
        """The call that gRPC describes by seconds left, metadata and the other end of its connection."""
        deadline = None if remaining is None else time.monotonic() + remaining
        return cls(deadline, caller_name(requests.value(metadata, requests.AUTHORIZATION), peer))

    def left(self) -> float | None:
        """Seconds until the deadline; raises DeadlineExceeded when it has passed."""
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the work was done")
        return left

    def age(self) -> float:
        """Seconds since the call came."""
        return time.monotonic() - self.arrived


def caller_name(authorization: str, peer: str) -> str:
    """A short name for a caller: "key-" and 8 hex digits of its key's SHA-256, which do not tell the key; without a key
    its address."""
    key = authorization.partition(" ")[2].strip() or authorization.strip()
    if key:
        return "key-" + hashlib.sha256(key.encode()).hexdigest()[:8]
    return peer.rpartition(":")[0] or ANONYMOUS
