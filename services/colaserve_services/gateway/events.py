"""Server-sent events: begun with the first piece, so that what fails before it is answered with its own status."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from pydantic_core import to_json
from starlette.types import Send

from colaserve_services.gateway.dialects import Dialect
from colaserve_services.gateway.errors import ApiError
from colaserve_services.gateway.pieces import Piece
from colaserve_services.gateway.shapes import Usage

_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # asks nginx not to gather events
)


class EventStream:
    """Writes one request's events. With `usage_chunk` the last one carries the usage, and all others "usage": null."""

    def __init__(self, send: Send, dialect: Dialect, usage_chunk: bool):
        self._send, self._dialect, self._usage_chunk = send, dialect, usage_chunk
        self._opened: set[int] = set()
        self.begun = False

    async def piece(self, index: int, piece: Piece) -> None:
        """Send what a message brings, if anything."""
        opening = None if index in self._opened else self._dialect.opening(index)
        self._opened.add(index)
        for choice in ([opening] if opening else []) + self._dialect.deltas(index, piece):
            await self._chunk([choice])

    async def end(self, usage: Usage) -> None:
        """Send the usage, if asked for, and end the stream."""
        if self._usage_chunk:
            await self._chunk([], usage)
        await self._event(b"[DONE]")
        await self._body(b"", more=False)

    async def fail(self, error: ApiError, seconds: float) -> None:
        """End a begun stream with an error event; no [DONE] follows, so that no reader takes it for complete.

        A client that does not read within `seconds` is not waited for: the connection is then closed.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event(error.body())
                await self._body(b"", more=False)

    async def _chunk(self, choices: Sequence[Mapping[str, Any]], usage: Usage | None = None) -> None:
        chunk = self._dialect.chunk(choices)
        await self._event(to_json({**chunk, "usage": usage} if self._usage_chunk else chunk))

    async def _event(self, data: bytes) -> None:
        await self._body(b"data: " + data + b"\n\n", more=True)

    async def _body(self, data: bytes, more: bool) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
