"""What unset fields of a request mean: what --defaults says, else the checkpoint, else the table of fields."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from colaserve.v1 import types_pb2
from colaserve_services.bounds import (
    MAX_NEW_TOKENS,
    SAMPLE_ID,
    SAMPLER,
    SAMPLING,
    SEED_END,
    block_seed,
    check,
    check_all,
    defaults,
    given,
    sampler_values,
    wire,
)
from colaserve_services.errors import InvalidRequest, UsageError
from colaserve_services.rpc import steering

_SEED_BITS: Final = 48  # of a drawn base_seed: room below 2^63 for every sample and block, exact in a JSON number


@dataclass(frozen=True)
class Defaults:
    """Values of unset fields; units and ranges as in types.proto."""

    sampler: Mapping[str, Any]
    sampling: Mapping[str, Any]
    max_new_tokens: int
    chat_frame: str = ""

    @classmethod
    def of(cls, chat_frame: str | None = None, **values: Any) -> "Defaults":
        """Of values by the fields' names; the table's own for the others. Raises UsageError for what cannot be."""
        sampler, sampling = defaults(SAMPLER) | values, defaults(SAMPLING) | values
        budget = values.get("max_new_tokens", MAX_NEW_TOKENS.default)
        try:
            check_all(SAMPLER, "sampler.", sampler)
            check_all(SAMPLING, "sampling.", sampling | {"seed": 0})
            check(MAX_NEW_TOKENS, "max_new_tokens", budget)
        except InvalidRequest as error:
            raise UsageError(f"default of {error}") from error
        return cls(sampler, sampling, budget, chat_frame or "")


def resolve_sampler(message: types_pb2.Sampler, defaults: Defaults, latent_dim: int) -> types_pb2.Sampler:
    """The sampler with every field set. Raises InvalidRequest naming the field that is out of its range."""
    values = sampler_values(message, defaults.sampler)
    check_all(SAMPLER, "sampler.", values)
    steering.read(message.steering, "sampler.steering", latent_dim)
    return types_pb2.Sampler(**wire(SAMPLER, values))


def resolve_sampling(message: types_pb2.Sampling, defaults: Defaults, seed: int, **other: float) -> types_pb2.Sampling:
    """The sampling with every field set; `seed` where it has none, `other` in place of the defaults."""
    values = {**defaults.sampling, "seed": seed, **other, **given(message, SAMPLING, "sampling.")}
    check_all(SAMPLING, "sampling.", values)
    return types_pb2.Sampling(**wire(SAMPLING, values))


def resolve_seed(request: Any, blocks: int) -> types_pb2.NoiseSeed:
    """The `seed` of a request for so many blocks; drawn when unset. Raises InvalidRequest for one without noise."""
    message: types_pb2.NoiseSeed = request.seed
    if not request.HasField("seed"):
        return types_pb2.NoiseSeed(base_seed=secrets.randbits(_SEED_BITS))
    check(SAMPLE_ID, "seed.sample_id", message.sample_id)
    if block_seed(message.base_seed, message.sample_id, max(blocks - 1, 0)) >= SEED_END:
        raise InvalidRequest(
            "seed.base_seed",
            f"got {message.base_seed}; with 1000 * sample_id and 10000000 a block it must stay below 2^63",
        )
    return message


def sampling_seed(seed: types_pb2.NoiseSeed) -> int:
    """The seed of the token draws of a run that names none: the first 63 bits of SHA-256 over the ASCII text
    "colaserve sampling BASE_SEED SAMPLE_ID", read little-endian."""
    text = f"colaserve sampling {seed.base_seed} {seed.sample_id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & (SEED_END - 1)
