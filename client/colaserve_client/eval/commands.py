"""The verbs of `colaserve eval`: run, score, sweep, report, vae."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from colaserve_client.errors import ColaserveError
from colaserve_client.eval import options, sweep
from colaserve_client.eval.connect import Connector, identity
from colaserve_client.eval.demo import held_out_texts
from colaserve_client.eval.folder import RunFolder, Speed, Task, read_settings
from colaserve_client.eval.plots import plot_sweep, require_matplotlib
from colaserve_client.eval.records import EvalError, Output, json_text
from colaserve_client.eval.report import write_report
from colaserve_client.eval.runner import GenerationSettings, Limits, Model, run_tasks
from colaserve_client.eval.tables import score_table, text_table
from colaserve_client.eval.tasks import Score, score_folder
from colaserve_client.eval.vae import VAE_FILE, measure, quality_table, read_texts, write_quality
from colaserve_client.settings import Solver

P = ParamSpec("P")
R = TypeVar("R")


def clear_errors(command: Callable[P, R]) -> Callable[P, R]:
    """One line instead of a traceback for what the caller can mend; a word about resuming when interrupted."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (EvalError, ColaserveError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted. What was answered is kept: the same command goes on from there.", err=True)
            raise SystemExit(130) from None

    return wrapped


@click.group("eval")
def evaluate() -> None:
    """Ask a served model questions and judge the answers."""


@evaluate.command()
@clear_errors
@options.questions_options
@click.option("--output", required=True, type=options.FOLDER, help="Folder of the outputs; an unfinished run goes on.")
@options.generation_options
@options.sampler_options
@options.concurrency_option
@options.target_option
@options.json_option
@options.pass_connector
def run(
    connector: Connector,
    *,
    tasks: Sequence[Task],
    output: Path,
    generation: GenerationSettings,
    steps: int | None,
    guidance: float | None,
    solver: Solver | None,
    concurrency: int,
    target: str,
    as_json: bool,
) -> None:
    """Ask every question of FILES, jsonl with the fields id, prompt, ground_truth and, where there are some, choices.

    Each answer is written to the output folder as it comes. Interrupted, the same command asks only what is missing;
    other settings or questions for the same folder are refused.

    \b
    colaserve eval run race.jsonl mmlu.jsonl --output out
    colaserve eval run raw/race.jsonl --template race --output out
    colaserve eval run --demo --output out
    """
    settings = replace(generation, steps=steps, guidance_scale=guidance, solver=solver)

    async def main() -> Speed:
        async with connector.open(target) as client:
            model = await identity(client)
            return await _ask(client, model, settings, output, tasks, Limits(concurrency))

    speed = asyncio.run(main())
    if speed.answers:
        rate = f"{speed.completion_tokens} tokens, {speed.tokens_per_second:.1f} tokens/s"
        click.echo(f"{speed.answers} answers in {speed.seconds:.1f} s, {rate}", err=True)
    _show_score(score_folder(output), as_json)


@evaluate.command()
@clear_errors
@click.argument("folder", type=options.FOLDER)
@options.json_option
def score(folder: Path, as_json: bool) -> None:
    """Judge the outputs in FOLDER, a <task>.jsonl for each task, by the published rules.

    Per cent; the average is the unweighted mean of the tasks. Exit status 1 when answers failed or are missing.
    """
    result = score_folder(folder)
    _show_score(result, as_json, missing=_missing(folder, result))


@evaluate.command("sweep")
@clear_errors
@options.questions_options
@click.option("--output", required=True, type=options.FOLDER, help="Folder of the sweep; an unfinished one goes on.")
@click.option("--guidance", default="1,2,4,7", show_default=True, callback=options.comma_separated(click.FLOAT))
@click.option("--steps", default="4,8,16", show_default=True, callback=options.comma_separated(click.INT))
@click.option("--solver", default="euler", show_default=True, callback=options.comma_separated(options.SOLVERS))
@options.generation_options
@click.option("--no-plots", is_flag=True, help="Do without the PNG, which needs matplotlib.")
@options.concurrency_option
@options.target_option
@options.json_option
@options.pass_connector
def sweep_command(
    connector: Connector,
    *,
    tasks: Sequence[Task],
    output: Path,
    guidance: Sequence[float],
    steps: Sequence[int],
    solver: Sequence[Solver],
    generation: GenerationSettings,
    no_plots: bool,
    concurrency: int,
    target: str,
    as_json: bool,
) -> None:
    """Ask the questions under every combination of guidance, steps and solver (comma-separated lists).

    Writes sweep.json and sweep.png: accuracy against passes of the network, and against tokens/s (which is what the
    server gave at this concurrency, and depends on the machine and on what else it does).
    """
    if not no_plots:
        require_matplotlib()
    limits = Limits(concurrency)

    async def main() -> list[sweep.Point]:
        async with connector.open(target) as client:
            model = await identity(client)

            async def ask(settings: GenerationSettings, folder: Path) -> Speed:
                return await _ask(client, model, settings, folder, tasks, limits)

            return await sweep.sweep(ask, sweep.grid(guidance, steps, solver), generation, output)

    points = [point.to_json() for point in asyncio.run(main())]
    sweep.write_sweep(points, output)
    if not no_plots:
        plot_sweep(points, output / sweep.PLOT_FILE)
    click.echo(json_text({"points": points}) if as_json else text_table(sweep.sweep_table(points)))


@evaluate.command()
@clear_errors
@click.argument("folder", type=options.FOLDER)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: FOLDER/report.md]")
@click.option("--no-plots", is_flag=True, help="Do without plots, which need matplotlib.")
def report(folder: Path, output: Path | None, no_plots: bool) -> None:
    """Write a Markdown page about what run, sweep and vae left in FOLDER, with plots beside it."""
    path = output or folder / "report.md"
    write_report(folder, path, plots=not no_plots)
    click.echo(path)


@evaluate.command()
@clear_errors
@click.argument("file", required=False, type=options.FILE)
@click.option("--demo", is_flag=True, help="Take the demo's questions in held-out phrasings, with their answers.")
@click.option("--limit", type=click.IntRange(1), help="At most so many texts, evenly spread.")
@click.option("--output", type=options.FOLDER, help=f"Also write the figures to {VAE_FILE} in this folder.")
@options.concurrency_option
@options.target_option
@options.json_option
@options.pass_connector
def vae(
    connector: Connector,
    *,
    file: Path | None,
    demo: bool,
    limit: int | None,
    output: Path | None,
    concurrency: int,
    target: str,
    as_json: bool,
) -> None:
    """Send the texts of FILE through encoder and decoder and compare: token accuracy and bits per token.

    FILE is jsonl with the field text, or plain text with a text a line; take text that was not trained on. Bits are
    -log2 of the decoder's probability of the right token, given the latents (the posterior's mean).
    """
    if demo == (file is not None):
        raise click.UsageError("give a file of texts, or --demo alone")
    texts = options.spread(read_texts(file) if file else held_out_texts(), limit)

    async def main() -> Any:
        async with connector.open(target) as client:
            with _progress(len(texts), "round trips") as bar:
                return await measure(client, texts, concurrency, bar.update)

    quality = asyncio.run(main())
    if output:
        write_quality(quality, output)
    figures = quality.to_json()
    click.echo(json_text(figures) if as_json else text_table(quality_table(figures)))


async def _ask(
    client: Model,
    model: dict[str, Any],
    settings: GenerationSettings,
    path: Path,
    tasks: Sequence[Task],
    limits: Limits,
) -> Speed:
    """Run the tasks into a folder, showing progress."""
    with RunFolder.opened(path, {"model": model, "generation": settings.to_json()}, tasks) as folder:
        todo = sum(len(folder.log(task).missing(task.questions)) for task in tasks)
        with _progress(todo, f"{path.name}: {todo} questions") as bar:
            return await run_tasks(client, settings, folder, tasks, limits, lambda output: bar.update(1, output))


def _progress(length: int, label: str) -> Any:
    return click.progressbar(
        length=length, label=label, file=sys.stderr, show_pos=True, item_show_func=_show_output, update_min_steps=1
    )


def _show_output(output: Output | None) -> str | None:
    return f"failed: {output.error}" if output and output.error else None


def _missing(folder: Path, result: Score) -> int:
    """Questions of the folder's tasks that have no output yet; 0 when its settings are not recorded."""
    asked = {name: int(task["questions"]) for name, task in read_settings(folder).get("tasks", {}).items()}
    return sum(asked.values()) - sum(result.tasks[name].n for name in asked if name in result.tasks)


def _show_score(result: Score, as_json: bool, missing: int = 0) -> None:
    click.echo(json_text(result.to_json()) if as_json else text_table(score_table(result)))
    problems = [f"{result.failed} answers failed"] * (result.failed > 0) + [f"{missing} are missing"] * (missing > 0)
    if problems:
        raise EvalError(f"{' and '.join(problems)}: run again to ask them")
