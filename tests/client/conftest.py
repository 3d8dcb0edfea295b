"""A fake server for each test, and clients of it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from colaserve_client import AsyncClient, Client, Retry
from tests.client import fakes

FAST = Retry(attempts=4, first_pause=0.01, longest_pause=0.05)


@pytest.fixture
def server() -> Iterator[fakes.FakeServer]:
    started = fakes.start_server()
    yield started
    started.stop()


@pytest.fixture
def behaviour(server: fakes.FakeServer) -> fakes.Behaviour:
    return server.behaviour


@pytest.fixture
def client(server: fakes.FakeServer) -> Iterator[Client]:
    with Client(server.target, retry=FAST, timeout=20) as connected:
        yield connected


@pytest.fixture
async def async_client(server: fakes.FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, retry=FAST, timeout=20) as connected:
        yield connected
