"""What the coordinator takes at most."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CoordinatorLimits:
    """Bounds of one coordinator; the stages have their own."""

    max_context: int = 8192  # latent positions of one session; the stages' least one holds if lower
    max_message_bytes: int = 64 * 1024 * 1024  # of one gRPC message
    max_running: int = 256  # calls at work at once
    max_waiting: int = 512  # calls that wait for one of these; one more is refused at once
    queue_seconds: float = 30.0  # a call that waited so long is refused
    max_per_key: int = 0  # calls of one key, else address, at once, waiting ones included; 0: no bound
    idle_seconds: float = 60.0  # that a response may stay unread while other calls wait
    slice_seconds: float = 3.0  # that a large run keeps its slot before a much smaller one may have it
    attempts: int = 8  # failures in a row of one stage until a call is given up
    retry_seconds: float = 0.05  # before the third attempt; doubled before each further one, 40 times that at most
    watch_seconds: float = 1.0  # between two looks at the stages
