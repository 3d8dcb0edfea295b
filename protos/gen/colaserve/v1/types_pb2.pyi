from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]

class Solver(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOLVER_UNSPECIFIED: _ClassVar[Solver]
    SOLVER_EULER: _ClassVar[Solver]
    SOLVER_AB2: _ClassVar[Solver]
    SOLVER_HEUN: _ClassVar[Solver]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_FLOAT16: DataType
SOLVER_UNSPECIFIED: Solver
SOLVER_EULER: Solver
SOLVER_AB2: Solver
SOLVER_HEUN: Solver
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Latents(_message.Message):
    __slots__ = ("values", "space")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    values: Tensor
    space: str
    def __init__(self, values: _Optional[_Union[Tensor, _Mapping]] = ..., space: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "compute_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    compute_us: int
    def __init__(self, queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "blocks", "wasted_blocks", "steps_saved")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WASTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEPS_SAVED_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    blocks: int
    wasted_blocks: int
    steps_saved: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., blocks: _Optional[int] = ..., wasted_blocks: _Optional[int] = ..., steps_saved: _Optional[int] = ...) -> None: ...

class Canvas(_message.Message):
    __slots__ = ("latents", "open")
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    latents: Latents
    open: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, latents: _Optional[_Union[Latents, _Mapping]] = ..., open: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class NoiseSeed(_message.Message):
    __slots__ = ("base_seed", "sample_id")
    BASE_SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    base_seed: int
    sample_id: int
    def __init__(self, base_seed: _Optional[int] = ..., sample_id: _Optional[int] = ...) -> None: ...

class Sampler(_message.Message):
    __slots__ = ("steps", "guidance_scale", "solver", "guidance_start", "guidance_end", "resamples", "stable_steps", "stable_distance", "steering")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_START_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_END_FIELD_NUMBER: _ClassVar[int]
    RESAMPLES_FIELD_NUMBER: _ClassVar[int]
    STABLE_STEPS_FIELD_NUMBER: _ClassVar[int]
    STABLE_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    steps: int
    guidance_scale: float
    solver: Solver
    guidance_start: float
    guidance_end: float
    resamples: int
    stable_steps: int
    stable_distance: float
    steering: _containers.RepeatedCompositeFieldContainer[Steering]
    def __init__(self, steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., solver: _Optional[_Union[Solver, str]] = ..., guidance_start: _Optional[float] = ..., guidance_end: _Optional[float] = ..., resamples: _Optional[int] = ..., stable_steps: _Optional[int] = ..., stable_distance: _Optional[float] = ..., steering: _Optional[_Iterable[_Union[Steering, _Mapping]]] = ...) -> None: ...

class Steering(_message.Message):
    __slots__ = ("direction", "bias", "scale", "start", "end", "logistic")
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    LOGISTIC_FIELD_NUMBER: _ClassVar[int]
    direction: Tensor
    bias: Tensor
    scale: float
    start: float
    end: float
    logistic: bool
    def __init__(self, direction: _Optional[_Union[Tensor, _Mapping]] = ..., bias: _Optional[_Union[Tensor, _Mapping]] = ..., scale: _Optional[float] = ..., start: _Optional[float] = ..., end: _Optional[float] = ..., logistic: bool = ...) -> None: ...

class Probes(_message.Message):
    __slots__ = ("norm", "distance", "drift", "disagreement", "entropy", "end_probability")
    NORM_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    DISAGREEMENT_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    END_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    norm: float
    distance: float
    drift: float
    disagreement: float
    entropy: float
    end_probability: float
    def __init__(self, norm: _Optional[float] = ..., distance: _Optional[float] = ..., drift: _Optional[float] = ..., disagreement: _Optional[float] = ..., entropy: _Optional[float] = ..., end_probability: _Optional[float] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class TopLogprobs(_message.Message):
    __slots__ = ("token_ids", "logprobs", "tokens")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class ModelShape(_message.Message):
    __slots__ = ("latent_dim", "block_size", "vae_block_size", "patch_size", "vocab_size", "parameters")
    LATENT_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    VAE_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    PATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    latent_dim: int
    block_size: int
    vae_block_size: int
    patch_size: int
    vocab_size: int
    parameters: int
    def __init__(self, latent_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., vae_block_size: _Optional[int] = ..., patch_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., parameters: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_context", "max_message_bytes", "max_running", "max_waiting", "kv_bytes", "run_ahead", "kv_blocks")
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUN_AHEAD_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    max_context: int
    max_message_bytes: int
    max_running: int
    max_waiting: int
    kv_bytes: int
    run_ahead: int
    kv_blocks: int
    def __init__(self, max_context: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_running: _Optional[int] = ..., max_waiting: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., run_ahead: _Optional[int] = ..., kv_blocks: _Optional[int] = ...) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "device", "dtype", "running", "waiting", "kv_bytes_used", "uptime_seconds", "backend")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    version: str
    device: str
    dtype: str
    running: int
    waiting: int
    kv_bytes_used: int
    uptime_seconds: float
    backend: str
    def __init__(self, version: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_bytes_used: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., backend: _Optional[str] = ...) -> None: ...
