from colaserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EncodeRequest(_message.Message):
    __slots__ = ("sequences", "with_variance", "cache_salt")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WITH_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenIds]
    with_variance: bool
    cache_salt: str
    def __init__(self, sequences: _Optional[_Iterable[_Union[_types_pb2.TokenIds, _Mapping]]] = ..., with_variance: bool = ..., cache_salt: _Optional[str] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("encodings", "timing")
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    encodings: _containers.RepeatedCompositeFieldContainer[Encoding]
    timing: _types_pb2.Timing
    def __init__(self, encodings: _Optional[_Iterable[_Union[Encoding, _Mapping]]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ...) -> None: ...

class Encoding(_message.Message):
    __slots__ = ("latents", "log_variance")
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    LOG_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    latents: _types_pb2.Latents
    log_variance: _types_pb2.Tensor
    def __init__(self, latents: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., log_variance: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class EncoderServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EncoderServiceGetInfoResponse(_message.Message):
    __slots__ = ("model", "space", "limits", "server", "has_variance", "weights", "scaling_factor")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    HAS_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SCALING_FACTOR_FIELD_NUMBER: _ClassVar[int]
    model: _types_pb2.ModelShape
    space: str
    limits: _types_pb2.Limits
    server: _types_pb2.ServerInfo
    has_variance: bool
    weights: str
    scaling_factor: float
    def __init__(self, model: _Optional[_Union[_types_pb2.ModelShape, _Mapping]] = ..., space: _Optional[str] = ..., limits: _Optional[_Union[_types_pb2.Limits, _Mapping]] = ..., server: _Optional[_Union[_types_pb2.ServerInfo, _Mapping]] = ..., has_variance: bool = ..., weights: _Optional[str] = ..., scaling_factor: _Optional[float] = ...) -> None: ...
