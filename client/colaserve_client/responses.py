"""Python values from response messages: a dataclass of `results` from the message's fields of the same names."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import cache, partial
from types import NoneType
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints

from google.protobuf.message import Message

from colaserve.v1 import decoder_pb2, generation_pb2, latent_service_pb2, prior_pb2, types_pb2
from colaserve_client import results
from colaserve_client.arrays import FloatArray, array_from_tensor, shortest
from colaserve_client.calls import converted
from colaserve_client.errors import Details, ServerError
from colaserve_client.latents import Latents
from colaserve_client.requests import enum_names

T = TypeVar("T")


def read(kind: type[T], message: Message, **given: object) -> T:
    """A dataclass of the message's fields of the same names, but for those that are given.

    A field that may be None in the dataclass is None where the message lacks it.
    """
    known = message.DESCRIPTOR.fields_by_name
    for name, hint in _hints(cast(Any, kind)):
        if name in known and name not in given:
            given[name] = _value(hint, known[name], message)
        elif NoneType in get_args(hint):
            given.setdefault(name, None)
    return kind(**given)


def one(kind: type[T]) -> Callable[[Message], T]:
    """What reads an answer that is one such value."""
    return partial(read, kind)


def several(kind: type[T], field: str) -> Callable[[Message], list[T]]:
    """What reads an answer with a list of such values in a field."""
    return lambda message: [read(kind, each) for each in getattr(message, field)]


@cache
def _hints(kind: Any) -> Sequence[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in fields(kind)]


def _value(hint: Any, field: Any, message: Message) -> Any:
    value, optional = getattr(message, field.name), NoneType in get_args(hint)
    if optional:
        if field.has_presence and not message.HasField(field.name):
            return None
        [hint] = [each for each in get_args(hint) if each is not NoneType] or [hint]
    if field.enum_type is not None and optional and value == 0:
        return None
    if get_origin(hint) is tuple:
        return tuple(map(_reader(get_args(hint)[0], field), value))
    return _reader(hint, field)(value)


def _reader(hint: Any, field: Any) -> Callable[[Any], Any]:
    """What makes a Python value of one on the wire."""
    if hint is float:
        return shortest
    if hint is Latents:
        return Latents.from_proto
    if hint == FloatArray:
        return partial(array_from_tensor, field=field.name)
    if get_origin(hint) is Literal:
        return partial(_enum_name, field)
    return one(hint) if hasattr(hint, "__dataclass_fields__") else _same


def _same(value: T) -> T:
    return value


def _enum_name(field: Any, number: int) -> str:
    if number not in (names := enum_names(field.enum_type)):
        raise ValueError(f"{field.name}: {number} is not one of {sorted(names)}")
    return names[number]


class _Logprobs(Protocol):
    """What GenerateResponse, DecodeResponse and DecodeLatentsResponse have in common."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def top_logprobs(self) -> Sequence[types_pb2.TopLogprobs]: ...


def token_logprobs(message: _Logprobs, texts: Sequence[str] = ()) -> tuple[results.TokenLogprobs, ...]:
    """One a token; none when the server sent none. A decoder sends no texts."""
    if not message.logprobs:
        return ()
    tops = [_top_tokens(top) for top in message.top_logprobs] or [()] * len(message.logprobs)
    texts = texts or [""] * len(message.logprobs)
    rows = zip(message.token_ids, map(shortest, message.logprobs), texts, tops, strict=True)
    return tuple(results.TokenLogprobs(*row) for row in rows)


def _top_tokens(message: types_pb2.TopLogprobs) -> tuple[results.TopToken, ...]:
    texts = message.tokens or [""] * len(message.token_ids)
    rows = zip(message.token_ids, map(shortest, message.logprobs), texts, strict=True)
    return tuple(results.TopToken(*row) for row in rows)


def generation_chunk(message: generation_pb2.GenerateResponse) -> results.GenerationChunk:
    """One block of a generation."""
    return read(results.GenerationChunk, message, logprobs=token_logprobs(message, message.tokens))


def generation_result(chunks: Iterable[results.GenerationChunk], request_id: str) -> results.GenerationResult:
    """The whole of all chunks; `ServerError` when the last one is missing or incomplete, or they do not fit."""
    chunks = list(chunks)
    last = chunks[-1] if chunks else None
    if last is None or last.finish_reason is None or last.usage is None or last.seed is None:
        raise ServerError("the stream ended without a finish reason, usage and seed", Details(request_id=request_id))
    latents = [chunk.latents for chunk in chunks if chunk.latents is not None]
    return results.GenerationResult(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        latents=converted(Latents.concat, latents, request_id) if latents else None,
        finish_reason=last.finish_reason,
        usage=last.usage,
        seed=last.seed,
        timing=last.timing,
        request_id=request_id,
    )


def tokens(message: generation_pb2.TokenizeResponse) -> results.Tokens:
    """A tokenized text."""
    return results.Tokens(tuple(message.token_ids), tuple(message.tokens))


def decoded_latents(message: latent_service_pb2.DecodeLatentsResponse) -> results.DecodedLatents:
    """Latents turned into text."""
    return read(results.DecodedLatents, message, logprobs=token_logprobs(message, message.tokens))


def latent_block(message: latent_service_pb2.SampleLatentsResponse | prior_pb2.SampleResponse) -> results.LatentBlock:
    """One block, of the coordinator or of a prior."""
    return read(results.LatentBlock, message, index=message.block_index)


def decoded_block(message: decoder_pb2.DecodeResponse) -> results.DecodedBlock:
    """One block of a decoder's session."""
    return read(results.DecodedBlock, message, logprobs=token_logprobs(message))


def model_info(message: generation_pb2.GenerationServiceGetInfoResponse) -> results.ModelInfo:
    """A coordinator and what it serves."""
    return read(results.ModelInfo, message, name=message.model_name)
