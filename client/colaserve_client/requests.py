"""Request messages from Python values. What a field cannot carry is an `InvalidRequest` that names it.

What only the server can judge, such as whether a prompt fits into its context, is left to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from colaserve.v1 import decoder_pb2, encoder_pb2, generation_pb2, latent_service_pb2, prior_pb2, types_pb2
from colaserve_client.arrays import tensor_from_array
from colaserve_client.errors import invalid
from colaserve_client.fields import fields_of
from colaserve_client.latents import Latents, LatentsLike
from colaserve_client.settings import GenerationRequest, Interpolation, NoiseSeed, Prompt, Sampler, Sampling

M = TypeVar("M", bound=Message)
T = TypeVar("T")

INTERPOLATIONS: Mapping[str, latent_service_pb2.Interpolation] = {
    "lerp": latent_service_pb2.INTERPOLATION_LERP,
    "slerp": latent_service_pb2.INTERPOLATION_SLERP,
}


_NUMBERS: Mapping[int, str] = {
    FieldDescriptor.CPPTYPE_INT32: f"an integer from {-(1 << 31)} to {(1 << 31) - 1}",
    FieldDescriptor.CPPTYPE_INT64: f"an integer from {-(1 << 63)} to {(1 << 63) - 1}",
    FieldDescriptor.CPPTYPE_UINT32: f"an integer from 0 to {(1 << 32) - 1}",
    FieldDescriptor.CPPTYPE_UINT64: f"an integer from 0 to {(1 << 64) - 1}",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
}


def _number(kind: type[Message], name: str) -> str | None:
    """What a field that holds one number takes; None for other fields."""
    if not isinstance(getattr(kind(), name), int | float):
        return None
    return _NUMBERS.get(kind.DESCRIPTOR.fields_by_name[name].cpp_type)


def build(kind: type[M], path: str = "", **fields: object) -> M:
    """A message; a value of None leaves its field unset. `path` comes before the field's name in errors."""
    message = kind()
    for name, value in fields.items():
        if value is None:
            continue
        _check_kind(kind, path, name, value)
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            told = f"got {_shown(value)}, expected {expected}" if (expected := _number(kind, name)) else ""
            raise invalid(f"{path}{name}", told or f"cannot be {_shown(value)}: {error}") from error
    return message


def _check_kind(kind: type[Message], path: str, name: str, value: object) -> None:
    """Protobuf takes true for 1, and 1 for true: neither was meant."""
    truth = isinstance(getattr(kind(), name), bool)
    expected = "true or false" if truth else _number(kind, name)
    if expected and isinstance(value, bool | int | float) and isinstance(value, bool) != truth:
        raise invalid(f"{path}{name}", f"got {_shown(value)}, expected {expected}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _named(choices: Mapping[str, int], name: str | None, field: str) -> int | None:
    if name is not None and not (isinstance(name, str) and name in choices):
        raise invalid(field, f"expected one of {', '.join(choices)}, got {name!r}")
    return None if name is None else choices[name]


def _strings(values: Sequence[str], field: str) -> list[str]:
    """One string where several are expected would be taken letter by letter."""
    if isinstance(values, str):
        raise invalid(field, f"expected a list of strings, got one: write [{_shown(values)}]")
    if not isinstance(values, Iterable):
        raise invalid(field, f"expected a list of strings, got {_shown(values)}")
    return list(values)


def _of_kind(value: T, kind: type, field: str) -> T:
    if not isinstance(value, kind):
        raise invalid(field, f"expected {kind.__name__}, got {_shown(value)}")
    return value


def settings_message(kind: type[M], settings: object, path: str) -> M:
    """The message of a Sampler, a Sampling or a NoiseSeed."""
    table = fields_of(type(settings))
    values = {name: getattr(settings, name) for name in table}
    for name, field in table.items():
        if field.choices is not None:
            values[name] = _named(field.choices, values[name], f"{path}{name}")
    message = build(kind, path, **values)
    _check_ranges(settings, path)
    return message


def _check_ranges(settings: object, path: str = "") -> None:
    """Of numbers: texts have been looked up by now."""
    for name, field in fields_of(type(settings)).items():
        value = getattr(settings, name)
        if value is not None and field.range is not None and (fault := field.range.fault(value)):
            raise invalid(f"{path}{name}", fault)


def sampler(settings: Sampler | None) -> types_pb2.Sampler | None:
    """The message of settings."""
    found = None if settings is None else _of_kind(settings, Sampler, "sampler")
    return None if found is None else settings_message(types_pb2.Sampler, found, "sampler.")


def sampling(settings: Sampling | None) -> types_pb2.Sampling | None:
    """The message of settings."""
    found = None if settings is None else _of_kind(settings, Sampling, "sampling")
    return None if found is None else settings_message(types_pb2.Sampling, found, "sampling.")


def noise_seed(seed: int | NoiseSeed | None) -> types_pb2.NoiseSeed | None:
    """The message of a seed; a number is a base_seed of sample 0."""
    if seed is None:
        return None
    return settings_message(types_pb2.NoiseSeed, seed if isinstance(seed, NoiseSeed) else NoiseSeed(seed), "seed.")


def token_ids(ids: Sequence[int], field: str) -> types_pb2.TokenIds:
    """The message of ids."""
    try:
        return types_pb2.TokenIds(ids=ids)
    except (TypeError, ValueError) as error:
        raise invalid(field, f"expected token ids, got {_shown(ids)}: {error}") from error


def generate(request: GenerationRequest) -> generation_pb2.GenerateRequest:
    """The message of a generation."""
    text, ids = _prompt(request.prompt)
    own = {name: getattr(request, name) for name in fields_of(type(request))}
    message = build(
        generation_pb2.GenerateRequest,
        prompt=text,
        prompt_ids=ids,
        sampler=sampler(request.sampler),
        sampling=sampling(request.sampling),
        seed=noise_seed(request.seed),
        **(own | {"stop": _strings(request.stop, "stop")}),
    )
    _check_ranges(request)
    return message


def _prompt(prompt: Prompt) -> tuple[str | None, types_pb2.TokenIds | None]:
    if prompt is None:
        raise invalid("prompt", "expected a text or token ids, got None")
    return (prompt, None) if isinstance(prompt, str) else (None, token_ids(prompt, "prompt_ids"))


def tokenize(text: str) -> generation_pb2.TokenizeRequest:
    """The message of a text."""
    return build(generation_pb2.TokenizeRequest, text=_of_kind(text, str, "text"))


def detokenize(ids: Sequence[int]) -> generation_pb2.DetokenizeRequest:
    """The message of ids."""
    return build(generation_pb2.DetokenizeRequest, token_ids=ids)


def encode_text(texts: Sequence[str], with_variance: bool) -> latent_service_pb2.EncodeTextRequest:
    """The message of texts to encode."""
    return build(
        latent_service_pb2.EncodeTextRequest, texts=_strings(texts, "texts"), with_variance=with_variance or None
    )


def decode_latents(
    latents: LatentsLike,
    settings: Sampling | None,
    top_logprobs: int | None,
    target_ids: Sequence[int],
    token_count: int | None,
) -> latent_service_pb2.DecodeLatentsRequest:
    """The message of latents to decode."""
    return build(
        latent_service_pb2.DecodeLatentsRequest,
        latents=Latents.of(latents).to_proto(),
        sampling=sampling(settings),
        top_logprobs=top_logprobs,
        target_ids=target_ids,
        token_count=token_count,
    )


def sample_latents(
    prefix: LatentsLike | None, max_blocks: int, settings: Sampler | None, seed: int | NoiseSeed | None
) -> latent_service_pb2.SampleLatentsRequest:
    """The message of latents to continue."""
    return build(
        latent_service_pb2.SampleLatentsRequest,
        prefix=_latents(prefix, "prefix"),
        max_blocks=max_blocks,
        sampler=sampler(settings),
        seed=noise_seed(seed),
    )


def interpolate(
    start: str | LatentsLike, end: str | LatentsLike, points: int, path: Interpolation | None, settings: Sampling | None
) -> latent_service_pb2.InterpolateRequest:
    """The message of a walk."""
    return build(
        latent_service_pb2.InterpolateRequest,
        start=_endpoint(start, "start"),
        end=_endpoint(end, "end"),
        points=points,
        interpolation=_named(INTERPOLATIONS, path, "interpolation"),
        sampling=sampling(settings),
    )


def _endpoint(point: str | LatentsLike, field: str) -> latent_service_pb2.Endpoint:
    if isinstance(point, str):
        return build(latent_service_pb2.Endpoint, f"{field}.", text=point)
    return latent_service_pb2.Endpoint(latents=Latents.of(point, field).to_proto())


def _latents(values: LatentsLike | None, field: str) -> types_pb2.Latents | None:
    """The message of latents, or of an array of them."""
    return None if values is None else Latents.of(values, field).to_proto()


def infill(
    segments: Sequence[str | int],
    sampler_settings: Sampler | None,
    sampling_settings: Sampling | None,
    seed: int | NoiseSeed | None,
) -> latent_service_pb2.InfillRequest:
    """The message of a text with holes: a string is kept, a number is a hole of so many tokens."""
    if isinstance(segments, str):
        raise invalid("segments", "expected a list of texts and hole sizes, got one text without a hole")
    return build(
        latent_service_pb2.InfillRequest,
        segments=[_segment(segment, f"segments[{index}].") for index, segment in enumerate(segments)],
        sampler=sampler(sampler_settings),
        sampling=sampling(sampling_settings),
        seed=noise_seed(seed),
    )


def _segment(segment: str | int, path: str) -> latent_service_pb2.InfillSegment:
    if isinstance(segment, str):
        return build(latent_service_pb2.InfillSegment, path, text=segment)
    return build(latent_service_pb2.InfillSegment, path, token_count=segment)


def reconstruct(texts: Sequence[str]) -> latent_service_pb2.ReconstructRequest:
    """The message of texts to round-trip."""
    return build(latent_service_pb2.ReconstructRequest, texts=_strings(texts, "texts"))


def encode(sequences: Sequence[Sequence[int]], with_variance: bool) -> encoder_pb2.EncodeRequest:
    """The message of sequences to encode."""
    messages = [token_ids(ids, f"sequences[{index}]") for index, ids in enumerate(sequences)]
    return build(encoder_pb2.EncodeRequest, sequences=messages, with_variance=with_variance or None)


def sample(
    latents: LatentsLike | None,
    open_spans: Sequence[tuple[int, int]],
    max_blocks: int,
    first_block: int,
    settings: Sampler | None,
    seed: int | NoiseSeed | None,
    noise: ArrayLike | None,
) -> prior_pb2.SampleRequest:
    """The message of a prior's run; the noise is either given or seeded."""
    if (seed is None) == (noise is None):
        raise invalid("noise_source", "expected either seed or noise, got " + ("none" if seed is None else "both"))
    return build(
        prior_pb2.SampleRequest,
        canvas=_canvas(latents, open_spans),
        max_blocks=max_blocks,
        first_block=first_block or None,
        sampler=sampler(settings),
        seed=noise_seed(seed),
        noise=None if noise is None else tensor_from_array(noise, "noise"),
    )


def _canvas(latents: LatentsLike | None, open_spans: Sequence[tuple[int, int]]) -> types_pb2.Canvas:
    spans = [build(types_pb2.Span, f"canvas.open[{i}].", start=s, end=e) for i, (s, e) in enumerate(open_spans)]
    return types_pb2.Canvas(latents=_latents(latents, "latents"), open=spans)


def open_decode(
    prefix: LatentsLike | None,
    settings: Sampling | None,
    history_ids: Sequence[int],
    with_logits: bool,
    top_logprobs: int,
    target_ids: Sequence[int],
    max_latents: int,
) -> decoder_pb2.DecodeRequest:
    """The message that opens a decoder's session."""
    opening = build(
        decoder_pb2.OpenDecode,
        "open.",
        prefix=_latents(prefix, "prefix"),
        sampling=sampling(settings),
        history_ids=history_ids,
        with_logits=with_logits or None,
        top_logprobs=top_logprobs or None,
        target_ids=target_ids,
        max_latents=max_latents or None,
    )
    return decoder_pb2.DecodeRequest(open=opening)


def decode_block(block: LatentsLike) -> decoder_pb2.DecodeRequest:
    """The message of a session's next block."""
    return decoder_pb2.DecodeRequest(block=Latents.of(block, "block").to_proto())
