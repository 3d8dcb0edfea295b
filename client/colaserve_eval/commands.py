"""The verbs of `colaserve eval`: run, score, sweep, report, vae."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from colaserve_client.cli.options import SectionedCommand, Server, json_option, sampler_options, server_options
from colaserve_client.cli.output import echo, print_json
from colaserve_client.settings import Sampler, Solver
from colaserve_eval import options, sweep
from colaserve_eval.connect import Connector, identity
from colaserve_eval.demo import held_out_texts
from colaserve_eval.folder import RunFolder, Speed, Task, read_settings
from colaserve_eval.plots import plot_sweep, require_matplotlib
from colaserve_eval.records import EvalError, Output
from colaserve_eval.report import write_report
from colaserve_eval.runner import GenerationSettings, Limits, Model, run_tasks
from colaserve_eval.tables import Table, score_table, text_table
from colaserve_eval.tasks import Score, score_folder
from colaserve_eval.vae import VAE_FILE, measure, quality_table, read_texts, write_quality


@contextmanager
def resumable() -> Iterator[None]:
    """Say what an interrupted run has kept."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nInterrupted. What was answered is kept: the same command goes on from there.", err=True)
        raise


class _Verbs(click.Group):
    command_class = SectionedCommand


@click.group("eval", cls=_Verbs)
def evaluate() -> None:
    """Ask a served model questions and judge the answers."""


@evaluate.command(short_help="Ask questions and write the answers down.")
@options.questions_options
@click.option("--output", required=True, type=options.FOLDER, help="Folder of the outputs; an unfinished run goes on.")
@options.generation_options
@sampler_options
@options.concurrency_option
@server_options
@json_option
@options.pass_connector
def run(
    connector: Connector,
    *,
    tasks: Sequence[Task],
    output: Path,
    generation: GenerationSettings,
    sampler: Sampler,
    concurrency: int,
    server: Server,
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
    settings = replace(generation, sampler=sampler)

    async def main() -> Speed:
        async with connector.open(server) as client:
            model = await identity(client)
            return await _ask(client, model, settings, output, tasks, Limits(concurrency))

    with resumable():
        speed = asyncio.run(main())
    if speed.answers:
        rate = f"{speed.completion_tokens} tokens, {speed.tokens_per_second:.1f} tokens/s"
        click.echo(f"{speed.answers} answers in {speed.seconds:.1f} s, {rate}", err=True)
    _show_score(score_folder(output), as_json)


@evaluate.command(short_help="Judge the answers.")
@click.argument("folder", type=options.FOLDER)
@json_option
def score(folder: Path, as_json: bool) -> None:
    """Judge the outputs in FOLDER, a <task>.jsonl for each task, by the published rules.

    Per cent; the average is the unweighted mean of the tasks. Exit status 1 when answers failed or are missing.
    """
    result = score_folder(folder)
    _show_score(result, as_json, missing=_missing(folder, result))


@evaluate.command("sweep", short_help="Ask under many sampler settings: table, PNG, JSON.")
@options.questions_options
@click.option("--output", required=True, type=options.FOLDER, help="Folder of the sweep; an unfinished one goes on.")
@click.option(
    "--guidance",
    "--guidance-scale",
    "guidance",
    default="1,2,4,7",
    show_default=True,
    callback=options.comma_separated(click.FLOAT),
    help="Scales.",
)
@click.option(
    "--steps", default="4,8,16", show_default=True, callback=options.comma_separated(click.INT), help="Of the sampler."
)
@click.option(
    "--solver",
    default="euler",
    show_default=True,
    callback=options.comma_separated(options.SOLVERS),
    help="Rules: euler, ab2, heun.",
)
@options.generation_options
@click.option("--no-plots", is_flag=True, help="Do without the PNG, which needs matplotlib.")
@options.concurrency_option
@server_options
@json_option
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
    server: Server,
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
        async with connector.open(server) as client:
            model = await identity(client)

            async def ask(settings: GenerationSettings, folder: Path) -> Speed:
                return await _ask(client, model, settings, folder, tasks, limits)

            return await sweep.sweep(ask, sweep.grid(guidance, steps, solver), generation, output)

    with resumable():
        points = [point.to_json() for point in asyncio.run(main())]
    sweep.write_sweep(points, output)
    if not no_plots:
        plot_sweep(points, output / sweep.PLOT_FILE)
    show({"points": points}, sweep.sweep_table(points), as_json)


@evaluate.command(short_help="Write a Markdown page with plots.")
@click.argument("folder", type=options.FOLDER)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: FOLDER/report.md]")
@click.option("--no-plots", is_flag=True, help="Do without plots, which need matplotlib.")
def report(folder: Path, output: Path | None, no_plots: bool) -> None:
    """Write a Markdown page about what run, sweep and vae left in FOLDER, with plots beside it."""
    path = output or folder / "report.md"
    write_report(folder, path, plots=not no_plots)
    echo(str(path))


@evaluate.command(short_help="Measure the round trip through the latent space.")
@click.argument("file", required=False, type=options.FILE)
@click.option("--demo", is_flag=True, help="Take the demo's questions in held-out phrasings, with their answers.")
@click.option("--limit", type=click.IntRange(1), help="At most so many texts, evenly spread.")
@click.option("--output", type=options.FOLDER, help=f"Also write the figures to {VAE_FILE} in this folder.")
@options.concurrency_option
@server_options
@json_option
@options.pass_connector
def vae(
    connector: Connector,
    *,
    file: Path | None,
    demo: bool,
    limit: int | None,
    output: Path | None,
    concurrency: int,
    server: Server,
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
        async with connector.open(server) as client:
            with _progress(len(texts), "round trips") as bar:
                return await measure(client, texts, concurrency, bar.update)

    quality = asyncio.run(main())
    if output:
        write_quality(quality, output)
    figures = quality.to_json()
    show(figures, quality_table(figures), as_json)


def show(value: Any, table: Table, as_json: bool) -> None:
    """Print for machines or for people."""
    if as_json:
        print_json(value)
    else:
        echo(text_table(table))


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
        length=length,
        label=label,
        file=sys.stderr,
        show_pos=True,
        item_show_func=_show_output,
        update_min_steps=1,
        hidden=sys.stderr is None,
    )


def _show_output(output: Output | None) -> str | None:
    return f"failed: {output.error}" if output and output.error else None


def _missing(folder: Path, result: Score) -> int:
    """Questions of the folder's tasks that have no output yet; 0 when its settings are not recorded."""
    asked = {name: int(task["questions"]) for name, task in read_settings(folder).get("tasks", {}).items()}
    return sum(asked.values()) - sum(result.tasks[name].n for name in asked if name in result.tasks)


def _show_score(result: Score, as_json: bool, missing: int = 0) -> None:
    show(result.to_json(), score_table(result), as_json)
    problems = [f"{result.failed} answers failed"] * (result.failed > 0) + [f"{missing} are missing"] * (missing > 0)
    if problems:
        raise EvalError(f"{' and '.join(problems)}: run again to ask them")
