"""Parameters of a request of the Open Inference Protocol: settings of the one table, by their flat names."""

from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any, Final

from colaserve.v1 import types_pb2
from colaserve_client.fields import Field, fields_of, flat_fields
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling
from colaserve_services.bounds import COUNTS, SAMPLER, SAMPLING, Fields, wire
from colaserve_services.errors import InvalidRequest, require
from colaserve_services.inference import open_inference_pb2 as pb

WRITING: Final = ("max_new_tokens", "ignore_end", "print_special", "cache_salt")  # as GenerateRequest has them
_NOISE: Final = {name: field for name, field in flat_fields(NoiseSeed, Sampler).items() if not field.multiple}
_DRAWS: Final = flat_fields(Sampling)
_TEXT: Final = {name: fields_of(GenerationRequest)[name] for name in (*WRITING, "stop")}
_SPACE: Final = {"space": Field("Fingerprint of the latents' space; empty: not checked.")}

NONE: Final[Fields] = {}
GENERATE: Final[Fields] = {**_NOISE, **_DRAWS, **_TEXT}
DECODE: Final[Fields] = {**_DRAWS, **_SPACE}
SAMPLE: Final[Fields] = {
    **_NOISE,
    **_SPACE,
    "cache_salt": _TEXT["cache_salt"],
    "max_blocks": COUNTS["SampleLatentsRequest.max_blocks"],
}
IGNORED: Final = "triton_enable_empty_final_response"  # how Triton's clients ask for what every stream has here
_KINDS: Final[Mapping[type, tuple[type, ...]]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_WORDS: Final = {bool: "a bool", int: "an int64 or uint64", float: "a number", str: "a string"}


def read_parameters(request: pb.ModelInferRequest, table: Fields) -> dict[str, Any]:
    """The values by name. InvalidRequest names one that is unknown or has a value that it cannot have."""
    given = {}
    for name, parameter in request.parameters.items():
        field, choice = f"parameters.{name[:80]}", parameter.WhichOneof("parameter_choice")
        if name == IGNORED:
            continue
        known = table.get(name)
        if known is None:
            raise InvalidRequest(field, f"is unknown, expected {', '.join(table) or 'none'}")
        value = getattr(parameter, choice) if choice else None
        require(type(value) in _KINDS[known.kind], field, brief(value), _WORDS[known.kind])
        if fault := known.fault(value):
            raise InvalidRequest(field, fault)
        given[name] = value
    require("sample_id" not in given or "seed" in given, "parameters.sample_id", "it alone", "seed beside it")
    return given


def sampler(given: Mapping[str, Any]) -> types_pb2.Sampler:
    return types_pb2.Sampler(**_of(SAMPLER, given))


def sampling(given: Mapping[str, Any]) -> types_pb2.Sampling:
    return types_pb2.Sampling(**_of(SAMPLING, given))


def seed(given: Mapping[str, Any]) -> types_pb2.NoiseSeed | None:
    """None: to be drawn."""
    base_seed = given.get("seed")
    return None if base_seed is None else types_pb2.NoiseSeed(base_seed=base_seed, sample_id=given.get("sample_id", 0))


def _of(table: Fields, given: Mapping[str, Any]) -> dict[str, Any]:
    return wire(table, {name: given.get(field.flat) for name, field in table.items()})
