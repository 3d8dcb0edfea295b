"""What happens to every HTTP request: request id, key, admission, bounded body, metrics, one log line."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from colaserve_services.gateway.body import Body
from colaserve_services.gateway.errors import api_error
from colaserve_services.gateway.gateway import Gateway
from colaserve_services.gateway.record import RequestRecord, put_record
from colaserve_services.rpc import requests, tracing
from colaserve_services.rpc.admission import Admission
from colaserve_services.rpc.garbage import Garbage
from colaserve_services.rpc.logs import access
from colaserve_services.rpc.metrics import Metrics

SERVICE: Final = "gateway"
OPEN: Final = frozenset(
    {"/", "/health", "/ready", "/metrics", "/docs", "/openapi.json"}
)  # no key, no bound, no log line


class Edge:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, gateway: Gateway, metrics: Metrics):
        self._app, self._gateway, self._metrics = app, gateway, metrics
        self._settings = gateway.settings
        self._garbage = Garbage()
        refused = metrics.refused
        self._admission = Admission(self._settings.admission, lambda reason: refused.labels(SERVICE, reason).inc())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _begin(scope)
        in_progress = self._metrics.requests_in_progress.labels(SERVICE, "http")
        in_progress.inc()
        with tracing.serving(_span_name(scope), _trace_headers(scope)) as span:
            try:
                out = self._metrics.transfer_bytes.labels("out", SERVICE)
                await self._serve(scope, receive, _Telling(send, record, self._gateway, out), record)
            finally:
                in_progress.dec()
                self._end(scope, record)
                span.ended(str(record.outcome), failed=record.outcome >= 500)

    def _received(self, size: int) -> None:
        self._metrics.transfer_bytes.labels("in", SERVICE).inc(size)
        self._garbage.received(size)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        try:
            with self._admit(scope, record):
                await self._app(scope, Body(receive, self._settings.bounds, record, self._received), send)
        except Exception as error:
            told = api_error(error)
            if record.status:
                raise  # too late for an answer: the connection is closed
            await told.response()(scope, receive, send)

    def _admit(self, scope: Scope, record: RequestRecord) -> AbstractContextManager[None]:
        """Who asks, and a place for it; raises NotAuthenticated or Overloaded."""
        if scope["path"] in OPEN:
            return nullcontext()
        keys, host = self._settings.keys, scope.get("client")
        shown = Headers(scope=scope).get(requests.AUTHORIZATION, "")
        record.client = keys.identify(shown) if keys is not None else (host[0] if host else "unknown")
        return self._admission.enter(record.client)

    def _end(self, scope: Scope, record: RequestRecord) -> None:
        seconds = time.monotonic() - record.started
        method = getattr(scope.get("route"), "path", "unknown")
        self._metrics.request_seconds.labels(SERVICE, method, str(record.outcome)).observe(seconds)
        if scope["path"] not in OPEN:
            told = {"service": SERVICE, "method": method, "code": record.outcome, "seconds": round(seconds, 4)}
            access.info("request", extra={"fields": told | record.fields()})


class _Telling:
    """Sends on, with the request id on the answer, and notes status and bytes. While the gateway goes down, the answer
    asks for a new connection, which then leads elsewhere."""

    def __init__(self, send: Send, record: RequestRecord, gateway: Gateway, out: Counter):
        self._send, self._record, self._gateway, self._out = send, record, gateway, out

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[requests.REQUEST_ID] = self._record.request_id
            if self._gateway.draining:
                headers["connection"] = "close"
        self._out.inc(len(message.get("body", b"")))
        await self._send(message)


def _begin(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    request_id = requests.adopt(((requests.REQUEST_ID, headers.get(requests.REQUEST_ID, "")),))
    record = RequestRecord(request_id)
    put_record(scope, record)
    return record


def _span_name(scope: Scope) -> str:
    return "" if scope["path"] in OPEN else f"HTTP {scope['method']}"


def _trace_headers(scope: Scope) -> requests.Metadata:
    headers = Headers(scope=scope)
    return tuple((name, headers[name]) for name in tracing.HEADERS if _can_travel(headers.get(name, "")))


def _can_travel(text: str) -> bool:
    """Whether a header's value may become gRPC metadata."""
    return bool(text) and text.isascii() and text.isprintable()
