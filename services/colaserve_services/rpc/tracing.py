"""OpenTelemetry traces: a request is one trace, whatever services it passes, with a span a call and a span a block.

    tracer = tracing.start("http://collector:4317", "prior")     # once, at start; needs the [trace] extra
    with tracing.serving("PriorService/Sample", metadata) as span:
        span.block(queue_us=10, compute_us=400)                  # a span from the last block, or the start, until now
    tracer.stop()                                                # sends what is left

The trace's context comes and goes as W3C `traceparent` and `tracestate`: HTTP headers and gRPC metadata. A process that
traces nothing hands a caller's context on. Spans hold names, counts and times, never text. Sampling and limits are
OpenTelemetry's own variables (OTEL_TRACES_SAMPLER, OTEL_BSP_..., OTEL_EXPORTER_OTLP_...).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from colaserve_client.cli.verbs import pip_line
from colaserve_services import __version__
from colaserve_services.errors import UsageError
from colaserve_services.rpc import requests
from colaserve_services.rpc.requests import Metadata

HEADERS: Final = ("traceparent", "tracestate")
_EXPORT_SECONDS: Final = 5  # patience with the collector, also when the process ends


class Tracer:
    """Makes this process' spans and sends them; see `start`."""

    def __init__(self, provider: Any):
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("colaserve", __version__)
        self._propagator, self._server = TraceContextTextMapPropagator(), SpanKind.SERVER

    def begin(self, name: str, parent: Metadata) -> Any:
        """A span of a call whose caller sent these headers."""
        context = self._propagator.extract(dict(parent))
        attributes = {"rpc.request_id": requests.current_request_id()}
        return self._tracer.start_span(name, context=context, kind=self._server, attributes=attributes)

    def child(self, name: str, parent: Any, start_ns: int, attributes: dict[str, int]) -> None:
        """A span within `parent` that ends now."""
        context = _inside(parent)
        self._tracer.start_span(name, context=context, start_time=start_ns, attributes=attributes).end()

    def headers(self, span: Any) -> Metadata:
        """What tells the next service that its work belongs to this span."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=_inside(span))
        return tuple(carrier.items())

    def stop(self) -> None:
        """Send what is left and trace no more. Blocks, for some seconds if nobody takes it."""
        global _tracer
        if _tracer is self:
            _tracer = None
        self._provider.shutdown()


class CallSpan:
    """The span of the call being served."""

    def __init__(self, tracer: Tracer, span: Any):
        self._tracer, self._span = tracer, span
        self._last = time.time_ns()
        self._blocks = 0

    def block(self, **attributes: int) -> None:
        """One more block is there; it is a span from the one before, or from the start of the call."""
        begun, self._last = self._last, time.time_ns()
        self._tracer.child("block", self._span, begun, {"block": self._blocks, **attributes})
        self._blocks += 1

    def note(self, name: str, value: str | int) -> None:
        """An attribute that was not known at the start."""
        self._span.set_attribute(name, value)

    def ended(self, code: str, failed: bool) -> None:
        """The call's status, and whether it is an error; that its caller left early is none."""
        from opentelemetry.trace import Status, StatusCode

        self.note("rpc.status", code)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR, code))


class NoSpan(CallSpan):
    """Of a call that nobody traces."""

    def __init__(self) -> None: ...

    def block(self, **attributes: int) -> None: ...

    def note(self, name: str, value: str | int) -> None: ...

    def ended(self, code: str, failed: bool) -> None: ...


_NO_SPAN: Final = NoSpan()
_tracer: Tracer | None = None  # of the process, as logging's handlers are


def start(endpoint: str, role: str) -> Tracer:
    """Trace from now on, to an OTLP/gRPC collector. Raises UsageError where the [trace] extra is not installed."""
    global _tracer
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(f"--otlp-endpoint: needs OpenTelemetry: {pip_line('trace')}") from error
    resource = Resource.create({"service.name": f"colaserve-{role}", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = Tracer(provider)
    return _tracer


def span_name(method: Iterable[str]) -> str:
    """A call's span is called Service/Method; GetInfo, which is asked all the time, has none."""
    path = "/".join(method)
    return "" if path.endswith("/GetInfo") else path


def timing(response: Any) -> dict[str, int]:
    """Where a block's time went, of a response that tells."""
    known = getattr(response, "timing", None)
    return {} if known is None else {"queue_us": known.queue_us, "compute_us": known.compute_us}


@contextmanager
def serving(name: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[CallSpan]:
    """The span of a call being served, from here to the end; calls made inside belong to it. Use it after `adopt`.
    Without a name there is no span."""
    given = tuple((key, text) for key in HEADERS if (text := requests.value(metadata, key)))
    parent = given or requests.trace_headers()  # a call within this process has its caller's already
    tracer = _tracer
    if tracer is None or not name:
        requests.carry_trace(parent)
        yield _NO_SPAN
        return
    span = tracer.begin(name, parent)
    requests.carry_trace(tracer.headers(span))
    try:
        yield CallSpan(tracer, span)
    finally:
        span.end()


def _inside(span: Any) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span, Context())
