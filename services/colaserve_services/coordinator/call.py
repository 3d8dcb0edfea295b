"""The call that work is done for: its deadline, its caller, when it came."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from colaserve_services.errors import DeadlineExceeded, InvalidRequest
from colaserve_services.rpc import requests

ANONYMOUS = "anonymous"
LONGEST_SALT = 256  # characters


@dataclass
class Call:
    """`deadline` is time.monotonic() seconds, None without one; `caller` is a verified key's name, else an address."""

    deadline: float | None = None
    caller: str = ANONYMOUS
    arrived: float = field(default_factory=time.monotonic)
    waited: float = 0.0  # seconds in the queue
    admitted: bool = False  # a part of a call that was let in: it is never refused, and is queued without a time limit
    salt: str = ""  # of the stages' prefix caches
    # ends its sessions at the stages until that is done: a response is being read
    preempt: Callable[[asyncio.Future[None]], None] = lambda reading: None
    near: dict[str, str] | None = None  # by stage, address that its sessions are to go to; None: to any

    @classmethod
    def of(cls, context: Any) -> "Call":
        """The one that gRPC's context, or that of a call in this process, describes."""
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        caller = requests.current_caller() or ANONYMOUS
        return cls(deadline, caller, salt=caller if caller.startswith(requests.KEY_CALLER) else "")

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

    def use_salt(self, asked: str) -> None:
        """Take the salt that the request asks for, if any, in place of the caller's key; it never equals a key's."""
        if len(asked) > LONGEST_SALT:
            raise InvalidRequest("cache_salt", f"got {len(asked)} characters, expected at most {LONGEST_SALT}")
        if asked:
            self.salt = f"salt:{asked}"
