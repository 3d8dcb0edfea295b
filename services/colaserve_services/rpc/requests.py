"""The identity of the call being served: its request id, which crosses every service."""

import re
import uuid
from collections.abc import Iterable
from contextvars import ContextVar

REQUEST_ID = "x-request-id"
AUTHORIZATION = "authorization"
CALLER = "colaserve-caller"  # from a role: on whose behalf it calls
KEY_CALLER = "key:"  # begins a caller that is a key's name; others are addresses
PROBES = frozenset({"GetInfo", "ServerLive", "ServerReady", "ModelReady"})  # methods that are asked all the time

Metadata = tuple[tuple[str, str | bytes], ...]

_SAFE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_request_id: ContextVar[str] = ContextVar("colaserve_request_id", default="")
_caller: ContextVar[str] = ContextVar("colaserve_caller", default="")
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


def current_caller() -> str:
    """Who made the call that this task serves: a verified key's name, else an address; empty outside of a call."""
    return _caller.get()


def set_caller(key: str | None, address: str) -> None:
    """Set it, from the name of the key that was shown and the address at the other end."""
    _caller.set(address if key is None else f"{KEY_CALLER}{key}")


def adopt_caller(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Take over the caller that a role of ours says it calls for; only for one that proved to be a role."""
    if given := value(metadata, CALLER):
        _caller.set(given)


def outgoing_metadata() -> Metadata:
    """What a call made while serving another one carries on: request id, caller and the trace's context."""
    found = (REQUEST_ID, current_request_id()), (CALLER, _printable(current_caller()))
    return tuple(pair for pair in found if pair[1]) + _trace.get()


def _printable(text: str) -> str:
    """What metadata can carry."""
    return text.encode("ascii", "backslashreplace").decode() if text.isprintable() else ascii(text)


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
