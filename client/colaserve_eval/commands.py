"""The verbs of `colaserve eval`: run, score, sweep, report, vae, likelihood."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import click

from colaserve_client.cli import options
from colaserve_client.cli.options import Listed, Server, option
from colaserve_client.cli.output import answer, echo, plain, table
from colaserve_client.client import AsyncClient
from colaserve_client.settings import SOLVERS, GenerationRequest, Sampler, Scoring, Solver
from colaserve_eval import records
from colaserve_eval import report as reports
from colaserve_eval.demo import demo_tasks, held_out_texts
from colaserve_eval.measures import VAE_FILE, measure_likelihood, measure_round_trips, read_texts
from colaserve_eval.records import EvalError, Record, RunFolder, Speed, Task
from colaserve_eval.runner import run_tasks
from colaserve_eval.scoring import score, score_table
from colaserve_eval.templates import load_template, read_raw_questions, shipped_templates

T = TypeVar("T")
FIRST_CONTACT = 20.0  # seconds until a server that does not answer at all is given up
TIMEOUT = 600.0  # seconds for one answer where nothing else is said: a run must not stand still for ever
_ASKED_WITH = ("max_new_tokens", "sampler", "sampling", "seed", "stop")  # what of a request a folder is made with

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)

concurrency_option = option(
    "--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Requests in flight."
)


@dataclass(frozen=True)
class Asking:
    """What is asked, how, and where the answers go."""

    tasks: Sequence[Task]
    output: Path
    generation: GenerationRequest  # but for prompt and sampler
    concurrency: int
    server: Server


def _asking(values: dict[str, Any]) -> Asking:
    files, demo, template = values.pop("files"), values.pop("demo"), values.pop("template")
    if demo == bool(files) or (demo and template):
        raise click.UsageError("give question files, with or without --template, or --demo alone")
    patterns, limit = values.pop("only"), values.pop("limit")
    loaded, tasks = load_template(template) if template else None, demo_tasks() if demo else []
    for file in files:
        if any(task.name == file.stem for task in tasks):
            raise EvalError(f"{file}: a file named {file.stem} is given already; tasks are named after their files")
        tasks.append(Task(file.stem, read_raw_questions(file, loaded) if loaded else records.read_records(file)))
    for pattern in patterns:
        if not any(fnmatchcase(task.name, pattern) for task in tasks):
            raise EvalError(f"--only {pattern}: fits none of {', '.join(task.name for task in tasks)}")
    chosen = [
        Task(task.name, spread(task.questions, limit))
        for task in tasks
        if not patterns or any(fnmatchcase(task.name, pattern) for pattern in patterns)
    ]
    names = ("max_new_tokens", "sampling", "seed", "stop")
    generation = GenerationRequest("", **{name: values.pop(name) for name in names})
    return Asking(chosen, values.pop("output"), generation, values.pop("concurrency"), values.pop("server"))


asking_options = options.grouped("asking", (  # FILES, and all options but the sampler's of a verb that asks questions
    click.argument("files", nargs=-1, type=FILE),
    click.option("--demo", is_flag=True, help="Ask the bundled demo checkpoint's own question sets."),
    click.option(
        "--template",
        help="Make the prompts of raw records by this template: a TOML file, or one of "
        f"{', '.join(shipped_templates())}. Without it FILES hold whole prompts.",
    ),
    click.option("--only", multiple=True, help="Only the tasks that this pattern fits (*, ?); may be repeated."),
    click.option("--limit", type=click.IntRange(1), help="At most so many questions of each task, evenly spread."),
    click.option(
        "--output", required=True, type=FOLDER, help="Folder for the answers; an unfinished run is continued."
    ),
    option("--max-new-tokens", type=click.IntRange(1), help="Length at most.  [default: the server's]"),
    option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise."),
    click.option("--stop", multiple=True, help="End an answer before this string; may be repeated."),
    options.sampling_options,
    concurrency_option,
    options.server_options,
), _asking)  # fmt: skip


def connected(server: Server) -> AbstractAsyncContextManager[AsyncClient]:
    """A client of the server; who calls the verbs may give another way to connect as click's context object."""
    if connect := click.get_current_context().obj:
        return connect(server)  # type: ignore[no-any-return]
    timeout = server.timeout or TIMEOUT
    return AsyncClient(server.target, key=server.key, tls=server.tls, timeout=timeout, retry=server.retry)


class _Verbs(click.Group):
    command_class = options.SectionedCommand


@click.group("eval", cls=_Verbs)
def evaluate() -> None:
    """Ask a served model questions and judge the answers."""


@evaluate.command(short_help="Ask questions and write the answers down.")
@asking_options
@options.sampler_options
@options.json_option
def run(asking: Asking, sampler: Sampler, as_json: bool) -> None:
    """Ask every question of FILES, jsonl with the fields id, prompt, ground_truth and, where there are some, choices.

    Each answer is written to the output folder as it comes. Interrupted, the same command asks only what is missing;
    other settings or questions for the same folder are refused.

    \b
    colaserve eval run race.jsonl mmlu.jsonl --output out
    colaserve eval run raw/race.jsonl --template race --output raw-out
    colaserve eval run --demo --output demo-out
    """
    speed = _ask(asking, {asking.output: sampler})
    if speed.answers:
        rate = f"{speed.completion_tokens} tokens, {speed.tokens_per_second:.1f} tokens/s"
        click.echo(f"{speed.answers} answers in {speed.seconds:.1f} s, {rate}", err=True)
    _show_score(asking.output, as_json, whole=False)


@evaluate.command("score", short_help="Judge the answers.")
@click.argument("folder", type=FOLDER)
@options.json_option
def score_command(folder: Path, as_json: bool) -> None:
    """Judge the outputs in FOLDER, a <task>.jsonl for each task, by the published rules.

    Per cent; the average is the unweighted mean of the tasks. Exit status 1 when answers failed or are missing.
    """
    _show_score(folder, as_json, whole=True)


@evaluate.command("sweep", short_help="Ask under many sampler settings: table, PNG, JSON.")
@asking_options
@click.option(
    "--guidance", "--guidance-scale", "scales", type=Listed(click.FLOAT), default="1,2,4,7", show_default=True,
    help="Scales.",
)  # fmt: skip
@click.option("--steps", type=Listed(click.INT), default="4,8,16", show_default=True, help="Of the sampler.")
@click.option(
    "--solver", "solvers", type=Listed(click.Choice(SOLVERS)), default="euler", show_default=True,
    help=f"Rules: {', '.join(SOLVERS)}.",
)  # fmt: skip
@click.option("--no-plots", is_flag=True, help="Do without the PNG, which needs matplotlib.")
@options.json_option
def sweep_command(
    asking: Asking, scales: Sequence[float], steps: Sequence[int], solvers: Sequence[Solver], no_plots: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Ask the questions under every combination of guidance, steps and solver (comma-separated lists).

    Writes sweep.json and sweep.png: accuracy against passes of the network, and against tokens/s (which is what the
    server gave at this concurrency, and depends on the machine and on what else it does).
    """
    if not no_plots:
        reports.new_figure()
    runs = reports.grid(asking.output, scales, steps, solvers)
    _ask(asking, runs)
    points = reports.write_sweep(asking.output, runs)
    if not no_plots:
        reports.plot_sweep(points, asking.output / reports.PLOT_FILE)
    answer({"points": points}, as_json, lambda: table(*reports.sweep_table(points)))


@evaluate.command(short_help="Write a Markdown page with plots.")
@click.argument("folder", type=FOLDER)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: FOLDER/report.md]")
@click.option("--no-plots", is_flag=True, help="Do without plots, which need matplotlib.")
def report(folder: Path, output: Path | None, no_plots: bool) -> None:
    """Write a Markdown page about what run, sweep and vae left in FOLDER, with plots beside it."""
    path = output or folder / "report.md"
    reports.write_report(folder, path, plots=not no_plots)
    echo(str(path))


@evaluate.command(short_help="Measure the round trip through the latent space.")
@click.argument("file", required=False, type=FILE)
@click.option("--demo", is_flag=True, help="Take the demo's questions in held-out phrasings, with their answers.")
@click.option("--limit", type=click.IntRange(1), help="At most so many texts, evenly spread.")
@click.option("--output", type=FOLDER, help=f"Also write the figures to {VAE_FILE} in this folder.")
@concurrency_option
@options.server_options
@options.json_option
def vae(
    file: Path | None, demo: bool, limit: int | None, output: Path | None, concurrency: int, server: Server,
    as_json: bool,
) -> None:  # fmt: skip
    """Send the texts of FILE through encoder and decoder and compare: token accuracy and bits per token.

    FILE is jsonl with the field text, or plain text with a text a line; take text that was not trained on. Bits are
    -log2 of the decoder's probability of the right token, given the latents (the posterior's mean).
    """
    if demo == (file is not None):
        raise click.UsageError("give a file of texts, or --demo alone")
    texts = spread(read_texts(file) if file else held_out_texts(), limit)

    async def main() -> dict[str, Any]:
        async with connected(server) as client:
            with _progress(len(texts), "round trips") as bar:
                return await measure_round_trips(client, texts, concurrency, bar.update)

    figures = asyncio.run(main())
    if output:
        output.mkdir(parents=True, exist_ok=True)
        records.write_object(output / VAE_FILE, figures)
    answer(figures, as_json, lambda: table(*reports.figures_table(figures)))


@evaluate.command("likelihood", short_help="Tell right answers from wrong ones by likelihood.")
@click.argument("file", type=FILE)
@click.option("--limit", type=click.IntRange(1), help="At most so many questions, evenly spread.")
@option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of wrong answers, draws and probes.")
@options.scoring_options
@concurrency_option
@options.server_options
@options.json_option
def likelihood_command(
    file: Path, limit: int | None, seed: int, scoring: Scoring, concurrency: int, server: Server, as_json: bool
) -> None:
    """Score each answer of FILE (jsonl: prompt, ground_truth), and another question's that has as many tokens.

    auc is the probability that a right answer scores above a wrong one; paired, above that of the same question. A
    question is left out when no other answer in FILE has as many tokens as its own, which left_out names.
    """
    found = records.read_records(file)
    questions, answers = spread(found, limit), [record.ground_truth for record in found]

    async def main() -> dict[str, Any]:
        async with connected(server) as client:
            with _progress(2 * len(questions), "scores") as bar:
                return await measure_likelihood(client, questions, answers, scoring, seed, concurrency, bar.update)

    figures = asyncio.run(main())
    answer(figures, as_json, lambda: table(*reports.figures_table(figures)))


async def identity(client: AsyncClient) -> dict[str, Any]:
    """What in a run's settings identifies the served model, its defaults and compute dtypes included."""
    info = await client.info(timeout=FIRST_CONTACT)
    return {
        "name": info.name,
        "space": info.space,
        "dtypes": {stage.stage: stage.server.dtype for stage in info.stages},
        "default_max_new_tokens": info.default_max_new_tokens,
        "default_sampler": plain(info.default_sampler),
        "default_sampling": plain(info.default_sampling),
    }


def _ask(asking: Asking, runs: Mapping[Path, Sampler]) -> Speed:
    """Ask everything with each sampler, each into its folder, showing progress. Returns the speed of the last one."""

    async def main() -> Speed:
        speed = Speed()
        async with connected(asking.server) as client:
            model = await identity(client)
            for path, sampler in runs.items():
                request = replace(asking.generation, sampler=sampler)
                about = {"model": model, "generation": {name: plain(getattr(request, name)) for name in _ASKED_WITH}}
                with RunFolder.opened(path, about, asking.tasks) as folder:
                    missing = len(folder.missing())
                    with _progress(missing, f"{path.name}: {missing} questions") as bar:
                        speed = await run_tasks(client, request, folder, asking.concurrency, on_output=bar.update)
        return speed

    try:
        return asyncio.run(main())
    except KeyboardInterrupt:
        click.echo("\nInterrupted. What was answered is kept: the same command continues from there.", err=True)
        raise


def _progress(length: int, label: str) -> Any:
    """A bar on standard error; `update` takes how many more are done, and the last output."""

    def failure(output: Record | None) -> str | None:
        return f"failed: {output.error}" if output and output.error else None

    return click.progressbar(
        length=length, label=label, file=sys.stderr, hidden=sys.stderr is None, show_pos=True,
        item_show_func=failure, update_min_steps=1,
    )  # fmt: skip


def _show_score(folder: Path, as_json: bool, whole: bool) -> None:
    """The score of a folder. Raises EvalError when answers failed or, if `whole`, are missing."""
    tasks = records.read_outputs(folder)
    figures = score(tasks)
    answer(figures, as_json, lambda: table(*score_table(figures)))
    failed = sum(output.error is not None for outputs in tasks.values() for output in outputs)
    asked = records.read_settings(folder).get("tasks", {}) if whole else {}
    missing = sum(int(task["questions"]) - len(tasks.get(name, ())) for name, task in asked.items())
    problems = [f"{failed} answers failed"] * (failed > 0) + [f"{missing} are missing"] * (missing > 0)
    if problems:
        raise EvalError(f"{' and '.join(problems)}: run again to ask them")


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` items, evenly spread over all, the first among them."""
    count = len(items)
    return items if limit is None or limit >= count else [items[at * count // limit] for at in range(limit)]
