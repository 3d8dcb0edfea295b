"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic has them."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from typing_extensions import TypedDict

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest, GenerateResponse
from colaserve_services.gateway.backend import Backend, Info
from colaserve_services.gateway.dialects.base import Message, OneText, Start, Usage, event
from colaserve_services.gateway.dialects.fields import (
    MOST_MESSAGES,
    Budget,
    EndUser,
    GenerationFields,
    ServedModel,
    StopString,
    Strict,
    Text,
    TextPart,
    at_most,
)
from colaserve_services.gateway.dialects.transcript import Turn, chat_prompt, text_of, turns_of
from colaserve_services.gateway.errors import ApiError, anthropic_error

COUNT_TOKENS: Final = "/v1/messages/count_tokens"
MOST_STOPS: Final = 16


class TextBlock(TextPart):
    """A block of type text."""


Blocks = Text | Annotated[list[TextBlock], at_most(MOST_MESSAGES)]


class ConversationMessage(Strict):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks = Field(description="Text, or blocks of type text, which are joined as they are.")


class Metadata(Strict):
    """About a request."""

    user_id: EndUser | None = Field(None, description="Your end user's id: logged.")


class Conversation(Strict):
    """What is counted and what is answered."""

    model: ServedModel = None
    messages: list[ConversationMessage] = Field(
        min_length=1,
        max_length=MOST_MESSAGES,
        fail_fast=True,
        description="An assistant's message at the end is the beginning of the answer, which goes on from there.",
    )
    system: Blocks | None = Field(None, description="A system message before the others.")

    @property
    def prefilled(self) -> bool:
        """Whether the answer is begun already."""
        return self.messages[-1].role == "assistant"

    def prompt(self, frame: str) -> str:
        """The text to continue."""
        before = [] if self.system is None else [Turn("system", text_of(self.system))]
        turns = [*before, *turns_of(self.messages)]
        return chat_prompt(turns, frame, prefilled=self.prefilled)


class CountTokensRequest(Conversation):
    """POST /v1/messages/count_tokens."""


class MessagesRequest(Conversation, GenerationFields):
    """POST /v1/messages."""

    max_tokens: Budget = Field(description="Tokens to write at most.")
    stop_sequences: Annotated[list[StopString], at_most(MOST_STOPS)] | None = Field(
        None, description="Up to 16 strings that end the text, which ends before them."
    )
    metadata: Metadata | None = None

    def budget(self) -> int | None:
        return self.max_tokens

    def stops(self) -> Sequence[str]:
        return self.stop_sequences or []

    def end_user(self) -> str:
        return (self.metadata and self.metadata.user_id) or ""


class TokenCount(TypedDict):
    """The answer to POST /v1/messages/count_tokens."""

    input_tokens: int


class MessageUsage(TokenCount):
    output_tokens: int


class AnswerBlock(TypedDict):
    type: Literal["text"]
    text: str


class MessageAnswer(TypedDict):
    """The answer to POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageErrorBody(TypedDict):
    type: str
    message: str


class MessageError(TypedDict):
    """Any answer of status 400 and above."""

    type: Literal["error"]
    error: MessageErrorBody
    request_id: str


class Messages(OneText[MessagesRequest]):
    """Answer a conversation. With `stream`, server-sent events from `message_start` to `message_stop`. The text comes
    without its first space."""

    path, operation = "/v1/messages", "create_message"
    schema, whole, error = MessagesRequest, MessageAnswer, MessageError

    def __init__(self, body: MessagesRequest, info: Info, request_id: str):
        super().__init__(body, info, request_id, begun=body.prefilled)
        self._input_tokens = 0

    def prompt(self) -> str:
        return self.body.prompt(self.info.chat_frame)

    def names(self) -> Mapping[str, str]:
        return {"prompt": "messages", "stop": "stop_sequences"}

    def generations(self, backend: Backend, prompt: GenerateRequest) -> Start:
        start = super().generations(backend, prompt)
        return partial(self._counted, backend, prompt.prompt, start) if self.body.stream else start

    async def _counted(self, backend: Backend, prompt: str, start: Start, deadline: float) -> AsyncIterator[Message]:
        """A generation whose prompt is counted first: the first event has that number."""
        self._input_tokens = len((await backend.tokenize(prompt)).token_ids)
        async for message in start(deadline):
            yield message

    def answer(self, choices: Sequence[GenerateResponse], usage: Usage) -> MessageAnswer:
        [message] = choices
        used: MessageUsage = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        return {**self._message([{"type": "text", "text": self.spoken(message.text)}], used), **_end(message)}

    def opening(self) -> Iterator[bytes]:
        message = self._message([], {"input_tokens": self._input_tokens, "output_tokens": 0})
        yield _event("message_start", message=message)
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def delta(self, text: str) -> bytes:
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def last_events(self, last: Sequence[GenerateResponse], usage: Usage) -> Iterator[bytes]:
        used = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        yield _event("content_block_stop", index=0)
        yield _event("message_delta", delta=_end(last[0]), usage=used)
        yield _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return event(anthropic_error(error), "error")

    def _message(self, content: list[AnswerBlock], usage: MessageUsage) -> MessageAnswer:
        return {
            "id": f"msg_{self.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self.info.model_name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _end(message: GenerateResponse) -> Any:
    """Why a text ended. A coordinator of an earlier version does not name the stop string."""
    if message.finish_reason == types_pb2.FINISH_REASON_LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    reason = "stop_sequence" if message.stop_string else "end_turn"
    return {"stop_reason": reason, "stop_sequence": message.stop_string or None}
