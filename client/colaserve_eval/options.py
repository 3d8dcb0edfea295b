"""Options that several verbs share; what they say reaches the verb as one value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from colaserve_client.cli.options import Server, option, sampling_options, server_options
from colaserve_client.settings import Sampling
from colaserve_eval.demo import demo_tasks
from colaserve_eval.folder import Task
from colaserve_eval.records import EvalError, read_records
from colaserve_eval.runner import GenerationSettings
from colaserve_eval.templates import load_template, read_raw_questions, shipped_templates

Command = Callable[..., Any]
T = TypeVar("T")

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
    generation: GenerationSettings  # but for the sampler
    concurrency: int
    server: Server


def asking_options(command: Command) -> Command:
    """FILES and all options but the sampler's of a verb that asks questions; the command gets `asking`."""

    @click.argument("files", nargs=-1, type=FILE)
    @click.option("--demo", is_flag=True, help="Ask the bundled demo checkpoint's own question sets.")
    @click.option(
        "--template",
        help="Make the prompts of raw records by this template: a TOML file, or one of "
        f"{', '.join(shipped_templates())}. Without it FILES hold whole prompts.",
    )
    @click.option("--only", multiple=True, help="Only the tasks that this pattern fits (*, ?); may be repeated.")
    @click.option("--limit", type=click.IntRange(1), help="At most so many questions of each task, evenly spread.")
    @click.option("--output", required=True, type=FOLDER, help="Folder for the answers; an unfinished run goes on.")
    @option("--max-new-tokens", type=click.IntRange(1), help="Length at most.  [default: the server's]")
    @option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise.")
    @click.option("--stop", multiple=True, help="End an answer before this string; may be repeated.")
    @sampling_options
    @concurrency_option
    @server_options
    @wraps(command)
    def wrapped(
        files: Sequence[Path], demo: bool, template: str | None, only: Sequence[str], limit: int | None,
        output: Path, max_new_tokens: int | None, seed: int, stop: tuple[str, ...], sampling: Sampling,
        concurrency: int, server: Server, **others: Any,
    ) -> Any:  # fmt: skip
        if demo == bool(files) or (demo and template):
            raise click.UsageError("give question files, with or without --template, or --demo alone")
        tasks = _chosen(demo_tasks() if demo else _read_tasks(files, template), only)
        limited = [Task(task.name, spread(task.questions, limit)) for task in tasks]
        generation = GenerationSettings(max_new_tokens, sampling=sampling, seed=seed, stop=stop)
        return command(asking=Asking(limited, output, generation, concurrency, server), **others)

    return wrapped


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` items, evenly spread over all, the first among them."""
    count = len(items)
    return items if limit is None or limit >= count else [items[at * count // limit] for at in range(limit)]


def _read_tasks(files: Sequence[Path], template: str | None) -> list[Task]:
    """A task a file, named after it. Raises EvalError when two files would be the same task."""
    loaded = load_template(template) if template else None
    tasks: dict[str, Task] = {}
    for file in files:
        if file.stem in tasks:
            raise EvalError(f"{file}: a file named {file.stem} is given already; tasks are named after their files")
        tasks[file.stem] = Task(file.stem, read_raw_questions(file, loaded) if loaded else read_records(file))
    return list(tasks.values())


def _chosen(tasks: Sequence[Task], patterns: Sequence[str]) -> list[Task]:
    for pattern in patterns:
        if not any(fnmatchcase(task.name, pattern) for task in tasks):
            raise EvalError(f"--only {pattern}: fits none of {', '.join(task.name for task in tasks)}")
    return [task for task in tasks if not patterns or any(fnmatchcase(task.name, pattern) for pattern in patterns)]
