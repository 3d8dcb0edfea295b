"""The replicas of a service, each on a connection of its own, so that a caller can choose among them."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final

from colaserve_services.rpc import network
from colaserve_services.rpc.channels import split_address, split_target
from colaserve_services.rpc.connection import Connection
from colaserve_services.rpc.settings import ChannelSettings

LOOK_UP_SECONDS: Final = 5.0  # between two looks at what a name stands for

_log = logging.getLogger(__name__)


class Replicas:
    """The connections to the addresses of a target: "host:port", "dns:///host:port" or "a:1,b:2". Names are looked up
    again every few seconds: new replicas are found, and those that are gone and do not serve any more are left."""

    def __init__(
        self,
        kind: Callable[[Any], Any],
        target: str,
        settings: ChannelSettings,
        service: str,
        began_to_serve: Callable[[], None] = lambda: None,
    ):
        """`began_to_serve` is called whenever a replica can be called that could not."""
        self._make = lambda address, host: Connection(kind, address, settings, service, host, began_to_serve)
        self._fixed: list[str] = []
        self._names: list[tuple[str, int]] = []
        for part in split_target(target):
            self._sort_in(part)
        self._found: dict[str, Connection] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._found.values()))

    async def find(self) -> None:
        """Look the names up; connect to what is new."""
        hosts = dict.fromkeys(self._fixed, "")
        for host, port in self._names:
            hosts |= dict.fromkeys(await self._addresses(host, port), host)
        for address in [address for address in hosts if address not in self._found]:
            self._found[address] = self._make(address, hosts[address])
            self._found[address].follow()
        for address in self._found.keys() - hosts.keys():
            if not self._found[address].serving:
                self._retire(self._found.pop(address))

    def follow(self) -> None:
        """Find the replicas from now on, until `close`."""
        self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """End all connections."""
        tasks = {*self._retiring, *((self._following,) if self._following else ())}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(connection.close() for connection in self))

    async def _follow(self) -> None:
        while True:
            await self.find()
            await asyncio.sleep(LOOK_UP_SECONDS)

    async def _addresses(self, host: str, port: int) -> list[str]:
        """What a name stands for; what it stood for when it cannot be looked up now."""
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            _log.warning("%s cannot be looked up: %s", host, error.strerror or error)
            return [connection.address for connection in self if connection.host == host]
        return [network.address(str(info[4][0]), port) for info in infos]

    def _sort_in(self, part: str) -> None:
        """A name is looked up now and again; an address, or another scheme of gRPC's, stands for itself."""
        name = part.removeprefix("dns:///").removeprefix("dns:")
        if "://" in name or name.startswith(("unix:", "unix-abstract:")):
            self._fixed.append(part)
            return
        host, port = split_address(name)
        try:
            ipaddress.ip_address(host)
            self._fixed.append(name)
        except ValueError:
            self._names.append((host, port))

    def _retire(self, connection: Connection) -> None:
        retiring = asyncio.create_task(connection.retire())
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)
