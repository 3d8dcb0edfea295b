"""What a benchmark leaves behind: a table on the screen, JSON with everything, a picture on request."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from colaserve_client.writing import write_file
from colaserve_services.model import cpu_attention

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
    """Results of one benchmark. `rows` are medians over rounds; `rounds` holds what they were made of."""

    benchmark: str
    settings: Mapping[str, Any]
    columns: Sequence[Column]
    rows: list[Row]
    rounds: list[Row] = field(default_factory=list)
    notes: Sequence[str] = ()

    def table(self) -> str:
        """Aligned columns, then the notes."""
        lines = [[c.heading for c in self.columns], *([c.cell(row) for c in self.columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*text, *(f"* {note}" for note in self.notes)])

    def write_json(self, path: Path) -> None:
        """Machine, versions, settings, rows and rounds."""
        content = {
            "benchmark": self.benchmark,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "rows": self.rows,
            "rounds": self.rounds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(content, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return str(value)


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code. The load average tells whether somebody else was computing."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "cpu_attention": cpu_attention.missing() or "compiled",
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _cpu() -> tuple[str, set[str]]:
    """Model name and flags as Linux tells them; elsewhere what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor(), set()
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in pairs}
    return values.get("model name", platform.processor()), set(values.get("flags", "").split())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
    return [
        {
            name: value if name in keys else _median([row.get(name) for row in group])
            for name, value in group[-1].items()
            if name != "round"
        }
        for group in groups.values()
    ]


def _median(values: list[Any]) -> Any:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return statistics.median(numbers) if numbers and len(numbers) == len(values) else values[-1]


def plot(path: Path, rows: Sequence[Row], x: str, series: str, panels: Sequence[Column]) -> None:
    """A panel for each of `panels`: a line for each value of `series` over `x`, or bars where each has one row.

    Bars are drawn when all those rows are at one `x`.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    draw = _bars if len({row[x] for row in rows}) == 1 and len({row[series] for row in rows}) == len(rows) else _lines
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.5 * len(panels) + 2, 3.5), squeeze=False, sharey=draw is _bars, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        draw(axis, [row for row in rows if row.get(panel.key) is not None], x, series, panel.key)
        axis.set_title(panel.heading)
        axis.grid(alpha=0.3)
    if lines := axes[0][0].get_lines():
        figure.legend(handles=lines, title=series, loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(axis: Any, rows: Sequence[Row], x: str, series: str, y: str) -> None:
    for value in dict.fromkeys(row[series] for row in rows):
        points = [(str(row[x]), row[y]) for row in rows if row[series] == value]
        axis.plot(*zip(*points, strict=True), marker="o", label=f"{value}")
    axis.set_xlabel(x)
    axis.set_ylim(bottom=0)


def _bars(axis: Any, rows: Sequence[Row], x: str, series: str, y: str) -> None:
    values = {f"{row[series]}": row[y] for row in rows}
    axis.barh(list(values), list(values.values()))
    axis.set_ylim(len(values) - 0.5, -0.5)  # the first one on top
    axis.set_xlabel("".join(f"{x} {value}" for value in dict.fromkeys(row[x] for row in rows)))
