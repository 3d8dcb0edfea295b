"""A pass on its way: what sessions send through it, and whether it is over."""

import time
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from colaserve_services.model.backend import Pass

BETWEEN_LOOKS: Final = 5e-5  # seconds between two looks whether a pass is done
_MOST_LOOKED_AT: Final = 10.0  # seconds; a pass that lasts longer is waited for, so that the watchdog sees it


class ScheduledSession(Protocol):
    """What one session sends through a pass; enough to run it again, wherever the session has moved on to."""

    @property
    def session(self) -> Any: ...
    @property
    def rows(self) -> int: ...


T = TypeVar("T", bound=ScheduledSession)


@dataclass(frozen=True)
class Running(Generic[T]):
    """A pass on the device, and whose it is."""

    scheduled: list[T]
    run: Pass
    started: float  # time.monotonic

    def over(self) -> bool:
        """Whether its results are to be taken now."""
        return self.run.done() or time.monotonic() - self.started >= _MOST_LOOKED_AT

    def figures(self) -> tuple[float, int, int]:
        """Of one that is over: seconds, positions and sessions."""
        seconds = self.run.seconds if self.run.seconds is not None else time.monotonic() - self.started
        return seconds, sum(each.rows for each in self.scheduled), len(self.scheduled)
