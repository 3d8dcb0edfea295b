"""Where a step's time goes, from a torch.profiler run of some steady steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_KINDS = {
    "attention": ("attention", "sdp", "bmm", "softmax"),
    "products": ("linear", "addmm", "::mm", "matmul", "gemm"),
}


@dataclass(frozen=True)
class TimeShares:
    """Seconds on the device thread; `other` is the rest of the steps' time, Python and the profiler's cost included."""

    products: float
    attention: float
    other: float
    operators: dict[str, float]  # the largest, by their own time

    @property
    def outside(self) -> float:
        """Share of the time that is neither a matrix product (with what is fused into it) nor attention."""
        return self.other / (self.products + self.attention + self.other)


def time_shares(profile: Any, step_seconds: float) -> TimeShares:
    """Sort the profiled operators' own times; `step_seconds` is what the profiled steps took on the clock.

    An operator that another one calls counts where its caller does.
    """
    seconds = dict.fromkeys(_KINDS, 0.0)
    for event in profile.events():
        kind = _kind(event)
        if kind:
            seconds[kind] += event.self_cpu_time_total / 1e6
    own = {event.key: round(event.self_cpu_time_total / 1e6, 6) for event in profile.key_averages()}
    largest = dict(sorted(own.items(), key=lambda item: -item[1])[:15])
    other = max(0.0, step_seconds - sum(seconds.values()))
    return TimeShares(seconds["products"], seconds["attention"], other, largest)


def _kind(event: Any) -> str | None:
    """Of the outermost caller that is of a kind."""
    found = None
    while event is not None:
        found = next((kind for kind, parts in _KINDS.items() if any(part in event.name for part in parts)), found)
        event = event.cpu_parent
    return found
