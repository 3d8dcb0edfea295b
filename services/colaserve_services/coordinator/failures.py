"""What a stage's failure means, and whether another attempt is made: bounded, with backoff, within the deadline."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc import StatusCode

from colaserve_services.coordinator.admission import Ticket
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.checks import StageFault
from colaserve_services.coordinator.pool import Brand, Choice, NoReplica, Pool
from colaserve_services.errors import (
    AT_FAULT,
    ColaserveError,
    DeadlineExceeded,
    Overloaded,
    StepFailed,
    Unavailable,
)
from colaserve_services.rpc.errors import error_from_rpc, grpc_code

if TYPE_CHECKING:
    from colaserve_services.coordinator.context import ServiceContext

# A replica that died, drains or was cut off. INTERNAL and UNKNOWN are also what a bug in the stage answers, so they
# get fewer attempts.
_BROKEN: Final = {StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.ABORTED, StatusCode.DATA_LOSS}
_DOUBTFUL: Final = {StatusCode.INTERNAL, StatusCode.UNKNOWN}
_DOUBTFUL_ATTEMPTS: Final = 3
# The coordinator has checked what it sends, and GetInfo took its key, so a stage that refuses a call is at fault.
_REFUSED: Final = {
    StatusCode.INVALID_ARGUMENT,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.OUT_OF_RANGE,
    StatusCode.NOT_FOUND,
    StatusCode.UNIMPLEMENTED,
    StatusCode.UNAUTHENTICATED,
    StatusCode.PERMISSION_DENIED,
}
_EARLY: Final = 1.0  # seconds before the deadline, which stages see a little sooner or later
# Of grpc.aio, for a write to a stream that has ended; of its core, for a connection on which TLS found damaged bytes.
_LOST: Final = (StatusCode.INTERNAL, "Internal error from Core"), (StatusCode.UNKNOWN, "Stream removed (")
# Texts of gRPC, and of an engine that takes no runs.
_UNREACHED: Final = ("failed to connect to all addresses", "connections to all backends failing", AT_FAULT)
_LONGEST_PAUSE = 40  # times the first one

_log = logging.getLogger(__name__)


STAGE_ERRORS: Final = (grpc.RpcError, StageFault, NoReplica)


@dataclass
class Attempts:
    """The replicas that one run of a stage goes to, and its failures in a row: `stub` waits until the next attempt
    may start and gives its replica, `progressed` and `failed` say how it went. `failed` returns when another attempt is
    to follow. Leaving the context gives the run's slot back."""

    services: "ServiceContext"
    ticket: Ticket
    failures: int = 0  # streams that broke; refusals of a stage that is full do not count
    doubtful: int = 0  # of them
    brand: Brand | None = None  # of the replica that began the run
    choice: Choice | None = None  # the replica of this attempt
    avoided: set[str] = field(default_factory=set)  # addresses of those that failed
    lost: list[Choice] = field(default_factory=list)  # those that the run was in flight in when it broke

    def __enter__(self) -> "Attempts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def stage(self) -> str:
        """Its name."""
        return self.ticket.stage

    @property
    def pool(self) -> Pool:
        """The stage's replicas."""
        return self.services.pools[self.stage]

    @property
    def call(self) -> Call:
        """Which it is made for."""
        return self.ticket.call

    async def stub(self) -> Any:
        """The stub of the next attempt's replica, of the weights and dtype that began the run. Raises NoReplica, and
        Overloaded when the stage was full for too long."""
        self.choice = None
        try:
            await self.services.admission.enter(self.ticket)
        except Overloaded as error:
            self._gave_up(error)
            raise
        near = self.call.near if self.call.near is not None else {}
        self.choice = self.pool.choose(self.brand, self.avoided, near.get(self.stage))
        near[self.stage] = self.choice.replica.address
        return self.choice.replica.stub

    async def answer(self, method: str, request: Any, check: Callable[..., None]) -> Any:
        """The answer to a unary call, asked for until `check`, of it and `call`, finds nothing wrong with one."""
        while True:
            try:
                stub = await self.stub()
                response = await getattr(stub, method)(request, timeout=self.call.left())
                check(response, call=self.call)
                self.progressed()
                return response
            except STAGE_ERRORS as error:
                await self.failed(error)

    def release(self) -> None:
        """The run needs no slot now; the next attempt waits for one again."""
        self.services.admission.leave(self.ticket)

    def progressed(self) -> None:
        """The stage answered."""
        if self.failures:
            self.services.metrics.failovers.labels(self.stage, "resumed").inc()
        if self.choice is not None and self.brand is None:
            self.brand = self.choice.brand
        self.failures, self.doubtful, self.ticket.resuming = 0, 0, True
        self.services.admission.taken(self.ticket)
        self.avoided.clear()
        self.lost.clear()

    async def failed(self, error: Exception) -> None:
        """Return when another attempt should be made; raise our error for it when not."""
        if isinstance(error, grpc.RpcError) and self._refused(error.code()):
            error = StageFault("refused", f"it answered {_brief(error)} to what the coordinator had checked")
        if isinstance(error, StageFault):
            self.fault(error)
        ours = stage_error(self.stage, error)
        self._left(error)
        if isinstance(ours, Overloaded):
            self._refused_by_full(ours)
            return
        self.failures += _broke(error)
        self.doubtful += _code(error) in _DOUBTFUL
        pause = self._pause(error, ours)
        if pause is None or pause >= (self.call.left() or float("inf")):
            self._gave_up(ours)
            raise ours from error
        _log.warning("%s failed (%s), attempt %d follows", self.stage, _brief(error), self.failures + 1)
        await asyncio.sleep(pause)
        if await self._took_two_replicas():
            self._gave_up(ours)
            raise StepFailed(f"two replicas of the {self.stage} failed or ended with this request in flight") from error

    def _refused(self, code: StatusCode) -> bool:
        """Whether a stage did not take what it has to take, or gave up well before the deadline."""
        if code == StatusCode.DEADLINE_EXCEEDED:
            return self.call.deadline is None or self.call.deadline - time.monotonic() > _EARLY
        return code in _REFUSED

    def _refused_by_full(self, refusal: Overloaded) -> None:
        """Another replica may take it; else it waits in the queue again."""
        if not self.pool.offers(self.brand, self.avoided):
            self.avoided.clear()
            self.services.admission.refused(self.ticket, refusal.retry_after)

    def _left(self, error: Exception) -> None:
        """Remember the replica that failed."""
        if self.choice is not None:
            self.avoided.add(self.choice.replica.address)
            if _was_in_flight(error):
                self.lost.append(self.choice)

    async def _took_two_replicas(self) -> bool:
        """Whether two replicas in a row failed or ended when they were at this run, without any progress between: it is
        likely the reason, and a third one is not risked. A connection that broke is not a replica that ended."""
        if len(self.lost) < 2:
            return False
        well = await asyncio.gather(*map(self.pool.outlived, self.lost))
        self.lost = [choice for choice, is_well in zip(self.lost, well, strict=True) if not is_well]
        return len(self.lost) >= 2

    def fault(self, fault: StageFault) -> None:
        """Count an answer that is the stage's fault."""
        self.services.metrics.stage_faults.labels(self.stage, fault.kind).inc()

    def _pause(self, error: Exception, ours: ColaserveError) -> float | None:
        """Seconds to wait before the next attempt; None for none."""
        limits = self.services.limits
        if isinstance(ours, StepFailed):  # it would fail wherever it goes, and may take others with it
            return None
        if not _broke(error) or self.failures >= limits.attempts or self.doubtful >= _DOUBTFUL_ATTEMPTS:
            return None
        if self.failures == 1:
            return 0.0  # another replica may be there at once
        return limits.retry_seconds * min(2 ** (self.failures - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.0)

    def _gave_up(self, ours: ColaserveError) -> None:
        if isinstance(ours, Unavailable) or self.failures:
            self.services.metrics.failovers.labels(self.stage, "failed").inc()


def stage_error(stage: str, error: Exception) -> ColaserveError:
    """Our error for what a call to a stage raised; says which stage it was."""
    ours = error_from_rpc(error) if isinstance(error, grpc.RpcError) else error
    if isinstance(ours, DeadlineExceeded):
        return DeadlineExceeded(f"the deadline passed while the {stage} was at work")
    if isinstance(ours, Overloaded):
        return Overloaded(f"{stage}: {ours}", ours.retry_after)
    if isinstance(ours, Unavailable) or _code(error) in _BROKEN:
        return Unavailable(f"the {stage} is not available: {ours}")
    return ours if isinstance(ours, ColaserveError) else ColaserveError(f"{stage}: {_brief(error)}")


def _was_in_flight(error: Exception) -> bool:
    """Whether a call broke after a replica had begun with it."""
    return isinstance(error, grpc.RpcError) and _broke(error) and not (error.details() or "").startswith(_UNREACHED)


def _broke(error: Exception) -> bool:
    """Whether another replica may do what this one did not."""
    return _code(error) in _BROKEN | _DOUBTFUL


def _code(error: Exception) -> StatusCode:
    if isinstance(error, grpc.RpcError):
        found, details = error.code(), error.details() or ""
        lost = any(found == code and details.startswith(text) for code, text in _LOST)
        return StatusCode.UNAVAILABLE if lost else found
    return grpc_code(error)


def _brief(error: Exception) -> str:
    """One line, and no more of a status than its code: its text may hold a caller's."""
    return _code(error).name if isinstance(error, grpc.RpcError) else f"{type(error).__name__}: {error}"
