"""A gateway on a free port, in front of a fake GenerationService."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from colaserve_services.gateway.settings import Bounds, GatewaySettings
from colaserve_services.rpc.settings import Tls
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import Running, running
from tests.services.rpc.conftest import authority

__all__ = ["authority"]
Start = Callable[..., Awaitable[Running]]


@pytest.fixture
def fake() -> FakeGeneration:
    return FakeGeneration()


@pytest.fixture
async def start(fake: FakeGeneration) -> AsyncIterator[Start]:
    """Starts gateways with settings of their own; stops them all."""
    async with AsyncExitStack() as started:

        async def run(settings: GatewaySettings | None = None, tls: Tls | None = None) -> Running:
            return await started.enter_async_context(running(fake, settings, tls))

        yield run


@pytest.fixture
async def gateway(start: Start) -> Running:
    return await start()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Running]:
    """One gateway for a module whose tests leave it as it was; takes 3 texts a request."""
    async with running(FakeGeneration(), GatewaySettings(bounds=Bounds(choices=3))) as one:
        yield one
