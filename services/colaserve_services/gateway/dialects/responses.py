"""POST /v1/responses."""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_client.arrays import shortest
from colaserve_services.gateway.backend import Info
from colaserve_services.gateway.dialects.base import OneText, Usage, event
from colaserve_services.gateway.dialects.fields import (
    MOST_MESSAGES,
    Budget,
    EndUser,
    GenerationFields,
    Strict,
    Text,
    at_most,
)
from colaserve_services.gateway.dialects.transcript import Turn, chat_prompt, turns_of
from colaserve_services.gateway.errors import ApiError

_CODES: Final = {400: "invalid_prompt", 429: "rate_limit_exceeded"}  # of an error in a response; else server_error
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputPart(Strict):
    """A part of an input message."""

    type: Literal["input_text", "output_text"]
    text: Text


class InputMessage(Strict):
    """A message of the input; an output item may be sent back as one."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputPart], at_most(MOST_MESSAGES)] = Field(
        description="Text, or parts of type input_text or output_text, which are joined as they are."
    )
    type: Literal["message"] | None = Field(None, description="Has no effect.")
    id: str | None = Field(None, description="An output item has one; has no effect.")
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(None, description="Has no effect.")


class ResponsesRequest(GenerationFields):
    """POST /v1/responses."""

    input: Text | Annotated[list[InputMessage], Field(min_length=1), at_most(MOST_MESSAGES)] = Field(
        description="What a user says, or messages."
    )
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: Budget | None = Field(None, description="Tokens to write at most.")
    metadata: (
        Annotated[
            dict[Annotated[Text, StringConstraints(max_length=64)], Annotated[Text, StringConstraints(max_length=512)]],
            at_most(16),
        ]
        | None
    ) = Field(None, description="Up to 16 pairs of strings, which the response repeats.")
    user: EndUser | None = Field(None, description="Your end user's id: logged.")

    def budget(self) -> int | None:
        return self.max_output_tokens

    def end_user(self) -> str:
        return self.user or ""


class Answered(BaseModel):
    """A part of a response. Fields with a default always have it, or are filled in as the response goes on."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class OutputText(Answered):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(Answered):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class ResponsesUsage(Answered):
    """The details count nothing here: they are 0."""

    input_tokens: int
    input_tokens_details: dict[str, int] = {"cached_tokens": 0, "cache_write_tokens": 0}
    output_tokens: int
    output_tokens_details: dict[str, int] = {"reasoning_tokens": 0}
    total_tokens: int


class Response(Answered):
    """The answer to POST /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    model: str
    instructions: str | None
    metadata: dict[str, str]
    max_output_tokens: int | None
    temperature: float
    top_p: float
    user: str | None
    output: list[OutputMessage]
    usage: ResponsesUsage | None = None
    background: Literal[False] = False
    parallel_tool_calls: Literal[False] = False
    previous_response_id: None = None
    store: Literal[False] = False
    text: dict[str, Any] = {"format": {"type": "text"}}
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    truncation: Literal["disabled"] = "disabled"


class Responses(OneText[ResponsesRequest]):
    """Answer with a response. With `stream`, server-sent events from `response.created` to `response.completed`,
    `.incomplete` or `.failed`. Nothing is stored; the text comes without its first space."""

    path, operation = "/v1/responses", "create_response"
    schema, whole = ResponsesRequest, Response

    def __init__(self, body: ResponsesRequest, info: Info, request_id: str):
        super().__init__(body, info, request_id)
        self._created, self._item, self._numbers = int(time.time()), f"msg_{request_id}", count()
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}

    def prompt(self) -> str:
        given, instructions = self.body.input, self.body.instructions
        said = [Turn("user", given)] if isinstance(given, str) else turns_of(given)
        before = [] if instructions is None else [Turn("system", instructions)]
        return chat_prompt([*before, *said], self.info.chat_frame)

    def names(self) -> Mapping[str, str]:
        return {"prompt": "input", "max_new_tokens": "max_output_tokens"}

    def answer(self, choices: Sequence[GenerateResponse], usage: Usage) -> Response:
        [message] = choices
        return self._ended(message, self.spoken(message.text), usage)

    def opening(self) -> Iterator[bytes]:
        response = self._response("in_progress", [])
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        item = OutputMessage(id=self._item, status="in_progress", content=[])
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=OutputText(text=""))

    def delta(self, text: str) -> bytes:
        return self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def last_events(self, last: Sequence[GenerateResponse], usage: Usage) -> Iterator[bytes]:
        whole = self._ended(last[0], self.text, usage)
        [item] = whole.output
        yield self._event("response.output_text.done", **self._place, text=self.text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=item.content[0])
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole.status}", response=whole)

    def failure(self, error: ApiError) -> bytes:
        code = _CODES.get(error.status, "server_error")
        response = self._response("failed", [], error={"code": code, "message": error.message})
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)

    def _ended(self, message: GenerateResponse, text: str, usage: Usage) -> Response:
        cut = message.finish_reason == types_pb2.FINISH_REASON_LENGTH
        status: Status = "incomplete" if cut else "completed"
        item = OutputMessage(id=self._item, status=status, content=[OutputText(text=text)])
        used = ResponsesUsage(
            input_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
            total_tokens=usage["total_tokens"],
        )
        details = {"reason": "max_output_tokens"} if cut else None
        return self._response(status, [item], usage=used, incomplete_details=details, completed_at=int(time.time()))

    def _response(self, status: Status, output: list[OutputMessage], **ended: Any) -> Response:
        body, defaults = self.body, self.info.default_sampling
        given: dict[str, Any] = {
            name: shortest(getattr(defaults, name)) if getattr(body, name) is None else getattr(body, name)
            for name in ("temperature", "top_p")
        }
        return Response(
            id=f"resp_{self.request_id}",
            created_at=self._created,
            status=status,
            model=self.info.model_name,
            instructions=body.instructions,
            metadata=body.metadata or {},
            max_output_tokens=body.max_output_tokens,
            user=body.user,
            output=output,
            **given,
            **ended,
        )
