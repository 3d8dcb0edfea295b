"""What happens to every HTTP request: request id, key, call limit, errors in one shape, metrics, one log line."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from colaserve_services.gateway import playground
from colaserve_services.gateway.errors import api_error
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.rpc import requests, tracing
from colaserve_services.rpc.call_limit import CallLimit
from colaserve_services.rpc.garbage import Garbage
from colaserve_services.rpc.logs import access
from colaserve_services.rpc.metrics import Metrics

SERVICE: Final = "gateway"
CLIENT_GONE: Final = 499
OPEN: Final = playground.PATHS.union(
    {"/", "/health", "/ready", "/v2/health/live", "/v2/health/ready", "/metrics", "/docs", "/openapi.json"}
)  # no key, no bound, no log line
_LOGGED: Final = ("client", "user", "choices", "prompt_tokens", "completion_tokens")


@dataclass
class RequestRecord:
    """What is known of a request, for metrics and its log line. Filled in while it runs; holds no text."""

    request_id: str
    client: str = ""  # the key's name, else the address
    user: str = ""
    status: int = 0  # of the answer, once begun
    failed_with: int = 0  # the status of an error that came after the answer was begun
    client_gone: bool = False
    body_bytes: int = 0
    choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    first_block: float | None = None  # seconds from the start

    def saw_block(self) -> None:
        """Note the time of the first block."""
        if self.first_block is None:
            self.first_block = time.monotonic() - self.started

    @property
    def outcome(self) -> int:
        """The status for metrics and logs: that of the answer, or of the error or disconnect that ended it."""
        return CLIENT_GONE if self.client_gone or not self.status else self.failed_with or self.status

    def fields(self) -> dict[str, Any]:
        """For the log: what is set."""
        seconds = {"first_block_seconds": round(self.first_block, 4)} if self.first_block is not None else {}
        return {name: value for name in _LOGGED if (value := getattr(self, name))} | seconds


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request."""
    return cast(RequestRecord, scope["state"]["record"])


class Edge:
    """ASGI middleware around the application. `app.state.draining`: the server is going down."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        self._garbage = Garbage()
        refused = metrics.refused
        self._call_limit = CallLimit(settings.max_calls, lambda reason: refused.labels(SERVICE, reason).inc())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = requests.adopt(((requests.REQUEST_ID, headers.get(requests.REQUEST_ID, "")),))
        record = scope.setdefault("state", {})["record"] = RequestRecord(request_id)
        in_progress = self._metrics.requests_in_progress.labels(SERVICE, "http")
        in_progress.inc()
        span_name = "" if scope["path"] in OPEN else f"HTTP {scope['method']}"
        with tracing.serving(span_name, _trace_headers(headers)) as span:
            try:
                await self._serve(scope, receive, send, record)
            except ClientDisconnect:
                record.client_gone = True
            finally:
                in_progress.dec()
                self._end(scope, record)
                span.ended(str(record.outcome), failed=record.outcome >= 500)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        transferred = self._metrics.transfer_bytes.labels("out", SERVICE)

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[requests.REQUEST_ID] = record.request_id
                if scope["app"].state.draining:  # the client's next connection then leads elsewhere
                    headers["connection"] = "close"
            transferred.inc(len(message.get("body", b"")))
            await send(message)

        try:
            with self._admit(scope, record):
                await self._app(scope, receive, send_on)
        except ClientDisconnect:
            raise
        except Exception as error:
            answer = api_error(error)
            if record.status:
                raise  # too late for an answer: the connection is closed
            await answer.response(scope["path"])(scope, receive, send_on)

    def _admit(self, scope: Scope, record: RequestRecord) -> AbstractContextManager[None]:
        """Identify the client and count its request; raises NotAuthenticated or Overloaded."""
        if scope["path"] in OPEN:
            return nullcontext()
        keys, host = self._settings.keys, scope.get("client")
        headers = Headers(scope=scope)
        shown = headers.get(requests.AUTHORIZATION) or f"Bearer {headers.get('x-api-key', '')}"
        key, address = None if keys is None else keys.identify(shown), host[0] if host else "unknown"
        record.client = address if key is None else key
        requests.set_caller(key, address)
        return self._call_limit.enter()

    def _end(self, scope: Scope, record: RequestRecord) -> None:
        self._metrics.transfer_bytes.labels("in", SERVICE).inc(record.body_bytes)
        self._garbage.received(record.body_bytes)
        seconds = time.monotonic() - record.started
        method = getattr(scope.get("route"), "path", "unknown")
        self._metrics.request_seconds.labels(SERVICE, method, str(record.outcome)).observe(seconds)
        if record.choices and self._metrics.coordinator is not None:  # in one process the coordinator does it
            self._metrics.generation_seconds.observe(seconds)
            if record.first_block is not None:
                self._metrics.first_block.observe(record.first_block)
        if scope["path"] not in OPEN:
            line = {"service": SERVICE, "method": method, "code": record.outcome, "seconds": round(seconds, 4)}
            access.info("request", extra={"fields": line | record.fields()})


def _trace_headers(headers: Headers) -> requests.Metadata:
    """The trace's headers that may become gRPC metadata."""
    given = ((name, headers.get(name, "")) for name in tracing.HEADERS)
    return tuple((name, text) for name, text in given if text and text.isascii() and text.isprintable())
