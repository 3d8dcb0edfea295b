"""A request's body, read whole and bounded before anything looks at it."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

from colaserve_services.errors import Cancelled
from colaserve_services.gateway.errors import ApiError
from colaserve_services.gateway.settings import Bounds

_DISCARDED = 16  # times the bound: so much more is read and dropped, since who still writes reads no answer


class Replay:
    """Gives a body that was read already, then what comes after it."""

    def __init__(self, body: bytes, receive: Receive):
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()


async def read_body(receive: Receive, bounds: Bounds) -> bytes:
    """The whole body; 413 when it is too long, 408 when it takes too long, Cancelled when the client goes away."""
    try:
        async with asyncio.timeout(bounds.body_seconds):
            return await _read(receive, bounds.body_bytes)
    except TimeoutError as error:
        message = f"the body did not come within {bounds.body_seconds:g} s"
        raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from error


async def _read(receive: Receive, bound: int) -> bytes:
    body, length, more = bytearray(), 0, True
    while more and length <= bound * _DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client went away while it sent the body")
        length += len(message["body"])
        if length <= bound:
            body += message["body"]
        more = message["more_body"]
    if length > bound:
        too_long = f"the body is longer than {bound} bytes, the most this server takes"
        raise ApiError(413, too_long, code="body_too_large", headers={"connection": "close"})
    return bytes(body)
