"""How the verbs reach a server. A test passes another connector in as click's context object."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from colaserve_client.aio.client import AsyncClient
from colaserve_client.eval.runner import Model
from colaserve_client.eval.vae import Reconstructor
from colaserve_client.results import ModelInfo
from colaserve_client.settings import Retry

ATTEMPTS = 10  # a run presses as hard as it is told to: an overloaded server is waited for
FIRST_CONTACT = 5.0  # seconds until a server that is not there is given up
TIMEOUT = 600.0  # seconds for one answer, all attempts together


class Client(Model, Reconstructor, Protocol):
    """What the verbs need of a client; `colaserve_client.AsyncClient` is one."""

    async def info(self, *, timeout: float | None) -> ModelInfo:  # noqa: ASYNC109 - a gRPC deadline
        """Who answers."""


def _async_client(target: str) -> AbstractAsyncContextManager[Client]:
    return AsyncClient(target, timeout=TIMEOUT, retry=Retry(attempts=ATTEMPTS))


@dataclass(frozen=True)
class Connector:
    """Opens a client for an address."""

    open: Callable[[str], AbstractAsyncContextManager[Client]] = _async_client


async def identity(client: Client) -> dict[str, Any]:
    """What in a run's settings tells one served model from another, its defaults and compute dtypes included."""
    info = await client.info(timeout=FIRST_CONTACT)
    return {
        "name": info.name,
        "space": info.space,
        "dtypes": {stage.stage: stage.server.dtype for stage in info.stages},
        "default_sampler": asdict(info.default_sampler),
        "default_sampling": asdict(info.default_sampling),
    }
