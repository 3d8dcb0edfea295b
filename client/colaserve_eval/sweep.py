"""The same questions under many sampler settings: accuracy against what it costs."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from colaserve_client.settings import Solver
from colaserve_client.writing import write_file
from colaserve_eval.folder import Speed, read_speed
from colaserve_eval.records import EvalError, Output, json_text, read_object, read_outputs
from colaserve_eval.runner import GenerationSettings
from colaserve_eval.tables import Table
from colaserve_eval.tasks import Score, score_folder

SWEEP_FILE, PLOT_FILE = "sweep.json", "sweep.png"


@dataclass(frozen=True)
class Setting:
    """One combination."""

    guidance_scale: float
    steps: int
    solver: Solver

    @property
    def folder(self) -> str:
        """The name of the folder of its run."""
        return f"g{self.guidance_scale:g}-s{self.steps}-{self.solver}"

    @property
    def passes_per_block(self) -> int:
        """How often the prior's network sees a block that is being written.

        Euler and AB2 evaluate it once a step, Heun twice (once in the last step). Guidance takes two rows an
        evaluation, with and without history; a scale of 1 switches it off. (The first block after an empty prefix takes
        one row at any scale; that is not counted off here.)
        """
        evaluations = 2 * self.steps - 1 if self.solver == "heun" else self.steps
        return evaluations * (1 if self.guidance_scale == 1 else 2)


def grid(guidance_scales: Iterable[float], steps: Iterable[int], solvers: Iterable[Solver]) -> list[Setting]:
    """Every combination once."""
    return list(dict.fromkeys(Setting(*values) for values in product(guidance_scales, steps, solvers)))


@dataclass(frozen=True)
class Point:
    """What one setting gave."""

    setting: Setting
    score: Score
    blocks_per_answer: float  # mean
    speed: Speed

    def to_json(self) -> dict[str, Any]:
        """Setting, cost and score, flat."""
        return {
            **asdict(self.setting),
            "passes_per_block": self.setting.passes_per_block,
            "passes_per_answer": round(self.setting.passes_per_block * self.blocks_per_answer, 2),
            "tokens_per_second": round(self.speed.tokens_per_second, 2),
            **self.score.to_json(),
        }


RunPoint = Callable[[GenerationSettings, Path], Awaitable[object]]  # asks all questions into a folder


async def sweep(run: RunPoint, settings: Sequence[Setting], base: GenerationSettings, folder: Path) -> list[Point]:
    """Run every setting into its own folder below `folder`, which makes a sweep resumable; returns their points."""
    points = []
    for setting in settings:
        sampler = replace(base.sampler, **asdict(setting))
        await run(replace(base, sampler=sampler), folder / setting.folder)
        points.append(read_point(setting, folder / setting.folder))
    return points


def read_point(setting: Setting, folder: Path) -> Point:
    """The point of a setting whose run is in `folder`."""
    outputs = [output for file in sorted(folder.glob("*.jsonl")) for output in read_outputs(file)]
    return Point(setting, score_folder(folder), mean_blocks(outputs), read_speed(folder))


def mean_blocks(outputs: Iterable[Output]) -> float:
    """Blocks written for an answer, mean over the answers that tell."""
    blocks = [output.usage["blocks"] for output in outputs if output.usage]
    return sum(blocks) / len(blocks) if blocks else 0.0


def write_sweep(points: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the points' JSON to the folder of the sweep."""
    write_file(folder / SWEEP_FILE, json_text({"points": points}) + "\n")


def read_sweep(folder: Path) -> list[dict[str, Any]]:
    """The points' JSON. Raises EvalError when the folder holds none."""
    points = read_object(folder / SWEEP_FILE).get("points")
    if not isinstance(points, list):
        raise EvalError(f"{folder / SWEEP_FILE}: points: expected a list, got {type(points).__name__}")
    return points


def sweep_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """A row a point, from the points' JSON."""
    tasks = list(points[0]["tasks"])
    header = ["guidance", "steps", "solver", "passes/block", "passes/answer", "tokens/s", *tasks, "average"]
    return header, [_row(point, tasks) for point in points]


def _row(point: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    settings = [f"{point['guidance_scale']:g}", str(point["steps"]), point["solver"], str(point["passes_per_block"])]
    costs = [f"{point['passes_per_answer']:.1f}", f"{point['tokens_per_second']:.1f}"]
    accuracies = [f"{point['tasks'][task]['accuracy']:.2f}" for task in tasks]
    return [*settings, *costs, *accuracies, f"{point['average']:.2f}"]
