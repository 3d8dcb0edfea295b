"""Every Prometheus metric of colaserve, in one place. A process makes one `Metrics` and hands it to what it runs."""

import asyncio
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from colaserve_services import __version__
from colaserve_services.errors import UsageError
from colaserve_services.rpc import network
from colaserve_services.rpc.cached import Cached

CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BLOCK_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
PROBES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 1.5, 2, 3, 5, 8, 12, 30, 100)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

CACHED_SECONDS = 1.0  # that the text of all metrics is kept
_USUAL_SWITCH = sys.getswitchinterval()
_SHORT_SWITCH = 0.0002  # seconds that a thread with something to do leaves the interpreter to the one that writes

LONGEST_HEAD = 8192  # bytes of a request for them
ANSWER_SECONDS = 10.0  # that it and the reading of its answer may take


class Metrics:
    """All metrics, registered at `registry`. Labels: stage = encoder, prior, decoder or coordinator."""

    def __init__(self, registry: CollectorRegistry | None = None):
        self.registry = registry or CollectorRegistry()
        self.table: list[tuple[str, str, tuple[str, ...], str]] = []  # name, kind, labels, meaning
        self.coordinator: Callable[[], Any] | None = None  # asks the one behind a gateway for its GetInfo; None: silent
        self._calls()
        self._engines()
        self._generation()
        build = self._gauge("build_info", "Version of this process; always 1.", "version")
        build.labels(version=__version__).set(1)

    def watch_process(self) -> None:
        """Also export CPU seconds, memory and open files of this process, under their usual names `process_...`."""
        prometheus_client.ProcessCollector(registry=self.registry)

    def _calls(self) -> None:
        self.request_seconds = self._histogram(
            "request_seconds", "Seconds a call took, from its arrival to its status.", CALL_SECONDS,
            "service", "method", "code",
        )  # fmt: skip
        self.requests_in_progress = self._gauge(
            "requests_in_progress", "Calls being served now, waiting ones included.", "service", "method"
        )
        self.transfer_bytes = self._counter(
            "transfer_bytes_total", "Bytes of request (in) and response (out) messages.", "direction", "service"
        )

    def _engines(self) -> None:
        gauge, histogram, counter = self._gauge, self._histogram, self._counter
        self.queue_depth = gauge(
            "engine_queue_depth", "Sessions that wait in this coordinator, by the stage they wait for.", "stage"
        )
        self.running = gauge("engine_running", "Sessions or calls that run.", "stage")
        self.batch_rows = histogram("engine_batch_rows", "Latent positions in one forward pass.", ROWS, "stage")
        self.step_seconds = histogram("engine_step_seconds", "Seconds of one forward pass.", STEP_SECONDS, "stage")
        self.kv_bytes = gauge("engine_kv_bytes", "Bytes of the KV budget that sessions hold.", "stage")
        self.kv_budget_bytes = gauge("engine_kv_budget_bytes", "The KV budget in bytes.", "stage")
        self.kv_utilization = gauge("engine_kv_utilization_ratio", "Held share of the KV budget, 0 to 1.", "stage")
        self.kv_blocks = gauge(
            "engine_kv_blocks", "Blocks, each of block_size tokens, whose KV fits the budget.", "stage", "block_size"
        )
        self.engine_first_block = histogram(
            "engine_time_to_first_block_seconds", "Seconds from a session's arrival to its first block.",
            BLOCK_SECONDS, "stage",
        )  # fmt: skip
        self.engine_inter_block = histogram(
            "engine_inter_block_seconds", "Seconds between two blocks of a session.", BLOCK_SECONDS, "stage"
        )
        self.prefix_hits = counter("prefix_cache_hits_total", "Leading blocks found in the prefix cache.", "stage")
        self.prefix_misses = counter("prefix_cache_misses_total", "Leading blocks that were computed.", "stage")
        self.prefix_bytes = gauge("prefix_cache_bytes", "Bytes that the prefix cache holds.", "stage")
        self.weights_load_seconds = gauge("weights_load_seconds", "Seconds that reading the weights took.", "stage")
        self.refused = counter(
            "refused_total",
            "Calls refused, or ended, at a bound: queue, wait, slots, kv, idle, deadline, calls, key.",
            "stage", "reason",
        )  # fmt: skip
        self.preemptions = counter(
            "preemptions_total", "Sessions that gave their KV back for others, and were written again later.", "stage"
        )
        self.step_failures = counter(
            "step_failures_total", "Steps that failed with one session alone: it ended as STEP_FAILED.", "stage"
        )
        self.engine_tokens = counter(
            "engine_tokens_total", "Latents of sequences and contexts (in) and of written blocks (out).",
            "direction", "stage",
        )  # fmt: skip

    def _generation(self) -> None:
        self.first_block = self._histogram(
            "time_to_first_block_seconds", "Seconds from a generation's arrival to its first block.", BLOCK_SECONDS
        )
        self.generation_seconds = self._histogram(
            "generation_seconds", "Seconds from a generation's arrival to its end, however it ends.", CALL_SECONDS
        )
        self.inter_block = self._histogram(
            "inter_block_seconds", "Seconds between two blocks of a generation.", BLOCK_SECONDS
        )
        self.probe = self._histogram(
            "probe",
            "Probes of blocks whose requests asked for them: norm, distance, drift, disagreement, entropy (nats) or "
            "end_probability.",
            PROBES, "probe",
        )  # fmt: skip
        self.wasted_blocks = self._counter(
            "wasted_blocks_total", "Blocks that the prior wrote after the end of a text was found."
        )
        self.tokens = self._counter(
            "tokens_total", "Tokens of prompts (prompt) and of written text (completion).", "direction"
        )
        self.failovers = self._counter(
            "failovers_total", "Streams moved to another replica; outcome: resumed or failed.", "stage", "outcome"
        )
        self.stage_faults = self._counter(
            "stage_faults_total",
            "Wrong answers of a stage, which coordinators did not use: not_finite, shape, ids, count, timing, space, "
            "model (another checkpoint) or refused (what the coordinator had checked).",
            "stage", "kind",
        )  # fmt: skip

    def watch_probes(self, probes: Any) -> None:
        """Count those that are set."""
        for field, value in probes.ListFields():
            self.probe.labels(field.name).observe(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(*self._listed("counter", name, text, labels), registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(*self._listed("gauge", name, text, labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(*self._listed("histogram", name, text, labels), buckets=buckets, registry=self.registry)

    def _listed(self, kind: str, name: str, text: str, labels: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
        whole = f"colaserve_{name}"
        self.table.append((whole, kind, labels, text))
        return whole, text, labels


class Aliases(Collector):
    """The names that inference gateways read: those of all stages of this process or, in a gateway by itself, what the
    coordinator that answers says of its stages."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Sums of the queues, the fullest cache, the prior's blocks. A coordinator that is silent leaves them out."""
        metrics = self._metrics
        yield from self._load() if metrics.coordinator is None else _load_of(metrics.coordinator())
        first = metrics.first_block
        if metrics.coordinator is None and not any(
            labels == {"stage": "coordinator"} for labels, _ in _of(metrics.running)
        ):
            first = metrics.engine_first_block  # this is a stage
        yield _renamed(first, "vllm:time_to_first_token_seconds", "Alias: seconds to the first block.")
        yield _renamed(metrics.generation_seconds, "vllm:e2e_request_latency_seconds", "Alias: seconds of generations.")

    def _load(self) -> Iterator[Metric]:
        metrics = self._metrics
        waiting, running, usage = (
            [value for _, value in _of(gauge)]
            for gauge in (metrics.queue_depth, metrics.running, metrics.kv_utilization)
        )
        blocks = {labels["stage"]: (labels["block_size"], value) for labels, value in _of(metrics.kv_blocks)}
        size, count = blocks.get("prior") or next(iter(blocks.values()), ("0", 0.0))
        return _families(sum(waiting), sum(running), max(usage, default=0.0), size, count)


def _of(gauge: Gauge) -> list[tuple[dict[str, str], float]]:
    return [(sample.labels, sample.value) for family in gauge.collect() for sample in family.samples]


def _load_of(info: Any) -> Iterator[Metric]:
    """Of a coordinator's GetInfo."""
    if info is None:
        return iter(())
    usage = [stage.server.kv_bytes_used / stage.limits.kv_bytes for stage in info.stages if stage.limits.kv_bytes]
    blocks = [stage.limits.kv_blocks for stage in info.stages if stage.stage == "prior"]
    size = info.model.block_size * info.model.patch_size
    return _families(info.server.waiting, info.server.running, max(usage, default=0.0), str(size), sum(blocks))


def _families(waiting: float, running: float, usage: float, block_size: str, blocks: float) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "vllm:num_requests_waiting", "Alias: what waits; 0 at a stage, which has no queue.", waiting
    )
    yield GaugeMetricFamily("vllm:num_requests_running", "Alias: what runs.", running)
    yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Alias: share of KV in use.", usage)
    about = "Alias: tokens of a block, and blocks whose KV fits, in labels; always 1."
    cache = GaugeMetricFamily("vllm:cache_config_info", about, labels=("block_size", "num_gpu_blocks"))
    cache.add_metric((block_size, str(int(blocks))), 1)
    yield cache


def _renamed(histogram: Histogram, name: str, text: str) -> Metric:
    alias = Metric(name, text, "histogram")
    for family in histogram.collect():
        for sample in family.samples:
            alias.add_sample(sample.name.replace(family.name, name), sample.labels, sample.value)
    return alias


def exposition(registry: CollectorRegistry) -> bytes:
    """The text that Prometheus reads. Other threads wait little for the interpreter meanwhile."""
    sys.setswitchinterval(_SHORT_SWITCH)
    try:
        return prometheus_client.generate_latest(registry)
    finally:
        sys.setswitchinterval(_USUAL_SWITCH)


Health = Callable[[str], Coroutine[Any, Any, bool]]  # of "live" and "ready"


class MetricsEndpoint:
    """`GET /metrics` on its own port and thread, so that it answers under any load. All connections share the thread,
    the text is written once a second at most, and a connection ends with its answer.

    `GET /live` and `GET /ready` ask `health`, on the event loop that serves: where that hangs nothing is answered.
    """

    def __init__(self, metrics: Metrics, listener: socket.socket, answer_seconds: float, health: Health | None):
        self.port: int = listener.getsockname()[1]
        self._registry, self._listener = metrics.registry, listener
        self._answer_seconds, self._health = answer_seconds, health
        self._serving_loop = None if health is None else asyncio.get_running_loop()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    @staticmethod
    def start(
        metrics: Metrics, host: str, port: int, health: Health | None = None, answer_seconds: float = ANSWER_SECONDS
    ) -> "MetricsEndpoint":
        """Raise UsageError when the port is taken; 0 takes a free one. `health` is asked on the event loop that runs
        now."""
        prometheus_client.disable_created_metrics()  # a second gauge for every counter; nobody reads them
        try:
            endpoint = MetricsEndpoint(metrics, network.listen(host, port), answer_seconds, health)
        except OSError as error:
            where = network.address(host, port)
            raise UsageError(f"--metrics-port: cannot listen on {where}: {error.strerror or error}") from error
        endpoint._thread.start()
        return endpoint

    def close(self) -> None:
        """Stop answering and free the port."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._text = Cached(self._written, CACHED_SECONDS)
        server = await asyncio.start_server(self._answer, sock=self._listener, limit=LONGEST_HEAD)
        await self._stop.wait()
        server.close()

    async def _written(self) -> bytes:
        return exposition(self._registry)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._answer_seconds):
                request = await reader.readuntil(b"\r\n\r\n")
                status, body = await self._answer_to(request.split(b"\r\n")[0].split(b" "))
                head = f"HTTP/1.1 {status}\r\ncontent-type: {prometheus_client.CONTENT_TYPE_LATEST}\r\n"
                end = f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
                writer.write((head + end).encode() + (b"" if request.startswith(b"HEAD ") else body))
                await writer.drain()
                writer.close()
                await writer.wait_closed()  # all is sent
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()

    async def _answer_to(self, line: list[bytes]) -> tuple[str, bytes]:
        if len(line) != 3 or line[0] not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", b"GET /metrics\n"
        path = line[1].partition(b"?")[0].decode(errors="replace")
        if path in ("/metrics", "/"):
            return "200 OK", await self._text.get()
        if path in ("/live", "/ready") and self._health is not None and self._serving_loop is not None:
            asked = asyncio.run_coroutine_threadsafe(self._health(path[1:]), self._serving_loop)
            return ("200 OK", b"yes\n") if await asyncio.wrap_future(asked) else ("503 Service Unavailable", b"no\n")
        return "404 Not Found", b"the metrics are at /metrics\n"
