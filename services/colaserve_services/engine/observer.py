"""What an engine tells those who watch it."""


class EngineObserver:
    """Does nothing; subclasses record. Called on the device thread, except `refused`; must be quick."""

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        """One forward pass over `rows` latent positions of `sessions` sessions took `seconds`."""

    def load(self, running: int, kv_bytes: int, kv_budget: int) -> None:
        """Sessions started, grew or ended: how many run, the bytes of KV that they hold, and the budget for it."""

    def block(self, seconds: float, first: bool) -> None:
        """A block was finished: seconds since the session arrived (first) or since its block before."""

    def tokens(self, count_in: int, count_out: int) -> None:
        """Latent positions taken in as context and written out."""

    def prefix_cache(self, hits: int, misses: int, bytes_held: int) -> None:
        """Leading blocks found and not found in the prefix cache by one session; bytes it holds now."""

    def preempted(self) -> None:
        """A session gave its KV back for others, and is written again later."""

    def step_failed(self) -> None:
        """A step failed with one session alone, or its result was not finite."""

    def failing(self, failing: bool) -> None:
        """The engine is at fault: it does not compute its warm-up row; or it does again."""

    def refused(self, reason: str) -> None:
        """A session was refused or ended at a bound: "slots", "kv", "deadline" or "idle"."""
