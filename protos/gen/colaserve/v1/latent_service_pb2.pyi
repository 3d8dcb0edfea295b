from colaserve.v1 import generation_pb2 as _generation_pb2
from colaserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Interpolation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INTERPOLATION_UNSPECIFIED: _ClassVar[Interpolation]
    INTERPOLATION_LERP: _ClassVar[Interpolation]
    INTERPOLATION_SLERP: _ClassVar[Interpolation]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_UNSPECIFIED: _ClassVar[Pooling]
    POOLING_MEAN: _ClassVar[Pooling]
    POOLING_LAST_BLOCK: _ClassVar[Pooling]
    POOLING_PER_BLOCK: _ClassVar[Pooling]
INTERPOLATION_UNSPECIFIED: Interpolation
INTERPOLATION_LERP: Interpolation
INTERPOLATION_SLERP: Interpolation
POOLING_UNSPECIFIED: Pooling
POOLING_MEAN: Pooling
POOLING_LAST_BLOCK: Pooling
POOLING_PER_BLOCK: Pooling

class EncodeTextRequest(_message.Message):
    __slots__ = ("texts", "with_variance")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    WITH_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    with_variance: bool
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., with_variance: bool = ...) -> None: ...

class EncodeTextResponse(_message.Message):
    __slots__ = ("encodings", "timing")
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    encodings: _containers.RepeatedCompositeFieldContainer[TextEncoding]
    timing: _types_pb2.Timing
    def __init__(self, encodings: _Optional[_Iterable[_Union[TextEncoding, _Mapping]]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ...) -> None: ...

class TextEncoding(_message.Message):
    __slots__ = ("latents", "log_variance", "token_ids", "tokens")
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    LOG_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    latents: _types_pb2.Latents
    log_variance: _types_pb2.Tensor
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., log_variance: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class DecodeLatentsRequest(_message.Message):
    __slots__ = ("latents", "sampling", "top_logprobs", "target_ids", "token_count")
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    latents: _types_pb2.Latents
    sampling: _types_pb2.Sampling
    top_logprobs: int
    target_ids: _containers.RepeatedScalarFieldContainer[int]
    token_count: int
    def __init__(self, latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ..., top_logprobs: _Optional[int] = ..., target_ids: _Optional[_Iterable[int]] = ..., token_count: _Optional[int] = ...) -> None: ...

class DecodeLatentsResponse(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "top_logprobs", "target_logprobs", "timing", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TARGET_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TopLogprobs]
    target_logprobs: _containers.RepeatedScalarFieldContainer[float]
    timing: _types_pb2.Timing
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[_types_pb2.TopLogprobs, _Mapping]]] = ..., target_logprobs: _Optional[_Iterable[float]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class SampleLatentsRequest(_message.Message):
    __slots__ = ("prefix", "max_blocks", "sampler", "seed", "cache_salt", "preview_every", "with_probes")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    WITH_PROBES_FIELD_NUMBER: _ClassVar[int]
    prefix: _types_pb2.Latents
    max_blocks: int
    sampler: _types_pb2.Sampler
    seed: _types_pb2.NoiseSeed
    cache_salt: str
    preview_every: int
    with_probes: bool
    def __init__(self, prefix: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., max_blocks: _Optional[int] = ..., sampler: _Optional[_Union[_types_pb2.Sampler, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., cache_salt: _Optional[str] = ..., preview_every: _Optional[int] = ..., with_probes: bool = ...) -> None: ...

class SampleLatentsResponse(_message.Message):
    __slots__ = ("block_index", "latents", "timing", "seed", "provisional", "step", "probes", "steps_saved")
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    STEPS_SAVED_FIELD_NUMBER: _ClassVar[int]
    block_index: int
    latents: _types_pb2.Latents
    timing: _types_pb2.Timing
    seed: _types_pb2.NoiseSeed
    provisional: bool
    step: int
    probes: _types_pb2.Probes
    steps_saved: int
    def __init__(self, block_index: _Optional[int] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., provisional: bool = ..., step: _Optional[int] = ..., probes: _Optional[_Union[_types_pb2.Probes, _Mapping]] = ..., steps_saved: _Optional[int] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("text", "latents")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    text: str
    latents: _types_pb2.Latents
    def __init__(self, text: _Optional[str] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ...) -> None: ...

class InterpolateRequest(_message.Message):
    __slots__ = ("start", "end", "points", "interpolation", "sampling")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    start: Endpoint
    end: Endpoint
    points: int
    interpolation: Interpolation
    sampling: _types_pb2.Sampling
    def __init__(self, start: _Optional[_Union[Endpoint, _Mapping]] = ..., end: _Optional[_Union[Endpoint, _Mapping]] = ..., points: _Optional[int] = ..., interpolation: _Optional[_Union[Interpolation, str]] = ..., sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ...) -> None: ...

class InterpolateResponse(_message.Message):
    __slots__ = ("points", "timing")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[InterpolationPoint]
    timing: _types_pb2.Timing
    def __init__(self, points: _Optional[_Iterable[_Union[InterpolationPoint, _Mapping]]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ...) -> None: ...

class InterpolationPoint(_message.Message):
    __slots__ = ("weight", "latents", "text", "token_ids", "tokens")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    weight: float
    latents: _types_pb2.Latents
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, weight: _Optional[float] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class InfillSegment(_message.Message):
    __slots__ = ("text", "token_count")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_count: int
    def __init__(self, text: _Optional[str] = ..., token_count: _Optional[int] = ...) -> None: ...

class InfillRequest(_message.Message):
    __slots__ = ("segments", "sampler", "sampling", "seed", "cache_salt")
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[InfillSegment]
    sampler: _types_pb2.Sampler
    sampling: _types_pb2.Sampling
    seed: _types_pb2.NoiseSeed
    cache_salt: str
    def __init__(self, segments: _Optional[_Iterable[_Union[InfillSegment, _Mapping]]] = ..., sampler: _Optional[_Union[_types_pb2.Sampler, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class InfillResponse(_message.Message):
    __slots__ = ("text", "segments", "token_ids", "usage", "seed", "timing", "finish_reasons", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    segments: _containers.RepeatedScalarFieldContainer[str]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    usage: _types_pb2.Usage
    seed: _types_pb2.NoiseSeed
    timing: _types_pb2.Timing
    finish_reasons: _containers.RepeatedScalarFieldContainer[_types_pb2.FinishReason]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, text: _Optional[str] = ..., segments: _Optional[_Iterable[str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., finish_reasons: _Optional[_Iterable[_Union[_types_pb2.FinishReason, str]]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class ReconstructRequest(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class ReconstructResponse(_message.Message):
    __slots__ = ("reconstructions", "timing")
    RECONSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    reconstructions: _containers.RepeatedCompositeFieldContainer[Reconstruction]
    timing: _types_pb2.Timing
    def __init__(self, reconstructions: _Optional[_Iterable[_Union[Reconstruction, _Mapping]]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ...) -> None: ...

class Reconstruction(_message.Message):
    __slots__ = ("text", "token_ids", "original_ids", "token_accuracy", "bits_per_token", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    original_ids: _containers.RepeatedScalarFieldContainer[int]
    token_accuracy: float
    bits_per_token: float
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., original_ids: _Optional[_Iterable[int]] = ..., token_accuracy: _Optional[float] = ..., bits_per_token: _Optional[float] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class LogprobsRequest(_message.Message):
    __slots__ = ("text", "ids", "top_logprobs", "cache_salt", "latents", "logprob_ids", "all_logprobs", "logprobs_dtype")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_IDS_FIELD_NUMBER: _ClassVar[int]
    ALL_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_DTYPE_FIELD_NUMBER: _ClassVar[int]
    text: str
    ids: _types_pb2.TokenIds
    top_logprobs: int
    cache_salt: str
    latents: _types_pb2.Latents
    logprob_ids: _containers.RepeatedScalarFieldContainer[int]
    all_logprobs: bool
    logprobs_dtype: _types_pb2.DataType
    def __init__(self, text: _Optional[str] = ..., ids: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ..., top_logprobs: _Optional[int] = ..., cache_salt: _Optional[str] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., logprob_ids: _Optional[_Iterable[int]] = ..., all_logprobs: bool = ..., logprobs_dtype: _Optional[_Union[_types_pb2.DataType, str]] = ...) -> None: ...

class LogprobsResponse(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "top_logprobs", "tokens", "text_offsets", "timing", "position_logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    POSITION_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TopLogprobs]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    text_offsets: _containers.RepeatedScalarFieldContainer[int]
    timing: _types_pb2.Timing
    position_logprobs: _types_pb2.Tensor
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[_types_pb2.TopLogprobs, _Mapping]]] = ..., tokens: _Optional[_Iterable[str]] = ..., text_offsets: _Optional[_Iterable[int]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., position_logprobs: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("text", "ids", "latents", "branches", "sampler", "sampling", "seed", "max_new_tokens", "stop", "ignore_end", "print_special", "top_logprobs", "cache_salt", "preview_every", "with_probes")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_END_FIELD_NUMBER: _ClassVar[int]
    PRINT_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    WITH_PROBES_FIELD_NUMBER: _ClassVar[int]
    text: str
    ids: _types_pb2.TokenIds
    latents: _types_pb2.Latents
    branches: _containers.RepeatedCompositeFieldContainer[ForkBranch]
    sampler: _types_pb2.Sampler
    sampling: _types_pb2.Sampling
    seed: _types_pb2.NoiseSeed
    max_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_end: bool
    print_special: bool
    top_logprobs: int
    cache_salt: str
    preview_every: int
    with_probes: bool
    def __init__(self, text: _Optional[str] = ..., ids: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., branches: _Optional[_Iterable[_Union[ForkBranch, _Mapping]]] = ..., sampler: _Optional[_Union[_types_pb2.Sampler, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_end: bool = ..., print_special: bool = ..., top_logprobs: _Optional[int] = ..., cache_salt: _Optional[str] = ..., preview_every: _Optional[int] = ..., with_probes: bool = ...) -> None: ...

class ForkBranch(_message.Message):
    __slots__ = ("seed", "noise", "sampler", "sampling", "max_new_tokens", "stop", "written")
    SEED_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    seed: _types_pb2.NoiseSeed
    noise: _types_pb2.Tensor
    sampler: _types_pb2.Sampler
    sampling: _types_pb2.Sampling
    max_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    written: _types_pb2.Latents
    def __init__(self, seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., noise: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., sampler: _Optional[_Union[_types_pb2.Sampler, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., written: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ...) -> None: ...

class ForkResponse(_message.Message):
    __slots__ = ("branch", "block_index", "latents", "text", "token_ids", "tokens", "text_offsets", "logprobs", "top_logprobs", "finish_reason", "stop_string", "usage", "seed", "timing", "preview", "probes")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    branch: int
    block_index: int
    latents: _types_pb2.Latents
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    text_offsets: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TopLogprobs]
    finish_reason: _types_pb2.FinishReason
    stop_string: str
    usage: _types_pb2.Usage
    seed: _types_pb2.NoiseSeed
    timing: _types_pb2.Timing
    preview: _generation_pb2.Preview
    probes: _types_pb2.Probes
    def __init__(self, branch: _Optional[int] = ..., block_index: _Optional[int] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ..., text_offsets: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[_types_pb2.TopLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., stop_string: _Optional[str] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., preview: _Optional[_Union[_generation_pb2.Preview, _Mapping]] = ..., probes: _Optional[_Union[_types_pb2.Probes, _Mapping]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("texts", "sequences", "pooling", "normalize")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    sequences: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenIds]
    pooling: Pooling
    normalize: bool
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., sequences: _Optional[_Iterable[_Union[_types_pb2.TokenIds, _Mapping]]] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., normalize: bool = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("embeddings", "timing")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    embeddings: _containers.RepeatedCompositeFieldContainer[Embedding]
    timing: _types_pb2.Timing
    def __init__(self, embeddings: _Optional[_Iterable[_Union[Embedding, _Mapping]]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("values", "token_count", "space")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    values: _types_pb2.Tensor
    token_count: int
    space: str
    def __init__(self, values: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., token_count: _Optional[int] = ..., space: _Optional[str] = ...) -> None: ...

class LatentServiceScoreRequest(_message.Message):
    __slots__ = ("prefix", "text", "samples", "probes", "steps", "solver", "seed", "cache_salt")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    text: str
    samples: int
    probes: int
    steps: int
    solver: _types_pb2.Solver
    seed: _types_pb2.NoiseSeed
    cache_salt: str
    def __init__(self, prefix: _Optional[str] = ..., text: _Optional[str] = ..., samples: _Optional[int] = ..., probes: _Optional[int] = ..., steps: _Optional[int] = ..., solver: _Optional[_Union[_types_pb2.Solver, str]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class LatentServiceScoreResponse(_message.Message):
    __slots__ = ("log_likelihood", "standard_error", "decoder_term", "posterior_entropy", "prior_log_density", "token_ids", "positions", "evaluations", "seed", "timing")
    LOG_LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    DECODER_TERM_FIELD_NUMBER: _ClassVar[int]
    POSTERIOR_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    PRIOR_LOG_DENSITY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    log_likelihood: float
    standard_error: float
    decoder_term: float
    posterior_entropy: float
    prior_log_density: float
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    positions: int
    evaluations: int
    seed: _types_pb2.NoiseSeed
    timing: _types_pb2.Timing
    def __init__(self, log_likelihood: _Optional[float] = ..., standard_error: _Optional[float] = ..., decoder_term: _Optional[float] = ..., posterior_entropy: _Optional[float] = ..., prior_log_density: _Optional[float] = ..., token_ids: _Optional[_Iterable[int]] = ..., positions: _Optional[int] = ..., evaluations: _Optional[int] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ...) -> None: ...

class LatentServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LatentServiceGetInfoResponse(_message.Message):
    __slots__ = ("model", "space", "limits", "server")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    model: _types_pb2.ModelShape
    space: str
    limits: _types_pb2.Limits
    server: _types_pb2.ServerInfo
    def __init__(self, model: _Optional[_Union[_types_pb2.ModelShape, _Mapping]] = ..., space: _Optional[str] = ..., limits: _Optional[_Union[_types_pb2.Limits, _Mapping]] = ..., server: _Optional[_Union[_types_pb2.ServerInfo, _Mapping]] = ...) -> None: ...
