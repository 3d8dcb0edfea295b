"""What the coordinator reports for metrics. launch/observers.py implements this for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping


class CoordinatorObserver:
    """Does nothing; subclasses record. Called on the event loop, so implementations must not block."""

    def queued(self, waiting: Mapping[str, int], running: int) -> None:
        """Calls that wait now, by the stage that they wait for, "coordinator" included; calls at work."""

    def refused(self, reason: str) -> None:
        """A call was refused: "queue" (full), "wait" (queued too long), "key" (its caller has too many), "idle"."""

    def first_block(self, seconds: float) -> None:
        """A generation's first block is out, `seconds` after its arrival."""

    def next_block(self, seconds: float) -> None:
        """A generation's next block is out, `seconds` after the one before."""

    def tokens(self, prompt: int, completion: int) -> None:
        """A generation ended, however it ended, with so many tokens read and written."""

    def wasted(self, blocks: int) -> None:
        """The prior wrote blocks after the end of a text."""

    def stage_fault(self, stage: str, kind: str) -> None:
        """A stage answered wrongly; `kind` is one of checks.KINDS."""

    def failover(self, stage: str, outcome: str) -> None:
        """A call to "encoder", "prior" or "decoder" had broken: "resumed" (another attempt succeeded) or "failed"."""
