"""Runs the generations of a request and answers with them, whole or as server-sent events."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_services.errors import Unavailable
from colaserve_services.gateway.backend import Backend, TokenTexts
from colaserve_services.gateway.dialects.base import Dialect, Message, Usage, event
from colaserve_services.gateway.edge import RequestRecord
from colaserve_services.gateway.errors import ApiError, api_error
from colaserve_services.gateway.settings import Bounds

_UNREAD_LOOK: Final = 1.0  # seconds between two looks whether calls are queued, while a stream is not read
_EVENT_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # asks nginx not to gather events
)

StartCall = Callable[[float], AsyncIterator[Any]]  # with its deadline in time.monotonic() seconds
M = TypeVar("M")


@dataclass
class CallsAnswer(ABC):
    """The answer to a request that runs calls of the coordinator. When it ends early, also because the client went
    away, all calls that still run are cancelled."""

    backend: Backend
    bounds: Bounds
    record: RequestRecord
    deadline: float  # time.monotonic() seconds
    calls: Sequence[StartCall]
    streaming: bool  # it is a stream of events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = EventStream(send)
        end = asyncio.get_running_loop().time() + self.deadline - time.monotonic()
        calls = [partial(start, self.deadline) for start in self.calls]

        async def take(index: int, message: Any) -> None:
            for added in await self.take(index, message):
                await self._read_in_time(events.send(added))

        try:
            async with asyncio.timeout_at(end):
                await side_by_side(calls, self.at_once(), take, receive)
            if not self.streaming:
                await (await self.whole())(scope, receive, send)
                return
            for last in self.last_events():
                await events.send(last)
            await events.end()
        except ClientDisconnect:
            raise
        except asyncio.CancelledError:  # the server goes down and its grace is over; the client is still there
            error = Unavailable("the server went down before the answer was complete; a retry may succeed")
            await self._give_up(events, api_error(error))
        except Exception as error:
            await self._give_up(events, self.error(error))

    def at_once(self) -> int:
        """Calls that run side by side."""
        return self.bounds.parallel_choices

    @abstractmethod
    async def take(self, index: int, message: Any) -> Iterable[bytes]:
        """Keep what the answer needs of a call's message. Returns the events that it adds to a stream."""

    @abstractmethod
    async def whole(self) -> Response:
        """The answer, when it is no stream."""

    def last_events(self) -> Iterable[bytes]:
        """What ends a complete stream."""
        return ()

    @abstractmethod
    def error(self, error: Exception) -> ApiError:
        """The answer to a failure."""

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a begun stream which cannot go on."""
        return event(error.content())

    async def _read_in_time(self, sending: Coroutine[Any, Any, None]) -> None:
        """Send. Raises Unavailable when the client has not read for `unread_seconds` and other calls are queued."""
        seconds, task = self.bounds.unread_seconds, asyncio.create_task(sending)
        try:
            await asyncio.wait([task], timeout=seconds)
            while not task.done():
                if await self.backend.others_wait():
                    raise Unavailable(f"not read for {seconds:g} s while others waited")
                await asyncio.wait([task], timeout=_UNREAD_LOOK)
            await task
        finally:
            task.cancel()

    async def _give_up(self, events: "EventStream", error: ApiError) -> None:
        if not events.begun:
            raise error
        self.record.failed_with = error.status
        await events.fail(self.failure(error), self.bounds.last_word_seconds)


@dataclass
class Answer(CallsAnswer):
    """The answer to a request for generations, a call a prompt: sample i of prompt p is choice p * per_prompt + i."""

    per_prompt: int
    dialect: Dialect[Any]

    def __post_init__(self) -> None:
        count = len(self.calls) * self.per_prompt
        self._choices = [GenerateResponse() for _ in range(count)]  # each as one message; of a stream the last of each
        self._texts = [TokenTexts(self.backend) for _ in range(count)]

    def at_once(self) -> int:
        return max(super().at_once() // self.per_prompt, 1)

    async def take(self, number: int, part: Message) -> Iterable[bytes]:
        sample, message = part
        index = number * self.per_prompt + sample
        if not message.HasField("preview"):
            self.record.saw_block()
        await self._texts[index].fill_in(message)
        if self.streaming:
            self._choices[index] = message
            return self.dialect.events(index, message)
        text = self._choices[index].text + message.text
        self._choices[index].MergeFrom(message)
        self._choices[index].text = text
        return ()

    async def whole(self) -> Response:
        return json_response(self.dialect.answer(self._choices, self._usage()))

    def last_events(self) -> Iterable[bytes]:
        return self.dialect.last_events(self._choices, self._usage())

    def error(self, error: Exception) -> ApiError:
        return api_error(error, self.dialect.names())

    def failure(self, error: ApiError) -> bytes:
        return self.dialect.failure(error)

    def _usage(self) -> Usage:
        """Of all choices, from the last message of each; a prompt counts once, however often it was continued."""
        if not all(message.finish_reason for message in self._choices):
            raise Unavailable("a generation ended without saying why; a retry may succeed")
        prompt = sum(message.usage.prompt_tokens for message in self._choices[:: self.per_prompt])
        completion = sum(message.usage.completion_tokens for message in self._choices)
        self.record.prompt_tokens, self.record.completion_tokens = prompt, completion
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class EventStream:
    """Server-sent events, begun with the first one, so that what fails before it is answered with its own status."""

    def __init__(self, send: Send):
        self._send = send
        self.begun = False

    async def send(self, event: bytes) -> None:
        """Send an event."""
        await self._body(event, more=True)

    async def end(self) -> None:
        """End the stream."""
        await self._body(b"", more=False)

    async def fail(self, event: bytes, seconds: float) -> None:
        """End a begun stream with an event that says why. A client that does not read within `seconds` is not waited
        for: the connection is then closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.send(event)
                await self.end()

    async def _body(self, data: bytes, more: bool) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_HEADERS)})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def json_response(content: Any, status: int = 200) -> Response:
    """A whole answer."""
    return Response(to_json(content), status, media_type="application/json")


async def side_by_side(
    calls: Sequence[Callable[[], AsyncIterator[M]]],
    parallel: int,
    take: Callable[[int, M], Awaitable[None]],
    receive: Receive,
) -> None:
    """Run calls, at most `parallel` at a time, and give each message with its call's number to `take`, one by one.

    The first failure is raised, and ClientDisconnect when the client goes away; all that still runs is then cancelled.
    """
    running, taking = asyncio.Semaphore(parallel), asyncio.Lock()

    async def run(index: int, call: Callable[[], Any]) -> None:
        async with running, aclosing(call()) as messages:
            async for message in messages:
                async with taking:
                    await take(index, message)

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_disconnect(receive))
            await asyncio.wait([group.create_task(run(index, call)) for index, call in enumerate(calls)])
            watching.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _disconnect(receive: Receive) -> NoReturn:
    """To be called when the request's body has been read: the next thing to come is the end of the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect
