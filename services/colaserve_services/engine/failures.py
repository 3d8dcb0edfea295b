"""What a step can fail with: memory that ran out, a lost device, results that are no numbers or that no stage takes."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from colaserve_services.bounds import LATENT
from colaserve_services.errors import UsageError

_LOST = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS")
_CPU_SAYS = ("DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory")


class NotFinite(ArithmeticError):
    """A result holds NaN or infinity though all that went in was finite."""


class OutOfBounds(ArithmeticError):
    """Latents that no stage would take though all that went in was within bounds: guidance may carry them there."""


def brief(error: Exception) -> str:
    """What callers may hear of an error."""
    return str(error) if isinstance(error, NotFinite | OutOfBounds) else type(error).__name__


def traceback_of(error: Exception) -> Exception | None:
    """What the log holds beside that: where the error came from, unless its text says it all."""
    return None if isinstance(error, NotFinite | OutOfBounds) else error


def check_finite(what: str, *values: Tensor | None) -> None:
    """Raise `NotFinite` unless all values are finite. Waits for the device."""
    if not all(bool(value.isfinite().all()) for value in values if value is not None):
        raise NotFinite(f"{what}: not finite")


def check_latents(what: str, latents: Tensor) -> None:
    """Raise `NotFinite` or `OutOfBounds` unless other stages take these latents, which are on the CPU."""
    if not (np.abs(latents.numpy()) <= LATENT.most).all():  # false for NaN too; torch takes four times as long
        check_finite(what, latents)
        raise OutOfBounds(f"{what}: beyond {LATENT}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA has a type for that, torch on a CPU raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if _of_cuda(error):
        return "out of memory" in str(error)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_SAYS)


def lost_device(error: BaseException) -> bool:
    """Whether CUDA failed: it surfaces in whatever waits next, and nothing of the process computes on it again."""
    return _of_cuda(error) and not out_of_memory(error)


def _of_cuda(error: BaseException) -> bool:
    named = isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)
    return named or isinstance(error, torch.AcceleratorError)


@contextmanager
def has_to_fit(what: str, device: torch.device) -> Iterator[None]:
    """Raise UsageError, one line, when there is no memory for what is made inside."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UsageError(f"{what} does not fit into the memory of {device}") from error
