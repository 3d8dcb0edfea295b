"""Requests made of the OpenAPI document, and against it: no answer is a server error, none is outside the document."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.schemas import BaseSchema

from colaserve_services.coordinator.service import LatentServicer
from colaserve_services.gateway.app import create_app
from colaserve_services.gateway.backend import coordinator_stub
from colaserve_services.gateway.settings import Bounds, GatewaySettings
from colaserve_services.inference.service import InferenceServicer
from colaserve_services.rpc.local import LocalStub
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import running
from tests.services.inference.serving import connected

EXAMPLES = int(os.environ.get("COLASERVE_FUZZ_EXAMPLES", "20"))  # for each endpoint and mode


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway in a thread of its own."""
    known: list[str] = []
    ready, stop, loops = threading.Event(), asyncio.Event(), []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        fake, (coordinator, _) = FakeGeneration(), await connected()
        others = LatentServicer(coordinator), InferenceServicer(coordinator, lambda: True)
        stub = coordinator_stub(LocalStub(fake), *map(LocalStub, others))
        async with running(fake, GatewaySettings(bounds=Bounds(choices=8)), stub=stub) as gateway:
            known.append(gateway.url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    yield known[0]
    loops[0].call_soon_threadsafe(stop.set)
    thread.join()


def operations() -> list[tuple[str, str]]:
    paths = create_app(LocalStub(FakeGeneration()), GatewaySettings()).state.document["paths"]
    return [(path, method.upper()) for path, methods in paths.items() for method in methods]


@pytest.fixture(scope="module")
def document(url: str) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), operations())
def test_no_request_is_answered_with_a_server_error(
    document: BaseSchema, url: str, path: str, method: str, mode: GenerationMode
):
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def send(case: schemathesis.Case) -> None:
        response = case.call(base_url=url)
        assert response.status_code < 500
        if response.status_code >= 400:
            error = response.json()["error"]
            if path.startswith("/v2/"):
                assert isinstance(error, str)
                return
            names = {"message", "type"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}
            assert set(error) == names

    try:
        send()
    except Unsatisfiable:  # a GET takes nothing that could be wrong
        assert mode is GenerationMode.NEGATIVE
