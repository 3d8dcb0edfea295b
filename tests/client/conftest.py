"""A fake server for each test, and clients of it."""

import time
from collections.abc import AsyncIterator, Callable, Iterator

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


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Waits, five seconds at most, until a condition holds."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            time.sleep(0.01)

    return wait
