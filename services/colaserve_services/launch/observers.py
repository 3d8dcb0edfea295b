"""What engines report, as Prometheus metrics. No torch."""

from collections.abc import Callable

from colaserve_services.engine.observer import EngineObserver
from colaserve_services.rpc.metrics import Metrics

Failing = Callable[[str, bool], None]  # a stage, and whether its engine is at fault


class EngineMetrics(EngineObserver):
    """Of one engine; `stage` is its label. Called on the device thread; prometheus_client's locks are short."""

    def __init__(self, metrics: Metrics, stage: str, failing: Failing = lambda *_: None):
        self._refused, self._stage, self._failing = metrics.refused, stage, failing
        self._running = metrics.running.labels(stage)
        self._rows, self._step = metrics.batch_rows.labels(stage), metrics.step_seconds.labels(stage)
        self._kv, self._budget = metrics.kv_bytes.labels(stage), metrics.kv_budget_bytes.labels(stage)
        self._utilization = metrics.kv_utilization.labels(stage)
        self._first, self._next = metrics.engine_first_block.labels(stage), metrics.engine_inter_block.labels(stage)
        self._in, self._out = metrics.engine_tokens.labels("in", stage), metrics.engine_tokens.labels("out", stage)
        self._hits, self._misses = metrics.prefix_hits.labels(stage), metrics.prefix_misses.labels(stage)
        self._held = metrics.prefix_bytes.labels(stage)
        self._step_failures, self._preemptions = metrics.step_failures.labels(stage), metrics.preemptions.labels(stage)

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        self._step.observe(seconds)
        self._rows.observe(rows)

    def load(self, running: int, kv_bytes: int, kv_budget: int) -> None:
        self._running.set(running)
        self._kv.set(kv_bytes)
        self._budget.set(kv_budget)
        self._utilization.set(kv_bytes / kv_budget if kv_budget else 0.0)

    def block(self, seconds: float, first: bool) -> None:
        (self._first if first else self._next).observe(seconds)

    def tokens(self, count_in: int, count_out: int) -> None:
        self._in.inc(count_in)
        self._out.inc(count_out)

    def prefix_cache(self, hits: int, misses: int, bytes_held: int) -> None:
        self._hits.inc(hits)
        self._misses.inc(misses)
        self._held.set(bytes_held)

    def preempted(self) -> None:
        self._preemptions.inc()

    def step_failed(self) -> None:
        self._step_failures.inc()

    def failing(self, failing: bool) -> None:
        self._failing(self._stage, failing)

    def refused(self, reason: str) -> None:
        self._refused.labels(self._stage, reason).inc()
