"""What an HTTP API for text is to the gateway: one module each, with its schema, its calls, its answers and events."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from pydantic_core import to_json
from typing_extensions import TypedDict

from colaserve.v1.generation_pb2 import GenerateRequest, GenerateResponse
from colaserve_services.gateway.backend import Backend, Info
from colaserve_services.gateway.dialects.fields import GenerationFields, generate_request
from colaserve_services.gateway.errors import ApiError
from colaserve_services.gateway.shapes import ErrorAnswer

Body = TypeVar("Body", bound=GenerationFields)
Message = tuple[int, GenerateResponse]  # of the sample of this number
Start = Callable[[float], AsyncIterator[Message]]  # of all samples of a prompt, with a deadline (time.monotonic())


class Usage(TypedDict):
    """Tokens used: prompts count once each, completions all."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Dialect(ABC, Generic[Body]):
    """One request of an API: what is asked of the coordinator for it, and how it is answered. The docstring of a
    subclass describes its path. Each choice's messages come in order."""

    path: ClassVar[str]
    operation: ClassVar[str]  # its name in the OpenAPI document
    schema: ClassVar[type[GenerationFields]]
    whole: ClassVar[Any]  # the kind of a whole answer
    error: ClassVar[Any] = ErrorAnswer  # and of one of status 400 and above

    def __init__(self, body: Body, info: Info, request_id: str):
        self.body, self.info, self.request_id = body, info, request_id

    @abstractmethod
    def prompts(self, backend: Backend) -> Sequence[Start]:
        """What starts the samples of each prompt."""

    def names(self) -> Mapping[str, str]:
        """What the client calls the coordinator's fields, where it is not as in errors.FIELD_NAMES."""
        return {}

    @abstractmethod
    def answer(self, choices: Sequence[GenerateResponse], usage: Usage) -> Any:
        """The whole answer, of the kind `whole`; each choice is all of its messages merged."""

    @abstractmethod
    def events(self, index: int, message: GenerateResponse) -> Iterator[bytes]:
        """What a message adds to the stream of a choice."""

    @abstractmethod
    def last_events(self, last: Sequence[GenerateResponse], usage: Usage) -> Iterator[bytes]:
        """What ends a complete stream; `last` has the last message of each choice."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """The event that ends a begun stream which cannot go on, so that no reader takes it for complete."""

    def generations(self, backend: Backend, prompt: GenerateRequest) -> Start:
        """Continues a prompt with what else the client set."""
        return partial(self._generate, backend, prompt)

    def _generate(self, backend: Backend, prompt: GenerateRequest, deadline: float) -> AsyncIterator[Message]:
        request = generate_request(prompt, self.body)  # late: prompts may be large
        return backend.generate(request, self.body.choices(), deadline)


class WithoutFirstSpace:
    """The parts of a text, of which the first one comes without the space that it begins with."""

    def __init__(self, begun: bool = False):
        """`begun`: the parts continue a text, so that a space belongs to it."""
        self._begun = begun

    def __call__(self, part: str) -> str:
        whole, self._begun = self._begun, self._begun or bool(part)
        return part if whole else part.removeprefix(" ")


class OneText(Dialect[Body]):
    """An API that answers a conversation with one text, which comes without its first space."""

    def __init__(self, body: Body, info: Info, request_id: str, *, begun: bool = False):
        """`begun`: the prompt holds the beginning of the text, so that a space belongs to it."""
        super().__init__(body, info, request_id)
        self.text = ""  # of a stream, so far
        self._opened, self.spoken = False, WithoutFirstSpace(begun)

    @abstractmethod
    def prompt(self) -> str:
        """The text to continue."""

    @abstractmethod
    def opening(self) -> Iterator[bytes]:
        """The events before the first text."""

    @abstractmethod
    def delta(self, text: str) -> bytes:
        """The event of new text."""

    def prompts(self, backend: Backend) -> Sequence[Start]:
        return [self.generations(backend, GenerateRequest(prompt=self.prompt()))]

    def events(self, index: int, message: GenerateResponse) -> Iterator[bytes]:
        if not self._opened:
            self._opened = True
            yield from self.opening()
        if text := self.spoken(message.text):
            self.text += text
            yield self.delta(text)


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + to_json(data) + b"\n\n"
