"""What this model cannot honour of OpenAI's API: a 400, unless the field asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel

from colaserve_services.gateway.errors import invalid

_NO_TOOLS: Final = "the model calls no tools"

Refusals = Mapping[str, tuple[tuple[Any, ...], str]]

# Where (a request itself, or a part of it by its class) -> name -> (values that ask for nothing beside null, why any
# other is refused)
UNSUPPORTED: Final[Mapping[str, Refusals]] = {
    "request": {
        "audio": ((), "the model writes text only"),
        "frequency_penalty": ((0,), "only repetition_penalty exists here"),
        "function_call": (("none",), _NO_TOOLS),
        "functions": (([],), _NO_TOOLS),
        "logit_bias": (({},), "a block's tokens are drawn together, without biases"),
        "metadata": (({},), "nothing is stored"),
        "modalities": ((["text"],), "the model writes text only"),
        "moderation": ((), "there is no moderation here"),
        "parallel_tool_calls": ((False,), _NO_TOOLS),
        "prediction": ((), "predicted output does not speed this model up"),
        "presence_penalty": ((0,), "only repetition_penalty exists here"),
        "prompt_cache_key": ((), "prefixes are cached by their content"),
        "prompt_cache_options": ((), "prefixes are cached by their content"),
        "prompt_cache_retention": ((), "prefixes are cached by their content"),
        "reasoning_effort": (("none",), "the model does not reason apart"),
        "response_format": (({"type": "text"},), "the model writes free text only"),
        "safety_identifier": ((), "set user instead"),
        "service_tier": (("auto", "default"), "there is one tier"),
        "store": ((False,), "nothing is stored"),
        "suffix": (("",), "only /v1/completions writes between two texts"),
        "tool_choice": (("none",), _NO_TOOLS),
        "tools": (([],), _NO_TOOLS),
        "verbosity": ((), "say in the prompt how long the answer is to be"),
        "web_search_options": ((), "the model searches nothing"),
    },
    "Message": {  # clients send an answer's empty fields back
        "annotations": (([],), "the model reads text only"),
        "audio": ((), "the model reads text only"),
        "function_call": ((), _NO_TOOLS),
        "reasoning_content": (("",), "the model reads text only"),
        "refusal": ((), "the model reads text only"),
        "tool_call_id": ((), _NO_TOOLS),
        "tool_calls": (([],), _NO_TOOLS),
    },
    "TextPart": {
        "annotations": (([],), "the model reads text only"),
        "cache_control": ((), "prefixes are cached by their content"),
    },
    "StreamOptions": {
        "include_obfuscation": ((False,), "chunks are never padded"),
    },
}


def refuse_extras(model: BaseModel, *, allow_unknown: bool, where: str = "") -> None:
    """Raise a 400 naming the first field of a request, at any depth, that cannot be honoured or, unless they are
    allowed, is not known."""
    table = UNSUPPORTED.get(type(model).__name__, UNSUPPORTED["request"])
    for name, value in (model.model_extra or {}).items():
        neutral, reason = table.get(name, ((), ""))
        if name in table and not _asks_for_nothing(value, neutral):
            raise invalid(where + name, f"not supported: {reason}", "unsupported_parameter")
        if name not in table and not allow_unknown:
            raise invalid(where + name[:100], "unknown field", "unknown_parameter")
    for name, part in _parts(model):
        refuse_extras(part, allow_unknown=allow_unknown, where=f"{where}{name}.")


def _parts(model: BaseModel) -> Iterator[tuple[str, BaseModel]]:
    """The models in a model's fields, and in lists there, each with its name."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield name, value
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            yield from ((f"{name}[{index}]", one) for index, one in enumerate(value))


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(
        value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral
    )
