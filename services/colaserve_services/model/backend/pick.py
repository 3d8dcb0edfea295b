"""Which backend computes on a device, by a recorded rule of what the hardware has, never by timing."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from colaserve_services.model.backend import Sizes, cpu_kernels, reference

Maker = Callable[[Any, Sizes], Any]  # a network and sizes to its backend


class Picked(NamedTuple):
    """A backend's name, why it was chosen, and what makes it for each network."""

    name: str
    why: str
    least_rows: int  # positions of contexts that cost a pass next to nothing
    prior: Maker
    decoder: Maker
    encoder: Maker


def pick(device: torch.device, dtype: torch.dtype) -> Picked:
    """On a CPU compiled kernels where they are built, plain torch elsewhere."""
    if device.type != "cpu":
        return plain(f"nothing faster is there for {device.type}", 128)  # by arithmetic: not run on a GPU
    if (missing := cpu_kernels.missing()) is not None:
        return plain(f"compiled kernels: {missing}")
    makers = (partial(kind, kernels=cpu_kernels) for kind in (reference.Prior, reference.Decoder, reference.Encoder))
    return Picked("cpu", f"compiled kernels for {cpu_kernels.KINDS[cpu_kernels.kind()]}", 32, *makers)


def plain(why: str, least_rows: int = 32) -> Picked:
    """Plain torch, anywhere."""
    return Picked("reference", why, least_rows, reference.Prior, reference.Decoder, reference.Encoder)
