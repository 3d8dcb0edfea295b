"""The probes that steer a sampler, read from its message. All that a sender can get wrong is checked."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from colaserve.v1 import types_pb2
from colaserve_services.bounds import STEERING, check
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc import arrays

MOST: Final = 16  # probes of a sampler
_COLUMNS: Final = 64  # of a probe


class Probe(NamedTuple):
    """It steers where start >= t/T > end."""

    columns: arrays.FloatArray  # (k, d + 2): direction, bias (-inf where the probe is linear) and scale of each
    start: float
    end: float


def read(messages: Sequence[types_pb2.Steering], field: str, latent_dim: int) -> list[Probe]:
    """The probes. Raises InvalidRequest naming what one cannot have."""
    check_count(messages, field)
    return [_read(message, f"{field}[{i}]", latent_dim) for i, message in enumerate(messages)]


def check_count(messages: Sequence[types_pb2.Steering], field: str) -> None:
    """InvalidRequest when there are too many probes."""
    if len(messages) > MOST:
        raise InvalidRequest(field, f"got {len(messages)} probes, expected at most {MOST}")


def _read(message: types_pb2.Steering, field: str, latent_dim: int) -> Probe:
    values = {name: getattr(message, name) for name in STEERING} | {"start": message.start or 1.0}
    for name, value in values.items():
        check(STEERING[name], f"{field}.{name}", value)
    if values["end"] >= values["start"]:
        raise InvalidRequest(f"{field}.end", f"got {message.end:g}, expected less than start ({values['start']:g})")
    shape = message.direction.shape
    k = shape[1] if len(shape) == 2 else 1
    if not 1 <= k <= _COLUMNS:  # before anything is made of what is refused
        raise InvalidRequest(f"{field}.direction.shape", f"got {k} columns, expected 1 to {_COLUMNS}")
    expected = (latent_dim, k) if len(shape) > 1 else (latent_dim,)
    direction = arrays.from_message(message.direction, f"{field}.direction", expected).reshape(latent_dim, k)
    scale = np.full(k, message.scale, np.float32)
    columns = np.column_stack((direction.T, _bias(message, f"{field}.bias", k), scale))
    return Probe(columns, values["start"], values["end"])


def _bias(message: types_pb2.Steering, field: str, k: int) -> arrays.FloatArray:
    if not message.logistic:
        if message.HasField("bias"):
            raise InvalidRequest(field, "got one, expected none: it has no effect on the gradient of a linear probe")
        return np.full(k, -np.inf, np.float32)
    if not message.HasField("bias"):
        return np.zeros(k, np.float32)
    shape = () if k == 1 and not message.bias.shape else (k,)
    return arrays.from_message(message.bias, field, shape).reshape(k)
