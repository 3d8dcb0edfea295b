"""`bench load`: how long reading the weights takes, and how much memory of its own a process then holds."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from colaserve_bench.engines import Compute
from colaserve_bench.report import Column, Report, Row
from colaserve_bench.verbs import COMPUTE_OPTIONS, benchmark, compute_of, in_own_process, rounds, say
from colaserve_services.errors import UsageError
from colaserve_services.model import loading
from colaserve_services.model.checkpoint import Checkpoint

MIB = 1 << 20
STAGES = ("encoder", "decoder", "prior")
ROLES = {stage: (stage,) for stage in STAGES} | {"all in one process": STAGES}

COLUMNS = (
    Column("role", "role"),
    Column("parameters_millions", "M parameters", "{:.1f}"),
    Column("read_mib", "read MiB", "{:.0f}"),
    Column("seconds", "seconds", "{:.2f}"),
    Column("mib_per_second", "MiB/s", "{:.0f}"),
    Column("resident_mib", "own memory MiB", "{:.0f}"),
    Column("peak_mib", "peak MiB", "{:.0f}"),
)
NOTES = (
    "own memory: anonymous memory (RssAnon) above the level before loading, after it and at its highest meanwhile;",
    "pages of mapped weight files are the system's cache and do not count",
    "each role is loaded by a process of its own; files may come from the system's cache from the second round on",
)


@benchmark("load", *COMPUTE_OPTIONS, rounds(2), quick={"rounds": 1})
async def load(rounds: int, **options: Any) -> Report:
    """Time and memory of reading the weights: each role alone, then all in one process."""
    compute = compute_of(options)
    Checkpoint.open(compute.model)  # a bad one is reported here, in one line
    anonymous_bytes()
    measured: list[Row] = []
    for number, (role, stages) in itertools.product(range(rounds), ROLES.items()):
        row = in_own_process(_load, compute, stages)
        say(f"round {number}, {role}: {row['seconds']:.2f} s, {row['peak_mib']:.0f} MiB at the peak")
        measured.append({"role": role, "round": number} | row)
    return Report(COLUMNS, measured, ("role",), NOTES)


def _load(compute: Compute, stages: Sequence[str]) -> Row:
    """In a process of its own."""
    if compute.threads:
        torch.set_num_threads(compute.threads)
    torch.zeros(1 << 20).sum()  # what torch itself takes when it first computes is not the weights'
    checkpoint, device = Checkpoint.open(compute.model), compute.torch_device
    level, started = anonymous_bytes(), time.monotonic()
    with _highest() as highest:
        models = [loading.load(checkpoint, stage, device, loading.DTYPES[compute.dtype]) for stage in stages]
        seconds = time.monotonic() - started
        resident = anonymous_bytes()
    del models
    entries = {**checkpoint.vae.entries, **{f"prior.{name}": entry for name, entry in checkpoint.dit.entries.items()}}
    nbytes = sum(entry.nbytes for name, entry in entries.items() if name.partition(".")[0] in stages)
    return {
        "parameters_millions": sum(checkpoint.shape_of(stage).parameters for stage in stages) / 1e6,
        "read_mib": nbytes / MIB,
        "seconds": seconds,
        "mib_per_second": nbytes / MIB / seconds,
        "resident_mib": (resident - level) / MIB,
        "peak_mib": (max(resident, *highest) - level) / MIB,
    }


@contextmanager
def _highest() -> Iterator[list[int]]:
    """A list whose largest value is the highest level of anonymous memory until the end, looked at each 5 ms."""
    levels, done = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            levels.append(max(levels.pop(), anonymous_bytes()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield levels
    finally:
        done.set()
        thread.join()
        levels.append(anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process. Raises UsageError where the system does not have it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
    except (OSError, StopIteration) as error:
        raise UsageError("bench load: needs /proc/self/status with RssAnon, which Linux has") from error
