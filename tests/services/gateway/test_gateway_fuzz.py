"""Requests made of the OpenAPI document, and against it: no answer is a server error, none is outside the document."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
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
from tests.services.inference.asking import connected

EXAMPLES = int(os.environ.get("COLASERVE_FUZZ_EXAMPLES", "20"))  # for each endpoint and mode


@asynccontextmanager
async def gateway() -> AsyncIterator[str]:
    fake, (coordinator, _) = FakeGeneration(), await connected()
    others = LatentServicer(coordinator), InferenceServicer(coordinator, lambda: True)
    stub = coordinator_stub(LocalStub(fake), *map(LocalStub, others))
    async with running(fake, GatewaySettings(bounds=Bounds(choices=8)), stub=stub) as it:
        yield it.url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway in an event loop of its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(gateway()) as found:
        yield found


def operations() -> list[tuple[str, str]]:
    paths = create_app(LocalStub(FakeGeneration()), GatewaySettings()).state.document["paths"]
    return [(path, method.upper()) for path, methods in paths.items() for method in methods]


@pytest.fixture(scope="module")
def document(url: str) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), operations())
def test_no_request_is_answered_with_a_server_error(document, url, path, method, mode):
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
