"""`bench load`: how long reading the weights takes, and how much memory of its own a process then holds."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colaserve_bench.report import Column, Report, Row, medians
from colaserve_bench.stages import DTYPES, ComputeSettings
from colaserve_services.errors import UsageError
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
PANELS = (COLUMNS[3], COLUMNS[6])
NOTES = (
    "own memory: anonymous memory (RssAnon) above the level before loading, after it and at its highest meanwhile;",
    "pages of mapped weight files are the system's cache and do not count",
    "each role is loaded by a process of its own; files may come from the system's cache from the second round on",
)


@dataclass(frozen=True)
class LoadSettings:
    """What `bench load` runs."""

    compute: ComputeSettings
    rounds: int = 2


def load(settings: LoadSettings, say: Callable[[str], None]) -> Report:
    """Rounds over all roles, each in a fresh process."""
    Checkpoint.open(settings.compute.model)  # a bad one is told here, in one line
    anonymous_bytes()
    rounds = []
    for number in range(settings.rounds):
        for role, stages in ROLES.items():
            row = {"role": role, "round": number} | _in_process(settings.compute, stages)
            say(f"round {number}, {role}: {row['seconds']:.2f} s, {row['peak_mib']:.0f} MiB at the peak")
            rounds.append(row)
    return Report("load", asdict(settings), COLUMNS, medians(rounds, ("role",)), rounds, NOTES)


def _in_process(compute: ComputeSettings, stages: Sequence[str]) -> Row:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(compute, stages, sender), daemon=True)
    process.start()
    sender.close()
    try:
        row: Row = receiver.recv()
    except EOFError:
        process.join()
        raise UsageError(f"loading {', '.join(stages)} ended with exit code {process.exitcode}") from None
    process.join()
    return row


def _measure(compute: ComputeSettings, stages: Sequence[str], sender: Any) -> None:
    import torch

    if compute.threads:
        torch.set_num_threads(compute.threads)
    torch.zeros(1 << 20).sum()  # what torch itself takes when it first computes is not the weights'
    checkpoint, device = Checkpoint.open(compute.model), compute.torch_device
    level, started = anonymous_bytes(), time.monotonic()
    with _highest() as highest:
        models = [getattr(checkpoint, f"load_{stage}")(device, DTYPES[compute.dtype], None) for stage in stages]
        seconds = time.monotonic() - started
        resident = anonymous_bytes()
    del models
    nbytes = _stored_bytes(checkpoint, stages)
    parameters = sum(checkpoint.shape_of(stage).parameters for stage in stages)
    sender.send(
        {
            "parameters_millions": parameters / 1e6,
            "read_mib": nbytes / MIB,
            "seconds": seconds,
            "mib_per_second": nbytes / MIB / seconds,
            "resident_mib": (resident - level) / MIB,
            "peak_mib": (max(resident, *highest) - level) / MIB,
        }
    )


def _stored_bytes(checkpoint: Checkpoint, stages: Sequence[str]) -> int:
    total = 0
    for stage in stages:
        folder, prefix = (checkpoint.dit, "") if stage == "prior" else (checkpoint.vae, f"{stage}.")
        total += sum(entry.nbytes for name, entry in folder.entries.items() if name.startswith(prefix))
    return total


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
    """RssAnon of this process. Raises UsageError where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
    except (OSError, StopIteration) as error:
        raise UsageError("bench load: needs /proc/self/status with RssAnon, which Linux has") from error
