"""A TCP proxy that does harm: it delays, cuts, half-opens and corrupts the connections it carries."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_CHUNK = 16384


@dataclass
class Harm:
    """What is done to what passes, now; may be changed at any time."""

    delay: float = 0.0  # most seconds that a chunk waits
    cut: float = 0.0  # chance of a chunk that its connection is reset instead
    swallow: float = 0.0  # chance of a chunk that from then on nothing passes, while the connection stays open
    corrupt: float = 0.0  # chance of a chunk that one of its bytes is changed


@dataclass
class Proxy:
    """`async with Proxy(port, target) as proxy: proxy.harm = Harm(cut=0.01)`; `done` counts what it did."""

    port: int
    target: int
    harm: Harm = field(default_factory=Harm)
    seed: int = 0
    done: Counter[str] = field(default_factory=Counter)

    async def __aenter__(self) -> Proxy:
        self._draw = random.Random(self.seed)
        self._carrying: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carrying.add(task)
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        finally:
            task.add_done_callback(self._carrying.discard)
        await self._carry((reader, writer), there)

    async def _carry(self, here: Streams, there: Streams) -> None:
        ways = [asyncio.create_task(self._pass_on(a[0], b[1])) for a, b in ((here, there), (there, here))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for _, writer in (here, there):
                _reset(writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if self._happens("cut", self.harm.cut):
                    return
                if self._happens("swallow", self.harm.swallow):
                    await asyncio.sleep(3600)
                if self.harm.delay:
                    await asyncio.sleep(self._draw.uniform(0, self.harm.delay))
                writer.write(self._damaged(chunk) if self._happens("corrupt", self.harm.corrupt) else chunk)
                await writer.drain()

    def _happens(self, what: str, chance: float) -> bool:
        happens = chance > 0 and self._draw.random() < chance
        self.done[what] += happens
        return happens

    def _damaged(self, chunk: bytes) -> bytes:
        index, damaged = self._draw.randrange(len(chunk)), bytearray(chunk)
        damaged[index] ^= 1 << self._draw.randrange(8)
        return bytes(damaged)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: the other side learns it at once, and not politely."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
