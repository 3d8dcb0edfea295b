"""One request is one trace, with a span a call and a span a block; spans hold no text."""

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from colaserve_services.errors import UsageError
from colaserve_services.rpc import requests, tracing
from tests.services.launch.processes import FREE_PORTS, started
from tests.waiting import wait_until

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPT = "a very secret prompt"
STAGES = {"EncoderService/Encode", "PriorService/Sample", "DecoderService/Decode"}
GENERATED = "text_completion tiny_b4"
NAMES = {"HTTP POST", "GenerationService/Generate", GENERATED, *STAGES}
METRICS = {"gen_ai.server.request.duration", "gen_ai.server.time_to_first_token"}
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_METRIC_EXPORT_INTERVAL": "500"}  # milliseconds until they are sent


class MetricsCollector(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps the metrics it is sent, by name."""

    def __init__(self):
        self.metrics = {}

    def Export(self, request, context):
        for resource in request.resource_metrics:
            self.metrics |= {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
        return metrics_service_pb2.ExportMetricsServiceResponse()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans it is sent, each with the name of the service that sent it."""

    def __init__(self):
        self.spans, self.of_metrics = [], MetricsCollector()

    def Export(self, request, context):
        for resource in request.resource_spans:
            role = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [(role, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting():
    server, collector = grpc.server(ThreadPoolExecutor(2)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector.of_metrics, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def post(url, headers):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 12, "seed": 7, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=30) as answer:
        json.load(answer)


def of_trace(collector):
    return [(role, span) for role, span in collector.spans if span.trace_id.hex() == TRACE]


def calls_among(collector):
    return {span.name: span for _, span in of_trace(collector) if span.name != "block"}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("split", [(), ("--split",)], ids=["one process", "split"])
def test_a_request_is_one_trace_through_all_services_with_a_span_a_block(tmp_path, split):
    with (
        collecting() as (collector, endpoint),
        started(tmp_path, "up", *split, *FREE_PORTS, f"--otlp-endpoint={endpoint}", env=SOON) as system,
    ):
        post(system.http, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
        # a slow collector may not hear the last of them
        wait_until(lambda: set(calls_among(collector)) == NAMES and set(collector.of_metrics.metrics) == METRICS)
        assert system.stop() == 0
    spans, calls = of_trace(collector), calls_among(collector)
    assert set(calls) == NAMES
    assert calls["HTTP POST"].parent_span_id.hex() == PARENT
    assert calls["GenerationService/Generate"].parent_span_id == calls["HTTP POST"].span_id
    assert {calls[stage].parent_span_id for stage in STAGES} == {calls["GenerationService/Generate"].span_id}
    assert calls[GENERATED].parent_span_id == calls["GenerationService/Generate"].span_id
    check_generated({each.key: each.value for each in calls[GENERATED].attributes})
    for metric in collector.of_metrics.metrics.values():
        [point] = metric.histogram.data_points
        assert (point.count, metric.unit) == (1, "s")
        assert {each.key: each.value.string_value for each in point.attributes}["gen_ai.provider.name"] == "colaserve"
    for name in ("GenerationService/Generate", "PriorService/Sample", "DecoderService/Decode"):
        blocks = [span for _, span in spans if span.name == "block" and span.parent_span_id == calls[name].span_id]
        assert len(blocks) == 4  # 12 tokens, and the prompt's tail with the first of them
        assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in blocks)
        assert {attribute.key for attribute in blocks[0].attributes} >= {"block", "compute_us", "queue_us"}
    roles = {role for role, _ in spans}
    assert len(roles) == (5 if split else 1), roles
    assert not any("secret" in str(span) for _, span in spans)


def check_generated(found):
    """The attributes of a generation, in the conventions for generative AI."""
    assert found["gen_ai.operation.name"].string_value == "text_completion"
    names = ("request.max_tokens", "request.seed", "usage.output_tokens")
    assert [found[f"gen_ai.{name}"].int_value for name in names] == [12, 7, 12]
    assert found["gen_ai.usage.input_tokens"].int_value > 0
    assert found["gen_ai.request.top_p"].double_value == 0.9
    assert found["gen_ai.response.finish_reasons"].array_value.values[0].string_value == "length"
    latency = [found[f"gen_ai.latency.{name}"].double_value for name in ("time_in_queue", "time_to_first_token", "e2e")]
    assert 0 <= latency[0] < latency[1] < latency[2]
    assert not any("stop" in name for name in found)


def test_a_process_that_traces_nothing_hands_its_callers_trace_on():
    given = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("other", "x"))
    with tracing.serving("GenerationService/Generate", given) as span:
        span.block(None)
        assert ("traceparent", f"00-{TRACE}-{PARENT}-01") in requests.outgoing_metadata()
    requests.carry_trace(())


def test_without_opentelemetry_it_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UsageError, match=r"^--otlp-endpoint: needs OpenTelemetry: pip install .*\[trace\]'$"):
        tracing.start("http://127.0.0.1:1", "prior")
