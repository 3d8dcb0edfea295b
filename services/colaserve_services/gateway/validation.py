"""A body that does not fit the schema: one sentence that names the field, what was got and what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import Repr
from typing import Any, Final

from colaserve_services.gateway.errors import ApiError, invalid
from colaserve_services.gateway.schemas import ALL_NAMES, UNIONS

_SHOWN: Final = 80  # characters of what was got
_BRIEF: Final = Repr()  # never writes all of a large value
_BRIEF.maxstring = _BRIEF.maxother = _SHOWN


def validation_error(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first fault, its place as pydantic tells it; of a union's several faults the one deepest inside."""
    first = faults[0]["loc"][:1]
    same_field = [fault for fault in faults if fault["loc"][:1] == first]
    field = _param(first)
    if len(same_field) > 1 and field in UNIONS:
        if found := next((fault for fault in same_field if fault["type"] == "value_error"), None):  # not of its kind
            return invalid(_param(found["loc"]), _sentence(found))
        return invalid(field, UNIONS[field])
    worst = max(same_field, key=lambda fault: len(fault["loc"]))
    if not _param(worst["loc"]):
        message = "the body must be a JSON object, sent with content-type application/json"
        return ApiError(400, message, code="invalid_json")
    return invalid(_param(worst["loc"]), _sentence(worst))


def _param(place: Sequence[int | str]) -> str:
    """A place such as ("messages", 0, "content", "list[TextPart]", 1, "type"), its union tags left out."""
    steps = [step for step in place if isinstance(step, int) or step in ALL_NAMES]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _sentence(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "missing":
        return "this field is required"
    if fault["type"] == "too_long" and "max_length" in fault.get("ctx", {}):
        return f"expected at most {fault['ctx']['max_length']} items"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    return f"should {message}, got {_shown(fault['input'])}" if "Input should " in fault["msg"] else message


def _shown(value: Any) -> str:
    text = _BRIEF.repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
