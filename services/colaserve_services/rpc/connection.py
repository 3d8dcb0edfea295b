"""A connection to another service that outlives its certificates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from colaserve_services.rpc.channels import Stub, open_channel
from colaserve_services.rpc.settings import ChannelSettings
from colaserve_services.rpc.watched_files import WatchedFiles

LOOK_SECONDS = 10.0  # between two looks at the files
REACH_SECONDS = 3.0  # a replica that came back is found within about one
LAST_CALLS_SECONDS = 600.0  # that calls of an old channel have to end


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
        self._closing: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[None] | None = None
        self.stub = Stub(kind, self._channel, settings)

    def follow(self, look_seconds: float = LOOK_SECONDS) -> None:
        """Look at the files from now on, until `close`."""
        self._following = asyncio.create_task(self._look(look_seconds))
        self._counting = asyncio.create_task(self._count_lives(self._channel))

    @property
    def serving(self) -> bool:
        """Whether a replica is connected and SERVING now."""
        with suppress(grpc.aio.UsageError):  # closed
            return self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY
        return False

    async def reached(self, seconds: float = REACH_SECONDS) -> None:
        """Return as soon as a replica is connected and SERVING; after so many seconds even if none is.

        Calls fail at once while there is none, as between the draining of one replica and the discovery of the next.
        """
        channel = self._channel
        with suppress(TimeoutError, grpc.aio.UsageError):  # the latter: closed meanwhile
            async with asyncio.timeout(seconds):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    await channel.wait_for_state_change(state)

    async def close(self) -> None:
        """End it, and what it left behind."""
        await self.retire(None)

    async def retire(self, grace: float | None = LAST_CALLS_SECONDS) -> None:
        """The same, once the calls that run have ended, or after so many seconds."""
        tasks = {task for task in (*self._closing, self._following, self._counting) if task}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close(grace)

    async def _count_lives(self, channel: grpc.aio.Channel) -> None:
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
            self._counting = asyncio.create_task(self._count_lives(channel))
        closing = asyncio.create_task(_close(old))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


async def _close(channel: grpc.aio.Channel) -> None:
    await channel.close(LAST_CALLS_SECONDS)
