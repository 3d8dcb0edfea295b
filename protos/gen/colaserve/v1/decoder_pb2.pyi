from colaserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeRequest(_message.Message):
    __slots__ = ("open", "block", "preview")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    open: OpenDecode
    block: _types_pb2.Latents
    preview: _types_pb2.Latents
    def __init__(self, open: _Optional[_Union[OpenDecode, _Mapping]] = ..., block: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., preview: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ...) -> None: ...

class OpenDecode(_message.Message):
    __slots__ = ("prefix", "sampling", "history_ids", "with_logits", "top_logprobs", "target_ids", "max_latents", "cache_salt", "with_probes", "logprob_ids", "all_logprobs", "logprobs_dtype")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    HISTORY_IDS_FIELD_NUMBER: _ClassVar[int]
    WITH_LOGITS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_LATENTS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    WITH_PROBES_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_IDS_FIELD_NUMBER: _ClassVar[int]
    ALL_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_DTYPE_FIELD_NUMBER: _ClassVar[int]
    prefix: _types_pb2.Latents
    sampling: _types_pb2.Sampling
    history_ids: _containers.RepeatedScalarFieldContainer[int]
    with_logits: bool
    top_logprobs: int
    target_ids: _containers.RepeatedScalarFieldContainer[int]
    max_latents: int
    cache_salt: str
    with_probes: bool
    logprob_ids: _containers.RepeatedScalarFieldContainer[int]
    all_logprobs: bool
    logprobs_dtype: _types_pb2.DataType
    def __init__(self, prefix: _Optional[_Union[_types_pb2.Latents, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ..., history_ids: _Optional[_Iterable[int]] = ..., with_logits: bool = ..., top_logprobs: _Optional[int] = ..., target_ids: _Optional[_Iterable[int]] = ..., max_latents: _Optional[int] = ..., cache_salt: _Optional[str] = ..., with_probes: bool = ..., logprob_ids: _Optional[_Iterable[int]] = ..., all_logprobs: bool = ..., logprobs_dtype: _Optional[_Union[_types_pb2.DataType, str]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("token_ids", "logprobs", "top_logprobs", "logits", "target_logprobs", "timing", "block_index", "provisional", "probes", "position_logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    TARGET_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    POSITION_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TopLogprobs]
    logits: _types_pb2.Tensor
    target_logprobs: _containers.RepeatedScalarFieldContainer[float]
    timing: _types_pb2.Timing
    block_index: int
    provisional: bool
    probes: _types_pb2.Probes
    position_logprobs: _types_pb2.Tensor
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[_types_pb2.TopLogprobs, _Mapping]]] = ..., logits: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., target_logprobs: _Optional[_Iterable[float]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., block_index: _Optional[int] = ..., provisional: bool = ..., probes: _Optional[_Union[_types_pb2.Probes, _Mapping]] = ..., position_logprobs: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class DecoderServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecoderServiceGetInfoResponse(_message.Message):
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
