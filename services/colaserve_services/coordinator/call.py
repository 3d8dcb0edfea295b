"""The call that work is done for: its deadline, its caller, when it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from colaserve_services.errors import DeadlineExceeded
from colaserve_services.rpc import requests

ANONYMOUS = "anonymous"


@dataclass
class Call:
    """`deadline` is time.monotonic() seconds, None without one; `caller` is a verified key's name, else an address."""

    deadline: float | None = None
    caller: str = ANONYMOUS
    arrived: float = field(default_factory=time.monotonic)
    waited: float = 0.0  # seconds in the queue
    preempt: Callable[[], None] = lambda: None  # ends its sessions at the stages until it is read again

    @classmethod
    def of(cls, context: Any) -> Call:
        """The one that gRPC's context, or that of a call in this process, describes."""
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        return cls(deadline, requests.current_caller() or ANONYMOUS)

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

    def cache_salt(self, asked: str) -> str:
        """What the stages' prefix caches are to be told apart by: what the request asks for, else the caller where
        that is a key, else nothing. The one never equals the other."""
        if asked:
            return f"salt:{asked}"
        return self.caller if self.caller.startswith(requests.KEY_CALLER) else ""
