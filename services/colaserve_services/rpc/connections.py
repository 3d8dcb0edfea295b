"""Connections to other services that outlive their certificates, and the replicas behind a target, one each."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final

import grpc
from grpc import ChannelConnectivity

from colaserve_services.rpc import network
from colaserve_services.rpc.channels import Stub, open_channel, split_address, split_target
from colaserve_services.rpc.settings import ChannelSettings
from colaserve_services.rpc.watched_files import WatchedFiles

FILES_SECONDS: Final = 10.0  # between two looks at the files of TLS
NAMES_SECONDS: Final = 5.0  # between two look-ups of a name
REACH_SECONDS: Final = 3.0  # a replica that came back is found within about one
LAST_CALLS_SECONDS: Final = 86_400.0  # that calls of an old channel have to end; then they are cancelled

_log = logging.getLogger(__name__)


class Tasks:
    """Tasks that run until they end, or until `cancel`."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it from now on."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def cancel(self) -> None:
        """Cancel all, and wait for their end."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Connection:
    """The `stub` of a service, on a channel that is made anew when a file of its TLS settings changes.

    Calls that run stay on the old channel. New files that cannot be read are logged, and the old channel stays.
    """

    def __init__(
        self,
        kind: Callable[[Any], Any],
        target: str,
        settings: ChannelSettings,
        service: str,
        host: str = "",
        began_to_serve: Callable[[], None] = lambda: None,
    ):
        """`host`: see open_channel. While it is followed, `began_to_serve` is called when it can be called again."""
        self.address, self.host, self._began_to_serve = target, host, began_to_serve
        self.lives = 0  # rises whenever the connection changes: behind it there may be another process now
        tls, self._open = settings.tls, partial(open_channel, target, settings, service, host)
        self._files = WatchedFiles(*((tls.ca, tls.cert, tls.key) if tls else ()))
        self._channel = self._open()
        self._tasks = Tasks()
        self._counting: asyncio.Task[None] | None = None
        self.stub = Stub(kind, self._channel, settings)

    def follow(self, look_seconds: float = FILES_SECONDS) -> None:
        """Look at the files from now on, until `close`."""
        self._tasks.start(self._look(look_seconds))
        self._counting = self._tasks.start(self._count_lives())

    @property
    def serving(self) -> bool:
        """Whether a replica is connected and SERVING now."""
        with suppress(grpc.aio.UsageError):  # closed
            return self._channel.get_state(try_to_connect=True) is ChannelConnectivity.READY
        return False

    async def reached(self, seconds: float = REACH_SECONDS) -> None:
        """Return as soon as a replica is connected and SERVING; after so many seconds even if none is.

        Calls fail at once while there is none, as between the draining of one replica and the discovery of the next.
        """
        channel = self._channel
        with suppress(TimeoutError, grpc.aio.UsageError):  # the latter: closed meanwhile
            async with asyncio.timeout(seconds):
                while (state := channel.get_state(try_to_connect=True)) is not ChannelConnectivity.READY:
                    await channel.wait_for_state_change(state)

    async def close(self, grace: float | None = None) -> None:
        """End it, and what it left behind, once the calls that run have ended, or after so many seconds."""
        await self._tasks.cancel()
        await self._channel.close(grace)

    async def _count_lives(self) -> None:
        channel = self._channel
        with suppress(grpc.aio.UsageError):  # it was closed
            while True:
                await channel.wait_for_state_change(channel.get_state(try_to_connect=True))
                self.lives += 1
                if self.serving:
                    self._began_to_serve()

    async def _look(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            if (channel := self._files.read_again(self._open)) is not None:
                self._use(channel)

    def _use(self, channel: grpc.aio.Channel) -> None:
        old, self._channel = self._channel, channel
        self.stub.use(channel)
        self.lives += 1
        if self._counting is not None:
            self._counting.cancel()
        self._counting = self._tasks.start(self._count_lives())
        self._tasks.start(old.close(LAST_CALLS_SECONDS))


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
        self._tasks = Tasks()

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
                self._tasks.start(self._found.pop(address).close(LAST_CALLS_SECONDS))

    def follow(self, look_seconds: float = NAMES_SECONDS) -> None:
        """Find the replicas from now on, until `close`."""
        self._tasks.start(self._follow(look_seconds))

    async def close(self) -> None:
        """End all connections."""
        await self._tasks.cancel()
        await asyncio.gather(*(connection.close() for connection in self))

    async def _follow(self, seconds: float) -> None:
        while True:
            await self.find()
            await asyncio.sleep(seconds)

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
