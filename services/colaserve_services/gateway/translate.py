"""A checked HTTP request to the gRPC requests it stands for. Only what the client set is set.

The model knows no roles: a chat is a text that ends where the answer begins. A completion with `suffix` is an infill:
the prompt, a hole of max_tokens and the suffix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import Message as ProtoMessage

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve.v1.latent_service_pb2 import InfillRequest, InfillSegment
from colaserve_services.bounds import SAMPLER, SAMPLING, Fields, wire
from colaserve_services.gateway.backend import Info
from colaserve_services.gateway.errors import invalid
from colaserve_services.gateway.schemas import ChatRequest, CompletionRequest, GenerationFields, Message, parts

FRAME_PLACE: Final = "{prompt}"
_SPEAKERS: Final = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
_ANSWER: Final = "Assistant:"

_BESIDE: Final[Mapping[str, tuple[Any, ...]]] = {  # fields that an infill cannot honour -> values that ask for nothing
    "n": (None, 1),
    "logprobs": (None,),
    "echo": (None, False),
    "stop": (None, []),
    "ignore_eos": (None, False),
    "skip_special_tokens": (None, True),
}


def chat_prompt(messages: Sequence[Message], frame: str) -> str:
    """One message of an unnamed user: its text, in the checkpoint's frame if there is one. Others: a transcript."""
    first = messages[0]
    if len(messages) == 1 and first.role == "user" and first.name is None:
        text = parts(first.content)
        return frame.replace(FRAME_PLACE, text) if frame else text
    return transcript(messages)


def transcript(messages: Sequence[Message]) -> str:
    """ "User: ...", "Assistant: ..." line by line; the last line is "Assistant:", without a space after it."""
    return "\n".join([*map(_line, messages), _ANSWER])


def _line(message: Message) -> str:
    speaker, text = _SPEAKERS[message.role], parts(message.content)
    tag = f"{speaker} ({message.name}):" if message.name else f"{speaker}:"
    space = "" if text[:1].isspace() else " "  # an answer of this model begins with its own space
    return f"{tag}{space}{text}"


def text_prompt(text: str) -> GenerateRequest:
    return GenerateRequest(prompt=text)


def id_prompt(ids: Sequence[int]) -> GenerateRequest:
    return GenerateRequest(prompt_ids=types_pb2.TokenIds(ids=ids))


def completion_prompts(prompt: str | list[str] | list[int] | list[list[int]], vocab_size: int) -> list[GenerateRequest]:
    """One request for each prompt, with nothing but the prompt in it."""
    if isinstance(prompt, str):
        return [text_prompt(prompt)]
    if not prompt:
        raise invalid("prompt", "the list is empty, expected at least one prompt or token id")
    if isinstance(prompt[0], int):
        return [_checked_ids(prompt, "prompt", vocab_size)]
    return [_one_prompt(one, f"prompt[{place}]", vocab_size) for place, one in enumerate(prompt)]


def _one_prompt(one: Any, where: str, vocab_size: int) -> GenerateRequest:
    return text_prompt(one) if isinstance(one, str) else _checked_ids(one, where, vocab_size)


def _checked_ids(ids: Sequence[int], where: str, vocab_size: int) -> GenerateRequest:
    if not ids:
        raise invalid(where, "no token ids, expected at least one")
    worst = max(ids)
    if worst >= vocab_size:
        raise invalid(where, f"token id {worst} is outside the vocabulary of {vocab_size}")
    return id_prompt(ids)


def generate_request(prompt: GenerateRequest, fields: ChatRequest | CompletionRequest, sample: int) -> GenerateRequest:
    """The request for one text: `prompt` with all else that the client set. `sample` counts a prompt's choices."""
    request = GenerateRequest()
    request.CopyFrom(prompt)
    if (budget := token_budget(fields)) is not None:
        request.max_new_tokens = budget
    if fields.seed is not None:
        request.seed.CopyFrom(types_pb2.NoiseSeed(base_seed=fields.seed, sample_id=sample))
    if (alternatives := most_likely(fields)) is not None:
        request.top_logprobs = alternatives
    request.stop.extend(stop_strings(fields))
    request.ignore_end = bool(fields.ignore_eos)
    request.print_special = fields.skip_special_tokens is False
    set_sampler(request.sampler, fields)
    set_sampling(request.sampling, fields)
    return request


def token_budget(fields: GenerationFields) -> int | None:
    """max_tokens under either of its names."""
    newer: int | None = getattr(fields, "max_completion_tokens", None)
    if newer is not None and fields.max_tokens not in (None, newer):
        raise invalid("max_completion_tokens", f"got {newer}, and max_tokens {fields.max_tokens}: set one of them")
    return fields.max_tokens if newer is None else newer


def stop_strings(fields: GenerationFields) -> list[str]:
    return [fields.stop] if isinstance(fields.stop, str) else fields.stop or []


def most_likely(fields: ChatRequest | CompletionRequest) -> int | None:
    """How many likely tokens to return beside each token; None: no log-probabilities at all."""
    if isinstance(fields, CompletionRequest):
        return fields.logprobs
    if fields.top_logprobs is not None and not fields.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    return (fields.top_logprobs or 0) if fields.logprobs else None


def set_sampler(sampler: types_pb2.Sampler, fields: GenerationFields) -> None:
    """What the client set of how latents are sampled."""
    _set(sampler, SAMPLER, fields)
    if fields.guidance_interval is not None:  # the order says nothing: time runs from the greater one
        if sampler.HasField("guidance_start") or sampler.HasField("guidance_end"):
            raise invalid("guidance_interval", "says the same as guidance_start and guidance_end: set one of them")
        sampler.guidance_start = max(fields.guidance_interval)
        sampler.guidance_end = min(fields.guidance_interval)


def set_sampling(sampling: types_pb2.Sampling, fields: GenerationFields) -> None:
    """What the client set of how tokens are drawn."""
    _set(sampling, SAMPLING, fields)


def _set(message: ProtoMessage, table: Fields, fields: GenerationFields) -> None:
    values = {name: getattr(fields, field.flat) for name, field in table.items()}
    if values.get("top_k") == -1:  # as OpenAI's other servers say it
        values["top_k"] = 0
    for name, value in wire(table, values).items():
        setattr(message, name, value)


def names_of(fields: ChatRequest | CompletionRequest) -> Mapping[str, str]:
    """What the client calls the coordinator's fields, so that an error names what it sent."""
    if isinstance(fields, CompletionRequest):
        return {"top_logprobs": "logprobs"}
    newer = fields.max_completion_tokens is not None
    return {"prompt": "messages", "max_new_tokens": "max_completion_tokens" if newer else "max_tokens"}


def infill_request(body: CompletionRequest, info: Info) -> InfillRequest:
    """The request that a completion with a suffix stands for; a 400 names what cannot be honoured beside it."""
    for name, neutral in _BESIDE.items():
        if getattr(body, name) not in neutral:
            raise invalid(name, "not together with suffix", "unsupported_parameter")
    request = InfillRequest(segments=[InfillSegment(**segment) for segment in _segments(body, info).values()])
    if body.seed is not None:
        request.seed.CopyFrom(types_pb2.NoiseSeed(base_seed=body.seed))
    set_sampler(request.sampler, body)
    set_sampling(request.sampling, body)
    return request


def infill_names(body: CompletionRequest, info: Info) -> Mapping[str, str]:
    """What the client calls the fields of the request, so that an error names what it sent."""
    names = enumerate(_segments(body, info))
    return {f"segments[{place}]{end}": name for place, name in names for end in ("", ".text", ".token_count")}


def _segments(body: CompletionRequest, info: Info) -> dict[str, dict[str, Any]]:
    """By the field that each comes of."""
    prompt = body.prompt[0] if isinstance(body.prompt, list) and len(body.prompt) == 1 else body.prompt
    if not isinstance(prompt, str):
        raise invalid("prompt", "expected one text beside suffix", "unsupported_parameter")
    hole = body.max_tokens or info.default_max_new_tokens
    kept = {"prompt": {"text": prompt}} if prompt else {}
    return {**kept, "max_tokens": {"token_count": hole}, "suffix": {"text": body.suffix}}
