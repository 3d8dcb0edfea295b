"""What an attack works with: a server to call, a count of what was sent and answered, and the table of attacks."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from tests.abuse.server import KEY, Server

MIB = 1 << 20
PIECE = 1 << 16  # bytes written at once
AUTHORIZED = (("authorization", f"Bearer {KEY}"),)
LEAVES_AFTER = 30.0  # seconds
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))  # the server writes no more unread


@dataclass
class Target:
    """The server, what was sent to it, and how it answered."""

    server: Server
    sent: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    _open: list[asyncio.StreamWriter] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def channel(self, *more: tuple[str, int]) -> AsyncIterator[grpc.aio.Channel]:
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
                   ("grpc.use_local_subchannel_pool", 1), *more]  # fmt: skip
        async with grpc.aio.insecure_channel(self.server.grpc, options) as channel:
            yield channel

    async def call(self, method: str, message: bytes, compression: Any = None) -> None:
        """One call with raw bytes; its status is noted."""
        async with self.channel() as channel:
            self.sent += len(message) if compression is None else len(message) // 1000
            call = channel.unary_stream(f"/colaserve.v1.{method}")(
                message, metadata=AUTHORIZED, compression=compression, timeout=60
            )
            await self.noted(self.read(call))

    async def calls(
        self, method: str, requests: Sequence[Message], read: bool = True, seconds: float = LEAVES_AFTER
    ) -> None:
        """All at once, on four connections, which nobody reads where `read` is false; then their caller leaves."""
        async with contextlib.AsyncExitStack() as stack:
            calls = []
            for first in range(4):
                channel = await stack.enter_async_context(self.channel(*(() if read else SMALL_WINDOW)))
                begin = channel.unary_stream(f"/colaserve.v1.{method}")
                for request in requests[first::4]:
                    self.sent += request.ByteSize()
                    calls.append(begin(request.SerializeToString(), metadata=AUTHORIZED))
            ends = [asyncio.ensure_future(self.read(call) if read else call.code()) for call in calls]
            await asyncio.wait(ends, timeout=seconds)
            for call in calls:
                self.answers[(await call.code()).name if call.done() else "left"] += 1
                call.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    async def noted(self, work: Awaitable[object]) -> None:
        try:
            await work
            self.answers["OK"] += 1
        except grpc.aio.AioRpcError as error:
            self.answers[error.code().name] += 1

    @staticmethod
    async def read(call: Any) -> None:
        async for _ in call:
            pass

    async def post(self, path: str, body: bytes, key: str = KEY, chunked: bool = False, hold: bool = False) -> None:
        """One request; its status is noted. `hold`: the last byte is never sent."""
        reader, writer = await self.connect(self.server.http_port)
        length = "transfer-encoding: chunked" if chunked else f"content-length: {len(body) + hold}"
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        with contextlib.suppress(ConnectionError):
            writer.write(f"{head}{length}\r\n\r\n".encode())
            for start in range(0, len(data), PIECE):
                writer.write(data[start : start + PIECE])
                await writer.drain()
                self.sent += len(data[start : start + PIECE])
        if hold:
            self.answers["held"] += 1
        else:
            await self.answer(reader)
            await self.hang_up(writer)

    async def answer(self, reader: asyncio.StreamReader, seconds: float = 60) -> None:
        try:
            line = await asyncio.wait_for(reader.readline(), seconds)
            self.answers[line.decode(errors="replace").split(" ")[1] if line.count(b" ") > 1 else "closed"] += 1
        except (TimeoutError, ConnectionError) as error:
            self.answers["closed" if isinstance(error, ConnectionError) else "no answer"] += 1

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self._open.append(writer)
        return reader, writer

    async def hang_up(self, *writers: asyncio.StreamWriter) -> None:
        """These connections, or all."""
        for writer in writers or self._open[:]:
            writer.transport.abort()
            with contextlib.suppress(ValueError):
                self._open.remove(writer)
        await asyncio.sleep(0)


Round = Callable[[Target], Awaitable[None]]


@dataclass(frozen=True)
class Attack:
    name: str
    round: Round
    sessions: int = 0  # honest load: so many sessions, compared with as many short ones
    short: bool = False  # also in the short form


ATTACKS: list[Attack] = []


def attack(name: str, sessions: int = 0, short: bool = False) -> Callable[[Round], Round]:
    def add(one: Round) -> Round:
        ATTACKS.append(Attack(name, one, sessions, short))
        return one

    return add
