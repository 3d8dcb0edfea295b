"""A pass on its way: what sessions send through it, and whether it is over."""

import time
from collections.abc import Callable, Container, Sequence
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


def heavy_part(scheduled: Sequence[ScheduledSession], heavy: Container[Any], cost: Callable[[int], float]) -> float:
    """The part that these of its sessions have in a pass; `cost`: of a block behind so many."""
    costs = [(each.rows * cost(each.session.cached), each.session in heavy) for each in scheduled]
    return sum(one for one, is_heavy in costs if is_heavy) / max(sum(one for one, _ in costs), 1)


@dataclass(frozen=True)
class Running(Generic[T]):
    """A pass on the device, and whose it is."""

    scheduled: list[T]
    run: Pass
    started: float  # time.monotonic
    heavy: float  # the part of it that is heavy work

    def over(self) -> bool:
        """Whether its results are to be taken now."""
        return self.run.done() or time.monotonic() - self.started >= _MOST_LOOKED_AT

    def figures(self) -> tuple[float, int, int]:
        """Of one that is over: seconds, positions and sessions."""
        seconds = self.run.seconds if self.run.seconds is not None else time.monotonic() - self.started
        return seconds, sum(each.rows for each in self.scheduled), len(self.scheduled)
