"""Fields of a request on the server's side: what a message sets of them, and their bounds.

The table of fields is the client's (`colaserve_client/settings.py`). The edges check a request before any work is done
for it, the engines where they compute.
"""

from collections.abc import Mapping
from typing import Any, Final, cast

from colaserve.v1 import types_pb2
from colaserve_client.fields import Field, Range, fields_of, names_of
from colaserve_client.results import FinishReason
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling, Scoring, Steering
from colaserve_services.errors import InvalidRequest

Fields = Mapping[str, Field]

SAMPLER: Final[Fields] = fields_of(Sampler)
SAMPLING: Final[Fields] = fields_of(Sampling)
SCORING: Final[Fields] = fields_of(Scoring)
INTEGRATION: Final[Fields] = {name: SCORING[name] for name in ("probes", "steps", "solver")}  # the prior's part
STEERING: Final[Fields] = fields_of(Steering)
MAX_NEW_TOKENS: Final = fields_of(GenerationRequest)["max_new_tokens"]
TOP_LOGPROBS: Final = fields_of(GenerationRequest)["top_logprobs"]
PREVIEW_EVERY: Final = fields_of(GenerationRequest)["preview_every"]
SAMPLE_ID: Final = fields_of(NoiseSeed)["sample_id"]
COUNTS: Final[Fields] = {  # of requests, no settings
    "InterpolateRequest.points": Field("Points, both ends included.", Range(2, 256), kind=int),
    "SampleLatentsRequest.max_blocks": Field(
        "Blocks to write, a partial last block of the prefix counted.", Range(1, 2**32 - 1), kind=int
    ),
    "InfillSegment.token_count": Field("A hole of this many tokens.", Range(1, 2**32 - 1), kind=int),
}
LATENT: Final = Range(-10_000, 10_000)  # of latents and noise: beyond, the networks' own numbers overflow
FINISH_REASONS: Final = cast(Mapping[int, FinishReason], names_of(types_pb2.FinishReason.DESCRIPTOR))
SEED_END: Final = 2**63  # of the noise of each block; they stay below


def check(field: Field | Range, name: str, value: Any) -> None:
    """Raise InvalidRequest naming the field of a value that it cannot have."""
    if fault := field.fault(value):
        raise InvalidRequest(name, fault)


def check_all(table: Fields, path: str, values: Mapping[str, Any]) -> None:
    """Raise InvalidRequest naming the first field of a Sampler or a Sampling that has a value it cannot have."""
    for name, field in table.items():
        if values[name] is not None:
            check(field, f"{path}{name}", values[name])
    start, end = values.get("guidance_start", 1.0), values.get("guidance_end", 0.0)
    if end > start:
        raise InvalidRequest(f"{path}guidance_end", f"got {end:g}, expected at most guidance_start ({start:g})")
    steps, distance = values.get("stable_steps"), values.get("stable_distance")
    if steps and distance is None:
        raise InvalidRequest(f"{path}stable_distance", f"is not set, expected one with stable_steps ({steps})")
    if distance is not None and not steps:
        raise InvalidRequest(f"{path}stable_distance", f"got {distance:g}, expected none without stable_steps")


def defaults(table: Fields) -> dict[str, Any]:
    """What unset fields mean where nobody says otherwise."""
    return {name: field.default for name, field in table.items()}


def given(message: Any, table: Fields, path: str) -> dict[str, Any]:
    """The fields that a message sets, enums by their texts. InvalidRequest for a number that stands for none."""
    found = dict[str, Any]()
    for name, field in table.items():
        value = getattr(message, name)
        if field.multiple:
            found[name] = value
        elif field.choices is None:
            if message.HasField(name):
                found[name] = value
        elif value:
            texts = [text for text, number in field.choices.items() if number == value]
            if not texts:
                raise InvalidRequest(f"{path}{name}", f"got {value}, expected one of {', '.join(field.choices)}")
            found[name] = texts[0]
    return found


def sampler_values(message: types_pb2.Sampler, unset: Mapping[str, Any]) -> dict[str, Any]:
    """All of a Sampler, unset fields from `unset`, whose stable_distance is not for a message without stable_steps."""
    values = {**unset, **given(message, SAMPLER, "sampler.")}
    if not values["stable_steps"] and not message.HasField("stable_distance"):
        values["stable_distance"] = None
    return values


def wire(table: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as fields of a message take them; None leaves a field unset."""
    texts = {name: field.choices for name, field in table.items() if field.choices is not None}
    given = {name: values[name] for name in table if values[name] is not None}
    return {name: texts[name][value] if name in texts else value for name, value in given.items()}


def block_seed(base_seed: int, sample_id: int, block: int) -> int:
    """Seed of the CPU generator of one block's noise: base_seed + 1_000 sample_id + 10_000_000 block."""
    return base_seed + 1_000 * sample_id + 10_000_000 * block
