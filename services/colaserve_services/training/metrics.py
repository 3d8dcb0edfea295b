"""What a run reports: a progress bar, metrics.jsonl and the loss curve as PNG."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from colaserve_client.reading import read_lines


class Metrics:
    """Writes one line a step to `metrics.jsonl`; steps after `start` in an older file are dropped on a resume.

    Only the process of rank 0 writes and shows anything.
    """

    def __init__(self, folder: Path, start: int, steps: int, title: str, quiet: bool = False, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl" if rank == 0 else Path(os.devnull)
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] < start]
        self._file = self.path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        quiet = quiet or rank > 0
        hidden = quiet or not sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, desc=title, unit="step", disable=hidden)
        self._title, self._steps, self._quiet, self._hidden = title, steps, quiet, hidden
        self._last = time.perf_counter()

    def step(self, step: int, values: dict[str, float], every: int) -> None:
        """Record step `step` (from 0)."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._file.write(json.dumps({"step": step, **values, "seconds": round(seconds, 4)}) + "\n")
        self._bar.update(1)
        if step % every == 0 or step + 1 == self._steps:
            self._file.flush()
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            if self._hidden and not self._quiet:
                parts = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
                print(f"{self._title} {step + 1}/{self._steps}  {parts}  {1 / seconds:.2f} step/s", flush=True)

    def close(self) -> None:
        self._bar.close()
        self._file.close()


def _lines(path: Path) -> list[str]:
    return [f"{line}\n" for _, line in read_lines(path, whole=True)] if path.exists() else []


def plot_losses(metrics: Path, image: Path) -> None:
    """Draw every loss in `metrics` against the step, smoothed, on a logarithmic axis. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in _lines(metrics)]
    names = [name for name in rows[0] if name not in ("step", "seconds", "rate", "norm")]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in names:
        axes.plot([row["step"] for row in rows], _smooth([row[name] for row in rows]), label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(image, dpi=120)
    pyplot.close(figure)


def _smooth(values: list[float], decay: float = 0.95) -> list[float]:
    out, mean = [], values[0]
    for value in values:
        mean = decay * mean + (1 - decay) * value
        out.append(mean)
    return out
