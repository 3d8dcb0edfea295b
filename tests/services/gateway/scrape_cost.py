"""What a scrape of /metrics costs the event loop of a gateway: `python -m tests.services.gateway.scrape_cost`.

The registry holds what a busy `colaserve up` has. Another process scrapes, less often than the text is kept for.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time

from colaserve_services.rpc.metrics import Metrics
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import running

SCRAPES = 10
PAUSE = 1.1  # seconds, longer than a text is kept
BEAT = 0.001
CLIENT = """
import sys, urllib.request
for url in sys.stdin:
    print(len(urllib.request.urlopen(url.strip()).read()), flush=True)
"""

STAGES = ("encoder", "prior", "decoder", "coordinator")
VALUES = {
    "stage": STAGES,
    "service": ("gateway", "GenerationService", "LatentService"),
    "method": ("Generate", "GetInfo", "Tokenize", "/v1/chat/completions", "/v1/completions", "/metrics", "/ready"),
    "code": ("OK", "CANCELLED", "UNAVAILABLE"),
    "direction": ("in", "out"),
    "reason": ("queue", "wait", "kv", "idle", "deadline"),
    "kind": ("not_finite", "shape", "ids"),
    "outcome": ("resumed", "failed"),
}


def fill(metrics: Metrics) -> None:
    """A sample of every series."""
    for family in list(metrics.registry._collector_to_names):
        names = [name for name in family._labelnames if name in VALUES]
        if len(names) == len(family._labelnames):
            for values in itertools.product(*(VALUES[name] for name in names)):
                child = family.labels(*values) if values else family
                (getattr(child, "observe", None) or child.inc)(0.01)


async def longest_wait(of: asyncio.Future[bytes]) -> float:
    """Seconds by which a task of the loop went on later than asked for, at most, until another one was done."""
    worst = 0.0
    while not of.done():
        asked = time.perf_counter()
        await asyncio.sleep(BEAT)
        worst = max(worst, time.perf_counter() - asked - BEAT)
    return worst


async def measured(client: asyncio.subprocess.Process, url: str) -> tuple[float, float, int]:
    """Medians over scrapes: CPU seconds of the event loop's thread, the longest wait of a task; bytes of an answer."""
    assert client.stdin is not None
    assert client.stdout is not None
    cpu, waits = [], []
    for _ in range(SCRAPES):
        await asyncio.sleep(PAUSE)
        before = time.thread_time()
        client.stdin.write(f"{url}\n".encode())
        size = int(await client.stdout.readline())
        cpu.append(time.thread_time() - before)
        await asyncio.sleep(PAUSE)
        client.stdin.write(f"{url}\n".encode())
        answer = asyncio.ensure_future(client.stdout.readline())
        waits.append(await longest_wait(answer))
    return statistics.median(cpu), statistics.median(waits), size


async def main() -> None:
    """Print a table: /metrics beside /health, whose cost is that of any request."""
    async with running(FakeGeneration()) as gateway:
        fill(gateway.metrics)
        pipe = asyncio.subprocess.PIPE
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, stdin=pipe, stdout=pipe)
        for path in ("/health", "/metrics"):
            cpu, worst, size = await measured(client, gateway.url + path)
            print(f"{path}: {size} bytes, {cpu * 1e3:.2f} ms of the loop's CPU, a task waited {worst * 1e3:.2f} ms")
        client.stdin.close()
        await client.wait()


if __name__ == "__main__":
    asyncio.run(main())
