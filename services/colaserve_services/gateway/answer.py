"""Runs the generations of a request and answers with them, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve.v1.latent_service_pb2 import InfillRequest
from colaserve_services.errors import Unavailable
from colaserve_services.gateway.backend import Backend, GenerateCall
from colaserve_services.gateway.dialects import Dialect
from colaserve_services.gateway.disconnect import until_disconnect
from colaserve_services.gateway.errors import ApiError, api_error
from colaserve_services.gateway.events import EventStream
from colaserve_services.gateway.infill import InfillCall
from colaserve_services.gateway.older import Texts
from colaserve_services.gateway.pieces import Piece, joined, piece_of
from colaserve_services.gateway.record import RequestRecord, record_of
from colaserve_services.gateway.settings import Bounds
from colaserve_services.gateway.shapes import Usage
from colaserve_services.gateway.side_by_side import SideBySide

_UNREAD_LOOK: Final = 1.0  # seconds between two looks whether anybody waits, at a stream that nobody reads


@dataclass(frozen=True)
class Plan:
    """What a request comes to: its generations, choice by choice, and how to speak of them."""

    requests: Sequence[GenerateRequest] | Sequence[InfillRequest]  # choice i of prompt p is number p * per_prompt + i
    per_prompt: int
    dialect: Dialect
    deadline: float  # time.monotonic() seconds
    stream: bool = False
    usage_chunk: bool = False
    names: Mapping[str, str] = field(default_factory=dict)  # of the coordinator's fields, for errors


class Answer(Response):
    """The answer to a plan. Leaving early, on a client that goes away too, cancels all that still runs."""

    def __init__(self, plan: Plan, backend: Backend, bounds: Bounds):
        super().__init__()
        self._plan, self._backend, self._bounds = plan, backend, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        record.choices = len(self._plan.requests)
        events = EventStream(send, self._plan.dialect, self._plan.usage_chunk)
        run = self._stream(events, record) if self._plan.stream else self._whole(scope, receive, send, record)
        try:
            record.client_gone = not await until_disconnect(receive, run)
        except asyncio.CancelledError:  # the server goes down and its grace is over; the client is still there
            told = api_error(Unavailable("the server went down before the text was complete; a retry may succeed"))
            await self._give_up(events, record, told)

    async def _whole(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        gathered: list[list[Piece]] = [[] for _ in self._plan.requests]
        try:
            async with self._pieces(record) as coming:
                async for index, piece in coming:
                    gathered[index].append(piece)
            choices = [joined(pieces) for pieces in gathered]
            usage = self._usage(choices, record)
        except Exception as error:
            raise api_error(error, self._plan.names) from error
        body = to_json(self._plan.dialect.answer(choices, usage))
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, events: EventStream, record: RequestRecord) -> None:
        last = [Piece()] * len(self._plan.requests)
        try:
            async with self._pieces(record) as coming:
                async for index, piece in coming:
                    await self._read_in_time(events.piece(index, piece))
                    last[index] = piece
            await events.end(self._usage(last, record))
        except Exception as error:
            await self._give_up(events, record, api_error(error, self._plan.names))

    async def _read_in_time(self, sending: Coroutine[Any, Any, None]) -> None:
        """Send. Raises Unavailable when the client has not read for so long that its slot is better given to others."""
        seconds, task = self._bounds.unread_seconds, asyncio.create_task(sending)
        try:
            await asyncio.wait([task], timeout=seconds)
            while not task.done():
                if await self._backend.others_wait():
                    raise Unavailable(f"not read for {seconds:g} s while others waited")
                await asyncio.wait([task], timeout=_UNREAD_LOOK)
            await task
        finally:
            task.cancel()

    async def _give_up(self, events: EventStream, record: RequestRecord, told: ApiError) -> None:
        if not events.begun:
            raise told
        record.failed(told)
        await events.fail(told, self._bounds.last_word_seconds)

    @asynccontextmanager
    async def _pieces(self, record: RequestRecord) -> AsyncIterator[AsyncIterator[tuple[int, Piece]]]:
        """The pieces of all choices as they come, until the deadline."""
        end = asyncio.get_running_loop().time() + self._plan.deadline - time.monotonic()

        async def start(request: GenerateRequest | InfillRequest) -> GenerateCall:
            if isinstance(request, InfillRequest):
                return InfillCall(request, await self._backend.infill(request, self._plan.deadline))
            return await self._backend.generate(request, self._plan.deadline)

        async with (
            asyncio.timeout_at(end),
            SideBySide(self._plan.requests, start, self._bounds.parallel_choices) as messages,
        ):
            yield self._translated(messages, record)

    async def _translated(self, messages: SideBySide, record: RequestRecord) -> AsyncIterator[tuple[int, Piece]]:
        texts = [Texts(self._backend) for _ in self._plan.requests]
        async for index, message in messages:
            record.saw_block()
            await texts[index].fill_in(message)
            yield index, piece_of(message)

    def _usage(self, last: Sequence[Piece], record: RequestRecord) -> Usage:
        """Of all choices, from the last piece of each; a prompt counts once, however often it was continued."""
        if any(piece.finish_reason is None for piece in last):
            raise Unavailable("a generation ended without saying why; a retry may succeed")
        record.prompt_tokens = sum(piece.prompt_tokens for piece in last[:: self._plan.per_prompt])
        record.completion_tokens = sum(piece.completion_tokens for piece in last)
        total = record.prompt_tokens + record.completion_tokens
        return {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "total_tokens": total,
        }
