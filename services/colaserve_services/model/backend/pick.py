"""Which backend computes on a device, by a recorded rule of what the hardware has, never by timing."""

import logging
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from colaserve_services.model.backend import Sizes, cpu_kernels, cuda, reference, self_check
from colaserve_services.model.backend.streams import CudaStream

Maker = Callable[[Any, Sizes], Any]  # a network and sizes to its backend

_LEAST_ROWS_OF_GPU = 128  # by arithmetic: not run on a GPU
_LEAST_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)


class Picked(NamedTuple):
    """A backend's name, why it was chosen, and what makes it for each network."""

    name: str
    why: str
    least_rows: int  # positions of contexts that cost a pass next to nothing
    prior: Maker
    decoder: Maker
    encoder: Maker


def pick(device: torch.device, dtype: torch.dtype) -> Picked:
    """Compiled kernels where they can be had, plain torch elsewhere."""
    if device.type == "cuda":
        missing = _lacking(device, dtype)
        return plain(f"kernels for GPUs: {missing}", _LEAST_ROWS_OF_GPU) if missing else bucketed(_kernels(), device)
    if device.type != "cpu":
        return plain(f"nothing faster is there for {device.type}", _LEAST_ROWS_OF_GPU)
    if (missing := cpu_kernels.missing()) is not None:
        return plain(f"compiled kernels: {missing}")
    makers = (partial(kind, kernels=cpu_kernels) for kind in (reference.Prior, reference.Decoder, reference.Encoder))
    return Picked("cpu", f"compiled kernels for {cpu_kernels.KINDS[cpu_kernels.kind()]}", 32, *makers)


def plain(why: str, least_rows: int = 32) -> Picked:
    """Plain torch, anywhere."""
    return Picked("reference", why, least_rows, reference.Prior, reference.Decoder, reference.Encoder)


def bucketed(kernels: Any, device: torch.device) -> Picked:
    """Kernels over buckets; on a CPU those that can be had there."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    kinds = ((cuda.Prior, reference.Prior), (cuda.Decoder, reference.Decoder), (cuda.Encoder, reference.Encoder))
    makers = (partial(_taken, kernels, kind, otherwise) for kind, otherwise in kinds)
    return Picked("cuda", f"kernels for {name}", _LEAST_ROWS_OF_GPU, *makers)


def _taken(kernels: Any, kind: Any, otherwise: Any, model: Any, sizes: Sizes) -> Any:
    try:
        return kind(model, sizes, kernels)
    except cuda.NotTaken as error:
        _log.warning("the kernels take no %s; plain torch computes the %s", error, kind.__name__.lower())
        return otherwise(model, sizes)


def _kernels() -> ModuleType:
    from colaserve_services.model import kernels  # importing it takes Triton

    return kernels


@cache
def _lacking(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why they cannot be used on a GPU, or None."""
    if (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        return "they take compute capability 8.0, this one has {}.{}".format(*capability)
    try:
        return self_check.disagreement(_kernels(), CudaStream(device, graphs=False), dtype)
    except ImportError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever stops Triton from compiling; a lost device stops what comes next
        _log.warning("the kernels for GPUs do not run", exc_info=error)
        return type(error).__name__
