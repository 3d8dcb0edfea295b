import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import prometheus_client
import pytest
from prometheus_client.registry import Collector

from colaserve.v1.generation_pb2 import GenerationServiceGetInfoResponse
from colaserve_services.errors import UsageError
from colaserve_services.rpc.metrics import Aliases, Metrics, MetricsEndpoint, exposition

GET = b"GET /metrics HTTP/1.1\r\n\r\n"


def filled():
    """Metrics with one sample of every family."""
    metrics = Metrics()
    for family in list(metrics.registry._collector_to_names):
        names = family._labelnames
        child = family.labels(**dict.fromkeys(names, "x")) if names else family
        (getattr(child, "observe", None) or child.inc)(1)
    return metrics


def test_every_metric_has_a_help_text_and_the_prefix():
    for family in filled().registry.collect():
        assert family.name.startswith("colaserve_")
        assert family.documentation.endswith(".")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_exposition_is_clean_to_promtool():
    prometheus_client.disable_created_metrics()
    text = prometheus_client.generate_latest(filled().registry)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_the_endpoint_serves_what_is_counted_and_frees_its_port():
    metrics = Metrics()
    metrics.wasted_blocks.inc(3)
    with endpoint(metrics) as port:
        assert b"colaserve_wasted_blocks_total 3.0" in answer_to(port, GET)
        with pytest.raises(UsageError, match=f"--metrics-port.*{port}"):
            MetricsEndpoint.start(metrics, "127.0.0.1", port)
    MetricsEndpoint.start(metrics, "127.0.0.1", port).close()


def test_a_process_reports_its_cpu_seconds_memory_and_open_files_on_demand():
    metrics = Metrics()
    metrics.watch_process()
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"):
        assert metrics.registry.get_sample_value(name) > 0


def test_aliases_sum_queues_and_report_the_fullest_cache():
    metrics = Metrics()
    for stage, waiting, usage in (("prior", 3, 0.5), ("decoder", 1, 0.75)):
        metrics.queue_depth.labels(stage).set(waiting)
        metrics.kv_utilization.labels(stage).set(usage)
    metrics.kv_blocks.labels("prior", "16").set(512)
    metrics.engine_first_block.labels("prior").observe(0.3)
    metrics.registry.register(Aliases(metrics))
    value = metrics.registry.get_sample_value
    assert value("vllm:cache_config_info", {"block_size": "16", "num_gpu_blocks": "512"}) == 1
    assert value("vllm:time_to_first_token_seconds_sum", {"stage": "prior"}) == 0.3
    assert value("vllm:num_requests_waiting") == 4
    assert value("vllm:num_requests_running") == 0
    assert value("vllm:kv_cache_usage_perc") == 0.75


def test_a_gateways_aliases_are_what_its_coordinator_says():
    metrics = Metrics()
    stage = {"server": {"kv_bytes_used": 25}, "limits": {"kv_bytes": 100, "kv_blocks": 512}}
    info = GenerationServiceGetInfoResponse(
        server={"running": 3, "waiting": 2},
        model={"block_size": 8, "patch_size": 2},
        stages=[{"stage": "prior", **stage}, {"stage": "encoder"}],
    )
    answers = [info, None]
    metrics.coordinator = lambda: answers.pop(0)
    metrics.first_block.observe(0.25)
    metrics.generation_seconds.observe(1.5)
    said = {sample.name: sample for family in Aliases(metrics).collect() for sample in family.samples}
    names = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "time_to_first_token_seconds_sum")
    assert [said[f"vllm:{name}"].value for name in names] == [2, 3, 0.25, 0.25]
    assert said["vllm:cache_config_info"].labels == {"block_size": "16", "num_gpu_blocks": "512"}
    assert said["vllm:e2e_request_latency_seconds_sum"].value == 1.5
    silent = {sample.name for family in Aliases(metrics).collect() for sample in family.samples}
    assert "vllm:num_requests_waiting" not in silent


@contextmanager
def endpoint(metrics=None, **settings):
    started = MetricsEndpoint.start(metrics or Metrics(), "127.0.0.1", 0, **settings)
    try:
        yield started.port
    finally:
        started.close()


def answer_to(port, request):
    """All that comes until the connection ends; a server that ends it with bytes unread resets it."""
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, suppress(ConnectionError):
        connection.sendall(request)
        while part := connection.recv(65536):
            answer += part
    return bytes(answer)


def test_many_silent_connections_cost_no_threads_and_keep_nobody_out():
    with endpoint() as port, ExitStack() as silent:
        before = threading.active_count()
        for _ in range(50):
            silent.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert b"colaserve_build_info" in answer_to(port, GET)
        assert threading.active_count() == before


def test_a_request_for_metrics_that_does_not_come_is_not_waited_for():
    with endpoint(answer_seconds=0.1) as port:
        assert answer_to(port, b"GET /metrics") == b""
        assert answer_to(port, b"x" * 100_000) == b""


def test_only_the_metrics_are_served():
    with endpoint() as port:
        assert answer_to(port, b"GET /other HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404 ")
        assert answer_to(port, b"POST /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405 ")
        head = answer_to(port, b"HEAD /metrics HTTP/1.1\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert head.endswith(b"\r\n\r\n")


class Noting(Collector):
    """Notes, whenever metrics are written, how long a thread may keep the interpreter from the others."""

    def __init__(self):
        self.intervals = []

    def collect(self):
        self.intervals.append(sys.getswitchinterval())
        return iter(())


def test_the_text_is_written_once_a_second_however_often_it_is_asked_for():
    metrics, noting = Metrics(), Noting()
    metrics.registry.register(noting)
    with endpoint(metrics) as port:
        begun, before = time.monotonic(), len(noting.intervals)
        for _ in range(20):
            answer_to(port, GET)
        assert len(noting.intervals) - before <= 2 + (time.monotonic() - begun)


def test_threads_wait_little_for_the_interpreter_while_the_text_is_written():
    metrics, noting, usual = filled(), Noting(), sys.getswitchinterval()
    metrics.registry.register(noting)
    noting.intervals.clear()
    assert exposition(metrics.registry) == prometheus_client.generate_latest(metrics.registry)
    assert min(noting.intervals) < usual / 10
    assert sys.getswitchinterval() == usual
