"""A request's body: read only where a path takes one, bounded, and checked away from the event loop.

A body that does not fit the schema is refused with one sentence: the field, what was got, what is expected.
"""

import asyncio
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from reprlib import Repr
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from colaserve_services.gateway.dialects.fields import NAMES
from colaserve_services.gateway.edge import record_of
from colaserve_services.gateway.errors import ApiError, invalid
from colaserve_services.gateway.settings import Bounds
from colaserve_services.offload import Offload

MOST_PARTS: Final = 32_768  # arrays, objects and keys in one body; each costs a hundred times its bytes in memory
MOST_ITEMS: Final = 262_144  # commas; parsing so many values holds the interpreter for some 20 ms

_DISCARDED: Final = 16  # times the bound are read before an answer: a client that still writes would not read it
_SMALL: Final = 64 * 1024  # bytes; a longer body is parsed in a thread
_parse_large = Offload("large-bodies", rest=8)  # the interpreter is held meanwhile, and the engines wait for it
_SHOWN: Final = 80  # characters of what was got
_BRIEF: Final = Repr()  # never writes all of a large value
_BRIEF.maxstring = _BRIEF.maxother = _SHOWN

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


async def checked_body(request: Request, model: type[M], bounds: Bounds) -> M:
    """The body as a model. ApiError: 413 when it is too long, 408 when it takes too long, 400 with what is wrong."""
    return await json_body(request, partial(parse, model=model), bounds)


async def json_body(request: Request, parse: Callable[[bytes], T], bounds: Bounds) -> T:
    """What `parse` makes of a body of JSON. ApiError as for `checked_body`."""
    body = await read_body(request, bounds)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(\S+\+)?json", kind):
        raise _no_json("must be a JSON object, sent with content-type application/json")
    if (packed := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise invalid("content-encoding", f"got {packed[:_SHOWN]!r}, expected none: bodies are sent as they are")
    return await parsed(body, parse)


async def parsed(body: bytes, parse: Callable[[bytes], T]) -> T:
    """What is made of a body: at once of a short one, of a longer one in a thread."""
    return parse(body) if len(body) <= _SMALL else await _parse_large(parse, body)


async def read_body(request: Request, bounds: Bounds) -> bytes:
    """All of it. ApiError: 413 when it is too long, 408 when it takes too long."""
    body, length, bound = bytearray(), 0, bounds.body_bytes
    try:
        async with asyncio.timeout(bounds.body_seconds), aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                length += len(chunk)
                if length <= bound:
                    body += chunk
                elif length > bound * _DISCARDED:
                    break
    except TimeoutError as error:
        message = f"the body did not come within {bounds.body_seconds:g} s"
        raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from error
    if length > bound:
        too_long = f"the body is longer than {bound} bytes, the most this server takes"
        raise ApiError(413, too_long, code="body_too_large", headers={"connection": "close"})
    record_of(request.scope).body_bytes = length
    return bytes(body)


def parse(body: bytes, model: type[M]) -> M:
    """The body as a model; ApiError 400 names what is wrong."""
    try:
        text = body.decode("utf-8-sig")
        _check_parts(text)
        return model.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise _no_json(f"is not valid JSON: {error.msg} at position {error.pos}") from None
    except ValidationError as error:
        raise _validation_error(error.errors(include_url=False), getattr(model, "unions", {})) from None
    except UnicodeDecodeError as error:
        raise _no_json(f"is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _no_json("is nested too deep") from None
    except ValueError:  # Python's bound
        raise _no_json(f"has a whole number of more than {sys.get_int_max_str_digits()} digits") from None


def _check_parts(text: str) -> None:
    """Refuse a body of very many small parts: a few bytes each, they take gigabytes and minutes once parsed.

    Few calls that are quick even for the longest body: the interpreter is held meanwhile, and the engines wait for it.
    """
    plain = text.replace("\\\\", "").replace('\\"', "")  # now every quotation mark begins or ends a string
    if plain.count('"') > 2 * (MOST_ITEMS + MOST_PARTS):  # each string is a key or an item
        raise _no_json(f"has more than {MOST_ITEMS} items, the most this server takes")
    for most, signs, what in ((MOST_PARTS, "[{:", "arrays, objects and keys"), (MOST_ITEMS, ",", "items")):
        if _count(text, signs) > most and _count("".join(plain.split('"')[::2]), signs) > most:
            raise _no_json(f"has more than {most} {what}, the most this server takes")


def _count(text: str, signs: str) -> int:
    return sum(map(text.count, signs))


def _no_json(what: str) -> ApiError:
    return ApiError(400, f"the body {what}", code="invalid_json")


def _validation_error(faults: Sequence[Mapping[str, Any]], unions: Mapping[str, str]) -> ApiError:
    """An error that names the first fault; of a union's several faults the one deepest inside."""
    first = faults[0]["loc"][:1]
    same_field = [fault for fault in faults if fault["loc"][:1] == first]
    field = _param(first)
    if len(same_field) > 1 and field in unions:
        if found := next((fault for fault in same_field if fault["type"] == "value_error"), None):  # not of its kind
            return invalid(_param(found["loc"]), _sentence(found))
        return invalid(field, unions[field])
    worst = max(same_field, key=lambda fault: len(fault["loc"]))
    if not _param(worst["loc"]):
        return _no_json("must be a JSON object, sent with content-type application/json")
    return invalid(_param(worst["loc"]), _sentence(worst))


def _param(location: Sequence[int | str]) -> str:
    """The name of a field by pydantic's location of it, whose union tags are left out:
    ("messages", 0, "content", "list[TextPart]", 1, "type") is messages[0].content[1].type."""
    steps = [step for step in location if isinstance(step, int) or step in NAMES]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _sentence(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "missing":
        return "this field is required"
    if fault["type"] == "too_long" and "max_length" in fault.get("ctx", {}):
        return f"expected at most {fault['ctx']['max_length']} items"
    if fault["type"] == "too_short":
        what = "characters" if isinstance(fault["input"], str) else "items"
        return f"got {fault['ctx']['actual_length']} {what}, expected {fault['ctx']['min_length']} or more"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    return f"should {message}, got {_shown(fault['input'])}" if "Input should " in fault["msg"] else message


def _shown(value: Any) -> str:
    text = _BRIEF.repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
