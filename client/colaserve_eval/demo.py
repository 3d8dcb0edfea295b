"""The question sets of the bundled demo checkpoint, which ship with the services and are only read as files here."""

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from colaserve_client.reading import read_lines
from colaserve_eval.records import EvalError, Task, read_records

SERVICES = "colaserve_services"
TRAINED, HELD_OUT = "_trained_phrasings", "_held_out_phrasings"  # how the names of sets end
RULES = {"completions": "begins", "paragraphs": "true_sentences"}  # of the sets whose answers are no short texts


def demo_tasks(package: str = SERVICES) -> list[Task]:
    """One task a file of the demo's question sets, by name.

    Raises EvalError when the package that they come with is not installed or carries none.
    """
    folder = demo_folder(package) / "questions"
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise EvalError(f"{folder}: the demo's question sets are missing; reinstall colaserve")
    rules = {file: RULES.get(file.stem) for file in files}
    return [Task(file.stem, [replace(each, rule=rules[file]) for each in read_records(file)]) for file in files]


def demo_folder(package: str = SERVICES) -> Path:
    """Where the package of the services keeps the bundled checkpoint. Raises EvalError when it is not installed."""
    spec = find_spec(package)  # finds a top-level package without importing it, hence without torch
    if spec is None or not spec.submodule_search_locations:
        raise EvalError(
            f"the demo's question sets come with the package {package}, which is not installed here; "
            "pass question files instead"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "demo"


def held_out_texts() -> list[str]:
    """Texts that the demo was not trained on: its questions in held-out phrasings, each with its answer."""
    tasks = [task for task in demo_tasks() if task.name.endswith(HELD_OUT)]
    return [f"{question.prompt} {question.ground_truth}" for task in tasks for question in task.questions]


def reads_as_true(text: str) -> bool:
    """Whether a paragraph about a country has true sentences only: those of `true_sentences.tsv`, word for word."""
    rest = text.strip()
    sentences = next((line for line in _true_sentences() if _begins(rest, line[0])), ())
    while found := next((sentence for sentence in sentences if _begins(rest, sentence)), None):
        rest = rest[len(found) :].strip()
    return bool(sentences) and not rest


def _begins(text: str, sentence: str) -> bool:
    return f"{text} ".startswith(f"{sentence} ")


@cache
def _true_sentences() -> tuple[tuple[str, ...], ...]:
    """What is true of each country; the first sentence names it."""
    lines = read_lines(demo_folder() / "true_sentences.tsv")
    return tuple(tuple(line.split("\t")) for _, line in lines)
