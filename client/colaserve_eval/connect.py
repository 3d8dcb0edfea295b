"""How the verbs reach a server. A test passes another connector in as click's context object."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from colaserve_client.aio.client import AsyncClient
from colaserve_client.cli.options import Server
from colaserve_client.results import ModelInfo
from colaserve_eval.runner import Model
from colaserve_eval.vae import Reconstructor

FIRST_CONTACT = 20.0  # seconds until a server that does not answer at all is given up
TIMEOUT = 600.0  # seconds for one answer where nothing else is said: a run must not stand still for ever


class Client(Model, Reconstructor, Protocol):
    """What the verbs need of a client; `colaserve_client.AsyncClient` is one."""

    async def info(self, *, timeout: float | None) -> ModelInfo:  # noqa: ASYNC109 - a gRPC deadline
        """Who answers."""


def _async_client(server: Server) -> AbstractAsyncContextManager[Client]:
    timeout = server.timeout or TIMEOUT
    return AsyncClient(server.target, key=server.key, tls=server.tls, timeout=timeout, retry=server.retry)


@dataclass(frozen=True)
class Connector:
    """Opens a client of a server."""

    open: Callable[[Server], AbstractAsyncContextManager[Client]] = _async_client


async def identity(client: Client) -> dict[str, Any]:
    """What in a run's settings tells one served model from another, its defaults and compute dtypes included."""
    info = await client.info(timeout=FIRST_CONTACT)
    return {
        "name": info.name,
        "space": info.space,
        "dtypes": {stage.stage: stage.server.dtype for stage in info.stages},
        "default_max_new_tokens": info.default_max_new_tokens,
        "default_sampler": asdict(info.default_sampler),
        "default_sampling": asdict(info.default_sampling),
    }
