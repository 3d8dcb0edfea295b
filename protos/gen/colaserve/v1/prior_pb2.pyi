from colaserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SampleRequest(_message.Message):
    __slots__ = ("canvas", "max_blocks", "first_block", "sampler", "seed", "noise", "cache_salt", "preview_every", "with_probes")
    CANVAS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    WITH_PROBES_FIELD_NUMBER: _ClassVar[int]
    canvas: _types_pb2.Canvas
    max_blocks: int
    first_block: int
    sampler: _types_pb2.Sampler
    seed: _types_pb2.NoiseSeed
    noise: _types_pb2.Tensor
    cache_salt: str
    preview_every: int
    with_probes: bool
    def __init__(self, canvas: _Optional[_Union[_types_pb2.Canvas, _Mapping]] = ..., max_blocks: _Optional[int] = ..., first_block: _Optional[int] = ..., sampler: _Optional[_Union[_types_pb2.Sampler, _Mapping]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., noise: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., cache_salt: _Optional[str] = ..., preview_every: _Optional[int] = ..., with_probes: bool = ...) -> None: ...

class SampleResponse(_message.Message):
    __slots__ = ("block_index", "latents", "timing", "provisional", "step", "probes", "steps_saved")
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    STEPS_SAVED_FIELD_NUMBER: _ClassVar[int]
    block_index: int
    latents: _types_pb2.Latents
    timing: _types_pb2.Timing
    provisional: bool
    step: int
    probes: _types_pb2.Probes
    steps_saved: int
    def __init__(self, block_index: _Optional[int] = ..., latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., provisional: bool = ..., step: _Optional[int] = ..., probes: _Optional[_Union[_types_pb2.Probes, _Mapping]] = ..., steps_saved: _Optional[int] = ...) -> None: ...

class PriorServiceScoreRequest(_message.Message):
    __slots__ = ("canvas", "probes", "steps", "solver", "seed", "cache_salt")
    CANVAS_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    canvas: _types_pb2.Canvas
    probes: int
    steps: int
    solver: _types_pb2.Solver
    seed: _types_pb2.NoiseSeed
    cache_salt: str
    def __init__(self, canvas: _Optional[_Union[_types_pb2.Canvas, _Mapping]] = ..., probes: _Optional[int] = ..., steps: _Optional[int] = ..., solver: _Optional[_Union[_types_pb2.Solver, str]] = ..., seed: _Optional[_Union[_types_pb2.NoiseSeed, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class PriorServiceScoreResponse(_message.Message):
    __slots__ = ("log_densities", "standard_errors", "evaluations", "timing")
    LOG_DENSITIES_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERRORS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    log_densities: _containers.RepeatedScalarFieldContainer[float]
    standard_errors: _containers.RepeatedScalarFieldContainer[float]
    evaluations: int
    timing: _types_pb2.Timing
    def __init__(self, log_densities: _Optional[_Iterable[float]] = ..., standard_errors: _Optional[_Iterable[float]] = ..., evaluations: _Optional[int] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ...) -> None: ...

class PriorServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PriorServiceGetInfoResponse(_message.Message):
    __slots__ = ("model", "space", "limits", "server", "weights")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    model: _types_pb2.ModelShape
    space: str
    limits: _types_pb2.Limits
    server: _types_pb2.ServerInfo
    weights: str
    def __init__(self, model: _Optional[_Union[_types_pb2.ModelShape, _Mapping]] = ..., space: _Optional[str] = ..., limits: _Optional[_Union[_types_pb2.Limits, _Mapping]] = ..., server: _Optional[_Union[_types_pb2.ServerInfo, _Mapping]] = ..., weights: _Optional[str] = ...) -> None: ...
