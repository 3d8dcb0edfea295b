"""Who gets KV memory next while sessions reserve all that they may need."""

import time
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from colaserve_services.engine.session import Session

S = TypeVar("S", bound=Session[Any])

_PASSES = 16  # sessions that may start before an earlier one for which KV is lacking
HOLDS_AT_LEAST: Final = 1.0  # seconds that a session keeps its KV though others wait for it
_MUCH_MORE = 4  # times the KV of one that waits: it is paused for that one


def first_to_fit(waiting: Iterable[S], kv_bytes: int) -> S | None:
    """The first that needs no more KV; none once an earlier one has been passed too often."""
    for session in waiting:
        if session.kv_bytes <= kv_bytes:
            return session
        if session.passed >= _PASSES:
            return None
    return None


def to_pause(running: Iterable[S], waiting: Iterable[S], used: int, budget: int) -> S | None:
    """The session whose KV lets one that waits start; None if there is none.

    It holds more than half of the budget, or much more than the other needs, and has had it for a while.
    """
    for session in sorted(running, key=lambda each: each.kv_bytes, reverse=True):
        if time.monotonic() < session.holds_since + HOLDS_AT_LEAST or not session.pausable():
            continue
        smaller = session.kv_bytes - 1 if session.kv_bytes > budget / 2 else session.kv_bytes // _MUCH_MORE
        if first_to_fit(waiting, min(budget - used + session.kv_bytes, smaller)) is not None:
            return session
    return None
