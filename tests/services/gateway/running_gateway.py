"""What tests hold of a gateway that runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from colaserve_services.gateway.app import create_app
from colaserve_services.gateway.backend import Reach, coordinator_stub
from colaserve_services.gateway.server import HttpServer, serve
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.rpc.local import LocalStub
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.settings import ServerTls
from tests.services.gateway.fake_generation import FakeGeneration

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass
class Running:
    """A served gateway and what is behind and in front of it."""

    fake: FakeGeneration
    server: HttpServer
    http: httpx.AsyncClient
    metrics: Metrics

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def counted(self, metric: str, **labels: str) -> float | None:
        """A sample of the gateway's metrics."""
        return self.metrics.registry.get_sample_value(f"colaserve_{metric}", {"service": "gateway", **labels})

    async def chat(self, text: str = "Where?", /, **fields: object) -> httpx.Response:
        body = {"model": "fake/cola", "messages": [{"role": "user", "content": text}], **fields}
        return await self.http.post(CHAT, json=body)

    async def complete(self, prompt: object = "Where?", /, **fields: object) -> httpx.Response:
        return await self.http.post(COMPLETIONS, json={"model": "fake/cola", "prompt": prompt, **fields})


@asynccontextmanager
async def running(
    fake: FakeGeneration,
    settings: GatewaySettings | None = None,
    tls: ServerTls | None = None,
    stub: object = None,
    reach: Reach | None = None,
) -> AsyncIterator[Running]:
    """Serve on a free port; stop at the end. `stub`: another one than that of `fake`."""
    metrics = Metrics()
    stub = stub or coordinator_stub(LocalStub(fake), LocalStub(fake.infill))
    app = create_app(stub, settings or GatewaySettings(), metrics, reach)
    server = await serve(app, "127.0.0.1", 0, tls, renewal_seconds=0.01)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as http:
            yield Running(fake, server, http, metrics)
    finally:
        await server.stop(grace=0.5)
