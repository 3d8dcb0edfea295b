"""One HTTP connection: uvicorn's, with a limited time for the head of a request and errors in the documented shape.

A client that shuts down its sending side after a request, as `nc -N` does, still gets its answer. On the wire this
looks like a client that left, so an interim response is sent, or a comment in a stream of events that has begun: a
client skips it, and one that has left answers it with a reset. HTTP/1.0 gets the interim response too, although its
clients need not skip it: proxies speak 1.0, and what they left must not run on.
"""

import asyncio
import socket
import struct
import sys
import uuid
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from colaserve_services.gateway.errors import ApiError
from colaserve_services.gateway.settings import Bounds
from colaserve_services.rpc.requests import REQUEST_ID

LONGEST_HEAD: Final = 16 * 1024  # bytes; a longer one is a 431
_LOOKS: Final = (0.02, 0.1, 0.5, 2.0)  # seconds after the end of a client's sending, to see whether it has left

_COMMENT: Final = b":\n\n"  # in a stream of events; every write before it ends with an event

_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops what the kernel still has to send

_CODES: Final = {408: "head_timeout", 431: "head_too_large", 501: "not_implemented"}


class HttpProtocol(H11Protocol):
    """Made by uvicorn for each connection."""

    def __init__(self, bounds: Bounds, *args: Any, **of_uvicorn: Any):
        super().__init__(*args, **of_uvicorn)
        self._bounds = bounds
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes of whole answers at the last look
        self._unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._bounds.connections:
            transport.abort()
            return
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering():
            self._end_head()
        elif not self.transport.is_closing():
            self._begin_head()  # the first bytes of a head, or what is left of a body that was not asked for

    def on_response_complete(self) -> None:
        """What has come already of the next request, or of a body that was not asked for, has a limited time."""
        super().on_response_complete()
        self._unread = 0
        coming = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if coming and not self._answering() and not self.transport.is_closing():
            self._begin_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """True keeps the connection for an answer."""
        whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        if not self._answering() or not whole or self.scheme == "https":  # TLS cannot be closed by half
            self.transport.close()
            return False
        self.cycle.keep_alive = False
        if not self.cycle.response_started:
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])))
        elif self._streaming():
            self.transport.write(self.conn.send(h11.Data(data=_COMMENT)) or b"")
        for seconds in _LOOKS:
            self.loop.call_later(seconds, self._look_for_reset)
        return True

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in the documented shape. Called where h11 raised, whose error has the status that fits."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError):
            what = str(error).partition(": bytearray(")[0]  # what follows is h11's copy of the client's bytes
            self._refuse(error.error_status_hint, f"the request is not valid HTTP: {what}")
        else:
            self._refuse(400, msg)

    def look_at_reader(self) -> None:
        """Called every so often: cut off a client that has read nothing for `answer_seconds` of what is left of whole
        answers. A stream that is not read has a time of its own."""
        unread, before = 0 if self._streaming() else self.transport.get_write_buffer_size(), self._unread
        self._unread = unread
        if not before or unread < before:
            self._unread_since = self.loop.time()
        elif self.loop.time() - self._unread_since >= self._bounds.answer_seconds:
            connection: Any = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _streaming(self) -> bool:
        """Whether a stream of events has begun: whole answers are written at once."""
        return self._answering() and self.cycle.response_started and not self.transport.is_closing()

    def _begin_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._bounds.head_seconds, self._head_is_late)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        begun = self.conn.trailing_data[0] != b""
        if begun and not self._answering():
            self._refuse(408, f"the head of the request did not come within {self._bounds.head_seconds:g} s")
        elif not self._answering():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer has begun, and end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = bytes(ApiError(status, message, code=_CODES.get(status, "invalid_http")).response().body)
            headers = [("content-type", "application/json"), ("content-length", str(len(body))),
                       (REQUEST_ID, uuid.uuid4().hex), ("connection", "close")]  # fmt: skip
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _look_for_reset(self) -> None:
        connection: Any = self.transport.get_extra_info("socket")
        if not self.transport.is_closing() and connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
