"""How a gateway is set up."""

from dataclasses import dataclass, field

from colaserve_services.errors import UsageError
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.settings import MAX_CALLS, descriptors


@dataclass(frozen=True)
class Bounds:
    """What one request, and all connections together, may take. Impossible values raise UsageError."""

    body_bytes: int = 4 * 1024 * 1024  # a longer body is a 413
    head_seconds: float = 30.0  # from a connection's start, or a request's first byte, to the end of the request's head
    body_seconds: float = 30.0  # time to send a body in, then 408
    request_seconds: float = 600.0  # the longest deadline, and that of a request that names none
    unread_seconds: float = 60.0  # that a client may leave a stream unread while others wait for the coordinator
    last_word_seconds: float = 2.0  # that a client has to read why its stream ended
    answer_seconds: float = 30.0  # without reading any of what is left of a whole answer, then a client is cut off
    connections: int = field(default_factory=lambda: descriptors(0.5))  # open ones; more are cut off at once
    choices: int = 128  # prompts times n of one request
    parallel_choices: int = 16  # of these at once, but always all of one prompt; others are queued in the gateway

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"gateway: {name} must be above 0, got {value}")


@dataclass(frozen=True)
class GatewaySettings:
    """Everything that can be set of a gateway."""

    keys: Keys | None = None  # None: everybody may call
    max_calls: int = MAX_CALLS  # requests at once
    cors_origins: tuple[str, ...] = ()  # browsers' origins that may call, "*" for all; none: no CORS headers
    allow_unknown_fields: bool = False  # ignore fields no one knows instead of refusing them
    bounds: Bounds = field(default_factory=Bounds)
    info_seconds: float = 5.0  # how long the coordinator's description of itself is kept
    ready_seconds: float = 1.0  # how long an answer of /ready is kept
