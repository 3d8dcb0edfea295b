"""What can go wrong, for every layer. `rpc/errors.py` alone turns these into gRPC and HTTP statuses."""

from typing import Final

AT_FAULT: Final = "the engine is at fault: it does not compute its warm-up row"  # every new call gets it


class ColaserveError(Exception):
    """Base of all errors that a caller or an operator gets to see; the message says what to do."""


class InvalidRequest(ColaserveError):
    """The caller's fault: `field` was given something else than expected."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class ModelMismatch(ColaserveError):
    """Latents, or two stages, belong to different latent spaces."""


class Overloaded(ColaserveError):
    """Queue, cache or another bounded resource is full; nothing ran. `retry_after` is a hint in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(ColaserveError):
    """The service is down, draining or not ready; another replica may serve the call."""


class StepFailed(ColaserveError):
    """A stage cannot compute this request, though it computes others: our fault, and never retried."""


class NotAuthenticated(ColaserveError):
    """No key, or none that is known."""


class DeadlineExceeded(ColaserveError):
    """The caller's deadline passed before the work was done."""


class Cancelled(ColaserveError):
    """The caller went away."""


class CheckpointError(ColaserveError):
    """A checkpoint, or one of its files, cannot be served. One line, for the operator at start."""


class UsageError(ColaserveError):
    """An impossible combination of settings. One line, for the operator at start."""


def require(holds: bool, field: str, got: object, expected: str) -> None:
    """Raise `InvalidRequest` for a field that holds what cannot be served."""
    if not holds:
        raise InvalidRequest(field, f"got {got}, expected {expected}")
