"""CPU threads. OpenMP reads its settings when torch is imported, so these are set before."""

from __future__ import annotations

import os

# How long OpenMP threads spin before they sleep, for processes that share cores: long enough for the gaps between the
# operations of a step, short enough to leave the cores to others (docs/decisions.md, "Spin briefly").
BRIEF = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
WAITING = (*BRIEF, "OMP_WAIT_POLICY")


def limit(threads: int | None) -> None:
    """Let torch, not imported yet, use so many threads; None leaves its choice, or OMP_NUM_THREADS."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def share(threads: int | None) -> dict[str, str]:
    """The environment of processes that share this machine: each may use all cores, none spins long.

    What the operator has set stays: any variable about waiting settles all of them.
    """
    environment = {} if any(name in os.environ for name in WAITING) else dict(BRIEF)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment
