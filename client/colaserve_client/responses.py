"""Python values from response messages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from colaserve.v1 import decoder_pb2, encoder_pb2, generation_pb2, latent_service_pb2, prior_pb2, types_pb2
from colaserve_client import results
from colaserve_client.arrays import array_from_tensor, shortest
from colaserve_client.calls import converted
from colaserve_client.errors import Details, ServerError
from colaserve_client.fields import fields_of
from colaserve_client.latents import Latents
from colaserve_client.settings import NoiseSeed, Sampler, Sampling

_FINISH_REASONS: Mapping[int, results.FinishReason] = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
}

T = TypeVar("T", Sampler, Sampling)


class _Logprobs(Protocol):
    """What GenerateResponse, DecodeResponse and DecodeLatentsResponse have in common."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def top_logprobs(self) -> Sequence[types_pb2.TopLogprobs]: ...


def timing(message: types_pb2.Timing) -> results.Timing:
    """Where the time went."""
    return results.Timing(message.queue_us, message.compute_us)


def usage(message: types_pb2.Usage) -> results.Usage:
    """What was used."""
    return results.Usage(message.prompt_tokens, message.completion_tokens, message.blocks, message.wasted_blocks)


def noise_seed(message: types_pb2.NoiseSeed) -> NoiseSeed:
    """The seed of a run."""
    return NoiseSeed(message.base_seed, message.sample_id)


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
    return results.GenerationChunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        tokens=tuple(message.tokens),
        logprobs=token_logprobs(message, message.tokens),
        latents=Latents.from_proto(message.latents) if message.HasField("latents") else None,
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
        usage=usage(message.usage) if message.HasField("usage") else None,
        seed=noise_seed(message.seed) if message.HasField("seed") else None,
        timing=timing(message.timing),
    )


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


def text(message: generation_pb2.DetokenizeResponse) -> str:
    """Token ids turned into text."""
    return message.text


def text_encodings(message: latent_service_pb2.EncodeTextResponse) -> list[results.TextEncoding]:
    """One for each text."""
    return [
        results.TextEncoding(
            Latents.from_proto(each.latents),
            array_from_tensor(each.log_variance, "log_variance") if each.HasField("log_variance") else None,
            tuple(each.token_ids),
            tuple(each.tokens),
        )
        for each in message.encodings
    ]


def decoded_latents(message: latent_service_pb2.DecodeLatentsResponse) -> results.DecodedLatents:
    """Latents turned into text."""
    return results.DecodedLatents(
        text=message.text,
        token_ids=tuple(message.token_ids),
        tokens=tuple(message.tokens),
        logprobs=token_logprobs(message, message.tokens),
        target_logprobs=tuple(map(shortest, message.target_logprobs)),
        timing=timing(message.timing),
    )


def latent_block(message: latent_service_pb2.SampleLatentsResponse | prior_pb2.SampleResponse) -> results.LatentBlock:
    """One block, of the coordinator or of a prior."""
    return results.LatentBlock(
        index=message.block_index,
        latents=Latents.from_proto(message.latents),
        timing=timing(message.timing),
        seed=noise_seed(message.seed) if isinstance(message, latent_service_pb2.SampleLatentsResponse) else None,
    )


def interpolation(message: latent_service_pb2.InterpolateResponse) -> list[results.InterpolationPoint]:
    """The points of a walk, in order."""
    return [
        results.InterpolationPoint(
            weight=shortest(point.weight),
            latents=Latents.from_proto(point.latents),
            text=point.text,
            token_ids=tuple(point.token_ids),
            tokens=tuple(point.tokens),
        )
        for point in message.points
    ]


def infill(message: latent_service_pb2.InfillResponse) -> results.InfillResult:
    """A filled text."""
    return results.InfillResult(
        text=message.text,
        segments=tuple(message.segments),
        token_ids=tuple(message.token_ids),
        tokens=tuple(message.tokens),
        finish_reasons=tuple(_FINISH_REASONS[reason] for reason in message.finish_reasons),
        usage=usage(message.usage),
        seed=noise_seed(message.seed),
        timing=timing(message.timing),
    )


def reconstructions(message: latent_service_pb2.ReconstructResponse) -> list[results.Reconstruction]:
    """One for each text."""
    return [
        results.Reconstruction(
            text=each.text,
            token_ids=tuple(each.token_ids),
            tokens=tuple(each.tokens),
            original_ids=tuple(each.original_ids),
            token_accuracy=shortest(each.token_accuracy),
            bits_per_token=shortest(each.bits_per_token),
        )
        for each in message.reconstructions
    ]


def sequence_encodings(message: encoder_pb2.EncodeResponse) -> list[results.SequenceEncoding]:
    """One for each sequence."""
    return [
        results.SequenceEncoding(
            Latents.from_proto(each.latents),
            array_from_tensor(each.log_variance, "log_variance") if each.HasField("log_variance") else None,
        )
        for each in message.encodings
    ]


def decoded_block(message: decoder_pb2.DecodeResponse) -> results.DecodedBlock:
    """One block of a decoder's session."""
    return results.DecodedBlock(
        token_ids=tuple(message.token_ids),
        logprobs=token_logprobs(message),
        logits=array_from_tensor(message.logits, "logits") if message.HasField("logits") else None,
        target_logprobs=tuple(map(shortest, message.target_logprobs)),
        timing=timing(message.timing),
    )


def model_shape(message: types_pb2.ModelShape) -> results.ModelShape:
    """The shape of a model."""
    return results.ModelShape(
        latent_dim=message.latent_dim,
        block_size=message.block_size,
        vae_block_size=message.vae_block_size,
        patch_size=message.patch_size,
        vocab_size=message.vocab_size,
        parameters=message.parameters,
    )


def limits(message: types_pb2.Limits) -> results.Limits:
    """What a service takes at most."""
    return results.Limits(
        max_context=message.max_context,
        max_message_bytes=message.max_message_bytes,
        max_running=message.max_running,
        max_waiting=message.max_waiting,
        kv_bytes=message.kv_bytes,
        run_ahead=message.run_ahead,
    )


def server_info(message: types_pb2.ServerInfo) -> results.ServerInfo:
    """A process and its load."""
    return results.ServerInfo(
        version=message.version,
        device=message.device,
        dtype=message.dtype,
        running=message.running,
        waiting=message.waiting,
        kv_bytes_used=message.kv_bytes_used,
        uptime_seconds=message.uptime_seconds,
    )


ServiceInfoMessage = (
    encoder_pb2.EncoderServiceGetInfoResponse
    | prior_pb2.PriorServiceGetInfoResponse
    | decoder_pb2.DecoderServiceGetInfoResponse
    | latent_service_pb2.LatentServiceGetInfoResponse
)


def service_info(message: ServiceInfoMessage) -> results.ServiceInfo:
    """A stage, or the latent service."""
    return results.ServiceInfo(
        model=model_shape(message.model),
        space=message.space,
        limits=limits(message.limits),
        server=server_info(message.server),
        has_variance=message.has_variance if isinstance(message, encoder_pb2.EncoderServiceGetInfoResponse) else None,
    )


def model_info(message: generation_pb2.GenerationServiceGetInfoResponse) -> results.ModelInfo:
    """A coordinator and what it serves."""
    return results.ModelInfo(
        name=message.model_name,
        model=model_shape(message.model),
        space=message.space,
        limits=limits(message.limits),
        server=server_info(message.server),
        default_sampler=settings(Sampler, message.default_sampler),
        default_sampling=settings(Sampling, message.default_sampling),
        default_max_new_tokens=message.default_max_new_tokens,
        chat_frame=message.chat_frame,
        end_ids=tuple(message.end_ids),
        pad_id=message.pad_id,
        stages=tuple(_stage_info(stage) for stage in message.stages),
        description=message.description,
    )


def _stage_info(message: generation_pb2.StageInfo) -> results.StageInfo:
    return results.StageInfo(
        stage=message.stage,
        target=message.target,
        serving=message.serving,
        space=message.space,
        limits=limits(message.limits),
        server=server_info(message.server),
    )


def settings(kind: type[T], message: Message) -> T:
    """The set fields of a Sampler or a Sampling."""
    found: dict[str, Any] = {}
    for name, field in fields_of(kind).items():
        value = getattr(message, name)
        if field.choices is not None:
            found[name] = next((text for text, number in field.choices.items() if number == value), None)
        elif message.HasField(name):
            found[name] = shortest(value) if field.kind is float else value
    return kind(**found)
