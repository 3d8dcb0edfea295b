"""What OpenAI's two older ways to ask for text share: fields, and answers of choices."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from colaserve.v1.generation_pb2 import GenerateResponse
from colaserve_services.gateway.backend import Info
from colaserve_services.gateway.dialects.base import Dialect, Usage, event
from colaserve_services.gateway.dialects.fields import Budget, EndUser, GenerationFields, StopString, Strict, at_most
from colaserve_services.gateway.errors import ApiError, invalid

MOST_STOPS: Final = 4
MOST_LOGPROBS: Final = 20
DONE: Final = b"data: [DONE]\n\n"
STOPS: Final = f"expected a string or a list of up to {MOST_STOPS} strings, none empty"


class StreamOptions(Strict):
    """How a stream is sent."""

    include_usage: bool | None = Field(None, description="Send the usage in a last chunk without choices.")


class ChoiceFields(GenerationFields):
    """The fields of both."""

    unions: ClassVar[Mapping[str, str]] = {"stop": STOPS}

    max_tokens: Budget | None = Field(None, description="Tokens to write at most.")
    n: int | None = Field(None, ge=1, description="Texts to write for each prompt, side by side; 1.")
    stop: StopString | Annotated[list[StopString], at_most(MOST_STOPS)] | None = Field(
        None, description="Up to 4 strings that end the text, which ends before them."
    )
    guided_choice: Annotated[list[StopString], Field(min_length=2, max_length=64, fail_fast=True)] | None = Field(
        None,
        description="2 to 64 texts, of which the answer is one; each choice of the answer has the value of each.",
    )
    stream_options: StreamOptions | None = None
    user: EndUser | None = Field(None, description="Your end user's id: logged.")

    def choices(self) -> int:
        return self.n or 1

    def budget(self) -> int | None:
        return self.max_tokens

    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def guided(self) -> Sequence[str]:
        return self.guided_choice or ()

    def end_user(self) -> str:
        return self.user or ""


class GuidedChoice(TypedDict):
    """One of `guided_choice`: its tokens, and the sum of their log-probabilities."""

    text: str
    tokens: int
    logprob: float


C = TypeVar("C", bound=ChoiceFields)


class ChoiceDialect(Dialect[C]):
    """Answers of choices, in chunks when streamed."""

    prefix: ClassVar[str]  # of the answer's id
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, body: C, info: Info, request_id: str):
        super().__init__(body, info, request_id)
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": info.model_name,
                      "system_fingerprint": info.space}  # fmt: skip
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "needs stream to be true")
        if body.guided_choice and body.choices() > 1:
            raise invalid("n", f"got {body.choices()}, expected 1 beside guided_choice", "unsupported_parameter")
        self._usage_chunk = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._logprobs = body.alternatives() is not None

    def answer(self, choices: Sequence[GenerateResponse], usage: Usage) -> Mapping[str, Any]:
        each = [self.choice(index, message) for index, message in enumerate(choices)]
        return {**self._head, "object": self.whole_object, "choices": each, "usage": usage}

    def events(self, index: int, message: GenerateResponse) -> Iterator[bytes]:
        return (self._chunk([delta]) for delta in self.deltas(index, message))

    def last_events(self, last: Sequence[GenerateResponse], usage: Usage) -> Iterator[bytes]:
        if self._usage_chunk:
            yield self._chunk([], usage)
        yield DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.content())

    def guided(self, message: GenerateResponse) -> dict[str, list[GuidedChoice]]:
        """The `guided_choice` of a choice; no field where the request has none."""
        pairs = zip(self.body.guided_choice or (), message.choices, strict=False)
        found = [GuidedChoice(text=text, tokens=each.token_count, logprob=each.logprob) for text, each in pairs]
        return {"guided_choice": found} if found else {}

    @abstractmethod
    def choice(self, index: int, message: GenerateResponse) -> Mapping[str, Any]:
        """A choice of a whole answer."""

    @abstractmethod
    def deltas(self, index: int, message: GenerateResponse) -> Iterator[Mapping[str, Any]]:
        """What a message adds to a choice's stream."""

    def _chunk(self, choices: Sequence[Mapping[str, Any]], usage: Usage | None = None) -> bytes:
        last = {"usage": usage} if self._usage_chunk else {}
        return event({**self._head, "object": self.chunk_object, "choices": choices, **last})
