"""What a benchmark leaves behind: a table on the screen, and JSON with everything."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from colaserve_client.cli.output import table
from colaserve_client.writing import write_file
from colaserve_services.model.backend import cpu_kernels

Row = dict[str, Any]
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "ONEDNN_MAX_CPU_ISA")
_PACKAGES = ("colaserve", "torch", "grpcio", "protobuf", "numpy")


@dataclass(frozen=True)
class Column:
    """One column of the table: the key in a row, its heading with the unit, how a value is written."""

    key: str
    heading: str
    form: str = "{}"

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        return "-" if value is None else self.form.format(value)


@dataclass(frozen=True)
class Report:
    """Results of one benchmark. `rows` are the medians of `rounds`; `keys` identify a row."""

    columns: Sequence[Column]
    rounds: list[Row]
    keys: tuple[str, ...]
    notes: Sequence[str] = ()

    @property
    def rows(self) -> list[Row]:
        return medians(self.rounds, self.keys)

    def text(self) -> str:
        """Aligned columns, then the notes."""
        cells = [[column.cell(row) for column in self.columns] for row in self.rows]
        return "\n".join([table([c.heading for c in self.columns], cells), *(f"* {note}" for note in self.notes)])

    def write_json(self, path: Path, benchmark: str, settings: Mapping[str, Any]) -> None:
        """Machine, versions, settings, rows and rounds."""
        content = {
            "benchmark": benchmark,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "settings": settings,
            "notes": self.notes,
            "rows": self.rows,
            "rounds": self.rounds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(content, indent=1, default=str) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code. The load average shows whether something else was computing."""
    text = ""
    with suppress(OSError):  # Linux has it
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": cpu_kernels.missing() or cpu_kernels.KINDS[cpu_kernels.kind()],
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of the values does not exceed; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered), -int(-len(ordered) * share // 1)) - 1)]


def medians(rounds: Iterable[Row], keys: Sequence[str]) -> list[Row]:
    """One row for each combination of `keys`: the median of every number, the last of everything else; no "round"."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rounds:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = [{name: value for name, value in group[-1].items() if name != "round"} for group in groups.values()]
    for row, group in zip(found, groups.values(), strict=True):
        for name in row.keys() - keys:
            values: list[Any] = [each.get(name) for each in group]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                row[name] = statistics.median(values)
    return found
