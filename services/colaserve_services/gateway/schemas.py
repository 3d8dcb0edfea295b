"""The requests, as OpenAI defines them, with this model's extensions. Types are strict: "16" is no integer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeVar

from annotated_types import Interval
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, create_model

from colaserve_client.fields import Field as Setting
from colaserve_client.fields import flat_fields
from colaserve_client.settings import Sampler, Sampling
from colaserve_services.bounds import SEED_END

DEADLINE_HEADER: Final = "x-request-timeout"
# The most items of each list. Where a list is checked, its first wrong item ends the check (fail_fast).
MOST_STOPS: Final = 4
MOST_MESSAGES: Final = 2_048  # also parts of one message
MOST_PROMPTS: Final = 1_024
MOST_IDS: Final = 131_072  # of one prompt
UINT32: Final = 2**32 - 1
MOST_LOGPROBS: Final = 20

M = TypeVar("M", bound=BaseModel)


def _at_most(items: int) -> Any:
    return Field(max_length=items, fail_fast=True)


TokenId = Annotated[int, Field(ge=0, le=UINT32)]
TokenIds = Annotated[list[TokenId], _at_most(MOST_IDS)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _whole_characters(text: str) -> str:
    """Half of a surrogate pair, which JSON can say, is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
StopString = Annotated[Text, StringConstraints(min_length=1)]


class Strict(BaseModel):
    """Extras are gathered, then refused by refusals.py with a better message than the schema could give."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )


def with_settings(*kinds: type) -> Callable[[type[M]], type[M]]:
    """Class decorator: a field for each request setting of the dataclasses that the schema does not declare itself."""

    def decorate(model: type[M]) -> type[M]:
        table = {name: field for name, field in flat_fields(*kinds).items() if name not in model.model_fields}
        own: Any = {name: (_kind(field), Field(None, description=field.doc)) for name, field in table.items()}
        made: type[M] = create_model(
            model.__name__, __base__=model, __doc__=model.__doc__, __module__=model.__module__, **own
        )
        return made

    return decorate


def _kind(field: Setting) -> Any:
    """The type of a setting, which may be left out."""
    if field.choices is not None:
        return Literal[tuple(field.choices)] | None
    if field.range is None:
        return field.kind | None
    bounds = field.range
    least = {"gt": bounds.least} if bounds.above else {"ge": bounds.least}
    return Annotated[field.kind, Interval(**least, le=bounds.most)] | None


class StreamOptions(Strict):
    """How a stream is sent."""

    include_usage: bool | None = Field(None, description="Send the usage in a last chunk without choices.")


@with_settings(Sampler, Sampling)
class GenerationFields(Strict):
    """What both kinds of generation take, each setting of the sampler and of the sampling among it. A field left out
    takes the server's default, see GET /v1/models."""

    model: str | None = Field(None, description="The served model's name; left out, the served model.")
    max_tokens: int | None = Field(
        None, ge=1, le=UINT32, description="Tokens to write at most; 32 unless the server says otherwise."
    )
    n: int | None = Field(None, ge=1, description="Texts to write for each prompt, side by side; 1.")
    stop: StopString | Annotated[list[StopString], _at_most(MOST_STOPS)] | None = Field(
        None, description="Up to 4 strings that end the text, which ends before them."
    )
    stream: bool | None = Field(None, description="Send server-sent events, one for each block.")
    stream_options: StreamOptions | None = None
    seed: int | None = Field(
        None, ge=0, lt=SEED_END, description="Repeats a run; choice i of a prompt is sample i of this seed."
    )
    user: Text | None = Field(None, max_length=256, description="Your end user's id: logged.")
    top_k: int | None = Field(None, ge=-1, le=UINT32, description="Keep the k most likely tokens; 0 or -1 keeps all.")
    guidance_interval: list[Fraction] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Guidance is on between these two times; time runs from 1 (noise) to 0; [1, 0].",
    )
    ignore_eos: bool | None = Field(None, description="Write on after an end token.")
    skip_special_tokens: bool | None = Field(None, description="False prints end and pad tokens, too; true.")
    cache_salt: Text | None = Field(
        None, max_length=256, description="Cached prefixes are shared only among requests of the same salt."
    )


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], _at_most(MOST_MESSAGES)] = Field(
        description="Text, or parts of type text, which are joined as they are."
    )
    name: str | None = Field(None, pattern=r"^[^\s<|\\/>]{1,64}$", description="Distinguishes speakers of one role.")
    type: Literal["text"] | None = Field(None, description="Sent by some clients; has no effect.")


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=UINT32, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Return each token's log-probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="And those of this many likely tokens; needs logprobs."
    )


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], _at_most(MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], _at_most(MOST_PROMPTS)]
    ) = Field(description="One prompt or several, as text or as token ids. An empty text is unconditional.")
    suffix: Text | None = Field(
        None,
        description="The text is a hole of max_tokens between the prompt and this; without n, logprobs, echo, stop.",
    )
    best_of: int | None = Field(None, ge=1, description="Only the value of n is taken.")
    echo: bool | None = Field(None, description="Begin each text with its prompt; not together with logprobs.")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="Return log-probabilities, of this many likely tokens too."
    )


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or messages as a chat would frame them."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], _at_most(MOST_MESSAGES)] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="The model has no start token: both values say the same.")
    add_generation_prompt: Literal[True] | None = Field(None, description="Chats always end where the answer begins.")
    return_token_strs: bool | None = Field(None, description="Return each token's text too.")


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


_REQUESTS: Final = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_PARTS: Final = (Message, TextPart, StreamOptions)
ALL_NAMES: Final = frozenset(name for model in (*_REQUESTS, *_PARTS) for name in model.model_fields)
UNIONS: Final[dict[str, str]] = {
    "prompt": "expected a string, a list of strings, a list of token ids or a list of lists of token ids",
    "stop": f"expected a string or a list of up to {MOST_STOPS} strings, none empty",
}
