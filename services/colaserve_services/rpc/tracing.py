"""OpenTelemetry traces: a request is one trace, whatever services it passes, with a span a call and a span a block.

    stop = tracing.start("http://collector:4317", "prior")       # once, at start; needs the [trace] extra
    with tracing.serving("PriorService/Sample", metadata) as span:
        span.block(response)                                     # a span from the last block, or the start, until now
    stop()                                                       # sends what is left

A generation has, beside those, one span and two metrics in OpenTelemetry's conventions for generative AI (`generated`).

The trace's context comes and goes as W3C `traceparent` and `tracestate`: HTTP headers and gRPC metadata. A process that
traces nothing hands a caller's context on. Spans hold names, counts and times, never text. Sampling and limits are
OpenTelemetry's own variables (OTEL_TRACES_SAMPLER, OTEL_BSP_..., OTEL_EXPORTER_OTLP_...).
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from colaserve_client.cli.verbs import pip_line
from colaserve_services import __version__
from colaserve_services.errors import UsageError
from colaserve_services.rpc import requests
from colaserve_services.rpc.requests import Metadata

HEADERS: Final = ("traceparent", "tracestate")
_EXPORT_SECONDS: Final = 5  # patience with the collector, also when the process ends

# Of https://github.com/open-telemetry/semantic-conventions-genai; seconds.
_DURATIONS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKENS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0
)  # fmt: skip
_OF_METRICS: Final = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "gen_ai.response.model")

_tracer: Any = None  # of the process, as logging's handlers are
_duration: Any = None  # likewise
_first_token: Any = None


def start(endpoint: str, role: str) -> Callable[[], None]:
    """Trace from now on, to an OTLP/gRPC collector. Raises UsageError where the [trace] extra is not installed.

    What it returns sends what is left and ends tracing; it blocks for some seconds where the collector is away.
    """
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
    _tracer = provider.get_tracer("colaserve", __version__)
    if os.environ.get("OTEL_METRICS_EXPORTER") == "none":  # for collectors that take traces alone
        return provider.shutdown
    stop_metrics = _start_metrics(endpoint, resource)

    def stop() -> None:
        provider.shutdown()
        stop_metrics()

    return stop


def _start_metrics(endpoint: str, resource: Any) -> Callable[[], None]:
    global _duration, _first_token
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    exporter = OTLPMetricExporter(endpoint, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_SECONDS)
    provider = MeterProvider([PeriodicExportingMetricReader(exporter)], resource, shutdown_on_exit=False)
    meter = provider.get_meter("colaserve", __version__)

    def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Any:
        return meter.create_histogram(name, "s", text, explicit_bucket_boundaries_advisory=bounds)

    _duration = histogram("gen_ai.server.request.duration", "A generation, from arrival to end.", _DURATIONS)
    _first_token = histogram("gen_ai.server.time_to_first_token", "To the first block of a generation.", _FIRST_TOKENS)
    return partial(provider.shutdown, timeout_millis=1000 * _EXPORT_SECONDS)


def generated(seconds: float, first: float | None, attributes: Mapping[str, Any], error: str) -> None:
    """A generation has ended, so many seconds after it came: a span of its own inside of the call being served, and the
    metrics. `attributes`: gen_ai.*, never a text; `error`: the kind of what ended it, or empty; `first`: seconds to its
    first block, None without one."""
    if _tracer is None:
        return
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    about, now = {name: attributes[name] for name in _OF_METRICS}, time.time_ns()
    failed = {"error.type": error} if error else {}
    latency = {"gen_ai.latency.e2e": seconds} | ({} if first is None else {"gen_ai.latency.time_to_first_token": first})
    span = _tracer.start_span(
        f"{attributes['gen_ai.operation.name']} {attributes['gen_ai.request.model']}",
        context=TraceContextTextMapPropagator().extract(dict(requests.trace_headers())),
        kind=SpanKind.INTERNAL,
        attributes={**attributes, **latency, **failed},
        start_time=now - round(seconds * 1e9),
    )
    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(now)
    if _duration is not None:
        _duration.record(seconds, about | failed)
        if first is not None:
            _first_token.record(first, about)


class CallSpan:
    """The span of the call being served. Without one, as in a process that traces nothing, all does nothing."""

    def __init__(self, span: Any = None):
        self._span, self._last, self._blocks = span, time.time_ns(), 0

    def block(self, response: Any) -> None:
        """One more block is there; it is a span from the one before, or from the start of the call. It says where the
        time went, if the response does."""
        if self._span is None:
            return
        begun, self._last = self._last, time.time_ns()
        attributes, timing = {"block": self._blocks}, getattr(response, "timing", None)
        if timing is not None:
            attributes |= {"queue_us": timing.queue_us, "compute_us": timing.compute_us}
        _tracer.start_span("block", context=_inside(self._span), start_time=begun, attributes=attributes).end()
        self._blocks += 1

    def ended(self, code: str, failed: bool) -> None:
        """The call's status, and whether it is an error; that its caller left early is none."""
        if self._span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("rpc.status", code)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR, code))


def span_name(method: Iterable[str]) -> str:
    """A call's span is called Service/Method; what is asked all the time has none."""
    service, name = method
    return "" if name in requests.PROBES else f"{service}/{name}"


@contextmanager
def serving(name: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[CallSpan]:
    """The span of a call being served, from here to the end; calls made inside belong to it. Use it after `adopt`.
    Without a name there is no span."""
    given = tuple((key, text) for key in HEADERS if (text := requests.value(metadata, key)))
    parent = given or requests.trace_headers()  # a call within this process has its caller's already
    if _tracer is None or not name:
        requests.carry_trace(parent)
        yield CallSpan()
        return
    span = _begin(name, parent)
    try:
        yield CallSpan(span)
    finally:
        span.end()


def _begin(name: str, parent: Metadata) -> Any:
    """A span of a call whose caller sent these headers; what this task calls will get those of the span."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers, carrier = TraceContextTextMapPropagator(), dict[str, str]()
    attributes = {"rpc.request_id": requests.current_request_id()}
    context = headers.extract(dict(parent))
    span = _tracer.start_span(name, context=context, kind=SpanKind.SERVER, attributes=attributes)
    headers.inject(carrier, context=_inside(span))
    requests.carry_trace(tuple(carrier.items()))
    return span


def _inside(span: Any) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span, Context())
