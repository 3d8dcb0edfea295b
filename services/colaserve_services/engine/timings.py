"""The time record of a result."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Where the time of a piece of work went, in microseconds."""

    queue_us: int
    compute_us: int
