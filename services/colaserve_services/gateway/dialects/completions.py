"""POST /v1/completions. A completion with `suffix` is an infill: the prompt, a hole of max_tokens and the suffix."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest, GenerateResponse
from colaserve.v1.latent_service_pb2 import InfillRequest, InfillSegment, LogprobsRequest
from colaserve_client.results import FinishReason
from colaserve_client.settings import GenerationRequest
from colaserve_services.bounds import FINISH_REASONS
from colaserve_services.gateway.backend import Backend, Info
from colaserve_services.gateway.dialects.base import Message, Start, Usage
from colaserve_services.gateway.dialects.fields import (
    EACH_BLOCK,
    UINT32,
    Text,
    TokenIds,
    at_most,
    set_sampling,
    with_settings,
)
from colaserve_services.gateway.dialects.logprobs import positions_of
from colaserve_services.gateway.dialects.openai import (
    MOST_LOGPROBS,
    STOPS,
    ChoiceDialect,
    ChoiceFields,
    GuidedChoice,
)
from colaserve_services.gateway.errors import invalid
from colaserve_services.gateway.json_form import LatentArray, plain

MOST_PROMPTS: Final = 1_024
_BESIDE: Final[Mapping[str, tuple[Any, ...]]] = {  # fields that an infill cannot honour -> values that ask for nothing
    "n": (None, 1),
    "logprobs": (None,),
    "echo": (None, False),
    "stop": (None, []),
    "guided_choice": (None,),
    "ignore_eos": (None, False),
    "skip_special_tokens": (None, True),
    **dict.fromkeys(EACH_BLOCK, (None, 0, False)),
}


@with_settings(GenerationRequest, only=EACH_BLOCK)
class CompletionRequest(ChoiceFields):
    """POST /v1/completions."""

    unions: ClassVar[Mapping[str, str]] = {
        "prompt": "expected a string, a list of strings, a list of token ids or a list of lists of token ids",
        "stop": STOPS,
    }

    prompt: (
        Text
        | Annotated[list[Text], at_most(MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], at_most(MOST_PROMPTS)]
    ) = Field(description="One prompt or several, as text or as token ids. An empty text is unconditional.")
    suffix: Text | None = Field(
        None,
        description="The text is a hole of max_tokens between the prompt and this; without n, logprobs, echo, stop.",
    )
    best_of: int | None = Field(None, ge=1, description="Only the value of n is taken.")
    max_tokens: Annotated[int, Field(ge=0, le=UINT32)] | None = Field(
        None, description="Tokens to write at most. 0, with echo: write none."
    )
    echo: bool | None = Field(
        None, description="Begin each text with its prompt; with logprobs, score its tokens by their reconstruction."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="Return log-probabilities, of this many likely tokens too."
    )

    def alternatives(self) -> int | None:
        return self.logprobs


class CompletionLogprobs(TypedDict):
    """Column by column. `text_offset` counts characters from the beginning of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionPreview(TypedDict):
    """The block under way as it would be if the prior stopped after `step` steps; `text` continues what was sent."""

    block_index: int
    step: int
    text: str
    latents: NotRequired[LatentArray]


class CompletionChoice(TypedDict):
    """In a stream also, on request: a preview beside an empty text, or the probes and the latents (B, d) of a block."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    preview: NotRequired[CompletionPreview]
    probes: NotRequired[dict[str, float]]
    latents: NotRequired[LatentArray]
    guided_choice: NotRequired[list[GuidedChoice]]


class Completion(TypedDict):
    """The answer to POST /v1/completions, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Completions(ChoiceDialect[CompletionRequest]):
    """Continue one or several prompts. With `stream`, server-sent events of `text_completion` objects."""

    path, operation = "/v1/completions", "create_completion"
    schema, whole = CompletionRequest, Completion
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, info: Info, request_id: str):
        if body.echo and body.logprobs is not None and body.ignore_eos is None:
            body = body.model_copy(update={"ignore_eos": True})  # those who score prompts cut max_tokens off the end
        super().__init__(body, info, request_id)
        if body.best_of not in (None, body.choices()):
            what = f"got {body.best_of}, expected the value of n, {body.choices()}"
            raise invalid("best_of", what, "unsupported_parameter")
        for name in EACH_BLOCK:
            if getattr(body, name) and not body.stream:
                raise invalid(name, "needs stream to be true")
        if body.max_tokens == 0 and not body.echo:
            raise invalid("max_tokens", "got 0, which needs echo: otherwise there would be no text")

    def prompts(self, backend: Backend) -> Sequence[Start]:
        if self.body.suffix:
            request = infill_request(self.body, self.info)
            return [partial(backend.infill, request)]
        each = completion_prompts(self.body.prompt, self.info.model.vocab_size)
        starts = [self.generations(backend, prompt) for prompt in each]
        if self.body.echo:
            return [partial(self._echoed, backend, *both) for both in zip(each, starts, strict=True)]
        return starts

    def names(self) -> Mapping[str, str]:
        return infill_names(self.body, self.info) if self.body.suffix else {"top_logprobs": "logprobs"}

    def choice(self, index: int, message: GenerateResponse) -> Mapping[str, Any]:
        logprobs = _completion_logprobs(message) if self._logprobs else None
        reason = FINISH_REASONS.get(message.finish_reason)
        choice = {"index": index, "text": message.text, "logprobs": logprobs, "finish_reason": reason}
        return choice | self.guided(message)

    def deltas(self, index: int, message: GenerateResponse) -> Iterator[Mapping[str, Any]]:
        asked = (name for name in ("preview", "probes", "latents") if message.HasField(name))
        more = {name: plain(getattr(message, name), as_lists=False) for name in asked}
        if message.text or message.logprobs or message.finish_reason or more:
            yield {**self.choice(index, message), **more}

    async def _echoed(
        self, backend: Backend, prompt: GenerateRequest, start: Start, deadline: float
    ) -> AsyncIterator[Message]:
        """Generations whose first message is the prompt, sent with the first block: what fails before it has a status
        of its own."""
        echo = await self._echo(backend, prompt, deadline)
        length, unsent = len(echo.text), set(range(self.body.choices()))
        if self.body.max_tokens == 0:
            echo.finish_reason, echo.usage.prompt_tokens = types_pb2.FINISH_REASON_LENGTH, len(echo.token_ids)
            for sample in unsent:
                yield sample, echo
            return
        async for sample, message in start(deadline):
            if sample in unsent:
                unsent.remove(sample)
                yield sample, echo
            message.text_offsets[:] = [length + offset for offset in message.text_offsets]
            yield sample, message

    async def _echo(self, backend: Backend, prompt: GenerateRequest, deadline: float) -> GenerateResponse:
        """The prompt as it would be had it been written; with log-probabilities if they are asked for."""
        ids, scored = prompt.prompt_ids.ids, self._logprobs or self.body.max_tokens == 0
        if scored and (ids or prompt.prompt):
            request = LogprobsRequest(
                text=prompt.prompt, top_logprobs=self.body.logprobs, cache_salt=self.body.cache_salt
            )
            if ids:
                request.ids.CopyFrom(prompt.prompt_ids)
            return await backend.logprobs(request, deadline)
        return GenerateResponse(text=(await backend.detokenize(ids)).text if ids else prompt.prompt)


def _completion_logprobs(message: GenerateResponse) -> CompletionLogprobs:
    positions = positions_of(message)
    return {
        "tokens": [one["token"] for one in positions],
        "token_logprobs": [one["logprob"] for one in positions],
        "top_logprobs": [
            {token["token"]: token["logprob"] for token in (*one["top_logprobs"], one)} for one in positions
        ],
        "text_offset": list(message.text_offsets),
    }


def completion_prompts(prompt: str | list[Any], vocab_size: int) -> list[GenerateRequest]:
    """One request for each prompt, with nothing but the prompt in it."""
    if prompt == []:
        raise invalid("prompt", "the list is empty, expected at least one prompt or token id")
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    each = {"prompt": prompt} if single else {f"prompt[{index}]": one for index, one in enumerate(prompt)}
    return [_one_prompt(one, where, vocab_size) for where, one in each.items()]


def _one_prompt(prompt: str | list[int], where: str, vocab_size: int) -> GenerateRequest:
    if isinstance(prompt, str):
        return GenerateRequest(prompt=prompt)
    if not prompt:
        raise invalid(where, "no token ids, expected at least one")
    if (worst := max(prompt)) >= vocab_size:
        raise invalid(where, f"token id {worst} is outside the vocabulary of {vocab_size}")
    return GenerateRequest(prompt_ids=types_pb2.TokenIds(ids=prompt))


def infill_request(body: CompletionRequest, info: Info) -> InfillRequest:
    """The request that a completion with a suffix stands for; a 400 names what cannot be honoured beside it."""
    for name, neutral in _BESIDE.items():
        if getattr(body, name) not in neutral:
            raise invalid(name, "not together with suffix", "unsupported_parameter")
    segments = [InfillSegment(**segment) for segment in _segments(body, info).values()]
    request = InfillRequest(segments=segments, cache_salt=body.cache_salt or "")
    if body.seed is not None:
        request.seed.CopyFrom(types_pb2.NoiseSeed(base_seed=body.seed))
    set_sampling(request, body)
    return request


def infill_names(body: CompletionRequest, info: Info) -> Mapping[str, str]:
    """What the client calls the fields of the request, so that an error names what it sent."""
    names = enumerate(_segments(body, info))
    return {f"segments[{index}]{end}": name for index, name in names for end in ("", ".text", ".token_count")}


def _segments(body: CompletionRequest, info: Info) -> dict[str, dict[str, Any]]:
    """By the field that each comes of."""
    prompt = body.prompt[0] if isinstance(body.prompt, list) and len(body.prompt) == 1 else body.prompt
    if not isinstance(prompt, str):
        raise invalid("prompt", "expected one text beside suffix", "unsupported_parameter")
    hole = body.max_tokens or info.default_max_new_tokens
    kept = {"prompt": {"text": prompt}} if prompt else {}
    return {**kept, "max_tokens": {"token_count": hole}, "suffix": {"text": body.suffix}}
