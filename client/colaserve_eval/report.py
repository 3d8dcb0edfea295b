"""One Markdown page about a folder: the score of its run, its sweep, the quality of its latent space; and its plots.

matplotlib is an optional extra and is loaded only here, when a plot is asked for.
"""

import json
from pathlib import Path
from typing import Any

from colaserve_client.cli.verbs import pip_line
from colaserve_client.writing import write_file
from colaserve_eval.folder import SETTINGS_FILE, read_outputs, read_settings, read_speed
from colaserve_eval.records import EvalError, Record, read_object
from colaserve_eval.scoring import Table, cut_answer, is_correct, score, score_table
from colaserve_eval.sweep import PLOT_FILE, SWEEP_FILE, Points, read_sweep, sweep_table
from colaserve_eval.vae import VAE_FILE

EXAMPLES, EXAMPLE_CHARACTERS = 3, 120  # wrong answers shown a task, and of each text
MARKERS, LINES = {"euler": "o", "ab2": "s", "heun": "^"}, {"euler": "-", "ab2": "--", "heun": ":"}


def write_report(folder: Path, path: Path, plots: bool = True) -> None:
    """Write the page, and its plots beside it.

    Raises EvalError when the folder holds nothing to report, or matplotlib is missing and plots are wanted.
    """
    sections: list[str] = []
    if any(folder.glob("*.jsonl")):
        sections += _score_sections(folder, path.parent if plots else None)
    if (folder / SWEEP_FILE).exists():
        points = read_sweep(folder)
        sections += ["## Sampler settings", markdown_table(sweep_table(points))]
        if plots:
            plot_sweep(points, path.parent / PLOT_FILE)
            sections.append(f"![Accuracy against passes of the network and against tokens/s]({PLOT_FILE})")
    if (folder / VAE_FILE).exists():
        table = markdown_table(figures_table(read_object(folder / VAE_FILE)))
        sections += ["## Round trip through the latent space", table]
    if not sections:
        raise EvalError(f"{folder}: holds neither outputs nor {SWEEP_FILE} nor {VAE_FILE}")
    write_file(path, "\n\n".join([f"# Evaluation of {_title(folder)}", *sections]) + "\n")


def markdown_table(table: Table) -> str:
    """A Markdown table, bars in a cell escaped."""
    header, rows = table
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def figures_table(figures: dict[str, Any]) -> Table:
    """A row a figure."""
    return ["figure", "value"], [[name, str(value)] for name, value in figures.items()]


def _title(folder: Path) -> str:
    for run in (folder, *sorted(path.parent for path in folder.glob(f"*/{SETTINGS_FILE}"))):
        if name := read_settings(run).get("model", {}).get("name"):
            return str(name)
    return folder.resolve().name


def _score_sections(folder: Path, plots: Path | None) -> list[str]:
    tasks = read_outputs(folder)
    figures, settings, speed = score(tasks), read_settings(folder), read_speed(folder)
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
        if wrong := [_wrong_answer(output) for output in outputs if not is_correct(task, output)][:EXAMPLES]:
            table = markdown_table((["id", "asked", "answered", "expected"], wrong))
            sections.append(f"## Wrong answers: {task}\n\n{table}")
    return sections


def _wrong_answer(output: Record) -> list[str]:
    """Its cells, cut and on one line."""
    asked, answered = "…" + output.prompt[-EXAMPLE_CHARACTERS:], output.error or cut_answer(output.generate)
    texts = (str(output.id), asked, answered, output.ground_truth)
    return [f"`{' '.join(text.replace('`', chr(39)).split())[: EXAMPLE_CHARACTERS + 1]}`" for text in texts]


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
