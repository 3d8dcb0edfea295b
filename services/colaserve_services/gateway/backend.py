"""The coordinator as the gateway sees it: its calls with deadline and metadata, and its description of itself, kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Protocol
from urllib.parse import quote

import grpc

from colaserve.v1 import generation_pb2 as pb
from colaserve_services.errors import ColaserveError, Unavailable
from colaserve_services.gateway.record import RequestRecord
from colaserve_services.rpc.requests import Metadata, outgoing_metadata

CLIENT: Final = "x-colaserve-client"  # the key's name
USER: Final = "x-colaserve-user"  # the request's `user`, percent-encoded
INFO_TIMEOUT: Final = 5.0
UNARY_TIMEOUT: Final = 30.0

Reach = Callable[[], Awaitable[None]]
Info = pb.GenerationServiceGetInfoResponse


class GenerateCall(Protocol):
    """A running Generate call."""

    def __aiter__(self) -> AsyncIterator[pb.GenerateResponse]: ...
    def cancel(self) -> bool | None: ...


class GenerationStub(Protocol):
    """A GenerationServiceStub of grpc.aio, or one that calls a servicer in this process."""

    Generate: Any
    Tokenize: Any
    Detokenize: Any
    GetInfo: Any


async def _at_once() -> None:
    """A service in this process is always there."""


def metadata(record: RequestRecord) -> Metadata:
    """Who asks, beside the request id that every call carries."""
    user = ((USER, quote(record.user, safe="@:+")),) if record.user else ()
    return (*outgoing_metadata(), (CLIENT, record.client), *user)


class Backend:
    """Calls a GenerationService. `reach` returns when one can be called, or it is no use to wait."""

    def __init__(self, stub: GenerationStub, info_seconds: float, reach: Reach | None = None):
        self._stub = stub
        self._reach = reach or _at_once
        self._info_seconds = info_seconds
        self._info: Info | None = None
        self._info_at = -float("inf")
        self._asking: asyncio.Task[Info] | None = None

    async def generate(self, request: pb.GenerateRequest, deadline: float, record: RequestRecord) -> GenerateCall:
        """Start a generation. `deadline` in time.monotonic() seconds."""
        await self._reach()
        timeout = max(deadline - time.monotonic(), 0.001)
        call: GenerateCall = self._stub.Generate(request, timeout=timeout, metadata=metadata(record))
        return call

    async def tokenize(self, text: str, record: RequestRecord) -> pb.TokenizeResponse:
        await self._reach()
        request = pb.TokenizeRequest(text=text)
        response: pb.TokenizeResponse
        response = await self._stub.Tokenize(request, timeout=UNARY_TIMEOUT, metadata=metadata(record))
        return response

    async def detokenize(self, ids: list[int], record: RequestRecord) -> str:
        await self._reach()
        request = pb.DetokenizeRequest(token_ids=ids)
        response = await self._stub.Detokenize(request, timeout=UNARY_TIMEOUT, metadata=metadata(record))
        return str(response.text)

    async def info(self) -> Info:
        """The coordinator's description of itself, `info_seconds` old at most, older only while it cannot be asked."""
        if self._info is not None and time.monotonic() - self._info_at <= self._info_seconds:
            return self._info
        if self._asking is None:  # all who wait share one call
            self._asking = asyncio.create_task(self._ask())
        try:
            return await asyncio.shield(self._asking)
        except (grpc.RpcError, ColaserveError, TimeoutError):
            if self._info is None:
                raise
            return self._info

    async def _ask(self) -> Info:
        try:
            if self._info is None:  # an older one does until then
                await self._reach()
            self._info = await self.fresh_info()
            self._info_at = time.monotonic()
            return self._info
        finally:
            self._asking = None

    async def fresh_info(self, seconds: float = INFO_TIMEOUT) -> Info:
        request = pb.GenerationServiceGetInfoRequest()
        async with asyncio.timeout(seconds):
            info: Info = await self._stub.GetInfo(request, timeout=seconds, metadata=outgoing_metadata())
            return info

    async def check_ready(self, seconds: float = 2.0) -> None:
        """Raise unless the coordinator answers and finds all its stages serving."""
        for stage in (await self.fresh_info(seconds)).stages:
            if not stage.serving:
                raise Unavailable(f"{stage.stage} is not serving")
