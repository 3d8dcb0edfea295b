"""What a stage's failure means, and whether another attempt is made: bounded, with backoff, within the deadline."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from typing import Final

import grpc
from grpc import StatusCode

from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.checks import StageFault
from colaserve_services.coordinator.observer import CoordinatorObserver
from colaserve_services.errors import (
    ColaserveError,
    DeadlineExceeded,
    NotAuthenticated,
    Overloaded,
    StepFailed,
    Unavailable,
)
from colaserve_services.rpc.errors import error_from_rpc, grpc_code

# A replica that died, drains or was cut off. INTERNAL and UNKNOWN are also what a bug in the stage answers, so they
# get fewer attempts.
_BROKEN: Final = {StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.ABORTED, StatusCode.DATA_LOSS}
_DOUBTFUL: Final = {StatusCode.INTERNAL, StatusCode.UNKNOWN}
_DOUBTFUL_ATTEMPTS: Final = 3
# The coordinator has checked what it sends, so a stage that refuses it is at fault.
_REFUSED: Final = {StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION}
_LOST: Final = "Internal error from Core"  # grpc.aio's for a write to a stream that has ended, in place of its status
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds
_LONGEST_PATIENCE = 60.0  # seconds

_log = logging.getLogger(__name__)


STAGE_ERRORS: Final = (grpc.RpcError, StageFault)


@dataclass
class Attempts:
    """The failures in a row of one call to a stage. `failed` either waits for the next attempt or raises."""

    stage: str
    call: Call
    most: int
    observer: CoordinatorObserver
    resuming: bool = False  # work was done already: an overloaded replica is then waited for, not passed on
    failures: int = 0
    broken: int = 0  # of them: streams that broke, not refusals of a stage that is full
    doubtful: int = 0  # of those
    refused_since: float | None = None  # since when a full stage is waited for

    def progressed(self) -> None:
        """The stage answered."""
        if self.broken:
            self.observer.failover(self.stage, "resumed")
        self.failures, self.broken, self.doubtful, self.refused_since, self.resuming = 0, 0, 0, None, True

    async def failed(self, error: Exception) -> None:
        """Return when another attempt should be made; raise our error for it when not."""
        if isinstance(error, grpc.RpcError) and error.code() in _REFUSED:
            error = StageFault("refused", f"it answered {_brief(error)} to what the coordinator had checked")
        if isinstance(error, StageFault):
            self.fault(error)
        ours = stage_error(self.stage, error)
        self.failures += 1
        self.broken += _code(error) in _BROKEN | _DOUBTFUL
        self.doubtful += _code(error) in _DOUBTFUL
        pause = self._patience(ours) if isinstance(ours, Overloaded) and self.resuming else self._pause(error, ours)
        if pause is None or pause >= (self.call.left() or float("inf")):
            self._gave_up(ours)
            raise ours from error
        _log.warning("%s failed (%s), attempt %d follows", self.stage, _brief(error), self.failures + 1)
        await asyncio.sleep(pause)

    def fault(self, fault: StageFault) -> None:
        """Count an answer that is the stage's fault."""
        self.observer.stage_fault(self.stage, fault.kind)

    def _pause(self, error: Exception, ours: ColaserveError) -> float | None:
        """Seconds to wait before the next attempt; None for none."""
        most = self.most if _code(error) in _BROKEN | _DOUBTFUL else 0
        if isinstance(ours, StepFailed):  # it would fail wherever it goes, and may take others with it
            return None
        if isinstance(ours, Overloaded):
            most = 2
        if self.failures >= most or self.doubtful >= _DOUBTFUL_ATTEMPTS:
            return None
        if self.failures == 1:
            return 0.0  # another replica may be there at once
        return float(min(_FIRST_PAUSE * 2 ** (self.failures - 1), _LONGEST_PAUSE)) * random.uniform(0.5, 1.0)

    def _patience(self, ours: Overloaded) -> float | None:
        """The same while a full stage is waited for: until the deadline, for a minute where there is none."""
        now = time.monotonic()
        if self.refused_since is None:
            self.refused_since = now
        waited = now - self.refused_since
        if self.call.left() is None and waited > _LONGEST_PATIENCE:
            return None
        pause = min(max(ours.retry_after, waited / 2, _FIRST_PAUSE), _LONGEST_PAUSE)
        return float(pause * random.uniform(0.5, 1.0))

    def _gave_up(self, ours: ColaserveError) -> None:
        if isinstance(ours, Unavailable) or self.broken:
            self.observer.failover(self.stage, "failed")


def stage_error(stage: str, error: Exception) -> ColaserveError:
    """Our error for what a call to a stage raised; says which stage it was."""
    ours = error_from_rpc(error) if isinstance(error, grpc.RpcError) else error
    if isinstance(ours, DeadlineExceeded):
        return DeadlineExceeded(f"the deadline passed while the {stage} was at work")
    if isinstance(ours, Overloaded):
        return Overloaded(f"{stage}: {ours}", ours.retry_after)
    if isinstance(ours, NotAuthenticated):
        return Unavailable(f"the {stage} does not take this coordinator's key")
    if isinstance(ours, Unavailable) or _code(error) in _BROKEN:
        return Unavailable(f"the {stage} is not available: {ours}")
    return ours if isinstance(ours, ColaserveError) else ColaserveError(f"{stage}: {_brief(error)}")


def _code(error: Exception) -> StatusCode:
    if isinstance(error, grpc.RpcError):
        found: StatusCode = error.code()
        return StatusCode.UNAVAILABLE if (found, error.details()) == (StatusCode.INTERNAL, _LOST) else found
    return grpc_code(error)


def _brief(error: Exception) -> str:
    """One line, and no more of a status than its code: its text may hold a caller's."""
    return _code(error).name if isinstance(error, grpc.RpcError) else f"{type(error).__name__}: {error}"
