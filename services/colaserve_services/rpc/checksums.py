"""A CRC-32 at the end of every message between our services: what TCP lets through changed is found out.

A sealed message ends with one more field, number 1000003, of type fixed32: the CRC-32 of all bytes before it. Readers
that do not know it skip it, as protobuf asks of them. A caller seals its requests and asks for sealed answers with the
metadata `x-colaserve-checksum: crc32`; whoever does not ask gets none. TCP's own 16-bit sum misses one damaged packet
in 65,536; gRPC's compression is no defence, since it leaves a message plain that does not shrink, which latents do
not. The sum costs about 2 us for a block of latents, at either end.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import AioRpcError, Metadata

from colaserve_services.errors import Corrupted
from colaserve_services.rpc import cancellation, requests

ASKED: Final = ("x-colaserve-checksum", "crc32")
_TAG: Final = b"\x9d\xa4\xe8\x03"  # field 1000003, fixed32
_LENGTH: Final = len(_TAG) + 4
_EOF: Any = grpc.aio.EOF


def asked(metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
    """Whether a caller seals its requests and wants sealed answers."""
    return requests.value(metadata, ASKED[0]) == ASKED[1]


def seal(message: bytes) -> bytes:
    """The message with its checksum at the end."""
    return message + _TAG + zlib.crc32(message).to_bytes(4, "little")


def opened(received: bytes, required: bool = True) -> bytes:
    """The message without its checksum. Raises Corrupted when that does not fit, or is `required` and not there."""
    if received[-_LENGTH:-4] != _TAG:
        if required:
            raise Corrupted(f"{len(received)} bytes came without a checksum")
        return received
    message = received[:-_LENGTH]
    if zlib.crc32(message) != int.from_bytes(received[-4:], "little"):
        raise Corrupted(f"{len(received)} bytes came that do not fit their checksum")
    return message


class SealedChannel:
    """What a generated stub is made on: requests are sealed, answers must be."""

    def __init__(self, channel: grpc.aio.Channel):
        self._channel = channel

    def __getattr__(self, kind: str) -> Callable[..., Callable[..., SealedCall]]:
        """unary_unary, unary_stream, stream_unary, stream_stream."""
        make = getattr(self._channel, kind)

        def method(
            path: str, request_serializer: Any, response_deserializer: Any, **more: Any
        ) -> Callable[..., SealedCall]:
            inner = make(path, request_serializer=lambda message: seal(request_serializer(message)), **more)
            return lambda *args, **options: SealedCall(inner(*args, **options), response_deserializer)

        return method


class SealedCall:
    """A call of grpc.aio whose answers are opened as they are read; one that does not fit its checksum ends the call
    with DATA_LOSS, the closing of its channel with UNAVAILABLE."""

    def __init__(self, call: Any, deserialize: Callable[[bytes], Any]):
        self._call, self._deserialize = call, deserialize

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer().__await__()

    async def __aiter__(self) -> Any:
        with cancellation.of_calls_as_errors():
            async for received in self._call:
                yield self._open(received)

    async def read(self) -> Any:
        """The next answer, or EOF."""
        with cancellation.of_calls_as_errors():
            received = await self._call.read()
        return received if received is _EOF else self._open(received)

    async def write(self, request: Any) -> None:
        """Send a request."""
        with cancellation.of_calls_as_errors():
            await self._call.write(request)

    async def _answer(self) -> Any:
        with cancellation.of_calls_as_errors():
            received = await self._call
        return self._open(received)

    def _open(self, received: bytes) -> Any:
        try:
            return self._deserialize(opened(received))
        except (Corrupted, DecodeError) as error:
            self._call.cancel()
            lost = grpc.StatusCode.DATA_LOSS
            raise AioRpcError(lost, Metadata(), Metadata(), str(error), None) from error
