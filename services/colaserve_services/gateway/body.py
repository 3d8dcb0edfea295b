"""A request's body: read only where a path takes one, bounded, and checked away from the event loop."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Coroutine
from email.message import Message as Headers
from typing import Any, Final

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response
from starlette.types import Message, Receive

from colaserve_services.errors import Cancelled
from colaserve_services.gateway.errors import ApiError
from colaserve_services.gateway.record import RequestRecord
from colaserve_services.gateway.settings import Bounds
from colaserve_services.gateway.validation import validation_error
from colaserve_services.offload import offload

MOST_PARTS: Final = 32_768  # arrays, objects and keys in one body; each costs a hundred times its bytes in memory
MOST_ITEMS: Final = 262_144  # commas; parsing so many values holds the interpreter for some 20 ms

_DISCARDED: Final = 16  # times the bound: so much more is read and dropped, since who still writes reads no answer
_SMALL: Final = 64 * 1024  # bytes; a longer body is parsed in a thread


def _more_than(most: int, signs: str) -> re.Pattern[str]:
    """Matches a text with more than `most` of these signs outside of strings. It never goes back, and is one call: a
    loop here would let each step of the engines wait for the interpreter."""
    one = rf'[^{signs}"]*+(?:"(?:[^"\\]++|\\.)*+"[^{signs}"]*+)*+[{signs}]'
    return re.compile(f"(?:{one}){{{most + 1}}}+", re.DOTALL)


_BOUNDS: Final = (
    (MOST_PARTS, "[{:", _more_than(MOST_PARTS, r"\[{:"), "arrays, objects and keys"),
    (MOST_ITEMS, ",", _more_than(MOST_ITEMS, ","), "items"),
)


class Body:
    """What a request receives: its body whole, read when it is asked for; then what comes after it.

    413 when the body is too long, 408 when it takes too long, Cancelled when the client goes away meanwhile.
    """

    def __init__(self, receive: Receive, bounds: Bounds, record: RequestRecord, received: Callable[[int], None]):
        self._receive, self._bounds, self._record, self._received = receive, bounds, record, received
        self._read = False

    async def __call__(self) -> Message:
        if self._read:
            return await self._receive()
        self._read = True
        body = await self._whole()
        self._received(len(body))
        return {"type": "http.request", "body": body, "more_body": False}

    async def _whole(self) -> bytes:
        seconds = self._bounds.body_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._bounded(self._bounds.body_bytes)
        except TimeoutError as error:
            message = f"the body did not come within {seconds:g} s"
            raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from error

    async def _bounded(self, bound: int) -> bytes:
        body, length, more = bytearray(), 0, True
        while more and length <= bound * _DISCARDED:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._record.client_gone = True
                raise Cancelled("the client went away while it sent the body")
            length += len(message["body"])
            if length <= bound:
                body += message["body"]
            more = message["more_body"]
        if length > bound:
            too_long = f"the body is longer than {bound} bytes, the most this server takes"
            raise ApiError(413, too_long, code="body_too_large", headers={"connection": "close"})
        return bytes(body)


class CheckedRoute(APIRoute):
    """A route whose body is parsed and checked here: the framework would do it on the event loop, without bounds."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler, which finds the body checked."""
        answer, field = super().get_route_handler(), self.body_field
        if field is None:
            return answer
        model: type[BaseModel] = field.field_info.annotation  # type: ignore[assignment]

        async def handle(request: Request) -> Response:
            body = await request.body()
            return await answer(_Checked(request, body, await _checked(body, request, model)))

        return handle


class _Checked(Request):
    """A request whose body was checked."""

    def __init__(self, request: Request, body: bytes, model: BaseModel):
        super().__init__(request.scope, request.receive)
        self._whole, self._model = body, model

    async def body(self) -> bytes:
        return self._whole

    async def json(self) -> BaseModel:
        return self._model


async def _checked(body: bytes, request: Request, model: type[BaseModel]) -> BaseModel:
    if not _is_json(request.headers.get("content-type", "")):
        raise _no_json("must be a JSON object, sent with content-type application/json")
    if len(body) <= _SMALL:
        return parse(body, model)
    return await offload(parse, body, model)


def parse(body: bytes, model: type[BaseModel]) -> BaseModel:
    """The body as a model; ApiError 400 names what is wrong."""
    try:
        text = body.decode("utf-8-sig")
        _check_parts(text)
        return model.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise _no_json(f"is not valid JSON: {error.msg} at position {error.pos}") from None
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None
    except UnicodeDecodeError as error:
        raise _no_json(f"is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _no_json("is nested too deep") from None
    except ValueError:  # Python's bound
        raise _no_json(f"has a whole number of more than {sys.get_int_max_str_digits()} digits") from None


def _check_parts(text: str) -> None:
    """Refuse a body of very many small parts: a few bytes each, they take gigabytes and minutes once parsed."""
    for most, signs, more, what in _BOUNDS:
        if sum(text.count(sign) for sign in signs) > most and more.match(text):
            raise _no_json(f"has more than {most} {what}, the most this server takes")


def _is_json(content_type: str) -> bool:
    headers = Headers()
    headers["content-type"] = content_type
    subtype = headers.get_content_subtype()
    return headers.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _no_json(what: str) -> ApiError:
    return ApiError(400, f"the body {what}", code="invalid_json")
