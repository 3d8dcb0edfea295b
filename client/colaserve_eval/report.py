"""The same questions under many sampler settings, accuracy against what it costs; and one Markdown page about a folder:
the score of its run, its sweep, the quality of its latent space; and its plots.

matplotlib is an optional extra and is loaded only here, when a plot is asked for.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from colaserve_client.cli.verbs import pip_line
from colaserve_client.settings import Sampler, Solver
from colaserve_client.writing import write_file
from colaserve_eval import records
from colaserve_eval.measures import VAE_FILE
from colaserve_eval.records import EvalError
from colaserve_eval.scoring import Table, cut_answer, is_correct, score, score_table

SWEEP_FILE, PLOT_FILE = "sweep.json", "sweep.png"
Points = Sequence[Mapping[str, Any]]  # as in sweep.json
EXAMPLES, EXAMPLE_CHARACTERS = 3, 120  # wrong answers shown a task, and of each text
MARKERS, LINES = {"euler": "o", "ab2": "s", "heun": "^"}, {"euler": "-", "ab2": "--", "heun": ":"}


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
    points = []
    for path, sampler in runs.items():
        tasks, passes = records.read_outputs(path), passes_per_block(sampler)
        blocks = [output.usage["blocks"] for outputs in tasks.values() for output in outputs if output.usage]
        costs = {
            "passes_per_block": passes,
            "passes_per_answer": round(passes * sum(blocks) / max(1, len(blocks)), 2),
            "tokens_per_second": round(records.read_speed(path).tokens_per_second, 2),
        }
        settings = {name: getattr(sampler, name) for name in ("guidance_scale", "steps", "solver")}
        points.append({**settings, **costs, **score(tasks)})
    records.write_object(folder / SWEEP_FILE, {"points": points})
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


def write_report(folder: Path, path: Path, plots: bool = True) -> None:
    """Write the page, and its plots beside it.

    Raises EvalError when the folder holds nothing to report, or matplotlib is missing and plots are wanted.
    """
    sections: list[str] = []
    if any(folder.glob("*.jsonl")):
        sections += _score_sections(folder, path.parent if plots else None)
    if (folder / SWEEP_FILE).exists():
        points = records.read_object(folder / SWEEP_FILE).get("points")
        if not isinstance(points, list):
            raise EvalError(f"{folder / SWEEP_FILE}: points: expected a list, got {type(points).__name__}")
        sections += ["## Sampler settings", markdown_table(sweep_table(points))]
        if plots:
            plot_sweep(points, path.parent / PLOT_FILE)
            sections.append(f"![Accuracy against passes of the network and against tokens/s]({PLOT_FILE})")
    if (folder / VAE_FILE).exists():
        table = markdown_table(figures_table(records.read_object(folder / VAE_FILE)))
        sections += ["## Round trip through the latent space", table]
    if not sections:
        raise EvalError(f"{folder}: holds neither outputs nor {SWEEP_FILE} nor {VAE_FILE}")
    runs = (folder, *sorted(found.parent for found in folder.glob(f"*/{records.SETTINGS_FILE}")))
    names = (records.read_settings(run).get("model", {}).get("name") for run in runs)
    title = next(filter(None, names), folder.resolve().name)
    write_file(path, "\n\n".join([f"# Evaluation of {title}", *sections]) + "\n")


def markdown_table(table: Table) -> str:
    """A Markdown table, bars in a cell escaped."""
    header, rows = table
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def figures_table(figures: dict[str, Any]) -> Table:
    """A row a figure."""
    return ["figure", "value"], [[name, str(value)] for name, value in figures.items()]


def _score_sections(folder: Path, plots: Path | None) -> list[str]:
    tasks = records.read_outputs(folder)
    figures, settings, speed = score(tasks), records.read_settings(folder), records.read_speed(folder)
    sections = ["## Score", markdown_table(score_table(figures))]
    if plots:
        plot_score(figures, plots / "score.png")
        sections.append("![Accuracy by task](score.png)")
    if settings:
        parts = [settings.get("model", {}), settings.get("generation", {})]
        rows = [[key, json.dumps(value)] for part in parts for key, value in part.items()]
        sections += ["## Settings", markdown_table((["setting", "value"], rows))]
        if speed.answers:
            rate = f"{speed.tokens_per_second:.1f} tokens/s"
            sections.append(f"{speed.completion_tokens} tokens in {speed.seconds:.0f} s: {rate}.")
    for task, outputs in tasks.items():
        wrong = []  # cells, cut and on one line
        for output in [each for each in outputs if not is_correct(task, each)][:EXAMPLES]:
            asked, answered = "…" + output.prompt[-EXAMPLE_CHARACTERS:], output.error or cut_answer(output.generate)
            texts = (str(output.id), asked, answered, output.ground_truth)
            cells = (" ".join(text.replace("`", "'").split())[: EXAMPLE_CHARACTERS + 1] for text in texts)
            wrong.append([f"`{cell}`" for cell in cells])
        if wrong:
            table = markdown_table((["id", "asked", "answered", "expected"], wrong))
            sections.append(f"## Wrong answers: {task}\n\n{table}")
    return sections


def plot_sweep(points: Points, path: Path) -> None:
    """Accuracy against passes of the network and against tokens a second: a line a guidance scale and solver."""
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2, sharey=True)
    scales = sorted({point["guidance_scale"] for point in points})
    for scale, solver in sorted({(point["guidance_scale"], point["solver"]) for point in points}):
        line = [point for point in points if (point["guidance_scale"], point["solver"]) == (scale, solver)]
        line.sort(key=lambda point: point["passes_per_block"])
        style = {"color": f"C{scales.index(scale)}", "marker": MARKERS[solver], "linestyle": LINES[solver]}
        for axes, cost in ((left, "passes_per_block"), (right, "tokens_per_second")):
            label = f"guidance {scale:g}, {solver}"
            axes.plot([point[cost] for point in line], [point["average"] for point in line], label=label, **style)
            axes.grid(alpha=0.3)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda passes, position: f"{passes:g}")
    left.set_xlabel("passes of the network a block")
    left.set_ylabel("accuracy, mean over tasks (%)")
    right.set_xlabel("tokens/s")
    right.legend(fontsize="small")
    _save(figure, path)


def plot_score(figures: dict[str, Any], path: Path) -> None:
    """A bar a task."""
    tasks = figures["tasks"]
    figure = new_figure(7, 0.6 + 0.4 * len(tasks))
    axes = figure.subplots()
    axes.bar_label(axes.barh(list(tasks), [task["accuracy"] for task in tasks.values()]), fmt="%.1f", padding=3)
    axes.axvline(figures["average"], color="black", linestyle=":", label=f"average {figures['average']:.2f}")
    axes.set_xlim(0, 115)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy (%)")
    axes.legend(fontsize="small")
    _save(figure, path)


def new_figure(width: float = 1, height: float = 1) -> Any:
    """An empty picture. Raises EvalError without matplotlib: better before a long run than after it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvalError(f"plots need matplotlib: {pip_line('plot')}, or ask for no plots") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})
