"""A checked HTTP request to the gRPC requests it stands for. Only what the client set is set.

The model knows no roles: a chat is a text that ends where the answer begins. A completion with `suffix` is an infill:
the prompt, a hole of max_tokens and the suffix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve.v1.latent_service_pb2 import InfillRequest, InfillSegment
from colaserve_services.bounds import SAMPLER, SAMPLING, wire
from colaserve_services.gateway.backend import Info
from colaserve_services.gateway.errors import invalid
from colaserve_services.gateway.schemas import ChatRequest, CompletionRequest, GenerationFields, Message

FRAME_PLACE: Final = "{prompt}"
_SPEAKERS: Final = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}

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
        text = _content(first)
        return frame.replace(FRAME_PLACE, text) if frame else text
    return "\n".join([*map(_line, messages), "Assistant:"])  # without a space after it: the answer begins with one


def _line(message: Message) -> str:
    speaker, text = _SPEAKERS[message.role], _content(message)
    tag = f"{speaker} ({message.name}):" if message.name else f"{speaker}:"
    space = "" if text[:1].isspace() else " "
    return f"{tag}{space}{text}"


def _content(message: Message) -> str:
    """A message's text: parts are joined as they are."""
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


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
    request.stop.extend([fields.stop] if isinstance(fields.stop, str) else fields.stop or [])
    request.ignore_end = bool(fields.ignore_eos)
    request.print_special = fields.skip_special_tokens is False
    request.cache_salt = fields.cache_salt or ""
    _set_sampling(request, fields)
    return request


def token_budget(fields: GenerationFields) -> int | None:
    """max_tokens under either of its names."""
    newer: int | None = getattr(fields, "max_completion_tokens", None)
    if newer is not None and fields.max_tokens not in (None, newer):
        raise invalid("max_completion_tokens", f"got {newer}, and max_tokens {fields.max_tokens}: set one of them")
    return fields.max_tokens if newer is None else newer


def most_likely(fields: ChatRequest | CompletionRequest) -> int | None:
    """How many likely tokens to return beside each token; None: no log-probabilities at all."""
    if isinstance(fields, CompletionRequest):
        return fields.logprobs
    if fields.top_logprobs is not None and not fields.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    return (fields.top_logprobs or 0) if fields.logprobs else None


def _set_sampling(request: GenerateRequest | InfillRequest, fields: GenerationFields) -> None:
    """What the client set of how latents are sampled and how tokens are drawn."""
    sampler, sampling = request.sampler, request.sampling
    for message, table in ((sampler, SAMPLER), (sampling, SAMPLING)):
        values = {name: getattr(fields, field.flat) for name, field in table.items()}
        for name, value in wire(table, values).items():
            setattr(message, name, 0 if name == "top_k" and value == -1 else value)  # -1: as others say that all count
    if fields.guidance_interval is not None:  # in either order: time runs from the greater one down
        if sampler.HasField("guidance_start") or sampler.HasField("guidance_end"):
            raise invalid("guidance_interval", "means the same as guidance_start and guidance_end: set one of them")
        sampler.guidance_start, sampler.guidance_end = max(fields.guidance_interval), min(fields.guidance_interval)


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
    segments = [InfillSegment(**segment) for segment in _segments(body, info).values()]
    request = InfillRequest(segments=segments, cache_salt=body.cache_salt or "")
    if body.seed is not None:
        request.seed.CopyFrom(types_pb2.NoiseSeed(base_seed=body.seed))
    _set_sampling(request, body)
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
