"""Plots of scores and sweeps. matplotlib is an optional extra and is loaded only here, when a plot is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colaserve_client.cli.verbs import pip_line
from colaserve_eval.records import EvalError
from colaserve_eval.tasks import Score

MARKERS, LINES = {"euler": "o", "ab2": "s", "heun": "^"}, {"euler": "-", "ab2": "--", "heun": ":"}
Points = Sequence[Mapping[str, Any]]  # as in sweep.json


def plot_sweep(points: Points, path: Path) -> None:
    """Accuracy against passes of the network and against tokens a second: a line a guidance scale and solver."""
    figure = _figure(11, 4.5)
    left, right = figure.subplots(1, 2, sharey=True)
    lines = _lines(points)
    scales = list(dict.fromkeys(scale for scale, _ in lines))
    for (scale, solver), line in lines.items():
        style = {"color": f"C{scales.index(scale)}", "marker": MARKERS[solver], "linestyle": LINES[solver]}
        style["label"] = f"guidance {scale:g}, {solver}"
        left.plot([p["passes_per_block"] for p in line], [p["average"] for p in line], **style)
        right.plot([p["tokens_per_second"] for p in line], [p["average"] for p in line], **style)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda passes, position: f"{passes:g}")
    left.set_xlabel("passes of the network a block")
    left.set_ylabel("accuracy, mean over tasks (%)")
    right.set_xlabel("tokens/s")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize="small")
    _save(figure, path)


def plot_score(score: Score, path: Path) -> None:
    """A bar a task."""
    figure = _figure(7, 0.6 + 0.4 * len(score.tasks))
    axes = figure.subplots()
    bars = axes.barh(list(score.tasks), [task.accuracy for task in score.tasks.values()])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(score.average, color="black", linestyle=":", label=f"average {score.average:.2f}")
    axes.set_xlim(0, 115)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy (%)")
    axes.legend(fontsize="small")
    _save(figure, path)


def require_matplotlib() -> None:
    """Raise EvalError when plots cannot be made: better before a long run than after it."""
    _figure(1, 1)


def _lines(points: Points) -> dict[tuple[float, str], list[Mapping[str, Any]]]:
    lines: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for point in sorted(points, key=lambda point: point["passes_per_block"]):
        lines.setdefault((point["guidance_scale"], point["solver"]), []).append(point)
    return dict(sorted(lines.items()))


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvalError(f"plots need matplotlib: {pip_line('plot')}, or ask for no plots") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})
