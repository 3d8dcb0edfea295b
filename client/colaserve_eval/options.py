"""Options that several verbs share; each group reaches its command as one value."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from colaserve_client.cli.options import option, sampling_options
from colaserve_client.settings import Sampling
from colaserve_eval.connect import Connector
from colaserve_eval.demo import demo_tasks
from colaserve_eval.folder import Task
from colaserve_eval.records import EvalError, read_questions
from colaserve_eval.runner import GenerationSettings
from colaserve_eval.templates import load_template, read_raw_questions, shipped_templates

Command = Callable[..., Any]
Option = Callable[[Command], Command]
T = TypeVar("T")

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
SOLVERS = click.Choice(("euler", "ab2", "heun"))

pass_connector = click.make_pass_decorator(Connector, ensure=True)
concurrency_option = option(
    "--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Requests in flight."
)

_QUESTION_OPTIONS: Sequence[Option] = (
    click.argument("files", nargs=-1, type=FILE),
    click.option("--demo", is_flag=True, help="Ask the bundled demo checkpoint's own question sets."),
    click.option(
        "--template",
        help="Make the prompts of raw records by this template: a TOML file, or one of "
        f"{', '.join(shipped_templates())}. Without it FILES hold whole prompts.",
    ),
    click.option("--only", multiple=True, help="Only the tasks that this pattern fits (*, ?); may be repeated."),
    click.option("--limit", type=click.IntRange(1), help="At most so many questions of each task, evenly spread."),
)
_GENERATION_OPTIONS: Sequence[Option] = (
    option("--max-new-tokens", type=click.IntRange(1), help="Length at most.  [default: the server's]"),
    option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise."),
    click.option("--stop", multiple=True, help="End an answer before this string; may be repeated."),
)


def questions_options(command: Command) -> Command:
    """FILES, --demo, --template, --only, --limit; the command gets `tasks`."""

    @wraps(command)
    def wrapped(
        *args: Any,
        files: Sequence[Path],
        demo: bool,
        template: str | None,
        only: Sequence[str],
        limit: int | None,
        **others: Any,
    ) -> Any:
        if demo == bool(files) or (demo and template):
            raise click.UsageError("give question files, with or without --template, or --demo alone")
        tasks = _chosen(demo_tasks() if demo else read_tasks(files, template), only)
        return command(*args, tasks=[Task(task.name, spread(task.questions, limit)) for task in tasks], **others)

    return _with(_QUESTION_OPTIONS, wrapped)


def generation_options(command: Command) -> Command:
    """The options of a generation but for the sampler's; the command gets `generation`."""

    @wraps(command)
    def wrapped(
        *args: Any, max_new_tokens: int | None, sampling: Sampling, seed: int, stop: Sequence[str], **others: Any
    ) -> Any:
        settings = GenerationSettings(max_new_tokens, sampling=sampling, seed=seed, stop=tuple(stop))
        return command(*args, generation=settings, **others)

    return _with(_GENERATION_OPTIONS, sampling_options(wrapped))


def comma_separated(kind: "click.ParamType[Any]") -> Callable[[click.Context, click.Parameter, str], list[Any]]:
    """A click callback: "1,2" becomes two values of a kind."""

    def parse(context: click.Context, parameter: click.Parameter, value: str) -> list[Any]:
        return [kind.convert(item.strip(), parameter, context) for item in value.split(",")]

    return parse


def read_tasks(files: Sequence[Path], template: str | None) -> list[Task]:
    """A task a file, named after it. Raises EvalError when two files would be the same task."""
    loaded = load_template(template) if template else None
    tasks: dict[str, Task] = {}
    for file in files:
        if file.stem in tasks:
            raise EvalError(f"{file}: a file named {file.stem} is given already; tasks are named after their files")
        questions = read_raw_questions(file, loaded) if loaded else read_questions(file)
        tasks[file.stem] = Task(file.stem, questions)
    return list(tasks.values())


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` items, evenly spread over all, the first among them."""
    count = len(items)
    return items if limit is None or limit >= count else [items[at * count // limit] for at in range(limit)]


def _chosen(tasks: Sequence[Task], patterns: Sequence[str]) -> list[Task]:
    for pattern in patterns:
        if not any(fnmatchcase(task.name, pattern) for task in tasks):
            raise EvalError(f"--only {pattern}: fits none of {', '.join(task.name for task in tasks)}")
    return [task for task in tasks if not patterns or any(fnmatchcase(task.name, pattern) for pattern in patterns)]


def _with(options: Sequence[Option], command: Command) -> Command:
    for each in reversed(options):
        command = each(command)
    return command
