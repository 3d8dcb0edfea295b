from colaserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "max_new_tokens", "sampler", "sampling", "seed", "stop", "ignore_end", "with_latents", "top_logprobs", "prompt_ids", "print_special", "cache_salt", "preview_every", "with_probes", "choices")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_END_FIELD_NUMBER: _ClassVar[int]
    WITH_LATENTS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    PRINT_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    WITH_PROBES_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    max_new_tokens: int
    sampler: _types_pb2.Sampler
    sampling: _types_pb2.Sampling
    seed: _types_pb2.NoiseSeed
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_end: bool
    with_latents: bool
    top_logprobs: int
    prompt_ids: _types_pb2.TokenIds
    print_special: bool
    cache_salt: str
    preview_every: int
    with_probes: bool
    choices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prompt: _Optional[str] = ..., max_new_tokens: _Optional[int] = ..., sampler: _Optional[_Union[_types_pb2.Sampler, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_end: bool = ..., with_latents: bool = ..., top_logprobs: _Optional[int] = ..., prompt_ids: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ..., print_special: bool = ..., cache_salt: _Optional[str] = ..., preview_every: _Optional[int] = ..., with_probes: bool = ..., choices: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "top_logprobs", "latents", "finish_reason", "usage", "timing", "seed", "tokens", "text_offsets", "stop_string", "preview", "probes", "choices")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TopLogprobs]
    latents: _types_pb2.Latents
    finish_reason: _types_pb2.FinishReason
    usage: _types_pb2.Usage
    timing: _types_pb2.Timing
    seed: _types_pb2.NoiseSeed
    tokens: _containers.RepeatedScalarFieldContainer[str]
    text_offsets: _containers.RepeatedScalarFieldContainer[int]
    stop_string: str
    preview: Preview
    probes: _types_pb2.Probes
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceScore]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[_types_pb2.TopLogprobs, _Mapping]]] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., tokens: _Optional[_Iterable[str]] = ..., text_offsets: _Optional[_Iterable[int]] = ..., stop_string: _Optional[str] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ..., probes: _Optional[_Union[_types_pb2.Probes, _Mapping]] = ..., choices: _Optional[_Iterable[_Union[ChoiceScore, _Mapping]]] = ...) -> None: ...

class ChoiceScore(_message.Message):
    __slots__ = ("text", "token_count", "logprob")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_count: int
    logprob: float
    def __init__(self, text: _Optional[str] = ..., token_count: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("block_index", "step", "latents", "text")
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    block_index: int
    step: int
    latents: _types_pb2.Latents
    text: str
    def __init__(self, block_index: _Optional[int] = ..., step: _Optional[int] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., text: _Optional[str] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids", "tokens")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerationServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GenerationServiceGetInfoResponse(_message.Message):
    __slots__ = ("model_name", "model", "space", "limits", "server", "default_sampler", "default_sampling", "default_max_new_tokens", "chat_frame", "end_ids", "pad_id", "stages", "description")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLER_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FRAME_FIELD_NUMBER: _ClassVar[int]
    END_IDS_FIELD_NUMBER: _ClassVar[int]
    PAD_ID_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model: _types_pb2.ModelShape
    space: str
    limits: _types_pb2.Limits
    server: _types_pb2.ServerInfo
    default_sampler: _types_pb2.Sampler
    default_sampling: _types_pb2.Sampling
    default_max_new_tokens: int
    chat_frame: str
    end_ids: _containers.RepeatedScalarFieldContainer[int]
    pad_id: int
    stages: _containers.RepeatedCompositeFieldContainer[StageInfo]
    description: str
    def __init__(self, model_name: _Optional[str] = ..., model: _Optional[_Union[_types_pb2.ModelShape, _Mapping]] = ..., space: _Optional[str] = ..., limits: _Optional[_Union[_types_pb2.Limits, _Mapping]] = ..., server: _Optional[_Union[_types_pb2.ServerInfo, _Mapping]] = ..., default_sampler: _Optional[_Union[_types_pb2.Sampler, _Mapping]] = ..., default_sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ..., default_max_new_tokens: _Optional[int] = ..., chat_frame: _Optional[str] = ..., end_ids: _Optional[_Iterable[int]] = ..., pad_id: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[StageInfo, _Mapping]]] = ..., description: _Optional[str] = ...) -> None: ...

class StageInfo(_message.Message):
    __slots__ = ("stage", "target", "serving", "server", "limits", "space")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    stage: str
    target: str
    serving: bool
    server: _types_pb2.ServerInfo
    limits: _types_pb2.Limits
    space: str
    def __init__(self, stage: _Optional[str] = ..., target: _Optional[str] = ..., serving: bool = ..., server: _Optional[_Union[_types_pb2.ServerInfo, _Mapping]] = ..., limits: _Optional[_Union[_types_pb2.Limits, _Mapping]] = ..., space: _Optional[str] = ...) -> None: ...
