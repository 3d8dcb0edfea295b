"""The identity of the call being served: its request id, which crosses every service."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from contextvars import ContextVar

REQUEST_ID = "x-request-id"
AUTHORIZATION = "authorization"

Metadata = tuple[tuple[str, str | bytes], ...]

_SAFE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_request_id: ContextVar[str] = ContextVar("colaserve_request_id", default="")
_trace: ContextVar[Metadata] = ContextVar("colaserve_trace", default=())


def current_request_id() -> str:
    """Id of the call that this task serves; empty outside of a call."""
    return _request_id.get()


def adopt(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Make the caller's request id this task's and return it.

    A caller that sent none (or none that is safe to log) gets the one of the call it is part of, else a new one.
    """
    given = value(metadata, REQUEST_ID)
    chosen = given if _SAFE.fullmatch(given) else current_request_id() or uuid.uuid4().hex
    _request_id.set(chosen)
    return chosen


def outgoing_metadata() -> Metadata:
    """What a call made while serving another one carries on: the request id and the trace's context."""
    current = current_request_id()
    return (((REQUEST_ID, current),) if current else ()) + _trace.get()


def carry_trace(headers: Metadata) -> None:
    """Set the trace headers that `outgoing_metadata` adds in this task."""
    _trace.set(headers)


def trace_headers() -> Metadata:
    """The trace headers of this task."""
    return _trace.get()


def value(metadata: Iterable[tuple[str, str | bytes]] | None, key: str) -> str:
    """The first text value of `key`, or an empty string."""
    for name, content in metadata or ():
        if name == key and isinstance(content, str):
            return content
    return ""
