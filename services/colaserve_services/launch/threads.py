"""CPU threads. OpenMP reads its settings when torch is imported, so these are set before."""

import os

# How long OpenMP threads spin before they sleep, on machines that do other work too: long enough for the gaps between
# the operations of a step, short enough to leave the cores to others (docs/decisions.md, "Spin briefly").
BRIEF = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
WAITING = (*BRIEF, "OMP_WAIT_POLICY")
TOKENIZER = ("TOKENIZERS_PARALLELISM", "false")  # many texts leave the other cores to those that compute


def settle(threads: int | None) -> None:
    """Let torch, not imported yet, use so many threads, that spin briefly; None leaves its choice, or OMP_NUM_THREADS.

    What the operator has set stays: any variable about waiting settles all of them.
    """
    os.environ.setdefault(*TOKENIZER)
    if not any(name in os.environ for name in WAITING):
        os.environ.update(BRIEF)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
