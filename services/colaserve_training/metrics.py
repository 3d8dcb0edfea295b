"""What a run reports: a progress bar or lines, metrics.jsonl and the loss curve as PNG. None of it ends a run."""

import json
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Self

from tqdm import tqdm

from colaserve_client.reading import read_lines
from colaserve_training.config import RunConfig

_SMOOTHING = 0.95  # of the curves: the share of the mean so far
_NO_LOSS = ("step", "seconds", "rate", "norm")


def say(text: str) -> None:
    """Print a line, or do nothing when nobody can read it any more."""
    with suppress(OSError, ValueError):
        tqdm.write(text)
        sys.stdout.flush()


class Metrics:
    """Writes one line a step to `metrics.jsonl`; steps after `start` in an older file are dropped on a resume.

    Only the process of rank 0 writes and shows anything.
    """

    def __init__(self, folder: Path, start: int, run: RunConfig, title: str, quiet: bool = False, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl" if rank == 0 else Path(os.devnull)
        kept = [row for row in _rows(self.path) if row["step"] < start]
        self._file = self.path.open("w", encoding="utf-8")
        self._file.writelines(f"{json.dumps(row)}\n" for row in kept)
        self._title, self._run, self._quiet, self._failed = title, run, quiet, False
        hidden = quiet or not sys.stderr.isatty()
        self._bar = tqdm(total=run.steps, initial=start, desc=title, unit="step", disable=hidden)
        self._start, self._began, self._last = start, time.perf_counter(), time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        with suppress(OSError):
            self._file.close()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Record step `step` (from 0)."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        try:
            self._file.write(json.dumps({"step": step, **values, "seconds": round(seconds, 4)}) + "\n")
            self._file.flush()
        except OSError as error:
            if not (self._failed or self._quiet):
                say(f"warning: {self.path}: cannot be written ({error.strerror}); training continues without it")
            self._failed = True
        self._bar.update(1)
        if self._quiet or (step % self._run.log_every and step + 1 < self._run.steps):
            return
        shown = {name: f"{value:.4g}" for name, value in values.items()}
        if not self._bar.disable:
            self._bar.set_postfix(shown)
            return
        pace = (now - self._began) / (step + 1 - self._start)  # seconds a step
        left = timedelta(seconds=round(pace * (self._run.steps - step - 1)))
        parts = "  ".join(f"{name} {value}" for name, value in shown.items())
        say(f"{self._title} {step + 1}/{self._run.steps}  {parts}  {1 / pace:.2f} step/s  ETA {left}")


def _rows(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line that a killed run left half is not one."""
    rows = []
    for _, line in read_lines(path, whole=True) if path.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def plot_losses(folder: Path) -> None:
    """Draw every loss in `folder`/metrics.jsonl against the step, smoothed, as loss.png; say so where that fails.

    Called when the weights are written: nothing that happens here loses any.
    """
    image = folder / "loss.png"
    try:
        from matplotlib.figure import Figure

        rows, figure = _rows(folder / "metrics.jsonl"), Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(name for row in rows for name in row if name not in _NO_LOSS):
            curve = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = zip(*curve, strict=True)
            smooth = accumulate(values, lambda mean, value: _SMOOTHING * mean + (1 - _SMOOTHING) * value)
            axes.plot(steps, values if name == "validation" else list(smooth), label=name)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(image, dpi=120)
    except Exception as error:  # whatever a plotting library and its settings on this machine come up with
        say(f"{image}: not drawn ({type(error).__name__}: {error}); metrics.jsonl has the numbers")
