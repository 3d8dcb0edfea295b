"""What tests hold of a gateway that runs."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from colaserve_services.gateway.app import create_app
from colaserve_services.gateway.backend import Reach, coordinator_stub
from colaserve_services.gateway.server import HttpServer, serve
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.rpc.local import LocalStub
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.settings import Tls
from tests.services.gateway.fake_generation import FakeGeneration

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
BUDGET = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}


def asking(path: str, text: str, /, **fields: Any) -> dict[str, Any]:
    """A request of a dialect that asks for the same as those of the others."""
    said = [{"role": "user", "content": text}]
    own: dict[str, dict[str, Any]] = {
        CHAT: {"messages": said},
        COMPLETIONS: {"prompt": text},
        RESPONSES: {"input": text},
        MESSAGES: {"messages": said, "max_tokens": 9},
    }
    return {"model": "fake/cola", **own[path], **fields}


def events(response: httpx.Response, end: str = "[DONE]") -> list[Any]:
    """The JSON of a stream's events, which must end so."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert not end or lines.pop() == end
    return [json.loads(line) for line in lines]


def outcome(path: str, answer: dict[str, Any]) -> tuple[str, str, list[int]]:
    """Text, reason and usage in OpenAI's older words."""
    used = answer["usage"]
    if path == RESPONSES:
        reason = {"completed": "stop", "incomplete": "length"}[answer["status"]]
        return answer["output"][0]["content"][0]["text"], reason, [used["input_tokens"], used["output_tokens"]]
    if path == MESSAGES:
        reason = {"end_turn": "stop", "max_tokens": "length"}[answer["stop_reason"]]
        return answer["content"][0]["text"], reason, [used["input_tokens"], used["output_tokens"]]
    [choice] = answer["choices"]
    text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    return text, choice["finish_reason"], [used["prompt_tokens"], used["completion_tokens"]]


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
        return await self.http.post(CHAT, json=asking(CHAT, text, **fields))

    async def complete(self, prompt: object = "Where?", /, **fields: object) -> httpx.Response:
        return await self.http.post(COMPLETIONS, json={"model": "fake/cola", "prompt": prompt, **fields})


@asynccontextmanager
async def running(
    fake: FakeGeneration,
    settings: GatewaySettings | None = None,
    tls: Tls | None = None,
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
