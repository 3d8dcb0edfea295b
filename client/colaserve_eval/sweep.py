"""The same questions under many sampler settings: accuracy against what it costs."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from colaserve_client.settings import Sampler, Solver
from colaserve_eval.folder import read_outputs, read_speed
from colaserve_eval.records import EvalError, read_object, write_object
from colaserve_eval.scoring import Table, score

SWEEP_FILE, PLOT_FILE = "sweep.json", "sweep.png"
Points = Sequence[Mapping[str, Any]]  # as in sweep.json


def grid(folder: Path, scales: Iterable[float], steps: Iterable[int], solvers: Iterable[Solver]) -> dict[Path, Sampler]:
    """Every combination once, and the folder of its run below `folder`."""
    combinations = dict.fromkeys(product(scales, steps, solvers))
    return {
        folder / f"g{scale:g}-s{count}-{solver}": Sampler(count, scale, solver) for scale, count, solver in combinations
    }


def passes_per_block(sampler: Sampler) -> int:
    """How often the prior's network sees a block that is being written.

    Euler and AB2 evaluate it once a step, Heun twice (once in the last step). Guidance takes two rows an evaluation,
    with and without history; a scale of 1 switches it off. (The first block after an empty prefix takes one row at any
    scale; that is not counted off here.)
    """
    assert sampler.steps is not None
    evaluations = 2 * sampler.steps - 1 if sampler.solver == "heun" else sampler.steps
    return evaluations * (1 if sampler.guidance_scale == 1 else 2)


def write_sweep(folder: Path, runs: Mapping[Path, Sampler]) -> Points:
    """The points of finished runs, which are written down too."""
    points = [_point(path, sampler) for path, sampler in runs.items()]
    write_object(folder / SWEEP_FILE, {"points": points})
    return points


def _point(folder: Path, sampler: Sampler) -> dict[str, Any]:
    """Sampler, cost and score of the run in a folder."""
    tasks = read_outputs(folder)
    blocks = [output.usage["blocks"] for outputs in tasks.values() for output in outputs if output.usage]
    passes = passes_per_block(sampler)
    return {
        "guidance_scale": sampler.guidance_scale,
        "steps": sampler.steps,
        "solver": sampler.solver,
        "passes_per_block": passes,
        "passes_per_answer": round(passes * sum(blocks) / max(1, len(blocks)), 2),
        "tokens_per_second": round(read_speed(folder).tokens_per_second, 2),
        **score(tasks),
    }


def read_sweep(folder: Path) -> Points:
    """The points of a sweep's folder. Raises EvalError when it holds none."""
    points = read_object(folder / SWEEP_FILE).get("points")
    if not isinstance(points, list):
        raise EvalError(f"{folder / SWEEP_FILE}: points: expected a list, got {type(points).__name__}")
    return points


def sweep_table(points: Points) -> Table:
    """A row a point."""
    tasks = list(points[0]["tasks"])
    costs = ["guidance", "steps", "solver", "passes/block", "passes/answer", "tokens/s"]
    rows = [
        [
            f"{point['guidance_scale']:g}",
            str(point["steps"]),
            point["solver"],
            str(point["passes_per_block"]),
            f"{point['passes_per_answer']:.1f}",
            f"{point['tokens_per_second']:.1f}",
            *(f"{point['tasks'][task]['accuracy']:.2f}" for task in tasks),
            f"{point['average']:.2f}",
        ]
        for point in points
    ]
    return [*costs, *tasks, "average"], rows
