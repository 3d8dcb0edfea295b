"""How the verbs reach a server. A test passes another connector in as click's context object."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from colaserve_client.eval.runner import Model

ATTEMPTS = 10  # a run presses as hard as it is told to: an overloaded server is waited for


class Client(Model, Protocol):
    """What the verbs need of a client; `colaserve_client.AsyncClient` is one."""

    async def info(self) -> Any:
        """Who answers: an object with model_name and space."""

    async def reconstruct(self, texts: Sequence[str]) -> Sequence[Any]:
        """The round trip of each text, in order."""


def _async_client(target: str) -> AbstractAsyncContextManager[Client]:
    from colaserve_client import AsyncClient
    from colaserve_client.settings import Retry

    return AsyncClient(target, retry=Retry(attempts=ATTEMPTS))


@dataclass(frozen=True)
class Connector:
    """Opens a client for an address."""

    open: Callable[[str], AbstractAsyncContextManager[Client]] = _async_client


async def identity(client: Client) -> dict[str, Any]:
    """What tells one served model from another in a run's settings."""
    info = await client.info()
    return {"name": info.model_name, "space": info.space}
