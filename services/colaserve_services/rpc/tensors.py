"""Tensor and Latents messages to torch tensors and back; see `arrays.py` for what is checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colaserve.v1 import types_pb2
from colaserve_services.rpc import arrays


def to_message(tensor: Tensor) -> types_pb2.Tensor:
    """A float32 Tensor message of any shape."""
    return arrays.to_message(tensor.detach().to("cpu", torch.float32).numpy())


def from_message(message: types_pb2.Tensor, field: str, shape: Sequence[int | None]) -> Tensor:
    """A float32 CPU tensor of `shape` (None: any extent there); raises InvalidRequest naming `field`."""
    return torch.from_numpy(arrays.from_message(message, field, shape))


def latents_to_message(tensor: Tensor, space: str) -> types_pb2.Latents:
    """Latents (n, d) of the space with that fingerprint."""
    return types_pb2.Latents(values=to_message(tensor), space=space)


def latents_from_message(
    message: types_pb2.Latents, field: str, latent_dim: int, space: str, positions: int | None = None
) -> Tensor:
    """Latents as (n, latent_dim), (0, latent_dim) when not set; see `arrays.latents_from_message`."""
    return torch.from_numpy(arrays.latents_from_message(message, field, latent_dim, space, positions))
