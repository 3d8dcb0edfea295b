"""What a stage's answer must be. One that is not is the stage's fault: the call goes on elsewhere, the caller sees
nothing of it."""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from colaserve.v1 import decoder_pb2, encoder_pb2, prior_pb2, types_pb2
from colaserve_services.bounds import LATENT
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.stages import Model
from colaserve_services.errors import Unavailable
from colaserve_services.rpc import arrays

KINDS: Final = ("not_finite", "shape", "ids", "count", "timing", "space", "model", "refused")
_CLOCK_SLACK: Final = 60.0  # seconds that a stage's times may exceed the age of their call
_FLOAT32: Final = types_pb2.DATA_TYPE_FLOAT32
_LARGEST: Final = float(np.finfo(np.float32).max)
_DTYPES: Final = {"float32": _FLOAT32, "float16": types_pb2.DATA_TYPE_FLOAT16}


class StageFault(Unavailable):
    """A stage answered with something else than it was asked for; `kind` is one of KINDS."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def encodings(
    response: encoder_pb2.EncodeResponse,
    sequences: Sequence[Sequence[int]],
    with_variance: bool,
    model: Model,
    call: Call,
) -> None:
    """Raise StageFault unless this is one encoding for each sequence."""
    if len(response.encodings) != len(sequences):
        raise StageFault("count", f"it sent {len(response.encodings)} encodings, expected {len(sequences)}")
    for encoding, ids in zip(response.encodings, sequences, strict=True):
        count = model.positions(len(ids))
        _latents(encoding.latents, count, model)
        if encoding.HasField("log_variance") != with_variance:
            raise StageFault("shape", f"log_variance: expected {'one' if with_variance else 'none'}")
        if with_variance:
            _tensor(encoding.log_variance, count, model, _LARGEST)
    _timing(response.timing, call)


def block(response: prior_pb2.SampleResponse, index: int, model: Model, call: Call) -> None:
    """Raise StageFault unless this is the block of that index."""
    if response.block_index != index:
        raise StageFault("count", f"it sent block {response.block_index}, expected {index}")
    _latents(response.latents, model.block_size, model)
    _probes(response.probes)
    _timing(response.timing, call)


def decoded(
    response: decoder_pb2.DecodeResponse, index: int, top_logprobs: int, targets: int, model: Model, call: Call
) -> None:
    """Raise StageFault unless this answers the block of that index, with so many of what was asked for."""
    size = model.block_tokens
    if response.HasField("block_index") and response.block_index != index:
        raise StageFault("count", f"it answered block {response.block_index}, expected {index}")
    _probes(response.probes)
    _count("token_ids", response.token_ids, size)
    _count("logprobs", response.logprobs, size)
    _count("top_logprobs", response.top_logprobs, size if top_logprobs else 0)
    _count("target_logprobs", response.target_logprobs, targets)
    _ids(response.token_ids, model)
    _finite("logprobs", response.logprobs)
    _finite("target_logprobs", response.target_logprobs)
    for top in response.top_logprobs:
        _count("top_logprobs.token_ids", top.token_ids, min(top_logprobs, model.vocab_size))
        _count("top_logprobs.logprobs", top.logprobs, len(top.token_ids))
        _ids(top.token_ids, model)
        _finite("top_logprobs", top.logprobs)
    _timing(response.timing, call)


def position_logprobs(found: types_pb2.Tensor, asked: decoder_pb2.OpenDecode, model: Model) -> None:
    """Raise StageFault unless these are the log-probabilities that were asked for."""
    columns, element = looked_up(asked, model), arrays.logprobs_element(asked.logprobs_dtype, "logprobs_dtype")
    shape = [model.block_tokens, columns] if columns else []
    expected = element.itemsize * model.block_tokens * columns
    if list(found.shape) != shape or len(found.data) != expected or (columns and found.dtype != _DTYPES[element.name]):
        raise StageFault("shape", f"it sent log-probabilities of shape {list(found.shape)[:8]}, expected {shape}")
    if not np.isfinite(np.frombuffer(found.data, element)).all():
        raise StageFault("not_finite", "it sent position_logprobs that are not finite")


def looked_up(asked: decoder_pb2.OpenDecode, model: Model) -> int:
    """Ids whose log-probability is wanted at every position."""
    return model.vocab_size if asked.all_logprobs else len(asked.logprob_ids)


def scored(response: prior_pb2.PriorServiceScoreResponse, blocks: int, call: Call) -> None:
    """Raise StageFault unless these are the densities of so many blocks."""
    _count("log_densities", response.log_densities, blocks)
    _count("standard_errors", response.standard_errors, blocks)
    _finite("log densities", [*response.log_densities, *response.standard_errors])
    _timing(response.timing, call)


def _latents(latents: types_pb2.Latents, count: int, model: Model) -> None:
    if latents.space and model.space and latents.space != model.space:
        raise StageFault("space", f"it sent latents of space {latents.space[:64]!r}, expected {model.space}")
    _tensor(latents.values, count, model)


def _tensor(values: types_pb2.Tensor, count: int, model: Model, most: float = LATENT.most) -> None:
    """float32 of shape (count, d). A stage that cannot keep latents within bounds ends their run itself."""
    shape = [count, model.latent_dim]
    whole = len(values.data) == 4 * count * model.latent_dim
    if values.dtype != _FLOAT32 or list(values.shape) != shape or not whole:
        raise StageFault("shape", f"it sent values of shape {list(values.shape)[:8]}, expected float32 {shape}")
    if not (np.abs(np.frombuffer(values.data, "<f4")) <= most).all():  # false for NaN too
        raise StageFault("not_finite", f"it sent values that are not finite, or beyond {LATENT.most}")


def _count(name: str, found: Sequence[object], expected: int) -> None:
    if len(found) != expected:
        raise StageFault("count", f"it sent {len(found)} {name}, expected {expected}")


def _ids(ids: Iterable[int], model: Model) -> None:
    if max(ids, default=0) >= model.vocab_size:
        raise StageFault("ids", f"it sent an id outside the vocabulary of {model.vocab_size}")


def _finite(name: str, numbers: Iterable[float]) -> None:
    if not all(map(math.isfinite, numbers)):
        raise StageFault("not_finite", f"it sent {name} that are not finite")


def _probes(probes: types_pb2.Probes) -> None:
    _finite("probes", [value for _, value in probes.ListFields()])


def _timing(timing: types_pb2.Timing, call: Call) -> None:
    if timing.queue_us + timing.compute_us > (call.age() + _CLOCK_SLACK) * 1e6:
        raise StageFault("timing", f"it sent {timing.queue_us} + {timing.compute_us} us, more than the call has lasted")
