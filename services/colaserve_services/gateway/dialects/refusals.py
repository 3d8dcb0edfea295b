"""What this model cannot honour of each API: a 400, unless the field asks for nothing."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel

from colaserve_services.gateway.errors import invalid

_NO_TOOLS: Final = "the model calls no tools"
_NOT_STORED: Final = "nothing is stored"
_TEXT_ONLY: Final = "the model reads and writes text only"
_FREE_TEXT: Final = "the model writes free text only"
_NO_REASONING: Final = "the model does not reason apart"
_CACHED: Final = "prefixes are cached by their content, for no promised time"
_KEPT: Final = "nothing is taken out of a conversation"

Refusals = Mapping[str, tuple[tuple[Any, ...], str]]

_OPENAI: Final[Refusals] = {
    "moderation": ((), "there is no moderation here"),
    "parallel_tool_calls": ((False,), _NO_TOOLS),
    "prompt_cache_key": ((), _CACHED),
    "prompt_cache_options": ((), _CACHED),
    "prompt_cache_retention": ((), _CACHED),
    "safety_identifier": ((), "set user instead"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), _NOT_STORED),
    "tool_choice": (("none",), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
}
_ANTHROPIC: Final[Refusals] = {
    "cache_control": (({"type": "ephemeral"},), _CACHED),
    "container": ((), _NO_TOOLS),
    "context_management": ((), _KEPT),
    "diagnostics": ((), "there are no diagnostics here"),
    "inference_geo": ((), "the server computes where it is"),
    "mcp_servers": (([],), _NO_TOOLS),
    "output_config": (({},), _FREE_TEXT),
    "output_format": ((), _FREE_TEXT),
    "service_tier": (("auto", "standard_only"), "there is one tier"),
    "speed": (("standard",), "there is one speed"),
    "thinking": (({"type": "disabled"},), _NO_REASONING),
    "tool_choice": (({"type": "none"},), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
    "user_profile_id": ((), "set metadata.user_id instead"),
    "workspace_id": ((), "there are no workspaces here"),
}

# Where (a request, or a part of one, by its class; "request": any other) -> name -> (values that ask for nothing beside
# null, why any other is refused). With the fields of the classes, which are honoured, this is all of each schema.
UNSUPPORTED: Final[Mapping[str, Refusals]] = {
    "request": {
        **_OPENAI,
        "audio": ((), _TEXT_ONLY),
        "frequency_penalty": ((0,), "only repetition_penalty exists here"),
        "function_call": (("none",), _NO_TOOLS),
        "functions": (([],), _NO_TOOLS),
        "logit_bias": (({},), "a block's tokens are drawn together, without biases"),
        "metadata": (({},), _NOT_STORED),
        "modalities": ((["text"],), _TEXT_ONLY),
        "prediction": ((), "predicted output does not speed this model up"),
        "presence_penalty": ((0,), "only repetition_penalty exists here"),
        "reasoning_effort": (("none",), _NO_REASONING),
        "response_format": (({"type": "text"},), _FREE_TEXT),
        "suffix": (("",), "only /v1/completions writes between two texts"),
        "verbosity": ((), "say in the prompt how long the answer is to be"),
        "web_search_options": ((), "the model searches nothing"),
    },
    "Message": {  # clients send an answer's empty fields back
        "annotations": (([],), _TEXT_ONLY),
        "audio": ((), _TEXT_ONLY),
        "function_call": ((), _NO_TOOLS),
        "reasoning_content": (("",), _TEXT_ONLY),
        "refusal": ((), _TEXT_ONLY),
        "tool_call_id": ((), _NO_TOOLS),
        "tool_calls": (([],), _NO_TOOLS),
    },
    "TextPart": {
        "annotations": (([],), _TEXT_ONLY),
        "cache_control": ((), _CACHED),
        "prompt_cache_breakpoint": ((), _CACHED),
    },
    "StreamOptions": {
        "include_obfuscation": ((False,), "chunks are never padded"),
    },
    "ResponsesRequest": {
        **_OPENAI,
        "access_programs": ((), "there are none here"),
        "background": ((False,), "the answer comes with the request"),
        "background_options": ((), "the answer comes with the request"),
        "context_management": (([],), _KEPT),
        "conversation": ((), _NOT_STORED),
        "image": ((), _TEXT_ONLY),
        "include": (([],), "nothing else can be added to the response"),
        "max_tool_calls": ((), _NO_TOOLS),
        "previous_response_id": ((), _NOT_STORED),
        "prompt": ((), "no prompts are stored; send the input"),
        "reasoning": (({}, {"effort": "none"}), _NO_REASONING),
        "stream_options": (({}, {"include_obfuscation": False}), "chunks are never padded"),
        "text": (({}, {"format": {"type": "text"}}), _FREE_TEXT),
        "top_logprobs": ((0,), "ask /v1/chat/completions for log-probabilities"),
        "truncation": (("disabled",), "nothing is cut; send what fits"),
    },
    "InputMessage": {
        "phase": ((), _NO_REASONING),
    },
    "InputPart": {
        "annotations": (([],), _TEXT_ONLY),
        "logprobs": (([],), "log-probabilities are not read"),
        "prompt_cache_breakpoint": ((), _CACHED),
    },
    "MessagesRequest": _ANTHROPIC,
    "CountTokensRequest": _ANTHROPIC,
    "ConversationMessage": {},
    "TextBlock": {
        "cache_control": _ANTHROPIC["cache_control"],
        "citations": (([],), _TEXT_ONLY),
    },
    "Metadata": {},
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
