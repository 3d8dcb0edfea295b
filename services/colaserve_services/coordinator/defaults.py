"""What a field means that a request leaves unset: the flag, else the checkpoint's generation_config.json, else this."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, fields
from typing import Any, Final

from colaserve.v1 import types_pb2
from colaserve_services.bounds import MAX_NEW_TOKENS, SAMPLE_ID, SAMPLER, SAMPLING, SEED_END, Range, block_seed
from colaserve_services.errors import InvalidRequest, UsageError

SOLVERS: Final = {
    "euler": types_pb2.SOLVER_EULER,
    "ab2": types_pb2.SOLVER_AB2,
    "heun": types_pb2.SOLVER_HEUN,
}
_SEED_BITS: Final = 48  # of a drawn base_seed: room below 2^63 for every sample and block, exact in a JSON number


@dataclass(frozen=True)
class Defaults:
    """Values of unset fields; units and ranges as in types.proto."""

    max_new_tokens: int = 32
    steps: int = 16
    guidance_scale: float = 7.0
    solver: str = "euler"
    guidance_start: float = 1.0
    guidance_end: float = 0.0
    resamples: int = 1
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    chat_frame: str = ""

    def __post_init__(self) -> None:
        try:
            resolve_sampler(types_pb2.Sampler(), self)
            resolve_sampling(types_pb2.Sampling(), self, 0)
            MAX_NEW_TOKENS.check("max_new_tokens", self.max_new_tokens)
        except InvalidRequest as error:
            raise UsageError(f"default of {error}") from error
        if self.chat_frame and "{prompt}" not in self.chat_frame:
            raise UsageError('chat_frame: has no place "{prompt}" for the message')

    @classmethod
    def resolve(cls, *layers: object) -> Defaults:
        """Of each value the first that is not None, flags first: resolve(flags, checkpoint.defaults)."""
        found: dict[str, Any] = {}
        for spec in fields(cls):
            values = (getattr(layer, spec.name, None) for layer in layers)
            value = next((value for value in values if value is not None), None)
            if value is not None:
                found[spec.name] = value
        return cls(**found)


def resolve_sampler(message: types_pb2.Sampler, defaults: Defaults) -> types_pb2.Sampler:
    """The sampler with every field set. Raises InvalidRequest naming the field that is out of its range."""
    values = {name: _choose(message, name, defaults, "sampler", bounds) for name, bounds in SAMPLER.items()}
    if values["guidance_end"] > values["guidance_start"]:
        raise InvalidRequest(
            "sampler.guidance_end",
            f"got {values['guidance_end']:g}, expected at most guidance_start ({values['guidance_start']:g})",
        )
    return types_pb2.Sampler(solver=_solver(message.solver, defaults.solver), **values)


def resolve_sampling(message: types_pb2.Sampling, defaults: Defaults, seed: int, **other: float) -> types_pb2.Sampling:
    """The sampling with every field set; `seed` where it has none, `other` in place of the defaults."""
    values = {name: _choose(message, name, defaults, "sampling", bounds, other) for name, bounds in SAMPLING.items()}
    return types_pb2.Sampling(seed=message.seed if message.HasField("seed") else seed, **values)


def resolve_seed(message: types_pb2.NoiseSeed | None, blocks: int) -> types_pb2.NoiseSeed:
    """The seed of a run of so many blocks; drawn when None. Raises InvalidRequest for one that has no noise."""
    if message is None:
        return types_pb2.NoiseSeed(base_seed=secrets.randbits(_SEED_BITS))
    SAMPLE_ID.check("seed.sample_id", message.sample_id)
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


def _choose(
    message: Any,
    name: str,
    defaults: Defaults,
    field: str,
    bounds: Range,
    other: dict[str, float] = {},  # noqa: B006 - read only
) -> Any:
    chosen = getattr(message, name) if message.HasField(name) else other.get(name, getattr(defaults, name))
    bounds.check(f"{field}.{name}", chosen)
    return chosen


def _solver(asked: int, default: str) -> Any:
    if asked:
        if asked not in SOLVERS.values():
            raise InvalidRequest("sampler.solver", f"got {asked}, expected SOLVER_EULER, SOLVER_AB2 or SOLVER_HEUN")
        return asked
    if default not in SOLVERS:
        raise InvalidRequest("sampler.solver", f"got {default!r}, expected one of {', '.join(SOLVERS)}")
    return SOLVERS[default]
