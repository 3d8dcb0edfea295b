"""POST /v1/chat/completions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from colaserve.v1.generation_pb2 import GenerateRequest, GenerateResponse
from colaserve_client.results import FinishReason
from colaserve_services.bounds import FINISH_REASONS
from colaserve_services.gateway.backend import Backend, Info
from colaserve_services.gateway.dialects.base import Start, Usage, WithoutFirstSpace
from colaserve_services.gateway.dialects.fields import MOST_MESSAGES, Budget, Strict, Text, TextPart, at_most
from colaserve_services.gateway.dialects.logprobs import TokenLogprob, positions_of
from colaserve_services.gateway.dialects.openai import MOST_LOGPROBS, ChoiceDialect, ChoiceFields, GuidedChoice
from colaserve_services.gateway.dialects.transcript import chat_prompt, turns_of
from colaserve_services.gateway.errors import invalid


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], at_most(MOST_MESSAGES)] = Field(
        description="Text, or parts of type text, which are joined as they are."
    )
    name: str | None = Field(None, pattern=r"^[^\s<|\\/>]{1,64}$", description="Distinguishes speakers of one role.")
    type: Literal["text"] | None = Field(None, description="Sent by some clients; has no effect.")


class ChatRequest(ChoiceFields):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_completion_tokens: Budget | None = Field(None, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Return each token's log-probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="And those of this many likely tokens; above 0 it needs logprobs."
    )

    def budget(self) -> int | None:
        newer = self.max_completion_tokens
        if newer is not None and self.max_tokens not in (None, newer):
            raise invalid("max_completion_tokens", f"got {newer}, and max_tokens {self.max_tokens}: set one of them")
        return self.max_tokens if newer is None else newer

    def guided(self) -> Sequence[str]:
        """An answer's text comes without its first space, so a choice is given without it."""
        return [text if text[:1].isspace() else f" {text}" for text in super().guided()]

    def alternatives(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    guided_choice: NotRequired[list[GuidedChoice]]


class ChatCompletion(TypedDict):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Chat(ChoiceDialect[ChatRequest]):
    """Answer a chat. With `stream`, server-sent events of `chat.completion.chunk` objects. An answer's text comes
    without its first space."""

    path, operation = "/v1/chat/completions", "create_chat_completion"
    schema, whole = ChatRequest, ChatCompletion
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, info: Info, request_id: str):
        super().__init__(body, info, request_id)
        self._spoken: dict[int, WithoutFirstSpace] = {}  # of choices that have begun

    def prompts(self, backend: Backend) -> Sequence[Start]:
        prompt = chat_prompt(turns_of(self.body.messages), self.info.chat_frame)
        return [self.generations(backend, GenerateRequest(prompt=prompt))]

    def names(self) -> Mapping[str, str]:
        newer = self.body.max_completion_tokens is not None
        return {
            "prompt": "messages",
            "text": "messages",
            "max_new_tokens": "max_completion_tokens" if newer else "max_tokens",
        }

    def choice(self, index: int, message: GenerateResponse) -> Mapping[str, Any]:
        answer: AnswerMessage = {"role": "assistant", "content": WithoutFirstSpace()(message.text), "refusal": None}
        logprobs = _chat_logprobs(positions_of(message)) if self._logprobs else None
        reason = FINISH_REASONS[message.finish_reason]
        choice = {"index": index, "message": answer, "logprobs": logprobs, "finish_reason": reason}
        return choice | self.guided(message)

    def deltas(self, index: int, message: GenerateResponse) -> Iterator[Mapping[str, Any]]:
        if index not in self._spoken:
            self._spoken[index] = WithoutFirstSpace()
            yield self._delta(index, {"role": "assistant", "content": ""})
        text, positions = self._spoken[index](message.text), positions_of(message)
        if text or positions:
            yield self._delta(index, {"content": text}, positions)
        if reason := FINISH_REASONS.get(message.finish_reason):
            yield {**self._delta(index, {}, reason=reason), **self.guided(message)}

    def _delta(
        self,
        index: int,
        delta: Mapping[str, str],
        positions: Sequence[TokenLogprob] = (),
        reason: FinishReason | None = None,
    ) -> Mapping[str, Any]:
        logprobs = _chat_logprobs(positions) if self._logprobs and positions else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _chat_logprobs(positions: Sequence[TokenLogprob]) -> ChatLogprobs:
    return {"content": list(positions), "refusal": None}
