"""CPU threads. OpenMP reads its settings when torch is imported, so these are set before."""

from __future__ import annotations

import os

# OpenMP threads spin while they wait. Where processes share cores, the spinning takes them from whoever computes.
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def limit(threads: int | None) -> None:
    """Let torch, not imported yet, use so many threads; None leaves its choice, or OMP_NUM_THREADS."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def share(threads: int | None, processes: int) -> dict[str, str]:
    """The environment of processes that share this machine: their part of the cores, waiting without spinning.

    What the operator has set stays.
    """
    environment = {name: value for name, value in PASSIVE.items() if name not in os.environ}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return environment
