"""The bound on the calls that a server runs at once. A refusal comes at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from colaserve_services.errors import Overloaded
from colaserve_services.rpc.settings import MAX_CALLS


class CallLimit:
    """Counts the calls of one server. `refused` is called with the reason, "calls", for one too many."""

    def __init__(self, max_calls: int = MAX_CALLS, refused: Callable[[str], None] = lambda reason: None):
        self._max_calls, self._refused, self._running = max_calls, refused, 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a call while it runs; raise Overloaded when it is one too many."""
        if self._running >= self._max_calls:
            self._refused("calls")
            raise Overloaded(f"this server runs {self._running} calls, the most it takes", retry_after=1.0)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
