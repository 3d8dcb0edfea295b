"""What this model cannot honour of OpenAI's API: a 400, unless the field asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from colaserve_services.gateway.errors import invalid

_NO_TOOLS: Final = "the model calls no tools"

# name -> (values that ask for nothing beside null, why anything else is refused)
UNSUPPORTED: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
    "audio": ((), "the model writes text only"),
    "frequency_penalty": ((0,), "only repetition_penalty exists here"),
    "function_call": (("none",), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "logit_bias": (({},), "a block's tokens are drawn together, without biases"),
    "metadata": (({},), "nothing is stored"),
    "modalities": ((["text"],), "the model writes text only"),
    "moderation": ((), "there is no moderation here"),
    "parallel_tool_calls": ((), _NO_TOOLS),
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
    "suffix": (("",), "text between two texts is written by LatentService.Infill"),
    "tool_choice": (("none",), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
    "verbosity": ((), "say in the prompt how long the answer is to be"),
    "web_search_options": ((), "the model searches nothing"),
}


def refuse_extras(extras: Mapping[str, Any] | None, *, allow_unknown: bool, where: str = "") -> None:
    """Raise a 400 naming the first field that cannot be honoured or, unless they are allowed, is not known."""
    for name, value in (extras or {}).items():
        neutral, reason = UNSUPPORTED.get(name, ((), ""))
        if name in UNSUPPORTED and not _asks_for_nothing(value, neutral):
            raise invalid(where + name, f"not supported: {reason}", "unsupported_parameter")
        if name not in UNSUPPORTED and not allow_unknown:
            raise invalid(where + name[:100], "unknown field", "unknown_parameter")


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(
        value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral
    )
